"""The processes that write or read one checkpoint together. What fails on one of them fails on all, with one error."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from trinity.base.errors import CheckpointError, StorageError, TrinityError

T = TypeVar("T")


@dataclass(frozen=True)
class Peers:
    """This process's place among them. `group` carries Python objects over the CPU; None where there is one process."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """The values of all processes in the order of their ranks; an empty list on all but the first."""
        if self.group is None:
            return [value]
        found: list[Any] | None = [None] * self.size if self.is_first else None
        dist.gather_object(value, found, group=self.group, group_dst=0)
        return found or []

    def gather_everywhere(self, value: T) -> list[T]:
        """The values of all processes, on every one of them."""
        if self.group is None:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return found

    def scatter(self, values: list[T]) -> T:
        """This process's entry of the first one's list; the others' lists are not looked at."""
        if self.group is None:
            return values[0]
        found: list[Any] = [None]
        dist.scatter_object_list(found, values if self.is_first else None, group=self.group, group_src=0)
        return found[0]

    def share(self, value: T) -> T:
        """The first process's value."""
        if self.group is None:
            return value
        found: list[Any] = [value]
        dist.broadcast_object_list(found, group=self.group, group_src=0)
        return found[0]

    def together(self, work: Callable[[], T]) -> T:
        """Do a piece of work on every process, without exchange inside. Where it fails on any, it fails on all.

        Raises this process's own error, or the first failing one's as a TrinityError that names its rank.
        """
        if self.group is None:
            return work()
        result, failure = None, None
        try:
            result = work()
        except Exception as error:  # noqa: BLE001  (whatever it is: the others would wait for this process)
            failure = error
        told = self.gather_everywhere(None if failure is None else _told(failure, self.rank))
        if failure is not None:
            raise failure
        for error in told:
            if error is not None:
                raise error
        return result  # type: ignore[return-value]

    def first(self, work: Callable[[], T]) -> T | None:
        """Do a piece of work on the first process alone; its error is raised on all. Its result stays there."""
        return self.together(lambda: work() if self.is_first else None)


ALONE = Peers()


def _told(error: Exception, rank: int) -> TrinityError:
    """An error as the other processes raise it; not every exception can travel as it is."""
    if isinstance(error, TrinityError):
        return type(error)(f"Process {rank}: {error.what}", error.remedy)
    if isinstance(error, OSError):
        return StorageError(
            f"The disk refused process {rank}: {error}.",
            "Nothing saved before was touched. Mend that and run the same command again.",
        )
    return CheckpointError(f"Process {rank} failed with {type(error).__name__}: {error}.", "See what it printed.")
