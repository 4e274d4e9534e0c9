"""Server optimisers: what the server makes of a round's pseudo-gradient before it is added to the adapter.

The pseudo-gradient D is the direction that the clients went, sum_k p_k (x_k - x); the papers' gradient is -D. They
work on each entry of the factors by itself, so that they mean something only while the factors keep their basis from
round to round.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Literal, NamedTuple, TypeAlias

import torch
from pydantic import Field
from torch import Tensor

from apiary.config.registry import Registry
from apiary.core.errors import UserError
from apiary.core.lora import is_b
from apiary.core.tensors import StateDict
from strategies.aggregator import Aggregator, Gradient, ServerState

Slots: TypeAlias = Mapping[str, Tensor]
Trained: TypeAlias = Callable[[int], Literal["both", "b", "a"]]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Share = Annotated[float, Field(ge=0, lt=1)]

_MEMORY = "optimizer."
_BASIS = (
    "this strategy.name answers with changes of the products, and what is remembered is of entries of the factors; use "
    "plain, or a method that averages factors, such as fedavg"
)
_BASE = (
    "this strategy.name adds a residual to the base that fits a step of size 1 alone; use none, or another method, "
    "such as fedavg"
)
_GROUPS = "this strategy.name moves an adapter for each group of clients by itself; use none, or fedavg"
_OWN = "this strategy.name counts what clients hold, which a longer or shorter step would no longer be; use none"
_SEEDS = "this strategy.name averages scalars of seeds, which have no entries to optimise; use none, and set train.lr"


class Optimizer(NamedTuple):
    """A server optimiser, entry by entry.

    One without slots is a step size: its change is a multiple of the gradient.
    """

    name: str
    slots: Mapping[str, float]  # what it remembers of each tensor, and the value that all entries begin with
    change: Callable[[Tensor, Slots], tuple[Tensor, dict[str, Tensor]]]  # D, slots -> what is added to x, next slots


SERVER_OPTIMIZERS: Registry[Optimizer] = Registry("strategy.server_optimizer", makes=Optimizer)


def with_optimizer(
    aggregator: Aggregator, optimizer: Optimizer, trained: Trained = lambda round_number: "both"
) -> Aggregator:
    """The aggregation method, with its pseudo-gradient passed through the optimiser before its own step.

    The optimiser's tensors are in the state's `memory`, as `optimizer.<slot>/<tensor>`, float32. A method whose
    gradients are products can have a step size; it scales the factors B.

    Args:
        aggregator: the method; its own memory stays its own.
        optimizer: of `SERVER_OPTIMIZERS`.
        trained: by round from 1, the factors that clients train (`AdapterConfig.trained`). A factor that rests keeps
            its slots: they neither decay nor move it. A gradient of zero would not tell rest from standing still.

    Raises:
        UserError: the optimiser has a memory and the basis of the method's factors changes each round; or the method
            also adds to the base, and what it adds fits a step of size 1 alone; or it has groups of clients, or counts
            what they hold.
    """
    if optimizer.name == "none":
        return aggregator
    if aggregator.scalars:
        raise _refused(optimizer, _SEEDS)
    if aggregator.base:
        raise _refused(optimizer, _BASE)
    if aggregator.group:
        raise _refused(optimizer, _GROUPS)
    if aggregator.local.mixes:
        raise _refused(optimizer, _OWN)
    if aggregator.space == "products":
        if optimizer.slots:
            raise _refused(optimizer, _BASIS)

        def scaled(state: ServerState, gradient: Gradient) -> ServerState:
            return aggregator.step(state, _scaled(gradient, optimizer, by_b=trained(state.round + 1) != "a"))

        return aggregator._replace(step=scaled)

    def step(state: ServerState, gradient: Gradient) -> ServerState:
        if gradient.base_delta:
            raise _refused(optimizer, _BASE)
        memory = {key: tensor for key, tensor in state.memory.items() if key.startswith(_MEMORY)}
        own = {key: tensor for key, tensor in state.memory.items() if key not in memory}
        factors = trained(state.round + 1)
        changes = dict(gradient.adapter)
        for name, d in gradient.adapter.items():
            if factors == "both" or is_b(name) == (factors == "b"):
                changes[name], slots = optimizer.change(d, _slots(optimizer, memory, name, d))
                memory |= {_key(slot, name): tensor for slot, tensor in slots.items()}
        after = aggregator.step(state._replace(memory=own), gradient._replace(adapter=changes))
        return after._replace(memory={**after.memory, **memory})

    return aggregator._replace(step=step)


def _key(slot: str, name: str) -> str:
    return f"{_MEMORY}{slot}/{name}"


def _slots(optimizer: Optimizer, memory: StateDict, name: str, like: Tensor) -> dict[str, Tensor]:
    keys = {slot: _key(slot, name) for slot in optimizer.slots}
    return {
        slot: memory[k] if k in memory else torch.full_like(like, optimizer.slots[slot]) for slot, k in keys.items()
    }


def _scaled(gradient: Gradient, optimizer: Optimizer, by_b: bool) -> Gradient:
    """The gradient's products scaled, by the factor that moved, for in both it would count squared; or its factors."""
    both = gradient.space == "factors"
    return gradient._replace(
        adapter={n: optimizer.change(t, {})[0] if both or is_b(n) == by_b else t for n, t in gradient.adapter.items()}
    )


def _refused(optimizer: Optimizer, reason: str) -> UserError:
    return UserError(f"strategy.server_optimizer = {optimizer.name!r}: {reason}")


# Products and sums are operations of their own below: where a machine fuses them it rounds once instead of twice.


@SERVER_OPTIMIZERS.register("none")
def none() -> Optimizer:
    """The pseudo-gradient as it is."""
    return Optimizer("none", {}, lambda d, slots: (d, {}))


@SERVER_OPTIMIZERS.register("auto")
def auto() -> Optimizer:
    """Nesterov (lr 0.7, momentum 0.5) where plain averages of both factors allow it, else none; docs/tuning.md.

    What it comes to follows from the whole run (`apiary.config.defaults`), and stands in the run's own configuration.
    """
    return none()


@SERVER_OPTIMIZERS.register("plain")
def plain(lr: _Positive = 1.0) -> Optimizer:
    """A step size: x += lr D (McMahan et al. 2017 with lr = 1).

    Args:
        lr: of what the clients moved by.
    """
    return Optimizer("plain", {}, lambda d, slots: (lr * d, {}))


@SERVER_OPTIMIZERS.register("momentum")
def momentum(lr: _Positive = 1.0, momentum: _Share = 0.9) -> Optimizer:
    """FedAvgM: m = mu m + D; x += lr m (Hsu et al. 2019, "Measuring the effects of non-identical data distribution").

    Like SGD with heavy-ball momentum on the gradient -D. In the long run a round moves x by lr / (1 - mu) times what
    the clients did.

    Args:
        lr: the step.
        momentum: mu.
    """

    def change(d: Tensor, slots: Slots) -> tuple[Tensor, dict[str, Tensor]]:
        m = momentum * slots["m"] + d
        return lr * m, {"m": m}

    return Optimizer("momentum", {"m": 0.0}, change)


@SERVER_OPTIMIZERS.register("nesterov")
def nesterov(lr: _Positive = 0.7, momentum: _Share = 0.9) -> Optimizer:
    """The outer optimiser of DiLoCo: u = mu u + D; x += lr (D + mu u) (Douillard et al. 2023, with their defaults).

    Nesterov's momentum as Sutskever et al. (2013) write it for deep learning.

    Args:
        lr: the step; in the long run a round moves x by lr / (1 - mu) times what the clients did.
        momentum: mu.
    """

    def change(d: Tensor, slots: Slots) -> tuple[Tensor, dict[str, Tensor]]:
        u = momentum * slots["u"] + d
        return lr * (d + momentum * u), {"u": u}

    return Optimizer("nesterov", {"u": 0.0}, change)


@SERVER_OPTIMIZERS.register("adam")
def adam(lr: _Positive = 1e-3, beta1: _Share = 0.9, beta2: _Share = 0.99, tau: _Positive = 1e-3) -> Optimizer:
    """FedAdam: v = b2 v + (1 - b2) D^2; x += lr m / (sqrt(v) + tau) (Reddi et al. 2021, algorithm 2).

    Args:
        lr: the step; it does not fall as the clients' rates do.
        beta1: of the mean m of the changes D.
        beta2: of the mean v of their squares.
        tau: added to the root of v; from what change on an entry moves at full length.
    """
    return _adaptive("adam", lr, beta1, tau, lambda v, d2: beta2 * v + (1 - beta2) * d2)


@SERVER_OPTIMIZERS.register("yogi")
def yogi(lr: _Positive = 1e-3, beta1: _Share = 0.9, beta2: _Share = 0.99, tau: _Positive = 1e-3) -> Optimizer:
    """FedYogi: v -= (1 - b2) D^2 sign(v - D^2); x += lr m / (sqrt(v) + tau) (Reddi et al. 2021, algorithm 2).

    Args:
        lr: the step.
        beta1: of the mean m of the changes D.
        beta2: of v, which moves by a share of D^2 whatever its own size.
        tau: added to the root of v.
    """
    return _adaptive("yogi", lr, beta1, tau, lambda v, d2: v - (1 - beta2) * d2 * (v - d2).sign())


@SERVER_OPTIMIZERS.register("adagrad")
def adagrad(lr: _Positive = 1e-3, beta1: _Share = 0.0, tau: _Positive = 1e-3) -> Optimizer:
    """FedAdagrad: v += D^2; x += lr m / (sqrt(v) + tau) (Reddi et al. 2021, algorithm 2; they run it with beta1 = 0).

    Args:
        lr: the step.
        beta1: of the mean m of the changes D.
        tau: added to the root of v.
    """
    return _adaptive("adagrad", lr, beta1, tau, lambda v, d2: v + d2)


def _adaptive(name: str, lr: float, beta1: float, tau: float, second: Callable[[Tensor, Tensor], Tensor]) -> Optimizer:
    """An adaptive optimiser: m = beta1 m + (1 - beta1) D; x += lr m / (sqrt(v) + tau), from v = tau^2.

    As in the paper there is no bias correction, and v is made of D^2, not of m^2.
    """

    def change(d: Tensor, slots: Slots) -> tuple[Tensor, dict[str, Tensor]]:
        m = beta1 * slots["m"] + (1 - beta1) * d if beta1 else d
        v = second(slots["v"], d * d)
        return lr * m / (v.sqrt() + tau), {"v": v, **({"m": m} if beta1 else {})}

    return Optimizer(name, {"v": tau**2, **({"m": 0.0} if beta1 else {})}, change)
