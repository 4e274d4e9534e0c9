"""Aggregation of clients whose adapters may differ in rank: exactly, in the space of products, or by slices of factors.

Whatever rank r an update has, it is the change from `of_rank(state.adapter, r)`; a client's rank may differ from round
to round. All sums are in units of s_R, the scale of the server's adapter: a client's B counts s_r / s_R times.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Literal, NamedTuple, TypeAlias

import torch
from pydantic import Field
from torch import Generator, Tensor

from apiary.core import lora
from apiary.core.lora import Factors, Scaling
from apiary.core.messages import ClientInfo, Payload, Update
from strategies.aggregator import (
    Gradient,
    Reducer,
    ServerState,
    of_rank,
)

DROPPED = "dropped_energy"  # in a state's memory
Rank: TypeAlias = Annotated[int, Field(ge=0)]
Weighting: TypeAlias = Literal["tokens", "uniform"]


class _Held(NamedTuple):
    rank: int  # of the server's adapter
    updates: list[Update]  # as they came
    refused: int = 0  # answers that held what cannot be taken


def each(
    method: str, ranks: Literal["one", "mixed"], finish: Callable[[ServerState, Sequence[Update]], Gradient]
) -> Reducer:
    """A reducer that keeps all updates of a round.

    Args:
        method: its name, for error lines.
        ranks: as an `Aggregator` has it; an update of a rank that this excludes is a `ValueError` when it is added.
        finish: the gradient of a state and the updates, in the order of the clients' names, so that the order in which
            they came does not show.
    """
    return each_and_refused(method, ranks, lambda state, updates, refused: finish(state, updates))


def each_and_refused(
    method: str, ranks: Literal["one", "mixed"], finish: Callable[[ServerState, Sequence[Update], int], Gradient]
) -> Reducer:
    """As `each`, for methods that withstand some hostile clients: `finish` is also told how many answers were refused.

    Whoever sends NaN is out before anything is folded, and is one hostile client less among the others.
    """

    def start(state: ServerState) -> _Held:
        return _Held(rank_of(state), [])

    def add(held: _Held, update: Update) -> _Held:
        check_rank(method, held.rank, update, ranks)
        held.updates.append(update)
        return held

    def end(state: ServerState, held: _Held, rng: Generator) -> Gradient:
        return finish(state, sorted(held.updates, key=lambda update: update.client), held.refused)

    return Reducer(start, add, end, lambda held: held._replace(refused=held.refused + 1))


def rank_of(state: ServerState) -> int:
    """The rank of the server's adapter, which all its modules have."""
    return next(iter(lora.split(state.adapter).values())).rank


def check_rank(method: str, rank: int, update: Update, ranks: Literal["one", "mixed"]) -> None:
    """Check that a method can take an update.

    Raises:
        ValueError: its rank is not the adapter's (for a method of "one" rank), or is above it, or its tensors have
            another.
    """
    ranks_sent = {update.rank, *(delta.rank for delta in lora.split(update.delta).values())}
    if ranks_sent == {rank} or (ranks == "mixed" and len(ranks_sent) == 1 and max(ranks_sent) < rank):
        return
    allowed = f"{rank} alone" if ranks == "one" else f"at most {rank}, the same in all modules"
    raise ValueError(
        f"{method}: {update.client!r} sent rank {', '.join(map(str, sorted(ranks_sent)))}; it takes {allowed}"
    )


def shares(updates: Sequence[Update], weighting: Weighting) -> list[float]:
    """Each update's part p_k of the round, by its trained tokens or one as any; they sum to 1.

    Raises:
        ValueError: no update has any weight.
    """
    weights = [update.weight if weighting == "tokens" else 1.0 for update in updates]
    total = math.fsum(weights)
    if total <= 0:
        raise ValueError(f"the weights of the round sum to {total}; at least one must be positive")
    return [weight / total for weight in weights]


def payload_of_rank(scaling: Scaling) -> Callable[[ServerState, ClientInfo], Payload]:
    """A `payload` that gives each client the leading slices of the adapter, as many as its rank."""

    def payload(state: ServerState, client: ClientInfo) -> Payload:
        if client.rank >= rank_of(state):
            return Payload(state.adapter, state.base_delta)
        return Payload(of_rank(state.adapter, client.rank, scaling), state.base_delta)

    return payload


def add_to_base(state: ServerState, change: Mapping[str, Factors], most: int) -> ServerState:
    """The state with products of scale 1 added to those of its `base_delta`.

    Where the stacked factors have a higher rank than the matrix can have, they become its singular value decomposition,
    which loses nothing; where they have a higher one than `most`, they become the best factors of that rank.

    Args:
        state: the server's.
        change: by module; modules may be missing.
        most: the highest rank that `base_delta` may have; 0 = any.

    Returns:
        The state. Its `memory[DROPPED]` is what this call has dropped of the sums that it cut: a share of
        their squared Frobenius norms, 0 where nothing was lost.
    """
    base = lora.split(state.base_delta)
    dropped, total = 0.0, 0.0
    for module, extra in change.items():
        whole = lora.stack([base[module], extra]) if module in base else extra
        kept = min(most or whole.rank, len(whole.b), whole.a.shape[1])
        if whole.rank > kept:
            parts = lora.svd(whole)
            whole = lora.balanced(parts, kept)
            dropped += float(parts.s[kept:].double().square().sum())
            total += float(parts.s.double().square().sum())
        base[module] = whole
    share = torch.tensor(dropped / total if total else 0.0)
    return state._replace(base_delta=lora.join(base), memory={**state.memory, DROPPED: share})


def mean_change(
    held: Factors, deltas: Sequence[Factors], parts: Sequence[float], scaling: Scaling, absolute: bool = False
) -> Factors:
    """The mean change of the clients' products, sum_k p_k s_k/s_R (B_k A_k - B_k0 A_k0), exactly, as factors.

    All clients start from the leading columns of one B_R: s_k B_k0 = s_R B_R[:, :r_k]. Their terms B_k0 dA_k therefore
    share one block, and the sum is [p_k s_k/s_R dB_k ... | B_R] [A_k ... ; sum_k p_k pad(dA_k)], of rank sum_k r_k + R
    where pairs of both factors of each client would take 2 sum_k r_k.

    Args:
        held: the server's factors, of rank R.
        deltas: the clients' changes of theirs, of ranks r_k <= R.
        parts: p_k.
        scaling: the scale of a product by its rank.
        absolute: the difference of sum_k p_k s_k/s_R B_k A_k to the server's product instead. What clients of lower
            ranks did not hold then counts as zero: it is sum_k p_k s_k/s_R B_k0 A_k0 less than the server's.
    """
    weights = [p * (scaling(d.rank) / scaling(held.rank)) for p, d in zip(parts, deltas, strict=True)]
    own = lora.stack([Factors(d.b, held.a[: d.rank] + d.a) for d in deltas], weights)
    shared = padded_sum([d.a for d in deltas], parts, held.a)
    if absolute:
        shared -= missing(deltas, parts, held.rank)[:, None] * held.a
    if not (held.b.any() and shared.any()):  # as with a new adapter, or one whose A is frozen
        return own
    return lora.stack([own, Factors(held.b, shared.float())])


def padded_sum(tensors: Sequence[Tensor], weights: Sequence[float], like: Tensor) -> Tensor:
    """The weighted sum of tensors with fewer rows than `like`, or as many; float64."""
    total = torch.zeros_like(like, dtype=torch.float64)
    for tensor, weight in zip(tensors, weights, strict=True):
        total[: len(tensor)] += tensor.double() * weight
    return total


def missing(deltas: Sequence[Factors], parts: Sequence[float], rank: int) -> Tensor:
    """For each of R slices the part of the round that does not hold it, (R,) float64; exactly 0 where all do."""
    lacking = [math.fsum(p for p, d in zip(parts, deltas, strict=True) if d.rank <= i) for i in range(rank)]
    return torch.tensor(lacking, dtype=torch.float64)


def product_reducer(method: str, scaling: Scaling, weighting: Weighting, absolute: bool = False) -> Reducer:
    """A fold whose gradient is the mean of the clients' products, as stacked factors module by module."""

    def finish(state: ServerState, updates: Sequence[Update]) -> Gradient:
        counted = [(p, lora.split(u.delta)) for p, u in zip(shares(updates, weighting), updates, strict=True) if p]
        parts = [p for p, _ in counted]
        change = {
            module: mean_change(held, [deltas[module] for _, deltas in counted], parts, scaling, absolute)
            for module, held in lora.split(state.adapter).items()
        }
        return Gradient(lora.join(change))

    return each(method, "mixed", finish)
