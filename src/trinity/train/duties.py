"""What a run does besides stepping: log, evaluate, sample, save. Each duty is due every so many tokens."""

from bisect import bisect_right
from collections.abc import Callable, Iterable
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch

from trinity.balance.health import Health, measure
from trinity.base.lineage import code_version
from trinity.base.run import MetricsLog, Unwritten
from trinity.config.phases import Phase
from trinity.config.run import RunConfig
from trinity.data.heldout import heldout_documents
from trinity.data.mix import HeldoutDocument
from trinity.model.generate import continue_greedily
from trinity.parallel.expert import dispatch_over
from trinity.parallel.mesh import World
from trinity.parallel.replicas import differing_shards
from trinity.text.tokenizer import Tokenizer
from trinity.train.board import Board
from trinity.train.evaluate import score_documents, total
from trinity.train.evidence import Incident
from trinity.train.saver import FAILURES, Failed, Saved, Saver
from trinity.train.settings import begun, machine
from trinity.train.state import TrainState
from trinity.train.step import Measured
from trinity.train.watch import Watch

LOAD_EVERY = 10  # steps between expert loads in the log: [L, E] shares would fill it otherwise


class Progress(NamedTuple):
    """What a display shows of a run, after one step."""

    step: int
    tokens: int
    loss: float
    bits_per_byte: float | None
    max_violation: float
    dead_experts: int
    tokens_per_second: float


class Duties:
    """The duties of one run from `state` on. `say` receives sentences for people (incidents, samples, saves)."""

    def __init__(
        self,
        run: Path,
        data: Path,
        config: RunConfig,
        state: TrainState,
        say: Callable[[str], None],
        world: World,
        saver: Saver,
        watch: Watch,
    ) -> None:
        self.run, self.config, self.say = run, config, say
        self.world, self.saver, self.watch = world, saver, watch
        step = state.step
        rows = state.loader.trace.place.rows
        self.metrics = MetricsLog(run, step, rows, self._log_refused) if world.is_first else Unwritten()
        self.board = Board(run / "tensorboard" if world.is_first else None, step, say)
        self.heldout = within(heldout_documents(data), config.train.evaluate_bytes, state.loader.tokenizer)
        self.bits_per_byte: float | None = None

    def log_step(self, state: TrainState, measured: Measured, rates: tuple[float, float], seconds: float) -> Progress:
        biases = state.model.expert_biases()
        sparse = bool(biases)
        health = measure(measured.counts, torch.stack(biases)) if sparse else Health([0.0], 1.0, 0, 0.0)
        speed = self.config.batch_at(state.tokens - 1) / seconds
        values: dict[str, Any] = {
            "tokens": state.tokens,
            "loss": measured.loss,
            "z_loss": measured.z_loss,
            "balance_loss": measured.balance_loss,
            "grad_norm": measured.grad_norm,
            "batch_het": measured.batch_het,
            "lr_muon": rates[0],
            "lr_adamw": rates[1],
            "tokens_per_second": round(speed, 1),
            "max_violation": max(health.max_violation),
            "max_violation_by_layer": [round(value, 4) for value in health.max_violation],
            "dead_experts": health.dead_experts,
            "load_entropy": health.load_entropy,
            "bias_norm": health.bias_norm,
            "seconds": round(seconds, 4),
            **state.guard.trend.figures(),
        }
        for name in ("loss", "grad_norm", "batch_het", "max_violation", "dead_experts", "load_entropy", "lr_muon"):
            self.board.scalar(f"train/{name}", values[name], state.step)
        self.board.scalar("speed/tokens_per_second", speed, state.step)
        if sparse and (state.step % LOAD_EVERY == 0 or state.step == 1):
            share = measured.counts.double() / measured.counts.sum(-1, keepdim=True)
            values["expert_load"] = [[round(value, 5) for value in layer] for layer in share.tolist()]
            for layer, load in enumerate(share):
                self.board.histogram(f"expert_load/layer_{layer}", load, state.step)
        self.metrics.write("step", state.step, **values)
        return Progress(
            state.step,
            state.tokens,
            measured.loss,
            self.bits_per_byte,
            values["max_violation"],
            health.dead_experts,
            speed,
        )

    def incident(self, step: int, incident: Incident) -> None:
        """Log, say and tell what the guard or the watch found, and what is done about it."""
        kind, what, action, evidence = incident
        self.metrics.write("guard", step, trouble=kind, what=what, action=action, **evidence)
        self.say(f"step {step}: {what} -> {action}")
        if kind != "hang" and action != "stop":  # a hang was told while it lasted, a stop is told as the run's end
            self.watch.alarm(kind, what, action)

    def _log_refused(self, step: int, what: str, action: str) -> None:
        self.incident(step, Incident("storage", what, action, {}))

    def rolled_back(self, step: int, rows_read: int) -> None:
        """Drop what was logged of the steps after `step`, which are run again; the guard's lines stay."""
        self.metrics.roll_back(step, rows_read)
        self.board.purge(step)

    def resumed(self, state: TrainState) -> None:
        """Record by what the run goes on, and say so where bits may differ from those of a run that was not killed."""
        here = machine(self.world)
        self.metrics.write("resume", state.step, tokens=state.tokens, **here, code=code_version())
        before = begun(self.run)["begun_with"]
        unlike = [f"{name} {before.get(name)}, now {here[name]}" for name in here if before.get(name) != here[name]]
        if unlike:
            self.say(f"begun with {'; '.join(unlike)}: from here on bits may differ from those of an unbroken run")

    def changed(self, step: int, changes: list[str]) -> None:
        """Settings that a resume changed; all are of the kind that no step's arithmetic reads."""
        self.metrics.write("settings", step, changes=changes)
        self.say(f"from step {step} on: {'; '.join(changes)}")

    def evaluate(self, state: TrainState) -> None:
        """Bits per byte on held-out text, and a short sample. A corpus without held-out text has neither."""
        if not self.heldout:
            return
        state.model.eval()
        score = total(score_documents(state.model, self.heldout, self.config.data.sequence_length, self.world))
        state.model.train()
        self.bits_per_byte = score.bits_per_byte
        self.metrics.write(
            "evaluation",
            state.step,
            tokens=state.tokens,
            bits_per_byte=score.bits_per_byte,
            loss=score.loss,
            bytes=score.bytes,
        )
        self.board.scalar("heldout/bits_per_byte", score.bits_per_byte, state.step)
        if self.config.train.sample_tokens:
            self._sample(state)

    def _sample(self, state: TrainState) -> None:
        tokenizer = state.loader.tokenizer
        prompt = tokenizer.decode(list(self.heldout[0][0][1:13]))
        ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
        room = self.config.model.max_position_embeddings - len(ids)
        new = continue_greedily(
            state.model, ids, min(self.config.train.sample_tokens, room), dispatch=dispatch_over(self.world)
        )
        new = new[: new.index(tokenizer.eos_id)] if tokenizer.eos_id in new else new
        text = tokenizer.decode(new)
        self.metrics.write("sample", state.step, prompt=prompt, text=text)
        self.board.text("sample", f"{prompt}|{text}", state.step)

    def save(self, state: TrainState, last: bool) -> None:
        """A checkpoint in the background; then the pointer moves, and the old ones go. `last`: of this run."""
        state.guard.saved(state.step)
        self._compare_replicas(state)
        self._start_save(state, f"step-{state.step:08d}", newest=True, needed=last)

    def _compare_replicas(self, state: TrainState) -> None:
        """Replicas drift apart unnoticed, so each save looks whether they have."""
        shards = differing_shards(state.model, self.world)
        if shards:
            what = (
                f"the weights of the replicas differ in {len(shards)} of their shards, the first of them {shards[0]}: "
                "they learn different models. A resume makes them equal again"
            )
            self.incident(state.step, Incident("replicas", what, "alarm", {"shards": shards}))

    def save_named(self, state: TrainState, name: str) -> None:
        """A checkpoint under a name of its own, kept for good beside those of the steps.

        Written whenever its point is passed: after a roll-back it must be of the branch that the run ends in.
        """
        self._start_save(state, name, newest=False, needed=True)

    def begin_phase(self, state: TrainState, phase: Phase) -> None:
        """Log, say and show what the next step begins."""
        self.watch.begins(phase, state.step, state.tokens)
        self.metrics.write(
            "phase",
            state.step,
            name=phase.name,
            tokens=phase.begin,
            batch_tokens=phase.batch_tokens,
            sequence_length=phase.sequence_length,
            corpus=phase.corpus,
        )
        self.say(
            f"step {state.step}: phase '{phase.name}' begins, {phase.rows:,} rows of {phase.sequence_length:,} tokens "
            "in a step"
        )

    def _start_save(self, state: TrainState, name: str, newest: bool, needed: bool) -> None:
        self.wait_for_save()
        self.saver.start(state, name, newest, needed)

    def look_after_save(self) -> None:
        """Once a step: a save that ended is logged, one that failed is told, or ends the run on all processes alike."""
        self._log_save(self.saver.poll())

    def wait_for_save(self) -> None:
        """Let the save that is going on end."""
        self._log_save(self.saver.wait())

    def _log_save(self, ended: Saved | Failed | None) -> None:
        if isinstance(ended, Failed):
            what = f"checkpoint {ended.checkpoint} was not saved: {ended.problem}"
            action = f"save again when next due (failure {ended.in_a_row} in a row, the run ends at {FAILURES})"
            self.incident(ended.step, Incident("storage", what, action, {}))
        elif ended:
            self.metrics.write("save", **ended._asdict())
            if ended.checkpoint in self.config.named_checkpoints:
                self.say(f"step {ended.step}: {ended.checkpoint} checkpoint kept at {ended.tokens:,} tokens")

    def close(self) -> None:
        try:
            self.wait_for_save()
        finally:
            self.metrics.close()
            self.board.close()


def due(every: int, before: int, after: int) -> bool:
    """Whether a multiple of `every` tokens lies in (before, after]."""
    return every > 0 and after // every > before // every


def within(documents: Iterable[HeldoutDocument], budget: int, tokenizer: Tokenizer) -> list[tuple[list[int], int]]:
    """(ids with begin and end token, UTF-8 bytes) of the first documents, the last one cut to keep to the budget."""
    chosen, left = [], budget
    for document in documents:
        ids, size = [int(token) for token in document.ids], document.bytes
        if size > left:
            ends = list(accumulate(len(tokenizer.piece(token)) for token in ids[1:-1]))
            fitting = bisect_right(ends, left)
            ids, size = ids[: 1 + fitting] + ids[-1:], ends[fitting - 1] if fitting else 0
        if size:
            chosen.append((ids, size))
        left -= size
        if size < document.bytes or left <= 0:
            break
    return chosen
