"""Exact and heterogeneous aggregation as the papers write it: dense, in plain numpy and float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class Client(NamedTuple):
    """What a client holds after its training."""

    b: Floats  # (d_out, r_k)
    a: Floats  # (r_k, d_in)
    s: float  # its model is W + s b a
    p: float  # its part of the round

    @property
    def rank(self) -> int:
        return len(self.a)


def received(b: Floats, a: Floats, rank: int, s_server: float, s_client: float) -> tuple[Floats, Floats]:
    """The factors that a client of a lower rank begins with: s_client b_k a_k = s_server b[:, :rank] a[:rank]."""
    return b[:, :rank] * (s_server / s_client), a[:rank]


def mean_product(clients: Sequence[Client]) -> Floats:
    """dW* = sum_k p_k s_k B_k A_k, what FLoRA, FedEx-LoRA and FlexLoRA all aim at."""
    return np.sum([c.p * c.s * (c.b @ c.a) for c in clients], axis=0)


def best(matrix: Floats, rank: int) -> Floats:
    """The best approximation of a rank (Eckart and Young 1936)."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def tail(matrix: Floats, rank: int) -> float:
    """The share of the squared norm that `best` drops."""
    s = np.linalg.svd(matrix, compute_uv=False)
    return float((s[rank:] ** 2).sum() / (s**2).sum())


def hetlora(clients: Sequence[Client], rank: int, s_server: float) -> tuple[Floats, Floats]:
    """Zero-padded factors, averaged with weights ||dW_k|| / sum_j ||dW_j|| (HetLoRA)."""
    norms = [float(np.linalg.norm(c.s * (c.b @ c.a))) for c in clients]
    b, a = np.zeros((len(clients[0].b), rank)), np.zeros((rank, clients[0].a.shape[1]))
    for norm, c in zip(norms, clients, strict=True):
        b[:, : c.rank] += norm / sum(norms) * (c.s / s_server) * c.b
        a[: c.rank] += norm / sum(norms) * c.a
    return b, a


def rank_slices(b: Floats, a: Floats, clients: Sequence[Client], s_server: float) -> tuple[Floats, Floats]:
    """Slice by slice the mean over the clients that hold it; the server's where none does (RBLA)."""
    b, a = b.copy(), a.copy()
    for i in range(len(a)):
        owners = [c for c in clients if c.rank > i]
        if owners:
            whole = sum(c.p for c in owners)
            b[:, i] = np.sum([c.p / whole * (c.s / s_server) * c.b[:, i] for c in owners], axis=0)
            a[i] = np.sum([c.p / whole * c.a[i] for c in owners], axis=0)
    return b, a


def means(clients: Sequence[Client]) -> tuple[Floats, Floats]:
    """The factors averaged apart (FedIT)."""
    return np.sum([c.p * c.b for c in clients], axis=0), np.sum([c.p * c.a for c in clients], axis=0)


def fair(clients: Sequence[Client], ridge: float) -> tuple[Floats, Floats]:
    """B' + dB and A', where dB minimises ||dW* / s - (B' + dB) A'||^2 + ridge ||dB||^2 (its gradient is zero)."""
    b, a = means(clients)
    residual = mean_product(clients) / clients[0].s - b @ a
    return b + np.linalg.solve(a @ a.T + ridge * np.eye(len(a)), a @ residual.T).T, a
