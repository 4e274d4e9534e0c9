"""FLoRA: clients' factors stacked and folded into the base (Wang et al. 2024)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from apiary.core import lora
from apiary.core.lora import Scaling
from apiary.core.tensors import StateDict, generator
from strategies.aggregator import (
    AGGREGATORS,
    Aggregator,
    Gradient,
    ServerState,
)
from strategies.products import (
    Rank,
    Weighting,
    add_to_base,
    payload_of_rank,
    product_reducer,
)


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

    def ranks(rounds: int, cohort: int, mean_rank: float) -> float:
        return min(rounds * cohort * mean_rank, base_rank or math.inf)

    reduce = product_reducer("flora", scaling, weighting)
    return Aggregator(
        reduce,
        step,
        payload_of_rank(scaling),
        needs="each",
        space="products",
        ranks="mixed",
        trains=("both", "b"),  # in an adapter whose B is zero, a round of A alone learns nothing
        renews=True,
        base_rank=ranks,
        recovers="bounded" if base_rank else "all",
    )


def _renewed(adapter: StateDict, seed: int, number: int) -> dict[str, Tensor]:
    """An adapter that changes nothing yet, as a run begins with, but another one in each round."""
    fresh = {name: torch.zeros_like(tensor) for name, tensor in adapter.items()}
    for name, tensor in fresh.items():
        if not lora.is_b(name):
            bound = tensor.shape[1] ** -0.5  # Kaiming-uniform with a = sqrt(5)
            tensor.uniform_(-bound, bound, generator=generator(seed, "adapter", number, name))
    return fresh
