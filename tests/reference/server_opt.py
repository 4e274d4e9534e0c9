"""Server optimisers as the papers write them, in plain numpy and float64.

Each takes x_0 and the rounds' pseudo-gradients and returns x after the last round.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def plain(x: Floats, deltas: Sequence[Floats], lr: float) -> Floats:
    """x_{t+1} = x_t + eta Delta_t (Reddi et al. 2021, algorithm 1 with SGD at the server)."""
    for delta in deltas:
        x = x + lr * delta
    return x


def momentum(x: Floats, deltas: Sequence[Floats], lr: float, mu: float) -> Floats:
    """v <- beta v + Delta w; w <- w - gamma v, with Delta w = -Delta (Hsu et al. 2019, section 4.2)."""
    v = np.zeros_like(x)
    for delta in deltas:
        v = mu * v + -delta
        x = x - lr * v
    return x


def nesterov(x: Floats, deltas: Sequence[Floats], lr: float, mu: float) -> Floats:
    """Sutskever et al. (2013), equations 3 and 4, with the gradient taken at theta + mu v.

    In their variables v_{t+1} = mu v_t + lr Delta_t and theta_{t+1} = theta_t + v_{t+1}; clients start from the point
    x_t = theta_t + mu v_t, which is what DiLoCo keeps.
    """
    v = np.zeros_like(x)
    theta = x
    for delta in deltas:  # the clients' change from theta + mu v
        v = mu * v + lr * delta
        theta = theta + v
    return theta + mu * v


def adaptive(
    kind: str, x: Floats, deltas: Sequence[Floats], lr: float, beta1: float, beta2: float, tau: float
) -> Floats:
    """FedAdagrad, FedYogi and FedAdam: algorithm 2 of Reddi et al. (2021), line by line, with v_{-1} = tau^2."""
    m, v = np.zeros_like(x), np.full_like(x, tau**2)
    for delta in deltas:
        m = beta1 * m + (1 - beta1) * delta
        if kind == "adagrad":
            v = v + delta**2
        elif kind == "yogi":
            v = v - (1 - beta2) * delta**2 * np.sign(v - delta**2)
        else:
            v = beta2 * v + (1 - beta2) * delta**2
        x = x + lr * m / (np.sqrt(v) + tau)
    return x
