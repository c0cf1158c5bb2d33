"""What the planner says of inference is what the engine holds, and what the guide prints."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from trinity.base.units import show_bytes
from trinity.ckpt.hf import published_config
from trinity.cli.main import main
from trinity.config.load import to_dict
from trinity.engine.pages import KV_DTYPES, Pools, pages_for
from trinity.engine.weights import Kind, layout
from trinity.plan.inference import KINDS, STEP, cache_bytes, read_bytes, weight_bytes
from trinity.recipes.table import recipe

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "inference.md"
FAMILY = ("nano", "mini", "large")
CONTEXTS = (4096, 32768, 131072, 524288)
SHAPES = {
    "debug": recipe("debug").model,
    "odd": replace(recipe("debug").model, hidden_size=72, moe_intermediate_size=24, head_dim=12, vocab_size=515,
                   intermediate_size=52, num_shared_experts=0, num_experts=7),
    "two shared": replace(recipe("debug").model, num_shared_experts=2, num_dense_layers=3),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SHAPES)
def test_weights_are_those_of_the_engine(name: str, kind: Kind):
    config = SHAPES[name]
    assert weight_bytes(config, kind) == sum(place.bytes for place in layout(config, kind))


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("name", ["debug", "lab256", *FAMILY])
@pytest.mark.parametrize(("tokens", "step"), [(1, 1), (4096, 100), (131072, STEP)])
def test_keys_and_values_are_those_of_the_engine(name: str, tokens: int, step: int, kv_dtype: str):
    model = recipe(name).model
    pools = Pools(model, pages_for(tokens), 1, step, torch.device("meta"), kv_dtype)  # type: ignore[arg-type]
    assert cache_bytes(model, tokens, kv_dtype, step) == pools.paged.values.nbytes + pools.local.values.nbytes


def test_a_token_reads_all_but_the_experts_it_does_not_take_and_the_past_it_does_not_see():
    model = replace(recipe("debug").model, num_experts_per_tok=8, num_experts=8)
    rest = (model.vocab_size - 1) * model.hidden_size * 4
    assert read_bytes(model, 0, "float32", "float32") == weight_bytes(model, "float32") - rest
    each = 2 * model.num_key_value_heads * model.head_dim * 2
    far, near = (read_bytes(model, tokens, "int8", "bfloat16") for tokens in (5000, 4000))
    assert far - near == 1000 * each * sum(model.is_global(layer) for layer in range(model.num_hidden_layers))


def rows_of_the_guide() -> list[str]:
    rows = []
    for name in FAMILY:
        model = recipe(name).model
        kinds = [weight_bytes(model, kind) for kind in KINDS]
        rows.append([name.capitalize(), *map(show_bytes, kinds)])
    for name in FAMILY:
        model = recipe(name).model
        for tokens in CONTEXTS:
            caches = [cache_bytes(model, tokens, kind) for kind in KV_DTYPES]
            held = [weight_bytes(model, kind) + caches[1] for kind in ("bfloat16", "int4")]
            read = [read_bytes(model, tokens, kind, "bfloat16") for kind in ("bfloat16", "int4")]
            rows.append([f"{name.capitalize()}, {tokens // 1024}k", *map(show_bytes, [*caches, *held, *read])])
    return [f"| {' | '.join(row)} |" for row in rows]


def test_the_guide_prints_what_the_code_says():
    missing = [row for row in rows_of_the_guide() if row not in GUIDE.read_text().splitlines()]
    assert not missing, "the guide should say:\n" + "\n".join(missing)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """The config.json of a published model and of a run: nothing else is needed."""
    for name, values in (
        ("model", published_config(recipe("nano").model, torch.bfloat16, 0.0)),
        ("run", {"config": to_dict(recipe("nano"))}),
        ("other", {"neither": 1}),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(values))
    return tmp_path


@pytest.mark.parametrize("name", ["model", "run"])
def test_a_model_is_planned_by_its_shape(folders: Path, name: str, capsys):
    assert main(["plan", str(folders / name), "--context", "4096", "70000"]) == 0
    shown = capsys.readouterr().out
    assert "6.12B parameters" in shown and "  70,000  " in shown and "131,072" not in shown
    assert main(["plan", str(folders / name), "--context", "4096", "70000", "--json"]) == 0
    found, model = json.loads(capsys.readouterr().out), recipe("nano").model
    assert found["request_bytes"]["float32"]["70000"] == cache_bytes(model, 70000, "float32")
    for kind in KINDS:
        beside = "float32" if kind == "float32" else "bfloat16"
        assert found["inference"][kind]["read_bytes_per_token"]["70000"] == read_bytes(model, 70000, kind, beside)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (["other"], "other is not a model. Name a Hugging Face folder or a run folder."),
        (["model", "--cluster", "8xH100"], "--cluster is for training, and"),
        (["model", "--context", "0"], "--context takes lengths in tokens, above 0. Such as"),
        (["model", "--context", "4k"], "argument --context: invalid int value: '4k'"),
        (["model", "--contexts", "4"], "Did you mean '--context'?"),
    ],
)
def test_what_cannot_be_planned_of_a_model_is_told(folders: Path, asked: list[str], told: str, capsys):
    try:
        code = main(["plan", str(folders / asked[0]), *asked[1:]])
    except SystemExit as ended:
        code = ended.code
    shown = capsys.readouterr()
    assert code and not shown.out and told in shown.err and shown.err.count("\n") == 1


def test_a_recipe_is_planned_at_the_contexts_asked_for(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()  # as `trinity demo` leaves it
    assert main(["plan", "demo", "--context", "333", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["request_bytes"]["bfloat16"]) == ["333"]
