"""Floor 2: tokenizer, BPE training, chat template. No torch."""
