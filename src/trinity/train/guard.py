"""The guard: what happens when a step's loss or gradient is not what it should be. Stated, logged, tested.

    non-finite loss or gradient   train.nonfinite_action   skip: the update is dropped, the batch is spent
    loss spike                    train.spike_action       rollback: weights return to the newest good checkpoint, the
                                                           data does not (the guilty stretch is not read again)
                                                           stop: the run ends with a clear message
    max_incidents in a row        stop in any case

A spike is a loss more than `spike_sigmas` standard deviations above the mean of the recent good losses.
"""

import math
from collections import deque
from typing import Any, NamedTuple

from trinity.balance.health import CollapseAlarm
from trinity.config.train import TrainConfig

_WINDOW = 64  # good losses remembered
_ENOUGH = 16  # losses before spikes are judged: the first ones fall too fast
_SMALLEST_SIGMA = 0.02  # nats; keeps a very quiet stretch from calling noise a spike


class Verdict(NamedTuple):
    action: str  # "update", "skip", "rollback" or "stop"
    reason: str = ""


class Guard:
    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.losses: deque[float] = deque(maxlen=_WINDOW)
        self.incidents = 0
        self.alarm = CollapseAlarm()

    def judge(self, loss: float, grad_norm: float) -> Verdict:
        """Decide on one step before anything moves."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return self._incident(f"loss {loss:.4g}, gradient norm {grad_norm:.4g}", self.config.nonfinite_action)
        if self._is_spike(loss):
            mean = sum(self.losses) / len(self.losses)
            return self._incident(f"loss {loss:.3f} after a recent mean of {mean:.3f}", self.config.spike_action)
        self.incidents = 0
        self.losses.append(loss)
        return Verdict("update")

    def rolled_back(self) -> None:
        """Forget the losses seen since the checkpoint that the run returned to."""
        self.losses.clear()

    def state(self) -> dict[str, Any]:
        return {"losses": list(self.losses), "incidents": self.incidents, "alarm": list(self.alarm.history)}

    def load_state(self, state: dict[str, Any]) -> None:
        self.losses = deque(state["losses"], maxlen=_WINDOW)
        self.incidents = state["incidents"]
        self.alarm.history = deque(state["alarm"], maxlen=self.alarm.history.maxlen)

    def _is_spike(self, loss: float) -> bool:
        if not self.config.spike_sigmas or len(self.losses) < _ENOUGH:
            return False
        mean = sum(self.losses) / len(self.losses)
        sigma = (sum((value - mean) ** 2 for value in self.losses) / len(self.losses)) ** 0.5
        return loss > mean + self.config.spike_sigmas * max(sigma, _SMALLEST_SIGMA)

    def _incident(self, what: str, action: str) -> Verdict:
        self.incidents += 1
        if self.incidents >= self.config.max_incidents:
            return Verdict("stop", f"{what}; incident {self.incidents} in a row")
        return Verdict(action, what)
