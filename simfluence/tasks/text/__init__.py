"""Tasks of text: what they are made of, and ready-made ones."""
