"""Floor 1: every setting of the system as frozen dataclasses. No torch; nothing here does anything but hold and check."""
