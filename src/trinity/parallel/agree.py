"""Whether all processes of a run were started alike: another version of the code or another setting is found at once.

Without this a process that differs computes other sums, and the run goes wrong or hangs much later.
"""

from collections import Counter
from typing import Any

import torch.distributed as dist

from trinity.base.errors import ConfigError

_SHOWN = 8  # ranks named in the message


def agree(facts: dict[str, Any]) -> None:
    """Compare what each process knows of itself; a ConfigError on every process names the odd ranks and what differs.

    facts: name of a fact -> a value that is equal on all processes, such as a version or a fingerprint. The value that
    most processes have counts as right; of equally many, that of the lowest rank.
    """
    if not dist.is_initialized():
        return
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, {name: str(value) for name, value in facts.items()})
    odd: dict[int, list[str]] = {}
    for name in {name: None for theirs in found for name in theirs}:
        values = [theirs.get(name, "nothing") for theirs in found]
        usual = Counter(values).most_common(1)[0][0]
        for rank, value in enumerate(values):
            if value != usual:
                odd.setdefault(rank, []).append(f"{name} {value} instead of {usual}")
    if odd:
        shown = [f"rank {rank} has {', '.join(what)}" for rank, what in sorted(odd.items())[:_SHOWN]]
        more = f"; and {len(odd) - _SHOWN} more ranks" if len(odd) > _SHOWN else ""
        raise ConfigError(
            f"The processes of this run were not started alike: {'; '.join(shown)}{more}.",
            "Start all of them from one copy of the code, with the same arguments, data and torch.",
        )
