"""How the processes of one start find each other, and only each other.

torchrun keeps one key-value store over its restarts (`--max-restarts`), and torch reads from it the addresses that the
killed processes once left there: the new ones then wait for the dead without end (found with torch 2.13; the same
sharing is pytorch issue 135712). So each start takes a room of its own in the store. Its name is the first process's to
choose; TORCHELASTIC_RESTART_COUNT would not do, since each node counts for itself.
"""

import base64
import pickle
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from trinity.base.errors import TrinityError, common_failure, told
from trinity.parallel.agree import refuse_unlike
from trinity.parallel.lost import absent, noticing_lost_peers

T = TypeVar("T")

_PAUSE = 0.02  # seconds between looks for processes that have not come yet
_FIRST_TELLS = timedelta(seconds=30)  # its last alarm is sent before


class Room(NamedTuple):
    store: Store  # no earlier start wrote to it
    rank: int
    size: int


@noticing_lost_peers()
def room_of_this_start(timeout: timedelta) -> Room:
    """Where the processes of this start meet, from the launcher's environment.

    Raises TrinityError when not all processes have come after `timeout`.
    """
    store, rank, size = next(iter(rendezvous("env://", timeout=timeout)))
    room = _invite(store, size, timeout) if rank == 0 else _ask(store, rank)
    return Room(PrefixStore(room, store), rank, size)


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
            raise absent(f"processes {sorted(away)} did not come within {timeout}")
        time.sleep(_PAUSE if away else 0)
    return room


def settle(room: Room, work: Callable[[], tuple[T, dict[str, str]]]) -> T:
    """Do what goes before the process group on every process: (what it needs, facts that all must have alike).

    What fails on one, or differs, is one error on all: nobody enters the group and waits there for the others.
    """
    result, facts, failure = None, {}, None
    try:
        result, facts = work()
    except Exception as error:  # noqa: BLE001  (whatever it is: the others would wait for this process)
        failure = error
    _set(room, f"before/{room.rank}", (failure and told(failure, room.rank), facts))
    if room.rank == 0:
        _set(room, "verdict", _verdict(room))
    common = _get(room, "verdict")
    if failure is not None and not isinstance(failure, TrinityError):
        raise failure
    if common is not None:
        raise common from failure
    return result  # type: ignore[return-value]


def _set(room: Room, key: str, value: object) -> None:
    # A store takes bytes, its type hints say text alone: base64 is both.
    room.store.set(key, base64.b64encode(pickle.dumps(value)).decode())


def _get(room: Room, key: str) -> Any:
    return pickle.loads(base64.b64decode(room.store.get(key)))  # waits until it is there


def _verdict(room: Room) -> TrinityError | None:
    each = [_get(room, f"before/{rank}") for rank in range(room.size)]
    common = common_failure([failed for failed, _ in each])
    if common is None:
        try:
            refuse_unlike([facts for _, facts in each])
        except TrinityError as unlike:
            return unlike
    return common


def let_the_first_tell(room: Room) -> None:
    """Called by all before they end with one error: a launcher ends all when one ends, and the first prints it."""
    with suppress(RuntimeError):  # the first is gone already, and the store with it
        if room.rank == 0:
            room.store.set("the first leaves", "")
        else:
            room.store.wait(["the first leaves"], _FIRST_TELLS)
            time.sleep(1)
