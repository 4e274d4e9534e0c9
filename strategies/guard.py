"""How far one client may move the model in a round: limits on the length of its change and on its weight.

A change is measured part by part (the factors A, the factors B, and what is neither), each by the root mean square of
its entries. Of the factors, and not of the product B A: factors are what most methods average, a small change of
factors is a small change of the product (|d(B A)| <= |dB| |A| + |B| |dA| + |dB| |dA|, and A and B are the server's
own), but not the other way about, for with B = 0 any A has the product zero. Part by part, for with `train.lr_b` or
with factors in turns one part says nothing of the other. By the mean square and not the sum, for clients may have lower
ranks.

Two limits hold. What the configured optimizer can do at all (`reach`) is a matter of arithmetic: no honest client
passes it. What the others do (`Reference`) is one of experience: a multiple of the median length of the round and of
the rounds before, the latter in proportion to the learning rate.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

import torch

from apiary.config import schedule
from apiary.config.schema import RunConfig
from apiary.core.lora import is_b, is_gate
from apiary.core.tensors import StateDict
from strategies.local import PLAIN, LocalAlgorithm

FEWEST = 3  # changes that have a median which one of them cannot set
WINDOW = 5  # rounds before that are remembered
_BETA1, _BETA2 = 0.9, 0.999  # of torch's AdamW
_SLACK = 1.25  # for the rounding of a codec on the way, and of the adapter's own numbers
_ROUNDING = 1e-6  # of an adapter's entry: the change is a difference of float32 numbers

Lengths: TypeAlias = Mapping[str, float]  # by part, the root mean square of a change's entries


def part_of(name: str) -> str:
    """The part of an adapter that a tensor of this name belongs to: a, b or other."""
    if is_b(name):
        return "b"
    return "a" if name.endswith(".lora_A.weight") and not is_gate(name) else "other"


def lengths(delta: StateDict) -> dict[str, float]:
    """The root mean square of a change's entries, by part; parts without entries are left out."""
    squares, entries = dict[str, float](), dict[str, int]()
    for name, tensor in delta.items():
        part = part_of(name)
        norm = float(torch.linalg.vector_norm(tensor, dtype=torch.float64))
        squares[part] = squares.get(part, 0.0) + norm * norm
        entries[part] = entries.get(part, 0) + tensor.numel()
    return {part: math.sqrt(square / entries[part]) for part, square in squares.items() if entries[part]}


def largest(delta: StateDict) -> dict[str, float]:
    """The largest entry of a state without its sign, by part."""
    most = dict[str, float]()
    for name, tensor in delta.items():
        if tensor.numel():
            low, high = torch.aminmax(tensor)
            most[part_of(name)] = max(most.get(part_of(name), 0.0), -float(low), float(high))
    return most


class Reach(NamedTuple):
    """What the configured optimizer can do to an adapter in a visit, at most."""

    entries: Mapping[str, float] = MappingProxyType({})  # by part, how far any entry can move
    norm: float = math.inf  # the L2 norm of the whole change

    def passed(self, delta: StateDict) -> str:
        """How a change goes beyond; "" where it does not."""
        for part, most in largest(delta).items():
            if most > (limit := self.entries.get(part, math.inf)):
                return (
                    f"an entry of its {words(part)} moved by {most:.3g}; the run's steps move none beyond {limit:.3g}"
                )
        norm = math.hypot(*(float(torch.linalg.vector_norm(t, dtype=torch.float64)) for t in delta.values()))
        if norm > self.norm:
            return f"its change is {norm:.3g} long; the run's steps lead to {self.norm:.3g} at most"
        return ""


def reach(
    config: RunConfig, number: int, steps: int, start: StateDict, local: LocalAlgorithm, feedback: bool = False
) -> Reach:
    """What `steps` optimizer steps in round `number` can do to `start`, at most; no limit where that is not known.

    AdamW moves an entry in step t by at most lr_t R_t, and by lr_t times the weight decay times the entry. R_t is the
    largest |m_t| / sqrt(v_t) that any gradients lead to, bias corrections and all: with a_i and b_i the weights of the
    gradient i steps ago in m and in v, sqrt(sum a_i^2 / b_i) by the inequality of Cauchy and Schwarz. It is 1 in the
    first step, 1.8 in the fiftieth and 7.3 in the end. Plain gradient descent moves the whole adapter by at most lr_t
    times `train.clip_norm`. Warm-up and schedule are in the learning rates.

    A codec's feedback brings what earlier messages left out, which is no more than all that the rounds so far can have
    moved: an entry that was left out has been moved by its own steps, and one that was sent leaves behind no more than
    its rounding.

    Not known of a method that trains in a way of its own, of gradient descent without clipping or under record-level
    privacy, whose noise nothing clips, and with weight decay where it goes by adapters that the server does not have:
    the client's own, or those of the rounds that feedback brings something of.

    Args:
        config: the run.
        number: the round, from 1.
        steps: of the visit.
        start: what the client was sent.
        local: the method's half at the clients.
        feedback: whether the codec of the change keeps what a message leaves out, and adds it to the next.
    """
    train = config.train
    plain = local.open is PLAIN.open and local.finish is PLAIN.finish and not local.gradient_free
    if not (plain or local.reaches) or (train.weight_decay and (feedback or not plain)):
        return Reach()
    first = 1 if feedback else number
    moved = sum(schedule.lr_sum(config, before, steps) for before in range(first, number + 1)) * _SLACK
    if train.optimizer == "sgd":
        if not train.clip_norm or config.privacy.unit == "record":
            return Reach()
        whole = math.hypot(*(float(torch.linalg.vector_norm(t)) for t in start.values()))
        return Reach(norm=moved * max(1.0, train.lr_b) * train.clip_norm + whole * _ROUNDING)
    limits = {}
    for part, size in largest(start).items():
        rates = moved * (train.lr_b if part == "b" else 1.0)
        far = rates * _ratio(steps)
        limits[part] = far + train.weight_decay * rates * (size + far) + size * _ROUNDING
    return Reach(limits)


def _ratio(step: int) -> float:
    """R_t of `reach`, which grows with t."""
    step = min(step, 100_000)  # where powers of the betas are zero
    squares = (1 - _BETA1) ** 2 * (1 - _BETA2**step) / ((1 - _BETA1**step) ** 2 * (1 - _BETA2))
    q = _BETA1**2 / _BETA2
    return math.sqrt(squares * (1 - q**step) / (1 - q))


class Reference(NamedTuple):
    """What is usual, from the rounds before; each the newest last, `WINDOW` of them at most.

    Lengths are over the round's learning rate. Medians of fewer than `FEWEST` changes are not in it.
    """

    lengths: Mapping[str, Sequence[float]] = MappingProxyType({})  # by part
    weights: Sequence[float] = ()

    def length(self, part: str, rate: float) -> float:
        """The usual root mean square of a part at this learning rate; 0 where none is known."""
        return statistics.median(self.lengths[part]) * rate if self.lengths.get(part) else 0.0

    @property
    def weight(self) -> float:
        """The usual weight; 0 where none is known."""
        return statistics.median(self.weights) if self.weights else 0.0

    def after(self, seen: Medians, rate: float) -> Reference:
        """With the medians of one more round, at this learning rate."""
        if not seen.weight:
            return self
        longer = {part: (*self.lengths.get(part, ()), value / rate) for part, value in seen.lengths.items() if value}
        return Reference(
            {part: tuple(values)[-WINDOW:] for part, values in {**self.lengths, **longer}.items()},
            (*self.weights, seen.weight)[-WINDOW:],
        )


class Medians(NamedTuple):
    """Of the changes of one round; zeros where they are fewer than `FEWEST`."""

    lengths: Lengths = MappingProxyType({})
    weight: float = 0.0


def medians(changes: Sequence[tuple[Lengths, float]]) -> Medians:
    """The medians of a round.

    Args:
        changes: of each client its lengths and its weight.
    """
    if len(changes) < FEWEST:
        return Medians()
    parts = {part for sizes, _ in changes for part in sizes}
    return Medians(
        {part: statistics.median(sizes.get(part, 0.0) for sizes, _ in changes) for part in parts},
        statistics.median(weight for _, weight in changes),
    )


def agreed(tokens: Sequence[int | None], config: RunConfig) -> float:
    """The usual weight by what clients told at the handshake; 0 where that does not tell it.

    It tells with `train.epochs`, where a weight is so many times the tokens that a client has. Of fewer than `FEWEST`
    clients one alone could set it.

    Args:
        tokens: response tokens to train on, of each client that is there; None of one that told none.
        config: the run.
    """
    told = [count for count in tokens if count is not None]
    return config.train.epochs * statistics.median(told) if config.train.epochs and len(told) >= FEWEST else 0.0


def words(part: str) -> str:
    """How lines call a part of an adapter."""
    return f"factors {part.upper()}" if part in ("a", "b") else "other tensors"
