"""Chooses in each round between averaging A and B apart and averaging products exactly, by the gauge of that round."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field
from torch import Generator

from apiary.core.lora import Scaling
from apiary.core.messages import Update
from strategies import averaging_error
from strategies.aggregator import AGGREGATORS, Aggregator, Gradient, Reducer, ServerState, plain_step, product_step
from strategies.fedavg import fedavg
from strategies.flexlora import flexlora
from strategies.products import Weighting, each, payload_of_rank, rank_of


@AGGREGATORS.register("auto")
def auto(
    scaling: Scaling, seed: int, weighting: Weighting = "tokens", threshold: Annotated[float, Field(ge=0)] = 0.1
) -> Aggregator:
    """`fedavg` while what it misses of the clients' mean change is small, the delta form of `flexlora` above.

    What it misses is the gauge of the error (`strategies.averaging_error`) of the round's own updates. Both aim at
    the same mean of products; below the threshold the cheap way is as good as there, and keeps the factors in their
    basis.

    A round with a client of a lower rank always goes to `flexlora`. `rank_slices` is no stand-in for `fedavg` there: it
    averages each slice over those who hold it, which is another mean than the gauge measures the distance to, and only
    the singular value decomposition puts the best directions first, where a client of a lower rank gets them.

    Args:
        scaling: the scale of a product by its rank.
        seed: the run's.
        weighting: the clients' parts of the round.
        threshold: the gauge from which on products are averaged; 0 = always, and then it is `flexlora`.
    """
    measure = averaging_error.exact_if_few(scaling, weighting)
    apart, exactly = fedavg(weighting).reduce, flexlora(scaling, weighting).reduce

    def finish(state: ServerState, updates: Sequence[Update]) -> Gradient:
        if all(update.rank == rank_of(state) for update in updates):
            acc = measure.start(state, averaging_error.probes_of(seed, state.round + 1))
            for update in updates:
                acc = measure.add(acc, update)
            if measure.finish(state, acc).relative < threshold:
                return _fold(apart, state, updates)._replace(method="fedavg", space="factors")
        return _fold(exactly, state, updates)._replace(method="flexlora")

    def step(state: ServerState, gradient: Gradient) -> ServerState:
        return plain_step(state, gradient) if gradient.space == "factors" else product_step(state, gradient)

    return Aggregator(
        each("auto", "mixed", finish),
        step,
        payload_of_rank(scaling),
        needs="each",
        space="products",
        ranks="mixed",
        trains=("both",),
        averages="sometimes",
        threshold=threshold,
    )


def _fold(reduce: Reducer, state: ServerState, updates: Sequence[Update]) -> Gradient:
    acc = reduce.start(state)
    for update in updates:
        acc = reduce.add(acc, update)
    return reduce.finish(state, acc, Generator())
