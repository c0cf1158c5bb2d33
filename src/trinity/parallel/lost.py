"""What torch says when another process of the run has ended is no defect of this one: one sentence, for people."""

from collections.abc import Iterator
from contextlib import contextmanager

from trinity.base.errors import TrinityError

# Of gloo, of NCCL, and of the store they meet in (torch 2.13), in small letters. They have no error class of their own.
_SIGNS = (
    "connection closed by peer",
    "connection reset by peer",
    "connection was likely closed",
    "connection refused",
    "broken pipe",
    "socket closed",
    "remote process exited",
    "ncclremoteerror",
    "pair closure",
)


@contextmanager
def noticing_lost_peers() -> Iterator[None]:
    """Turn the loss of another process into a TrinityError."""
    try:
        yield
    except RuntimeError as error:
        if not any(sign in str(error).lower() for sign in _SIGNS):
            raise
        raise TrinityError(
            "Another process of this run ended.",
            "See its message; the same command again goes on from the last checkpoint.",
        ) from error
