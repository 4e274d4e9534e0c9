"""A client's control variate: what it knows of its own gradient, against that of all (SCAFFOLD).

Karimireddy et al. 2020 (arXiv 1910.06378), algorithm 1 with option II. It stays on the client's own disk, and nothing
of it travels up: with option II it follows from the change of the adapter, which the server has. `strategies.scaffold`
has the server's part.

A change that was sent may be lost on its way, and then the server's mean lacks it. So a client goes on from the
variate of the last round in which the server says that its answer counted, whatever it has computed since.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from apiary.core.messages import Payload
from apiary.core.tensors import StateDict, subtract
from client import round_files

KIND = "control"


class ControlLost(RuntimeError):
    """The client has lost what the server knows of it."""


def correction(folder: Path, payload: Payload) -> dict[str, Tensor]:
    """The c - c_k that is added to each step's gradient; empty where the run's method has no control variates."""
    return subtract(payload.control, _own(folder, payload))


def renew(folder: Path, number: int, payload: Payload, delta: StateDict, walked: float) -> None:
    """Keep the control variate that a visit leads to, for the next.

    c_k' = c_k - c + (x - y) / sum_t lr_t. With stochastic gradient descent, whose step is lr_t (g_t + c - c_k), this is
    the mean of the gradients g_t that the visit saw, weighted by their learning rates: with clipping, of the clipped
    ones. The paper has one learning rate, whose sum is K lr.

    Args:
        folder: the client's own of this run.
        number: the round.
        payload: what the server sent.
        delta: y - x, as the server has it.
        walked: the sum of the steps' learning rates.
    """
    before = _own(folder, payload)
    after = {name: own - payload.control[name] - delta[name] / walked for name, own in before.items()}
    round_files.save(folder, KIND, number, after, also=payload.last_round)


def _own(folder: Path, payload: Payload) -> dict[str, Tensor]:
    """c_k as the server knows it, zero at first.

    Raises:
        ControlLost: the server's sum holds one that is gone here, and would hold it twice for ever.
    """
    found = round_files.load(folder, KIND, payload.last_round)
    if payload.control and payload.last_round and not found:
        raise ControlLost(
            f"its control variate of round {payload.last_round} is gone from its disk, and the server's mean still "
            "holds it; with scaffold it cannot take part in this run again"
        )
    return {name: found.get(name, torch.zeros_like(c)) for name, c in payload.control.items()}
