"""Floor 6: bundle, card, signature, verification."""
