"""Which rows an update holds, read from its direction: a white-box attack on a sum of gradients."""

from __future__ import annotations

import torch
from torch import Tensor

_RIDGE = 0.1  # of the mean squared length of the centred gradients


def weights(gradients: Tensor, change: Tensor) -> Tensor:
    """How much each candidate row's gradient is part of a change of the parameters, (n,) float64, of deviation 1.

    A step moves the parameters against the sum of its rows' gradients: change = -sum_i b_i g_i + the rest. With the
    gradients at unit length and their mean taken off, b is estimated by ridge regression in its dual form,
    b = -(G G^T + lambda I)^-1 G change, which takes away what candidates have in common. An inner product alone, the
    usual white-box score, mistakes rows that are like many others for members.

    Args:
        gradients: (n, p) float32, of each candidate at the parameters where the change began. Overwritten.
        change: (p,) float32.
    """
    gradients /= torch.linalg.vector_norm(gradients, dim=1, keepdim=True).clamp_min(1e-20)
    gradients -= gradients.mean(0)
    gram = (gradients @ gradients.T).double()
    along = -(gradients @ change).double()
    ridge = _RIDGE * float(gram.diagonal().mean()) + 1e-12
    found: Tensor = torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=torch.float64), along)
    return found / found.std().clamp_min(1e-30)
