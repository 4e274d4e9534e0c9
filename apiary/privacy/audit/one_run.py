"""A lower bound on epsilon from one training run, in which the auditor guesses which canaries were in.

Every canary is in or out by a fair coin of its own: Steinke, Nasr and Jagielski 2023, "Privacy auditing with one (1)
training run".
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

_HIGHEST = 50.0  # no epsilon beyond is told from another


class Bound(NamedTuple):
    """What the guesses prove, at the confidence that was asked for."""

    epsilon: float  # the mechanism is not (epsilon', delta)-private for any epsilon' below
    guesses: int  # of the best choice of guesses
    right: int
    canaries: int
    confidence: float


def p_value(right: int, guesses: int, canaries: int, epsilon: float, delta: float) -> float:
    """At most how probable so many right guesses are under an (epsilon, delta)-private mechanism (theorem 5.2).

    With q = e^epsilon / (1 + e^epsilon) and W ~ Binomial(guesses, q):
    P[W >= right] + 2 canaries delta max_i P[right - i <= W < right] / i.

    Args:
        right: right guesses.
        guesses: guesses made; on the other canaries none was.
        canaries: how many were in or out by a coin.
    """
    if guesses == 0:
        return 1.0
    mass = _binomial(guesses, 1 / (1 + math.exp(-epsilon)))
    tail = float(mass[right:].sum())
    below = np.cumsum(mass[:right][::-1])  # P[right - i <= W < right] for i = 1, 2, ...
    slack = float((below / np.arange(1, right + 1)).max()) if right else 0.0
    return min(1.0, tail + 2 * canaries * delta * slack)


def _binomial(n: int, q: float) -> np.ndarray:
    """P[Binomial(n, q) = k] for k = 0..n, (n + 1,) float64."""
    k = np.arange(n + 1)
    logs = np.array([math.lgamma(i + 1) for i in k])
    log_q, log_rest = (math.log(q), math.log1p(-q)) if q < 1 else (0.0, -math.inf)
    rest = np.where(k < n, (n - k) * (log_rest if math.isfinite(log_rest) else -1e9), 0.0)
    return np.asarray(np.exp(logs[n] - logs - logs[::-1] + k * log_q + rest))


def epsilon_bound(right: int, guesses: int, canaries: int, delta: float, confidence: float = 0.95) -> float:
    """The largest epsilon that so many right guesses refute at this confidence; 0 where they refute none."""
    limit = 1 - confidence
    if p_value(right, guesses, canaries, 0.0, delta) > limit:
        return 0.0
    low, high = 0.0, _HIGHEST
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if p_value(right, guesses, canaries, middle, delta) <= limit else (low, middle)
    return low


def highest(canaries: int, delta: float) -> float:
    """What `lower_bound` gives of so many canaries where every coin is told rightly: no bound of theirs is above it."""
    inside = np.arange(canaries) < canaries // 2
    return lower_bound(inside.astype(float), inside, delta).epsilon


def lower_bound(scores: np.ndarray, inside: np.ndarray, delta: float, confidence: float = 0.95) -> Bound:
    """The best bound over a few choices of guesses that are fixed beforehand, at `confidence` for all of them together.

    The highest scores are guessed to be in, and in half of the choices as many of the lowest to be out; on the rest no
    guess is made. Each choice is tested at (1 - confidence) / (number of choices) (Bonferroni).

    Args:
        scores: (m,) of the canaries; higher says in.
        inside: (m,) bool, whether each was in.
        delta: of the claim.
        confidence: that the bound is below the truth.
    """
    order, m = np.argsort(-scores, kind="stable"), len(scores)
    choices = [(m // part, both) for part in (16, 8, 4, 2) for both in (False, True)]
    each = 1 - (1 - confidence) / len(choices)
    best = Bound(0.0, 0, 0, m, confidence)
    for count, both in choices:
        top, bottom = order[:count], order[m - count :] if both else order[:0]
        right = int(inside[top].sum() + (~inside[bottom]).sum())
        guesses = len(top) + len(bottom)
        found = epsilon_bound(right, guesses, m, delta, each)
        if found > best.epsilon or not best.guesses:
            best = Bound(found, guesses, right, m, confidence)
    return best
