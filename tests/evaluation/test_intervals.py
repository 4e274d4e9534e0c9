"""Intervals against the papers' equations in plain loops, against scipy, and by how often they are wrong."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from apiary.core.seeds import derive_seed
from apiary.evaluation import intervals
from apiary.evaluation.intervals import FEWEST_ROWS, SeedRows


def skewed(rng: np.random.Generator, n: int, mean: float = 0.0, sigma: float = 0.6) -> tuple[np.ndarray, np.ndarray]:
    """Differences of nats with a long tail to the right, of that mean by token, and the tokens of each row."""
    tokens = rng.integers(1, 30, n).astype(float)
    return tokens * (rng.lognormal(0.0, sigma, n) - math.exp(sigma**2 / 2) + mean), tokens


def standard_error(values: np.ndarray, tokens: np.ndarray) -> float:
    """Of a ratio of sums, by a loop over rows (Cochran 1977, 6.10)."""
    n, ratio = len(values), sum(values) / sum(tokens)
    squares = sum((v - ratio * t) ** 2 for v, t in zip(values, tokens, strict=True))
    return math.sqrt(n * squares / (n - 1)) / sum(tokens)


@pytest.mark.parametrize("n", [60, 150])
def test_over_rows_is_the_farther_of_bootstrap_t_and_student(n: int) -> None:
    """Efron and Tibshirani (1993), equation 12.22, by a loop with draws of its own; they differ as two seeds do."""
    values, tokens = skewed(np.random.default_rng(n), n)
    ratio, error = values.sum() / tokens.sum(), standard_error(values, tokens)
    rng, pivots = np.random.default_rng(8), []
    for _ in range(6000):
        drawn = rng.choice(n, n)
        v, t = values[drawn], tokens[drawn]
        pivots.append((v.sum() / t.sum() - ratio) / standard_error(v, t))
    low, high = np.quantile(pivots, [0.025, 0.975])
    student = stats.t.ppf(0.975, n - 1)
    assert -low > student > high  # the tail lies to the right: each of the two decides one end
    found = intervals.over_rows(values, tokens, seed=1, draws=40_000)
    assert found is not None
    assert found[0] == pytest.approx(ratio - student * error, rel=1e-9)
    assert found[1] - ratio == pytest.approx(-low * error, rel=0.06)


def test_no_interval_below_the_floor_or_of_what_has_none() -> None:
    values, tokens = skewed(np.random.default_rng(0), FEWEST_ROWS)
    assert intervals.over_rows(values[1:], tokens[1:], seed=0) is None
    found = intervals.over_rows(values, tokens, seed=0)
    assert found is not None and found == intervals.over_rows(values, tokens, seed=0)
    assert intervals.over_rows(np.where(np.arange(60) == 3, np.nan, values), tokens, seed=0) is None
    assert intervals.over_rows(2 * tokens, tokens, seed=0) == (2.0, 2.0)
    one_row = np.where(np.arange(60) == 3, 1.0, 0.0)  # a third of the draws are without it, and have no spread
    assert intervals.over_rows(one_row, np.ones(60), seed=0) is None


def test_a_block_of_draws_is_as_good_as_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    values, tokens = skewed(np.random.default_rng(2), 100)
    whole = intervals.over_rows(values, tokens, seed=0)
    monkeypatch.setattr(intervals, "_BLOCK", 12_345)
    assert intervals.over_rows(values, tokens, seed=0) == pytest.approx(whole)


def clear(found: tuple[float, float] | None) -> bool:
    return found is not None and (found[0] > 0 or found[1] < 0)


def test_false_clear_differences_over_rows_are_as_rare_as_is_said() -> None:
    """Of 600 samples of 60 rows with a long tail and no difference, at most 49 are 'clear'.

    The benchmark has 6.5% of such samples, which go beyond 49 with probability 0.05; the seed is fixed. The percentile
    interval of the same samples, with 10.6%, is beyond that.
    """
    rng = np.random.default_rng(4)
    wrong = percentile = 0
    limit = stats.binom.ppf(0.95, 600, 0.065)
    counts = rng.multinomial(60, np.full(60, 1 / 60), 800)
    for trial in range(600):
        values, tokens = skewed(rng, 60, sigma=1.0)
        wrong += clear(intervals.over_rows(values, tokens, seed=trial, draws=800))
        percentile += clear(tuple(np.quantile(counts @ values / (counts @ tokens), [0.025, 0.975])))
    assert wrong <= limit == 49
    assert percentile > limit


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (3, 10), (10, 10), (96, 240)])
def test_the_interval_of_a_share_is_wilsons(hits: int, n: int) -> None:
    found = intervals.of_share(np.repeat([1.0, 0.0], [hits, n - hits]))
    reference = stats.binomtest(hits, n).proportion_ci(method="wilson")
    assert found == pytest.approx((reference.low, reference.high), abs=1e-12)


# -- over seeds and rows ------------------------------------------------------------------------------


def seeds_of(
    rng: np.random.Generator, count: int, rows: int, sd: float, *, shared: bool, mean: float = 0.0
) -> list[SeedRows]:
    """Differences of two ways of training that are equal on average: a part of each seed, and one of each row."""
    keys = [str(row) for row in range(rows)]
    common = skewed(rng, rows, mean)
    runs = []
    for seed in range(count):
        values, tokens = common if shared else skewed(rng, rows, mean)
        shift = rng.normal(0, sd)
        runs.append(SeedRows(keys if shared else [f"{seed} {key}" for key in keys], values + shift * tokens, tokens))
    return runs


def test_of_rows_of_their_own_the_interval_is_students_over_seeds() -> None:
    runs = seeds_of(np.random.default_rng(1), 4, 80, 0.05, shared=False)
    found = intervals.over_seeds_and_rows(runs)
    each = [run.values.sum() / run.weights.sum() for run in runs]
    assert found.mean == pytest.approx(np.mean(each)) and found.spread == pytest.approx(np.std(each, ddof=1))
    assert found.ends == pytest.approx(stats.t.interval(0.95, 3, np.mean(each), stats.sem(each)))


def test_rows_that_all_seeds_share_add_their_own_variance() -> None:
    """Worked by a loop: between seeds, and of each row's mean over seeds; Satterthwaite's degrees of freedom."""
    runs = seeds_of(np.random.default_rng(2), 3, 90, 0.05, shared=True)
    each = [run.values.sum() / run.weights.sum() for run in runs]
    between = np.var(each, ddof=1) / 3
    parts = [
        sum((run.values[j] - m * run.weights[j]) / run.weights.sum() for run, m in zip(runs, each, strict=True)) / 3
        for j in range(90)
    ]
    among = sum(part**2 for part in parts) * 90 / 89
    freedom = (between + among) ** 2 / (between**2 / 2 + among**2 / 89)
    half = stats.t.ppf(0.975, freedom) * math.sqrt(between + among)
    found = intervals.over_seeds_and_rows(runs)
    assert found.ends == pytest.approx((found.mean - half, found.mean + half))
    apart = [run._replace(keys=[f"{n} {key}" for key in run.keys]) for n, run in enumerate(runs)]
    narrower = intervals.over_seeds_and_rows(apart).ends
    assert narrower is not None and found.ends is not None
    partly = [apart[0], *runs[1:]]  # two of the three share theirs
    between_the_two = intervals.over_seeds_and_rows(partly).ends
    assert between_the_two is not None and between_the_two != pytest.approx(found.ends)


def test_one_seed_and_few_rows_have_no_interval() -> None:
    rng = np.random.default_rng(3)
    assert intervals.over_seeds_and_rows(seeds_of(rng, 1, 80, 0.05, shared=True)).ends is None
    assert intervals.over_seeds_and_rows(seeds_of(rng, 3, FEWEST_ROWS - 1, 0.05, shared=True)).ends is None
    same = seeds_of(rng, 1, 80, 0.0, shared=True) * 2
    zero = [run._replace(values=0.0 * run.values) for run in same]
    assert intervals.over_seeds_and_rows(zero).ends == (0.0, 0.0)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_false_clear_differences_over_seeds_are_rare_where_those_over_rows_are_not(count: int, shared: bool) -> None:
    """Seeds with a standard deviation of 0.047, 240 rows, no difference between the two ways of training.

    Over seeds and rows, of 400 trials at most 29 are 'clear': 5% go beyond that with probability 0.02, and the seeds of
    the trials are fixed. Over the rows of one seed alone, more than 40 are.
    """
    rng = np.random.default_rng(derive_seed(count, str(shared)))
    by_seeds = by_rows = 0
    student = stats.t.ppf(0.975, 239)
    for _ in range(400):
        runs = seeds_of(rng, count, 240, 0.047, shared=shared)
        by_seeds += clear(intervals.over_seeds_and_rows(runs).ends)
        first = runs[0]
        ratio, error = first.values.sum() / first.weights.sum(), standard_error(first.values, first.weights)
        by_rows += abs(ratio) > student * error
    assert by_seeds <= stats.binom.ppf(0.97, 400, 0.05) == 29
    assert by_rows > 40


def test_a_difference_larger_than_that_between_seeds_is_found() -> None:
    runs = seeds_of(np.random.default_rng(5), 4, 240, 0.047, shared=True, mean=-0.6)
    found = intervals.over_seeds_and_rows(runs).ends
    assert found is not None and found[1] < 0


def test_the_interval_over_clients_is_students_and_there_is_none_of_one() -> None:
    gains = [0.1, -0.2, 0.4, 0.15]
    reference = stats.t.interval(0.95, 3, np.mean(gains), stats.sem(gains))
    assert intervals.over_clients(gains) == pytest.approx(reference)
    assert intervals.over_clients([0.1]) is None and intervals.over_clients([]) is None


@pytest.mark.parametrize("count", [6, 9, 12])
@pytest.mark.parametrize("law", ["exposure", "mixed", "few values"])
def test_the_interval_of_a_median_holds_it_as_often_as_it_says(law: str, count: int) -> None:
    """2,000 draws of so few values of skewed laws; 95% or more, but for chance. A bootstrap of four misses 25%."""
    rng = np.random.default_rng(count)

    def draw(size: tuple[int, ...]) -> np.ndarray:
        made = rng.exponential(1 / np.log(2), size)  # of secrets that were not learnt
        if law == "mixed":
            return np.where(rng.random(size) < 0.3, 8.0, made)  # some were
        return np.round(made) if law == "few values" else made

    median = float(np.median(draw((200_001,))))
    ends = [intervals.of_median(values) for values in draw((2000, count))]
    held = sum(end is not None and end[0] <= median <= end[1] for end in ends)
    assert held >= 1900 - 29  # three deviations


def test_the_interval_of_a_median_lies_between_two_of_its_values() -> None:
    """Of 9 values the second and the eighth: 2 (1 + 9) / 512 = 3.9% are left out; of 8 one must go to the ends."""
    values = np.array([9.0, 1.0, 8.0, 2.0, 7.0, 3.0, 6.0, 4.0, 5.0])
    assert intervals.of_median(values) == (2.0, 8.0)
    assert intervals.of_median(values[1:]) == (1.0, 8.0)
    assert intervals.of_median(values[:5]) is None and intervals.of_median([]) is None


@pytest.mark.parametrize(("hits", "tries"), [(0, 100), (1, 40), (13, 100), (100, 100)])
def test_the_interval_of_a_rate_is_the_exact_one(hits: int, tries: int) -> None:
    exact = stats.binomtest(hits, tries).proportion_ci(0.95, "exact")
    assert intervals.of_rate(hits, tries) == pytest.approx((exact.low, exact.high))


def test_what_a_threshold_lets_through_is_in_its_range_as_often_as_it_says() -> None:
    """The second highest of 130 normal scores, 4,000 times: which share of all others lies above it."""
    rng = np.random.default_rng(0)
    thresholds = np.sort(rng.normal(size=(4000, 130)))[:, -2]
    low, high = intervals.of_exceedance(2, 130)
    held = np.mean([low <= above <= high for above in stats.norm.sf(thresholds)])
    assert held == pytest.approx(0.95, abs=0.0104)  # three deviations
