"""Weighted averaging as the papers write it, in plain numpy and float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def weighted_mean(deltas: Sequence[NDArray[np.float32]], weights: Sequence[float]) -> Floats:
    """sum_k (n_k / n) delta_k with n = sum_k n_k (McMahan et al. 2017, algorithm 1, last line)."""
    n = float(np.sum(np.asarray(weights, np.float64)))
    total = np.zeros(deltas[0].shape, np.float64)
    for delta, n_k in zip(deltas, weights, strict=True):
        total = total + (n_k / n) * delta.astype(np.float64)
    return total
