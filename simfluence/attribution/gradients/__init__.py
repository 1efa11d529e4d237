"""Per-example gradients: the rules for each layer, their check against autograd, factors and inner products."""
