"""FedALT: each client trains an adapter of its own beside the frozen mean of the others'.

Bian et al. 2025 (arXiv 2503.11880). Client i goes on with its individual adapter (A_i, B_i) round after round; it
is never set back to an average. Beside it stands the rest-of-world adapter (A_R, B_R), the mean of A_j and that of B_j
over all other clients j, which a visit does not move. Each adapted layer weighs the two by its input x, with a mixer
that the client trains and keeps:

    y = W x + alpha(x) s B_i A_i x + (1 - alpha(x)) s B_R A_R x,   alpha(x) = softmax(G x)_1

Of the mixer G (2, d_in) only the difference of its rows counts, a gate g of (1, d_in): alpha(x) = sigmoid(<g, x>). It
begins at zero, where both count for a half.

The server keeps no adapter of a client and makes no rest-of-world adapter. It knows M, the mean of all N individual
adapters, which each round's changes move by their sum over N; all clients begin at the run's first adapter, and whoever
has not trained yet stands in M with that. A client takes itself out: (N M - theta_i) / (N - 1), with theta_i its A_i or
B_i. So M must hold exactly what the client holds: it goes on from the last round that the server says has counted, with
its change as it arrived and with the gates of that visit.

The part in M of a client that is not asked in a round is that of its last visit that counted.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from apiary.core import lora
from apiary.core.errors import StateLost
from apiary.core.lora import Scaling
from apiary.core.messages import ClientInfo, Payload, Update
from apiary.core.tensors import StateDict, add, subtract
from strategies.aggregator import AGGREGATORS, Aggregator, Gradient, Reducer, ServerState, plain_step
from strategies.fedavg import fedavg, merged
from strategies.local import Client, LocalAlgorithm, Opened

_CLIENTS = "clients"  # N, in payloads and in a state's memory
_FIRST = "first."  # of the adapter that the run began with, in a state's memory


class _Fold(NamedTuple):
    moved: Any  # the accumulator of the sum of the changes
    clients: int  # N, as the clients of the round were told


@AGGREGATORS.register("fedalt")
def fedalt(scaling: Scaling) -> Aggregator:
    """FedALT: each client's own adapter, weighed by the input against the mean of all others'.

    The server's adapter is M = 1/N sum_i theta_i over all N clients that the run knows, the mean of the individual
    adapters (Bian et al. 2025, arXiv 2503.11880): M += 1/N sum_S delta_i, with S the clients that answered. Clients
    count alike. M is what `adapter/` holds at the end, for who has no other; it is no client's model. The row
    `federated` of the run's table is the mean of the clients' own models, gates and all.

    Down goes M and the number N, up the change of the individual adapter: as many bytes as with federated averaging.
    Gates do not travel. The state's memory keeps the first adapter M_0 and N. When a client joins, N grows to N', and M
    is the mean with one more that has not moved: M_0 + (M - M_0) N / N'.

    Args:
        scaling: the scale of a product by its rank.
    """
    mean = fedavg("uniform").reduce

    def start(state: ServerState) -> _Fold:
        return _Fold(mean.start(state), 0)

    def take(acc: _Fold, update: Update) -> _Fold:
        told = int(update.extra[_CLIENTS]) if update.extra else 0
        return _Fold(mean.add(acc.moved, update), max(acc.clients, told))

    def finish(state: ServerState, acc: _Fold, rng: Generator) -> Gradient:
        # One that joined after the payload was made may have answered too.
        clients = max(acc.clients, round(acc.moved.weight))
        whole = acc.moved._replace(weight=float(clients))
        return Gradient(mean.finish(state, whole, rng).adapter, memory={_CLIENTS: _count(clients)})

    def opened(kept: StateDict, received: Payload, client: Client) -> Opened:
        own = _individual(kept, received, client)
        gates = {name: kept.get(name, torch.zeros(shape)) for name, shape in _gates(client).items()}
        rest = _rest(received, own)
        scale = scaling(client.rank)
        base = {name: t * scale if lora.is_b(name) else t for name, t in rest.items()}
        return Opened({**own, **gates}, base_delta={**received.base_delta, **base})

    local = LocalAlgorithm(
        opened,
        _finish,
        settle=_settle,
        keeps="individual",
        resumes="counted",
        mixes=True,
        reaches=True,
        personal="Clients train adapters of their own, and each weighs its own by the input against all others'",
    )
    reduce = Reducer(start, take, finish, merge=_merged)
    return Aggregator(reduce, _step, _payload, needs="sum", trains=("both",), local=local)


def _merged(one: _Fold, other: _Fold) -> _Fold:
    return _Fold(merged(one.moved, other.moved), max(one.clients, other.clients))


def _step(state: ServerState, gradient: Gradient) -> ServerState:
    clients = gradient.memory[_CLIENTS]
    first = {name: t for name, t in state.memory.items() if name.startswith(_FIRST)}
    begun = first or {_FIRST + name: t for name, t in state.adapter.items()}
    moved = state._replace(adapter=_mean(state, int(clients)))
    return plain_step(moved, gradient)._replace(memory={**begun, _CLIENTS: clients})


def _payload(state: ServerState, client: ClientInfo) -> Payload:
    return Payload(_mean(state, client.clients), state.base_delta, {_CLIENTS: _count(client.clients)})


def _count(clients: int) -> Tensor:
    return torch.tensor(float(clients))


def _mean(state: ServerState, clients: int) -> StateDict:
    """M over so many clients, those that have joined since the last step at the first adapter."""
    held = int(state.memory.get(_CLIENTS, _count(clients)))
    if held == clients:
        return state.adapter
    first = {name: state.memory[_FIRST + name] for name in state.adapter}
    return add(first, subtract(state.adapter, first), held / clients)


def _rest(payload: Payload, own: StateDict) -> StateDict:
    """The mean of all other clients' factors, (N M - theta_i) / (N - 1); without others the own A and B = 0.

    As M + (M - theta_i) / (N - 1), in which nothing is multiplied by N and taken away again.
    """
    clients = int(payload.extra[_CLIENTS])
    if clients < 2:
        return {name: torch.zeros_like(t) if lora.is_b(name) else t for name, t in own.items()}
    return add(payload.adapter, subtract(payload.adapter, own), 1 / (clients - 1))


def _gates(client: Client) -> dict[str, tuple[int, int]]:
    return {
        lora.gate_name(lora.module_of(name)): (1, shape[1])
        for name, shape in client.shapes.items()
        if not lora.is_b(name)
    }


# -- what a client keeps: how far its individual adapter has come from the run's first one, and its gates ------------


def _individual(kept: StateDict, payload: Payload, client: Client) -> dict[str, Tensor]:
    """theta_i as the server has counted it, at first that of the run.

    Raises:
        StateLost: the server's mean holds one that is gone here.
    """
    if payload.last_round and not kept:
        raise StateLost(
            f"its individual adapter of round {payload.last_round} is gone from its disk, and the server's mean still "
            "holds it; with fedalt it cannot take part in this run again"
        )
    return {name: t + kept[name] if name in kept else t for name, t in client.fresh().items()}


def _finish(start: StateDict, delta: dict[str, Tensor]) -> tuple[dict[str, Tensor], StateDict]:
    sent, _ = lora.ungated(delta)
    return sent, {name: start[name] + d for name, d in delta.items() if lora.is_gate(name)}


def _settle(state: StateDict, payload: Payload, delta: StateDict, lr_sum: float) -> StateDict:
    return {name: state[name] + d if name in state else d for name, d in delta.items()}
