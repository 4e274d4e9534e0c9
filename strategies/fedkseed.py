"""FedKSeed: the model is a start and a pool of scalars, of which alone anything travels (Qin et al. 2024).

`strategies.seed_scalars` has the mathematics that both sides share.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Generator, Tensor

from apiary.core.messages import ClientInfo, Payload
from apiary.core.tensors import StateDict
from strategies import seed_scalars
from strategies.aggregator import AGGREGATORS, Aggregator, Gradient, Reducer, ServerState
from strategies.fedavg import fedavg
from strategies.local import Client, Descent, Hooks, LocalAlgorithm, Loss, Opened
from strategies.products import Weighting

_START = "start."


@AGGREGATORS.register("fedkseed")
def fedkseed(
    seed: int,
    weighting: Weighting = "tokens",
    candidates: Annotated[int, Field(ge=1, le=65535)] = seed_scalars.CANDIDATES,
    epsilon: Annotated[float, Field(gt=0, allow_inf_nan=False)] = seed_scalars.EPSILON,
) -> Aggregator:
    """FedKSeed: clients train without gradients, along directions that a seed stands for (Qin et al. 2024).

    What travels is a scalar for each of the candidate seeds, down and up, whatever the size of the adapter: see
    `strategies.seed_scalars`. A client makes two forward passes a step and keeps no activations, so its memory is that
    of using the model. At the server the clients' scalars are averaged on top of those of earlier rounds, and the
    adapter is rebuilt from its start. Directions span the adapter, not the whole model as in the paper.

    Args:
        seed: the run's; the candidates follow from it.
        weighting: the clients' parts of the round.
        candidates: how many seeds; each takes 4 bytes down.
        epsilon: how far a step looks along its direction.
    """
    seeds, mean = seed_scalars.candidates(seed, candidates), fedavg(weighting).reduce

    def start(state: ServerState) -> Any:
        return mean.start(state._replace(adapter={seed_scalars.NAME: torch.zeros(len(seeds))}))

    def finish(state: ServerState, acc: Any, rng: Generator) -> Gradient:
        return Gradient(
            {seed_scalars.NAME: seed_scalars.snapped(mean.finish(state, acc, rng).adapter[seed_scalars.NAME])}
        )

    def step(state: ServerState, gradient: Gradient) -> ServerState:
        change = seed_scalars.of_tensor(gradient.adapter[seed_scalars.NAME], seeds)
        whole = seed_scalars.added(seed_scalars.of_tensor(_pool(state), seeds), change)
        first = {name.removeprefix(_START): t for name, t in state.memory.items() if name.startswith(_START)}
        begun = first or dict(state.adapter)
        memory = {_START + name: tensor for name, tensor in begun.items()}
        return state._replace(
            round=state.round + 1,
            adapter=seed_scalars.rebuild(begun, whole),
            memory={**memory, seed_scalars.NAME: seed_scalars.to_tensor(whole, seeds)},
        )

    def payload(state: ServerState, client: ClientInfo) -> Payload:
        return Payload({seed_scalars.NAME: _pool(state)}, {})

    def _pool(state: ServerState) -> Tensor:
        return state.memory.get(seed_scalars.NAME, torch.zeros(len(seeds)))

    return Aggregator(
        Reducer(start, mean.add, finish, merge=mean.merge),
        step,
        payload,
        needs="sum",
        trains=("both",),
        scalars=len(seeds),
        local=_local(seeds, epsilon),
    )


def _local(seeds: tuple[int, ...], epsilon: float) -> LocalAlgorithm:
    """The client's half: the adapter rebuilt from its scalars, and steps of which scalars alone are sent."""

    def open_(state: StateDict, payload: Payload, client: Client) -> Opened:
        scalars = seed_scalars.of_tensor(payload.adapter[seed_scalars.NAME], seeds)
        return Opened(seed_scalars.rebuild(client.fresh(), scalars), Hooks(descend=descend))

    def descend(losses: Iterable[tuple[Loss, float]], start: StateDict, rng: Generator) -> Descent:
        try:
            descent = seed_scalars.descend(losses, start, seeds, epsilon=epsilon, rng=rng)
        except seed_scalars.TooFar as error:
            raise FloatingPointError(str(error)) from error
        return Descent({seed_scalars.NAME: seed_scalars.to_tensor(descent.scalars, seeds)}, descent.skipped)

    # A visit has scalars for few of the seeds.
    return LocalAlgorithm(open_, gradient_free=True, codec="sparse")
