"""The models that a client can make at home once the federation is over, each taken where its validation rows say.

Every contender has the same budget of optimizer steps on the client's rows, a multiple of those that the client made in
the federation: training alone may use all of it, and what builds on the federated model has what the federation left.

- alone: from a new adapter with the run's learning rate, on a schedule as long as the budget, and on another one
  without the federation's steps;
- mixed: the federated model and the shorter training alone, put together in the space of products without training;
- tuned: the federated model trained further on the client's rows, at a fraction of the learning rate.

Trained ones are looked at after each quarter of their schedule and taken where the validation loss is lowest, so that
a client with few rows stops before it overfits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Literal, NamedTuple

import numpy as np

from apiary.config.schema import RunConfig, TrainConfig
from apiary.core import lora
from apiary.core.tensors import StateDict
from apiary.data.batches import Corpus
from apiary.models import adapters, mixtures
from apiary.models.adapters import LanguageModel
from apiary.models.inference import ModelProbe
from client.personal.choice import FEWEST, Candidate, Choice, Floats, choose, loss_of
from client.training import trainer
from client.training.trainer import StepRecord, VisitPlan

_LOOKS = 4  # at a trained contender, evenly spread over its schedule; the last one at its end


class Rows(NamedTuple):
    """A client's rows as tokens."""

    train: Corpus
    validation: Corpus  # that nothing was trained on, and that are not reported


class Look(NamedTuple):
    """A contender on its way."""

    steps: int  # optimizer steps on the client's rows so far, those in the federation included
    adapter: StateDict
    nats: Floats  # (n,) of each validation row


class Contest(NamedTuple):
    """All that a client has made, and what it keeps."""

    adapter: StateDict  # that is kept
    alone: StateDict  # training alone where it is best, within the whole budget
    choice: Choice
    candidates: tuple[Candidate, ...]
    tokens: Floats  # (n,) response tokens of each validation row
    curves: dict[str, list[tuple[int, float]]]  # by contender, validation loss after so many steps


class _Scorer:
    """Scores models on a client's validation rows; owns nothing but these."""

    def __init__(self, lm: LanguageModel, rows: Corpus) -> None:
        self._lm, self._rows = lm, rows
        self.tokens: Floats = np.zeros(0)

    def nats(self, adapter: StateDict) -> Floats:
        """(n,) summed loss of each row."""
        if not len(self._rows):
            return np.zeros(0)
        adapters.set_adapter(self._lm, adapter)
        nats, tokens = ModelProbe(self._lm).losses(self._rows)
        self.tokens = tokens.astype(np.float64)
        return nats


def contest(lm: LanguageModel, config: RunConfig, client: str, steps: int, federated: StateDict, rows: Rows) -> Contest:
    """Make a client's candidates and choose one.

    Args:
        lm: the base with an adapter of the federated model's rank.
        config: the run; its `[personal]` says what is made.
        client: its name, which its randomness follows from.
        steps: optimizer steps that it made in the federation.
        federated: the federation's model, as for `set_adapter`.
        rows: what it trains on, and what decides.

    Raises:
        ValueError: there is nothing to train on.
    """
    personal, scorer = config.personal, _Scorer(lm, rows.validation)
    whole = max(1, round(personal.budget * steps))
    left = max(1, whole - steps)
    joint = Look(steps, federated, scorer.nats(federated))
    fresh = adapters.fresh_adapter(lm, config.seed)
    short, long = (_trained(lm, config, client, fresh, rows.train, length, scorer) for length in (left, whole))
    gentle = config.train.model_copy(update={"lr": config.train.lr * personal.lr_factor})
    after = _trained(lm, config, f"{client} tuned", federated, rows.train, left, scorer, gentle, done=steps)
    alone, tuned = _lowest([*short, *long], scorer, steps), _lowest(after, scorer, whole)
    part = _lowest(short, scorer, steps)
    made = [(_candidate(lm, "federated", 0.0, joint, federated), federated)]
    for weight in personal.weights:
        state = mixtures.mixed(lm, federated, part.adapter, weight)
        look = Look(steps + part.steps, state, scorer.nats(state))
        made.append((_candidate(lm, "mixed", weight, look, federated), state))
    made.append((_candidate(lm, "tuned", 0.0, tuned, federated), tuned.adapter))
    made.append((_candidate(lm, "alone", 1.0, alone, federated), alone.adapter))
    candidates = tuple(candidate for candidate, _ in made)
    choice = choose(candidates, scorer.tokens, personal.margin)
    curves = {
        name: [(look.steps, loss_of(look.nats, scorer.tokens)) for look in looks]
        for name, looks in (("alone", long), ("alone, shorter", short), ("tuned", [joint, *after]))
    }
    return Contest(made[choice.chosen][1], alone.adapter, choice, candidates, scorer.tokens, curves)


def _candidate(lm: LanguageModel, kind: str, weight: float, look: Look, federated: StateDict) -> Candidate:
    away = 0.0 if look.adapter is federated else mixtures.distance(lm, federated, look.adapter)
    return Candidate(kind, weight, look.steps, away, look.nats)  # type: ignore[arg-type]


def _lowest(looks: Sequence[Look], scorer: _Scorer, steps: int) -> Look:
    """The look with the lowest validation loss, of several the one with fewest steps.

    On too few validation rows to choose by it is the one nearest to `steps`.
    """
    if len(scorer.tokens) < FEWEST:
        return min(looks, key=lambda look: (abs(look.steps - steps), look.steps))
    return min(looks, key=lambda look: (loss_of(look.nats, scorer.tokens), look.steps))


def _trained(
    lm: LanguageModel,
    config: RunConfig,
    stream: str,
    start: StateDict,
    rows: Corpus,
    length: int,
    scorer: _Scorer,
    train: TrainConfig | None = None,
    done: int = 0,
) -> list[Look]:
    """Train on the client's rows with a schedule of `length` steps; what it was like on its way and at its end.

    A training that diverges ends there; what it was before stays. One that diverges before the first look leaves its
    start.
    """
    marks = {math.ceil(length * look / _LOOKS) for look in range(1, _LOOKS + 1)}
    base_delta = lora.parts(start)[1]
    seen: list[tuple[int, StateDict]] = []

    def look(record: StepRecord) -> None:
        if record.step + 1 in marks:
            seen.append((record.step + 1, lora.whole(adapters.get_adapter(lm), base_delta)))

    factors: Literal["both", "b"] = "b" if config.adapter.train == "b" else "both"
    plan = VisitPlan(config.seed, stream, length, length, factors=factors, observers=(look,))
    with suppress(FloatingPointError):
        trainer.fit(lm, start, rows, train or config.train, plan)
    states = seen or [(0, start)]
    return [Look(done + steps, state, scorer.nats(state)) for steps, state in states]
