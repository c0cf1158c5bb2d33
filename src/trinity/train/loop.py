"""The loop: step, then duties. The same call on the same folder goes on where the last one stopped.

A step depends on nothing but TrainState, so on a CPU a run that was killed at any moment and started again ends in
bit-identical weights. On a GPU it goes on from the same state and data, but nothing makes the bits equal: some backward
kernels add in no fixed order (atomics). How far such runs part has not been measured yet.
"""

import fcntl
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TextIO

from trinity.base.durable import make_folder, recover, refusing_disk, write_json
from trinity.base.errors import ConfigError, DataError, TakenError, TrainingHalted, UsageError
from trinity.base.run import CONFIG
from trinity.ckpt.folder import newest_good, reached, read_state
from trinity.ckpt.peers import Peers
from trinity.config.phases import Phase
from trinity.config.run import RunConfig
from trinity.data.loader import Batch, Loader
from trinity.data.proof import Seen, altered_data, read_seen
from trinity.data.supply import remarks
from trinity.kernels.heap import keep_freed_memory
from trinity.parallel.agree import agree
from trinity.parallel.lost import noticing_lost_peers
from trinity.parallel.mesh import World, check_rows, joined_world, misfits
from trinity.train import settings
from trinity.train.duties import Duties, Progress, due
from trinity.train.evidence import Incident
from trinity.train.rollback import RollBack, returned_to
from trinity.train.room import explaining_memory, refuse_what_cannot_fit
from trinity.train.saver import Saver
from trinity.train.state import TrainState
from trinity.train.step import accumulate, apply_update, drop_update, learning_rates
from trinity.train.watch import Watch

DATA_SEEN = "data_seen.json"  # in the run folder: what of the data was hashed (data/proof.py)
_DYING_SECONDS = 5.0  # a killed process may take that long to let go of the run


def train(
    config: RunConfig,
    data: Path,
    run: Path,
    say: Callable[[str], None],
    show: Callable[[Progress], None],
    world: World | None = None,
) -> TrainState:
    """Train to the configured horizon into the folder `run`, resuming what is there; returns the final state.

    say: sentences for people. show: called after every step for a display. world: this process's place among several,
    which all call this with the same arguments; the first one writes. Without it the launcher's environment tells.

    What fails on one process before the first step fails on all, with one error.
    """
    if world is None:
        with joined_world(config, reached(run)) as world:
            return train(config, data, run, say, show, world)
    saver = Saver(run, config, world)
    peers = saver.peers
    with ExitStack() as stack:
        peers.first(lambda: stack.enter_context(only_user_of(run)))
        start = peers.share(secrets.token_hex(4))
        watch = stack.enter_context(peers.together(lambda: Watch(run, config.train, world, say, start)))
        stack.enter_context(noticing_lost_peers())
        stack.enter_context(explaining_memory(config, world))
        state, changed = prepare(config, data, run, say, world, peers)
        watch.begins(config.phase_at(state.tokens), state.step, state.tokens)
        duties = peers.together(lambda: Duties(run, data, config, state, say, world, saver, watch))
        try:
            if changed:
                peers.together(lambda: duties.changed(state.step, changed))
                peers.first(lambda: settings.adopt(run, config))
            if state.tokens >= config.horizon:
                say(f"{run} is complete at {state.tokens:,} tokens; nothing to do.")
            elif state.step == 0:
                with watch.doing("evaluating"):
                    duties.evaluate(state)
            else:
                peers.together(lambda: duties.resumed(state))
            _advance(state, config, run, duties, show)
        finally:
            with watch.doing("closing"):  # waits for the save that is under way
                duties.close()
    return state


def _advance(state: TrainState, config: RunConfig, run: Path, duties: Duties, show: Callable[[Progress], None]) -> None:
    roll_back = RollBack(run, config, duties)
    while state.tokens < config.horizon:
        started, phase, place = time.perf_counter(), config.phase_at(state.tokens), state.loader.trace.place
        batches = next_microbatches(state.loader, phase, state.world)
        loaded = time.perf_counter() - started
        duties.watch.loaded()
        measured = accumulate(state, batches, config)
        state.guard.turn_to(phase)
        verdict = state.guard.judge(measured.loss, measured.grad_norm)
        if verdict.action == "update":
            verdict = state.guard.judge_routing(measured.counts, state.model.expert_biases())
        incident = Incident.of(verdict, state, measured, place, phase.microbatch_rows)
        if verdict.action in ("rollback", "stop"):
            drop_update(state)
            _leave(state, incident, state.step + 1, duties, roll_back)
            continue
        before = state.tokens
        state.step += 1
        state.tokens += phase.batch_tokens
        rates = learning_rates(state.tokens, config)
        if verdict.action == "skip":
            drop_update(state)
        else:
            apply_update(state, measured, config, rates)
            show(duties.log_step(state, measured, rates, time.perf_counter() - started))
        if verdict.action != "update":
            duties.incident(state.step, incident)
        seconds = time.perf_counter() - started
        for other in duties.watch.stepped(phase, state.step, state.tokens, measured.loss, loaded, seconds):
            duties.incident(state.step, other)
        saves = _saves_due(state, config, before)
        if any(saves):
            verdict = state.guard.judge_tensors(state.not_finite())
            if verdict.action != "update":
                incident = Incident(verdict.kind, verdict.reason, verdict.action, {})
                _leave(state, incident, state.step, duties, roll_back)
                continue
        _do_duties(state, config, duties, before, saves)


def _leave(state: TrainState, incident: Incident, step: int, duties: Duties, roll_back: RollBack) -> None:
    """Leave the branch that the run is on, for that of an older checkpoint or, raising TrainingHalted, for good."""
    if incident.action == "stop":
        duties.incident(step, incident)
        raise TrainingHalted(
            f"Training stopped at step {step}: {incident.what}.",
            "The last checkpoint is whole. Look at the data; a resume may set train.spike_sigmas and the "
            "guard's actions anew, and lower learning rates need a new run.",
        )
    with duties.watch.doing("rolling back"):
        roll_back(state, incident, step)


def _saves_due(state: TrainState, config: RunConfig, before: int) -> tuple[list[str], bool]:
    """The names under which the state is to be saved after the step that began at `before` tokens, and whether it is
    to be saved as that of its step."""
    done = state.tokens >= config.horizon
    turning = not done and config.phase_at(state.tokens).begin == state.tokens
    names = [name for name, tokens in config.named_checkpoints.items() if before < tokens <= state.tokens]
    return names, done or turning or due(config.train.save_every_tokens, before, state.tokens)


def next_microbatches(loader: Loader, phase: Phase, world: World) -> list[Batch]:
    """This process's microbatches of the next step. Each holds the same rows whatever the number of processes."""
    try:
        check_rows(phase, world.context_size, world.data_size)
    except ConfigError as error:
        error.alike = True
        raise
    loader.turn_to(phase.corpus, phase.sequence_length)
    rounds = phase.microbatches(world.data_size)
    return [loader.next_batch(phase.microbatch_rows, world.data_rank, world.data_size) for _ in range(rounds)]


def _do_duties(
    state: TrainState, config: RunConfig, duties: Duties, before: int, saves: tuple[list[str], bool]
) -> None:
    duties.look_after_save()
    done = state.tokens >= config.horizon
    if done or due(config.train.evaluate_every_tokens, before, state.tokens):
        with duties.watch.doing("evaluating"):
            duties.evaluate(state)
    names, of_step = saves
    for name in names:
        with duties.watch.doing("saving"):
            duties.save_named(state, name)
    if not done and config.phase_at(state.tokens).begin == state.tokens:
        duties.begin_phase(state, config.phase_at(state.tokens))
    if of_step:
        with duties.watch.doing("saving"):
            duties.save(state, last=done)


def prepare(
    config: RunConfig, data: Path, run: Path, say: Callable[[str], None], world: World, peers: Peers
) -> tuple[TrainState, list[str]]:
    """A fresh state, or that of the newest good checkpoint of the same run; and the settings that a resume changed."""
    loader = peers.together(lambda: _opened(config, data))
    agree({"data": loader.data_fingerprint, "tokenizer": loader.tokenizer.fingerprint})
    peers.first(lambda: _make_ready(run, config, loader, data, world))
    changed = peers.together(lambda: settings.changes(run, config, loader))
    prove(loader, run, peers)
    newest = newest_good(run, say, peers)
    tokens = peers.together(lambda: 0 if newest is None else read_state(newest)["tokens"])
    for remark in remarks(config, loader):
        say(remark)
    peers.together(lambda: refuse_what_cannot_fit(config, world, say, tokens))
    if world.device.type == "cpu":
        keep_freed_memory()
    state = peers.together(lambda: TrainState.fresh(config, loader, world))
    for misfit in misfits(config, world, tokens):
        say(f"later: {misfit} Go on from there under another layout (docs/guides/parallelism.md).")
    if newest is not None:
        state.restore(newest, config, peers)
        again = returned_to(run, newest, peers)
        if again is not None:
            state.go_on_after_roll_back(again)
        after = " after the roll-back to it" if again else ""
        say(f"resuming {run} at step {state.step}, {state.tokens:,} tokens{after}")
    return state, changed


def _opened(config: RunConfig, data: Path) -> Loader:
    loader = Loader(data, config.data, config.train.seed, {name: Path(mix) for name, mix in config.mixes.items()})
    if loader.tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"The tokenizer of {data} has {loader.tokenizer.vocab_size} entries; the model has room for "
            f"{config.model.vocab_size}.",
            "Set model.vocab_size to at least the former.",
        )
    return loader


def prove(loader: Loader, run: Path, peers: Peers) -> None:
    """Refuse data that is not what its manifests promise. Processes hash a share each; a resume, what was touched."""
    seen: Seen = peers.share(read_seen(run / DATA_SEEN))
    corpora = [*loader.corpora.each, *loader.corpus.sources]
    folders = list(dict.fromkeys(corpus.path.resolve() for corpus in corpora))
    own = peers.together(lambda: altered_data(folders, seen, (peers.rank, peers.size)))
    found = peers.gather_everywhere(own)
    if altered := sorted({sentence for sentences, _ in found for sentence in sentences}):
        raise DataError(
            f"The data is not what it was when it was made: {'; '.join(altered)}.",
            "Restore the folder from a copy; a run goes on only with the bytes it began with.",
        )
    if fresh := {path: look for _, looks in found for path, look in looks.items()}:
        peers.first(lambda: write_json(run / DATA_SEEN, seen | fresh))


def _make_ready(run: Path, config: RunConfig, loader: Loader, data: Path, world: World) -> None:
    """What the first process does before the others look: a new run's records, and away with what a kill left."""
    if not (run / CONFIG).exists():
        settings.begin(run, config, loader, data, world)
    recover(run / "checkpoints", alone=True)


@contextmanager
def only_user_of(run: Path) -> Iterator[None]:
    """Refuse a second process on the same run folder; the lock goes with the process, however it ends.

    One that was killed a moment ago may not be quite gone: that is worth a short wait.
    """
    patience = time.monotonic() + _DYING_SECONDS
    while True:
        with refusing_disk(run):
            make_folder(run)
            lock = (run / ".lock").open("a+")
        with lock:
            if _locked(lock, run):
                with refusing_disk(run):
                    lock.truncate(0)
                    lock.write(f"{os.getpid()} {socket.gethostname()}\n")
                    lock.flush()
                try:
                    yield
                finally:
                    _leave_no_empty(run)
                return
            if time.monotonic() > patience:
                raise _in_use(run, lock)
        time.sleep(0.1)


def _leave_no_empty(run: Path) -> None:
    """Take away the folder of a run that was refused before it wrote anything; the lock is ours."""
    if os.listdir(run) == [".lock"]:
        (run / ".lock").unlink()
        run.rmdir()


def _locked(lock: TextIO, run: Path) -> bool:
    """Whether this process has the lock now; not if its file was removed by the one that had it (`_leave_no_empty`)."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not (run / ".lock").exists() or not os.path.samestat(os.fstat(lock.fileno()), (run / ".lock").stat()):
            return False
    except BlockingIOError:
        return False
    except OSError as error:
        raise UsageError(
            f"The file system of {run} cannot lock a file ({error.strerror}), so two runs could write into it at once.",
            "Use an --out on one that can, or have it mounted with locks (NFS: nfsvers=4, or lockd and no 'nolock').",
        ) from error
    return True


def _in_use(run: Path, lock: TextIO) -> TakenError:
    lock.seek(0)
    number, _, host = lock.read().strip().partition(" ")
    named = f" ({number} on {host})" if host else ""
    remedy = "Wait for it, or use another --out."
    if host not in ("", socket.gethostname()):
        remedy += f" If {host} is gone, its file server lets go of the lock within a minute or two: try again then."
    return TakenError(f"{run} is being trained by another process{named}.", remedy)
