"""Ditto (Li et al. 2021, arXiv 2012.04221), algorithm 1, on adapters of one matrix, in plain numpy with dense weights.

The paper's weights are W = s B A, so that its step v - lr (grad F(v) + lambda (v - w)) is taken in B and A by the chain
rule: the gradient of a function of W in B is s (dF/dW) A^T, and that in A is s B^T (dF/dW).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Pair = tuple[Floats, Floats]  # B and A


def descend(
    start: Pair, gradient: Callable[[Floats], Floats], scale: float, rate: float, steps: int, pull: float, to: Floats
) -> Pair:
    """Gradient descent on F(W) + pull/2 ||W - to||^2 from B and A."""
    b, a = start[0].copy(), start[1].copy()
    for _ in range(steps):
        weights = scale * b @ a
        slope = gradient(weights) + pull * (weights - to)
        b, a = b - rate * scale * slope @ a.T, a - rate * scale * b.T @ slope
    return b, a


def ditto(
    gradients: Sequence[Callable[[Floats], Floats]],
    start: Pair,
    cohorts: Sequence[Sequence[int]],
    scale: float,
    rate: float,
    steps: tuple[int, int],
    penalty: float,
) -> tuple[Pair, dict[int, Pair]]:
    """The shared factors and each client's own ones after the rounds of these cohorts; `steps` are shared and own."""
    w, own = start, dict[int, Pair]()
    for cohort in cohorts:
        received = scale * w[0] @ w[1]
        ends = []
        for k in cohort:
            ends.append(descend(w, gradients[k], scale, rate, steps[0], 0.0, received))
            own[k] = descend(own.get(k, w), gradients[k], scale, rate, steps[1], penalty, received)
        w = (np.mean([b for b, _ in ends], axis=0), np.mean([a for _, a in ends], axis=0))
    return w, own
