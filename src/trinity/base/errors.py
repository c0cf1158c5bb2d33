"""What can go wrong, as a tree.

    TrinityError              one clear sentence and a remedy; the command line ends with exit code 1
    ├── UsageError            the command cannot be carried out as typed; exit code 2
    │   ├── ConfigError       an unknown key, recipe or a value that contradicts another
    │   └── TakenError        others hold the folder or the memory that it needs, just now
    ├── DataError             a document, shard or folder that cannot be read as what it claims to be
    ├── CheckpointError       a checkpoint or model folder that is missing, altered, or of another shape
    ├── StorageError          the disk refused a write (full, read-only); nothing saved before is touched
    ├── TrainingHalted        the guard stopped a run and says why
    ├── RequestError          a generation request that this model cannot serve
    └── VerificationError     a release whose bytes or signature do not match what it promises

Errors that a person can cause carry what happened and what to try. Broken invariants of our own are `assert`s.

Of several processes that train together one may meet what the others do not: it tells them (`told`), and all raise one
and the same error (`common_failure`), which the first one prints.
"""

import errno
import re
import socket
from collections.abc import Collection, Sequence
from difflib import get_close_matches
from typing import NamedTuple


class TrinityError(Exception):
    """Base of all errors that a person can cause or meet. `remedy` is the sentence that says what to do next."""

    exit_code = 1
    alike = False  # every process of the run raises it: one of them need print it
    lasting = False  # a start with nothing changed would meet it again (base/launch.py)

    def __init__(self, what: str, remedy: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.what} {self.remedy}".strip()


class UsageError(TrinityError):
    exit_code = 2
    lasting = True


class ConfigError(UsageError):
    pass


class TakenError(UsageError):
    lasting = False  # often by a process that was killed a moment ago


class DataError(TrinityError):
    lasting = True


class CheckpointError(TrinityError):
    lasting = True


class StorageError(TrinityError):
    pass


class TrainingHalted(TrinityError):
    alike = True  # the guard judges figures of all processes
    lasting = True


class RequestError(TrinityError):
    pass


class VerificationError(TrinityError):
    pass


class Told(NamedTuple):
    """What a process tells the others of its failure; not every exception can travel as it is."""

    process: str
    error: TrinityError


def told(failure: Exception, rank: int) -> Told:
    if isinstance(failure, TrinityError):
        error = type(failure)(failure.what, failure.remedy)
    elif isinstance(failure, OSError):
        remedy = "Nothing saved before was touched. Mend that and run the same command again."
        error = StorageError(f"The system refused: {failure}.", remedy)
    else:
        error = TrinityError(f"{type(failure).__name__}: {failure}.", "See what that process printed.")
    return Told(f"process {rank} on {socket.gethostname()}", error)


def common_failure(each: Sequence[Told | None]) -> TrinityError | None:
    """What all processes raise, given what each of them told; None when none failed.

    What all say alike stays as it is. Else it is the error of the first that failed, which it names.
    """
    failed = [one for one in each if one is not None]
    if not failed:
        return None
    process, error = failed[0]
    if len(failed) < len(each) or any(one.error.what != error.what for one in failed):
        error = type(error)(f"On {process}: {error.what}", error.remedy)
    error.alike = True
    return error


def out_of_memory(error: BaseException) -> str | None:
    """What could not be had, where an error says that memory ran out: of Python, numpy, torch or the system. Else None.

    By its words, since this floor has no torch, and torch no class of its own for the memory of the CPU.
    """
    text = str(error)
    signs = ("out of memory", "can't allocate memory", "alloc_failed")
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, MemoryError) or number == errno.ENOMEM or any(sign in text.lower() for sign in signs):
        asked = re.search(r"allocate ([\d.]+ [A-Za-z]+)", text)
        return f"Memory ran out: {asked[1]} could not be allocated" if asked else "Memory ran out"
    return None


def nearest(name: str, known: Collection[str], otherwise: str = "", cutoff: float = 0.5) -> str:
    """A remedy sentence offering the known name closest to a mistyped one; `otherwise`, or the whole list, when none is
    as close as `cutoff` (of 1, the same)."""
    close = get_close_matches(name, known, n=1, cutoff=cutoff)
    if close:
        return f"Did you mean '{close[0]}'?"
    return otherwise or f"Known: {', '.join(sorted(known))}."
