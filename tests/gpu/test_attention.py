"""Attention by documents on a GPU equals the plain mask, forward and backward."""

import pytest
import torch

from trinity.kernels.varlen import takes
from trinity.model.attend import Packed, scaled_dot_product, visible


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 1, 48, 4096])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_documents_attend_as_under_the_mask(window, key_heads):
    torch.manual_seed(0)
    documents = (torch.rand(2, 256, device="cuda") < 0.05).long().cumsum(-1)
    inputs = [
        torch.randn(2, heads, 256, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for heads in (4, key_heads, key_heads)
    ]
    assert takes(inputs[0])
    weight = torch.randn(2, 4, 256, 64, device="cuda", dtype=torch.bfloat16)
    found = Packed(documents)(0, *inputs, window)
    ours = torch.autograd.grad((found * weight).sum(), inputs)
    mask = visible(256, window, documents, documents.device)
    expected = scaled_dot_product(*inputs, mask=mask)
    theirs = torch.autograd.grad((expected * weight).sum(), inputs)
    for one, other in zip((found, *ours), (expected, *theirs), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)
