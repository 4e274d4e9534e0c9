"""What is measured between rounds: when, on which rows, and when a run stops because it gets no better."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from apiary.config.schema import RunConfig
from apiary.core.messages import Score
from apiary.core.stages import rounds_of, stage_of
from apiary.core.tensors import StateDict
from apiary.evaluation import intervals
from apiary.evaluation.comparison import Floats, HeldOut
from apiary.models import adapters
from apiary.models.adapters import LanguageModel
from apiary.models.inference import ModelProbe
from server import client_scores
from server.client_scores import Scores


class Evaluation(NamedTuple):
    """The shared adapter's loss on the server's held-out examples."""

    score: Score
    interval: tuple[float, float] | None  # 95% interval of the loss over these examples; None of too few
    deciding: Score | None = None  # on the examples by which the server decides, where some are set apart for that


def on_held_out(lm: LanguageModel, held_out: HeldOut, seed: int) -> Callable[[StateDict], Evaluation]:
    """The function that measures an adapter on the server's held-out examples.

    Args:
        lm: the model, whose adapter is replaced by the one that is measured.
        held_out: the examples.
        seed: of the bootstrap.
    """

    def evaluate(adapter: StateDict) -> Evaluation:
        adapters.set_adapter(lm, adapter)
        nats, tokens = ModelProbe(lm).losses(held_out.corpus)
        deciding = None if held_out.deciding is None else _score(*ModelProbe(lm).losses(held_out.deciding.corpus))
        return Evaluation(_score(nats, tokens), intervals.over_rows(nats, tokens, seed=seed), deciding)

    return evaluate


def _score(nats: Floats, tokens: NDArray[np.int64]) -> Score:
    return Score(float(nats.sum()), int(tokens.sum()), len(nats))


def is_due(number: int, config: RunConfig) -> bool:
    """Whether the adapter is evaluated after round `number`, or before the first round for 0."""
    every = config.evaluate.every
    return every > 0 and (number % every == 0 or number == config.rounds)


def finished_stages(number: int, config: RunConfig) -> int | None:
    """How many stages are finished, where their scores are due after round `number`; None where they are not.

    They are due before the first round (0) and after the last round of each stage.
    """
    stages = len(config.continual.stages)
    if not stages:
        return None
    if number == 0:
        return 0
    stage = stage_of(number, config.rounds, stages)
    return stage + 1 if number == rounds_of(stage, config.rounds, stages)[-1] else None


def combine(server: Evaluation | None, panel: Scores | None) -> tuple[Scores, dict[str, Any]]:
    """Put the results of an evaluation together.

    Args:
        server: on the server's held-out examples; None where it has none.
        panel: what the clients of the panel reported; None where clients are not asked.

    Returns:
        The scores that decide which round is best and when a run stops early, and the fields of the `evaluate` event.
    """
    scores: Scores = {}
    fields: dict[str, Any] = {}
    if server is not None:
        scores = {"": server.deciding or server.score}
        fields = {
            "loss": server.score.loss,
            "ci95": list(server.interval) if server.interval else None,
            "n": server.score.examples,
        }
        if server.deciding is not None:
            fields["deciding"] = {"loss": server.deciding.loss, "n": server.deciding.examples}
    if panel is not None:
        scores, panel_fields = client_scores.panel_fields(panel)
        fields |= panel_fields
    return scores, fields


def stop_reason(without_gain: int, config: RunConfig) -> str:
    """Why a run stops after an evaluation; "" where it goes on.

    Args:
        without_gain: evaluations since the best one.
        config: the run, which says how many of them it bears.
    """
    patience = config.evaluate.patience
    if not 0 < patience <= without_gain:
        return ""
    return f"no better loss in {without_gain} evaluations (evaluate.patience = {patience})"
