"""A client of HetLoRA that lowers its own rank where the data ask for less (rank self-pruning, Cho et al. 2024).

A client of rank r looks at its tail: in all modules the columns of B and rows of A beyond floor(gamma r). A penalty on
the tail is part of its loss, and where a visit leaves the tail smaller than it was, the client cuts it off, sends what
is left, and has that lower rank from then on. The server sends each client the rank that it sent last, so nothing has
to be remembered here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from apiary.config.schema import RunConfig
from apiary.core import lora
from apiary.core.lora import Factors
from apiary.core.tensors import StateDict, add
from strategies.local import Penalty


def used(config: RunConfig) -> bool:
    """Whether the run's clients prune."""
    return config.strategy.name == "hetlora" and _option(config, "prune") > 0


def rank_of(config: RunConfig, factors: StateDict, rank: int) -> int:
    """The rank of factors that travel, where clients prune, but never above the site's `rank`; else that one."""
    return min(rank, next(iter(lora.split(factors).values())).rank) if used(config) else rank


def kept(rank: int, gamma: float) -> int:
    """The rank without its tail: floor(gamma r), at least 1."""
    return max(1, math.floor(gamma * rank))


def tail(adapter: Mapping[str, Tensor], rank: int) -> Tensor:
    """The sum over the modules of ||B[:, rank:]||_F ||A[rank:, :]||_F, a scalar."""
    return torch.stack([f.b[:, rank:].norm() * f.a[rank:].norm() for f in lora.split(adapter).values()]).sum()


def penalties(config: RunConfig, rank: int) -> tuple[Penalty, ...]:
    """`strategy.options.penalty` times the tail of a client of this rank; none where clients do not prune."""
    if not used(config) or not (weight := _option(config, "penalty")):
        return ()
    most = kept(rank, _option(config, "prune"))
    return (lambda adapter: weight * tail(adapter, most),) if most < rank else ()


def pruned(config: RunConfig, start: StateDict, delta: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is sent of a change: all of it, or its leading slices where the tail became smaller.

    The change is then one from the leading slices of `start`, at the scale of the lower rank.

    Args:
        config: the run.
        start: the adapter that was received, of rank r.
        delta: its change by the visit.
    """
    if not used(config):
        return delta
    rank = next(iter(lora.split(delta).values())).rank
    most = kept(rank, _option(config, "prune"))
    if most == rank or tail(add(start, delta), most) >= tail(start, most):
        return delta
    scaling = lora.scaling(config.adapter.alpha, config.adapter.scaling)
    scale = scaling(rank) / scaling(most)
    return lora.join(
        {
            m: Factors((f.b[:, :most] * scale).contiguous(), f.a[:most].contiguous())
            for m, f in lora.split(delta).items()
        }
    )


def _option(config: RunConfig, name: str) -> float:
    return float(config.strategy.options.get(name, 0.0))
