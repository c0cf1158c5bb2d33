"""What every test stands on: no network, one thread, fixed seeds, and a model small enough to build in milliseconds."""

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
from pathlib import Path

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
