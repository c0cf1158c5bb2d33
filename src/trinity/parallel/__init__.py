"""Floor 3: one training step over several processes. The model does not know; `apply.py` puts it together."""
