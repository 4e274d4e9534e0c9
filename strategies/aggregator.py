"""The contract of an aggregation method, written once.

The server's half of a method is a value: a `Reducer` that folds the cohort's updates into one pseudo-gradient as they
arrive, a `step` that applies it to the server's state, and a `payload` that says what a client receives. The client's
half (`strategies.local`) stands in it as `local`. Nothing here knows Flower.

The model that a state stands for is W + D + s_R B A, with B A the adapter of rank R, s_R its scale, and D the product
of `base_delta`, whose scale is 1. Clients may have lower ranks: what they hold is `of_rank` of the state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from torch import Generator, Tensor

from apiary.config.registry import Registry
from apiary.core import lora
from apiary.core.lora import Factors, Scaling
from apiary.core.messages import ClientInfo, Payload, Update
from apiary.core.tensors import StateDict, add
from strategies.local import PLAIN, LocalAlgorithm

ROOT = "server/root"  # the client name of the server's own update; no file and no site can have it
_NOTHING: StateDict = MappingProxyType({})
FLOOR = 3**-0.5  # the expected norm of a row of a Kaiming-uniform A, whatever its length


class ServerState(NamedTuple):
    """Everything a round leaves behind at the server; saving it is saving the run."""

    round: int  # finished rounds
    adapter: StateDict
    base_delta: StateDict  # low-rank factors to fold into the base, of scale 1; empty for most methods
    memory: StateDict  # a method's own tensors, such as momentum
    copies: StateDict = _NOTHING  # what clients hold of the adapter, where changes alone travel down

    @property
    def model(self) -> StateDict:
        """Adapter and base delta as one state, as `apiary.models.adapters.set_adapter` takes it."""
        return lora.whole(self.adapter, self.base_delta)


class Gradient(NamedTuple):
    """What a round would change (with step size 1), CPU float32.

    For a method in the space of factors `adapter` has the adapter's shapes and is added to it. For one in the space of
    products it holds factors of any rank, whose product is added to the adapter's (both in units of s_R).
    """

    adapter: StateDict
    base_delta: StateDict = _NOTHING  # factors whose product is added to that of the state's `base_delta`
    shares: Mapping[str, float] = MappingProxyType({})  # by client, the factor that its change got; empty: not told
    notes: Mapping[str, str] = MappingProxyType({})  # by client, why it was cut or counts for less than half
    memory: StateDict = _NOTHING  # the change of what the method keeps in the state's `memory`
    method: str = ""  # the one that made it, where the aggregator chooses among several
    space: Literal["factors", "products"] | None = None  # what it is, where the aggregator's differ; None: as it says
    told: Mapping[str, Any] = MappingProxyType({})  # more fields of the round's event, plain values


class Reducer(NamedTuple):
    """A fold over the updates of one round; the accumulator belongs to it, so `add` may work in place."""

    start: Callable[[ServerState], Any]
    add: Callable[[Any, Update], Any]
    finish: Callable[[ServerState, Any, Generator], Gradient]
    refused: Callable[[Any], Any] = lambda acc: acc  # told of each answer that no honest client would give
    # The accumulator of the updates of both, as if one had folded them all; None where each update must be seen.
    merge: Callable[[Any, Any], Any] | None = None


class Aggregator(NamedTuple):
    """An aggregation method.

    `needs` says whether the sum of the updates is enough ("sum", which secure aggregation can give, whose reducer can
    `merge`, and which keeps server memory constant in the number of clients) or each one must be seen ("each"). `space`
    says what its gradients are; server optimisers with a memory need "factors", for a product's factors have another
    basis each round. `ranks` says whether clients may have lower ranks than the server ("mixed").
    """

    reduce: Reducer
    step: Callable[[ServerState, Gradient], ServerState]
    payload: Callable[[ServerState, ClientInfo], Payload]
    needs: Literal["sum", "each"]
    space: Literal["factors", "products"] = "factors"
    ranks: Literal["one", "mixed"] = "one"
    trains: tuple[str, ...] = ("both", "b", "alternate")  # the values of `adapter.train` that it goes with
    renews: bool = False  # whether A is drawn anew in every round
    keeps: tuple[str, ...] = ()  # of "products": the values of `adapter.train` with which it does not factor anew
    fewest: int = 1  # answers of a round without which its promise means nothing
    scalars: int = 0  # how many scalars travel in place of an adapter; 0: an adapter does
    extra: bool = False  # whether its payloads have tensors of its own, as large as the adapter
    # The rank of what stands in the base, as (finished rounds, clients a round, their mean rank) -> rank.
    base_rank: Callable[[int, int, float], float] = lambda rounds, cohort, rank: 0.0
    prunes: bool = False  # whether clients may lower their own ranks as they train
    judges: bool = False  # whether its gradients tell the `shares` that clients got, and why one got little
    root: bool = False  # whether each fold must also get the server's own update, in the name of `ROOT`
    base: bool = False  # whether its gradients have a `base_delta` beside factors, which no server optimiser may scale
    # Of methods that send clients of one rank different payloads: the group of a client, all of whom get the same one;
    # None is a group too. None in its place: one payload for all clients of a rank.
    group: Callable[[ServerState, str], int | None] | None = None
    models: Callable[[ServerState], Mapping[str, StateDict]] = lambda state: {}  # beside the adapter, by folder name
    local: LocalAlgorithm = PLAIN  # the client's half
    # Whether its rounds average A and B apart and leave it at that; "sometimes" where it chooses by the round.
    averages: Literal["always", "sometimes", "never"] = "never"
    # Of the error of averaging apart: all, all but what bounds on ranks cut, what the adapter's rank can hold, nothing.
    recovers: Literal["all", "bounded", "rank", ""] = ""
    takes_one: bool = False  # whether it takes one client's change a round, and no other
    threshold: float | None = None  # of averaging "sometimes": the error from which on it no longer does


_TOLD = ("averages", "recovers", "takes_one", "threshold", "scalars")  # traits that stand in a run's log


def traits(aggregator: Aggregator) -> dict[str, str | bool | float | None]:
    """What a run's log tells of its method, as plain values, so that who reads it need not know methods by name."""
    return {name: getattr(aggregator, name) for name in _TOLD}


AGGREGATORS: Registry[Aggregator] = Registry(
    "strategy.name",
    "strategy.options",
    makes=Aggregator,
    elsewhere={
        "fedit": 'strategy.name = "fedavg"',
        "fedprox": 'train.penalties = [{ name = "fedprox", mu = 0.01 }]',
        "ffa": 'adapter.train = "b"',
        "rolora": 'adapter.train = "alternate"',
        "fedsa": 'adapter.share = "a"',
        "rfa": 'strategy.name = "geometric_median"',
        "diloco": 'strategy.server_optimizer = "nesterov"',
        "fedavgm": 'strategy.server_optimizer = "momentum"',
        "fedadam": 'strategy.server_optimizer = "adam"',
        "fedyogi": 'strategy.server_optimizer = "yogi"',
        "fedadagrad": 'strategy.server_optimizer = "adagrad"',
    },
    given=("scaling", "seed", "weighting", "alike"),
)


def plain_step(state: ServerState, gradient: Gradient) -> ServerState:
    """The next state: the pseudo-gradient added to the factors with step size 1."""
    return state._replace(round=state.round + 1, adapter=add(state.adapter, gradient.adapter))


def product_step(state: ServerState, gradient: Gradient) -> ServerState:
    """The next state: the pseudo-gradient added to the product, and the best factors of the adapter's rank for it."""
    change = lora.split(gradient.adapter)
    modules = {
        module: lora.balanced(lora.svd(lora.stack([held, change[module]]), held.rank), held.rank, FLOOR)
        for module, held in lora.split(state.adapter).items()
    }
    return state._replace(round=state.round + 1, adapter=lora.join(modules))


def same_payload(state: ServerState, client: ClientInfo) -> Payload:
    """The server's adapter as it is, whoever the client is."""
    return Payload(state.adapter, state.base_delta)


def of_rank(adapter: StateDict, rank: int, scaling: Scaling) -> dict[str, Tensor]:
    """What a client of a lower rank holds of the server's adapter: leading rows of A and columns of B.

    B is rescaled so that s_r B_r A_r is s_R times the product of the slices; A keeps the size that it begins with.

    Args:
        adapter: the server's, of rank R.
        rank: the client's, r <= R.
        scaling: the scale of a product by its rank.
    """
    modules = {}
    for module, whole in lora.split(adapter).items():
        part = lora.resize(whole, min(rank, whole.rank))
        modules[module] = Factors(part.b * (scaling(whole.rank) / scaling(part.rank)), part.a)
    return lora.join(modules)
