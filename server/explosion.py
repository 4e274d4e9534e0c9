"""A loss that explodes: when a run must stop, and which client moved the model most on the way there."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Final, Protocol

import torch
from torch.linalg import vector_norm

from apiary.config.schema import RunConfig
from apiary.core.messages import Visit
from server import client_scores
from server.client_scores import Scores
from server.evaluation import Evaluation
from strategies.from_config import weighs

ABOVE: Final = 1.0  # nats; what a loss near zero may rise by without being exploded
_APART: Final = 2.0  # times the median client's, from which on one stands out


class Sofar(Protocol):
    """What a run remembers of its losses; `server.rounds.Progress` is one."""

    @property
    def first_loss(self) -> float | None:
        """The first that was measured; None before there is one."""

    @property
    def sound_round(self) -> int:
        """The newest round whose loss was measured and had not exploded."""


class Watch:
    """Holds each measured loss against that before training.

    It owns what clients have moved since the loss was last sound, and the loss that was measured last.

    Args:
        config: the run.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._moved: dict[str, float] = {}  # by client, its weight times the length of its change, summed over rounds
        self._weighs = weighs(config)
        self.senseless = 0  # clients whose loss was no number, since the last evaluation
        self.loss: float | None = None  # of the last evaluation; None where nobody told one

    def add(self, visit: Visit) -> None:
        """Enter a visit that counts."""
        update = visit.update
        length = math.hypot(*(float(vector_norm(tensor, dtype=torch.float64)) for tensor in update.delta.values()))
        weight = update.weight if self._weighs else 1.0  # else one that says it trained on nothing moved nothing
        self._moved[update.client] = self._moved.get(update.client, 0.0) + weight * length

    def hold(self, number: int, server: Evaluation | None, panel: Scores | None, sofar: Sofar) -> str:
        """Why the run must stop after the evaluation of round `number`; "" where it may go on.

        Args:
            number: the round.
            server: on the server's held-out examples; None where it has none.
            panel: what the clients reported; None where they were not asked.
            sofar: the run's losses before.
        """
        self.loss, self.senseless = measured(server, panel, self.senseless, before=number == 0), 0
        if self.loss is None or number == 0:
            return ""
        first = self.loss if sofar.first_loss is None else sofar.first_loss
        if is_exploded(self.loss, first, self._config):
            return line(number, self.loss, first, self._moved, sofar.sound_round, self._config)
        self._moved.clear()
        return ""


def measured(server: Evaluation | None, panel: Scores | None, senseless: int, before: bool = False) -> float | None:
    """The loss that is watched: the server's own, or where it has no rows the panel's; None where nobody tells one.

    Of the panel it is the median client's loss, for one that lies must not end a run. Of an even number it is the lower
    one of the middle two, and before training the higher one, by which later losses are judged.

    Args:
        server: on the server's held-out examples.
        panel: the sums of each client's score.
        senseless: further clients whose loss was no number, or beyond all bounds; before training they say nothing.
        before: whether this is before training.
    """
    if server is not None:
        return server.score.loss
    scores = [client_scores.add_up([sums]) for sums in (panel or {}).values()]
    losses = [score.loss for score in scores if score.tokens]
    losses += [] if before else [math.inf] * senseless
    return (statistics.median_high if before else statistics.median_low)(losses) if losses else None


def limit(first: float, config: RunConfig) -> float:
    """The loss above which a run stops that began with `first`."""
    return config.evaluate.limit * first + ABOVE if config.evaluate.limit else math.inf


def is_exploded(loss: float, first: float, config: RunConfig) -> bool:
    """Whether a run that began with the loss `first` must stop at `loss`: it is no number, or above `limit`."""
    return config.evaluate.limit > 0 and not loss <= limit(first, config)


def line(number: int, loss: float, first: float, moved: Mapping[str, float], sound: int, config: RunConfig) -> str:
    """Why the run stops, and who should be looked at.

    Args:
        number: the round after which the loss was measured.
        loss: that loss.
        first: the one that the run began with.
        moved: by client, the sum of its weight, where the method has one, times the length of its change, over the
            rounds since `sound` that this process has done.
        sound: the last round whose loss was sound.
        config: the run.
    """
    began = f"round {number}: the loss is {loss:.4g}, from {first:.4g} before training"
    if math.isfinite(loss):
        began += f" (evaluate.limit = {config.evaluate.limit:g} allows {limit(first, config):.4g})"
    kept = f"the adapter of round {sound} is kept, and --resume goes on from there" if sound else "no round is kept"
    return f"{began}; {_who(moved)}; {kept}"


def _who(moved: Mapping[str, float]) -> str:
    total = sum(moved.values())
    if not total:
        return "nobody's change moved the model"
    most = max(moved, key=lambda client: moved[client])
    part = f"{moved[most] / total:.0%} of all changes, each by its length and weight"
    if len(moved) > 1 and moved[most] < _APART * statistics.median_low(moved.values()):
        return f"{most} moved the model most, with {part}, hardly more than others: a lower train.lr usually helps"
    return f"{most} moved the model most, with {part}: look at what it sends before it takes part again"
