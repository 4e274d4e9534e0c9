"""Exposure of planted secrets (Carlini et al. 2019, "The Secret Sharer")."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

CHANCE = 1.0  # bits, the median where nothing was memorised: that of -log2 U for U uniform


class Exposure(NamedTuple):
    """The exposure of some secrets that were each planted so many times."""

    copies: int
    bits: tuple[float, ...]  # of each secret
    highest: float  # bits that a secret can show: log2 of the fills that it is ranked among
    p_value: float  # how probable so much exposure or more is where nothing was memorised

    @property
    def median(self) -> float:
        """The median over the secrets, in bits."""
        return float(np.median(self.bits))


def exposure(losses: np.ndarray, own: int) -> float:
    """log2 of the number of fills less log2 of the rank of the planted one, in bits; exact, over all given fills.

    The rank counts from 1 and takes ties against the attack. A secret drawn at random among the fills and never
    seen has every rank with the same probability.

    Args:
        losses: (k,) of each fill, lower being likelier; or their change by training.
        own: which of them was planted.
    """
    return math.log2(len(losses)) - math.log2(int((losses <= losses[own]).sum()))


def summed_up(copies: int, bits: Sequence[float], fills: int) -> Exposure:
    """The exposures of secrets that were planted equally often, with the p-value of their sum.

    Where nothing is memorised, exposure is at most -log2 U for a uniform U, so the sum over k secrets is at most a
    Gamma(k) variable over ln 2: the p-value is its tail, which is the sum of the first k terms of a Poisson law.
    """
    total = sum(bits) * math.log(2)
    terms = [
        math.exp(k * math.log(total) - total - math.lgamma(k + 1)) if total else float(k == 0) for k in range(len(bits))
    ]
    return Exposure(copies, tuple(bits), math.log2(fills), min(1.0, sum(terms)))
