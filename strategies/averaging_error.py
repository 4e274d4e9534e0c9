"""The gauge of the error: how far averaging A and B apart ends from the true mean of the products.

With p_k the clients' parts of a round, B_k and A_k their factors, B' and A' the means, and B_0 and A_0 where all began,

    error   = sum_k p_k B_k A_k - B' A' = sum_k p_k (B_k - B') (A_k - A')
    change  = sum_k p_k B_k A_k - B_0 A_0
    relative = sqrt(sum of s^2 ||error||_F^2 over all modules / the same of the change).

The change is that of the true mean, not of the product of the means. The error is of second order in how far the
clients are apart; it is zero for one client, for equal ones, and where one factor is the same for all.

An update of a lower rank is a change of the leading slices (`strategies.aggregator.of_rank`): padded with zeros, its B
in units of s_R. What the client did not hold counts as unchanged.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from apiary.core import lora
from apiary.core.lora import Factors, Scaling
from apiary.core.messages import Update
from apiary.core.tensors import generator, is_finite
from strategies.aggregator import ServerState
from strategies.products import Weighting, shares

_CHEAP = 5e10  # operations; about 5 s on one core


class Gauge(NamedTuple):
    """The error of averaging A and B apart in a round.

    `flexlora` is what the best factors of the adapter's rank for the true mean would leave of the error; an estimate
    gives a bound, which is never below that but for chance.
    """

    relative: float  # to the round's true change; infinite where that is zero and the error is not
    flexlora: float  # to the same
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
    merge: Callable[[Any, Any], Any] | None = None  # the fold of the updates of both, where both began alike


class _Sums(NamedTuple):
    """Sums over the clients so far, of n modules whose factors have one shape; float64.

    W are d_in x m random signs of each module's own. What is as tall and thin as W lies on its side: products go
    through memory more than twice as fast then. Modules of one shape go together, for one by one a client's factors are
    so small that calling what is done with them takes longer than doing it.
    """

    modules: tuple[str, ...]
    probes: Tensor  # W^T, (n, m, d_in) float32
    b: Tensor  # of w_k dB_k, (n, d_out, R)
    a: Tensor  # of w_k (dA_k W)^T, (n, m, R)
    product: Tensor  # of w_k (dB_k dA_k W)^T, (n, m, d_out)


class _Sketch(NamedTuple):
    """Sums over the clients so far."""

    sums: tuple[_Sums, ...]
    weight: float


def probes_of(seed: int, round_number: int) -> Generator:
    """The generator of a round's random signs, which serves nothing else.

    Args:
        seed: the run's.
        round_number: from 1.
    """
    return generator(seed, round_number, "gauge")


def estimated(scaling: Scaling, weighting: Weighting = "tokens", probes: int = 8) -> Fold:
    """The gauge from sums alone, in memory that does not grow with the clients.

    For a matrix M and m random sign vectors w, the mean of ||M w||^2 is an unbiased estimate of ||M||_F^2 (Hutchinson
    1990). Its relative standard error is at most sqrt(2 / (m k)), where k = ||M||_F^4 / ||M^T M||_F^2 <= rank(M) is the
    effective rank; that of the norm is half of it, and the modules' errors, which are independent, average out. The
    standard error in the result is taken from how far the m vectors differ, so it is itself rough (m - 1 degrees of
    freedom).

    `flexlora` is a bound here: the error that is left in columns outside the span of B', for putting in the rest takes
    no rank. Where that span has no part in the error, it is `relative`.

    Held per module are d_in x m and d_out x (R + m) numbers. A client takes 2 m r (d_in + d_out) operations.

    Args:
        scaling: the scale of a product by its rank.
        weighting: the clients' parts of the round.
        probes: m.
    """

    def start(state: ServerState, rng: Generator) -> _Sketch:
        alike: dict[tuple[int, ...], list[str]] = {}
        signs = {}
        for module, (b, a) in lora.split(state.adapter).items():
            signs[module] = torch.randint(0, 2, (probes, a.shape[1]), generator=rng, dtype=torch.float32) * 2 - 1
            alike.setdefault((*b.shape, a.shape[1]), []).append(module)
        sums = []
        for (rows, rank, _), modules in alike.items():
            shapes = (rows, rank), (probes, rank), (probes, rows)
            zeros = (torch.zeros(len(modules), *shape, dtype=torch.float64) for shape in shapes)
            sums.append(_Sums(tuple(modules), torch.stack([signs[module] for module in modules]), *zeros))
        return _Sketch(tuple(sums), 0.0)

    def add(acc: _Sketch, update: Update) -> _Sketch:
        weight = update.weight if weighting == "tokens" else 1.0
        delta = lora.split(update.delta)
        for sums in acc.sums:
            b, a = (torch.stack(side) for side in zip(*(delta[module] for module in sums.modules), strict=True))
            rank = a.shape[1]
            scaled = weight * scaling(rank) / scaling(sums.a.shape[2])
            seen, product = _seen(b, a, sums.probes)
            sums.b[..., :rank].add_(b, alpha=scaled)
            sums.a[..., :rank].add_(seen, alpha=weight)
            sums.product.add_(product, alpha=scaled)
        return acc._replace(weight=acc.weight + weight)

    def finish(state: ServerState, acc: _Sketch) -> Gauge:
        if acc.weight <= 0:
            raise ValueError(f"the weights of the round sum to {acc.weight}; at least one must be positive")
        total, held = torch.zeros(3, probes, dtype=torch.float64), lora.split(state.adapter)
        for sums in acc.sums:
            start_b, start_a = (torch.stack(side) for side in zip(*(held[m] for m in sums.modules), strict=True))
            looks = _squared_looks(sums, acc.weight, start_b.double(), start_a.double())
            total += scaling(start_b.shape[2]) ** 2 * looks
        return _gauge(*total)

    return Fold(start, add, finish, _merged)


def _merged(one: _Sketch, other: _Sketch) -> _Sketch:
    both = zip(one.sums, other.sums, strict=True)
    sums = tuple(a._replace(b=a.b + b.b, a=a.a + b.a, product=a.product + b.product) for a, b in both)
    return _Sketch(sums, one.weight + other.weight)


def _squared_looks(sums: _Sums, weight: float, start_b: Tensor, start_a: Tensor) -> Tensor:
    """||M w||^2 of error, change, and error outside the span of B', in units of s_R^2: (3, m), by vector.

    Args:
        sums: of modules of one shape, whose looks are added up.
        weight: of all clients.
        start_b: (n, d_out, R) where they began.
        start_a: (n, R, d_in) likewise.
    """
    b, a, product = (part / weight for part in (sums.b, sums.a, sums.product))
    error = product - a @ b.mT
    change = product + (sums.probes.double() @ start_a.mT) @ b.mT + a @ start_b.mT
    span = torch.linalg.qr(start_b + b).Q
    outside = error - (error @ span) @ span.mT
    return torch.stack([error, change, outside]).square().sum((1, 3))


def _seen(b: Tensor, a: Tensor, probes: Tensor) -> tuple[Tensor, Tensor]:
    """(A W)^T and (B A W)^T of W^T, for each of n modules.

    In float32, whose rounding is far below the error of the estimate, but for products beyond its range.
    """
    seen = probes @ a.mT
    product = seen @ b.mT
    if is_finite({"": product}):
        return seen, product
    seen = probes.double() @ a.double().mT
    return seen, seen @ b.double().mT


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


class _Some(NamedTuple):
    state: ServerState
    rng: Generator
    updates: list[Update] | None  # None once they are too many
    sketch: Any


def exact_if_few(scaling: Scaling, weighting: Weighting = "tokens", probes: int = 8, most: float = _CHEAP) -> Fold:
    """The gauge for methods that see each update: exact while that is cheap, estimated from where it is not.

    Args:
        scaling: the scale of a product by its rank.
        weighting: the clients' parts of the round.
        probes: of the estimate.
        most: operations that `exact` may take; the updates are held no longer than it is below that.
    """
    whole, rough = exact(scaling, weighting), estimated(scaling, weighting, probes)

    def start(state: ServerState, rng: Generator) -> _Some:
        return _Some(state, rng, [], None)

    def add(acc: _Some, update: Update) -> _Some:
        if acc.updates is None:
            return acc._replace(sketch=rough.add(acc.sketch, update))
        acc.updates.append(update)
        if _operations(acc.state, len(acc.updates)) <= most:
            return acc
        sketch = functools.reduce(rough.add, acc.updates, rough.start(acc.state, acc.rng))
        return acc._replace(updates=None, sketch=sketch)

    def finish(state: ServerState, acc: _Some) -> Gauge:
        return rough.finish(state, acc.sketch) if acc.updates is None else whole.finish(state, acc.updates)

    return Fold(start, add, finish)


def _operations(state: ServerState, clients: int) -> float:
    """Floating-point operations of `exact`: Gram matrices of n = (K + 2) R columns, and three spectra of such."""
    total = 0.0
    for held in lora.split(state.adapter).values():
        n = (clients + 2) * held.rank
        total += 2.0 * n**2 * (len(held.b) + held.a.shape[1]) + 30.0 * n**3
    return total


def _squares(held: Factors, deltas: Sequence[Factors], parts: Sequence[float], scaling: Scaling) -> Tensor:
    """Squared norms of the error, the change, and what the best factors leave of the true mean, (3, 1) float64.

    With C = [p_k (dB_k - dB') ...] and D = [dA_k - dA'; ...] the error is C D, the change
    [dB', B_0, C] [A'; dA'; D] and the true mean [B', C] [A'; D].
    """
    rank = held.rank
    wide = [lora.resize(Factors(d.b.double() * (scaling(d.rank) / scaling(rank)), d.a.double()), rank) for d in deltas]
    part = torch.tensor(parts, dtype=torch.float64)[:, None, None]
    b, a = (torch.stack(side) for side in zip(*wide, strict=True))
    start = Factors(held.b.double(), held.a.double())
    moved = Factors((part * b).sum(0), (part * a).sum(0))
    mean = Factors(start.b + moved.b, start.a + moved.a)
    apart = Factors(torch.cat([*(part * (b - moved.b))], 1), torch.cat([*(a - moved.a)]))
    x, y = torch.cat([moved.b, start.b, apart.b], 1), torch.cat([mean.a, moved.a, apart.a])
    terms = (left := x.T @ x) * (right := y @ y.T)
    own = slice(2 * rank, None)
    error = terms[own, own].sum()
    outside = _beyond_rank(mean, apart, left[own, own], right[own, own])
    # The product of the means has this rank too: nothing of that rank is further off than it (but for rounding).
    return torch.stack([error, terms.sum(), outside.minimum(error)])[:, None]


def _beyond_rank(mean: Factors, apart: Factors, left: Tensor, right: Tensor) -> Tensor:
    """The energy of B A + C D that no matrix of the rank of B A can hold: of all singular values but the R largest.

    C is split into what lies in the span of B and the rest, which is known by its Gram matrix C^T C alone, and D in the
    same way: Gram matrices hold half of the digits, but those of small C and D are small, and rounding with them.

    Args:
        mean: B and A.
        apart: C and D.
        left: C^T C.
        right: D D^T.
    """
    b, a = torch.linalg.qr(mean.b), torch.linalg.qr(mean.a.T)
    in_b, in_a = b.Q.T @ apart.b, a.Q.T @ apart.a.T
    out_b, out_a = _root(left - in_b.T @ in_b), _root(right - in_a.T @ in_a)
    core = torch.cat([b.R, in_b], 1) @ torch.cat([a.R, in_a], 1).T
    whole = torch.cat([torch.cat([core, in_b @ out_a.T], 1), torch.cat([out_b @ in_a.T, out_b @ out_a.T], 1)])
    energies: Tensor = torch.linalg.svdvals(whole).square()
    return energies[mean.rank :].sum()


def _root(gram: Tensor) -> Tensor:
    """The n x n matrix whose own Gram matrix this is."""
    values, vectors = torch.linalg.eigh(gram)
    root: Tensor = (vectors * values.clamp_min(0).sqrt()).T
    return root


def _gauge(error: Tensor, change: Tensor, outside: Tensor) -> Gauge:
    """The gauge of estimates of the three squared norms, (m,) each."""
    m, known = len(error), float(change.mean())
    if known <= 0:
        relative = math.inf if float(error.mean()) > 0 else 0.0
        return Gauge(relative, relative, 0.0, 0.0)
    # Where there is no error, rounding may leave a trace of either sign.
    ratio, left = (max(0.0, float(part.mean())) / known for part in (error, outside))
    # Of a ratio of means (Cochran 1977, chapter 6), then of its root.
    spread = float((error - ratio * change).square().sum()) / (m * (m - 1)) if m > 1 else 0.0
    stderr = math.sqrt(spread) / known / (2 * math.sqrt(ratio)) if ratio > 0 else 0.0
    return Gauge(math.sqrt(ratio), math.sqrt(left), math.sqrt(known), stderr)
