"""The training loop under record-level differential privacy: DP-SGD, and AdamW on the same privatised gradient.

What makes the guarantee true is here in one place: rows are really drawn by Poisson sampling, each row's gradient is
clipped, noise from a secret stream is added to the sum, and the sum is divided by a number that is fixed beforehand.
The accountant in `apiary.privacy.accounting` is told of the same rates, noise and steps. No number that depends on the
rows leaves, but through the adapter.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from apiary.config.schedule import learning_rate
from apiary.config.schema import RunConfig
from apiary.core.errors import UserError
from apiary.core.messages import FitReport
from apiary.core.tensors import StateDict, subtract, threads
from apiary.data.batches import Batch, Corpus, collate
from apiary.models.adapters import LanguageModel, autocast, get_adapter, pad_id, set_adapter, training
from apiary.models.loss import to_device
from apiary.privacy.mechanism import VisitMechanism
from apiary.privacy.noise import SecretNoise
from client.training.objectives import OBJECTIVES, Objective, finite
from client.training.trainer import Cursor, FitResult, Observer, StepRecord, make_optimizer, set_rate
from strategies.local import Penalty

_UNITS = 2.0**36  # in a clipping norm: sums of up to 2^17 rows are whole numbers that float64 holds
_SLACK = 1 - 1e-6  # of the clipping norm; more than the rounding of a norm in float64 comes to
_PROBE = 8  # tokens


class Sum(NamedTuple):
    """Clipped gradients of some rows, added up without rounding: float64. The counts are for the client alone."""

    gradients: dict[str, Tensor]
    nats: float
    tokens: int


class PrivateVisit(NamedTuple):
    """What a private visit is made of beside its model, its rows and `[train]`."""

    mechanism: VisitMechanism  # all that decides privacy; the ledger was charged with its event
    new: int  # the first rows of the corpus, which are new; the others come from the replay buffer
    noise: SecretNoise  # the stream of the noise
    # The stream that draws the rows; secret too, for the amplification by sampling holds only against who does not know
    # which rows were drawn.
    sampling: SecretNoise
    first_step: int  # steps made before this visit, of `total_steps` in the run
    total_steps: int
    penalties: tuple[Penalty, ...] = ()
    observers: tuple[Observer, ...] = ()  # told the loss of the drawn rows, so they must stay with the client
    factors: Literal["both", "b", "a"] = "both"  # trained, clipped and noised; the change of the others is zero


def fit_private(
    lm: LanguageModel, start: StateDict, corpus: Corpus, config: RunConfig, visit: PrivateVisit
) -> FitResult:
    """The change that a visit's private steps make to the adapter `start` (Abadi et al. 2016, algorithm 1).

    The loss of a row is the mean over its trained tokens. A step's gradient is
    (sum over the drawn rows of clip(g_i, C) + N(0, (z C)^2)) / batch_rows, plus that of the penalties, which see the
    parameters alone and so cost nothing. `train.optimizer` then takes it: plain SGD, or AdamW with empty moments.
    `train.clip_norm`, `train.accumulate` and `train.batch_tokens` have no meaning here and are not used. A row whose
    gradient is NaN or infinite adds nothing: an error would tell that it was drawn.

    Args:
        lm: the model.
        start: the received adapter, with the factors to add to the base.
        corpus: new rows, then those of the replay buffer.
        config: the optimizer and its schedule; `[privacy]` is not read.
        visit: the mechanism that is run, and where the visit stands in the run.

    Returns:
        The change, an empty cursor, and a report of public numbers: the expected rows as tokens and examples, no loss.

    Raises:
        FloatingPointError: the adapter itself overflowed; it is released, so this tells nothing more.
        RuntimeError: gradients do not reach the whole adapter, or it does not move.
        UserError: the adapter has dropout.
        ValueError: `start` does not fit the adapter, or more rows are new than there are.
    """
    if config.adapter.dropout:
        raise UserError(
            f"adapter.dropout = {config.adapter.dropout}: must be 0 with privacy.unit = 'record'; "
            "the noise regularises more than enough"
        )
    began, train, mechanism = time.perf_counter(), config.train, visit.mechanism
    rates, steps = mechanism.rates(len(corpus), visit.new), mechanism.sampler.steps
    set_adapter(lm, start)
    received = get_adapter(lm)
    objective = OBJECTIVES.build(train.objective)
    with threads(train.threads), training(lm, visit.factors) as moving:
        _refuse_unreached(moving, objective)
        optimizer = make_optimizer(moving.adapter, train, lm.device)
        for step in range(steps):
            rows = visit.sampling.chosen(rates)
            total = clipped_sum(moving, objective, corpus, rows, mechanism.sensitivity.l2)
            gradients = privatised(total.gradients, visit.noise, mechanism.noise_std, mechanism.batch_rows)
            lr = learning_rate(visit.first_step + step, visit.total_steps, train)
            _take(moving, optimizer, gradients, visit.penalties, lr)
            if step == 0 and (mechanism.noise_multiplier or len(rows)):
                _refuse_standstill(lm, received)
            record = _record(step, total, gradients, lr)
            for observe in visit.observers:
                observe(record)
    delta = finite(subtract(get_adapter(lm), received))
    expected = steps * mechanism.batch_rows
    report = FitReport(expected, expected, steps, math.nan, time.perf_counter() - began)
    return FitResult(dict(delta), Cursor(), report)


def _refuse_unreached(lm: LanguageModel, objective: Objective) -> None:
    """Check on a row of padding, which tells nothing of anybody's rows, that every trained tensor gets a gradient.

    Raises:
        RuntimeError: one does not, so that training would add noise to it and nothing else.
    """
    ids = torch.full((1, _PROBE), pad_id(lm.tokenizer))
    padding = Batch(ids, torch.arange(_PROBE).unsqueeze(0) > 0, torch.zeros(1, dtype=torch.int64))
    found, _ = row_gradient(lm, objective, to_device(padding, lm.device))
    missing = [name for name in lm.adapter if name not in found]
    if missing:
        raise RuntimeError(
            f"{missing[0]} gets no gradient ({len(missing)} of {len(lm.adapter)} tensors): training privately would "
            "add noise to it and nothing else; leave that module out of adapter.targets"
        )


def clipped_sum(lm: LanguageModel, objective: Objective, corpus: Corpus, rows: np.ndarray, clip: float) -> Sum:
    """The gradients of `rows`, each clipped to the L2 norm `clip` over the whole adapter, added up.

    Blanking one row moves the sum by exactly what that row added, whose norm is `clip` at most, in every dtype:

    - Each row passes through the model alone. Rows that share a matrix product share its rounding as well, since the
      size of a product decides how it is cut into blocks; in bfloat16 one row then moves the gradients of the others.
    - A clipped gradient is cut to whole multiples of `clip` / 2^36, towards zero, which makes no norm larger. Whole
      numbers add up without rounding, in whatever order.

    A row whose gradient is NaN or infinite adds nothing.
    """
    there = torch.device("cpu") if lm.device.type == "mps" else lm.device  # MPS has no float64
    total = {name: torch.zeros(p.shape, dtype=torch.int64, device=there) for name, p in lm.adapter.items()}
    nats, tokens = 0.0, 0
    for row in rows:
        batch = to_device(collate(corpus, np.array([row]), pad_id(lm.tokenizer)), lm.device)
        gradient, loss = row_gradient(lm, objective, batch)
        nats, tokens = nats + loss, tokens + int(batch.targets.sum())
        for name, units in _clipped({name: g.to(there, torch.float64) for name, g in gradient.items()}, clip).items():
            total[name] += units
    return Sum({name: units.double() * (clip / _UNITS) for name, units in total.items()}, nats, tokens)


def row_gradient(lm: LanguageModel, objective: Objective, batch: Batch) -> tuple[dict[str, Tensor], float]:
    """The gradient of a row's mean loss per trained token, of the tensors that it reaches, and its summed nats."""
    with autocast(lm):
        losses = objective(lm.model, batch)
    mean = (losses / batch.targets.sum(1).clamp(min=1)).sum()
    found = torch.autograd.grad(mean, list(lm.adapter.values()), allow_unused=True)
    reached = zip(lm.adapter, found, strict=True)
    return {name: g for name, g in reached if g is not None}, float(losses.detach().sum())


def _clipped(gradient: StateDict, clip: float) -> dict[str, Tensor]:
    """The float64 gradient g min(1, C / ||g||) in whole units of C / 2^36, int64; nothing where g is not finite."""
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradient.values()))
    if not math.isfinite(norm):
        return {}
    scale = _UNITS / clip * (1.0 if norm <= _SLACK * clip else _SLACK * clip / norm)
    return {name: (g * scale).trunc().long() for name, g in gradient.items()}


def privatised(gradients: Mapping[str, Tensor], noise: SecretNoise, deviation: float, rows: int) -> dict[str, Tensor]:
    """The gradients with noise of `deviation` on every number, divided by `rows`; float32, where they were.

    The noise is added in float64, whose rounding to float32 comes after it and so tells nothing.

    Args:
        rows: the expected rows of a step, never the drawn ones, whose number is private.
    """
    found = {}
    for name, gradient in gradients.items():
        noisy = gradient.to("cpu", torch.float64)
        if deviation:
            noisy = noisy + deviation * torch.from_numpy(noise.normal(noisy.numel())).view(noisy.shape)
        found[name] = (noisy / rows).to(gradient.device, torch.float32)
    return found


def _take(
    lm: LanguageModel,
    optimizer: torch.optim.Optimizer,
    gradients: StateDict,
    penalties: Sequence[Penalty],
    lr: float,
) -> None:
    """One step of the optimizer along the private gradient and that of the penalties."""
    for name, parameter in lm.adapter.items():
        parameter.grad = gradients[name].to(parameter.device, copy=True)
    if penalties:
        torch.stack([penalty(lm.adapter) for penalty in penalties]).sum().backward()
    set_rate(optimizer, lr)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _refuse_standstill(lm: LanguageModel, received: StateDict) -> None:
    now = get_adapter(lm)
    if all(torch.equal(now[name], received[name]) for name in now):
        raise RuntimeError("the first private step left the adapter as it was: training does not reach its parameters")


def _record(step: int, total: Sum, gradients: StateDict, lr: float) -> StepRecord:
    norm = torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()
    return StepRecord(step, total.nats / total.tokens if total.tokens else math.nan, total.tokens, lr, float(norm))
