"""The arithmetic of the audit against brute force, scipy and worked values of the papers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from apiary.privacy.audit import decoding, exposure, inversion, membership, one_run


def test_the_area_under_the_curve_is_the_share_of_pairs_in_order() -> None:
    rng = np.random.default_rng(0)
    members, others = rng.integers(0, 9, 50).astype(float), rng.integers(0, 7, 70).astype(float)
    pairs = [(m > o) + 0.5 * (m == o) for m in members for o in others]
    assert membership.auc(members, others) == pytest.approx(np.mean(pairs))
    assert membership.auc(members, members) == 0.5


def test_one_per_cent_false_positives_are_no_more_than_that() -> None:
    others = np.arange(250.0)  # two of 250 may be taken for members, so a member must exceed 247
    members = np.array([246.0, 247.0, 247.5, 300.0])
    assert membership.allowed(250) == 2 and membership.true_positives(members, others) == 2
    assert membership.true_positives(np.full(9, 7.0), np.full(200, 7.0)) == 0  # a tie finds nobody


def test_figures_that_too_few_rows_would_make_up_are_not_given() -> None:
    rng = np.random.default_rng(0)
    few = membership.membership(rng.normal(size=membership.FEWEST - 1), rng.normal(size=500), 0)
    assert (few.auc, few.found) == (None, None)
    some = membership.membership(rng.normal(size=200), rng.normal(size=membership.FEWEST_FOR_RATE - 1), 0)
    assert some.auc is not None and some.found is None
    many = membership.membership(rng.normal(9, 1, 50), rng.normal(size=membership.FEWEST_FOR_RATE), 0)
    assert many.found == 50


def test_the_interval_holds_the_true_area_as_often_as_it_says() -> None:
    """Normal scores one deviation apart, whose area is Phi(1 / sqrt 2); 95% of 100 intervals, at least 87 of them."""
    rng = np.random.default_rng(1)
    true, held = stats.norm.cdf(1 / math.sqrt(2)), 0
    for seed in range(100):
        found = membership.membership(rng.normal(1, 1, 80), rng.normal(0, 1, 120), seed).auc
        assert found is not None
        held += found.low <= true <= found.high
    assert held >= 87  # fewer with probability 1e-3


def test_exposure_is_the_log_of_the_rank() -> None:
    losses = np.array([3.0, 1.0, 2.0, 2.0, 9.0, 8.0, 7.0, 6.0])
    assert exposure.exposure(losses, 1) == 3.0
    assert exposure.exposure(losses, 2) == pytest.approx(3 - math.log2(3))  # ties count against the attack
    assert exposure.exposure(losses, 4) == 0.0


def test_the_p_value_of_exposures_is_that_of_a_gamma_law() -> None:
    bits = [0.3, 2.5, 7.0, 1.0]
    found = exposure.summed_up(4, bits, 256)
    assert found.p_value == pytest.approx(stats.gamma.sf(sum(bits) * math.log(2), len(bits)))
    assert exposure.summed_up(1, [0.0], 256).p_value == 1.0
    assert found.median == 1.75
    uniform = stats.uniform.rvs(size=200_000, random_state=0)
    assert pytest.approx(np.median(-np.log2(uniform)), rel=0.01) == exposure.CHANCE


def test_secrets_that_were_not_learnt_look_significant_no_more_often_than_they_may() -> None:
    """600 times 4 secrets of random rank: at 10%, at most 80 are expected but for one time in a thousand."""
    rng = np.random.default_rng(2)
    small = 0
    for _ in range(600):
        bits = [exposure.exposure(rng.normal(size=64), 0) for _ in range(4)]
        small += exposure.summed_up(1, bits, 64).p_value <= 0.1
    assert small <= 84


def reference_p_value(right: int, guesses: int, canaries: int, epsilon: float, delta: float) -> float:
    """Steinke et al. 2023, theorem 5.2, term by term."""
    w = stats.binom(guesses, math.exp(epsilon) / (1 + math.exp(epsilon)))
    below = [w.cdf(right - 1) - w.cdf(right - i - 1) for i in range(1, canaries + 1)]
    return float(w.sf(right - 1) + 2 * canaries * delta * max(b / i for i, b in enumerate(below, 1)))


@pytest.mark.parametrize(
    ("right", "guesses", "canaries"), [(40, 50, 100), (100, 100, 1000), (0, 7, 20), (260, 300, 300)]
)
def test_the_p_value_is_the_theorems(right: int, guesses: int, canaries: int) -> None:
    for epsilon in (0.0, 0.7, 3.0):
        for delta in (0.0, 1e-5, 1e-3):
            expected = min(1.0, reference_p_value(right, guesses, canaries, epsilon, delta))
            assert one_run.p_value(right, guesses, canaries, epsilon, delta) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("right", "guesses", "delta", "expected"),
    [(100, 100, 1e-5, 3.47), (95, 100, 1e-5, 2.17), (100, 100, 0, 3.49), (50, 50, 0, 2.79)],
)
def test_bounds_are_those_that_others_compute(right: int, guesses: int, delta: float, expected: float) -> None:
    assert one_run.epsilon_bound(right, guesses, 1000, delta) == pytest.approx(expected, abs=0.01)


def test_randomised_response_beats_its_epsilon_no_more_often_than_one_time_in_twenty() -> None:
    """Each coin is told rightly with probability e / (1 + e): epsilon 1 exactly. 400 audits, at most 5% above it."""
    rng, above = np.random.default_rng(3), 0
    for _ in range(400):
        inside = rng.random(200) < 0.5
        told = np.where(rng.random(200) < math.e / (1 + math.e), inside, ~inside)
        above += one_run.lower_bound(told + rng.random(200) / 9, inside, 0.0).epsilon > 1.0
    assert above <= 34  # more with probability 1e-3 if it happens in 5%


def test_the_most_that_canaries_can_show_is_what_right_guesses_of_all_of_them_prove() -> None:
    """All of 84 coins told at one of eight levels of 5% / 8: with delta 0, q^84 = 0.00625 there."""
    q = 0.00625 ** (1 / 84)
    assert one_run.highest(84, 0.0) == pytest.approx(math.log(q / (1 - q)), abs=2e-3)
    assert one_run.highest(5, 1e-5) == 0.0


def test_scores_that_tell_all_give_a_large_bound_and_scores_that_tell_nothing_give_none() -> None:
    inside = np.random.default_rng(4).random(400) < 0.5
    assert one_run.lower_bound(inside.astype(float), inside, 1e-5).epsilon > 3.5
    noise = np.random.default_rng(5).normal(size=400)
    assert one_run.lower_bound(noise, inside, 1e-5).epsilon == 0.0


def test_the_rows_of_a_change_are_told_from_rows_like_them() -> None:
    """Rows that share most of their gradient: inner products alone mix them up, the regression does not."""
    rng = torch.Generator().manual_seed(0)
    common = torch.randn(400, generator=rng)
    gradients = 3 * torch.rand(60, 1, generator=rng) * common + torch.randn(60, 400, generator=rng)
    inside = torch.arange(60) % 2 == 0
    change = -(gradients[inside] / gradients[inside].norm(dim=1, keepdim=True)).sum(0)
    inner = -(gradients @ change).numpy()
    found = decoding.weights(gradients.clone(), change).numpy()
    assert membership.auc(found[inside], found[~inside]) == 1.0
    assert membership.auc(inner[inside], inner[~inside]) < 0.8


def test_the_span_of_a_gradient_holds_the_inputs_of_its_tokens_and_no_others() -> None:
    rng = torch.Generator().manual_seed(0)
    inputs = torch.randn(50, 16, generator=rng)
    present = np.array([3, 11, 20, 41, 7])
    mixed = torch.randn(8, 5, generator=rng) @ inputs[present]
    scores = inversion.presence(inputs, mixed)
    assert len(inversion.span(mixed)) == 5
    assert scores[present] == pytest.approx(1.0)
    assert np.delete(scores, present).max() < 0.9
    assert inversion.recovery(scores, present, np.array([7])) == 1.0
    assert inversion.recovery(-scores, present, np.array([], int)) == 0.0
