"""Robust rules as their papers write them, on plain points (n, d): no Gram matrix, no factors."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def clip(points: Floats, limit: float | None = None) -> Floats:
    """min(1, limit / ||x||) x, with the median norm for a limit."""
    norms = np.linalg.norm(points, axis=1)
    limit = float(np.median(norms)) if limit is None else limit
    return np.stack([x * min(1.0, limit / norm) if norm else x for x, norm in zip(points, norms, strict=True)])


def mix_nearest(points: Floats, f: int) -> Floats:
    """The mean of the n - f points nearest to each, itself included (Allouah et al. 2023, algorithm 2)."""
    n = len(points)
    mixed = []
    for x in points:
        order = np.argsort([np.linalg.norm(y - x) for y in points], kind="stable")
        mixed.append(points[np.sort(order[: n - f])].mean(0))  # in one order: equal means are then equal bits
    return np.stack(mixed)


def krum_scores(points: Floats, f: int) -> Floats:
    """The sum over the n - f - 2 closest others of ||x_i - x_j||^2 (Blanchard et al. 2017, section 4)."""
    n = len(points)
    scores = []
    for i in range(n):
        others = sorted(float(((points[i] - points[j]) ** 2).sum()) for j in range(n) if j != i)
        scores.append(float(f"{sum(others[: max(1, n - f - 2)]):.8e}"))  # what rounding alone tells apart is a tie
    return np.array(scores)


def multi_krum(points: Floats, f: int, m: int) -> Floats:
    """The mean of the m points of the lowest scores."""
    best: Floats = points[np.argsort(krum_scores(points, f), kind="stable")[:m]].mean(0)
    return best


def median(points: Floats, f: int = 0) -> Floats:
    """The median of each coordinate."""
    return np.asarray(np.median(points, axis=0))


def trimmed_mean(points: Floats, f: int) -> Floats:
    """The mean of each coordinate without its f largest and f smallest values."""
    kept: Floats = np.sort(points, axis=0)[f : len(points) - f].mean(0)
    return kept


def bulyan(points: Floats, f: int) -> Floats:
    """Krum, n - 2 f times; then by coordinate the mean of the n - 4 f values closest to the median (El Mhamdi 2018)."""
    rest, chosen = list(range(len(points))), []
    for _ in range(len(points) - 2 * f):
        scores = krum_scores(points[rest], f) if len(rest) > 1 else np.zeros(1)
        chosen.append(rest.pop(int(np.argmin(scores))))
    selected = points[sorted(chosen)]
    result = np.empty(points.shape[1])
    for i, column in enumerate(selected.T):
        order = np.argsort(np.abs(column - np.median(column)), kind="stable")
        result[i] = column[order[: len(column) - 2 * f]].mean()
    return result


def geometric_median(points: Floats, steps: int = 4000) -> Floats:
    """argmin_z sum_k ||x_k - z|| by plain gradient descent with step halving, from the mean."""

    def cost(z: Floats) -> float:
        return float(np.linalg.norm(points - z, axis=1).sum())

    z, step = points.mean(0), 1.0
    for _ in range(steps):
        offsets = z - points
        gradient = (offsets / np.maximum(np.linalg.norm(offsets, axis=1, keepdims=True), 1e-300)).sum(0)
        step *= 4
        while step > 1e-14 and cost(z - step * gradient) >= cost(z):
            step /= 2
        if step <= 1e-14:
            break
        z = z - step * gradient
    return np.asarray(z)


def fltrust(points: Floats, root: Floats) -> Floats:
    """(1 / sum TS_k) sum_k TS_k ||g_0|| / ||g_k|| g_k with TS_k = ReLU(cos(g_k, g_0)) (Cao et al. 2021, eq. 2 to 4)."""
    length = float(np.linalg.norm(root))
    total, trusted = np.zeros_like(root), 0.0
    for x in points:
        score = max(0.0, float(x @ root) / (float(np.linalg.norm(x)) * length))
        total = total + score * length / float(np.linalg.norm(x)) * x
        trusted += score
    return total / trusted if trusted else total
