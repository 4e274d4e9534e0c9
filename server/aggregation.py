"""From the replies of a round to the next state: valid updates are folded into sums, and the sums give the step.

All functions here are pure but for the sums, which belong to the fold and are changed in place. The mathematics is the
aggregator's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

from apiary.config.schema import RunConfig
from apiary.core.errors import RunFailed
from apiary.core.messages import ClientInfo, Decline, FitReport, Payload, Update, Visit
from apiary.core.tensors import generator, is_finite, threads
from apiary.transport import codec
from server import client_scores, round_metrics
from server.replies import Refusal, Terms
from server.screen import Screen, Settled
from strategies import Gradient, ServerState
from strategies.aggregator import ROOT
from strategies.guard import Reference

OwnUpdate: TypeAlias = Callable[[int, Payload], Update]  # of a round's number and what a client of full rank is sent


class Folded(NamedTuple):
    """The replies of a round so far, added up; it owns its accumulators and lists, so `fold` works in place."""

    accumulator: Any  # the reducer's
    error: round_metrics.ErrorFold
    reports: list[FitReport]  # of all valid visits
    poisoned: dict[str, str]  # by client, why its reply was refused, which no honest client sends
    declined: int = 0  # clients that rightly did not train
    bytes_up: int = 0  # of the valid visits' arrays
    float32_up: int = 0  # bytes of the same changes without the codec; 0 where there is none


def start(state: ServerState, terms: Terms) -> Folded:
    """The sums of a round before its first reply.

    Args:
        state: at the start of the round.
        terms: of the round.
    """
    error = round_metrics.start(terms.config, terms.aggregator, state)
    return Folded(terms.aggregator.reduce.start(state), error, [], {})


@threads(1)  # as `read_train`
def fold(folded: Folded, reply: Visit | Decline | Refusal, client: str, size: int, terms: Terms) -> Folded:
    """The sums with one more reply in them.

    Args:
        folded: the sums so far, which must not be used any more.
        reply: as `read_train` returned it.
        client: its sender, by the server's own name for it.
        size: bytes of its arrays.
        terms: of the round.

    Raises:
        RunFailed: the method cannot take an update that passed all checks; the sums may then hold a part of it.
    """
    reducer = terms.aggregator.reduce
    if isinstance(reply, Decline):
        return folded._replace(declined=folded.declined + 1)
    if isinstance(reply, Refusal):
        if not reply.poisoned:
            return folded
        folded.poisoned[client] = f"refused: {reply.reason}"
        return folded._replace(accumulator=reducer.refused(folded.accumulator))
    try:
        accumulator = reducer.add(folded.accumulator, reply.update)
        error = round_metrics.add(folded.error, reply.update)
    except ValueError as problem:
        raise RunFailed(f"round {terms.number}: {problem}") from problem
    folded.reports.append(reply.report)
    plain = codec.float32_bytes(reply.update.delta) if _is_coded(terms.config) else 0
    return folded._replace(
        accumulator=accumulator,
        error=error,
        bytes_up=folded.bytes_up + size,
        float32_up=folded.float32_up + plain,
    )


class Sums:
    """The sums of a round while its replies come: one, or with `simulate.relays` one of each relay.

    Args:
        state: at the start of the round.
        cohort: who is asked; relays get them in turn.
        terms: of the round.
    """

    def __init__(self, state: ServerState, cohort: Sequence[str], terms: Terms) -> None:
        relays = max(1, terms.config.simulate.relays)
        self._terms, self._parts = terms, [start(state, terms) for _ in range(relays)]
        self._relay = {client: at % relays for at, client in enumerate(cohort)}
        self._screen = Screen(terms)

    def add(self, client: str, reply: Visit | Decline | Refusal, size: int) -> list[Settled]:
        """Fold a reply in, as `fold`, unless it has to wait for `close`; returns what has become of it if not."""
        if not isinstance(reply, Visit):
            return [self._fold(Settled(client, reply, size))]
        taken = self._screen.take(client, reply, size)
        return [self._fold(taken)] if taken else []

    def close(self) -> Iterator[Settled]:
        """Fold in what had to wait, now that no reply comes any more, one at a time; yields what has become of it."""
        return map(self._fold, self._screen.release())

    def reference(self) -> Reference:
        """What is usual once the round is over."""
        return self._screen.after()

    def _fold(self, settled: Settled) -> Settled:
        at = self._relay.get(settled.client, 0)
        self._parts[at] = fold(self._parts[at], settled.reply, settled.client, settled.size, self._terms)
        return settled

    def whole(self) -> Folded:
        """The sums of all, once closed; no reply can be added any more."""
        return functools.reduce(functools.partial(merged, terms=self._terms), self._parts)


def merged(one: Folded, other: Folded, terms: Terms) -> Folded:
    """The sums of the replies of both, neither of which must be used any more.

    Args:
        one: sums of some clients.
        other: sums of others.
        terms: of the round.

    Raises:
        ValueError: the method must see each update; `strategies.from_config` refuses relays for it.
    """
    if (merge := terms.aggregator.reduce.merge) is None:
        raise ValueError(f"strategy.name = {terms.config.strategy.name!r} cannot put sums of a round together")
    return Folded(
        merge(one.accumulator, other.accumulator),
        round_metrics.merged(one.error, other.error),
        [*one.reports, *other.reports],
        {**one.poisoned, **other.poisoned},
        one.declined + other.declined,
        one.bytes_up + other.bytes_up,
        one.float32_up + other.float32_up,
    )


def fold_own(folded: Folded, train: OwnUpdate, terms: Terms) -> Folded:
    """The sums with the server's own update in them, which is trained from what clients of full rank were sent.

    Raises:
        RunFailed: training on the server's own rows diverged.
    """
    server = ClientInfo(ROOT, terms.config.adapter.rank, terms.number - 1)
    try:
        update = train(terms.number, terms.payload_of(server))
    except FloatingPointError as error:
        raise RunFailed(f"round {terms.number}: the server's own training on strategy.root diverged: {error}") from None
    return folded._replace(accumulator=terms.aggregator.reduce.add(folded.accumulator, update))


def check_quorum(folded: Folded, asked: int, terms: Terms) -> None:
    """Check that enough clients sent a valid update.

    Args:
        folded: the sums, with all replies in them.
        asked: clients that were asked and did not decline.
        terms: of the round.

    Raises:
        RunFailed: they are a smaller share of those than `strategy.quorum`, or none.
    """
    valid, quorum = len(folded.reports), terms.config.strategy.quorum
    needed = max(1, math.ceil(quorum * asked - 1e-9))
    if valid < needed:
        raise RunFailed(
            f"round {terms.number}: {valid} of {asked} clients answered well, strategy.quorum = "
            f"{quorum:g} asks for {needed}; the lines above say why"
        )


def step(folded: Folded, state: ServerState, terms: Terms) -> tuple[ServerState, Gradient]:
    """The state that the updates of a round lead to, and the gradient of that step.

    Args:
        folded: the sums, with all replies in them.
        state: at the start of the round.
        terms: of the round.

    Raises:
        TooFewAnswers: the method needs more updates to keep its promise.
        RunFailed: the new state holds NaN or infinity.
        ValueError: the method cannot make a gradient of these updates, or a step of the gradient.
        LinAlgError: a decomposition does not converge.
    """
    config, aggregator = terms.config, terms.aggregator
    rng = generator(config.seed, terms.number, "aggregate")
    gradient = aggregator.reduce.finish(state, folded.accumulator, rng)
    state = aggregator.step(state, gradient)
    if not all(is_finite(part) for part in (state.adapter, state.base_delta, state.memory)):
        raise RunFailed(
            f"round {terms.number}: strategy.name = {config.strategy.name!r} made NaN or infinity of finite "
            "updates; the round before it is kept"
        )
    return state, gradient


def training_fields(folded: Folded, config: RunConfig) -> dict[str, float]:
    """The counts and bytes of a round's valid visits, as fields of its event; without a codec `bytes_up` alone."""
    fields = {**client_scores.training_fields(folded.reports), "bytes_up": folded.bytes_up}
    return {**fields, "float32_up": folded.float32_up} if _is_coded(config) else fields


def _is_coded(config: RunConfig) -> bool:
    return config.wire.up.name != "fp32"
