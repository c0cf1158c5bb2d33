"""Floor 0: what every other floor stands on. Errors, units, seeds, durable files, lineage, run folders."""
