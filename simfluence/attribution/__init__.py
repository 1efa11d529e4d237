"""Training-data attribution: which training examples raise or lower the loss of a test example, from gradients."""
