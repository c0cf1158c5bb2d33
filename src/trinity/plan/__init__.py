"""Floor 2: closed-form sizes of a model, from its configuration alone. No torch."""
