"""A run laid out in phases: whole steps, no gap, each phase at the first step boundary it may begin at."""

from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from trinity.base.errors import ConfigError
from trinity.config.optim import OptimConfig
from trinity.config.phases import ExtensionConfig, PhaseConfig
from trinity.config.run import RunConfig
from trinity.optim.schedule import factor_at
from trinity.recipes.table import recipe

DEBUG = recipe("debug")
STEP = 512  # one microbatch of debug


@st.composite
def runs(draw) -> RunConfig:
    """Debug with up to four phases at random tokens, and perhaps an extension."""
    starts = sorted(draw(st.sets(st.integers(0, 40_000), max_size=4)))
    batches = st.sampled_from([0, STEP, 2 * STEP, 6 * STEP])
    mixes = st.sampled_from(["", "a", "b"])
    phases = tuple(
        PhaseConfig(name=f"p{start}", from_tokens=start, batch_tokens=draw(batches) if start else 0, mix=draw(mixes))
        for start in starts
    )
    extension = ExtensionConfig(
        tokens=draw(st.sampled_from([0, 1, 5000])), sequence_length=256, batch_tokens=1024, mix=draw(mixes)
    )
    tokens, batch = draw(st.integers(50_000, 90_000)), draw(st.sampled_from([STEP, 4 * STEP]))
    train = replace(DEBUG.train, tokens=tokens, batch_tokens=batch)
    try:
        return replace(DEBUG, train=train, phases=phases, extension=extension)
    except ConfigError as error:
        assume("both begin" not in error.what)
        raise


@given(runs())
def test_a_course_is_whole_steps_without_a_gap(run: RunConfig):
    course = run.course
    assert course[0].begin == 0 and course[-1].end == run.horizon >= run.train.tokens
    for phase, following in zip(course, course[1:], strict=False):
        assert phase.end == following.begin
    walked, tokens = [], 0
    while tokens < run.horizon:
        phase = run.phase_at(tokens)
        assert phase.begin <= tokens < phase.end and run.batch_at(tokens) == phase.batch_tokens
        tokens += phase.batch_tokens
        walked.append(tokens)
    assert tokens == run.horizon and len(walked) == run.steps == sum(phase.steps for phase in course)
    boundaries = [0, *walked]
    assert run.base_end == min(tokens for tokens in boundaries if tokens >= run.train.tokens)
    by_name = {phase.name: phase for phase in course}
    for phase in run.phases:
        begin = by_name[phase.name].begin
        assert begin == min(tokens for tokens in boundaries if tokens >= phase.from_tokens)
        assert not phase.batch_tokens or by_name[phase.name].batch_tokens == phase.batch_tokens


@given(runs())
def test_each_phase_reads_the_folder_last_named(run: RunConfig):
    folders, last = ["", *run.mixes.values()], run.own_data
    if last:
        folders[0] = last
    asked = {phase.name: phase.mix for phase in run.phases} | {"extension": run.extension.mix}
    for phase in run.course:
        last = asked.get(phase.name) or last
        assert folders[phase.corpus] == last
    assert len(set(run.mixes.values())) == len(run.mixes) and run.own_data not in run.mixes.values()


@given(runs(), st.floats(0, 1))
def test_one_schedule_runs_over_all_phases(run: RunConfig, part: float):
    """Phases and the size of steps do not move the rate; the extension has a schedule of its own."""
    tokens = part * run.base_end
    plain = replace(run, phases=(), extension=ExtensionConfig())
    if plain.base_end == run.base_end:
        assert factor_at(tokens, run) == factor_at(tokens, plain)
    if run.extension.tokens:
        beyond = [factor_at(run.base_end + share * (run.horizon - run.base_end), run) for share in (1e-6, 0.5, 1)]
        assert beyond == pytest.approx([0.1, 0.05, 0], abs=1e-5)


def test_the_published_ends_of_the_schedule():
    """Large continues 1/10 -> 1/20 along a cosine; Nano and Mini rise again to 1/10 and fall to zero."""
    optim = OptimConfig(decay_tokens=8192, decay="cosine", final_lr_fraction=0.1)
    extension = ExtensionConfig(
        tokens=4096, sequence_length=256, batch_tokens=1024, final_lr_fraction=0.05, decay="cosine"
    )
    run = replace(DEBUG, optim=optim, extension=extension)
    end = run.base_end
    assert factor_at(end, run) == pytest.approx(0.1) and factor_at(end + 1e-9, run) == pytest.approx(0.1)
    assert factor_at(end + 2048, run) == pytest.approx(0.075) and factor_at(run.horizon, run) == pytest.approx(0.05)
    again = replace(extension, warmup_tokens=1024, final_lr_fraction=0.0, decay="linear")
    run = replace(DEBUG, extension=again)
    points = [factor_at(end + tokens, run) for tokens in (512, 1024, 2560, 4096)]
    assert factor_at(end, run) == 0 and points == pytest.approx([0.05, 0.1, 0.05, 0])


@pytest.mark.parametrize(
    ("decay", "extended", "names"),
    [
        (16384, 4096, {"pre-anneal": 49152, "base": 65536, "context-extended": 69632}),
        (16384, 0, {"pre-anneal": 49152, "base": 65536}),
        (0, 4096, {"base": 65536, "context-extended": 69632}),
        (0, 0, {}),
        (65536, 0, {"base": 65536}),
    ],
)
def test_what_a_run_keeps_for_good(decay: int, extended: int, names: dict[str, int]):
    extension = ExtensionConfig(tokens=extended, sequence_length=256, batch_tokens=1024)
    run = replace(DEBUG, optim=OptimConfig(decay_tokens=decay), extension=extension)
    assert run.named_checkpoints == names


def test_a_phase_keeps_a_checkpoint_where_it_begins():
    phases = (PhaseConfig(name="late", from_tokens=20_000, keep="before-late"),)
    assert replace(DEBUG, phases=phases).named_checkpoints == {"before-late": 20480, "pre-anneal": 49152, "base": 65536}


def test_the_published_runs_are_laid_out_as_published():
    """Facts of the report: Large takes 12,288 and from 4.9T tokens 16,384 sequences, 17T tokens in about 139k steps."""
    large = recipe("large")
    assert [phase.rows for phase in large.course] == [12288, 16384, 16384, 16384, 512]
    assert [round(phase.begin / 1e12, 1) for phase in large.course] == [0, 4.9, 10, 14, 17]
    assert sum(phase.steps for phase in large.course[:-1]) == pytest.approx(139_000, rel=2e-3)
    assert factor_at(14e12, large) == 1 and factor_at(large.base_end, large) == pytest.approx(0.1)
    assert factor_at(large.horizon, large) == pytest.approx(0.05)
    assert list(large.named_checkpoints) == ["phase-1", "pre-anneal", "base", "context-extended"]
    assert large.named_checkpoints["phase-1"] == pytest.approx(10e12, rel=1e-4)
    for name, longest in (("nano", 262144), ("mini", 131072)):
        run = recipe(name)
        assert [phase.rows for phase in run.course[:-1]] == [4096, 8192, 8192, 8192]
        assert run.named_checkpoints["pre-anneal"] == pytest.approx(8.8e12, rel=1e-4), "as their cards say"
        assert run.course[-1].sequence_length == longest
        assert max(factor_at(run.base_end + part * 12e9, run) for part in (0.05, 0.1, 0.5)) <= 0.1 + 1e-9
        assert factor_at(run.horizon, run) == factor_at(run.base_end, run) == 0


def test_steps_that_processes_cannot_share_are_refused():
    (phase,) = DEBUG.course
    assert (phase.rows, phase.microbatches(), phase.microbatches(2)) == (8, 2, 1)
    with pytest.raises(ConfigError, match="phase 'pretraining' has 8 rows; 3 processes cannot share them"):
        phase.microbatches(3)
