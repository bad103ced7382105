"""Second moments made safe to invert."""

from __future__ import annotations

import torch
from torch import Tensor

_TRIES = 12  # each with ten times the ridge: what arithmetic in float32 left of a matrix may not be positive definite


def factor(gram: Tensor, ridge: Tensor | float) -> Tensor:
    """The lower Cholesky factor of gram + λI, [..., n, n], with λ = ridge · mean diagonal, or more where that is not positive definite.

    Raises ValueError for moments that are not finite.
    """
    diagonal = gram.diagonal(dim1=-2, dim2=-1).clamp_min(0)
    scale = diagonal.mean(-1, keepdim=True) + 1e-9 * diagonal.amax() + 1e-30
    share = torch.as_tensor(ridge, dtype=gram.dtype)
    for _ in range(_TRIES):
        found, failed = torch.linalg.cholesky_ex(gram + torch.diag_embed((share * scale).expand_as(diagonal)))
        if not failed.any():
            return found
        share = 10 * share + 1e-9
    raise ValueError("moments that are not finite")
