"""SCAFFOLD: averaging that corrects each client's steps by how its data differ from everybody's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from apiary.core.messages import ClientInfo, Payload, Update
from apiary.core.tensors import StateDict
from strategies.aggregator import AGGREGATORS, Aggregator, Gradient, Reducer, ServerState, plain_step
from strategies.fedavg import fedavg

_CONTROL = "control."


class _Fold(NamedTuple):
    moved: Any  # the accumulator of the mean change
    slopes: Any  # that of the changes over how far each client walked; idle where all walk as far
    corrected: int  # updates with a control variate
    control: StateDict  # the one that corrected them
    walked: float  # of the newest of them


@AGGREGATORS.register("scaffold")
def scaffold(alike: bool = False) -> Aggregator:
    """SCAFFOLD with control variates of option II (Karimireddy et al. 2020, arXiv 1910.06378, algorithm 1).

    A client steps along g + c - c_k, where c_k is about its own gradient and c the mean of all clients'; its part of
    the work is in `client.control`. Here: x += 1/|S| sum_S (y_k - x), and c += 1/N sum_S (c_k' - c_k), with S the
    clients that answered and N all that the run knows. Clients count alike, whatever `strategy.weighting` says: c is
    the plain mean. The paper's global step size is `strategy.server_optimizer` = "plain".

    Option II says c_k' - c_k = (x - y_k) / w_k - c, with w_k the sum of the client's learning rates. The server knows
    all of that, so that nothing but the change of the adapter travels up. Down goes c, as large as the adapter.

    The state's memory keeps the sum of all c_k, not their mean: so c stays the mean when clients join. Whoever has not
    trained yet counts with c_k = 0.

    Args:
        alike: whether all clients walk as far in a round, as where `train.steps` says how many steps they make. One sum
            serves both means then.
    """
    mean, weighted = fedavg("uniform").reduce, fedavg("tokens").reduce

    def start(state: ServerState) -> _Fold:
        nothing = state._replace(adapter={}) if alike else state
        return _Fold(mean.start(state), weighted.start(nothing), 0, {}, 0.0)

    def take(acc: _Fold, update: Update) -> _Fold:
        moved = mean.add(acc.moved, update)
        if not update.control:
            return acc._replace(moved=moved)
        if alike and acc.corrected and acc.walked != update.walked:
            raise ValueError(f"scaffold: clients that should walk alike went {acc.walked:g} and {update.walked:g}")
        slopes = weighted.add(acc.slopes, update._replace(weight=1 / update.walked))
        return _Fold(moved, slopes, acc.corrected + 1, update.control, update.walked)

    def finish(state: ServerState, acc: _Fold, rng: Generator) -> Gradient:
        made = mean.finish(state, acc.moved, rng).adapter
        if not acc.corrected:
            return Gradient(made)
        slope = made if alike else weighted.finish(state, acc.slopes, rng).adapter
        total = acc.corrected / acc.walked if alike else acc.slopes.weight
        change = {_CONTROL + n: (t * -total).sub_(acc.control[n], alpha=acc.corrected) for n, t in slope.items()}
        return Gradient(made, memory=change)

    def step(state: ServerState, gradient: Gradient) -> ServerState:
        before = {name: state.memory[name] for name in gradient.memory if name in state.memory}
        return plain_step(state, gradient)._replace(
            memory={**state.memory, **gradient.memory, **{n: t + gradient.memory[n] for n, t in before.items()}}
        )

    def payload(state: ServerState, client: ClientInfo) -> Payload:
        control = {name: _sum(state.memory, name, tensor) / client.clients for name, tensor in state.adapter.items()}
        return Payload(state.adapter, state.base_delta, control)

    # Rounds of B and A in turns would measure a gradient of zero for the half that rests.
    return Aggregator(Reducer(start, take, finish), step, payload, needs="sum", trains=("both", "b"))


def _sum(memory: Mapping[str, Tensor], name: str, like: Tensor) -> Tensor:
    return memory.get(_CONTROL + name, torch.zeros_like(like))
