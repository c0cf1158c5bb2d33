"""Progress with time left of whatever takes long, on stderr: a bar in a terminal, sparse lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Timer

from trinity.base.units import show_seconds

Advance = Callable[[int], None]  # told how much was done since
SECONDS_BETWEEN_LINES = 10.0
SECONDS_BEFORE_BAR = 0.5  # what is done by then needs none


@contextmanager
def progress(label: str, total: int) -> Iterator[Advance]:
    """Yields `advance(amount)`; `total` is the sum of amounts expected."""
    if sys.stderr.isatty():
        with _bar(label, total) as advance:
            yield advance
    else:
        yield _lines(label, total)


@contextmanager
def _bar(label: str, total: int) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(label, total=max(total, 1))
    shown = Timer(SECONDS_BEFORE_BAR, bar.start)
    shown.daemon = True
    shown.start()
    try:
        yield lambda amount: bar.advance(task, amount)
    finally:
        shown.cancel()
        shown.join()
        bar.stop()


def _lines(label: str, total: int) -> Advance:
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
