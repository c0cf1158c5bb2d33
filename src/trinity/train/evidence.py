"""What can be known of an incident: guilty rows, where gradients ceased to be finite, what is not read again.

Gathered only when there is an incident. Every process calls it at the same step; what it finds is the same on all.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trinity.data.loader import Loader
from trinity.data.trace import Place, Stretch
from trinity.parallel.mesh import World
from trinity.train.guard import Verdict
from trinity.train.state import TrainState
from trinity.train.step import Measured

LISTED = 20  # documents, rows or parameters named in the log; beyond, they are counted


class Incident(NamedTuple):
    """What goes into the log, the sentence for people and the alarm."""

    kind: str
    what: str
    action: str
    evidence: dict[str, Any]

    @classmethod
    def of(cls, verdict: Verdict, state: TrainState, measured: Measured, before: Place, rows: int) -> "Incident":
        """The verdict with what can be found out now, while gradients and weights are as the step left them."""
        if verdict.kind != "non-finite":
            return cls(verdict.kind, verdict.reason, verdict.action, {})
        places = nonfinite_places(state.model, measured, before, rows, state.world)
        told = "; ".join(part for part in (verdict.reason, tell_places(places)) if part)
        return cls(verdict.kind, told, verdict.action, {"nonfinite": places})

    def leaving(self, loader: Loader, checkpoint: dict[str, Any]) -> "Incident":
        """The same, with the stretch of data that a roll-back to the loader state `checkpoint` leaves behind."""
        window = lost_stretch(loader, checkpoint)
        return self._replace(
            what=f"{self.what}; {tell_stretch(window)}", evidence={**self.evidence, "not_read_again": window}
        )


def nonfinite_places(model: nn.Module, measured: Measured, before: Place, rows: int, world: World) -> dict[str, Any]:
    """Where a step was not finite.

    "rows": the guilty microbatches, as [first, end) of the stream; "gradients" and "weights": names of parameters, in
    the order in which the backward pass met them.

    before: where the stream stood before the step; rows: rows of one microbatch. Gradients must not have been clipped
    by a factor that is not finite: it would ruin all of them.
    """
    named = list(reversed(list(model.named_parameters())))
    bad_gradients = torch.tensor([_is_bad(parameter.grad) for _, parameter in named], dtype=torch.float32)
    bad_weights = torch.tensor([_is_bad(parameter) for _, parameter in named], dtype=torch.float32)
    for flags in (bad_gradients, bad_weights):
        world.sum(flags)
    names = [name for name, _ in named]
    microbatches = [
        [before.rows + part * rows, before.rows + (part + 1) * rows]
        for part, loss in enumerate(measured.losses)
        if not math.isfinite(loss)
    ]
    return {
        "rows": microbatches[:LISTED],
        "gradients": _named(bad_gradients, names),
        "num_gradients": int((bad_gradients > 0).sum()),
        "weights": _named(bad_weights, names),
        "num_parameters": len(names),
    }


def tell_places(places: dict[str, Any]) -> str:
    """The sentence of `nonfinite_places`; empty when nothing was found."""
    parts = []
    if places["weights"]:
        parts.append(f"weights are not finite themselves ({places['weights'][0]}), which only a roll-back heals")
    if places["rows"]:
        shown = ", ".join(f"{first}-{end - 1}" for first, end in places["rows"][:3])
        more = f" and {len(places['rows']) - 3} more" if len(places["rows"]) > 3 else ""
        parts.append(f"guilty rows of the stream: {shown}{more}")
    if places["gradients"]:
        parts.append(
            f"{places['num_gradients']} of {places['num_parameters']} gradients not finite, on the way back first "
            f"{places['gradients'][0]}"
        )
    return "; ".join(parts)


def lost_stretch(loader: Loader, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What a roll-back to the loader state `checkpoint` leaves behind.

    "rows" and "tokens" as [first, end) of the stream; "documents", ids of the newest; "num_documents" in all, of which
    "all_documents" is false where the older ones are forgotten.
    """
    stretch: Stretch = loader.lose(checkpoint)
    ids = []
    for index in stretch.documents[:LISTED]:
        split, place = loader.corpus.locate(index)
        ids.append(split.document_id(place))
    return {
        "rows": [stretch.first.rows, stretch.end.rows],
        "tokens": [stretch.first.tokens, stretch.end.tokens],
        "documents": ids,
        "num_documents": len(stretch.documents),
        "all_documents": stretch.complete,
    }


def tell_stretch(window: dict[str, Any]) -> str:
    (row, end_row), (token, end_token) = window["rows"], window["tokens"]
    count = f"{'' if window['all_documents'] else 'at least '}{window['num_documents']:,} documents"
    newest = ", ".join(name[:12] for name in window["documents"][:3])
    return (
        f"rows {row:,}-{end_row - 1:,} of the stream (tokens {token:,}-{end_token - 1:,}, of {count}, the newest "
        f"{newest}) are not read again"
    )


def _is_bad(tensor: Tensor | None) -> bool:
    if tensor is None:
        return False
    local = getattr(tensor, "to_local", None)  # of a sharded parameter this process sees its own part
    return not bool(torch.isfinite(local() if local else tensor.detach()).all())


def _named(flags: Tensor, names: list[str]) -> list[str]:
    return [name for name, flag in zip(names, flags.tolist(), strict=True) if flag][:LISTED]
