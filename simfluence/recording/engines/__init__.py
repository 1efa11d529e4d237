"""Training engines: one run after another, or many at once."""
