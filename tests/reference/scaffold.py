"""SCAFFOLD (Karimireddy et al. 2020, arXiv 1910.06378), algorithm 1 with option II, in plain numpy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def scaffold(
    gradients: Sequence[Callable[[Floats], Floats]],
    start: Floats,
    cohorts: Sequence[Sequence[int]],
    local_steps: int,
    local_rate: float,
    global_rate: float = 1.0,
) -> list[tuple[Floats, Floats, list[Floats]]]:
    """x, c and all c_i after each round; a cohort is the clients of a round."""
    n = len(gradients)
    x, c = start.copy(), np.zeros_like(start)
    own = [np.zeros_like(start) for _ in range(n)]
    told = []
    for cohort in cohorts:
        moved, changed = [], []
        for i in cohort:
            y = x.copy()
            for _ in range(local_steps):
                y = y - local_rate * (gradients[i](y) - own[i] + c)
            new = own[i] - c + (x - y) / (local_steps * local_rate)
            moved.append(y - x)
            changed.append(new - own[i])
            own[i] = new
        x = x + global_rate / len(cohort) * sum(moved)
        c = c + sum(changed) / n
        told.append((x.copy(), c.copy(), [part.copy() for part in own]))
    return told


def fedavg(
    gradients: Sequence[Callable[[Floats], Floats]], start: Floats, rounds: int, local_steps: int, local_rate: float
) -> Floats:
    """The model after so many rounds of all clients, with equal weights."""
    x = start.copy()
    for _ in range(rounds):
        ends = []
        for gradient in gradients:
            y = x.copy()
            for _ in range(local_steps):
                y = y - local_rate * gradient(y)
            ends.append(y)
        x = np.mean(ends, axis=0)
    return x
