"""MODEL in its three kinds, and one clear error for all that is none of them."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from trinity.base import progress
from trinity.base.durable import seal
from trinity.base.errors import CheckpointError, TrinityError, UsageError
from trinity.base.lineage import write_lineage
from trinity.ckpt.folder import save_checkpoint, stage
from trinity.ckpt.model_folder import write_model_folder
from trinity.ckpt.opened import OpenedModel, open_model
from trinity.config.load import to_dict
from trinity.model.init import build_model
from trinity.model.transformer import Transformer
from trinity.recipes.table import recipe
from trinity.text.tokenizer import Tokenizer
from trinity.text.train_bpe import train_bpe


def model_at(step: int) -> Transformer:
    model = build_model(recipe("debug").model, step)
    for bias in model.expert_biases():
        bias.copy_(torch.linspace(-0.1, 0.1, len(bias)) / step)
    return model


@pytest.fixture(scope="module")
def made(debug_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """run/ with checkpoints of steps 1, 2, 3, and folder/ with the weights of step 3."""
    place = tmp_path_factory.mktemp("models")
    (place / "run").mkdir()
    (place / "folder").mkdir()
    tokenizer = Tokenizer.load(debug_data)
    tokenizer.save(place / "run")
    write_lineage(place / "run", "pretraining run", {"data": "d"}, {})
    (place / "run" / "config.json").write_text(json.dumps({"config": to_dict(recipe("debug"))}))
    config = to_dict(recipe("debug").model)
    for step in (1, 2, 3):
        state = {"step": step, "model_config": config}
        save_checkpoint(place / "run", f"step-{step:08d}", stage(model_at(step).state_dict(), {}, state))
    write_model_folder(place / "folder", model_at(3), tokenizer, torch.float32)
    write_lineage(place / "folder", "release", {}, {})
    return place


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may damage."""
    shutil.copytree(made / "run", tmp_path / "run")
    return tmp_path / "run"


def holds(opened: OpenedModel, step: int) -> None:
    state = opened.model.state_dict()
    for name, tensor in model_at(step).state_dict().items():
        assert torch.equal(state[name], tensor), name
    assert not opened.model.training and not any(p.requires_grad for p in opened.model.parameters())
    assert opened.tokenizer.vocab_size == 512


def test_a_run_folder_is_its_newest_checkpoint(made: Path):
    opened = open_model(made / "run", warn=pytest.fail)
    holds(opened, 3)
    assert (opened.name, opened.folder.name) == ("run", "step-00000003")
    assert opened.lineage["kind"] == "pretraining run" and opened.generation == {} and not opened.ends_turns


def test_a_checkpoint_folder_is_itself(made: Path, monkeypatch):
    opened = open_model(str(made / "run" / "checkpoints" / "step-00000001"))
    holds(opened, 1)
    assert opened.name == "run-step-00000001" and opened.lineage["kind"] == "pretraining run"
    monkeypatch.chdir(made / "run" / "checkpoints" / "step-00000002")
    holds(open_model("."), 2)
    monkeypatch.chdir(made / "run")
    assert open_model(".").name == "run"


def test_a_hugging_face_folder_is_its_weights(made: Path, monkeypatch):
    opened = open_model(made / "folder")
    holds(opened, 3)
    assert opened.name == "folder" and opened.lineage["kind"] == "release"
    assert opened.generation["eos_token_id"] == opened.tokenizer.eos_id
    monkeypatch.chdir(made / "folder")
    assert open_model(".").name == "folder"


@pytest.mark.parametrize("place", ["run", "run/checkpoints/step-00000003", "folder"])
def test_bfloat16_keeps_routing_and_norms_in_float32(made: Path, place: str):
    state, exact = open_model(made / place, "bfloat16").model.state_dict(), model_at(3).state_dict()
    for name, tensor in state.items():
        precise = name.endswith(("expert_bias", "router.gate.weight", "norm.weight", "layernorm.weight"))
        assert tensor.dtype == (torch.float32 if precise else torch.bfloat16), name
        assert torch.equal(tensor, exact[name].to(tensor.dtype)), name


def test_damaged_checkpoints_are_named_and_an_older_one_is_used(run: Path, capsys):
    newest = run / "checkpoints" / "step-00000003"
    os.truncate(next((newest / "model").iterdir()), 1000)
    holds(open_model(run), 2)
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and str(newest) in told and "1000 bytes" in told
    with pytest.raises(CheckpointError, match=r"step-00000003 is damaged.*Use the one before it"):
        open_model(newest)
    for step in (1, 2):
        (run / "checkpoints" / f"step-0000000{step}" / "state.json").write_text("{}")
    said: list[str] = []
    with pytest.raises(CheckpointError, match="Every checkpoint"):
        open_model(run, warn=said.append)
    assert len(said) == 3


def refused(path: Path, what: str) -> None:
    with pytest.raises(TrinityError) as caught:
        open_model(path)
    assert what in caught.value.what and caught.value.remedy


def test_what_is_no_model_is_told_apart(made: Path, run: Path, tmp_path: Path):
    refused(tmp_path / "nowhere", "There is no model folder at")
    refused(made / "folder" / "config.json", "is a file, not a model")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "is not a model")
    shutil.rmtree(run / "checkpoints")
    refused(run, "is not a model")  # config.json alone
    (run / "checkpoints").mkdir()
    refused(run, "has no checkpoint yet")
    with pytest.raises(UsageError, match="dtype 'float16' is not offered"):
        open_model(made / "run", "float16")


def test_broken_files_of_a_model_folder_are_named(made: Path, tmp_path: Path, tiny_model):
    folder = tmp_path / "folder"
    for name in ("generation_config.json", "lineage.json", "config.json"):
        shutil.copytree(made / "folder", folder)
        (folder / name).write_text("{")
        refused(folder, f"{name} is not JSON")
        (folder / name).write_text("[]")
        refused(folder, f"{name} is not a JSON object")
        shutil.rmtree(folder)
    shutil.copytree(made / "folder", folder)
    (folder / "tokenizer.json").write_text("{}")
    refused(folder, "tokenizer.json is not a tokenizer")
    write_model_folder(folder, tiny_model, Tokenizer.load(made / "run"), torch.float32)
    refused(folder, "512 entries, the model only 64 rows")


def test_the_bias_step_of_the_run_reaches_the_exported_config(made: Path, tmp_path: Path):
    """An export that always said 5e-4 would lose the rate a model was balanced with."""
    config = json.loads((made / "run" / "config.json").read_text())["config"]
    opened = open_model(made / "run")
    assert opened.load_balance_coeff == config["balance"]["smebu_lambda"] != 5e-4
    write_model_folder(
        tmp_path, opened.model, opened.tokenizer, torch.float32, load_balance_coeff=opened.load_balance_coeff
    )
    assert json.loads((tmp_path / "config.json").read_text())["load_balance_coeff"] == opened.load_balance_coeff
    assert open_model(tmp_path).load_balance_coeff == opened.load_balance_coeff


@pytest.mark.parametrize("place", ["run", "folder"])
def test_reading_shows_how_far_it_is(made: Path, place: str, monkeypatch, capsys):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    holds(open_model(made / place), 3)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 20 and all(line.startswith(f"Reading {place}: ") and line.endswith(" left") for line in lines)


def test_a_tokenizer_that_the_run_was_not_trained_with_is_refused(run: Path):
    fitting = Tokenizer.load(run)
    config = {"config": to_dict(recipe("debug")), "tokenizer_fingerprint": fitting.fingerprint}
    (run / "config.json").write_text(json.dumps(config))
    train_bpe(["another text"] * 3, 300).save(run)
    with pytest.raises(CheckpointError, match="tokenizer.json .* is not the tokenizer that this run's model"):
        open_model(run)
    fitting.save(run)
    holds(open_model(run), 3)
    train_bpe([path.read_text() for path in Path(json.__file__).parent.glob("*.py")], 600).save(run)
    (run / "config.json").unlink()
    with pytest.raises(CheckpointError, match="600 entries"):
        open_model(run)


@pytest.mark.parametrize("changed", [{"config": {"model": {"vocab_size": 4096}}}, {"data_of_phases": ["other"]}])
def test_a_checkpoint_that_another_run_made_is_refused(run: Path, changed: dict):
    folder = run / "checkpoints" / "step-00000003"
    state = json.loads((folder / "state.json").read_text()) | {"data_fingerprint": "mine"}
    (folder / "state.json").write_text(json.dumps(state))
    seal(folder)
    (run / "config.json").write_text(json.dumps({"data_of_phases": ["mine"]}))
    holds(open_model(run), 3)
    (run / "config.json").write_text(json.dumps(changed))
    with pytest.raises(CheckpointError, match="step-00000003 is a checkpoint of another run than"):
        open_model(run)


def test_what_lies_beside_a_manifest_is_checked_against_it(made: Path, tmp_path: Path):
    folder = tmp_path / "folder"
    shutil.copytree(made / "folder", folder)
    seal(folder)
    holds(open_model(folder), 3)
    (folder / "generation_config.json").write_text("{}")  # free to change
    holds(open_model(folder), 3)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="is not what its manifest.json promises: model.safetensors was altered"):
        open_model(folder)
    (folder / "model.safetensors").write_bytes(weights)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 90000.0}))
    with pytest.raises(CheckpointError, match="config.json has .* bytes instead of .* taken as it is"):
        open_model(folder)
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match="manifest.json is not a manifest"):
        open_model(folder)
    (folder / "manifest.json").unlink()
    open_model(folder)
