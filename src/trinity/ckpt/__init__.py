"""Floor 3: checkpoints and model folders: names, reading, writing, verifying."""
