"""Metrics against scipy, and hand-worked tables."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from apiary.data.examples import Example, Turn
from apiary.evaluation import comparison
from apiary.evaluation.comparison import Measured


def test_interval_agrees_with_scipy() -> None:
    rng = np.random.default_rng(3)
    tokens = rng.integers(1, 30, 200).astype(float)
    nats = tokens * rng.gamma(2.0, 0.5, 200)
    low, high = comparison.interval(nats, tokens, seed=1, draws=8000)
    reference = stats.bootstrap(
        (nats, tokens),
        lambda a, b, axis: a.sum(axis) / b.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=8000,
        method="percentile",
        rng=rng,
    ).confidence_interval
    assert low == pytest.approx(reference.low, rel=0.01) and high == pytest.approx(reference.high, rel=0.01)


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        values = rng.binomial(1, 0.3, 100).astype(float)
        low, high = comparison.interval(values, np.ones(100), seed=trial, draws=500)
        hits += low <= 0.3 <= high
    assert hits / 200 > 0.88  # nominal 0.95, binomial error 0.015, and the percentile method runs a little short


def test_a_difference_is_found_where_two_intervals_overlap() -> None:
    """Examples differ more from each other than the models do on any of them; scipy draws pairs in its own way."""
    rng = np.random.default_rng(5)
    tokens = rng.integers(1, 30, 200).astype(float)
    theirs = tokens * rng.gamma(2.0, 0.5, 200)
    ours = theirs + tokens * rng.normal(0.05, 0.1, 200)
    runs = {"local": Measured(theirs, tokens, None), "federated": Measured(ours, tokens, None)}
    found = comparison.differences(runs, seed=1)
    assert list(found) == ["local"] and found["local"]["n"] == 200
    assert found["local"]["difference"] == pytest.approx((ours - theirs).sum() / tokens.sum())
    low, high = found["local"]["ci95"]
    reference = stats.bootstrap(
        (ours, theirs, tokens),
        lambda a, b, t, axis: (a.sum(axis) - b.sum(axis)) / t.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=8000,
        method="percentile",
        rng=rng,
    ).confidence_interval
    assert low == pytest.approx(reference.low, rel=0.1) and high == pytest.approx(reference.high, rel=0.1)
    assert low > 0
    one, two = (comparison.interval(values, tokens, seed=1) for values in (ours, theirs))
    assert one[0] < two[1]  # each by itself they overlap
    assert comparison.differences(runs, seed=1) == found


def test_no_interval_of_a_difference_where_it_would_mean_nothing() -> None:
    def pair(theirs: list[float]) -> dict[str, object]:
        ones = np.ones(len(theirs))
        runs = {"federated": Measured(ones, ones, None), "base": Measured(np.array(theirs), ones, None)}
        return comparison.differences(runs, seed=0)["base"]

    assert pair([2.0] * 9) == {"difference": -1.0, "ci95": None, "n": 9}
    assert pair([2.0] * 10)["ci95"] == [-1.0, -1.0]
    assert pair([2.0] * 19 + [float("nan")])["ci95"] is None


def test_loss_is_per_token_not_per_example() -> None:
    run = Measured(np.array([2.0, 30.0]), np.array([1.0, 10.0]), np.array([1.0, 0.0]))
    assert run.loss == pytest.approx(32 / 11) and run.accuracy == 0.5
    row = comparison.table_row("base", run, seed=0)
    assert row["ci95"]["loss"][0] <= row["loss"] <= row["ci95"]["loss"][1] and row["n"] == 2


def test_mean_over_clients() -> None:
    one = Measured(np.array([1.0, 2.0]), np.array([1.0, 1.0]), np.array([0.0, 1.0]))
    two = Measured(np.array([3.0, 4.0]), np.array([1.0, 1.0]), np.array([1.0, 1.0]))
    both = comparison.mean([one, two])
    assert both.loss == pytest.approx((1.5 + 3.5) / 2) and both.accuracy == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("given", "reference", "same"),
    [("a b", " a  b\n", True), ("A b", "a b", False), ("a", "a.", False), ("", "", True), ("a\nb", "a b", True)],
)
def test_exact_match(given: str, reference: str, same: bool) -> None:
    assert comparison.exact_match(given, reference) is same


def test_accuracy_by_kind() -> None:
    examples = tuple(Example((Turn("user", "q"), Turn("assistant", "a")), {"skill": s}) for s in ("x", "y", "x"))
    held_out = comparison.HeldOut(examples, None, (), ())  # type: ignore[arg-type]
    run = Measured(np.ones(3), np.ones(3), np.array([1.0, 0.0, 0.0]))
    assert comparison.by_kind(lambda e: e.tags["skill"], {"base": run}, held_out) == {
        "x": {"base": 0.5},
        "y": {"base": 0.0},
    }
