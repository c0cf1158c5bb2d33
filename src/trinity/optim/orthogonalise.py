"""Newton-Schulz: the nearest (semi-)orthogonal matrix, of one matrix or of a stack of them at once.

The quintic iteration of Muon (Jordan et al. 2024, coefficients 3.4445, -4.7750, 2.0315) drives all singular values into
roughly [0.7, 1.2] in five steps. Cost per m x n matrix (m <= n): steps x (4 m^2 n + 2 m^3) FLOPs.
"""

import torch
from torch import Tensor

from trinity.kernels.compiled import fits

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_EPS = 1e-7
_KERNEL_ROWS = 64  # smaller matrices go through torch together: a call for each costs more than its product


def orthogonalise(matrices: Tensor, steps: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    """[..., m, n] -> same shape in `dtype`: each matrix orthogonalised by itself. A zero matrix stays zero."""
    a, b, c = COEFFICIENTS
    x = matrices.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    flat = x.flatten(0, -3) if x.dim() > 3 else x
    stack = flat if flat.dim() == 3 else flat.unsqueeze(0)
    stack = stack / stack.flatten(1).norm(dim=1).clamp(min=_EPS)[:, None, None]
    if stack.shape[-2] >= _KERNEL_ROWS and fits(stack):
        stack = stack.contiguous()  # oneDNN writes into transposed matrices two hundred times as slowly
        torch.ops.trinity.orthogonalise(stack, steps, a, b, c)
        x = stack.view(x.shape)
        return x.mT if tall else x
    for _ in range(steps):
        # (a I + b G + c G^2) X with G = X X^T; constants go onto diagonals, so that no product copies its addend.
        gram = stack @ stack.mT
        factor = gram * c
        factor.diagonal(dim1=-2, dim2=-1).add_(b)
        polynomial = gram @ factor
        polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
        stack = polynomial @ stack
    x = stack.view(x.shape)
    return x.mT if tall else x
