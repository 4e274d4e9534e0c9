"""Scores and counts that clients report, added up, and whether a run still gets better: pure functions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from apiary.core.counts import pooled_loss
from apiary.core.messages import FitReport, Score

Scores = Mapping[str, Sequence[float]]  # by client, the sums of its `Score`


class Best(NamedTuple):
    """The best evaluation of a run so far."""

    scores: Scores
    without_gain: int  # evaluations since


def update_best(best: Best, scores: Scores) -> Best:
    """The best evaluation once another one has been made.

    They are compared on the clients that both have, for others may be easier or harder; and by the loss of the median
    client, not by their sum: one that lies must not end the run, nor keep it going. (The median of the clients' gains
    would not do: small gains of most, round after round, can end above where they began.)
    """
    common = scores.keys() & best.scores.keys()
    before, now = (
        statistics.median(add_up([of[name]]).loss for name in common) if common else math.nan
        for of in (best.scores, scores)
    )
    if now < before if common else math.isfinite(add_up(scores.values()).loss):
        return Best(scores, 0)
    return best._replace(without_gain=best.without_gain + 1)


def panel_fields(sums: Scores) -> tuple[dict[str, Score], dict[str, Any]]:
    """Sum up what the panel reported.

    Args:
        sums: the score of each client of the panel; without tokens where it has too few rows to tell a loss.

    Returns:
        The scores of the clients with rows enough, and the fields of the `evaluate` event about all of them.
    """
    reported = {name: add_up([own]) for name, own in sums.items()}
    scores = {name: score for name, score in reported.items() if score.tokens}
    return scores, {
        "clients": {name: score.loss for name, score in scores.items()},
        "clients_loss": pooled_loss((score.nats, score.tokens) for score in scores.values()),
        "clients_rows": {name: [score.examples, score.tokens] for name, score in scores.items()},
        "clients_few": [name for name in reported if name not in scores],
    }


def add_up(scores: Iterable[Sequence[float]]) -> Score:
    """The sums of scores added up."""
    nats, tokens, examples = 0.0, 0, 0
    for score in scores:
        nats, tokens, examples = nats + score[0], tokens + int(score[1]), examples + int(score[2])
    return Score(nats, tokens, examples)


def training_fields(reports: Sequence[FitReport]) -> dict[str, float]:
    """The counts of a round, as fields of its event; the loss is over the clients that tell one, if any does."""
    tokens = sum(report.tokens for report in reports)
    told = [report for report in reports if math.isfinite(report.loss)]
    weight = sum(report.tokens for report in told)
    known = {"train_loss": sum(report.loss * report.tokens for report in told) / weight} if weight else {}
    return {"clients": len(reports), "tokens": tokens, **known}
