"""Averaging A and B apart, as federated averaging does, and mending what that gets wrong; for clients of one rank.

The mean of the products is not the product of the means: sum_k p_k B_k A_k = B' A' + sum_k p_k (B_k - B') (A_k - A')
with B' and A' the means. The last term, of rank at most (K - 1) r, is the residual.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Generator, Tensor

from apiary.core import lora
from apiary.core.lora import Factors, Scaling
from apiary.core.messages import Update
from strategies.aggregator import AGGREGATORS, Aggregator, Gradient, Reducer, ServerState, plain_step, same_payload
from strategies.fedavg import fedavg
from strategies.products import Rank, Weighting, add_to_base, check_rank, each, rank_of, shares

_NO_TURN = 1e-9  # of the largest singular value: directions below it are not turned


def _mean(state: ServerState, updates: Sequence[Update], weighting: Weighting) -> dict[str, Factors]:
    """The mean changes of the factors by module: to the bit those of `fedavg`."""
    reduce = fedavg(weighting).reduce
    acc = reduce.start(state)
    for update in updates:
        acc = reduce.add(acc, update)
    return lora.split(reduce.finish(state, acc, Generator()).adapter)


def _by_module(
    state: ServerState, updates: Sequence[Update], weighting: Weighting
) -> tuple[list[float], dict[str, list[Factors]]]:
    """The parts of the clients that count, and their changes by module."""
    counted = [(p, lora.split(u.delta)) for p, u in zip(shares(updates, weighting), updates, strict=True) if p]
    modules = lora.split(state.adapter)
    return [p for p, _ in counted], {module: [deltas[module] for _, deltas in counted] for module in modules}


@AGGREGATORS.register("fedex")
def fedex(scaling: Scaling, weighting: Weighting = "tokens", rank: Rank = 0, base_rank: Rank = 0) -> Aggregator:
    """FedEx-LoRA: federated averaging of the factors, and its residual into the base.

    A' and B' are the adapter; s_R sum_k p_k (B_k - B') (A_k - A') is added to `base_delta`, as factors and never dense.
    The model is then exactly the mean of the clients' (Singhal et al. 2024, arXiv 2410.09432). `base_delta` is the sum
    of all rounds, so that a client that missed some is not behind, and grows by (K - 1) r ranks a round.

    Args:
        scaling: the scale of a product by its rank.
        weighting: the clients' parts of the round.
        rank: ranks of each round's residual that are kept, the best ones (0 = all; exact).
        base_rank: highest rank of `base_delta`, whose best approximation is kept then (0 = any; exact).
    """

    def finish(state: ServerState, updates: Sequence[Update]) -> Gradient:
        mean = _mean(state, updates, weighting)
        parts, changes = _by_module(state, updates, weighting)
        residuals = {module: _residual(parts, deltas, mean[module]) for module, deltas in changes.items()}
        residual = {
            module: Factors(cut.b * scaling(len(mean[module].a)), cut.a)
            for module, whole in residuals.items()
            if whole is not None
            for cut in [lora.balanced(lora.svd(whole), rank) if 0 < rank < whole.rank else whole]
        }
        return Gradient(lora.join(mean), lora.join(residual))

    def step(state: ServerState, gradient: Gradient) -> ServerState:
        return add_to_base(plain_step(state, gradient), lora.split(gradient.base_delta), base_rank)

    def ranks(rounds: int, cohort: int, mean_rank: float) -> float:
        return min(rounds * (rank or (cohort - 1) * mean_rank), base_rank or math.inf)

    return Aggregator(
        each("fedex", "one", finish),
        step,
        same_payload,
        needs="each",
        base=True,
        base_rank=ranks,
        recovers="bounded" if rank or base_rank else "all",
    )


def _residual(parts: Sequence[float], deltas: Sequence[Factors], mean: Factors) -> Factors | None:
    """The residual as factors of rank (K - 1) r; None where it is zero.

    It is the same for changes as for the factors themselves, for all start from the same ones. The terms B_k - B' sum
    to zero with the weights p_k, so that any one A may be taken off all A_k instead of A', and one client drops out.
    """
    last = deltas[-1].a
    pairs = [
        Factors((p * (d.b.double() - mean.b.double())).float(), d.a - last)
        for p, d in zip(parts[:-1], deltas[:-1], strict=True)
    ]
    whole = lora.stack(pairs) if pairs else None
    return whole if whole is not None and whole.a.any() and whole.b.any() else None


@AGGREGATORS.register("lora_fair")
def lora_fair(
    weighting: Weighting = "tokens", ridge: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.01
) -> Aggregator:
    """LoRA-FAIR in closed form: federated averaging, and as much of its residual as a change of B can hold.

    B = B' + dB with the dB that makes ||residual - dB A'||_F^2 + ridge ||dB||_F^2 least, which is
    dB = residual A'^T (A' A'^T + ridge I)^-1. The model is never further from the mean of the clients' than that of
    `fedavg` is, and what travels is no more. The paper descends on a cosine distance instead (Bian et al. 2024,
    arXiv 2411.14961).

    Args:
        weighting: the clients' parts of the round.
        ridge: how much dB is held back, in the unit of A A^T, whose diagonal is 1/3 in a new adapter; 0 = the best
            approximation that B can give, and with a large one this is `fedavg`.
    """

    def finish(state: ServerState, updates: Sequence[Update]) -> Gradient:
        mean = _mean(state, updates, weighting)
        parts, changes = _by_module(state, updates, weighting)
        modules = {}
        for module, held in lora.split(state.adapter).items():
            a = held.a.double() + mean[module].a.double()
            more = _fit_b(parts, changes[module], mean[module], a, ridge)
            modules[module] = Factors((mean[module].b.double() + more).float(), mean[module].a)
        return Gradient(lora.join(modules))

    return Aggregator(each("lora_fair", "one", finish), plain_step, same_payload, needs="each")


def _fit_b(parts: Sequence[float], deltas: Sequence[Factors], mean: Factors, a: Tensor, ridge: float) -> Tensor:
    """The change of B that fits the residual best, (d_out, r) float64; O(K r^2 (d_out + d_in))."""
    target = torch.zeros_like(mean.b, dtype=torch.float64)  # the residual times A'^T
    for p, d in zip(parts, deltas, strict=True):
        target += p * (d.b.double() - mean.b.double()) @ ((d.a.double() - mean.a.double()) @ a.T)
    gram = a @ a.T + ridge * torch.eye(len(a), dtype=torch.float64)
    fitted: Tensor = target @ torch.linalg.pinv(gram, hermitian=True)  # rows of A may depend on each other
    return fitted


class _Aligned(NamedTuple):
    rank: int
    held: dict[str, Factors]  # the server's
    by: Literal["a", "b"]
    mean: Any  # the accumulator of the plain average


@AGGREGATORS.register("fedrot")
def fedrot(
    weighting: Weighting = "tokens",
    align: Literal["a", "b", "alternate"] = "alternate",
    strength: Annotated[float, Field(ge=0, le=1)] = 1.0,
    reflections: bool = False,
) -> Aggregator:
    """FedRot-LoRA: turns each client's factors towards the server's before they are averaged apart.

    B_k Q and Q^T A_k have the same product for every orthogonal Q. Taken is the one that brings A_k (or B_k) nearest to
    the server's: Q = U V^T with U S V^T = A_k A^T (or B_k^T B), the orthogonal Procrustes problem (Schoenemann 1966;
    Zhang et al. 2026, arXiv 2602.23638). In the paper the clients turn. The rotation takes nothing but the client's
    factors and those that it received, so that the server can do it as well, and clients need no code for it.

    Args:
        weighting: the clients' parts of the round.
        align: which factor is brought near; "alternate": A in the first round, B in the second, and so on. Where the
            server's B is zero, as in a new adapter, it is A.
        strength: how far to turn, from 0, not at all, to 1: the orthogonal matrix nearest to (1 - strength) I +
            strength Q.
        reflections: allow a Q of determinant -1 too. Without, as in the paper, the best *rotation* is taken: the
            direction that fits worst is turned back. A client that began with factors of its own may need a reflection.
    """
    whole = fedavg(weighting).reduce

    def start(state: ServerState) -> _Aligned:
        by: Literal["a", "b"] = ("b" if state.round % 2 else "a") if align == "alternate" else align
        return _Aligned(rank_of(state), lora.split(state.adapter), by, whole.start(state))

    def add(acc: _Aligned, update: Update) -> _Aligned:
        check_rank("fedrot", acc.rank, update, "one")
        turned = {}
        for module, delta in lora.split(update.delta).items():
            held = Factors(*(t.double() for t in acc.held[module]))
            own = Factors(held.b + delta.b.double(), held.a + delta.a.double())
            inner = own.b.T @ held.b if acc.by == "b" and held.b.any() else own.a @ held.a.T
            turn = _rotation(inner, strength, reflections)
            turned[module] = Factors((own.b @ turn - held.b).float(), (turn.T @ own.a - held.a).float())
        return acc._replace(mean=whole.add(acc.mean, update._replace(delta=lora.join(turned))))

    def finish(state: ServerState, acc: _Aligned, rng: Generator) -> Gradient:
        return whole.finish(state, acc.mean, rng)

    return Aggregator(Reducer(start, add, finish), plain_step, same_payload, needs="each", trains=("both",))


def _rotation(inner: Tensor, strength: float, reflections: bool) -> Tensor:
    """The orthogonal matrix Q (r, r) for which tr(Q^T inner) is greatest, or a part of the way to it.

    Directions in which `inner` is zero would be turned anyhow, by chance: they stay as they are.
    """
    eye = torch.eye(len(inner), dtype=inner.dtype)
    most = float(torch.linalg.matrix_norm(inner, 2)) or 1.0
    u, _, vt = torch.linalg.svd(inner + _NO_TURN * most * eye)
    if not reflections and torch.linalg.det(u @ vt) < 0:
        vt[-1] = -vt[-1]
    if strength < 1:
        u, _, vt = torch.linalg.svd((1 - strength) * eye + strength * (u @ vt))
    turn: Tensor = u @ vt
    return turn
