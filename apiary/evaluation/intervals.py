"""Intervals of losses and of their differences: over rows, over seeds and rows, over clients.

Each says what it was taken over, for an interval over rows alone tells nothing of another seed: two models that
differ only in the order of their batches are two different models. How often these intervals are wrong is measured in
`benchmarks/intervals.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import bdtr, betaincinv, stdtrit

from apiary.core.seeds import derive_seed

Floats: TypeAlias = NDArray[np.float64]
Ends: TypeAlias = tuple[float, float]

FEWEST_ROWS = 60  # of fewer rows the interval leaves out the truth too often: benchmarks/intervals.py
LEVEL = 0.95
DRAWS = 2000
_BLOCK = 2**21  # numbers that are held at once
SCOPE = "of these two models on these rows"  # what an interval over rows alone is of


def over_rows(
    values: Floats, weights: ArrayLike, *, seed: int, draws: int = DRAWS, level: float = LEVEL
) -> Ends | None:
    """The 95% interval of sum(values) / sum(weights) over rows: bootstrap-t, and nowhere narrower than Student's.

    The bootstrap-t (Efron and Tibshirani 1993, section 12.5) draws rows with replacement and divides each draw's
    distance by its own standard error, that of a ratio (linearised). It follows a skew that Student's interval does not
    see; on symmetric long tails it is too narrow, where Student's is not. So each end is the farther one of the two.

    Args:
        values: (n,) sums by row, such as nats or differences of nats.
        weights: (n,) counts by row, such as response tokens.
        seed: of the resampling.
        draws: number of resamples; of a higher level take more, for its ends lie farther out.
        level: of the interval where it is not 95%, in 0..1.

    Returns:
        The ends; None for fewer than `FEWEST_ROWS` rows, a value that is not finite, or rows of which all but a few are
        equal, so that nothing can be said of their spread.
    """
    v, w = np.asarray(values, np.float64), np.asarray(weights, np.float64)
    n = len(v)
    if n < FEWEST_ROWS or not np.isfinite(v).all():
        return None
    ratio, error = ratio_with_error(v, w)
    if error <= 1e-12 * abs(ratio):
        return ratio, ratio
    rng = np.random.default_rng(derive_seed(seed, "bootstrap"))
    block = max(1, _BLOCK // n)
    parts = [
        _pivots(_counts(rng, min(block, draws - first), n), v, w, ratio, error) for first in range(0, draws, block)
    ]
    low, high = np.quantile(np.concatenate(parts), [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf")
    student = float(stdtrit(n - 1, (1 + level) / 2))
    ends = ratio - max(student, float(high)) * error, ratio + max(student, -float(low)) * error
    return ends if np.isfinite(ends).all() else None


def _pivots(counts: Floats, v: Floats, w: Floats, ratio: float, error: float) -> Floats:
    """Each draw's distance from the ratio in its own standard errors.

    A draw of equal rows alone has no spread to be divided by: it lies as far out as can be.
    """
    ratios, errors = _ratios(counts, v, w)
    far = np.copysign(np.inf, ratios - ratio)
    return np.divide(ratios - ratio, errors, out=far, where=errors > 1e-9 * error)


def _counts(rng: np.random.Generator, draws: int, n: int) -> Floats:
    """How often each of n rows stands in each draw (draws, n) of n rows with replacement."""
    rows = rng.integers(0, n, (draws, n)) + n * np.arange(draws)[:, None]
    return np.bincount(rows.ravel(), minlength=draws * n).reshape(draws, n).astype(np.float64)


def ratio_with_error(v: Floats, w: Floats) -> Ends:
    """The ratio of two sums over rows, and its standard error (linearised)."""
    ratio = v.sum() / w.sum()
    squares = ((v - ratio * w) ** 2).sum() * len(v) / (len(v) - 1)
    return float(ratio), float(np.sqrt(squares) / w.sum())


def _ratios(counts: Floats, v: Floats, w: Floats) -> tuple[Floats, Floats]:
    """The same for each draw (draws, n) of rows, by the sums of squares and products."""
    total = counts @ w
    ratios = (counts @ v) / total
    squares = counts @ v**2 - 2 * ratios * (counts @ (v * w)) + ratios**2 * (counts @ w**2)
    return ratios, np.sqrt(np.maximum(squares, 0.0) * len(v) / (len(v) - 1)) / total


def of_share(hits: Floats) -> Ends:
    """The 95% score interval of a mean of values in 0..1, such as exact matches (Wilson 1927).

    It has a width even where all hits are 0 or all are 1, as a bootstrap has not. For hits that are themselves means
    over models it is wider than it need be.
    """
    n, p, z2 = len(hits), float(hits.mean()), stdtrit(np.inf, (1 + LEVEL) / 2) ** 2
    centre, half = p + z2 / (2 * n), np.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n * n)))
    return float(max(0.0, (centre - half) / (1 + z2 / n))), float(min(1.0, (centre + half) / (1 + z2 / n)))


def of_rate(hits: int, tries: int) -> Ends:
    """The 95% interval of a chance from hits in independent tries, never too narrow (Clopper and Pearson 1934)."""
    tail = (1 - LEVEL) / 2
    low = float(betaincinv(hits, tries - hits + 1, tail)) if hits else 0.0
    return low, float(betaincinv(hits + 1, tries - hits, 1 - tail)) if hits < tries else 1.0


def of_exceedance(rank: int, count: int) -> Ends:
    """The 95% range of the chance that one more value lies above the `rank`-th highest of `count` values.

    That chance has the law Beta(rank, count + 1 - rank), whatever the values' own continuous law is (Wilks 1941).
    """
    tail = (1 - LEVEL) / 2
    return tuple(float(betaincinv(rank, count + 1 - rank, at)) for at in (tail, 1 - tail))  # type: ignore[return-value]


def of_median(values: ArrayLike) -> Ends | None:
    """The interval of a median between two of the values, which holds it with 95% or more whatever their law is.

    How many of n independent values lie below their median is Binomial(n, 1/2): the sign test turned round (Thompson
    1936). So nothing is taken for normal, which few values of a skewed law are not.

    Args:
        values: (n,), independent and of one law.

    Returns:
        The ends; None for fewer than 6 values, of which even the lowest and the highest leave the median out too often.
    """
    ordered = np.sort(np.asarray(values, np.float64))
    n = len(ordered)
    left_out = [k for k in range(1, n // 2 + 1) if 2 * bdtr(k - 1, n, 0.5) <= 1 - LEVEL]
    return (float(ordered[left_out[-1] - 1]), float(ordered[n - left_out[-1]])) if left_out else None


class SeedRows(NamedTuple):
    """What the run of one seed measured, row by row."""

    keys: Sequence[str]  # (n,) which row it is; runs may share rows
    values: Floats  # (n,) such as differences of nats
    weights: Floats  # (n,) such as response tokens


class OverSeeds(NamedTuple):
    """A mean over runs."""

    mean: float
    ends: Ends | None
    spread: float  # standard deviation between runs


def over_seeds_and_rows(runs: Sequence[SeedRows], level: float = LEVEL) -> OverSeeds:
    """The mean over runs of sum(values) / sum(weights), with its 95% interval over seeds and rows.

    Student's interval. Its variance is that of the mean between runs, and, of rows that several runs measured, that of
    the mean between rows, as such rows are drawn once and do not average out over seeds; rows of one run alone are in
    the first part already. The sum counts what seeds and rows have together twice, which errs on the wide side (as in
    Owen 2007). Degrees of freedom after Satterthwaite (1946).

    Args:
        runs: one for each seed.
        level: of the interval, in 0..1.

    Returns:
        Without ends for fewer than two runs, or fewer than `FEWEST_ROWS` rows in one of them.
    """
    ratios = np.array([run.values.sum() / run.weights.sum() for run in runs])
    count, mean = len(runs), float(ratios.mean())
    if count < 2:
        return OverSeeds(mean, None, float("nan"))
    spread = float(ratios.std(ddof=1))
    if min(len(run.values) for run in runs) < FEWEST_ROWS or not np.isfinite(ratios).all():
        return OverSeeds(mean, None, spread)
    seeds, (rows, different) = spread**2 / count, _shared_rows(runs, ratios)
    if seeds + rows == 0:
        return OverSeeds(mean, (mean, mean), spread)
    freedom = (seeds + rows) ** 2 / (seeds**2 / (count - 1) + rows**2 / max(different - 1, 1))
    half = float(stdtrit(freedom, (1 + level) / 2) * np.sqrt(seeds + rows))
    return OverSeeds(mean, (mean - half, mean + half), spread)


def _shared_rows(runs: Sequence[SeedRows], ratios: Floats) -> tuple[float, int]:
    """The variance of the mean over runs that comes from rows of several runs, and how many rows these are."""
    parts: dict[str, list[float]] = {}
    for run, ratio in zip(runs, ratios, strict=True):
        influence = (run.values - ratio * run.weights) / (run.weights.sum() * len(runs))
        own: dict[str, float] = {}
        for key, part in zip(run.keys, influence, strict=True):
            own[key] = own.get(key, 0.0) + float(part)
        for key, part in own.items():
            parts.setdefault(key, []).append(part)
    sums = [sum(found) for found in parts.values() if len(found) > 1]
    if len(sums) < 2:
        return 0.0, len(sums)
    return float(np.square(sums).sum() * len(sums) / (len(sums) - 1)), len(sums)


def over_clients(values: Sequence[float]) -> Ends | None:
    """Student's 95% interval of a mean over clients; None of one client, whose spread nobody knows."""
    if len(values) < 2:
        return None
    half = stdtrit(len(values) - 1, (1 + LEVEL) / 2) * np.std(values, ddof=1) / np.sqrt(len(values))
    return float(np.mean(values) - half), float(np.mean(values) + half)
