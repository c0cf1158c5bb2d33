"""What torch says when the processes of a run lose each other, or never meet, is no defect: a sentence for people."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from trinity.base.errors import TrinityError

# Of gloo, of NCCL, and of the store they meet in (torch 2.13). They have no error class of their own.
_ENDED = re.compile(
    r"connection (closed by peer|reset by peer|was likely closed|refused)|broken pipe|socket closed|"
    r"got 0 bytes|remote process exited|ncclremoteerror|pair closure",
    re.IGNORECASE,
)
_LATE = re.compile(r"timed out|(wait|connect|operation) timeout", re.IGNORECASE)
_AGAIN = "the same command again goes on from the last checkpoint."


@contextmanager
def noticing_lost_peers() -> Iterator[None]:
    """Turn the loss of another process, or of the way to it, into a TrinityError."""
    try:
        yield
    except RuntimeError as error:
        known = _known(error)
        if known is None:
            raise
        raise known from error


def absent(what: str) -> TrinityError:
    """Not all processes of a start have come."""
    return TrinityError(
        f"The processes of this run did not all meet: {what}.",
        "Start as many as WORLD_SIZE says, each with MASTER_ADDR and MASTER_PORT of the first, which all must reach.",
    )


def _known(error: RuntimeError) -> TrinityError | None:
    text = " ".join(str(error).split()).rstrip(".")
    if "EADDRINUSE" in text:
        return TrinityError(
            f"The port at which the processes of this run are to meet is taken: {text}.",
            "Set MASTER_PORT, or --master-port of torchrun, to a free one, or end what listens there.",
        )
    if _ENDED.search(text):
        return TrinityError("Another process of this run ended.", f"See its message; {_AGAIN}")
    if isinstance(error, dist.DistStoreError | dist.DistNetworkError):
        return absent(text)
    if _LATE.search(text):
        return TrinityError(
            f"Another process of this run did not answer in time: {text}.",
            f"It hangs, has ended, or cannot be reached: see its message and the run's hangs/; {_AGAIN}",
        )
    return None
