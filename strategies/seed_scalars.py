"""FedKSeed: fine-tuning in which only seeds and scalars travel (Qin et al. 2024, arXiv 2312.06353).

All sides know K candidate seeds, and each seed is a direction z in the space of the weights. A step looks at the loss a
little way along a direction and back, and goes against its slope: the weights are at any time

    x = x_0 + sum over the seeds of c(seed) z(seed),

so that a model is a start and K numbers, and so is a client's change.

**Every host makes the same bits.** Directions are random signs. SPSA asks of z to be symmetric, independent by entry
and of variance 1 (Spall 1992), and of all such z signs make the variance of the estimate least (Sadegh and Spall 1998);
normal numbers, as in the paper, go through logarithms and cosines, whose last bits differ between libraries. A sign
is one bit of Philox4x64-10 (Salmon et al. 2011), a counter-based generator of integers. The numbers c are whole
multiples of 2^-40: float64 adds such numbers without any rounding, and so the sum above is the same in every order, on
every host and in every way of blocking it. What is added to x_0 is exact, then, and rounded to float32 with it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Generator, Tensor

from apiary.core.tensors import StateDict, derive_seed
from strategies.local import Loss

Shapes: TypeAlias = Mapping[str, Sequence[int]]
Scalars: TypeAlias = Mapping[int, float]  # by seed, whole multiples of `GRAIN`

NAME = "kseed"  # of the one tensor that travels in place of an adapter: a scalar for each candidate
CANDIDATES, EPSILON = 4096, 1e-3
GRAIN = 2.0**-40
_MOST = 2.0**11  # of the sum of all |c|; below it, sums of multiples of GRAIN are exact in float64
_SEEDS_AT_ONCE = 64
_ENTRIES_AT_ONCE = 1 << 14  # of each of them; whole words


class TooFar(ValueError):
    """Scalars are so large that sums of them would round: the steps are far too long."""


@functools.lru_cache(maxsize=4)
def candidates(seed: int, count: int = CANDIDATES) -> tuple[int, ...]:
    """The candidate seeds of a run, K different ones; 4096 as in the paper.

    Args:
        seed: the run's.
        count: K.
    """
    return tuple(derive_seed(seed, "kseed", number) for number in range(count))


def perturb(shapes: Shapes, seed: int) -> dict[str, Tensor]:
    """The direction of a seed: a random sign (+1 or -1, float32) for each entry.

    A seed's stream goes through the tensors in the order of their names; each begins at a whole 64-bit word.
    """
    streams, signs = _streams([seed]), {}
    for name in sorted(shapes):
        bits = _bits(streams, math.prod(shapes[name]))[0]
        signs[name] = torch.from_numpy(bits.astype(np.float32) * 2 - 1).reshape(tuple(shapes[name]))
    return {name: signs[name] for name in shapes}


def _streams(seeds: Iterable[int]) -> list[np.random.Philox]:
    return [np.random.Philox(key=np.array([seed, 0], np.uint64)) for seed in seeds]


def _bits(streams: Sequence[np.random.Philox], count: int) -> np.ndarray:
    """The next bits of each stream, (streams, count) uint8 of 0 and 1, of each word the lowest first."""
    words = np.stack([stream.random_raw(-(-count // 64)) for stream in streams]).astype("<u8", copy=False)
    return np.unpackbits(words.view(np.uint8), axis=1, count=count, bitorder="little")


def on_grid(value: float) -> float:
    """The multiple of `GRAIN` that float32 holds, nearest to `value` or a neighbour of that.

    Raises:
        TooFar: it is NaN, infinite, or so large that sums would round.
    """
    if not abs(value) < _MOST:
        raise TooFar(f"a scalar of {value:g}, where {_MOST:g} is too much: the steps are far too long; lower the lr")
    return float(round(float(np.float32(value)) / GRAIN) * GRAIN)


def rebuild(start: StateDict, scalars: Scalars) -> dict[str, Tensor]:
    """The weights that a start and scalars stand for: x_0 + sum of c z, the same bits on every host.

    Args:
        start: x_0, float32.
        scalars: c by seed.

    Raises:
        ValueError: a scalar is no multiple of `GRAIN`, or together they are so large that their sums would round.
    """
    used = _checked(scalars)
    streams, values = _streams(used), np.array(list(used.values()))
    tensors = {}
    for name in sorted(start):
        total = torch.from_numpy(_sum(streams, values, start[name].numel())).reshape(start[name].shape)
        tensors[name] = (start[name].double() + total).float()
    return {name: tensors[name] for name in start}


def check_sum(scalars: Iterable[float]) -> None:
    """Check that scalars are small enough for exact sums.

    Raises:
        TooFar: the sum of their absolute values is too large for exact sums.
    """
    if (size := math.fsum(abs(float(c)) for c in scalars)) >= _MOST:
        raise TooFar(f"scalars of {size:g} in all, where {_MOST:g} is too much: the steps are too long; lower the lr")


def _checked(scalars: Scalars) -> dict[int, float]:
    """The scalars that are not zero."""
    if odd := next((c for c in scalars.values() if not math.isfinite(c) or c % GRAIN), None):
        raise ValueError(f"the scalar {odd!r} is no multiple of 2^-40: use on_grid")
    check_sum(scalars.values())
    return {seed: c for seed, c in scalars.items() if c}


def _sum(streams: Sequence[np.random.Philox], scalars: np.ndarray, size: int) -> np.ndarray:
    """The sum of c z over the streams for their next `size` entries, float64, exact."""
    total = np.full(size, -scalars.sum())  # z = 2 bit - 1
    for low in range(0, size, _ENTRIES_AT_ONCE):
        count = min(_ENTRIES_AT_ONCE, size - low)
        for at in range(0, len(streams), _SEEDS_AT_ONCE):
            some = slice(at, at + _SEEDS_AT_ONCE)
            bits = _bits(streams[some], count).astype(np.float64)
            total[low : low + count] += (2 * scalars[some]) @ bits
    return total


def estimate(loss: Loss, x: StateDict, z: StateDict, epsilon: float) -> float:
    """The slope of the loss at x along z, g = (L(x + eps z) - L(x - eps z)) / (2 eps).

    g z is an estimate of the gradient (Spall 1992, equation 2.1); of a quadratic it is unbiased, else up to O(eps^2).
    Both looks are made from x itself, so that x is afterwards what it was before.
    """
    ahead, back = (loss({name: t + sign * z[name] for name, t in x.items()}) for sign in (epsilon, -epsilon))
    return (ahead - back) / (2 * epsilon)


class Descended(NamedTuple):
    """Where a client's steps ended."""

    x: dict[str, Tensor]  # to the bit `rebuild` of where it began and the scalars
    scalars: dict[int, float]  # by seed: what travels
    skipped: int  # steps whose slope was NaN or infinite


def descend(
    losses: Iterable[tuple[Loss, float]], start: StateDict, seeds: Sequence[int], *, epsilon: float, rng: Generator
) -> Descended:
    """Zeroth-order descent: in each step one of the seeds, drawn uniformly, and x := x - lr g z.

    Unlike the paper's pools, which sum g and so need one lr for all steps, the scalars hold lr g: it may fall.

    Args:
        losses: of each step in turn, such as that of its batch, with its step size lr.
        start: x, float32.
        seeds: the candidates.
        epsilon: how far to look.
        rng: draws the seeds.

    Raises:
        ValueError: the steps got so long that sums round.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in start.items()}
    moved = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in start.items()}
    x, scalars, skipped = dict(start), dict[int, float](), 0
    for loss, lr in losses:
        seed = seeds[int(torch.randint(len(seeds), (), generator=rng))]
        z = perturb(shapes, seed)
        step = -lr * estimate(loss, x, z, epsilon)
        if not math.isfinite(step):
            skipped += 1
            continue
        held = scalars.get(seed, 0.0)
        scalars[seed] = on_grid(held + step)
        _checked(scalars)
        for name, tensor in moved.items():
            tensor += (scalars[seed] - held) * z[name].double()
            x[name] = (start[name].double() + tensor).float()
    return Descended(x, scalars, skipped)


def added(pool: Scalars, change: Scalars) -> dict[int, float]:
    """The server's scalars after a round: those before it and their change, by seed.

    Raises:
        ValueError: a sum is too large.
    """
    return {seed: on_grid(pool.get(seed, 0.0) + change.get(seed, 0.0)) for seed in pool.keys() | change.keys()}


def snapped(scalars: Tensor) -> Tensor:
    """Scalars of any value, such as a mean, as `on_grid` gives them."""
    return torch.tensor([on_grid(value) for value in scalars.tolist()], dtype=torch.float32)


def to_tensor(scalars: Scalars, seeds: Sequence[int]) -> Tensor:
    """The scalars in the order of `seeds`, (K,) float32, which holds them exactly; zero for a seed without one.

    Raises:
        ValueError: a seed is not among `seeds`, or a scalar is not as `on_grid` gives it.
    """
    if unknown := scalars.keys() - set(seeds):
        raise ValueError(f"{len(unknown)} seeds are not among the {len(seeds)} candidates")
    values = [scalars.get(seed, 0.0) for seed in seeds]
    tensor = torch.tensor(values, dtype=torch.float32)
    if tensor.tolist() != values:
        raise ValueError("a scalar does not fit float32: use on_grid")
    return tensor


def of_tensor(tensor: Tensor, seeds: Sequence[int]) -> dict[int, float]:
    """The scalars, without zeros, of a tensor that `to_tensor` made.

    Raises:
        ValueError: it has another length, or what is in it is off the grid or too large.
    """
    if tensor.shape != (len(seeds),):
        raise ValueError(f"scalars of shape {tuple(tensor.shape)} do not fit {len(seeds)} candidate seeds")
    return _checked(dict(zip(seeds, tensor.tolist(), strict=True)))
