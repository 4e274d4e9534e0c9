"""Aggregation of clients whose adapters may differ in rank: exactly, in the space of products, or by slices of factors.

Whatever rank r an update has, it is the change from `of_rank(state.adapter, r)`; a client's rank may differ from round
to round. All sums are in units of s_R, the scale of the server's adapter: a client's B counts s_r / s_R times.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

import torch
from pydantic import Field
from torch import Generator, Tensor

from apiary.config.schema import UserError
from apiary.core import lora
from apiary.core.lora import Factors, Scaling
from apiary.core.messages import ClientInfo, Payload, Update
from apiary.core.tensors import StateDict, generator
from strategies.aggregator import (
    AGGREGATORS,
    Aggregator,
    Gradient,
    Reducer,
    ServerState,
    of_rank,
    plain_step,
    product_step,
)
from strategies.fedavg import fedavg

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
    found = {update.rank, *(delta.rank for delta in lora.split(update.delta).values())}
    if found == {rank} or (ranks == "mixed" and len(found) == 1 and max(found) < rank):
        return
    allowed = f"{rank} alone" if ranks == "one" else f"at most {rank}, the same in all modules"
    raise ValueError(f"{method}: {update.client!r} sent rank {', '.join(map(str, sorted(found)))}; it takes {allowed}")


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


def _mean_change(
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
    shared = _padded_sum([d.a for d in deltas], parts, held.a)
    if absolute:
        shared -= _missing(deltas, parts, held.rank)[:, None] * held.a
    if not (held.b.any() and shared.any()):  # as with a new adapter, or one whose A is frozen
        return own
    return lora.stack([own, Factors(held.b, shared.float())])


def _padded_sum(tensors: Sequence[Tensor], weights: Sequence[float], like: Tensor) -> Tensor:
    """The weighted sum of tensors with fewer rows than `like`, or as many; float64."""
    total = torch.zeros_like(like, dtype=torch.float64)
    for tensor, weight in zip(tensors, weights, strict=True):
        total[: len(tensor)] += tensor.double() * weight
    return total


def _missing(deltas: Sequence[Factors], parts: Sequence[float], rank: int) -> Tensor:
    """For each of R slices the part of the round that does not hold it, (R,) float64; exactly 0 where all do."""
    lacking = [math.fsum(p for p, d in zip(parts, deltas, strict=True) if d.rank <= i) for i in range(rank)]
    return torch.tensor(lacking, dtype=torch.float64)


def _product_reducer(method: str, scaling: Scaling, weighting: Weighting, absolute: bool = False) -> Reducer:
    def finish(state: ServerState, updates: Sequence[Update]) -> Gradient:
        counted = [(p, lora.split(u.delta)) for p, u in zip(shares(updates, weighting), updates, strict=True) if p]
        parts = [p for p, _ in counted]
        change = {
            module: _mean_change(held, [deltas[module] for _, deltas in counted], parts, scaling, absolute)
            for module, held in lora.split(state.adapter).items()
        }
        return Gradient(lora.join(change))

    return each(method, "mixed", finish)


@AGGREGATORS.register("flora")
def flora(scaling: Scaling, seed: int, weighting: Weighting = "tokens", base_rank: Rank = 0) -> Aggregator:
    """FLoRA: what the clients learnt goes into the base, exactly, and the next round begins with a new adapter.

    D := D + sum_k p_k s_k B_k A_k by stacking factors; p_k stands in one of them only, for in both it would count
    squared. Then A is drawn anew from (seed, round, name) and B is zero (Wang et al. 2024, arXiv 2409.05976). A product
    that the adapter held at the start of the round goes into the base with them.

    `base_delta` is the sum of all rounds, so that a client that missed some is not behind. It grows by sum_k r_k ranks
    a round, up to those of a full matrix, and every client receives it: `base_rank` bounds it.

    Args:
        scaling: the scale of a product by its rank.
        seed: the run's.
        weighting: the clients' parts of the round.
        base_rank: highest rank of `base_delta`, whose best approximation is kept then (0 = any; exact).
    """

    def step(state: ServerState, gradient: Gradient) -> ServerState:
        change = lora.split(gradient.adapter)
        learnt = {}
        for module, held in lora.split(state.adapter).items():
            parts = [held, change[module]] if held.b.any() else [change[module]]
            learnt[module] = lora.stack(parts, [scaling(held.rank)] * len(parts))
        number = state.round + 1
        return add_to_base(state, learnt, base_rank)._replace(
            round=number, adapter=_renewed(state.adapter, seed, number)
        )

    reduce = _product_reducer("flora", scaling, weighting)
    return Aggregator(
        reduce,
        step,
        payload_of_rank(scaling),
        needs="each",
        space="products",
        ranks="mixed",
        trains=("both", "b"),  # in an adapter whose B is zero, a round of A alone learns nothing
        renews=True,
    )


def _renewed(adapter: StateDict, seed: int, number: int) -> dict[str, Tensor]:
    """An adapter that changes nothing yet, as a run begins with, but another one in each round."""
    made = {name: torch.zeros_like(tensor) for name, tensor in adapter.items()}
    for name, tensor in made.items():
        if not lora.is_b(name):
            bound = tensor.shape[1] ** -0.5  # Kaiming-uniform with a = sqrt(5)
            tensor.uniform_(-bound, bound, generator=generator(seed, "adapter", number, name))
    return made


@AGGREGATORS.register("flexlora")
def flexlora(
    scaling: Scaling, weighting: Weighting = "tokens", form: Literal["delta", "absolute"] = "delta"
) -> Aggregator:
    """FlexLoRA: the mean of the clients' products, exactly, then the best factors of rank R for it.

    The authors decompose dense matrices; here the stacked factors are decomposed, by QR and a small SVD (Bai et al.
    2024, arXiv 2402.11505). A client of rank r receives the best r ranks.

    Their form is "absolute": the server's product becomes sum_k p_k s_k B_k A_k. With clients of different ranks it
    collapses: in every round slice i shrinks by the part of the clients whose rank is below i, also if nobody trains
    (Wu et al. 2026, arXiv 2602.13486). The form "delta" adds the mean of the clients' *changes* instead,
    s_k (B_k A_k - B_k0 A_k0), and keeps what nobody has changed. With one rank for all, both are the same.

    Args:
        scaling: the scale of a product by its rank.
        weighting: the clients' parts of the round.
        form: what is averaged: changes, or whole products as in the paper.
    """
    reduce = _product_reducer("flexlora", scaling, weighting, form == "absolute")
    return Aggregator(
        reduce,
        product_step,
        payload_of_rank(scaling),
        needs="each",
        space="products",
        ranks="mixed",
        trains=("both",),
    )


@AGGREGATORS.register("hetlora")
def hetlora(
    scaling: Scaling,
    form: Literal["absolute", "delta"] = "absolute",
    prune: Annotated[float, Field(ge=0, lt=1)] = 0.0,
    penalty: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0,
) -> Aggregator:
    """HetLoRA: factors are padded with zeros and averaged, weighted by the norms of the clients' products.

    In each module client k has the weight ||s_k B_k A_k||_F / sum_j ||s_j B_j A_j||_F, whatever its tokens (Cho et al.
    2024, arXiv 2401.06432); one as any while all products are zero. The norms are those of the
    products, and so are blind to how B and A share them; but a client that scales its product up gains weight. It is
    not a method for clients that are not trusted.

    As in the paper a padded zero counts: slice i of both factors shrinks by the weight of the clients that do not hold
    it, in every round. With `form` = "delta" the padded changes are averaged instead, and nothing shrinks.

    With `prune` the clients lower their own ranks as they train: `client.pruning` says how.

    Args:
        scaling: the scale of a product by its rank.
        form: what is padded and averaged: whole factors as in the paper, or changes.
        prune: the part of its rank that a client keeps when it prunes, the paper's gamma (0: none prunes).
        penalty: of the part that it may prune, in its loss: the paper's lambda.

    Raises:
        UserError: there is a penalty, but nobody prunes.
    """
    if penalty and not prune:
        raise UserError(
            f"strategy.options.penalty = {penalty}: it is on what clients may prune; set prune, such as 0.99"
        )

    def mean(held: Factors, deltas: Sequence[Factors]) -> Factors:
        deltas = [Factors(d.b * (scaling(d.rank) / scaling(held.rank)), d.a) for d in deltas]
        norms = [lora.norm(Factors(held.b[:, : d.rank] + d.b, held.a[: d.rank] + d.a)) for d in deltas]
        total = math.fsum(norms)
        weights = [norm / total if total else 1 / len(norms) for norm in norms]
        b = _padded_sum([d.b.T for d in deltas], weights, held.b.T)
        a = _padded_sum([d.a for d in deltas], weights, held.a)
        if form == "absolute":
            missing = _missing(deltas, weights, held.rank)[:, None]
            b, a = b - missing * held.b.T, a - missing * held.a
        return Factors(b.T.float().contiguous(), a.float())

    def finish(state: ServerState, updates: Sequence[Update]) -> Gradient:
        if not updates:
            raise ValueError("the round has no update")
        split = [lora.split(update.delta) for update in updates]
        held = lora.split(state.adapter)
        return Gradient(lora.join({m: mean(factors, [deltas[m] for deltas in split]) for m, factors in held.items()}))

    reduce = each("hetlora", "mixed", finish)
    made = Aggregator(reduce, plain_step, payload_of_rank(scaling), needs="each", ranks="mixed", prunes=prune > 0)
    # Where padded zeros count, a factor that clients hold fixed would shrink all the same.
    return made if form == "delta" else made._replace(trains=("both",))


class _Slices(NamedTuple):
    rank: int  # of the server's adapter
    padded: Any  # the accumulator of the plain average
    weight: Tensor  # (R,) float64, of the clients that hold each slice


@AGGREGATORS.register("rank_slices")
def rank_slices(scaling: Scaling, weighting: Weighting = "tokens") -> Aggregator:
    """Averages slice i, a column of B and a row of A, over those clients alone whose rank is above i.

    Where padded zeros are averaged, or whole products, slices that few clients hold shrink (Chen et al. 2024, "RBLA",
    arXiv 2408.08699; Wu et al. 2026, "raFLoRA", arXiv 2602.13486). Slices that nobody holds stay as they are (but a
    server optimiser with a memory moves them on). With one rank for all this is `fedavg`, to the bit; and like it a
    sum, so that the server's memory does not grow with the clients.

    Args:
        scaling: the scale of a product by its rank.
        weighting: the clients' parts of each slice.
    """
    whole = fedavg(weighting).reduce

    def start(state: ServerState) -> _Slices:
        rank = rank_of(state)
        return _Slices(rank, whole.start(state), torch.zeros(rank, dtype=torch.float64))

    def add(acc: _Slices, update: Update) -> _Slices:
        check_rank("rank_slices", acc.rank, update, "mixed")
        scale = scaling(update.rank) / scaling(acc.rank)
        padded = {m: lora.resize(Factors(d.b * scale, d.a), acc.rank) for m, d in lora.split(update.delta).items()}
        acc.weight[: update.rank] += update.weight if weighting == "tokens" else 1.0
        return acc._replace(padded=whole.add(acc.padded, update._replace(delta=lora.join(padded), rank=acc.rank)))

    def finish(state: ServerState, acc: _Slices, rng: Generator) -> Gradient:
        mean = lora.split(whole.finish(state, acc.padded, rng).adapter)
        # The mean has divided by the weight of all, which is that of the first slice.
        more = torch.where(acc.weight > 0, acc.weight[0] / acc.weight, 0.0)
        return Gradient(
            lora.join({m: Factors((f.b * more).float(), (more[:, None] * f.a).float()) for m, f in mean.items()})
        )

    return Aggregator(Reducer(start, add, finish), plain_step, payload_of_rank(scaling), needs="sum", ranks="mixed")
