"""What a client minimises: per-example losses, penalties on the adapter, and projections of the finished change."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from apiary.config.registry import Registry
from apiary.config.schema import Method
from apiary.core.errors import UserError
from apiary.core.tensors import StateDict, is_finite
from apiary.data.batches import Batch
from apiary.models.loss import row_losses
from strategies.local import Penalty

Objective: TypeAlias = Callable[[nn.Module, Batch], Tensor]  # -> (b,) summed nats, float32


OBJECTIVES: Registry[Objective] = Registry("train.objective")
PENALTIES: Registry[Penalty] = Registry("train.penalties", given=("start",))  # builders may ask for `start: StateDict`


@OBJECTIVES.register("sft")
def sft() -> Objective:
    """Supervised fine-tuning: the cross-entropy of every trained token, summed over each example."""
    return row_losses


@PENALTIES.register("fedprox")
def fedprox(start: StateDict, mu: float) -> Penalty:
    """The proximal term mu/2 ||w - w_start||^2 over the adapter (Li et al. 2020, FedProx, equation 2).

    Raises:
        UserError: mu is negative.
    """
    if mu < 0:
        raise UserError(f"train.penalties: fedprox has mu = {mu}; it must be 0 or more (0.001 to 1 is usual)")
    anchors: dict[str, Tensor] = {}

    def penalty(adapter: Mapping[str, Tensor]) -> Tensor:
        if not anchors:  # moved to the parameters' device once, not on every step
            anchors.update({name: start[name].to(w.device, w.dtype, copy=True) for name, w in adapter.items()})
        return mu / 2 * torch.stack([(w - anchors[name]).square().sum() for name, w in adapter.items()]).sum()

    return penalty


def build_penalties(methods: Sequence[Method], start: StateDict) -> tuple[Penalty, ...]:
    """The penalties of a configuration, anchored at the adapter the client received.

    Raises:
        UserError: a penalty has an unknown name or option.
    """
    return tuple(PENALTIES.build(method.name, method.options, start=start) for method in methods)


def finite(delta: StateDict) -> StateDict:
    """The delta itself; the projection that ends every fit.

    Raises:
        FloatingPointError: an entry is NaN or infinite.
    """
    if not is_finite(delta):
        raise FloatingPointError("the trained adapter holds NaN or infinite values; a lower train.lr usually helps")
    return delta
