"""Floor 5: probes of a finished model, each with an interval."""
