"""Membership inference: how well scores tell rows that were trained on from rows that were not."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

FEWEST = 20  # rows on either side for any figure
FEWEST_FOR_RATE = 100  # rows that were left out, or one of them alone would be more than the false-positive rate
FALSE_POSITIVES = 0.01
_RESAMPLES = 1000


class Figure(NamedTuple):
    """An estimate with its 95% interval."""

    value: float
    low: float
    high: float


class Membership(NamedTuple):
    """What an attack reaches. A figure is None where too few rows would make it up."""

    members: int
    others: int
    auc: Figure | None  # the probability that a member scores higher than another row; 0.5 is chance
    found: int | None  # members above the threshold that takes 1% of the others for members; chance is 1% of them too


def auc(members: np.ndarray, others: np.ndarray) -> float:
    """The area under the ROC curve: P(member > other) + P(equal) / 2, by ranks (Mann and Whitney 1947).

    Args:
        members: (n,) scores of rows that were trained on; higher says member.
        others: (k,) scores of rows that were not.
    """
    ordered = np.sort(others)
    below = np.searchsorted(ordered, members, "left") + np.searchsorted(ordered, members, "right")
    return float(below.mean() / (2 * len(others)))


def allowed(others: int) -> int:
    """How many of so many others may be taken for members at 1% false positives."""
    return int(FALSE_POSITIVES * others)


def true_positives(members: np.ndarray, others: np.ndarray) -> int:
    """How many members score above all but 1% of the others (Carlini et al. 2022).

    The threshold is the (floor(k / 100) + 1)-th highest of the k others, and a member must exceed it.
    """
    threshold = np.sort(others)[::-1][allowed(len(others))]
    return int((members > threshold).sum())


def membership(members: np.ndarray, others: np.ndarray, seed: int) -> Membership:
    """Both figures; the area's 95% interval has the percentiles of a bootstrap over members and others (Efron 1979).

    Args:
        members: (n,) scores.
        others: (k,) scores.
        seed: of the bootstrap.
    """
    n, k = len(members), len(others)
    if min(n, k) < FEWEST:
        return Membership(n, k, None, None)
    rng = np.random.default_rng(seed)
    again = [auc(members[rng.integers(n, size=n)], others[rng.integers(k, size=k)]) for _ in range(_RESAMPLES)]
    value, (low, high) = auc(members, others), np.percentile(again, [2.5, 97.5])
    area = Figure(value, float(min(low, value)), float(max(high, value)))
    return Membership(n, k, area, true_positives(members, others) if k >= FEWEST_FOR_RATE else None)
