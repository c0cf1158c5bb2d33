"""The processes of a run at work together, as on a checkpoint. What fails on one fails on all, with one error."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from trinity.base.errors import TrinityError, common_failure, told

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

        All raise one error, which names the first that failed unless all failed alike (base/errors.py). What is no
        TrinityError is raised as it is where it happened.
        """
        if self.group is None:
            return work()
        result, failure = None, None
        try:
            result = work()
        except Exception as error:  # noqa: BLE001  (whatever it is: the others would wait for this process)
            failure = error
        common = common_failure(self.gather_everywhere(failure and told(failure, self.rank)))
        if failure is not None and not isinstance(failure, TrinityError):
            raise failure
        if common is not None:
            raise common from failure
        return result  # type: ignore[return-value]

    def first(self, work: Callable[[], T]) -> T | None:
        """Do a piece of work on the first process alone; its error is raised on all. Its result stays there."""
        return self.together(lambda: work() if self.is_first else None)


ALONE = Peers()
