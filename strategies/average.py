"""Weighted averaging of updates."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Generator, Tensor

from apiary.exchange import Update
from apiary.tensors import zeros_like
from strategies.core import AGGREGATORS, Aggregator, Gradient, Reducer, ServerState, plain_step, same_payload


class _Sum(NamedTuple):
    """The sum so far is `total + rest`, both float64.

    The order in which clients answer must not show in the float32 result. One float64 sum is not enough for that: its
    last bit depends on the order, and once in some 10^8 entries this turns the rounding to float32. With what each
    addition rounds away kept in `rest`, the order moves the sum by about 10^-32 of its terms.
    """

    total: dict[str, Tensor]
    rest: dict[str, Tensor]
    weight: float  # trained tokens are whole numbers, so their sum is exact in any order


@AGGREGATORS.register("fedavg")
def fedavg(weighting: Literal["tokens", "uniform"] = "tokens") -> Aggregator:
    """Federated averaging of the clients' changes to the adapter.

    With w_k the trained tokens of client k (or 1), the round's pseudo-gradient is sum_k w_k delta_k / sum_k w_k.
    Applied to LoRA this averages the factors A and B apart (McMahan et al. 2017, algorithm 1; for LoRA: Zhang et al.
    2024, "Towards building the federated GPT").

    The server holds 16 bytes for each entry of the adapter, however many clients there are, and a few float64 copies
    of one tensor at a time while an update is added.
    """

    def start(state: ServerState) -> _Sum:
        return _Sum(zeros_like(state.adapter, torch.float64), zeros_like(state.adapter, torch.float64), 0.0)

    def add(acc: _Sum, update: Update) -> _Sum:
        weight = update.weight if weighting == "tokens" else 1.0
        for name, total in acc.total.items():
            # 24 bits times a whole number below 2^29 fit float64 exactly.
            _add(total, acc.rest[name], update.delta[name].double() * weight)
        return acc._replace(weight=acc.weight + weight)

    def finish(state: ServerState, acc: _Sum, rng: Generator) -> Gradient:
        if acc.weight <= 0:
            raise ValueError(f"the weights of the round sum to {acc.weight}; at least one must be positive")
        return Gradient({name: ((total + acc.rest[name]) / acc.weight).float() for name, total in acc.total.items()})

    return Aggregator(Reducer(start, add, finish), plain_step, same_payload, needs="sum")


def _add(total: Tensor, rest: Tensor, term: Tensor) -> None:
    """Add `term` to `total + rest` in place, without loss but for the rounding of `rest` (Knuth's two-sum)."""
    new = total + term
    part = new - total  # of the term, what arrived
    rest += (total - (new - part)) + (term - part)
    total.copy_(new)
