"""The guard: what happens when a step's loss or gradient is not what it should be. Stated, logged, tested.

    non-finite loss or gradient   train.nonfinite_action   skip: the update is dropped, the batch is spent
    loss spike                    train.spike_action       rollback: weights return to the newest good checkpoint, the
                                                           data does not (the guilty stretch is not read again)
                                                           stop: the run ends with a clear message
    max_incidents in a row        stop in any case
    max_incidents roll-backs      to one and the same checkpoint: stop, the run does not get past it

A spike is a loss more than `spike_sigmas` standard deviations above the mean of the recent good losses. Spikes in a row
that agree with each other are no accident but a new level (another mix of data): the last of them is taken as good.
"""

import math
from collections import deque
from typing import Any, NamedTuple

from trinity.balance.health import CollapseAlarm
from trinity.config.train import TrainConfig

_WINDOW = 64  # good losses remembered
_ENOUGH = 16  # losses before spikes are judged: the first ones fall too fast
_SMALLEST_SIGMA = 0.02  # nats; keeps a very quiet stretch from calling noise a spike
_AGREEING = 3  # spikes in a row that, being alike, are the new level
_ALIKE = 4.0  # standard deviations within which they lie
_LARGEST_RISE = 1.0  # nats; a lasting level above that is a ruined model, not another kind of text


class Verdict(NamedTuple):
    action: str  # "update", "skip", "rollback" or "stop"
    reason: str = ""


class Guard:
    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.losses: deque[float] = deque(maxlen=_WINDOW)
        self.spikes: deque[float] = deque(maxlen=_AGREEING)  # in a row, the newest last
        self.incidents = 0  # in a row
        self.rollbacks = 0  # since the last save; a resume starts from a save, so it is no part of the state
        self.alarm = CollapseAlarm()

    def judge(self, loss: float, grad_norm: float) -> Verdict:
        """Decide on one step before anything moves."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self.spikes.clear()
            return self._incident(f"loss {loss:.4g}, gradient norm {grad_norm:.4g}", self.config.nonfinite_action)
        if self._is_spike(loss):
            self.spikes.append(loss)
            if not self._is_new_level():
                mean, _ = self._normal()
                return self._incident(f"loss {loss:.3f} after a recent mean of {mean:.3f}", self.config.spike_action)
            self._move_level()
        self.incidents = 0
        self.spikes.clear()
        self.losses.append(loss)
        return Verdict("update")

    def saved(self) -> None:
        """A checkpoint is being written: the run got past the one before it."""
        self.rollbacks = 0

    def rolled_back(self, state: dict[str, Any]) -> None:
        """What counts as normal is again what the checkpoint knew; the incidents and roll-backs stay counted."""
        self.losses = deque(state["losses"], maxlen=_WINDOW)
        self.alarm.history = deque(state["alarm"], maxlen=self.alarm.history.maxlen)

    def state(self) -> dict[str, Any]:
        return {
            "losses": list(self.losses),
            "spikes": list(self.spikes),
            "incidents": self.incidents,
            "alarm": list(self.alarm.history),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.rolled_back(state)
        self.spikes = deque(state["spikes"], maxlen=_AGREEING)
        self.incidents, self.rollbacks = state["incidents"], 0

    def _normal(self) -> tuple[float, float]:
        """Mean and standard deviation of the recent good losses."""
        mean = sum(self.losses) / len(self.losses)
        sigma = (sum((value - mean) ** 2 for value in self.losses) / len(self.losses)) ** 0.5
        return mean, max(sigma, _SMALLEST_SIGMA)

    def _is_spike(self, loss: float) -> bool:
        if not self.config.spike_sigmas or len(self.losses) < _ENOUGH:
            return False
        mean, sigma = self._normal()
        return loss > mean + self.config.spike_sigmas * sigma

    def _is_new_level(self) -> bool:
        mean, sigma = self._normal()
        return (
            len(self.spikes) == _AGREEING
            and max(self.spikes) - min(self.spikes) <= _ALIKE * sigma
            and max(self.spikes) - mean <= _LARGEST_RISE
        )

    def _move_level(self) -> None:
        """Lift the good losses to the level of the spikes: their spread stays known, so the guard never goes blind."""
        rise = sum(self.spikes) / len(self.spikes) - self._normal()[0]
        self.losses = deque((value + rise for value in self.losses), maxlen=_WINDOW)

    def _incident(self, what: str, action: str) -> Verdict:
        self.incidents += 1
        if self.incidents >= self.config.max_incidents:
            return Verdict("stop", f"{what}; incident {self.incidents} in a row")
        if action == "rollback":
            self.rollbacks += 1
            if self.rollbacks >= self.config.max_incidents:
                return Verdict("stop", f"{what}; roll-back {self.rollbacks} to the same checkpoint")
        return Verdict(action, what)
