"""Published models counted by formula, and the roofline of decoding."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trinity.cli.main import main
from trinity.plan.decode import decode_roofline
from trinity.plan.flops import forward_flops
from trinity.plan.hardware import DEVICES
from trinity.plan.memory import kv_bytes
from trinity.plan.params import count_parameters
from trinity.plan.peers import PEERS, as_peer
from trinity.recipes.table import RECIPES, recipe


@pytest.mark.parametrize("name", PEERS)
def test_counted_totals_are_the_published_ones(name: str):
    """Within 1 % in all and 3 % active: announced numbers are rounded, and some count a multi-token layer."""
    found = PEERS[name]
    total, active = found.published
    assert found.total == pytest.approx(total, rel=0.01)
    assert found.active == pytest.approx(active, rel=0.03)


@pytest.mark.parametrize("name", RECIPES)
def test_our_models_count_the_same_as_peers(name: str):
    model = recipe(name).model
    ours, count = as_peer(name, model), count_parameters(model)
    assert ours.total == count.total - count.norms - count.selection_bias
    assert ours.active == count.multiplied
    for length in (64, 8192, 131072):
        assert ours.forward_flops(length) == pytest.approx(forward_flops(model, length))
        assert ours.kv_bytes(length) == pytest.approx(kv_bytes(model).at(length, model.sliding_window), rel=1e-9)


def test_caches_of_published_models_by_hand():
    assert PEERS["DeepSeek-V3"].kv_bytes(1) == 2 * 61 * (512 + 64)
    assert PEERS["GLM-4.5"].kv_bytes(1000) == 1000 * 2 * 92 * 2 * 8 * 128
    assert PEERS["gpt-oss-120b"].kv_bytes(8192) == 2 * 2 * 8 * 64 * 18 * (8192 + 128)


@given(st.sampled_from(sorted(PEERS)), st.integers(1, 4096))
def test_more_sequences_touch_more_experts_and_never_more_than_all(name: str, batch: int):
    found = PEERS[name]
    assert found.active <= found.touched(batch) * (1 + 1e-9)
    assert found.touched(batch) <= found.touched(batch + 1) <= found.total
    assert found.touched(1) == pytest.approx(found.active)


@given(st.sampled_from(sorted(PEERS)), st.sampled_from(["B300", "H100", "A100"]), st.sampled_from([1, 16, 256]))
def test_decoding_is_never_faster_than_its_memory(name: str, kind: str, batch: int):
    found, device = PEERS[name], DEVICES[kind]
    bound = decode_roofline(found, device, batch, 8192, 0.92)
    moved = 2 * found.touched(batch) + batch * found.kv_bytes(8192)
    assert bound.per_sequence <= bound.devices * device.bandwidth / moved * (1 + 1e-9)
    assert bound.per_device == pytest.approx(batch * bound.per_sequence / bound.devices)
    faster = decode_roofline(found, replace(device, bandwidth=2 * device.bandwidth), batch, 8192, 0.92)
    assert faster.per_sequence >= bound.per_sequence


def test_compare_sets_models_side_by_side(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    page, picture = tmp_path / "plan.html", tmp_path / "plan.png"
    command = ["plan", "large", "--compare", "gpt-oss-120b,deepseek-v3", "--page", str(page), "--plot", str(picture)]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in found["compare"]] == ["large", "gpt-oss-120b", "DeepSeek-V3"]
    assert set(found["compare"][0]["kv_bytes"]) == {"8192", "131072", "524288"}
    text = page.read_text()
    assert "What it would cost to train large" in text and "33.2 days" in text and text.count("<svg") == 4
    assert "https:" not in text and "<script" not in text
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000
    assert main(command[:4]) == 0
    assert "DeepSeek-V3" in capsys.readouterr().out


def test_an_unknown_model_is_told(capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "large", "--compare", "gpt-oss-12b"]) == 2
    assert "Did you mean 'gpt-oss-120b'?" in capsys.readouterr().err
