"""Tasks of text: building blocks and ready-made tasks."""
