"""What trains: one run after the other, or many at once."""
