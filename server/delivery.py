"""Which round's model a run delivers: with `evaluate.patience` the best one, else the last, with the best one kept."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from apiary.config.schema import RunConfig
from apiary.core.errors import RunFailed
from apiary.tracking import delivery
from apiary.tracking.delivery import Delivery
from apiary.tracking.run_directory import CHECKPOINTS
from server import checkpoint
from server.rounds import Progress
from strategies import ServerState
from strategies.from_config import local_from_config


class Chosen(NamedTuple):
    """What a run delivers, and what is kept beside it."""

    told: Delivery
    delivered: ServerState
    best: ServerState | None  # where another round is delivered, and a better one is known


def choose(config: RunConfig, state: ServerState, progress: Progress, folder: Path) -> Chosen:
    """Choose the round that is delivered, once the last one is done.

    Args:
        config: the run.
        state: after the last round.
        progress: says which round was best.
        folder: the run directory, whose checkpoints hold the best round.

    Raises:
        RunFailed: the best round is to be delivered, and its checkpoint is gone or damaged.
    """
    number, rows = progress.best_round, delivery.rows_of(config)
    if number is None or local_from_config(config).personal:  # what clients have beside it is of the last round
        return Chosen(Delivery(state.round, state.round), state, None)
    if number == state.round:
        return Chosen(Delivery(number, number, number, rows), state, None)
    best = checkpoint.load_round(folder / CHECKPOINTS, number)
    if config.evaluate.patience:
        if best is None:
            raise RunFailed(f"the checkpoint of round {number}, which is the best, is gone or damaged; run it again")
        return Chosen(Delivery(number, state.round, number, rows), best, None)
    if best is None:
        return Chosen(Delivery(state.round, state.round), state, None)
    return Chosen(Delivery(state.round, state.round, number, rows, delivery.BEST), state, best)


def remarks(config: RunConfig, progress: Progress) -> list[str]:
    """What must be said where the best round is delivered: that it is no better than no training at all."""
    if not config.evaluate.patience or progress.best_round is None or progress.best == progress.best_trained:
        return []
    rows, nearest = delivery.words(delivery.rows_of(config)), progress.best_round
    return [f"no round is better than the untuned model by the loss on {rows}; round {nearest} comes nearest"]
