"""Weighted averaging of updates."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Generator, Tensor

from apiary.core.messages import Update
from apiary.core.tensors import zeros_like
from strategies.aggregator import AGGREGATORS, Aggregator, Gradient, Reducer, ServerState, plain_step, same_payload

_CHUNK = 1 << 14  # entries; what is touched between two of them stays in a megabyte of cache
_Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


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

    The server holds 16 bytes for each entry of the adapter, however many clients there are; a client's update takes
    about 15 operations an entry, and is gone when it has been added.
    """

    def start(state: ServerState) -> _Sum:
        return _Sum(zeros_like(state.adapter, torch.float64), zeros_like(state.adapter, torch.float64), 0.0)

    def add(acc: _Sum, update: Update) -> _Sum:
        weight = update.weight if weighting == "tokens" else 1.0
        buffers = np.empty((3, _CHUNK))
        for name, total in acc.total.items():
            _add(_flat(total), _flat(acc.rest[name]), _flat(update.delta[name]), weight, buffers)
        return acc._replace(weight=acc.weight + weight)

    def finish(state: ServerState, acc: _Sum, rng: Generator) -> Gradient:
        if acc.weight <= 0:
            raise ValueError(f"the weights of the round sum to {acc.weight}; at least one must be positive")
        return Gradient({name: _mean(total, acc.rest[name], acc.weight) for name, total in acc.total.items()})

    return Aggregator(Reducer(start, add, finish), plain_step, same_payload, needs="sum", averages="always")


def _add(total: _Array, rest: _Array, delta: _Array, weight: float, buffers: _Array) -> None:
    """Add `weight * delta` to `total + rest` in place, without loss but for the rounding of `rest`.

    Knuth's two-sum (The Art of Computer Programming, volume 2, section 4.2.2, theorem B), by pieces that stay in the
    processor's cache: whole tensors would go through memory once for each of its ten steps.
    """
    for at in range(0, len(total), _CHUNK):
        old, lost, x = (array[at : at + _CHUNK] for array in (total, rest, delta))
        term, new, part = buffers[:, : len(old)]
        term[:] = x
        term *= weight  # exact: 24 bits times a whole number below 2^29
        np.add(old, term, out=new)
        np.subtract(new, old, out=part)  # of the term, what arrived
        term -= part
        np.subtract(new, part, out=part)  # of the old total, what is left in the new one
        old -= part
        term += old
        lost += term
        old[:] = new


def _mean(total: Tensor, rest: Tensor, weight: float) -> Tensor:
    mean = torch.empty_like(total, dtype=torch.float32)
    sums, lost, means = _flat(total), _flat(rest), _flat(mean)
    for at in range(0, len(sums), _CHUNK):
        piece = slice(at, at + _CHUNK)
        means[piece] = (sums[piece] + lost[piece]) / weight
    return mean


def _flat(tensor: Tensor) -> _Array:
    """The entries in a row: the tensor's own memory where it lies in one piece, as accumulators do, else a copy."""
    array: _Array = tensor.reshape(-1).numpy()
    return array
