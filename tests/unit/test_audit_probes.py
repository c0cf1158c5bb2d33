"""The three probes, each against something known beforehand."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from trinity.audit.bits_per_byte import bits_per_byte
from trinity.audit.memorisation import CONTROL, Stratum, cut_passage, memorisation, stratum_of, verbatim_lengths
from trinity.audit.reading import read
from trinity.audit.routing import divergence, load_shares, load_table, routing
from trinity.config.audit import AuditConfig
from trinity.model.generate import continue_greedily
from trinity.model.init import build_model
from trinity.recipes.table import recipe
from trinity.train.evaluate import score_documents

MODEL = dataclasses.replace(recipe("debug").model, vocab_size=64, hidden_size=32, num_hidden_layers=3)
CONFIG = AuditConfig(bootstrap_samples=200, prefix_tokens=8, suffix_tokens=8)
BOS = 1


def unwatched(label: str, done: int, total: int) -> None:
    assert 0 < done <= total


@pytest.fixture(scope="module")
def model():
    return build_model(MODEL, 0).eval().requires_grad_(False)


def some_documents(lengths: list[int], seed: int = 0) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(4, 64, length).tolist() for length in lengths]


def test_a_uniform_model_costs_log2_of_the_vocabulary_for_each_token():
    uniform = build_model(MODEL, 0).eval()
    with torch.no_grad():
        uniform.lm_head.weight.zero_()
    documents = some_documents([5, 40, 17, 100])
    nats = read(uniform, documents, BOS, 32, unwatched).nats
    text_bytes = np.array([12.0, 99.0, 40.0, 210.0])
    found = {m.of["kind"]: m for m in bits_per_byte(nats, text_bytes, ["a", "a", "b", "b"], CONFIG)}
    assert found["all"].interval.value == pytest.approx(math.log2(64) * 162 / 361)
    assert found["a"].interval.value == pytest.approx(6 * 45 / 111)
    for measure in found.values():
        assert measure.interval.low <= measure.interval.value <= measure.interval.high
    assert found["b"].interval.n == 2


def test_reading_agrees_with_evaluation_during_training_and_does_not_depend_on_batches(model, monkeypatch):
    documents = some_documents([3, 90, 31, 64, 65, 1])
    found = read(model, documents, BOS, 32, unwatched)
    expected = score_documents(model, [([BOS, *ids, 2], 1) for ids in documents], 32)
    assert found.nats == pytest.approx([score.nats for score in expected], rel=1e-5)
    monkeypatch.setattr("trinity.audit.reading.BATCH_TOKENS", 40)
    alone = read(model, documents, BOS, 32, unwatched)
    assert alone.nats == pytest.approx(found.nats, rel=1e-5)
    slots = [MODEL.num_experts_per_tok * len(ids) for ids in documents]
    assert (found.expert_tokens.sum(-1) == np.array(slots)[:, None]).all()
    assert found.expert_tokens.shape == (6, 2, 8)


def test_verbatim_lengths_are_those_of_generation_token_by_token(model):
    generator = np.random.default_rng(3)
    passages = []
    for wrong_at in (0, 1, 4, 7, 8):
        prefix = generator.integers(4, 64, 8).tolist()
        suffix = continue_greedily(model, prefix, 8)
        if wrong_at < 8:
            suffix[wrong_at] = (suffix[wrong_at] + 1) % 64
        passages.append(prefix + suffix)
    assert verbatim_lengths(model, np.array(passages), 8, unwatched).tolist() == [0, 1, 4, 7, 8]


def test_an_overfitted_document_is_found_and_the_control_is_not():
    learner = build_model(MODEL, 0)
    document = some_documents([64], seed=5)[0]
    crops = torch.tensor(document).unfold(0, 17, 1)  # every stretch of 17 tokens
    optimiser = torch.optim.AdamW(learner.parameters(), lr=1e-2)
    for step in range(50):
        text = crops[step % 4 :: 4]
        logits = learner.head(learner(text[:, :-1]).hidden)
        loss = F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.1
    learner.eval().requires_grad_(False)
    seen = np.array([document[start : start + 16] for start in range(0, 48, 4)])
    control = np.array(some_documents([16] * 12, seed=6))
    found = {
        (m.of["copies"], m.name): m.interval
        for m in memorisation(learner, [Stratum("8+", seen), Stratum(CONTROL, control)], CONFIG, unwatched)
    }
    assert found["8+", "extracted verbatim"].low > 0.5
    assert found[CONTROL, "extracted verbatim"].value == 0
    assert found["8+", "extracted beyond control"].low > 0.3
    assert found["8+", "verbatim length beyond control"].low > 4
    assert (CONTROL, "extracted beyond control") not in found


def test_strata_and_places_of_passages():
    assert [stratum_of(copies) for copies in (1, 2, 3, 4, 7, 8, 1000)] == ["1", "2-3", "2-3", "4-7", "4-7", "8+", "8+"]
    ids = np.arange(40)
    assert cut_passage(ids, 16, 0, "a").tolist() == cut_passage(ids, 16, 0, "a").tolist()
    starts = {int(cut_passage(ids, 16, 0, str(name))[0]) for name in range(300)}
    assert starts == set(range(25))
    assert cut_passage(ids[:16], 16, 0, "a").tolist() == list(range(16))


def test_memorisation_without_passages_says_nothing(model):
    assert memorisation(model, [Stratum("1", np.zeros((0, 16), np.int64))], CONFIG, unwatched) == []


def expert_counts(kinds: list[str], skew: float) -> np.ndarray:
    """[D, 2, 8] counts; kind 'b' prefers other experts by `skew`."""
    generator = np.random.default_rng(7)
    even, tilted = np.full(8, 1 / 8), np.array([1.0 + skew] * 4 + [1.0 - skew] * 4) / 8
    return np.stack([
        generator.multinomial(600, tilted if kind == "b" else even, size=2) for kind in kinds
    ])  # fmt: skip


def test_kinds_that_are_routed_alike_have_a_divergence_that_covers_zero():
    kinds = ["a"] * 20 + ["b"] * 20
    alike = routing_of(expert_counts(kinds, 0.0), kinds)
    apart = routing_of(expert_counts(kinds, 0.5), kinds)
    truth = float(divergence(np.full(8, 1 / 8), np.array([1.5] * 4 + [0.5] * 4) / 8))
    for layer in (0, 1, "mean"):
        near = alike["divergence", "a | b", layer]
        assert near.value < 1e-3 and near.low == 0
        far = apart["divergence", "a | b", layer]
        assert far.low <= truth <= far.high and far.low > 0.02


def routing_of(counts: np.ndarray, kinds: list[str]):
    found = routing(counts, kinds, CONFIG)
    assert all(m.interval.low <= m.interval.value <= m.interval.high for m in found)
    return {(m.name, m.of.get("kind", m.of.get("kinds")), m.of["layer"]): m.interval for m in found}


def test_load_figures_on_paper_sized_numbers():
    counts = np.zeros((2, 1, 4), np.int64)
    counts[:, 0] = [[4, 4, 0, 0], [4, 4, 0, 0]]
    found = routing_of(counts, ["a", "a"])
    assert found["load entropy", "a", 0].value == pytest.approx(0.5)
    assert found["effective experts", "a", 0].value == pytest.approx(2)
    assert found["MaxVio", "a", 0].value == pytest.approx(1)
    assert found["dead experts", "all", 0].value == 2


def test_load_shares_sum_to_one_and_name_the_busiest(model):
    documents = some_documents([60] * 6)
    counts = read(model, documents, BOS, 64, unwatched).expert_tokens
    assert load_shares(counts.astype(float)).sum(-1) == pytest.approx(np.ones((6, 2)))
    table = load_table(counts, ["a", "b"] * 3, CONFIG)
    assert [(entry["kind"], entry["layer"]) for entry in table] == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    for entry in table:
        assert sum(entry["shares"]) == pytest.approx(1)
        assert all(low <= share <= high for low, share, high in zip(entry["low"], entry["shares"], entry["high"]))
        busiest = int(np.argmax(entry["shares"]))
        assert entry["top"][0] == {"expert": busiest, "times_even": pytest.approx(8 * entry["shares"][busiest])}


def test_divergence_is_one_bit_for_kinds_that_share_no_expert():
    assert divergence(np.array([1.0, 0.0]), np.array([0.0, 1.0])) == pytest.approx(1)
    assert divergence(np.array([0.3, 0.7]), np.array([0.3, 0.7])) == pytest.approx(0)


def test_a_dense_model_has_no_routing_to_report():
    dense = build_model(dataclasses.replace(MODEL, num_dense_layers=3), 0).eval()
    readings = read(dense, some_documents([20]), BOS, 32, unwatched)
    assert routing(readings.expert_tokens, ["a"], CONFIG) == []
    assert load_table(readings.expert_tokens, ["a"], CONFIG) == []
