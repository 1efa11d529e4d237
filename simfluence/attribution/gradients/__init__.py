"""Per-example gradients: found, tried, taken as factors, and multiplied."""
