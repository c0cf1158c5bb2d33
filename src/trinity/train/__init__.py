"""Floor 4: the training loop: one step, then its duties."""
