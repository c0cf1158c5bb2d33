"""A roll-back gets past a lasting change, whether a phase announces it or the data bring it; ruin stays ruin."""

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from trinity.base.errors import TrainingHalted
from trinity.base.run import read_lines
from trinity.config.load import override
from trinity.config.phases import Phase, PhaseConfig
from trinity.config.train import TrainConfig
from trinity.recipes.table import recipe
from trinity.train import loop
from trinity.train.guard import Guard

EXPERTS = 16
ROLL_BACK = TrainConfig(
    tokens=1, batch_tokens=1, microbatch_rows=1, spike_action="rollback", router_action="rollback", max_incidents=5
)


def phase(corpus: int = 0, batch_tokens: int = 1024, sequence_length: int = 128) -> Phase:
    return Phase("any", 0, 1, batch_tokens, sequence_length, 1, corpus)


class Imagined:
    """A run of a guard alone: checkpoints, roll-backs to them, and data that go on when the steps go back."""

    def __init__(self, guard: Guard, save_every: int, phase_at: Callable[[int], Phase] = lambda _: phase()) -> None:
        self.guard, self.save_every, self.phase_at = guard, save_every, phase_at
        self.step = self.read = 0
        self.saved: tuple[int, dict] | None = None
        self.actions: list[tuple[int, str]] = []

    def live(self, steps: int, loss_of, norm_of=lambda step, read: 1.0, counts_of=None) -> list[str]:
        """loss_of(step, batches read), norm_of(the same), counts_of(batches read). Until `steps` or a stop."""
        noise = random.Random(1)
        while self.step < steps:
            self.guard.turn_to(self.phase_at(self.step))
            loss = loss_of(self.step, self.read) + noise.gauss(0, 0.02)
            verdict = self.guard.judge(loss, norm_of(self.step, self.read) * (1 + 0.05 * noise.random()))
            if verdict.action == "update" and counts_of:
                verdict = self.guard.judge_routing(counts_of(self.read), [torch.zeros(EXPERTS)])
            self.read += 1
            if verdict.action != "update":
                self.actions.append((self.step, verdict.action))
            if verdict.action == "stop":
                break
            if verdict.action == "rollback":
                assert self.saved is not None
                self.step = self.saved[0]
                self.guard.rolled_back(self.saved[1])
                continue
            self.step += 1
            if self.step % self.save_every == 0:
                self.guard.saved(self.step)
                self.saved = (self.step, self.guard.state())
        return [action for _, action in self.actions]


def test_a_phase_of_other_text_is_no_spike():
    """A checkpoint 5 steps before a mix whose loss lies 0.3 nats higher for good; every roll-back replays those 5."""

    def loss_of(step: int, read: int) -> float:
        return 3.3 if step >= 55 else 3.0

    def run(announced: bool) -> list[str]:
        return Imagined(Guard(ROLL_BACK), 50, lambda step: phase(corpus=int(announced and step >= 55))).live(
            120, loss_of, lambda step, read: 4.0 if step >= 55 else 1.0
        )

    assert run(announced=True) == []
    assert run(announced=False) == ["rollback", "rollback"], "the third time it is a new level"


@pytest.mark.parametrize("other", [phase(corpus=1), phase(sequence_length=512), phase(batch_tokens=512)])
def test_other_text_rows_or_steps_begin_a_level_anew_and_a_name_does_not(other):
    def grown(then: Phase) -> Guard:
        guard = Guard(ROLL_BACK)
        for step in range(20):
            guard.turn_to(phase())
            guard.judge(3.0 + 0.01 * (step % 2), 1.0)
        guard.turn_to(then)
        return guard

    guard = grown(other)
    assert guard.judge(3.5, 1.0).action == "update"
    for _ in range(15):
        guard.turn_to(other)
        guard.judge(3.5, 1.0)
    assert guard.judge(3.9, 1.0).action == "rollback", "after 16 steps it is awake again"
    assert grown(phase()._replace(name="another", begin=5, end=9)).judge(3.5, 1.0).action == "rollback"


def test_a_lasting_change_that_the_data_bring_is_met_three_times_and_passes():
    """No phase says so: from batch 55 on the loss lies higher, with an old document in between now and then."""

    def loss_of(step: int, read: int) -> float:
        return 3.3 if read >= 55 and read % 4 else 3.0

    guard = Guard(ROLL_BACK)
    assert Imagined(guard, 50).live(160, loss_of) == ["rollback", "rollback"]
    assert guard.judge(5.0, 1.0).action == "rollback", "at the new level spikes are seen"


@pytest.mark.parametrize("rise", [lambda times: 5.0, lambda times: 0.3 * times])
def test_ruin_and_spikes_that_differ_stay_spikes_over_any_number_of_roll_backs(rise):
    times = []

    def loss_of(step: int, read: int) -> float:
        if step != 55:
            return 3.0
        times.append(step)
        return 3.0 + rise(len(times))

    assert Imagined(Guard(ROLL_BACK), 50).live(120, loss_of) == ["rollback"] * 4 + ["stop"]


def test_a_save_forgets_the_spikes_before_it():
    guard = Guard(ROLL_BACK)
    run = Imagined(guard, 50)
    run.live(50, lambda step, read: 3.0)
    assert run.saved is not None
    for _ in range(2):
        assert guard.judge(3.3, 1.0).action == "rollback"
        guard.rolled_back(run.saved[1])
    guard.saved(100)
    assert guard.judge(3.3, 1.0).action == "rollback"


def counts(read: int, change: int) -> torch.Tensor:
    """Another half of the experts is preferred from batch `change` on; no expert more than before."""
    share = torch.full((1, EXPERTS), 0.25)
    share[0, : EXPERTS // 2] = 1.75
    return ((share if read < change else share.flip(-1)) * 1000).to(torch.int64)


def test_routing_that_follows_the_text_passes_with_a_phase_and_without():
    def run(announced: bool) -> list[str]:
        # Announced: the text changes with the step, and the roll-back that is not needed would bring it back.
        return Imagined(Guard(ROLL_BACK), 145, lambda step: phase(corpus=int(announced and step >= 150))).live(
            280, lambda step, read: 3.0, counts_of=lambda read: counts(read, 150)
        )

    assert run(announced=True) == []
    actions = run(announced=False)
    assert actions[:3] == ["rollback", "rollback", "alarm"] and "stop" not in actions and "rollback" not in actions[3:]


def test_a_collapse_is_never_taken_for_the_text():
    def dying(read: int) -> torch.Tensor:
        share = torch.ones(1, EXPERTS)
        share[0, 0] += max(0, read - 150) * 0.5
        return (share * 1000).to(torch.int64)

    actions = Imagined(Guard(ROLL_BACK), 145).live(400, lambda step, read: 3.0, counts_of=dying)
    assert actions[-1] == "stop"


SCRIPTED = ["train.batch_tokens=512", "train.tokens=24K", "train.microbatch_rows=2", "train.save_every_tokens=2048",
            "train.evaluate_bytes=0", "train.sample_tokens=0", "data.sequence_length=128", "optim.warmup_tokens=1K",
            "model.num_hidden_layers=2", "optim.decay_tokens=2K", "train.spike_action=rollback"]  # fmt: skip


@pytest.mark.parametrize("announced", [True, False])
def test_a_real_run_gets_past_a_phase_and_past_data_with_another_level(debug_data, tmp_path, monkeypatch, announced):
    """The measured figures are scripted, all else is real; the change comes two steps after a checkpoint."""
    original = loop.accumulate
    wide = PhaseConfig(name="wide", from_tokens=13 * 1024, batch_tokens=1024)

    def accumulate(state, batches, config):
        measured = original(state, batches, config)
        return measured._replace(loss=3.3 if state.tokens >= 13 * 1024 else 3.0, grad_norm=1.0)

    monkeypatch.setattr(loop, "accumulate", accumulate)
    config = replace(override(recipe("debug"), SCRIPTED), phases=(wide,) if announced else ())
    try:
        state = loop.train(config, debug_data, tmp_path / "run", lambda _: None, lambda _: None)
    except TrainingHalted as error:
        pytest.fail(str(error))
    assert state.tokens == config.horizon
    actions = [line["action"] for line in read_lines(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "guard"]
    assert actions == ([] if announced else ["rollback", "rollback"])
