"""All that looks after one process of a run beside its arithmetic: heartbeat, hang alarm, stragglers, and the pager.

    with Watch(run, config.train, world, say, start) as watch:
        watch.begins(phase, step, tokens)
        watch.loaded()
        for incident in watch.stepped(phase, step, tokens, loss, loading, seconds): ...
        with watch.doing("evaluating"): ...

Leaving the block tells how the run ended. Process 0 speaks for the run; a hang or a crash is told by whoever meets it.
Until its first phase begins nothing is written into its folder: a command that is refused leaves it as it was.
"""

import math
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from trinity.base import launch
from trinity.base.errors import StorageError, UsageError
from trinity.config.phases import Phase
from trinity.config.train import TrainConfig
from trinity.parallel.mesh import World
from trinity.train.alarm import WEBHOOK, Alarm, Pager, channels, ring
from trinity.train.evidence import Incident
from trinity.train.hang import HANGS, STEPPING, HangAlarm
from trinity.train.heartbeat import Heartbeat
from trinity.train.stragglers import Stragglers

EXIT_OF_A_HANG = 75  # the system's "temporary failure, try again"
_LAST_WORDS = 20.0  # seconds a process that ends because of a hang waits for its alarm to be sent


class Watch:
    def __init__(
        self,
        run: Path,
        config: TrainConfig,
        world: World,
        say: Callable[[str], None],
        start: str,
        leave: Callable[[int], object] = os._exit,
    ) -> None:
        """start: a name that the processes of this start of the run share with each other and with no other start.

        Raises what `channels` raises, in every process and before any work.
        """
        self._run, self._train, self._world, self._say, self._leave = run, config, world, say, leave
        self._start = start
        self._pager = Pager(channels(config.alarm_command), config.alarm_quiet_minutes, say, memory=launch.folder())
        self._heartbeat = Heartbeat(run, world.size, say) if world.is_first else None
        self._hang = HangAlarm(run, world.rank, config.hang_minutes, self._hanging)
        self._stragglers = Stragglers(world, config.probe_every, config.straggler_factor)
        self._phase, self._step, self._tokens = "", 0, 0
        self._doing, self._opened = "opening", False
        self._hung: list[str] = []  # told by the thread, logged by the loop when it goes on

    def __enter__(self) -> "Watch":
        self._hang.start()
        self._stragglers.open()
        self._beat()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hang.close()
        self._stragglers.close()
        if error is None:
            self._end("finished", "")
        elif isinstance(error, KeyboardInterrupt):
            self._end("interrupted", "a person ended it")
        else:
            self._failed(error)
        self._pager.close()

    def begins(self, phase: Phase, step: int, tokens: int) -> None:
        """The run, or a phase of it, is this process's to go on with from here. Its first step may take long."""
        self._phase, self._step, self._tokens = phase.name, step, tokens
        self._doing, self._opened = "starting", True
        self._stragglers.turn_phase()
        self._beat()

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Work that may take long and is no step."""
        before, self._doing = self._doing, what
        self._beat()
        yield
        self._doing = before
        self._beat()

    def loaded(self) -> None:
        """The data of the step that begins is here."""
        self._stragglers.begin()

    def stepped(
        self, phase: Phase, step: int, tokens: int, loss: float, loading: float, stepping: float
    ) -> list[Incident]:
        """A step of `phase` was finished, which took `stepping` seconds in all and `loading` for its data; what is to
        be logged of stragglers, and of a hang that is over. Called by every process after every step, also a skipped
        one."""
        speed = round(phase.batch_tokens / stepping, 1)
        self._phase, self._step, self._tokens, self._doing = phase.name, step, tokens, STEPPING
        self._beat(loss=loss if math.isfinite(loss) else None, tokens_per_second=speed)
        slow = self._stragglers.observe(loading, stepping)
        hung, self._hung = self._hung, []
        return [Incident("hang", what, "over", {}) for what in hung] + [
            Incident("straggler", what, "alarm", {}) for what in slow
        ]

    def alarm(self, kind: str, sentence: str, action: str) -> None:
        if self._world.is_first:
            self._pager.tell(self._made(kind, sentence, action))

    def _beat(self, **values: object) -> None:
        self._hang.beat(self._doing)
        if self._heartbeat and self._opened:
            self._heartbeat.beat(**self._place(), doing=self._doing, **values)

    def _end(self, state: str, reason: str) -> None:
        if self._heartbeat and self._opened:
            self._heartbeat.beat(**self._place(), doing="", state=state, reason=reason)

    def _place(self) -> dict[str, object]:
        return {"phase": self._phase, "step": self._step, "tokens": self._tokens}

    def _made(self, kind: str, sentence: str, action: str) -> Alarm:
        return made_alarm(kind, sentence, action, self._run, self._step, self._tokens, self._world.rank)

    def _hanging(self, seconds: float, doing: str, trace: str) -> None:
        exits = self._train.hang_action == "exit"
        sentence = (
            f"no step has been finished for {seconds / 60:.3g} minutes while {doing} after step {self._step} "
            f"(rank {self._world.rank}); the stacks of all threads are in {trace}"
        )
        self._hung.append(sentence)
        action = "the process ends itself, its launcher may start it again" if exits else "the process goes on waiting"
        (sys.__stderr__ or sys.stderr).write(f"{sentence} -> {action}\n")
        if self._first_to_tell("hang"):
            self._pager.tell(self._made("hang", sentence, action))
        if exits:
            self._end("hung", sentence)
            self._pager.close(_LAST_WORDS)
            self._leave(EXIT_OF_A_HANG)

    def _failed(self, error: BaseException) -> None:
        alike, lasting, reason = getattr(error, "alike", False), getattr(error, "lasting", False), _reason(error)
        if self._world.is_first if alike or not self._opened else self._first_to_tell("end"):
            kind, action, again = _told_of_end(error)
            self._pager.tell(self._made(kind, reason, action), at_once=not again)
        self._end("halted" if lasting else "failed", reason)

    def _first_to_tell(self, what: str) -> bool:
        """What one process meets all will meet: whoever makes the file first tells of it."""
        try:
            (self._run / HANGS).mkdir(exist_ok=True)
            (self._run / HANGS / f".{what}-{self._start}-{self._step:08d}").touch(exist_ok=False)
        except FileExistsError:
            return False
        except OSError:
            return True  # rather twice than never
        return True


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _told_of_end(error: BaseException) -> tuple[str, str, bool]:
    """Kind and action of the alarm, and whether the launcher will start the run again."""
    again = launch.starts_again() and not getattr(error, "lasting", False)
    kind = "storage" if isinstance(error, StorageError) else "crash" if again else "halt"
    return kind, "the launcher starts it again" if again else "the run has ended", again


def tell_of_no_start(run: Path, config: TrainConfig, error: Exception, say: Callable[[str], None]) -> None:
    """The processes did not come together, so there is no Watch: the first one tells why."""
    if os.environ.get("RANK", "0") != "0":
        return
    with suppress(UsageError):  # an alarm that cannot be sent is no reason to hide what the run met
        pager = Pager(channels(config.alarm_command), config.alarm_quiet_minutes, say, memory=launch.folder())
        kind, action, again = _told_of_end(error)
        pager.tell(made_alarm(kind, _reason(error), action, run, 0, 0, 0), at_once=not again)
        pager.close()


def made_alarm(kind: str, sentence: str, action: str, run: Path, step: int, tokens: int, rank: int) -> Alarm:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Alarm(kind, sentence, action, run.resolve().name, step, tokens, socket.gethostname(), rank, now)


def ring_for_test(run: Path, config: TrainConfig) -> dict[str, str]:
    """Send a test alarm by every way that is configured: {way: problem or ""}. A UsageError when there is none."""
    ways = channels(config.alarm_command)
    if not ways:
        raise UsageError(
            "No alarm is configured.", f"Set train.alarm_command, the environment variable {WEBHOOK}, or both."
        )
    return ring(made_alarm("test", "this is a test of the alarm", "nothing", run, 0, 0, 0), ways)
