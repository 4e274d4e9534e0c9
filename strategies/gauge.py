"""The gauge of the error: how far averaging A and B apart ends from the true mean of the products.

With p_k the clients' parts of a round, B_k and A_k their factors, B' and A' the means, and B_0 and A_0 where all began,

    error   = sum_k p_k B_k A_k - B' A' = sum_k p_k (B_k - B') (A_k - A')
    change  = sum_k p_k B_k A_k - B_0 A_0
    relative = sqrt(sum of s^2 ||error||_F^2 over all modules / the same of the change).

The change is that of the true mean, not of the product of the means. The error is of second order in how far the
clients are apart; it is zero for one client, for equal ones, and where one factor is the same for all.

An update of a lower rank is a change of the leading slices (`strategies.core.of_rank`): padded with zeros, its B in
units of s_R. What the client did not hold counts as unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from apiary import lora
from apiary.exchange import Update
from apiary.lora import Factors, Scaling
from strategies.core import ServerState
from strategies.lowrank import Weighting, shares

# Which products of [B_0, dB'] and [A_0; dA'] are summed, beside those of the C_k.
_CHANGE = torch.tensor([[0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
_WHOLE = torch.ones(2, 2, dtype=torch.float64)


class Gauge(NamedTuple):
    """The error of averaging A and B apart in a round."""

    relative: float  # of the round's true change; infinite where that is zero and the error is not
    flexlora: (
        float  # what the best factors of the adapter's rank would leave of it, likewise; an estimate gives a bound
    )
    change: float  # Frobenius norm of the round's true change of the weights
    stderr: float  # standard error of `relative`; 0 where it is exact

    @property
    def gains(self) -> dict[str, float]:
        """By method, how much of `relative` it would take away; FLoRA and FedEx-LoRA have no error at all."""
        return {"flora": self.relative, "fedex": self.relative, "flexlora": self.relative - self.flexlora}


class Fold(NamedTuple):
    """A fold over the updates of a round beside that of the method; `add` works in place."""

    start: Callable[[ServerState, Generator], Any]
    add: Callable[[Any, Update], Any]
    finish: Callable[[ServerState, Any], Gauge]


class _Sketch(NamedTuple):
    """Sums over the clients so far, by module, float64, with W as d_in x m random signs of the module's own."""

    probes: dict[str, Tensor]  # W, (d_in, m) float32
    b: dict[str, Tensor]  # of w_k dB_k, (d_out, R)
    a: dict[str, Tensor]  # of w_k dA_k W, (R, m)
    product: dict[str, Tensor]  # of w_k dB_k dA_k W, (d_out, m)
    weight: float


def estimated(scaling: Scaling, weighting: Weighting = "tokens", probes: int = 8) -> Fold:
    """The gauge from sums alone, in memory that does not grow with the clients.

    For a matrix M and m random sign vectors w, the mean of ||M w||^2 is an unbiased estimate of ||M||_F^2 (Hutchinson
    1990). Its relative standard error is at most sqrt(2 / (m k)), where k = ||M||_F^4 / ||M^T M||_F^2 <= rank(M) is the
    effective rank; that of the norm is half of it, and the modules' errors, which are independent, average out. The
    standard error in the result is taken from how far the m vectors differ, so it is itself rough (m - 1 degrees of
    freedom).

    `flexlora` is a bound here: the error that is left in columns outside the span of B', for putting in the rest takes
    no rank. Where that span has no part in the error, it is `relative`.

    Held per module are d_in x m float32 and d_out x (R + m) float64. A client takes 2 m r (d_in + d_out) operations.

    Args:
        scaling: the scale of a product by its rank.
        weighting: the clients' parts of the round.
        probes: m.
    """

    def start(state: ServerState, rng: Generator) -> _Sketch:
        held = lora.split(state.adapter)
        signs = {
            module: torch.randint(0, 2, (f.a.shape[1], probes), generator=rng, dtype=torch.float32) * 2 - 1
            for module, f in held.items()
        }

        def zeros(shape: Callable[[Factors], tuple[int, int]]) -> dict[str, Tensor]:
            return {module: torch.zeros(shape(f), dtype=torch.float64) for module, f in held.items()}

        return _Sketch(
            signs,
            zeros(lambda f: (len(f.b), f.rank)),
            zeros(lambda f: (f.rank, probes)),
            zeros(lambda f: (len(f.b), probes)),
            0.0,
        )

    def add(acc: _Sketch, update: Update) -> _Sketch:
        weight = update.weight if weighting == "tokens" else 1.0
        for module, (b, a) in lora.split(update.delta).items():
            rank = len(a)
            scaled = weight * scaling(rank) / scaling(len(acc.a[module]))
            seen = a @ acc.probes[module]
            acc.b[module][:, :rank].add_(b, alpha=scaled)
            acc.a[module][:rank].add_(seen, alpha=weight)
            acc.product[module].add_(b @ seen, alpha=scaled)
        return acc._replace(weight=acc.weight + weight)

    def finish(state: ServerState, acc: _Sketch) -> Gauge:
        if acc.weight <= 0:
            raise ValueError(f"the weights of the round sum to {acc.weight}; at least one must be positive")
        total = torch.zeros(3, probes, dtype=torch.float64)
        for module, held in lora.split(state.adapter).items():
            b, a, product = (part[module] / acc.weight for part in (acc.b, acc.a, acc.product))
            start_b = held.b.double()
            error = product - b @ a
            change = product + b @ (held.a @ acc.probes[module]).double() + start_b @ a
            span = torch.linalg.qr(start_b + b).Q
            outside = error - span @ (span.T @ error)
            seen = torch.stack([error, change, outside]).square().sum(1)  # (3, m): by vector
            total += scaling(held.rank) ** 2 * seen
        return _gauge(*total)

    return Fold(start, add, finish)


def exact(scaling: Scaling, weighting: Weighting = "tokens") -> Fold:
    """The gauge for methods that hold all updates of a round anyway, to rounding.

    From Gram matrices of the factors, never a dense d_out x d_in matrix: O(K^2 R^2 (d_out + d_in)) a module.

    Args:
        scaling: the scale of a product by its rank.
        weighting: the clients' parts of the round.
    """

    def start(state: ServerState, rng: Generator) -> list[Update]:
        return []

    def add(held: list[Update], update: Update) -> list[Update]:
        held.append(update)
        return held

    def finish(state: ServerState, updates: list[Update]) -> Gauge:
        updates = sorted(updates, key=lambda update: update.client)
        parts, split = shares(updates, weighting), [lora.split(update.delta) for update in updates]
        total = torch.zeros(3, 1, dtype=torch.float64)
        for module, held in lora.split(state.adapter).items():
            total += scaling(held.rank) ** 2 * _squares(held, [deltas[module] for deltas in split], parts, scaling)
        return _gauge(*total)

    return Fold(start, add, finish)


def _squares(held: Factors, deltas: Sequence[Factors], parts: Sequence[float], scaling: Scaling) -> Tensor:
    """Squared norms of the error, the change, and what the best factors leave of the true mean, (3, 1) float64.

    Each matrix is X M Y, where X = [B_0, dB', C_1 ... C_K] with C_k = p_k (dB_k - dB'), Y = [A_0; dA'; dA_k - dA' ...],
    and M is made of zeros and ones: what is asked of it follows from X^T X and Y Y^T, both (K + 2) R wide.
    """
    rank = held.rank
    wide = [lora.resize(Factors(d.b.double() * (scaling(d.rank) / scaling(rank)), d.a.double()), rank) for d in deltas]
    part = torch.tensor(parts, dtype=torch.float64)[:, None, None]
    b, a = (torch.stack(side) for side in zip(*wide, strict=True))
    mean_b, mean_a = (part * b).sum(0), (part * a).sum(0)
    x = torch.cat([held.b.double(), mean_b, *(part * (b - mean_b))], 1)
    y = torch.cat([held.a.double(), mean_a, *(a - mean_a)])
    left, right = x.T @ x, y @ y.T
    own = slice(2 * rank, None)
    error = (left[own, own] * right[own, own]).sum()
    change, whole = (_mixed(corner, rank, len(y)) for corner in (_CHANGE, _WHOLE))
    values, vectors = torch.linalg.eigh(left)
    root = vectors * values.clamp_min(0).sqrt()
    energies = torch.linalg.eigvalsh(root.T @ whole @ right @ whole.T @ root)  # of the true mean, rising
    outside = energies[:-rank].clamp_min(0).sum()
    # The product of the means has this rank too: nothing of that rank is further off than it (but for rounding).
    return torch.stack([error, ((left @ change @ right) * change).sum(), outside.minimum(error)])[:, None]


def _mixed(corner: Tensor, rank: int, size: int) -> Tensor:
    shared, own = (torch.eye(n, dtype=corner.dtype) for n in (rank, size - 2 * rank))
    made: Tensor = torch.block_diag(torch.kron(corner, shared), own)
    return made


def _gauge(error: Tensor, change: Tensor, outside: Tensor) -> Gauge:
    """The gauge of estimates of the three squared norms, (m,) each."""
    m, known = len(error), float(change.mean())
    if known <= 0:
        relative = math.inf if float(error.mean()) > 0 else 0.0
        return Gauge(relative, relative, 0.0, 0.0)
    ratio, left = float(error.mean()) / known, float(outside.mean()) / known
    # Of a ratio of means (Cochran 1977, chapter 6), then of its root.
    spread = float((error - ratio * change).square().sum()) / (m * (m - 1)) if m > 1 else 0.0
    stderr = math.sqrt(spread) / known / (2 * math.sqrt(ratio)) if ratio > 0 else 0.0
    return Gauge(math.sqrt(ratio), math.sqrt(left), math.sqrt(known), stderr)
