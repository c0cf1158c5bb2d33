"""What can go wrong, as a tree.

    TrinityError              one clear sentence and a remedy; the command line ends with exit code 1
    ├── UsageError            the command cannot be carried out as typed; exit code 2
    │   └── ConfigError       an unknown key, recipe or a value that contradicts another
    ├── DataError             a document, shard or folder that cannot be read as what it claims to be
    ├── CheckpointError       a checkpoint or model folder that is missing, altered, or of another shape
    ├── StorageError          the disk refused a write (full, read-only); nothing saved before is touched
    ├── TrainingHalted        the guard stopped a run and says why
    ├── RequestError          a generation request that this model cannot serve
    └── VerificationError     a release whose bytes or signature do not match what it promises

Errors that a person can cause carry what happened and what to try. Broken invariants of our own are `assert`s.
"""

from difflib import get_close_matches


class TrinityError(Exception):
    """Base of all errors that a person can cause or meet. `remedy` is the sentence that says what to do next."""

    exit_code = 1

    def __init__(self, what: str, remedy: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.what} {self.remedy}".strip()


class UsageError(TrinityError):
    exit_code = 2


class ConfigError(UsageError):
    pass


class DataError(TrinityError):
    pass


class CheckpointError(TrinityError):
    pass


class StorageError(TrinityError):
    pass


class TrainingHalted(TrinityError):
    pass


class RequestError(TrinityError):
    pass


class VerificationError(TrinityError):
    pass


def nearest(name: str, known: list[str]) -> str:
    """A remedy sentence offering the known name closest to a mistyped one, or the whole list when none is close."""
    close = get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"Did you mean '{close[0]}'?"
    return f"Known: {', '.join(sorted(known))}."
