"""A client's part of FedKSeed: steps without a gradient, of which scalars for seeds are all that leaves.

Two forward passes make a step, and no activations are kept, so that memory is that of using the model. See
`strategies.seed_scalars` for what travels, and `strategies.fedkseed` for the server.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from apiary.config.schedule import learning_rate
from apiary.config.schema import RunConfig
from apiary.core.messages import FitReport, Payload
from apiary.core.tensors import StateDict, generator
from apiary.data.batches import Batch, Corpus
from apiary.models import adapters
from apiary.models.adapters import LanguageModel
from client.training.objectives import OBJECTIVES
from client.training.trainer import Cursor, FitResult, Observer, StepRecord, Way, threads
from strategies import seed_scalars


class Place(NamedTuple):
    """A visit in the run, as `client.training.trainer.fit` has it."""

    client: str
    cursor: Cursor
    first_step: int
    total_steps: int
    steps: int


def used(config: RunConfig) -> bool:
    """Whether the run's clients train this way."""
    return config.strategy.name == "fedkseed"


def opened(lm: LanguageModel, payload: Payload, config: RunConfig) -> Payload:
    """The payload with the adapter that its scalars stand for."""
    start = adapters.fresh_adapter(lm, config.seed)
    scalars = seed_scalars.of_tensor(payload.adapter[seed_scalars.NAME], _seeds(config))
    return payload._replace(adapter=seed_scalars.rebuild(start, scalars))


def fit(
    lm: LanguageModel,
    start: StateDict,
    corpus: Corpus,
    config: RunConfig,
    place: Place,
    observers: Sequence[Observer] = (),
) -> FitResult:
    """What the steps of a visit come to that go from `start` without a gradient; the delta is one tensor of scalars.

    Seeds follow from (seed, client, cursor), and so a client that is asked again makes the same steps. Dropout is off,
    and neither `train.clip_norm` nor weight decay plays a part.

    Args:
        lm: the model.
        start: the adapter, as `opened` gives it.
        corpus: the client's rows.
        config: the run.
        place: of the visit in the run.
        observers: told of every step; the gradient norm is NaN.

    Raises:
        FloatingPointError: no step at all had a loss that is a number, or the steps are far too long.
        ValueError: the corpus is empty.
    """
    if not len(corpus):
        raise ValueError("there is nothing to train on: the corpus is empty")
    began = time.perf_counter()
    train, (client, cursor, first, total, steps) = config.train, place
    way = Way(corpus, train.batch_tokens, functools.partial(generator, config.seed, client, "epoch"), cursor)
    measure = _Measure(lm, train.objective)
    counts = {"tokens": 0, "examples": 0}

    def losses() -> Iterator[tuple[seed_scalars.Loss, float]]:
        for step in range(steps):
            batches, lr = way.take(train.accumulate, lm), learning_rate(first + step, total, train)
            measure.seen.clear()
            yield functools.partial(measure, batches), lr
            if not all(map(math.isfinite, measure.seen)):
                continue  # the walk has skipped this step
            tokens = sum(int(batch.targets.sum()) for batch in batches)
            counts["tokens"] += tokens
            counts["examples"] += sum(len(batch.rows) for batch in batches)
            record = StepRecord(step, sum(measure.seen) / len(measure.seen), tokens, lr, float("nan"))
            measure.total += record.loss * tokens
            for observe in observers:
                observe(record)

    try:
        with threads(train.threads):
            went = seed_scalars.walk(
                losses(),
                start,
                _seeds(config),
                epsilon=_option(config, "epsilon", seed_scalars.EPSILON),
                rng=generator(config.seed, client, "seeds", *cursor),
            )
    except seed_scalars.TooFar as error:
        raise FloatingPointError(str(error)) from error
    if went.skipped == steps:
        raise FloatingPointError("the loss is no number in any step of this visit; a lower train.lr usually helps")
    delta = {seed_scalars.NAME: seed_scalars.to_tensor(went.scalars, _seeds(config))}
    loss = measure.total / counts["tokens"] if counts["tokens"] else float("nan")
    report = FitReport(counts["tokens"], counts["examples"], steps, loss, time.perf_counter() - began)
    return FitResult(delta, way.cursor, report)


class _Measure:
    """The loss of batches under an adapter, in nats per trained token; keeps what it has seen."""

    def __init__(self, lm: LanguageModel, objective: str) -> None:
        self._lm, self._objective = lm, OBJECTIVES.build(objective)
        self.seen: list[float] = []
        self.total = 0.0

    def __call__(self, batches: Sequence[Batch], adapter: StateDict) -> float:
        adapters.set_adapter(self._lm, adapter)
        with torch.no_grad(), adapters.autocast(self._lm):
            nats = sum(float(self._objective(self._lm.model, batch).double().sum()) for batch in batches)
        self.seen.append(nats / max(1, sum(int(batch.targets.sum()) for batch in batches)))
        return self.seen[-1]


def _seeds(config: RunConfig) -> tuple[int, ...]:
    return seed_scalars.candidates(config.seed, int(_option(config, "candidates", seed_scalars.CANDIDATES)))


def _option(config: RunConfig, name: str, default: float) -> float:
    return float(config.strategy.options.get(name, default))
