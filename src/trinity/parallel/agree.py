"""Whether all processes of a run were started alike: another version of the code or another setting is found at once.

Without this a process that differs computes other sums, and the run goes wrong or hangs much later.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from trinity.base.errors import ConfigError

_SHOWN, _FACTS = 8, 4  # ranks, and differences of each, that the message names


def agree(facts: dict[str, Any]) -> None:
    """Compare what each process knows of itself; a ConfigError on every process names the odd ranks and what differs.

    facts: name of a fact -> a value that is equal on all processes, such as a version or a fingerprint. The value that
    most processes have counts as right; of equally many, that of the lowest rank.
    """
    if not dist.is_initialized():
        return
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, {name: str(value) for name, value in facts.items()})
    refuse_unlike(found)


def refuse_unlike(found: Sequence[dict[str, Any]]) -> None:
    """What `agree` does with the facts of all ranks."""
    odd: dict[int, list[str]] = {}
    for name in {name: None for theirs in found for name in theirs}:
        values = [theirs.get(name, "nothing") for theirs in found]
        usual = Counter(values).most_common(1)[0][0]
        for rank, value in enumerate(values):
            if value != usual:
                odd.setdefault(rank, []).append(f"{name} {value} instead of {usual}")
    if odd:
        shown = [f"rank {rank} has {_some(what)}" for rank, what in sorted(odd.items())[:_SHOWN]]
        more = f"; and {len(odd) - _SHOWN} more ranks" if len(odd) > _SHOWN else ""
        refusal = ConfigError(
            f"The processes of this run were not started alike: {'; '.join(shown)}{more}.",
            "Start all of them from one copy of the code, with the same arguments, data and torch.",
        )
        refusal.alike = True
        raise refusal


def _some(differences: list[str]) -> str:
    more = len(differences) - _FACTS
    return ", ".join(differences[:_FACTS]) + (f" and {more} other differences" if more > 0 else "")
