"""What the log says of a round: the fields of its `client` and `round` events beside counts and bytes.

Among them is the averaging error of the round: how far averaging A and B apart ends from the mean of the products
(`strategies.averaging_error`), measured while the updates arrive.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from apiary.config.schema import RunConfig
from apiary.core import lora
from apiary.core.messages import Update, Visit
from strategies import Aggregator, Gradient, ServerState, averaging_error
from strategies.averaging_error import Fold, Gauge
from strategies.products import DROPPED

_DIGITS = 5  # after the point, of what is logged as a share


class ErrorFold(NamedTuple):
    """The averaging error of a round whose updates are arriving."""

    fold: Fold
    state: ServerState  # at the start of the round
    accumulator: Any  # the fold's; None where the error cannot be measured
    updates: list[Update] | None  # of a method that judges clients: all, as only its gradient says how much each counts


def start(config: RunConfig, aggregator: Aggregator, state: ServerState) -> ErrorFold:
    """Begin to measure the averaging error of a round, before its first update.

    It is that of averaging with the weights of `strategy.weighting`, whatever the method makes of the updates; for a
    method that judges its clients, with the shares that it gave them. Updates are kept only where the method may keep
    each of them too. Its random numbers serve nothing else, so a run is the same with and without it. For an adapter
    that is not made of factors there is no such error, nor where clients, or groups of them, begin at adapters of their
    own.
    """
    build = averaging_error.exact_if_few if aggregator.needs == "each" else averaging_error.estimated
    # A share is given as an update's weight.
    weighting = "tokens" if aggregator.judges else config.strategy.weighting
    fold = build(lora.scaling(config.adapter.alpha, config.adapter.scaling), weighting)
    try:
        rng = averaging_error.probes_of(config.seed, state.round + 1)
        apart = aggregator.group is not None or aggregator.local.mixes
        one = bool(lora.split(state.adapter)) and not apart  # that all begin at
        accumulator = fold.start(state, rng) if one else None
    except ValueError:
        accumulator = None
    return ErrorFold(fold, state, accumulator, [] if aggregator.judges else None)


def add(error: ErrorFold, update: Update) -> ErrorFold:
    """Fold an update in; works in place.

    After an update that lacks factors of the adapter, as some methods' own updates do, the error cannot be measured.
    """
    if error.accumulator is None or update.delta.keys() != error.state.adapter.keys():
        return error._replace(accumulator=None)
    if error.updates is not None:
        error.updates.append(update)
        return error
    return error._replace(accumulator=error.fold.add(error.accumulator, update))


def merged(one: ErrorFold, other: ErrorFold) -> ErrorFold:
    """The averaging error over the updates of both; it cannot be measured where one cannot."""
    merge = one.fold.merge
    if merge is None or one.accumulator is None or other.accumulator is None:
        return one._replace(accumulator=None)
    return one._replace(accumulator=merge(one.accumulator, other.accumulator))


def round_fields(
    error: ErrorFold, gradient: Gradient, after: ServerState, poisoned: Mapping[str, str] = MappingProxyType({})
) -> dict[str, Any]:
    """The fields of the `round` event that say how the updates were put together.

    Args:
        error: the averaging error, with all updates folded in.
        gradient: of the round.
        after: the state that the round has led to.
        poisoned: by client, why a reply was refused that no honest client sends.

    Returns:
        `gauge`: the averaging error relative to the round's change, its standard error (0 where it is exact), and by
        method how much of it that method would take away. `method`: the one that was chosen, where the aggregator
        chooses by the round. `shares`: by client, the factor that its change got; `cut`: by client, why it counted for
        little or nothing. What else the method tells, such as `groups`. `dropped`: the share of the squared norm that
        was dropped from the base delta, where its rank has a bound. Each is left out where there is nothing to say.
    """
    fields: dict[str, Any] = {"method": gradient.method} if gradient.method else {}
    if (gauge := _finish(error, gradient.shares)) is not None:
        figures = {"relative": gauge.relative, "stderr": gauge.stderr, **gauge.gains}
        fields["gauge"] = {n: round(value, _DIGITS) if math.isfinite(value) else None for n, value in figures.items()}
    if gradient.shares:
        shares = {**gradient.shares, **dict.fromkeys(poisoned, 0.0)}
        fields["shares"] = {client: round(share, _DIGITS) for client, share in sorted(shares.items())}
        fields["cut"] = {**gradient.notes, **poisoned}
    fields |= gradient.told
    if dropped := float(after.memory.get(DROPPED, 0.0)):
        fields["dropped"] = round(dropped, _DIGITS)
    return fields


def visit_fields(visit: Visit, aggregator: Aggregator) -> dict[str, Any]:
    """The fields of the `client` event of a visit.

    Args:
        visit: the client's valid reply.
        aggregator: the method. Where clients may lower their own ranks as they train, the rank is worth a field; where
            they train an adapter of their own beside, so are the steps of the visit that it got.
    """
    fields: dict[str, Any] = visit.report._asdict()
    if visit.curated is not None:
        fields["curated"] = visit.curated._asdict()
    if visit.spent is not None:
        fields["spent"] = visit.spent._asdict()
    if aggregator.local.own:
        fields["own_steps"] = aggregator.local.own_steps(visit.report.steps)
    if aggregator.prunes:
        fields["rank"] = visit.update.rank
    return fields


def _finish(error: ErrorFold, shares: Mapping[str, float]) -> Gauge | None:
    counted = [u._replace(weight=share) for u in error.updates or () if (share := shares.get(u.client, 0.0)) > 0]
    if error.accumulator is None or (error.updates is not None and not counted):
        return None
    try:
        return error.fold.finish(error.state, functools.reduce(error.fold.add, counted, error.accumulator))
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return None  # a decomposition that does not converge is not worth a run
