"""What the server tells of how a round was put together: the gauge of the error, the method, and who was cut."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from apiary.config.schema import RunConfig
from apiary.core import lora
from apiary.core.messages import Update
from strategies import Aggregator, Gradient, ServerState
from strategies import averaging_error as gauges
from strategies.averaging_error import Fold, Gauge
from strategies.products import DROPPED

_DIGITS = 5  # after the point, of what is told as a share


class Watched(NamedTuple):
    """The gauge of a round whose updates are arriving."""

    fold: Fold
    state: ServerState  # at the start of the round
    seen: Any  # the fold's accumulator; None where the gauge cannot be told
    held: list[Update] | None  # of a method that judges: it holds them too, and says at the end who counts


def watch(config: RunConfig, aggregator: Aggregator, state: ServerState) -> Watched:
    """The gauge of a round, before its first update; `add` works in place.

    It is that of averaging with the parts of `strategy.weighting`, whatever the method makes of the updates; of a
    method that judges its clients, that of averaging with the shares that it gave them. Updates are kept only where the
    method may keep each of them too. Its random numbers are its own: a run is the same with it and without it. An
    adapter that is not made of factors has no gauge.
    """
    build = gauges.exact_if_few if aggregator.needs == "each" else gauges.estimated
    # A share is given as an update's weight.
    weighting = "tokens" if aggregator.judges else config.strategy.weighting
    fold = build(lora.scaling(config.adapter.alpha, config.adapter.scaling), weighting)
    try:
        seen = fold.start(state, gauges.probes_of(config.seed, state.round + 1)) if lora.split(state.adapter) else None
    except ValueError:
        seen = None
    return Watched(fold, state, seen, [] if aggregator.judges else None)


def add(watched: Watched, update: Update) -> Watched:
    """Fold an update in. One without both factors of all modules, as of a method of its own, leaves no gauge."""
    if watched.seen is None or update.delta.keys() != watched.state.adapter.keys():
        return watched._replace(seen=None)
    if watched.held is not None:
        watched.held.append(update)
        return watched
    return watched._replace(seen=watched.fold.add(watched.seen, update))


def facts(
    watched: Watched, gradient: Gradient, after: ServerState, poisoned: Mapping[str, str] = MappingProxyType({})
) -> dict[str, Any]:
    """The fields of the `round` event on how the round was put together.

    `gauge` has the relative error of averaging A and B apart, its standard error (0 where it is exact), and by method
    how much of it that would take away. `method` is the one that was chosen, where the run chooses by the round.
    `shares` are the factors that the clients' changes got, and `cut` says why one counted for little or nothing.
    `dropped` is what was lost of what stands in the base, where its rank has a bound: a share of its squared norm.

    Args:
        watched: the gauge.
        gradient: of the round.
        after: the state that the round has led to.
        poisoned: by client, why an answer was refused that no honest client gives.
    """
    told: dict[str, Any] = {"method": gradient.method} if gradient.method else {}
    if (gauge := _finished(watched, gradient.shares)) is not None:
        figures = {"relative": gauge.relative, "stderr": gauge.stderr, **gauge.gains}
        told["gauge"] = {n: round(value, _DIGITS) if math.isfinite(value) else None for n, value in figures.items()}
    if gradient.shares:
        shares = {**gradient.shares, **dict.fromkeys(poisoned, 0.0)}
        told["shares"] = {client: round(share, _DIGITS) for client, share in sorted(shares.items())}
        told["cut"] = {**gradient.notes, **poisoned}
    if dropped := float(after.memory.get(DROPPED, 0.0)):
        told["dropped"] = round(dropped, _DIGITS)
    return told


def _finished(watched: Watched, shares: Mapping[str, float]) -> Gauge | None:
    counted = [u._replace(weight=share) for u in watched.held or () if (share := shares.get(u.client, 0.0)) > 0]
    if watched.seen is None or (watched.held is not None and not counted):
        return None
    try:
        return watched.fold.finish(watched.state, functools.reduce(watched.fold.add, counted, watched.seen))
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return None  # a decomposition that does not converge is not worth a run
