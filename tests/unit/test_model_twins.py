"""Every fast path of the model beside its plain twin, and the invariants of the router."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from trinity.model.attend import Causal, Packed, additive, scaled_dot_product, visible
from trinity.model.experts import grouped_matmul, grouped_matmul_loop
from trinity.model.init import build_model
from trinity.model.layers import GatePacked, NormaliseRows
from trinity.model.loss import IGNORED, chunked_loss, plain_loss, token_nats
from trinity.model.router import Routing, sequence_balance_loss
from trinity.recipes.table import recipe


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(0, 7), min_size=1, max_size=6),
    st.sampled_from([4, 8]),
    st.sampled_from([4, 12]),
    st.integers(0, 99),
)
def test_grouped_matmul_equals_its_loop(sizes, inner, outer, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(sum(sizes), inner, generator=generator, requires_grad=True)
    weights = torch.randn(len(sizes), outer, inner, generator=generator, requires_grad=True)
    ends = torch.tensor(sizes).cumsum(0)
    grad = torch.randn(sum(sizes), outer, generator=generator)
    results = []
    for function in (grouped_matmul, grouped_matmul_loop):
        rows.grad = weights.grad = None
        out = function(rows, weights, ends)
        out.backward(grad)
        results.append(
            (out.detach(), rows.grad, weights.grad if weights.grad is not None else torch.zeros_like(weights))
        )
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 16), st.integers(0, 99))
def test_norm_and_gate_equal_their_composed_twins(rows, heads, size, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, heads, 2 * size, generator=generator)
    gain = torch.randn(2 * size, generator=generator)
    grad = torch.randn(rows, heads, 2 * size, generator=generator)
    pairs = [
        (lambda t, w: NormaliseRows.apply(t, w, 1e-5), lambda t, w: F.rms_norm(t, w.shape, w, 1e-5), grad),
        (
            lambda t, w: GatePacked.apply(t * w),
            lambda t, w: F.silu((t * w)[..., :size]) * (t * w)[..., size:],
            grad[..., :size],
        ),
    ]
    for fast, plain, upstream in pairs:
        results = []
        for function in (fast, plain):
            t, w = x.clone().requires_grad_(), gain.clone().requires_grad_()
            out = function(t, w)
            out.backward(upstream)
            results.append((out.detach(), t.grad, w.grad))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 12), st.booleans(), st.integers(0, 99))
def test_windowed_attention_equals_the_plain_mask(rows, length, window, packed, seed):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(rows, 4, length, 8, generator=generator)
    k, v = (torch.randn(rows, 2, length, 8, generator=generator) for _ in range(2))
    documents = torch.randint(0, 3, (rows, length), generator=generator).sort(-1).values if packed else None
    attend = Causal() if documents is None else Packed(documents)
    for w in (window, None):
        plain = scaled_dot_product(q, k, v, mask=additive(visible(length, w, documents, q.device), q.dtype))
        torch.testing.assert_close(attend(0, q, k, v, w), plain, rtol=1e-5, atol=1e-5)


def test_a_document_does_not_read_its_neighbour():
    """What precedes a document in its row changes nothing for it."""
    model = build_model(recipe("debug").model, seed=0).eval()
    generator = torch.Generator().manual_seed(0)
    first, other, second = (torch.randint(0, 512, (1, n), generator=generator) for n in (37, 37, 91))
    ids = torch.tensor([[0] * 37 + [1] * 91])
    with torch.no_grad():
        a = model(torch.cat((first, second), 1), attend=Packed(ids)).hidden[:, 37:]
        b = model(torch.cat((other, second), 1), attend=Packed(ids)).hidden[:, 37:]
        alone = model(second).hidden
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    torch.testing.assert_close(a, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 100, 5000])
def test_chunked_loss_equals_the_plain_one(tokens):
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, 16, generator=generator)
    head = torch.randn(50, 16, generator=generator)
    targets = torch.randint(0, 50, (tokens,), generator=generator)
    targets[::3] = IGNORED
    results = []
    for function in (chunked_loss, plain_loss):
        h, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        loss, cross_entropy = function(h, w, targets, 0.01, 77.0)
        loss.backward()
        results.append((loss.detach(), cross_entropy, h.grad, w.grad))
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-5)


def test_token_nats_are_the_negative_log_probabilities():
    hidden, head, targets = torch.randn(7, 4), torch.randn(9, 4), torch.randint(0, 9, (7,))
    expected = -(hidden @ head.T).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(token_nats(hidden, head, targets), expected)


def test_the_bias_selects_and_never_weighs():
    model = build_model(recipe("debug").model, seed=0)
    moe = model.layers[1].mlp
    x = torch.randn(10, 64)
    bias = torch.zeros(8)
    bias[3] = 10.0
    plain, pushed = moe.router(x, torch.zeros(8)), moe.router(x, bias)
    assert (pushed.chosen == 3).any(-1).all()
    for routing in (plain, pushed):
        raw = routing.scores.gather(-1, routing.chosen)
        expected = raw / raw.sum(-1, keepdim=True) * model.config.route_scale
        torch.testing.assert_close(routing.weights, expected)
        assert int(routing.counts().sum()) == 20


def test_the_balance_loss_is_one_at_balance_and_more_in_collapse():
    scores = torch.full((8, 4), 0.5)
    even = Routing(torch.tensor([[0, 1], [2, 3]] * 4), torch.ones(8, 2), scores)
    assert float(sequence_balance_loss(even, rows=2)) == pytest.approx(1.0)
    peaked = torch.tensor([0.9, 0.9, 0.1, 0.1]).expand(8, 4)
    collapsed = Routing(torch.tensor([[0, 1]] * 8), torch.ones(8, 2), peaked)
    assert float(sequence_balance_loss(collapsed, rows=2)) == pytest.approx(2 * 0.9)


def test_initial_values_are_those_of_the_report():
    config = recipe("debug").model
    model = build_model(config, seed=3)
    sigma = 0.5 / config.hidden_size**0.5
    matrix = model.layers[0].mlp.up_proj.weight
    assert matrix.abs().max() <= 3 * sigma
    assert float(matrix.detach().std()) == pytest.approx(sigma, rel=0.05)
    assert torch.equal(model.layers[2].post_mlp_layernorm.weight.detach(), torch.full((64,), 0.5))
    assert torch.equal(model.layers[2].pre_mlp_layernorm.weight.detach(), torch.ones(64))
    again = build_model(config, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_embeddings_are_scaled_by_the_root_of_the_width():
    config = recipe("debug").model
    model = build_model(config, seed=0)
    seen = []
    model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(torch.tensor([[5]]))
    torch.testing.assert_close(seen[0][0, 0], model.embed_tokens.weight[5] * 8.0)
