"""Where documents begin and end when rows are laid end to end, and how the window is put to torch's kernel."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trinity.kernels import varlen
from trinity.model.attend import document_starts, scaled_dot_product, visible

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=6)


def rows_of(lengths: list[int], rows: int) -> torch.Tensor:
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return ids.expand(rows, -1).contiguous()


@given(LENGTHS, st.integers(1, 3))
def test_bounds_are_those_of_the_documents(lengths, rows):
    starts = document_starts(rows_of(lengths, rows))
    assert starts is not None
    found = varlen.documents_of(starts)
    assert found.bounds.diff().tolist() == lengths * rows
    assert found.longest == max(lengths)


def plain_varlen(q, k, v, bounds, key_bounds, longest, longest_key, *, window_size, enable_gqa):
    """torch's kernel as its documentation describes it: documents by bounds, the last query beside the last key, and
    `window_size[0]` keys before the query."""
    assert longest == int(bounds.diff().max()) and longest_key == int(key_bounds.diff().max()) and window_size[1] == 0
    assert enable_gqa == (k.shape[1] != q.shape[1])
    window = None if window_size[0] < 0 else window_size[0] + 1
    parts = []
    for asking, asked in zip(bounds.unfold(0, 2, 1).tolist(), key_bounds.unfold(0, 2, 1).tolist(), strict=True):
        one = [x[slice(*at)].transpose(0, 1)[None] for x, at in ((q, asking), (k, asked), (v, asked))]
        mask = visible(asked[1] - asked[0], window, None, q.device)[asking[0] - asking[1] :]
        parts.append(scaled_dot_product(*one, mask=mask)[0].transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_rows_laid_end_to_end_equal_the_mask(monkeypatch, window, key_heads):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", plain_varlen)
    ids = torch.stack([rows_of([5, 1, 7, 3], 1)[0], rows_of([16], 1)[0]])
    q, k, v = (torch.randn(2, heads, 16, 8) for heads in (4, key_heads, key_heads))
    starts = document_starts(ids)
    assert starts is not None
    found = varlen.attend_by_document(q, k, v, varlen.documents_of(starts), window)
    torch.testing.assert_close(found, scaled_dot_product(q, k, v, mask=visible(16, window, ids, ids.device)))


@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("asking", [1, 5, 16])
def test_the_end_of_a_text_sees_its_past(monkeypatch, window, key_heads, asking):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", plain_varlen)
    q, k, v = (torch.randn(1, heads, 16, 8) for heads in (4, key_heads, key_heads))
    found = varlen.attend_to_past(q[:, :, -asking:], k, v, window)
    whole = scaled_dot_product(q, k, v, mask=visible(16, window, None, q.device))
    torch.testing.assert_close(found, whole[:, :, -asking:])


def test_a_cpu_takes_the_other_paths():
    assert not varlen.takes(torch.zeros(1, dtype=torch.bfloat16))
