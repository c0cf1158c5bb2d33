"""The guard: what happens when a step's loss, gradient or routing is not what it should be. Stated, logged, tested.

    non-finite loss or gradient   train.nonfinite_action   skip: the update is dropped, the batch is spent
    loss or norm spike            train.spike_action       rollback: weights return to the newest good checkpoint, the
                                                           data does not (the guilty stretch is not read again)
                                                           stop: the run ends with a clear message
    non-finite weights, moments   found when a checkpoint is due, which is refused: rollback, or stop where
                                                           train.nonfinite_action says so (no skip: they have moved)
    routing drifts, collapses     train.router_action      alarm: the run goes on and a person is told; rollback; stop
    max_incidents in a row        stop in any case
    max_incidents roll-backs      and no checkpoint further on than before: stop, the run does not get past it

A spike is a loss more than `spike_sigmas` standard deviations above the mean of the recent good ones, or a gradient
norm whose logarithm lies `norm_spike_sigmas` above (norms are skewed, their logarithm is not). Three spikes in a row
that agree with each other are no accident but a new level (another kind of text): the third is taken as good. Spikes
that led to a roll-back count on, though the good steps before them are run again: the same level met behind one
checkpoint three times is a new level too. So is a drift of the routing met there three times: it is told, and passes.

A phase that reads another mix, or takes rows or steps of another size, begins new levels and a new trend: its first 16
steps have no spikes, and its first 100 no trend.

All it reads are global figures, equal on every process, and all it knows is in the checkpoint and in what a roll-back
to it records: every process decides alike, and a resumed run as the unbroken one.
"""

import math
from collections import deque
from typing import Any, NamedTuple

from torch import Tensor

from trinity.balance.trend import DRIFT, RouterTrend
from trinity.config.phases import Phase
from trinity.config.train import TrainConfig

_WINDOW = 64  # good values remembered
_ENOUGH = 16  # values before spikes are judged: the first ones fall too fast
_AGREEING = 3  # spikes that, being alike, are the new level
_ALIKE = 4.0  # standard deviations within which they lie


class Verdict(NamedTuple):
    action: str  # "update", "alarm" (update, but tell), "skip", "rollback" or "stop"
    reason: str = ""
    kind: str = ""  # "non-finite", "spike" or "router"


class Level:
    """What is normal for one figure: the recent good values, and the spikes since."""

    def __init__(self, sigmas: float, smallest_sigma: float, largest_rise: float) -> None:
        """smallest_sigma keeps a quiet stretch from calling noise a spike; a lasting rise above largest_rise is a
        ruined model, not another kind of text."""
        self._sigmas, self._smallest_sigma, self._largest_rise = sigmas, smallest_sigma, largest_rise
        self.good: deque[float] = deque(maxlen=_WINDOW)
        self.spikes: deque[float] = deque(maxlen=_AGREEING)  # in a row, the newest last
        self.met: deque[float] = deque(maxlen=_AGREEING)  # those that were rolled back since the last save

    @property
    def mean(self) -> float:
        return sum(self.good) / len(self.good)

    def is_spike(self, value: float) -> bool:
        """Whether `value` is one. The third of three that agree is not: the level moves to theirs."""
        if not self._sigmas or len(self.good) < _ENOUGH or value <= self.mean + self._sigmas * self._sigma():
            return False
        self.spikes.append(value)
        newest = [*self.met, *self.spikes][-_AGREEING:]
        if not self._is_new_level(newest):
            return True
        # Their spread stays known, so the guard never goes blind.
        rise = sum(newest) / len(newest) - self.mean
        self.good = deque((value + rise for value in self.good), maxlen=_WINDOW)
        return False

    def accept(self, value: float) -> None:
        self.spikes.clear()
        self.good.append(value)

    def forget(self) -> None:
        """Nothing is normal yet."""
        for values in (self.good, self.spikes, self.met):
            values.clear()

    def rolled_back(self, state: dict[str, list[float]]) -> None:
        """What was good is again what the checkpoint knew; the spikes since are remembered."""
        self.good = deque(state["good"], maxlen=_WINDOW)
        self.met.extend(self.spikes)
        self.spikes.clear()

    def state(self) -> dict[str, list[float]]:
        return {"good": list(self.good), "spikes": list(self.spikes), "met": list(self.met)}

    def load_state(self, state: dict[str, list[float]]) -> None:
        self.good = deque(state["good"], maxlen=_WINDOW)
        self.spikes = deque(state["spikes"], maxlen=_AGREEING)
        self.met = deque(state["met"], maxlen=_AGREEING)

    def _sigma(self) -> float:
        mean = self.mean
        return max((sum((value - mean) ** 2 for value in self.good) / len(self.good)) ** 0.5, self._smallest_sigma)

    def _is_new_level(self, spikes: list[float]) -> bool:
        return (
            len(spikes) == _AGREEING
            and max(spikes) - min(spikes) <= _ALIKE * self._sigma()
            and max(spikes) - self.mean <= self._largest_rise
        )


class Guard:
    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.loss = Level(config.spike_sigmas, smallest_sigma=0.02, largest_rise=1.0)  # nats
        self.norm = Level(config.norm_spike_sigmas, smallest_sigma=0.2, largest_rise=math.log(10))  # of the logarithm
        self.trend = RouterTrend(config.router_factor)
        self.incidents = 0  # in a row
        self.rollbacks, self.drifts = 0, 0  # since the save that was furthest on
        self.furthest = 0  # its step
        self.reads: list[int] | None = None  # what the phase of the last step reads

    def turn_to(self, phase: Phase) -> None:
        """The next step is of this phase. When it reads other text, or more or less of it, what was normal is not."""
        reads = [phase.corpus, phase.sequence_length, phase.batch_tokens]
        if self.reads not in (None, reads):
            self.loss.forget()
            self.norm.forget()
            self.trend.begin_anew()
            self.drifts = 0
        self.reads = reads

    def judge(self, loss: float, grad_norm: float) -> Verdict:
        """Decide on one step before anything moves."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self.loss.spikes.clear()
            self.norm.spikes.clear()
            what = f"loss {loss:.4g}, gradient norm {grad_norm:.4g}"
            return self._incident(what, self.config.nonfinite_action, "non-finite")
        size = math.log(max(grad_norm, 1e-30))
        # Both are asked: a new kind of text raises both, and each must come to know its new level.
        high_loss, high_norm = self.loss.is_spike(loss), self.norm.is_spike(size)
        if high_loss:
            what = f"loss {loss:.3f} after a recent mean of {self.loss.mean:.3f}"
            return self._incident(what, self.config.spike_action, "spike")
        if high_norm:
            what = f"gradient norm {grad_norm:.3g} after a recent mean of {math.exp(self.norm.mean):.3g}"
            return self._incident(what, self.config.spike_action, "spike")
        self.incidents = 0
        self.loss.accept(loss)
        self.norm.accept(size)
        return Verdict("update")

    def judge_routing(self, counts: Tensor, biases: list[Tensor]) -> Verdict:
        """Decide on where the routing is heading, for a step that `judge` lets pass. counts [L, E], L biases [E]."""
        troubles = self.trend.observe(counts, biases)
        if not troubles:
            return Verdict("update")
        what, action = "; ".join(sentence for _, sentence in troubles), self.config.router_action
        self.drifts += any(kind == DRIFT for kind, _ in troubles)
        # Text decides where tokens go. A collapse is never the text's, however often it is met.
        if action == "rollback" and self.drifts >= _AGREEING and all(kind == DRIFT for kind, _ in troubles):
            what, action = f"{what}; met {self.drifts} times behind one checkpoint, so it is the text's", "alarm"
        return Verdict("alarm", what, "router") if action == "alarm" else self._incident(what, action, "router")

    def judge_tensors(self, names: list[str]) -> Verdict:
        """Decide on a state that is due to be saved, in which the tensors of these names are not finite."""
        if not names:
            return Verdict("update")
        what = f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''} not finite, not saved"
        return self._incident(what, "stop" if self.config.nonfinite_action == "stop" else "rollback", "non-finite")

    def saved(self, step: int) -> None:
        """A checkpoint of `step` is being written. What a branch after a roll-back saves again is no progress."""
        if step > self.furthest:
            self.furthest = step
            self.rollbacks, self.drifts = 0, 0
            self.loss.met.clear()
            self.norm.met.clear()

    def rolled_back(self, state: dict[str, Any]) -> None:
        """What counts as normal is again what the checkpoint knew; incidents, roll-backs and spikes stay counted."""
        self.loss.rolled_back(state["loss"])
        self.norm.rolled_back(state["norm"])
        self._load_rest(state)

    def state(self) -> dict[str, Any]:
        return {
            "loss": self.loss.state(),
            "norm": self.norm.state(),
            "trend": self.trend.state(),
            "reads": self.reads,
            "incidents": self.incidents,
            "rollbacks": self.rollbacks,
            "drifts": self.drifts,
            "furthest": self.furthest,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.loss.load_state(state["loss"])
        self.norm.load_state(state["norm"])
        self._load_rest(state)
        for count in ("incidents", "rollbacks", "drifts", "furthest"):
            setattr(self, count, state[count])

    def _load_rest(self, state: dict[str, Any]) -> None:
        self.trend.load_state(state["trend"])
        self.reads = state["reads"]

    def _incident(self, what: str, action: str, kind: str) -> Verdict:
        self.incidents += 1
        if self.incidents >= self.config.max_incidents:
            return Verdict("stop", f"{what}; incident {self.incidents} in a row", kind)
        if action == "rollback":
            self.rollbacks += 1
            if self.rollbacks >= self.config.max_incidents:
                return Verdict("stop", f"{what}; roll-back {self.rollbacks} without getting further", kind)
        return Verdict(action, what, kind)
