"""SCAFFOLD: averaging that corrects each client's steps by how its data differ from everybody's.

Karimireddy et al. 2020 (arXiv 1910.06378), algorithm 1 with option II. A client's control variate c_k stays on its own
disk, and nothing of it travels up: with option II it follows from the change of the adapter, which the server has.

A change that was sent may be lost on its way, and then the server's mean lacks it. So a client goes on from the
variate of the last round in which the server says that its answer counted, whatever it has computed since.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from apiary.core.errors import StateLost
from apiary.core.messages import ClientInfo, Payload, Update
from apiary.core.tensors import StateDict, subtract
from strategies.aggregator import AGGREGATORS, Aggregator, Gradient, Reducer, ServerState, plain_step
from strategies.fedavg import fedavg, merged
from strategies.local import Client, Hooks, LocalAlgorithm, Opened

_CONTROL = "control."


class _Fold(NamedTuple):
    moved: Any  # the accumulator of the mean change
    slopes: Any  # that of the changes over each client's sum of learning rates; idle where all have the same
    corrected: int  # updates with a control variate
    control: StateDict  # the one that corrected them
    lr_sum: float  # of the newest of them


@AGGREGATORS.register("scaffold")
def scaffold(alike: bool = False) -> Aggregator:
    """SCAFFOLD with control variates of option II (Karimireddy et al. 2020, arXiv 1910.06378, algorithm 1).

    A client steps along g + c - c_k, where c_k is about its own gradient and c the mean of all clients'. At the server:
    x += 1/|S| sum_S (y_k - x), and c += 1/N sum_S (c_k' - c_k), with S the clients that answered and N all that the run
    knows. Clients count alike, whatever `strategy.weighting` says: c is the plain mean. The paper's global step size is
    `strategy.server_optimizer` = "plain".

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
        if not update.extra:
            return acc._replace(moved=moved)
        if alike and acc.corrected:
            _check_alike(acc.lr_sum, update.lr_sum)
        slopes = weighted.add(acc.slopes, update._replace(weight=1 / update.lr_sum))
        return _Fold(moved, slopes, acc.corrected + 1, update.extra, update.lr_sum)

    def finish(state: ServerState, acc: _Fold, rng: Generator) -> Gradient:
        made = mean.finish(state, acc.moved, rng).adapter
        if not acc.corrected:
            return Gradient(made)
        slope = made if alike else weighted.finish(state, acc.slopes, rng).adapter
        total = acc.corrected / acc.lr_sum if alike else acc.slopes.weight
        change = {_CONTROL + n: (t * -total).sub_(acc.control[n], alpha=acc.corrected) for n, t in slope.items()}
        return Gradient(made, memory=change)

    def step(state: ServerState, gradient: Gradient) -> ServerState:
        before = {name: state.memory[name] for name in gradient.memory if name in state.memory}
        return plain_step(state, gradient)._replace(
            memory={**state.memory, **gradient.memory, **{n: t + gradient.memory[n] for n, t in before.items()}}
        )

    # Rounds of B and A in turns would measure a gradient of zero for the half that rests.
    return Aggregator(
        Reducer(start, take, finish, merge=functools.partial(_merged, alike)),
        step,
        _payload,
        needs="sum",
        trains=("both", "b"),
        extra=True,
        local=LOCAL,
        averages="always",
    )


def _merged(alike: bool, one: _Fold, other: _Fold) -> _Fold:
    newest = other if other.corrected else one
    if alike and one.corrected and other.corrected:
        _check_alike(one.lr_sum, other.lr_sum)
    moved, slopes = merged(one.moved, other.moved), merged(one.slopes, other.slopes)
    return _Fold(moved, slopes, one.corrected + other.corrected, newest.control, newest.lr_sum)


def _check_alike(one: float, other: float) -> None:
    if one != other:
        raise ValueError(f"scaffold: clients that should walk alike went {one:g} and {other:g}")


def _payload(state: ServerState, client: ClientInfo) -> Payload:
    """The adapter, and beside it c, the mean of all clients' control variates."""
    control = {name: _sum(state.memory, name, tensor) / client.clients for name, tensor in state.adapter.items()}
    return Payload(state.adapter, state.base_delta, control)


def _sum(memory: Mapping[str, Tensor], name: str, like: Tensor) -> Tensor:
    return memory.get(_CONTROL + name, torch.zeros_like(like))


def _open(state: StateDict, payload: Payload, client: Client) -> Opened:
    """The correction c - c_k of each step's gradient; none where a client is only measured, and is sent no c."""
    return Opened(payload.adapter, Hooks(correction=subtract(payload.extra, _own(state, payload))))


def _settle(state: StateDict, payload: Payload, delta: StateDict, lr_sum: float) -> StateDict:
    """The control variate that a visit leads to: c_k' = c_k - c + (x - y) / sum_t lr_t.

    With stochastic gradient descent, whose step is lr_t (g_t + c - c_k), this is the mean of the gradients g_t that the
    visit saw, weighted by their learning rates: with clipping, of the clipped ones. The paper has one learning rate,
    whose sum is K lr. `delta` is y - x as the server has it.
    """
    return {name: own - payload.extra[name] - delta[name] / lr_sum for name, own in _own(state, payload).items()}


def _own(state: StateDict, payload: Payload) -> dict[str, Tensor]:
    """c_k as the server knows it, zero at first.

    Raises:
        StateLost: the server's sum holds one that is gone here, and would hold it twice for ever.
    """
    if payload.extra and payload.last_round and not state:
        raise StateLost(
            f"its control variate of round {payload.last_round} is gone from its disk, and the server's mean still "
            "holds it; with scaffold it cannot take part in this run again"
        )
    return {name: state.get(name, torch.zeros_like(c)) for name, c in payload.extra.items()}


LOCAL = LocalAlgorithm(_open, settle=_settle, keeps="control", resumes="counted", by_rates=True)
