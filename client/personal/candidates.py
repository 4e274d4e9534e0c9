"""The models that a client can make at home once the federation is over, each taken where its validation rows say.

Every contender has the same budget of optimizer steps on the client's rows, a multiple of those that the client made in
the federation: training alone may use all of it, and what builds on the federated model has what the federation left.

- alone: from the adapter that the run began from, with the run's learning rate, on schedules as long as the federation,
  as the budget, and as what the federation leaves of it (with a budget of 2 as long as itself);
- earlier: the federated model as it was after a quarter, a half or three quarters of the rounds, where these are known;
- mixed: the federated model and the last training alone, put together in the space of products without training;
- tuned: the federated model trained further on the client's rows, at a fraction of the learning rate.

Trained ones are looked at after each quarter of their schedule, the longest after each eighth, and taken where the
validation loss is lowest, so that a client with few rows stops before it overfits. Training alone as long as the
federation is what a simulation has as the baseline `local`; it is taken as it ended.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from itertools import chain
from typing import Literal, NamedTuple

import numpy as np

from apiary.config.schema import RunConfig
from apiary.core import lora
from apiary.core.tensors import StateDict
from apiary.data.batches import Corpus
from apiary.models import adapters, mixtures
from apiary.models.adapters import LanguageModel
from apiary.models.inference import ModelProbe
from apiary.models.start import starting_adapter
from client.personal.choice import FEWEST, Candidate, Choice, Floats, Kind, choose, loss_of
from client.training import trainer
from client.training.trainer import StepRecord, VisitPlan

_LOOKS = 4  # at a trained contender; at training alone as long as the federation there is one, at its end
_OFTEN = 8  # at training alone with the whole budget, which of few rows is best early


class Rows(NamedTuple):
    """A client's rows as tokens."""

    train: Corpus
    validation: Corpus  # that nothing was trained on, and that are not reported


class Schedules(NamedTuple):
    """Optimizer steps of what a client trains to have candidates."""

    alone: tuple[int, ...]  # of each training alone, ascending; the last one is the whole budget
    left: int  # that the federation leaves of the budget: of tuning further, and of the training alone in mixtures

    @property
    def total(self) -> int:
        """All that is trained."""
        return sum(self.alone) + self.left


def schedules(steps: int, budget: float) -> Schedules:
    """What a client with `steps` optimizer steps in the federation trains under `personal.budget`."""
    whole = max(2, round(budget * steps))
    left = max(1, whole - steps)
    return Schedules(tuple(sorted({steps, left, whole})), left)


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


class _Home:
    """A client at home: its model, its rows, and the losses that decide. Owns the counts of the validation rows."""

    def __init__(self, lm: LanguageModel, config: RunConfig, client: str, rows: Rows) -> None:
        self._lm, self._config, self._client, self._rows = lm, config, client, rows
        self.tokens: Floats = np.zeros(0)  # (n,) response tokens of each validation row, once one model was scored

    def look(self, steps: int, adapter: StateDict) -> Look:
        """A model with its losses on the validation rows."""
        if not len(self._rows.validation):
            return Look(steps, adapter, np.zeros(0))
        adapters.set_adapter(self._lm, adapter)
        nats, tokens = ModelProbe(self._lm).losses(self._rows.validation)
        self.tokens = tokens.astype(np.float64)
        return Look(steps, adapter, nats)

    def alone(self, start: StateDict, steps: int, known: StateDict | None) -> list[Look]:
        """Training alone as long as the federation, which is done already where it is `known`: at its end."""
        return self.trained(start, steps, looks=1) if known is None else [self.look(steps, known)]

    def trained(
        self,
        start: StateDict,
        length: int,
        stream: str = "",
        lr_factor: float = 1.0,
        done: int = 0,
        looks: int = _LOOKS,
    ) -> list[Look]:
        """Train on the client's rows with a schedule of `length` steps; what it was like on its way and at its end.

        A training that diverges ends there, and what it was before stays; one that diverges before the first look
        leaves its start.

        Args:
            start: a state as for `set_adapter`.
            length: optimizer steps.
            stream: what the order of the rows follows from beside the client.
            lr_factor: of the run's learning rate.
            done: steps on the client's rows that are behind `start`.
            looks: evenly spread over the schedule, the last one at its end.
        """
        marks = {math.ceil(length * look / looks) for look in range(1, looks + 1)}
        base_delta = lora.parts(start)[1]
        seen: list[tuple[int, StateDict]] = []

        def note(record: StepRecord) -> None:
            if record.step + 1 in marks:
                seen.append((record.step + 1, lora.whole(adapters.get_adapter(self._lm), base_delta)))

        train = self._config.train.model_copy(update={"lr": self._config.train.lr * lr_factor})
        factors: Literal["both", "b"] = "b" if self._config.adapter.train == "b" else "both"
        plan = VisitPlan(self._config.seed, self._client + stream, length, length, factors=factors, observers=(note,))
        with suppress(FloatingPointError):
            trainer.fit(self._lm, start, self._rows.train, train, plan)
        return [self.look(done + steps, state) for steps, state in seen or [(0, start)]]

    def lowest(self, looks: Sequence[Look], steps: int) -> Look:
        """The look with the lowest validation loss, of several the one with fewest steps.

        On too few validation rows to choose by it is the one nearest to `steps`.
        """
        if len(self.tokens) < FEWEST:
            return min(looks, key=lambda look: (abs(look.steps - steps), look.steps))
        return min(looks, key=lambda look: (loss_of(look.nats, self.tokens), look.steps))

    def curve(self, looks: Sequence[Look]) -> list[tuple[int, float]]:
        """Validation loss after so many steps."""
        return [(look.steps, loss_of(look.nats, self.tokens)) for look in looks]


def contest(
    lm: LanguageModel,
    config: RunConfig,
    client: str,
    steps: int,
    federated: StateDict,
    rows: Rows,
    local: StateDict | None = None,
    earlier: Sequence[tuple[int, StateDict]] = (),
) -> Contest:
    """Make a client's candidates and choose one.

    Args:
        lm: the base with an adapter of the federated model's rank.
        config: the run; its `[personal]` says what is made.
        client: its name, which its randomness follows from.
        steps: optimizer steps that it made in the federation.
        federated: the federation's model, as for `set_adapter`.
        rows: what it trains on, and what decides.
        local: what training alone in so many steps came to, where that has been done.
        earlier: the federation's model after earlier rounds, with the steps that the client had made by then.

    Raises:
        ValueError: there is nothing to train on.
    """
    personal, home = config.personal, _Home(lm, config, client, rows)
    lengths = schedules(steps, personal.budget)
    fresh = starting_adapter(lm, config)
    joint, before = home.look(steps, federated), [home.look(made, state) for made, state in earlier]
    apart = {
        length: home.alone(fresh, steps, local)
        if length == steps
        else home.trained(fresh, length, looks=_OFTEN if length == lengths.alone[-1] else _LOOKS)
        for length in lengths.alone
    }
    after = home.trained(federated, lengths.left, " tuned", personal.lr_factor, done=steps)
    part, alone = home.lowest(apart[lengths.left], steps), home.lowest([*chain(*apart.values())], steps)
    looks: list[tuple[Kind, float, Look]] = [("federated", 0.0, joint)]
    if before:
        looks.append(("earlier", 0.0, home.lowest(before, steps)))
    for weight in personal.weights:
        state = mixtures.mixed(lm, federated, part.adapter, weight)
        looks.append(("mixed", weight, home.look(steps + part.steps, state)))
    looks += [("tuned", 0.0, home.lowest(after, lengths.alone[-1])), ("alone", 1.0, alone)]
    candidates = tuple(
        Candidate(kind, weight, look.steps, _away(lm, federated, look.adapter), look.nats)
        for kind, weight, look in looks
    )
    choice = choose(candidates, home.tokens, personal.margin)
    *shorter, longest = apart
    curves = {"alone": apart[longest], **{f"alone, {length} steps": apart[length] for length in shorter}}
    curves |= {"federated": [*before, joint], "tuned": [joint, *after]}
    return Contest(
        adapter=looks[choice.chosen][2].adapter,
        alone=alone.adapter,
        choice=choice,
        candidates=candidates,
        tokens=home.tokens,
        curves={name: home.curve(found) for name, found in curves.items()},
    )


def _away(lm: LanguageModel, federated: StateDict, state: StateDict) -> float:
    return 0.0 if state is federated else mixtures.distance(lm, federated, state)
