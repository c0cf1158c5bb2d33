"""The guard: what happens when a step's loss, gradient or routing is not what it should be. Stated, logged, tested.

    non-finite loss or gradient   train.nonfinite_action   skip: the update is dropped, the batch is spent
    loss or norm spike            train.spike_action       rollback: weights return to the newest good checkpoint, the
                                                           data does not (the guilty stretch is not read again)
                                                           stop: the run ends with a clear message
    routing drifts, collapses     train.router_action      alarm: the run goes on and a person is told; rollback; stop
    max_incidents in a row        stop in any case
    max_incidents roll-backs      to one and the same checkpoint: stop, the run does not get past it

A spike is a loss more than `spike_sigmas` standard deviations above the mean of the recent good ones, or a gradient
norm whose logarithm lies `norm_spike_sigmas` above (norms are skewed, their logarithm is not). Spikes in a row that
agree with each other are no accident but a new level (another mix of data): the last of them is taken as good.

All it reads are global figures, equal on every process, and all it knows is in the checkpoint: every process decides
alike, and a resumed run as the unbroken one.
"""

import math
from collections import deque
from typing import Any, NamedTuple

from torch import Tensor

from trinity.balance.trend import RouterTrend
from trinity.config.train import TrainConfig

_WINDOW = 64  # good values remembered
_ENOUGH = 16  # values before spikes are judged: the first ones fall too fast
_AGREEING = 3  # spikes in a row that, being alike, are the new level
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

    @property
    def mean(self) -> float:
        return sum(self.good) / len(self.good)

    def is_spike(self, value: float) -> bool:
        """Whether `value` is one. The third of three that agree is not: the level moves to theirs."""
        if not self._sigmas or len(self.good) < _ENOUGH or value <= self.mean + self._sigmas * self._sigma():
            return False
        self.spikes.append(value)
        if not self._is_new_level():
            return True
        # Their spread stays known, so the guard never goes blind.
        rise = sum(self.spikes) / len(self.spikes) - self.mean
        self.good = deque((value + rise for value in self.good), maxlen=_WINDOW)
        return False

    def accept(self, value: float) -> None:
        self.spikes.clear()
        self.good.append(value)

    def state(self) -> dict[str, list[float]]:
        return {"good": list(self.good), "spikes": list(self.spikes)}

    def load_state(self, state: dict[str, list[float]], with_spikes: bool) -> None:
        self.good = deque(state["good"], maxlen=_WINDOW)
        if with_spikes:
            self.spikes = deque(state["spikes"], maxlen=_AGREEING)

    def _sigma(self) -> float:
        mean = self.mean
        return max((sum((value - mean) ** 2 for value in self.good) / len(self.good)) ** 0.5, self._smallest_sigma)

    def _is_new_level(self) -> bool:
        return (
            len(self.spikes) == _AGREEING
            and max(self.spikes) - min(self.spikes) <= _ALIKE * self._sigma()
            and max(self.spikes) - self.mean <= self._largest_rise
        )


class Guard:
    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.loss = Level(config.spike_sigmas, smallest_sigma=0.02, largest_rise=1.0)  # nats
        self.norm = Level(config.norm_spike_sigmas, smallest_sigma=0.2, largest_rise=math.log(10))  # of the logarithm
        self.trend = RouterTrend(config.router_factor)
        self.incidents = 0  # in a row
        self.rollbacks = 0  # since the last save; a resume starts from a save, so it is no part of the state

    def judge(self, loss: float, grad_norm: float) -> Verdict:
        """Decide on one step before anything moves."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self.loss.spikes.clear()
            self.norm.spikes.clear()
            what = f"loss {loss:.4g}, gradient norm {grad_norm:.4g}"
            return self._incident(what, self.config.nonfinite_action, "non-finite")
        size = math.log(max(grad_norm, 1e-30))
        if self.loss.is_spike(loss):
            what = f"loss {loss:.3f} after a recent mean of {self.loss.mean:.3f}"
            return self._incident(what, self.config.spike_action, "spike")
        if self.norm.is_spike(size):
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
        what, action = "; ".join(troubles), self.config.router_action
        return Verdict("alarm", what, "router") if action == "alarm" else self._incident(what, action, "router")

    def saved(self) -> None:
        """A checkpoint is being written: the run got past the one before it."""
        self.rollbacks = 0

    def rolled_back(self, state: dict[str, Any]) -> None:
        """What counts as normal is again what the checkpoint knew; the incidents and roll-backs stay counted."""
        self._load_levels(state, with_spikes=False)

    def state(self) -> dict[str, Any]:
        return {
            "loss": self.loss.state(),
            "norm": self.norm.state(),
            "trend": self.trend.state(),
            "incidents": self.incidents,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self._load_levels(state, with_spikes=True)
        self.incidents, self.rollbacks = state["incidents"], 0

    def _load_levels(self, state: dict[str, Any], with_spikes: bool) -> None:
        self.loss.load_state(state["loss"], with_spikes)
        self.norm.load_state(state["norm"], with_spikes)
        self.trend.load_state(state["trend"])

    def _incident(self, what: str, action: str, kind: str) -> Verdict:
        self.incidents += 1
        if self.incidents >= self.config.max_incidents:
            return Verdict("stop", f"{what}; incident {self.incidents} in a row", kind)
        if action == "rollback":
            self.rollbacks += 1
            if self.rollbacks >= self.config.max_incidents:
                return Verdict("stop", f"{what}; roll-back {self.rollbacks} to the same checkpoint", kind)
        return Verdict(action, what, kind)
