"""Floor 2: read run folders, never live objects; plots and self-contained pages. No torch."""
