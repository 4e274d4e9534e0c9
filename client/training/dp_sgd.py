"""The training loop under record-level differential privacy: DP-SGD, and AdamW on the same privatised gradient.

What makes the guarantee true is here in one place: rows are really drawn by Poisson sampling, each row's gradient is
clipped, noise from a secret stream is added to the sum, and the sum is divided by a number that is fixed beforehand.
The accountant in `apiary.privacy.accounting` is told of the same rates, noise and steps. No number that depends on the
rows leaves, but through the adapter.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from apiary.config.schedule import learning_rate
from apiary.config.schema import RunConfig
from apiary.core.errors import UserError
from apiary.core.messages import FitReport
from apiary.core.tensors import StateDict, generator, subtract
from apiary.data.batches import Batch, Corpus, collate, plan_batches
from apiary.models.adapters import LanguageModel, autocast, get_adapter, pad_id, set_adapter, training
from apiary.models.fused_layers import as_peft
from apiary.models.loss import to_device
from apiary.privacy.mechanism import VisitMechanism
from apiary.privacy.noise import SecretNoise
from client.training.objectives import OBJECTIVES, Objective, finite
from client.training.trainer import Cursor, FitResult, Observer, StepRecord, make_optimizer, threads
from strategies.local import Penalty

_ROOM = 1 << 28  # numbers in the gradients of single rows held at a time: 1 GiB in float32
_SLACK = 1 - 1e-6  # of the clipping norm; more than what float32 can err in a norm's last place


class Sum(NamedTuple):
    """Clipped gradients of some rows, added up: float32 on the model's device. The counts are for the client alone."""

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
    `train.clip_norm` and `train.accumulate` have no meaning here and are not used. A row whose gradient is NaN or
    infinite adds nothing: an error would tell that it was drawn.

    Args:
        lm: the model.
        start: the received adapter, with the factors to add to the base.
        corpus: new rows, then those of the replay buffer.
        config: the optimizer, its schedule, and the largest pass through the model; `[privacy]` is not read.
        visit: the mechanism that is run, and where the visit stands in the run.

    Returns:
        The change, an empty cursor, and a report of public numbers: the expected rows as tokens and examples, no loss.

    Raises:
        FloatingPointError: the adapter itself overflowed; it is released, so this tells nothing more.
        RuntimeError: gradients do not come row by row, or the adapter does not move.
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
    with threads(train.threads), training(lm, visit.factors) as moving, row_gradients(moving):
        optimizer = make_optimizer(list(moving.adapter.values()), train, lm.device)
        for step in range(steps):
            rows = visit.sampling.chosen(rates)
            total = clipped_sum(moving, objective, corpus, rows, mechanism.sensitivity.l2, train.batch_tokens)
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


@contextmanager
def row_gradients(lm: LanguageModel) -> Iterator[None]:
    """Within it a backward pass leaves each row's own gradient at `parameter.grad_sample`, (b, *shape).

    By Opacus' hooks on the A and B of each LoRA layer; afterwards the model is as it was.
    """
    from opacus.grad_sample import GradSampleHooks

    layers = _trained_layers(lm)
    modes = [layer.training for layer in layers.values()]
    with as_peft(lm.model), warnings.catch_warnings():
        # The first layers' inputs need no gradient.
        warnings.filterwarnings("ignore", "Full backward hook is firing")
        hooks = GradSampleHooks(lm.model, loss_reduction="sum")
        for layer in layers.values():
            layer.training = True  # Opacus passes over a layer that is not
        try:
            yield
        finally:
            hooks.cleanup()
            for layer, mode in zip(layers.values(), modes, strict=True):
                layer.training = mode
                for left in ("activations", "max_batch_len"):  # by a pass that failed
                    if hasattr(layer, left):
                        delattr(layer, left)
            for parameter in lm.adapter.values():
                parameter.grad = None


def _trained_layers(lm: LanguageModel) -> dict[str, nn.Module]:
    own = ((name, module, module.parameters(recurse=False)) for name, module in lm.model.named_modules())
    return {name: module for name, module, parameters in own if any(p.requires_grad for p in parameters)}


def clipped_sum(
    lm: LanguageModel, objective: Objective, corpus: Corpus, rows: np.ndarray, clip: float, batch_tokens: int
) -> Sum:
    """The gradients of `rows`, each clipped to the L2 norm `clip` over the whole adapter, added up.

    Taking away one row moves the sum by `clip` at most. The rows pass through the model in batches of `batch_tokens`
    (a longer row alone), or fewer where their gradients would need much memory. To be called within `row_gradients`.

    Raises:
        RuntimeError: gradients do not come row by row.
    """
    total = {name: torch.zeros_like(parameter) for name, parameter in lm.adapter.items()}
    nats, tokens = 0.0, 0
    room = max(1, _ROOM // sum(parameter.numel() for parameter in lm.adapter.values()))
    for planned in plan_batches(corpus.lengths[rows], batch_tokens, generator(0, "private")):
        for part in np.split(planned, range(room, len(planned), room)):
            batch = to_device(collate(corpus, rows[part], pad_id(lm.tokenizer)), lm.device)
            nats += _backward(lm, objective, batch)
            tokens += int(batch.targets.sum())
            for name, gradients in _clipped(_collect(lm, len(part)), clip).items():
                total[name] += gradients
    return Sum(total, nats, tokens)


def _backward(lm: LanguageModel, objective: Objective, batch: Batch) -> float:
    with autocast(lm):
        losses = objective(lm.model, batch)
    _refuse_mixed(lm, batch)
    (losses / batch.targets.sum(1).clamp(min=1)).sum().backward()
    return float(losses.detach().sum())


def _refuse_mixed(lm: LanguageModel, batch: Batch) -> None:
    for name, layer in _trained_layers(lm).items():
        seen: list[list[Tensor]] = getattr(layer, "activations", [])
        if not seen or any(inputs[0].shape[:2] != batch.ids.shape for inputs in seen):
            raise RuntimeError(
                f"{name} does not see its input row by row, so the gradients of rows cannot be told apart: "
                "leave that module out of adapter.targets"
            )


def _collect(lm: LanguageModel, rows: int) -> dict[str, Tensor]:
    """Takes the gradients of single rows from the parameters, (rows, *shape) float32."""
    found = {}
    for name, parameter in lm.adapter.items():
        gradients = getattr(parameter, "grad_sample", None)
        if not isinstance(gradients, Tensor) or gradients.shape != (rows, *parameter.shape):
            raise RuntimeError(f"{name} got no gradient of each row: training privately would not train it")
        found[name] = gradients.float()
        parameter.grad_sample = parameter.grad = None  # type: ignore[attr-defined]
    return found


def _clipped(gradients: Mapping[str, Tensor], clip: float) -> dict[str, Tensor]:
    """The sum over rows of g_i min(1, clip / ||g_i||), the norm taken over all tensors together."""
    squares = [torch.linalg.vector_norm(g.flatten(1), dim=1).square() for g in gradients.values()]
    norms = torch.stack(squares).sum(0).sqrt()  # (b,)
    sound = norms.isfinite()
    factors = (_SLACK * clip / norms[sound]).clamp(max=1.0)
    if not bool(sound.all()):
        gradients = {name: g[sound] for name, g in gradients.items()}  # 0 times NaN would be NaN
    return {name: torch.tensordot(factors, g, 1) for name, g in gradients.items()}


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
            noisy += deviation * torch.from_numpy(noise.normal(noisy.numel())).view(noisy.shape)
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
        parameter.grad = gradients[name].clone()
    if penalties:
        torch.stack([penalty(lm.adapter) for penalty in penalties]).sum().backward()
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _refuse_standstill(lm: LanguageModel, received: StateDict) -> None:
    now = get_adapter(lm)
    if all(torch.equal(now[name], received[name]) for name in now):
        raise RuntimeError("the first private step left the adapter as it was: training does not reach its parameters")


def _record(step: int, total: Sum, gradients: StateDict, lr: float) -> StepRecord:
    norm = torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()
    return StepRecord(step, total.nats / total.tokens if total.tokens else math.nan, total.tokens, lr, float(norm))
