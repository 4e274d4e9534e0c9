"""Weighted averaging of updates."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Generator, Tensor

from apiary.exchange import Update
from apiary.tensors import StateDict, zeros_like
from strategies.core import AGGREGATORS, Aggregator, Reducer, ServerState, plain_step, same_payload


class _Sum(NamedTuple):
    total: dict[str, Tensor]  # float64: the order in which clients answer must not show in the float32 result
    weight: float


@AGGREGATORS.register("fedavg")
def fedavg(weighting: Literal["tokens", "uniform"] = "tokens") -> Aggregator:
    """Federated averaging of the clients' changes to the adapter.

    With w_k the trained tokens of client k (or 1), the round's pseudo-gradient is sum_k w_k delta_k / sum_k w_k.
    Applied to LoRA this averages the factors A and B apart (McMahan et al. 2017, algorithm 1; for LoRA: Zhang et al.
    2024, "Towards building the federated GPT").
    """

    def start(state: ServerState) -> _Sum:
        return _Sum(zeros_like(state.adapter, torch.float64), 0.0)

    def add(acc: _Sum, update: Update) -> _Sum:
        weight = update.weight if weighting == "tokens" else 1.0
        for name, total in acc.total.items():
            total.add_(update.delta[name].double(), alpha=weight)
        return _Sum(acc.total, acc.weight + weight)

    def finish(state: ServerState, acc: _Sum, rng: Generator) -> StateDict:
        if acc.weight <= 0:
            raise ValueError(f"the weights of the round sum to {acc.weight}; at least one must be positive")
        return {name: (total / acc.weight).float() for name, total in acc.total.items()}

    return Aggregator(Reducer(start, add, finish), plain_step, same_payload, needs="sum")
