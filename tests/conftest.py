"""What every test stands on: no network, one thread, fixed seeds, and a model small enough to build in milliseconds."""

import json
import os

os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
)

import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from trinity.config.model import ModelConfig

# A slow shared machine is no finding: properties have no deadline, and draw the same examples every time.
settings.register_profile(
    "house", deadline=None, derandomize=True, max_examples=25, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("house")

REAL_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def fixed_seeds():
    """The global generators start each test alike; torch only where a test already imported it."""
    random.seed(0)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_config() -> ModelConfig:
    """Two dense and sparse kinds of layer, local and global, 4 experts: every branch of the model in 30k parameters."""
    return ModelConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=16,
        num_hidden_layers=4,
        num_dense_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        route_scale=1.5,
        sliding_window=8,
        max_position_embeddings=128,
    )


@pytest.fixture
def tiny_model(tiny_config: ModelConfig):
    """A fresh model of `tiny_config` with its initial values, seeded, on the CPU in float32."""
    from trinity.model.init import build_model

    return build_model(tiny_config, seed=0)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real text for measurements; a test that needs it is skipped where it is absent."""
    if not REAL_DATA.is_dir():
        pytest.skip("real data is not here: expected it at ../shared/data beside the repository")
    return REAL_DATA


@pytest.fixture(scope="session")
def record_run() -> Callable[..., Path]:
    """record_run(folder, steps, *settings): write a run folder that reports can be made of."""
    return _record_run


def _step_row(step: int) -> dict[str, Any]:
    shares = [[1 / 8] * 8 for _ in range(3)]
    row = {
        "kind": "step", "step": step, "tokens": step * 1024, "loss": 6 - step / 20, "z_loss": 0.1, "balance_loss": 0.1,
        "grad_norm": 1.0 + step % 3, "batch_het": 0.2, "lr_muon": 0.02, "lr_adamw": 0.003, "tokens_per_second": 900.0,
        "max_violation": 0.5, "max_violation_by_layer": [0.5, 0.25, 0.125], "dead_experts": 0, "load_entropy": 0.99,
        "bias_norm": 0.01, "seconds": 1.1,
    }  # fmt: skip
    return row | ({"expert_load": shares} if step % 5 == 0 else {})


def _record_run(folder: Path, steps: int, *settings: str) -> Path:
    """A run folder as training leaves it in the middle of writing a line: 3 sparse layers of 8 experts."""
    from trinity.config.load import override, to_dict
    from trinity.recipes.table import recipe

    folder.mkdir(parents=True)
    config = to_dict(override(recipe("debug"), settings))
    (folder / "config.json").write_text(json.dumps({"config": config, "fingerprint": "0"}))
    rows: list[dict[str, Any]] = [_step_row(step) for step in range(1, steps + 1)]
    if steps >= 10:
        rows += [
            {"kind": "evaluation", "step": 10, "tokens": 10240, "bits_per_byte": 3.5, "loss": 4.0, "bytes": 8192},
            {"kind": "evaluation", "step": 20, "tokens": 20480, "bits_per_byte": 2.5, "loss": 3.0, "bytes": 8192},
            {"kind": "sample", "step": 10, "prompt": "def f(", "text": "<script>alert(1)</script> & more"},
            {"kind": "guard", "step": 7, "what": "loss spike", "action": "skip"},
            {"kind": "resume", "step": 16},
            {"kind": "unheard-of", "step": 3},
        ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text + 'null\n"text"\n{"kind": "step", "st')
    return folder


@pytest.fixture(scope="session")
def debug_data(tmp_path_factory) -> Path:
    """The embedded corpus as the `debug` recipe reads it: token folder, vocabulary of 512."""
    from trinity.data.embedded import embedded_corpus

    return embedded_corpus(tmp_path_factory.mktemp("embedded") / "tokens", 512)
