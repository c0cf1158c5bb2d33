"""Where the routing is heading, layer by layer: the signs that come before a collapse, often unseen in the loss.

The Large report tells of a long flat MaxVio, then a sudden climb, experts dying and a loss that stops falling. A single
step's MaxVio is mostly the noise of its batch, so everything here is read from loads averaged over recent steps:

    collapse   MaxVio of the averaged load has climbed to `factor` times the lowest it has been, and above a floor
    drift      the averaged load has moved away from that of the steps before: total variation between the two, in the
               same sense. Experts that trade places keep MaxVio flat; this sees them
    starving   more experts of a layer than at its best, by an eighth, get less than a tenth of an even share
    run-away   the biases of a layer lie further apart than 4, where scores, being sigmoids, lie within 1 of each other:
               balancing fights something and does not win. Told again at every doubling

A figure that is falling is never alarming: a run may begin unbalanced. Low marks only count once they are measured over
`before` steps, and move up to the present level when an alarm was given, so each further alarm means further decay.
Other text is routed to other experts, so averages and low marks begin anew with it.
"""

from typing import Any

import torch
from torch import Tensor

RECENT, BEFORE = 20, 100  # steps averaged over
_VIOLATION_FLOOR, _DRIFT_FLOOR = 1.5, 0.15
_STARVED = 0.1  # of an even share; an average forgets slowly, so a hundredth would be seen too late
_STARVED_PART = 8  # experts of a layer / this many newly starving ones are alarming
DRIFT = "drift"
_SPREAD = 4.0  # healthy small runs with large bias steps pass 1


class RouterTrend:
    """Fed the global counts [L, E] and the L biases [E] of every step. All its figures are float64 on the CPU, so equal
    counts give equal alarms on every process."""

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.seen = 0
        self._recent = self._before = torch.zeros(0, 0, dtype=torch.float64)  # [L, E] shares of the load
        self._lows: dict[str, Tensor] = {}  # [L] each: the lowest a figure has been; for "spread" the next limit

    def observe(self, counts: Tensor, biases: list[Tensor]) -> list[tuple[str, str]]:
        """Take one step's counts and biases; (kind, sentence) of each trouble, empty when there is none."""
        if not self.factor or not counts.numel():
            return []
        share = counts.double().cpu() / counts.sum(-1, keepdim=True).clamp(min=1).cpu()
        if self.seen == 0:
            self._recent, self._before = torch.zeros_like(share), torch.zeros_like(share)
            # Biases are of the model, not of the text: what was told of them stays told when all else begins anew.
            told = self._lows.get("spread", torch.full((len(share),), _SPREAD, dtype=torch.float64))
            self._lows = {"spread": told}
        self.seen += 1
        self._recent = self._recent.lerp(share, 1 / min(self.seen, RECENT))
        self._before = self._before.lerp(share, 1 / min(self.seen, BEFORE))
        if self.seen < BEFORE:
            return []
        found = {
            "collapse": self._collapse(),
            DRIFT: self._drift(),
            "starving": self._starving(),
            "run-away": self._run_away(torch.stack(biases).double().cpu()),
        }
        return [(kind, sentence) for kind, sentence in found.items() if sentence]

    def begin_anew(self) -> None:
        """The text is another from here on: loads are averaged, and low marks measured, from the next step."""
        self.seen = 0

    def figures(self) -> dict[str, float]:
        """What the log shows of the trend: the worst layer's MaxVio of the averaged load, and its drift."""
        if self.seen < BEFORE:
            return {}
        return {
            "averaged_violation": round(float(_violation(self._recent).max()), 4),
            "load_drift": round(float(self._moved().max()), 4),
        }

    def state(self) -> dict[str, Any]:
        """Ready for JSON, exact: resumed, the same alarms come at the same steps."""
        return {
            "seen": self.seen,
            "recent": self._recent.tolist(),
            "before": self._before.tolist(),
            "lows": {name: low.tolist() for name, low in self._lows.items()},
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]
        self._recent = torch.tensor(state["recent"], dtype=torch.float64)
        self._before = torch.tensor(state["before"], dtype=torch.float64)
        self._lows = {name: torch.tensor(low, dtype=torch.float64) for name, low in state["lows"].items()}

    def _collapse(self) -> str:
        now, before = _violation(self._recent), _violation(self._before)
        low = self._low("violation", now)
        worst = self._worst("violation", now, (now > _VIOLATION_FLOOR) & (now > self.factor * low) & (now >= before))
        if worst is None:
            return ""
        layer, layers = worst
        return (
            f"MaxVio of sparse layer {layer} rose from {low[layer]:.2f} to {now[layer]:.2f}{_others(layers)}: its "
            "experts may be collapsing"
        )

    def _drift(self) -> str:
        now = self._moved()
        low = self._low("drift", now)
        # A load that moves towards balance is what balancing is for.
        worsening = _violation(self._recent) >= _violation(self._before)
        worst = self._worst("drift", now, (now > _DRIFT_FLOOR) & (now > self.factor * low) & worsening)
        if worst is None:
            return ""
        layer, layers = worst
        return (
            f"routing of sparse layer {layer} drifts: {now[layer]:.0%} of its load has moved to other experts within "
            f"{BEFORE} steps{_others(layers)}, with MaxVio at {_violation(self._recent)[layer]:.2f}"
        )

    def _starving(self) -> str:
        now, before = _starving(self._recent), _starving(self._before)
        low = self._lows.setdefault("starving", torch.zeros_like(now))
        low.copy_(torch.minimum(low, now))
        old = low.clone()
        experts = self._recent.shape[-1]
        enough = now - low >= low.clamp(min=max(1, experts // _STARVED_PART))  # after an alarm: twice as many
        worst = self._worst("starving", now, enough & (now >= before))
        if worst is None:
            return ""
        layer, layers = worst
        return (
            f"{int(now[layer])} of {experts} experts of sparse layer {layer} starve, up from "
            f"{int(old[layer])}{_others(layers)}"
        )

    def _run_away(self, biases: Tensor) -> str:
        spread = biases.amax(-1) - biases.amin(-1)
        limit = self._lows["spread"]
        over = spread > limit
        if not bool(over.any()):
            return ""
        limit[over] = 2 * spread[over]
        layer = int(torch.where(over, spread, -1).argmax())
        return (
            f"selection biases of sparse layer {layer} lie {spread[layer]:.2f} apart{_others(int(over.sum()))}: they "
            "outvote every score, and balancing still does not settle"
        )

    def _moved(self) -> Tensor:
        """[L]: total variation between the recent load and that of the steps before, from 0 to 1."""
        return (self._recent - self._before).abs().sum(-1) / 2

    def _low(self, name: str, now: Tensor) -> Tensor:
        """The low marks [L] of a figure, moved down to `now`; a copy."""
        self._lows[name] = torch.minimum(self._lows.get(name, now), now)
        return self._lows[name].clone()

    def _worst(self, name: str, now: Tensor, alarming: Tensor) -> tuple[int, int] | None:
        """(the worst alarming layer, how many there are); their marks are lifted to the present level."""
        if not bool(alarming.any()):
            return None
        self._lows[name] = torch.where(alarming, now, self._lows[name])
        return int(torch.where(alarming, now, -1.0).argmax()), int(alarming.sum())


def _violation(share: Tensor) -> Tensor:
    """[L, E] shares -> [L] MaxVio."""
    return share.amax(-1) * share.shape[-1] - 1


def _starving(share: Tensor) -> Tensor:
    return (share < _STARVED / share.shape[-1]).sum(-1).double()


def _others(layers: int) -> str:
    return f" (and {layers - 1} more layers)" if layers > 1 else ""
