"""SCAFFOLD: averaging that corrects each client's steps by how its data differ from everybody's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Generator, Tensor

from apiary.exchange import ClientInfo, Payload, Update
from apiary.tensors import StateDict, add, zeros_like
from strategies.average import fedavg
from strategies.core import AGGREGATORS, Aggregator, Gradient, Reducer, ServerState, plain_step

_CONTROL = "control."


@AGGREGATORS.register("scaffold")
def scaffold() -> Aggregator:
    """SCAFFOLD with control variates of option II (Karimireddy et al. 2020, arXiv 1910.06378, algorithm 1).

    A client steps along g + c - c_k, where c_k is about its own gradient and c the mean of all clients'; its part of
    the work is in `client.control`. Here: x += 1/|S| sum_S (y_k - x), and c += 1/N sum_S (c_k' - c_k), with S the
    clients that answered and N all that the run knows. Clients count alike, whatever `strategy.weighting` says: c is
    the plain mean. The paper's global step size is `strategy.server_optimizer` = "plain".

    The state's memory keeps the sum of all c_k, not their mean: so c stays the mean when clients join. Whoever has not
    trained yet counts with c_k = 0. Both ways the control variates take as many bytes again as the adapter, in float32.
    """
    mean = fedavg("uniform").reduce

    def start(state: ServerState) -> Any:
        return mean.start(state._replace(adapter=_both(state.adapter, zeros_like(state.adapter))))

    def take(acc: Any, update: Update) -> Any:
        control = update.control or zeros_like(update.delta)  # without one, it is as it was
        return mean.add(acc, update._replace(delta=_both(update.delta, control), control={}))

    def finish(state: ServerState, acc: Any, rng: Generator) -> Gradient:
        made = mean.finish(state, acc, rng).adapter
        controls = {name: tensor * acc.weight for name, tensor in made.items() if name.startswith(_CONTROL)}
        return Gradient({name: made[name] for name in state.adapter}, memory=controls)

    def step(state: ServerState, gradient: Gradient) -> ServerState:
        before = {name: state.memory.get(name, torch.zeros_like(t)) for name, t in gradient.memory.items()}
        return plain_step(state, gradient)._replace(memory={**state.memory, **add(before, gradient.memory)})

    def payload(state: ServerState, client: ClientInfo) -> Payload:
        control = {name: _sum(state.memory, name, tensor) / client.clients for name, tensor in state.adapter.items()}
        return Payload(state.adapter, state.base_delta, control)

    # Rounds of B and A in turns would measure a gradient of zero for the half that rests.
    return Aggregator(Reducer(start, take, finish), step, payload, needs="sum", trains=("both", "b"))


def _both(adapter: StateDict, control: StateDict) -> dict[str, Tensor]:
    return {**adapter, **{_CONTROL + name: tensor for name, tensor in control.items()}}


def _sum(memory: Mapping[str, Tensor], name: str, like: Tensor) -> Tensor:
    return memory.get(_CONTROL + name, torch.zeros_like(like))
