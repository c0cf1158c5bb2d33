"""How the processes of one start find each other, and only each other.

torchrun keeps one key-value store over its restarts (`--max-restarts`), and torch reads from it the addresses that the
killed processes once left there: the new ones then wait for the dead without end (found with torch 2.13; the same
sharing is pytorch issue 135712). So each start takes a room of its own in the store. Its name is the first process's to
choose; TORCHELASTIC_RESTART_COUNT would not do, since each node counts for itself.
"""

import secrets
import time
from datetime import timedelta

from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

_PAUSE = 0.02  # seconds between looks for processes that have not come yet


def room_of_this_start(timeout: timedelta) -> tuple[Store, int, int]:
    """(a store that no earlier start wrote to, this process's rank, their number), from the launcher's environment.

    Raises TimeoutError when not all processes have come after `timeout`.
    """
    store, rank, size = next(iter(rendezvous("env://", timeout=timeout)))
    room = _invite(store, size, timeout) if rank == 0 else _ask(store, rank)
    return PrefixStore(room, store), rank, size


def _ask(store: Store, rank: int) -> str:
    """Leave a name that no process had before, and wait for the answer to that name."""
    name = secrets.token_hex(8)
    store.set(f"asks/{rank}", name)
    room = store.get(f"room for {name}").decode()  # waits
    store.set(f"{room} has/{rank}", name)
    return room


def _invite(store: Store, size: int, timeout: timedelta) -> str:
    """Answer whoever asks until all have come. A name left by a dead process is answered too, which harms nobody."""
    room, end = f"start {secrets.token_hex(8)}", time.monotonic() + timeout.total_seconds()
    away = set(range(1, size))
    while away:
        for rank in sorted(away):
            if store.check([f"asks/{rank}"]):
                store.set(f"room for {store.get(f'asks/{rank}').decode()}", room)
            if store.check([f"{room} has/{rank}"]):
                away.discard(rank)
        if time.monotonic() > end:
            raise TimeoutError(f"processes {sorted(away)} did not come within {timeout}")
        time.sleep(_PAUSE if away else 0)
    return room
