"""A run on the screen: loss, bits per byte, MaxVio, dead experts, tokens per second, time left.

On a terminal one live line; otherwise (a log file, a pipe) one plain line every few seconds.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from trinity.base.units import show_count, show_seconds
from trinity.train.duties import Progress as StepProgress

_PLAIN_SECONDS = 10.0


@contextmanager
def _unless_refused() -> Iterator[None]:
    """The screen may be a file on a full disk: what that does not take ends no run. A reader that goes away does."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError:
        pass


class TrainingDisplay:
    """`with TrainingDisplay(total_tokens) as display: train(..., say=display.say, show=display.show)`."""

    def __init__(self, total_tokens: int, shown: bool = True) -> None:
        """shown: False for the processes of a run that leave the screen to the first one."""
        self.total, self.shown = total_tokens, shown
        self.console = Console(stderr=True, highlight=False)
        self.live = shown and self.console.is_terminal
        self.started: float | None = None
        self.start_tokens = 0
        self.last_plain = 0.0
        self.evaluated: tuple[float | None, int] = None, 0  # bits per byte, and the step after which they were measured
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[figures]}"),
            console=self.console,
        )
        self.task = self.bar.add_task("training", total=total_tokens, figures="starting")

    def __enter__(self) -> "TrainingDisplay":
        if self.live:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live:
            self.bar.stop()

    def say(self, sentence: str) -> None:
        if self.shown:
            with _unless_refused():
                self.console.print(sentence, markup=False, soft_wrap=True)

    def show(self, progress: StepProgress) -> None:
        if not self.shown:
            return
        now = time.monotonic()
        if self.started is None:
            self.started, self.start_tokens = now, progress.tokens
        if progress.bits_per_byte != self.evaluated[0]:
            self.evaluated = progress.bits_per_byte, progress.step - 1
        done = progress.tokens - self.start_tokens
        left = (now - self.started) / done * (self.total - progress.tokens) if done else None
        figures = self._figures(progress, left)
        if self.live:
            self.bar.update(self.task, completed=progress.tokens, figures=figures)
        elif now - self.last_plain >= _PLAIN_SECONDS or progress.tokens >= self.total:
            self.last_plain = now
            share = 100 * progress.tokens / self.total
            with _unless_refused():
                print(f"{share:5.1f}%  {figures}", file=sys.stderr, flush=True)

    def _figures(self, progress: StepProgress, left: float | None) -> str:
        bits, step = self.evaluated
        measured = "-" if bits is None else f"{bits:.3f} at step {step}"
        return (
            f"loss {progress.loss:.3f}  bits/byte {measured}  MaxVio {progress.max_violation:.2f}  "
            f"dead {progress.dead_experts}  {show_count(round(progress.tokens_per_second))} tok/s  "
            f"left {'-' if left is None else show_seconds(left)}"
        )
