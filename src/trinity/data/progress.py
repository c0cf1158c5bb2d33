"""Progress with time left for long passes over text, on stderr: a bar in a terminal, sparse lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from trinity.base.units import show_seconds

SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yields `advance(amount)`; `total` is the sum of amounts expected."""
    if sys.stderr.isatty():
        with _bar(label, total) as advance:
            yield advance
    else:
        yield _lines(label, total)


@contextmanager
def _bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=max(total, 1))
        yield lambda amount: bar.advance(task, amount)


def _lines(label: str, total: int) -> Callable[[int], None]:
    begun = time.monotonic()
    done, next_line = 0, begun + SECONDS_BETWEEN_LINES

    def advance(amount: int) -> None:
        nonlocal done, next_line
        done += amount
        now = time.monotonic()
        if now >= next_line and 0 < done < total:
            left = show_seconds((now - begun) * (total - done) / done)
            print(f"{label}: {done / total:.0%}, {left} left", file=sys.stderr, flush=True)
            next_line = now + SECONDS_BETWEEN_LINES

    return advance
