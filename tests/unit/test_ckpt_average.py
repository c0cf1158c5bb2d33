"""An average of checkpoints is the plain mean of their weights, and a model like any other."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from trinity.base.errors import CheckpointError, UsageError
from trinity.base.lineage import read_lineage
from trinity.ckpt.average import average, latest, weights_of
from trinity.ckpt.folder import save_checkpoint, stage
from trinity.ckpt.opened import open_model
from trinity.cli.main import main
from trinity.config.load import override, to_dict
from trinity.model.init import build_model
from trinity.model.transformer import Transformer
from trinity.recipes.table import recipe
from trinity.text.tokenizer import Tokenizer

CONFIG = override(recipe("debug"), ["model.num_hidden_layers=3"]).model


def model_at(step: int, config=CONFIG) -> Transformer:
    model = build_model(config, step)
    for bias in model.expert_biases():
        bias.copy_(torch.linspace(-0.1, 0.1, len(bias)) * step)
    return model


def save(run: Path, step: int, model: Transformer, name: str = "", settings: str = "a", data: str = "b") -> Path:
    state = {"step": step, "tokens": step * 1024, "model_config": to_dict(model.config),
             "config_fingerprint": settings, "data_fingerprint": data}  # fmt: skip
    return save_checkpoint(run, name or f"step-{step:08d}", stage(model.state_dict(), {}, state))


@pytest.fixture(scope="module")
def run(debug_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "run"
    for step in (1, 2, 3, 4):
        save(run, step, model_at(step))
    Tokenizer.load(debug_data).save(run)
    return run


def mean_of(steps: dict[int, float]) -> dict[str, torch.Tensor]:
    states = {step: model_at(step).state_dict() for step in steps}
    return {
        name: torch.stack([states[step][name].double() * weight for step, weight in steps.items()]).sum(0).float()
        for name in states[next(iter(steps))]
    }


def test_the_average_is_the_plain_mean(run: Path):
    model, made_of = average(latest(run, 3))
    wanted = mean_of({2: 1 / 3, 3: 1 / 3, 4: 1 / 3})
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == wanted[name].dtype
        torch.testing.assert_close(tensor, wanted[name], rtol=2e-7, atol=1e-9, msg=name)
    assert [entry["checkpoint"] for entry in made_of] == ["step-00000002", "step-00000003", "step-00000004"]
    assert all(entry["weight"] == pytest.approx(1 / 3, abs=1e-6) for entry in made_of)
    for folder, entry in zip(latest(run, 3), made_of, strict=True):
        assert entry["manifest"] == hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    for bias in model.expert_biases():
        torch.testing.assert_close(bias, torch.linspace(-0.3, 0.3, len(bias)))


def test_an_exponential_average_weighs_the_newest_most(run: Path):
    assert weights_of(3, 0.5) == [1 / 7, 2 / 7, 4 / 7] and sum(weights_of(9, 0.99)) == pytest.approx(1)
    model, made_of = average(latest(run, 2)[::-1], decay=0.25)  # named newest first: weighed by step all the same
    assert [(entry["step"], entry["weight"]) for entry in made_of] == [(3, 0.2), (4, 0.8)]
    wanted = mean_of({3: 0.2, 4: 0.8})
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, wanted[name], rtol=2e-7, atol=1e-9, msg=name)


def test_the_command_writes_a_model_that_opens(run: Path, tmp_path: Path, capsys):
    assert main(["average", str(run), "--last", "2", "--out", str(tmp_path / "mean")]) == 0
    opened, wanted = open_model(tmp_path / "mean"), mean_of({3: 0.5, 4: 0.5})
    for name, tensor in opened.model.state_dict().items():
        torch.testing.assert_close(tensor, wanted[name], rtol=2e-7, atol=1e-9, msg=name)
    parents = read_lineage(tmp_path / "mean")["parents"]
    assert [entry["checkpoint"] for entry in parents["checkpoints"]] == ["step-00000003", "step-00000004"]
    folders = [str(run / "checkpoints" / f"step-0000000{step}") for step in (3, 4)]
    assert main(["average", *folders, "--out", str(tmp_path / "again")]) == 0
    one, other = (tmp_path / name / "model.safetensors" for name in ("mean", "again"))
    assert one.stat().st_size == other.stat().st_size
    again = open_model(tmp_path / "again").model.state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in opened.model.state_dict().items())
    assert "mean of step-00000003, step-00000004" in capsys.readouterr().out


def test_what_cannot_be_averaged_is_refused(run: Path, tmp_path: Path, capsys):
    with pytest.raises(UsageError, match="has kept 4 step checkpoints, not 9"):
        latest(run, 9)
    with pytest.raises(UsageError, match="at least two"):
        average(latest(run, 1))
    shutil.copytree(run, tmp_path / "run")
    first, second = latest(tmp_path / "run", 2)
    wider = override(recipe("debug"), ["model.num_hidden_layers=3", "model.moe_intermediate_size=8"]).model
    save(tmp_path / "run", 5, model_at(5, wider))
    with pytest.raises(CheckpointError, match="another architecture than .*moe_intermediate_size"):
        average(latest(tmp_path / "run", 2))
    for unlike in ({"settings": "x"}, {"data": "x"}):
        stranger = save(tmp_path / "other", 9, model_at(9), **unlike)
        with pytest.raises(CheckpointError, match=f"of another run than .*{next(iter(unlike))} x instead of"):
            average([first, stranger])
    for twice in (first, save(tmp_path / "run", 3, model_at(3), name="base"), first / ".." / first.name):
        with pytest.raises(UsageError, match="are both of step 3, which would count twice"):
            average([first, second, twice])
    broken = model_at(6)
    with torch.no_grad():
        broken.norm.weight[0] = torch.nan
    with pytest.raises(CheckpointError, match=r"norm\.weight .* not finite"):
        average([second, save(tmp_path / "run", 6, broken)])
    (first / "state.json").write_text(json.dumps({}))
    with pytest.raises(CheckpointError, match="is damaged"):
        average([first, second])
    for arguments, what in (
        ([str(run), "--out", str(run)], "exists"),
        ([str(run), "--decay", "1.5", "--out", str(tmp_path / "x")], "not between 0 and 1"),
        ([str(tmp_path), str(run), "--out", str(tmp_path / "x")], "is not a checkpoint"),
        ([str(tmp_path / "none"), "--out", str(tmp_path / "x")], "has kept 0 step checkpoints, not 4"),
    ):
        assert main(["average", *arguments]) == 2
        assert what in capsys.readouterr().err
