"""Membership inference: how well scores tell rows that were trained on from rows that were not."""

from __future__ import annotations

from typing import Any, NamedTuple

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
    true_positives: Figure | None  # members that are found where 1% of the others are taken for one; 0.01 is chance

    def document(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "members": self.members,
            "others": self.others,
            "auc": self.auc and self.auc._asdict(),
            "true_positives": self.true_positives and self.true_positives._asdict(),
        }


def auc(members: np.ndarray, others: np.ndarray) -> float:
    """The area under the ROC curve: P(member > other) + P(equal) / 2, by ranks (Mann and Whitney 1947).

    Args:
        members: (n,) scores of rows that were trained on; higher says member.
        others: (k,) scores of rows that were not.
    """
    ordered = np.sort(others)
    below = np.searchsorted(ordered, members, "left") + np.searchsorted(ordered, members, "right")
    return float(below.mean() / (2 * len(others)))


def true_positive_rate(members: np.ndarray, others: np.ndarray, false_positives: float = FALSE_POSITIVES) -> float:
    """The share of the members that score above all but `false_positives` of the others (Carlini et al. 2022).

    The threshold is the (floor(false_positives k) + 1)-th highest of the k others, and a member must exceed it.
    """
    allowed = int(false_positives * len(others))
    threshold = np.sort(others)[::-1][allowed]
    return float((members > threshold).mean())


def membership(members: np.ndarray, others: np.ndarray, seed: int) -> Membership:
    """Both figures with 95% intervals: percentiles of a bootstrap over members and over others (Efron 1979).

    Args:
        members: (n,) scores.
        others: (k,) scores.
        seed: of the bootstrap.
    """
    n, k = len(members), len(others)
    if min(n, k) < FEWEST:
        return Membership(n, k, None, None)
    rng = np.random.default_rng(seed)
    again = [(members[rng.integers(n, size=n)], others[rng.integers(k, size=k)]) for _ in range(_RESAMPLES)]
    rate = None
    if k >= FEWEST_FOR_RATE:
        rate = _figure(true_positive_rate(members, others), [true_positive_rate(*pair) for pair in again])
    return Membership(n, k, _figure(auc(members, others), [auc(*pair) for pair in again]), rate)


def _figure(value: float, resampled: list[float]) -> Figure:
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Figure(value, float(min(low, value)), float(max(high, value)))
