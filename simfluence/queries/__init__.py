"""Questions asked of a simulator: what-ifs, effects of single examples, removals; and retraining that confirms them."""
