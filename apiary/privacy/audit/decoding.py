"""Which rows an update holds, read from its direction: a white-box attack on a sum of gradients."""

from __future__ import annotations

import torch
from torch import Tensor

_RATIOS = torch.logspace(-5, 5, 41, dtype=torch.float64)  # of noise to signal that are tried
_ROUNDING = 1e-6  # of the largest eigenvalue; below it is rounding of float32


def weights(gradients: Tensor, change: Tensor) -> Tensor:
    """How much each candidate row's gradient is part of a change of the parameters, (n,) float64, of deviation 1.

    A step moves the parameters against the sum of its rows' gradients: change = -sum_i b_i g_i + the rest. With the
    gradients at unit length, and their mean direction taken out of them and of the change, b is estimated by ridge
    regression in its dual form, b = -(G G^T + rho I)^-1 G change, which takes away what candidates have in common. The
    ratio rho of noise to signal is the one under which the change itself is likeliest (empirical Bayes), so nothing
    about the rows is used that a server does not have. An inner product alone, the usual white-box score, mistakes
    rows that are like many others for members.

    Args:
        gradients: (n, p) float32, of each candidate at the parameters where the change began. Overwritten.
        change: (p,) float32.
    """
    gradients /= torch.linalg.vector_norm(gradients, dim=1, keepdim=True).clamp_min(1e-20)
    mean = gradients.mean(0)
    mean /= torch.linalg.vector_norm(mean).clamp_min(1e-20)
    gradients -= torch.outer(gradients @ mean, mean)
    along = -(gradients @ change).double()
    values, vectors = torch.linalg.eigh((gradients @ gradients.T).double())
    kept = values > _ROUNDING * values[-1]
    values, vectors = values[kept], vectors[:, kept]
    turned = vectors.T @ along
    # In these coordinates each of `turned` has the variance tau^2 value (value + rho), with tau^2 at its likeliest.
    variances = values * (values + _RATIOS[:, None])
    minus = len(values) * (turned.square() / variances).mean(1).log() + variances.log().sum(1)
    found: Tensor = vectors @ (turned / (values + _RATIOS[minus.argmin()]))
    return found / found.std().clamp_min(1e-30)
