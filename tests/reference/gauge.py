"""How far averaging A and B apart is from the mean of the products, with dense matrices in numpy and float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Pair = tuple[Floats, Floats]  # B (d_out, r), A (r, d_in)


class Client(NamedTuple):
    """One client's factors, by module, as it sends them back; the scale of its products; its part of the round."""

    factors: Mapping[str, Pair]
    scale: float
    part: float


def gauge(start: Mapping[str, Pair], scale: float, clients: Sequence[Client], rank: int) -> tuple[float, float, float]:
    """The error and what the best rank leaves of it, both relative to the true change, and the norm of that.

    A client of rank r began with the first r columns and rows of `start`, its B being `scale / its scale` times that.
    """
    error, left, change = 0.0, 0.0, 0.0
    for module, (b0, a0) in start.items():
        before = scale * b0 @ a0
        mean, b_mean, a_mean = before.copy(), b0.copy(), a0.copy()
        for client in clients:
            b, a = client.factors[module]
            r, ratio = len(a), client.scale / scale
            mean += client.part * (client.scale * b @ a - scale * b0[:, :r] @ a0[:r])
            b_mean[:, :r] += client.part * (ratio * b - b0[:, :r])
            a_mean[:r] += client.part * (a - a0[:r])
        error += float(np.linalg.norm(mean - scale * b_mean @ a_mean) ** 2)
        change += float(np.linalg.norm(mean - before) ** 2)
        left += float((np.linalg.svd(mean, compute_uv=False)[rank:] ** 2).sum())
    return (error / change) ** 0.5, (left / change) ** 0.5, change**0.5
