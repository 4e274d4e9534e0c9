"""The contract of a method's client half, written once; `strategies.aggregator` has that of the server's half.

A client half is a value of pure functions on tensors. It never sees rows, a model or a disk: the worker loads the state
that the client keeps for it, opens what was received, lets the trainer run with the hooks that it asks for, and
stores what is to be kept.

    state of an earlier round, payload  --open-->    adapter to start from, hooks of the trainer
    adapter at the start, its change    --finish-->  the change that is sent, and the state to keep
    state, payload, change as it arrives --settle--> the state to keep of a change that has been sent

A method may have clients train a second adapter, their own, which never travels:

    state of an earlier round, payload  --own-->     own adapter to start from, hooks of its training

It is trained in the same visit, after what is sent, with a share of the visit's steps and on the rows that come next.
What it has become is the state that is kept, and the model that the client is measured with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple, TypeAlias

from torch import Generator, Size, Tensor

from apiary.core.messages import Payload
from apiary.core.tensors import StateDict

Penalty: TypeAlias = Callable[[Mapping[str, Tensor]], Tensor]  # live adapter parameters -> scalar, added to the loss
Projection: TypeAlias = Callable[[StateDict], StateDict]  # the finished change -> what is made of it
Loss: TypeAlias = Callable[[StateDict], float]  # of an adapter on the rows of one step, nats per trained token

NOTHING: StateDict = MappingProxyType({})


class Descent(NamedTuple):
    """Where steps without a gradient led."""

    delta: dict[str, Tensor]  # what is sent of it
    skipped: int  # steps that were not made, for their loss is no number


# One pair a step: the loss of its rows, and its learning rate. Then the adapter at the start, and a generator.
Descend: TypeAlias = Callable[[Iterable[tuple[Loss, float]], StateDict, Generator], Descent]


class Hooks(NamedTuple):
    """What a method asks of the trainer beside the configured training."""

    penalties: tuple[Penalty, ...] = ()  # added to the loss of every step
    correction: StateDict = NOTHING  # added to every step's gradient once that is clipped
    projections: tuple[Projection, ...] = ()  # of the finished change, in this order
    descend: Descend | None = None  # makes all steps without a gradient; None: by backpropagation


class Opened(NamedTuple):
    """What a visit, or an evaluation, starts from."""

    adapter: StateDict  # whole, of the client's rank; with gates where the method `mixes`
    hooks: Hooks = Hooks()
    base_delta: StateDict | None = None  # what the client adds to the base, of scale 1; None: what it was sent

    def over(self, payload: Payload) -> Payload:
        """The payload with what was made of it in the place of what was sent."""
        base_delta = payload.base_delta if self.base_delta is None else self.base_delta
        return payload._replace(adapter=self.adapter, base_delta=base_delta)


class Client(NamedTuple):
    """What a method may know of the client that it runs at."""

    rank: int  # of its adapter in this round
    shapes: Mapping[str, Size]  # of its whole adapter's tensors
    fresh: Callable[[], StateDict]  # makes the adapter that the run began with


def _open(state: StateDict, payload: Payload, client: Client) -> Opened:
    return Opened(payload.adapter)


def _finish(start: StateDict, delta: dict[str, Tensor]) -> tuple[dict[str, Tensor], StateDict]:
    return delta, NOTHING


class LocalAlgorithm(NamedTuple):
    """The client's half of a method; the defaults are training from the received adapter, and nothing kept.

    `keeps` names the files that hold the client's state of the method, one a round, on its own disk; "" keeps none.
    A method with `own` keeps that adapter and nothing else, so that its `finish` keeps nothing and it has no `settle`.
    With `resumes` = "newest" a visit gets the state of the newest round before its own; with "counted" that of the last
    round in which the server says that the client's answer counted, for methods whose server holds a part of it. Where
    `finish` and `settle` both keep tensors, the state is all of them.
    """

    open: Callable[[StateDict, Payload, Client], Opened] = _open
    finish: Callable[[StateDict, dict[str, Tensor]], tuple[dict[str, Tensor], StateDict]] = _finish
    # (state, payload, change as the server reads it, sum of the steps' learning rates) -> state; None: as `finish` says
    settle: Callable[[StateDict, Payload, StateDict, float], StateDict] | None = None
    keeps: str = ""
    resumes: Literal["newest", "counted"] = "newest"
    rank: Callable[[StateDict, int], int] = lambda factors, rank: rank  # (what travels, the site's own) -> its rank now
    shares: Callable[[str], bool] = lambda name: True  # whether the adapter's tensor of this name travels
    # What clients have for models, as a sentence without its end, where not all have the same one; "" where they do.
    personal: str = ""
    gradient_free: bool = False  # whether its hooks bring `descend`
    # With functions of its own: whether what is sent is still what the configured optimizer made of an adapter, or a
    # part of it, and so within what that can do (`strategies.guard`).
    reaches: bool = False
    codec: str = "fp32"  # that carries its updates where the run leaves wire.up as it is
    own: Callable[[StateDict, Payload, Client], Opened] | None = None  # the second adapter; None: there is none
    own_share: float = 0.0  # of a visit's steps, those that train the second adapter
    by_rates: bool = False  # whether `settle` goes by the sum of the learning rates, and so by the number of steps
    # Whether clients go on with adapters of their own and weigh them, by gates (`lora.gate_name`), against what they
    # make of the server's; they then get the payload's `extra` to measure by too.
    mixes: bool = False

    def own_steps(self, steps: int) -> int:
        """How many of a visit's steps train the client's own adapter; what is sent gets the others, one at least."""
        return min(steps - 1, max(1, round(self.own_share * steps))) if self.own else 0

    def halves(self, names: Iterable[str]) -> bool:
        """Whether what travels of the adapter's tensors is no model by itself."""
        return not all(map(self.shares, names))


PLAIN = LocalAlgorithm()
