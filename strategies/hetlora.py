"""HetLoRA: clients of several ranks, with sparsity-weighted averaging and rank self-pruning (Cho et al. 2024).

A client of rank r that prunes looks at its tail: in all modules the columns of B and rows of A beyond floor(gamma r). A
penalty on the tail is part of its loss, and where a visit leaves the tail smaller than it was, the client cuts it off,
sends what is left, and has that lower rank from then on. The server sends each client the rank that it sent last, so
nothing has to be remembered at the client.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from apiary.core import lora
from apiary.core.errors import UserError
from apiary.core.lora import Factors, Scaling
from apiary.core.messages import Payload, Update
from apiary.core.tensors import StateDict, add
from strategies.aggregator import (
    AGGREGATORS,
    Aggregator,
    Gradient,
    ServerState,
    plain_step,
)
from strategies.local import NOTHING, PLAIN, Client, Hooks, LocalAlgorithm, Opened
from strategies.products import (
    each,
    missing,
    padded_sum,
    payload_of_rank,
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

    With `prune` the clients lower their own ranks as they train, as this file's head says.

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

    def finish(state: ServerState, updates: Sequence[Update]) -> Gradient:
        if not updates:
            raise ValueError("the round has no update")
        split = [lora.split(update.delta) for update in updates]
        held = lora.split(state.adapter)
        return Gradient(
            lora.join(
                {m: _mean(factors, [deltas[m] for deltas in split], scaling, form) for m, factors in held.items()}
            )
        )

    reduce = each("hetlora", "mixed", finish)
    aggregator = Aggregator(
        reduce,
        plain_step,
        payload_of_rank(scaling),
        needs="each",
        ranks="mixed",
        prunes=prune > 0,
        local=_pruning(scaling, prune, penalty) if prune else PLAIN,
    )
    # Where padded zeros count, a factor that clients hold fixed would shrink all the same.
    return aggregator if form == "delta" else aggregator._replace(trains=("both",))


def _mean(held: Factors, deltas: Sequence[Factors], scaling: Scaling, form: str) -> Factors:
    """The change of one module's factors: padded, and weighted by the norms of the clients' products."""
    deltas = [Factors(d.b * (scaling(d.rank) / scaling(held.rank)), d.a) for d in deltas]
    norms = [lora.norm(Factors(held.b[:, : d.rank] + d.b, held.a[: d.rank] + d.a)) for d in deltas]
    total = math.fsum(norms)
    weights = [norm / total if total else 1 / len(norms) for norm in norms]
    b = padded_sum([d.b.T for d in deltas], weights, held.b.T)
    a = padded_sum([d.a for d in deltas], weights, held.a)
    if form == "absolute":
        share = missing(deltas, weights, held.rank)[:, None]
        b, a = b - share * held.b.T, a - share * held.a
    return Factors(b.T.float().contiguous(), a.float())


def _pruning(scaling: Scaling, gamma: float, penalty: float) -> LocalAlgorithm:
    """The client's half with self-pruning: a penalty on the tail, and a finished change that may lose it."""

    def open_(state: StateDict, payload: Payload, client: Client) -> Opened:
        most = kept_rank(client.rank, gamma)
        if not penalty or most == client.rank:
            return Opened(payload.adapter)
        return Opened(payload.adapter, Hooks(penalties=(lambda adapter: penalty * tail(adapter, most),)))

    def finish(start: StateDict, delta: dict[str, Tensor]) -> tuple[dict[str, Tensor], StateDict]:
        return pruned(start, delta, gamma, scaling), NOTHING

    return LocalAlgorithm(open_, finish, rank=lambda factors, rank: min(rank, _rank(factors)))


def kept_rank(rank: int, gamma: float) -> int:
    """The rank without its tail: floor(gamma r), at least 1."""
    return max(1, math.floor(gamma * rank))


def tail(adapter: Mapping[str, Tensor], rank: int) -> Tensor:
    """The sum over the modules of ||B[:, rank:]||_F ||A[rank:, :]||_F, a scalar."""
    return torch.stack([f.b[:, rank:].norm() * f.a[rank:].norm() for f in lora.split(adapter).values()]).sum()


def pruned(start: StateDict, delta: dict[str, Tensor], gamma: float, scaling: Scaling) -> dict[str, Tensor]:
    """What is sent of a change: all of it, or its leading slices where the tail became smaller.

    The change is then one from the leading slices of `start`, at the scale of the lower rank.

    Args:
        start: the adapter that was received, of rank r.
        delta: its change by the visit.
        gamma: the part of its rank that a client keeps when it prunes.
        scaling: the scale of a product by its rank.
    """
    rank = _rank(delta)
    most = kept_rank(rank, gamma)
    if most == rank or tail(add(start, delta), most) >= tail(start, most):
        return delta
    scale = scaling(rank) / scaling(most)
    return lora.join(
        {
            m: Factors((f.b[:, :most] * scale).contiguous(), f.a[:most].contiguous())
            for m, f in lora.split(delta).items()
        }
    )


def _rank(factors: StateDict) -> int:
    return next(iter(lora.split(factors).values())).rank
