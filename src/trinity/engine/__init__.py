"""Floor 4: generation with a KV cache, on the same model code."""
