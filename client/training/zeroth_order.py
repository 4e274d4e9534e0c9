"""Training without a gradient, for methods that bring their own steps (`strategies.local.Hooks.descend`).

Each step asks for the loss of its rows at adapters that the method chooses. No activations are kept, so the memory is
that of using the model.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterator, Sequence

import torch

from apiary.config.schedule import learning_rate
from apiary.config.schema import TrainConfig
from apiary.core.messages import FitReport
from apiary.core.tensors import StateDict, generator, threads
from apiary.data.batches import Batch, Corpus
from apiary.models import adapters
from apiary.models.adapters import LanguageModel
from client.training.objectives import OBJECTIVES
from client.training.trainer import BatchStream, FitResult, StepRecord, VisitPlan
from strategies.local import Descend, Loss


def fit(
    lm: LanguageModel, start: StateDict, corpus: Corpus, config: TrainConfig, plan: VisitPlan, descend: Descend
) -> FitResult:
    """What a method makes of the steps of a visit that go from `start` without a gradient.

    What the method draws follows from (seed, client, cursor), and so a client that is asked again makes the same steps.
    Dropout is off, and neither `train.clip_norm` nor weight decay plays a part; there are no replayed rows.

    Args:
        lm: the model.
        start: the whole adapter.
        corpus: the client's rows.
        config: batches, learning rate and objective.
        plan: the visit; its observers are told a gradient norm of NaN.
        descend: the method's steps.

    Raises:
        FloatingPointError: no step at all had a loss that is a number, or the steps are far too long.
        ValueError: the corpus is empty.
    """
    if not len(corpus):
        raise ValueError("there is nothing to train on: the corpus is empty")
    began = time.perf_counter()
    steps = _Steps(lm, corpus, config, plan)
    with threads(config.threads):
        made = descend(steps.losses(), start, generator(plan.seed, plan.client, "seeds", *plan.cursor))
    if made.skipped == plan.steps:
        raise FloatingPointError("the loss is no number in any step of this visit; a lower train.lr usually helps")
    loss = steps.nats / steps.tokens if steps.tokens else float("nan")
    report = FitReport(steps.tokens, steps.examples, plan.steps, loss, time.perf_counter() - began)
    return FitResult(made.delta, steps.rows.cursor, report, rows=len(corpus), walked=len(steps.rows.walked))


class _Steps:
    """The losses of a visit's steps, and the sums over the steps that were made."""

    def __init__(self, lm: LanguageModel, corpus: Corpus, config: TrainConfig, plan: VisitPlan) -> None:
        self._lm, self._config, self._plan = lm, config, plan
        epochs = functools.partial(generator, plan.seed, plan.client, "epoch")
        self.rows = BatchStream(corpus, config.batch_tokens, epochs, plan.cursor)
        self._measure = _Measure(lm, config.objective)
        self.nats, self.tokens, self.examples = 0.0, 0, 0

    def losses(self) -> Iterator[tuple[Loss, float]]:
        """Of each step in turn the loss of its rows and its learning rate."""
        plan, seen = self._plan, self._measure.seen
        for step in range(plan.steps):
            batches = self.rows.take(self._config.accumulate, self._lm)
            lr = learning_rate(plan.first_step + step, plan.total_steps, self._config)
            seen.clear()
            yield functools.partial(self._measure, batches), lr
            if not all(map(math.isfinite, seen)):
                continue  # the method has skipped this step
            tokens = sum(int(batch.targets.sum()) for batch in batches)
            record = StepRecord(step, sum(seen) / len(seen), tokens, lr, float("nan"))
            self.tokens += tokens
            self.examples += sum(len(batch.rows) for batch in batches)
            self.nats += record.loss * tokens
            for observe in plan.observers:
                observe(record)


class _Measure:
    """The loss of batches under an adapter, in nats per trained token; `seen` holds those of the step so far."""

    def __init__(self, lm: LanguageModel, objective: str) -> None:
        self._lm, self._objective = lm, OBJECTIVES.build(objective)
        self.seen: list[float] = []

    def __call__(self, batches: Sequence[Batch], adapter: StateDict) -> float:
        adapters.set_adapter(self._lm, adapter)
        with torch.no_grad(), adapters.autocast(self._lm):
            nats = sum(float(self._objective(self._lm.model, batch).double().sum()) for batch in batches)
        self.seen.append(nats / max(1, sum(int(batch.targets.sum()) for batch in batches)))
        return self.seen[-1]
