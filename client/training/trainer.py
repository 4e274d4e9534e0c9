"""The one training loop: from a received adapter to the change that a client sends back.

Everything random in a visit follows from (seed, client, cursor), so a client that is asked again,
on another day or in another process, makes the same steps.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from apiary.config.schedule import learning_rate
from apiary.config.schema import TrainConfig
from apiary.core.errors import UnsoundStart
from apiary.core.lora import is_b
from apiary.core.messages import FitReport
from apiary.core.tensors import StateDict, derive_seed, generator, threads
from apiary.data.batches import Batch, Corpus, collate, plan_batches
from apiary.models.adapters import LanguageModel, autocast, live, pad_id, set_adapter, training
from apiary.models.loss import to_device
from client.training.objectives import OBJECTIVES, Objective, finite
from strategies.local import Hooks


class Cursor(NamedTuple):
    """Where a client stands in its own data: the next batch it will train on."""

    epoch: int = 0
    batch: int = 0


class StepRecord(NamedTuple):
    """What an observer is told after an optimizer step."""

    step: int  # within the visit, from 0
    loss: float  # mean nats per trained token, without penalties and replayed rows
    tokens: int  # trained tokens, but for replayed ones
    lr: float
    grad_norm: float  # before clipping
    replayed: int = 0  # trained tokens from the buffer


Observer = Callable[[StepRecord], None]


class Replay(NamedTuple):
    """Rows of earlier tasks that are trained again beside the new ones."""

    corpus: Corpus
    cursor: Cursor
    share: float  # of a step's padded tokens, in (0, 1)


class FitResult(NamedTuple):
    """The outcome of a visit."""

    delta: dict[str, Tensor]  # CPU float32, from the received adapter
    cursor: Cursor  # where the next visit goes on
    report: FitReport
    replay: Cursor = Cursor()  # likewise, in the replayed rows
    rows: int = 0  # of the corpus that new batches were drawn from; stays with the client
    walked: int = 0  # of these, how many were in a batch; likewise


def steps_per_round(config: TrainConfig, corpus: Corpus, replay: Replay | None = None) -> int:
    """Optimizer steps of one visit: `train.steps`, or as many as cover `train.epochs` of this client's new batches."""
    if config.epochs is None:
        return config.steps or 1
    batches = len(plan_batches(corpus.lengths, _budgets(config, replay)[0], generator(0, "", "epoch", 0)))
    return max(1, math.ceil(config.epochs * batches / config.accumulate))


class VisitPlan(NamedTuple):
    """What a visit is made of beside its model, its rows and `[train]`.

    Everything random in it follows from `seed`, `client` and the cursors.
    """

    seed: int  # of the run
    client: str
    steps: int  # optimizer steps of this visit
    total_steps: int  # of the whole run, or of the visit's stage: the length of the learning-rate schedule
    first_step: int = 0  # steps of the schedule that were made before this visit
    cursor: Cursor = Cursor()  # where the visit begins in its rows
    replay: Replay | None = None  # rows of earlier tasks; None, or an empty corpus in it, is new rows alone
    factors: Literal["both", "b", "a"] = "both"  # those that are trained; the change of the others is zero
    hooks: Hooks = Hooks()  # what the run's method asks for
    observers: tuple[Observer, ...] = ()  # told of every step


def fit(lm: LanguageModel, start: StateDict, corpus: Corpus, config: TrainConfig, plan: VisitPlan) -> FitResult:
    """The change that a visit's optimizer steps make to the adapter `start`, and where they ended in the data.

    The loss of a step is the sum of its token losses divided by its trained tokens, over all its
    `accumulate` batches, so the split into batches does not change the gradient. AdamW starts with
    empty moments.

    With rows to replay, each of the batches is two: one of new rows with 1 - share of `batch_tokens`, and one of
    replayed rows with the rest. Each kind is walked through from end to end by a cursor of its own. The report tells
    the loss, tokens and examples of the new rows, and how many tokens were replayed.

    Args:
        lm: the model.
        start: the received adapter, with the factors to add to the base.
        corpus: the client's new rows.
        config: the optimizer, its schedule, and how batches are made.
        plan: the visit; its `hooks.correction` is added once a gradient is clipped, so that what it says of other
            clients' gradients counts in full.

    Raises:
        FloatingPointError: the loss or a gradient became NaN or infinite.
        ValueError: `start` does not fit the adapter, or the corpus is empty.
    """
    if not len(corpus):
        raise ValueError("there is nothing to train on: the corpus is empty")
    began = time.perf_counter()
    set_adapter(lm, start)
    rows, old = _streams(corpus, config, plan)
    nats, tokens, examples, replayed, made = 0.0, 0, 0, 0, 0
    with (
        threads(config.threads),
        _training(lm, derive_seed(plan.seed, plan.client, "dropout", *plan.cursor)),
        training(lm, plan.factors) as moving,
    ):
        loop = _Loop(moving, config, OBJECTIVES.build(config.objective), plan.hooks)
        for step in range(plan.steps):
            batches = rows.take(config.accumulate, lm)
            again = old.take(config.accumulate, lm) if old else ()
            record = loop.step(step, batches, learning_rate(plan.first_step + step, plan.total_steps, config), again)
            nats, tokens = nats + record.loss * record.tokens, tokens + record.tokens
            examples, replayed = examples + sum(len(batch.rows) for batch in batches), replayed + record.replayed
            made += 1
            for observe in plan.observers:
                observe(record)
    delta: StateDict = {name: p.detach().to("cpu", torch.float32) - start[name].float() for name, p in live(lm).items()}
    for project in (*plan.hooks.projections, finite):
        delta = project(delta)
    loss = nats / tokens if tokens else float("nan")
    report = FitReport(tokens, examples, made, loss, time.perf_counter() - began, replayed)
    return FitResult(dict(delta), rows.cursor, report, old.cursor if old else Cursor(), len(corpus), len(rows.walked))


def _streams(corpus: Corpus, config: TrainConfig, plan: VisitPlan) -> tuple[BatchStream, BatchStream | None]:
    """The batches of new rows, and those of replayed ones, which have a stream of their own."""
    budget, old_budget = _budgets(config, plan.replay)
    rows = BatchStream(corpus, budget, functools.partial(generator, plan.seed, plan.client, "epoch"), plan.cursor)
    if not (plan.replay and old_budget):
        return rows, None
    again = functools.partial(generator, plan.seed, plan.client, "replay")
    return rows, BatchStream(plan.replay.corpus, old_budget, again, plan.replay.cursor)


def _budgets(config: TrainConfig, replay: Replay | None) -> tuple[int, int]:
    """Padded tokens of a batch of new rows, and of one of replayed rows (0: there are none)."""
    if replay is None or not len(replay.corpus):
        return config.batch_tokens, 0
    old = min(max(1, round(replay.share * config.batch_tokens)), config.batch_tokens - 1)
    return config.batch_tokens - old, old


class BatchStream:
    """A client's batches without end: each epoch's plan from end to end, then the next epoch's. Owns the cursor."""

    def __init__(self, corpus: Corpus, budget: int, rng: Callable[[int], torch.Generator], cursor: Cursor) -> None:
        self._corpus, self._budget, self._rng = corpus, budget, rng
        self._plan = self._make(cursor.epoch)
        self.cursor = self._rolled(cursor)
        self.walked: set[int] = set()  # the rows of the batches that were taken

    def _make(self, epoch: int) -> list[np.ndarray]:
        return plan_batches(self._corpus.lengths, self._budget, self._rng(epoch))

    def _rolled(self, cursor: Cursor) -> Cursor:
        if cursor.batch < len(self._plan):
            return cursor
        self._plan = self._make(cursor.epoch + 1)
        return Cursor(cursor.epoch + 1, 0)

    def take(self, count: int, lm: LanguageModel) -> list[Batch]:
        """The next `count` batches, on the model's device."""
        batches = []
        for _ in range(count):
            batch = collate(self._corpus, self._plan[self.cursor.batch], pad_id(lm.tokenizer))
            self.walked.update(batch.rows.tolist())
            batches.append(to_device(batch, lm.device))
            self.cursor = self._rolled(self.cursor._replace(batch=self.cursor.batch + 1))
        return batches


def make_optimizer(
    parameters: Mapping[str, torch.nn.Parameter], config: TrainConfig, device: torch.device
) -> torch.optim.Optimizer:
    """`train.optimizer` with empty moments: AdamW, or stochastic gradient descent without momentum and decay.

    The B factors are a group of their own where their learning rate is another (`set_rate`).
    """
    apart = {name: config.lr_b if is_b(name) else 1.0 for name in parameters}
    groups = [
        {"params": [p for name, p in parameters.items() if apart[name] == factor], "factor": factor}
        for factor in dict.fromkeys(apart.values())
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr)
    return torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay, fused=device.type != "mps")


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of a step, that of B being `train.lr_b` times as high (LoRA+, Hayou et al. 2024)."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["factor"]


class _Loop:
    """One visit's optimizer and what an optimizer step does."""

    def __init__(
        self,
        lm: LanguageModel,
        config: TrainConfig,
        objective: Objective,
        hooks: Hooks,
    ) -> None:
        self._lm, self._config, self._objective, self._penalties = lm, config, objective, hooks.penalties
        correction = hooks.correction
        self._parameters = list(lm.adapter.values())
        for parameter in self._parameters:
            parameter.grad = None
        self._correction = [(p, correction[n].to(p.device, p.dtype)) for n, p in lm.adapter.items() if n in correction]
        self._optimizer = make_optimizer(lm.adapter, config, lm.device)

    def step(self, step: int, batches: Sequence[Batch], lr: float, again: Sequence[Batch] = ()) -> StepRecord:
        """One optimizer step on `batches`, and on replayed ones `again`.

        Raises:
            FloatingPointError: the loss or the gradient is NaN or infinite; the adapter is not
                stepped. `UnsoundStart` in the first step.
        """
        tokens, replayed = (sum(int(batch.targets.sum()) for batch in kind) for kind in (batches, again))
        nats = sum(self._backward(batch, tokens + replayed) for batch in batches)
        old = sum(self._backward(batch, tokens + replayed) for batch in again)
        if self._penalties:
            torch.stack([penalty(self._lm.adapter) for penalty in self._penalties]).sum().backward()
        limit = self._config.clip_norm or math.inf
        grad_norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, limit))
        if not (math.isfinite(nats + old) and math.isfinite(grad_norm)):
            loss = (nats + old) / (tokens + replayed)
            if not step:
                raise UnsoundStart(f"loss {loss:.4g} and gradient norm {grad_norm:.4g} with the adapter as it was sent")
            raise FloatingPointError(
                f"loss {loss:.4g} and gradient norm {grad_norm:.4g} at step {step + 1} of this visit; "
                "a lower train.lr or train.clip_norm usually helps"
            )
        for parameter, more in self._correction:
            parameter.grad = more.clone() if parameter.grad is None else parameter.grad.add_(more)
        set_rate(self._optimizer, lr)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return StepRecord(step, nats / tokens, tokens, lr, grad_norm, replayed)

    def _backward(self, batch: Batch, tokens: int) -> float:
        with autocast(self._lm):
            losses = self._objective(self._lm.model, batch)
        total = losses.sum()
        (total / tokens).backward()
        return float(total.detach())


@contextmanager
def _training(lm: LanguageModel, seed: int) -> Iterator[None]:
    """Within it the adapter's dropout is on and draws from `seed`; the base stays in eval mode, dropout and all."""
    devices = [lm.device] if lm.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        if lm.device.type == "cpu":  # what is seeded for other devices writes down the whole stack each time
            torch.default_generator.manual_seed(seed)
        else:
            torch.manual_seed(seed)
        for module in lm.dropouts:
            module.train()
        try:
            yield
        finally:
            for module in lm.dropouts:
                module.eval()
            for parameter in live(lm).values():
                parameter.grad = None
