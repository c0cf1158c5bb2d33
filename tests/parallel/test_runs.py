"""Whole runs on two real processes, experts apart, beside the same runs on one: looking, rolling back, phases."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from living import BAD, ROLL_BACK, breaking, go_on, life, live, lived, look, ramped
from worlds import in_processes

from trinity.base.run import read_lines
from trinity.data.documents import Document, writing_documents
from trinity.data.tokenise import tokenise
from trinity.parallel import mesh
from trinity.parallel.mesh import World
from trinity.recipes.file import write_recipe
from trinity.text.train_bpe import train_bpe
from trinity.train import loop

# Losses over a whole run: sums in another order now and then send a token to another expert.
FIGURE, WEIGHT = 1e-4, 1e-3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three token folders of one tokenizer."""
    place, tokenizer = tmp_path_factory.mktemp("data"), train_bpe(iter(["words and more words, 12345\n" * 9]), 300)
    for name, count, length in (("web", 60, 12), ("code", 40, 20), ("long", 12, 300)):
        with writing_documents(place / f"{name}-text", {}, {}) as (writer, _):
            for number in range(count):
                text = f"{name} {number} " + "and words " * (length + number * 7 % 13)
                writer.write(Document(text, f"{number}", name))
        tokenise(place / f"{name}-text", tokenizer, place / name, 0.1)
    return {name: place / name for name in ("web", "code", "long")}


@pytest.fixture(scope="module")
def apart(debug_data, data, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict], Path]:
    """What each of the two processes found, and the folder of their runs."""
    out = tmp_path_factory.mktemp("apart")
    in_processes(2, live, debug_data, data, out)
    return torch.load(out / "found.pt", weights_only=False), out


def alike(one: dict, other: dict) -> None:
    """Two processes of a run know the same to the bit."""
    assert {name: one[name] for name in ("step", "tokens", "loader", "guard")} == {
        name: other[name] for name in ("step", "tokens", "loader", "guard")
    }
    assert torch.equal(one["bias_momentum"], other["bias_momentum"])
    assert all(torch.equal(tensor, other["weights"][name]) for name, tensor in one["weights"].items())


def near(apart: dict, alone: dict) -> None:
    """A run ends where one process ends, to rounding, having read the same stream to the token."""
    for name in ("step", "tokens", "loader"):
        assert apart[name] == alone[name], name
    for name, tensor in apart["weights"].items():
        expected = alone["weights"][name]
        assert float((tensor - expected).norm() / expected.norm().clamp(min=1e-6)) < WEIGHT, name


def lines(run: Path, *kinds: str) -> list[dict]:
    return [line for line in read_lines(run / "metrics.jsonl") if line["kind"] in kinds]


def same_figures(apart: Path, alone: Path, kind: str, *figures: str) -> None:
    ours, theirs = lines(apart, kind), lines(alone, kind)
    assert [(line["step"], line["tokens"]) for line in ours] == [(line["step"], line["tokens"]) for line in theirs]
    assert ours
    for figure in figures:
        assert [line[figure] for line in ours] == pytest.approx([line[figure] for line in theirs], rel=FIGURE), figure


def test_evaluation_and_samples_are_those_of_one_process(apart, debug_data):
    (first, second), _ = apart
    alone = look(debug_data, World.alone())
    assert first["look"] == second["look"]
    assert first["look"]["sample"] == alone["sample"] and len(alone["sample"]) == 12
    assert len(alone["scores"]) == 4
    for ours, theirs in zip(first["look"]["scores"], alone["scores"], strict=True):
        assert ours[1:] == theirs[1:] and ours[0] == pytest.approx(theirs[0], rel=1e-6)


def test_a_roll_back_for_what_one_process_met_is_everybodys(apart, debug_data, tmp_path):
    (first, second), out = apart
    alike(first["roll back"], second["roll back"])
    mend = breaking(2 * BAD)  # of one process's two microbatches a step the second
    try:
        alone = lived(ROLL_BACK, debug_data, tmp_path / "alone", World.alone())
    finally:
        mend()
    (line,), (expected,) = lines(out / "rolled", "guard"), lines(tmp_path / "alone", "guard")
    assert (line["step"], line["action"], line["trouble"]) == (BAD, "rollback", "non-finite")
    assert line["nonfinite"]["rows"] == [[36, 40]]
    assert line == expected, "rows, gradients and what is not read again are named as one process names them"
    near(first["roll back"], alone)
    same_figures(out / "rolled", tmp_path / "alone", "step", "loss")


def test_a_life_in_phases_reads_and_learns_what_one_process_does(apart, data, tmp_path):
    (first, second), out = apart
    alike(first["life"], second["life"])
    alone = lived(life(data), data["web"], tmp_path / "alone", World.alone())
    near(first["life"], alone)
    same_figures(out / "life", tmp_path / "alone", "step", "loss", "grad_norm")
    same_figures(out / "life", tmp_path / "alone", "evaluation", "bits_per_byte")
    phases = [(line["name"], line["step"]) for line in lines(out / "life", "phase")]
    assert phases == [(line["name"], line["step"]) for line in lines(tmp_path / "alone", "phase")]
    assert [name for name, _ in phases] == ["wide", "code", "extension"]
    kept = {path.name for path in (out / "life" / "checkpoints").iterdir()}
    assert {"pre-anneal", "base", "context-extended"} <= kept


@pytest.fixture
def past_the_ramp(debug_data, tmp_path) -> Path:
    """A run that one process began and left after 1,536 tokens, the newest checkpoint at 1,024."""

    def stop(progress) -> None:
        if progress.tokens == 1536:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        loop.train(ramped(), debug_data, tmp_path / "run", lambda _: None, stop)
    return tmp_path / "run"


def test_a_layout_is_checked_where_the_newest_checkpoint_stands(past_the_ramp, debug_data, monkeypatch):
    asked, original = [], mesh.layout
    monkeypatch.setattr(mesh, "layout", lambda *given: asked.append(given[2]) or original(*given))
    state = loop.train(ramped(), debug_data, past_the_ramp, lambda _: None, lambda _: None)
    write_recipe(ramped(), past_the_ramp / "ramp.toml")
    go_on(past_the_ramp / "ramp.toml", debug_data, past_the_ramp)
    assert asked == [1024, 3072] and state.tokens == 3072


@pytest.mark.slow
def test_a_run_past_its_ramp_goes_on_on_more_processes_than_the_ramp_has_rows(past_the_ramp, debug_data):
    write_recipe(ramped(), past_the_ramp / "ramp.toml")
    in_processes(2, go_on, past_the_ramp / "ramp.toml", debug_data, past_the_ramp)
    assert [line["step"] for line in lines(past_the_ramp, "resume")] == [5]
    assert lines(past_the_ramp, "step")[-1]["tokens"] == ramped().horizon == 3072
