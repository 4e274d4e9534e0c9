"""Each slice of the adapter averaged over the clients whose rank reaches it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from apiary.core import lora
from apiary.core.lora import Factors, Scaling
from apiary.core.messages import Update
from strategies.aggregator import (
    AGGREGATORS,
    Aggregator,
    Gradient,
    Reducer,
    ServerState,
    plain_step,
)
from strategies.fedavg import fedavg, merged
from strategies.products import (
    Weighting,
    check_rank,
    payload_of_rank,
    rank_of,
)


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

    def merge(one: _Slices, other: _Slices) -> _Slices:
        return _Slices(one.rank, merged(one.padded, other.padded), one.weight + other.weight)

    reduce = Reducer(start, add, finish, merge=merge)
    return Aggregator(reduce, plain_step, payload_of_rank(scaling), needs="sum", ranks="mixed")
