"""Floor 5: fine-tuning."""
