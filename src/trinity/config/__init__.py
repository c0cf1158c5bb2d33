"""Floor 1: every setting of the system as frozen dataclasses. No torch; code here holds and checks, no more."""
