"""HetLoRA: clients of several ranks, with sparsity-weighted averaging and rank self-pruning (Cho et al. 2024)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from apiary.core import lora
from apiary.core.errors import UserError
from apiary.core.lora import Factors, Scaling
from apiary.core.messages import Update
from strategies.aggregator import (
    AGGREGATORS,
    Aggregator,
    Gradient,
    ServerState,
    plain_step,
)
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
        b = padded_sum([d.b.T for d in deltas], weights, held.b.T)
        a = padded_sum([d.a for d in deltas], weights, held.a)
        if form == "absolute":
            share = missing(deltas, weights, held.rank)[:, None]
            b, a = b - share * held.b.T, a - share * held.a
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
