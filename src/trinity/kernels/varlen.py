"""Attention on a GPU, document by document, through torch's variable-length flash attention: no mask, no wasted scores.

Packed rows are laid end to end and cut where documents begin. A row of 262,144 positions needs no mask of that squared.
The twin is model/attend.py's mask; tests/gpu compares them where there is a GPU.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F


class Documents(NamedTuple):
    """Where the documents of some rows, laid end to end, begin and end."""

    bounds: Tensor  # [documents + 1] int32, from 0 to B x T
    longest: int  # tokens


def takes(q: Tensor) -> bool:
    """Whether the kernel is there for such tensors: half precision on a GPU, or in a dry run, which stands for one."""
    return (q.is_cuda or isinstance(q, FakeTensor)) and q.dtype in (torch.bfloat16, torch.float16)


def documents_of(starts: Tensor) -> Documents:
    """starts [B, T]: where the document of each position begins in its row. Waits for the GPU once."""
    rows, length = starts.shape
    begins = (starts == torch.arange(length, device=starts.device)).flatten().nonzero().flatten()
    bounds = F.pad(begins, (0, 1), value=rows * length)
    return Documents(bounds.to(torch.int32), int(bounds.diff().max()))


def attend_by_document(q: Tensor, k: Tensor, v: Tensor, documents: Documents, window: int | None) -> Tensor:
    """Causal attention inside each document: q [B, H, T, C], k and v [B, J, T, C] -> [B, H, T, C]."""
    rows, heads, length, size = q.shape
    q, k, v = (x.transpose(1, 2).reshape(rows * length, -1, size) for x in (q, k, v))
    out = _attend(q, k, v, documents, documents, window)
    return out.view(rows, length, heads, size).transpose(1, 2)


def attend_to_past(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Causal attention of the last T of S places of one text: q [1, H, T, C], k and v [1, J, S, C] -> [1, H, T, C]."""
    one, whole = (
        Documents(torch.tensor([0, x.shape[2]], dtype=torch.int32, device=x.device), x.shape[2]) for x in (q, k)
    )
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (q, k, v))
    return _attend(q, k, v, one, whole, window).transpose(0, 1)[None]


def _attend(q: Tensor, k: Tensor, v: Tensor, asking: Documents, asked: Documents, window: int | None) -> Tensor:
    """q [T, H, C], k and v [S, J, C] -> [T, H, C]. The kernel has the last query of a document see its last key, and
    counts the keys before a query: a window of w keys, the own one included, is (w - 1, 0)."""
    from torch.nn.attention.varlen import varlen_attn  # loads torch's compiler: 0.4 s that a CPU need not wait for

    out = varlen_attn(
        q,
        k,
        v,
        asking.bounds,
        asked.bounds,
        asking.longest,
        asked.longest,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=k.shape[1] != q.shape[1],
    )
    assert isinstance(out, Tensor)
    return out
