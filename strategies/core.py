"""The contract of an aggregation method, written once.

A method is a value: a `Reducer` that folds the cohort's updates into one pseudo-gradient as they arrive, a `step` that
applies it to the server's state, and a `payload` that says what a client receives. Nothing here knows Flower.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from torch import Generator

from apiary.exchange import ClientInfo, Payload, Update
from apiary.registry import Registry
from apiary.tensors import StateDict, add


class ServerState(NamedTuple):
    """Everything a round leaves behind at the server; saving it is saving the run."""

    round: int  # finished rounds
    adapter: StateDict
    base_delta: StateDict  # low-rank factors to fold into the base; empty for most methods
    memory: StateDict  # a method's own tensors, such as momentum


class Reducer(NamedTuple):
    """A fold over the updates of one round.

    The accumulator belongs to the fold, so `add` may work in place; `finish` returns the pseudo-gradient, named and
    shaped like the adapter (CPU float32).
    """

    start: Callable[[ServerState], Any]
    add: Callable[[Any, Update], Any]
    finish: Callable[[ServerState, Any, Generator], StateDict]


class Aggregator(NamedTuple):
    """An aggregation method.

    `needs` says whether the sum of the updates is enough ("sum", which secure aggregation can give and which keeps
    server memory constant in the number of clients) or each one must be seen ("each").
    """

    reduce: Reducer
    step: Callable[[ServerState, StateDict], ServerState]
    payload: Callable[[ServerState, ClientInfo], Payload]
    needs: Literal["sum", "each"]


AGGREGATORS: Registry[Aggregator] = Registry("strategy.name", "strategy.options")


def plain_step(state: ServerState, gradient: StateDict) -> ServerState:
    """The next state: the pseudo-gradient added to the adapter with step size 1."""
    return state._replace(round=state.round + 1, adapter=add(state.adapter, gradient))


def same_payload(state: ServerState, client: ClientInfo) -> Payload:
    """The server's adapter as it is, whoever the client is."""
    return Payload(state.adapter, state.base_delta)
