"""Floor 2: Muon, parameter groups and schedules on one device."""
