"""Weighted averaging of updates."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Generator, Tensor

from apiary.core.messages import Update
from apiary.core.tensors import StateDict
from strategies.aggregator import AGGREGATORS, Aggregator, Gradient, Reducer, ServerState, plain_step, same_payload

_CHUNK = 1 << 14  # entries; what is touched between two of them stays in a megabyte of cache
_Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


class _Sum(NamedTuple):
    """The sum so far is `total + rest`, both (entries of the adapter,) float64, tensor after tensor.

    The order in which clients answer must not show in the float32 result. One float64 sum is not enough for that: its
    last bit depends on the order, and once in some 10^8 entries this turns the rounding to float32. With what each
    addition rounds away kept in `rest`, the order moves the sum by about 10^-32 of its terms.
    """

    total: Tensor
    rest: Tensor
    shapes: dict[str, torch.Size]
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
        size = sum(tensor.numel() for tensor in state.adapter.values())
        total, rest = torch.zeros(2, size, dtype=torch.float64)
        return _Sum(total, rest, {name: t.shape for name, t in state.adapter.items()}, 0.0)

    def add(acc: _Sum, update: Update) -> _Sum:
        weight = update.weight if weighting == "tokens" else 1.0
        _add(acc, update.delta, weight)
        return acc._replace(weight=acc.weight + weight)

    def finish(state: ServerState, acc: _Sum, rng: Generator) -> Gradient:
        if acc.weight <= 0:
            raise ValueError(f"the weights of the round sum to {acc.weight}; at least one must be positive")
        return Gradient(_mean(acc))

    return Aggregator(
        Reducer(start, add, finish, merge=merged), plain_step, same_payload, needs="sum", averages="always"
    )


def merged(one: _Sum, other: _Sum) -> _Sum:
    """The sum of the updates of both, without loss but for the rounding of `rest`."""
    total = one.total + other.total
    arrived = total - one.total  # Knuth's two-sum again, on whole sums
    lost = (one.total - (total - arrived)) + (other.total - arrived)
    return _Sum(total, one.rest + other.rest + lost, one.shapes, one.weight + other.weight)


def _add(acc: _Sum, delta: StateDict, weight: float) -> None:
    """Add `weight * delta` to the sum in place, by pieces that stay in the processor's cache.

    Whole tensors would go through memory once for each of ten steps, and factors one by one are so small that calling
    these steps takes longer than they do: a piece goes on from one tensor to the next.

    Raises:
        ValueError: a tensor has another number of entries than the adapter's.
    """
    buffers, at, filled = np.empty((3, _CHUNK)), 0, 0
    for name, shape in acc.shapes.items():
        entries: _Array = delta[name].reshape(-1).numpy()
        if len(entries) != shape.numel():
            raise ValueError(f"{name!r} has {len(entries)} entries, not {shape.numel()}")
        while len(entries):
            taken = entries[: _CHUNK - filled]
            buffers[0, filled : filled + len(taken)] = taken
            filled, entries = filled + len(taken), entries[len(taken) :]
            if filled == _CHUNK:
                _add_piece(acc, at, buffers, weight)
                at, filled = at + filled, 0
    _add_piece(acc, at, buffers[:, :filled], weight)


def _add_piece(acc: _Sum, at: int, buffers: _Array, weight: float) -> None:
    """Add `weight` times the first buffer to the sum, from entry `at` on, without loss but for the rounding of `rest`.

    Knuth's two-sum (The Art of Computer Programming, volume 2, section 4.2.2, theorem B); spoils the buffers.
    """
    term, new, part = buffers
    old, lost = (sums.numpy()[at : at + len(term)] for sums in (acc.total, acc.rest))
    term *= weight  # exact: 24 bits times a whole number below 2^29
    np.add(old, term, out=new)
    np.subtract(new, old, out=part)  # of the term, what arrived
    term -= part
    np.subtract(new, part, out=part)  # of the old total, what is left in the new one
    old -= part
    term += old
    lost += term
    old[:] = new


def _mean(acc: _Sum) -> dict[str, Tensor]:
    means, at = dict[str, Tensor](), 0
    total, rest = acc.total.numpy(), acc.rest.numpy()
    for name, shape in acc.shapes.items():
        means[name] = torch.empty(shape)
        entries: _Array = means[name].view(-1).numpy()
        for start in range(0, len(entries), _CHUNK):
            piece = entries[start : start + _CHUNK]
            place = slice(at + start, at + start + len(piece))
            piece[:] = (total[place] + rest[place]) / acc.weight
        at += len(entries)
    return means
