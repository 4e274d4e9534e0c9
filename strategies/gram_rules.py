"""What robust rules decide from norms and inner products alone: functions of the Gram matrix of n changes.

A rule answers with a factor for each change, by which it counts in the result, and with the reason where that is
little. What space the changes lie in is the caller's business. Ties go to the earlier change, so callers sort.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from apiary.core.errors import TooFewAnswers, UserError

_NEEDS: Mapping[str, tuple[int, int]] = {  # (a, b): at least a f + b answers
    "norm_clip": (2, 1),
    "krum": (2, 3),
    "multi_krum": (2, 3),
    "geometric_median": (2, 1),
    "median": (2, 1),
    "trimmed_mean": (2, 1),
    "bulyan": (4, 3),
}
NAMED = 0.5  # a client is named in the notes when less than this part of an even share is left to it
_SMOOTH, _STILL, _STEPS = 1e-6, 1e-12, 1000  # of Weiszfeld's iteration
_ROUNDING = 1e-12  # of the squares of two changes; what they differ by below it is float64's cancelling


class Verdict(NamedTuple):
    """What a rule makes of n changes."""

    weights: Tensor  # (n,) float64: the result is sum_k weights_k U_k
    reasons: Mapping[int, str]  # why one counts for little


Rule: TypeAlias = Callable[[Tensor, int], Verdict]  # of the Gram matrix (n, n), float64, and the number f of hostile


def fewest(name: str, byzantine: int | None) -> int:
    """The fewest answers from which a method keeps its promise against so many hostile clients; 1 if it makes none.

    n >= 2 f + 3 for Krum (Blanchard et al. 2017, proposition 1), n >= 4 f + 3 for Bulyan (El Mhamdi et al. 2018,
    section 4), and a majority of honest clients for the medians, the trimmed mean and clipping to the median norm.
    """
    slope, least = _NEEDS.get(name, (0, 1))
    return slope * (byzantine or 0) + least


def check_answers(name: str, byzantine: int, answers: int) -> None:
    """Check that a round has enough answers for its rule.

    Raises:
        TooFewAnswers: the round has fewer updates than the method needs.
    """
    if answers < (needed := fewest(name, byzantine)):
        raise TooFewAnswers(
            f"{name} against {byzantine} hostile clients needs {needed} good answers, this round has {answers}; "
            "raise strategy.min_clients and strategy.quorum, or lower strategy.options.byzantine"
        )


# -- before the rule --------------------------------------------------------------------------------------------------


class Preprocessing(NamedTuple):
    """What is done to the changes before the rule sees them."""

    clip: bool  # each to the median norm
    nearest: bool  # then each is replaced by the mean of its nearest

    def check(self, byzantine: int | None) -> None:
        """Check that f is known where it is needed.

        Raises:
            UserError: `nearest` is set, and `byzantine` is not above 0.
        """
        if self.nearest and not byzantine:
            raise UserError(
                f"strategy.options.byzantine = {byzantine or 0}: with nearest = true each update is mixed with its "
                "n - byzantine nearest; give the number of clients that may be hostile"
            )

    def __call__(self, gram: Tensor, byzantine: int) -> tuple[Tensor, dict[int, str]]:
        """The (n, n) matrix that makes of the changes what the rule sees, and reasons where little is left of one."""
        mix, reasons = torch.eye(len(gram), dtype=gram.dtype), dict[int, str]()
        if self.clip:
            factors, clipped = clipping(gram, None)
            mix, reasons = factors.diag(), dict(clipped)
        if self.nearest:
            mix = mixing(mix @ gram @ mix.T, byzantine) @ mix
        return mix, reasons

    def notes(self, clients: Sequence[str], shares: Tensor, reasons: Mapping[int, str]) -> dict[str, str]:
        """By client, why it was cut or counts for little.

        A mixed change that is cut does not cut its client, which is part of others too: then the shares decide.
        """
        if not self.nearest:
            return {clients[k]: reasons[k] for k in sorted(reasons)}
        little = where(shares <= NAMED * shares.sum() / len(shares))
        return {clients[k]: reasons.get(k, "among the nearest of few others") for k in little}


def clipping(gram: Tensor, limit: float | None) -> Verdict:
    """The factors min(1, limit / norm); without a limit, the median norm is it.

    About half of the clients are shortened a little by their own median; only those that lose more than half are named.
    """
    norms = gram.diagonal().clamp_min(0).sqrt()
    most = float(norms.quantile(0.5)) if limit is None else limit
    factors = torch.where(norms > most, most / norms, 1.0)
    whose = "the median" if limit is None else "the limit"
    return Verdict(factors, {k: f"norm {times(float(norms[k]), most)} {whose}" for k in where(factors < NAMED)})


def mixing(gram: Tensor, byzantine: int) -> Tensor:
    """The (n, n) matrix that replaces each change by the mean of its n - f nearest, itself the first of them.

    Nearest-neighbour mixing (Allouah et al. 2023, "Fixing by mixing", algorithm 2).
    """
    near = max(1, len(gram) - byzantine)
    order = _squared_distances(gram).fill_diagonal_(-1.0).sort(dim=1, stable=True).indices[:, :near]
    return torch.zeros_like(gram).scatter_(1, order, 1 / near)


# -- rules ------------------------------------------------------------------------------------------------------------


def mean_clipped(limit: float | None) -> Rule:
    """The mean of the changes, each clipped to `limit` or else to the median norm."""

    def rule(gram: Tensor, byzantine: int) -> Verdict:
        factors, reasons = clipping(gram, limit)
        return Verdict(factors / len(gram), reasons)

    return rule


def krum_scores(gram: Tensor, byzantine: int) -> Tensor:
    """For each change the sum of the squared distances to its n - f - 2 nearest others (Blanchard et al. 2017).

    Mixed changes often have equal scores. Told are 32 binary digits, so that such do tie and the first client wins, on
    every processor.
    """
    others = _squared_distances(gram).fill_diagonal_(math.inf).sort(1).values
    mantissa, exponent = others[:, : max(1, len(gram) - byzantine - 2)].sum(1).frexp()
    return (mantissa * 2.0**32).round().ldexp(exponent - 32)


def krum(select: int | None) -> Rule:
    """The mean of the `select` changes of the lowest scores; of n - f of them, which is the most, without a number."""

    def rule(gram: Tensor, byzantine: int) -> Verdict:
        scores, most = krum_scores(gram, byzantine), len(gram) - byzantine
        kept = scores.argsort(stable=True)[: min(select or most, most)]
        weights = torch.zeros_like(scores).index_fill_(0, kept, 1 / len(kept))
        return Verdict(weights, far(scores, kept))

    return rule


def far(scores: Tensor, kept: Tensor) -> dict[int, str]:
    """The reason of all that are not among those `kept` by Krum's scores."""
    typical = math.sqrt(float(scores[kept].median()))
    cut = sorted({*range(len(scores))} - {*kept.tolist()})
    return {k: f"{as_far(math.sqrt(float(scores[k])), typical)} from its nearest as those that are kept" for k in cut}


def geometric_median(gram: Tensor, byzantine: int) -> Verdict:
    """The weights that make the point of the least sum of distances to all changes.

    By Weiszfeld's iteration, smoothed (Pillutla et al. 2022, "Robust aggregation for federated learning", algorithm 2):
    z = sum_k w_k U_k with w_k in proportion to 1 / max(nu, ||U_k - z||), until no weight moves. The paper's nu is 1e-6;
    here it is that part of the typical distance between two changes, so that the unit does not matter. The start is not
    the mean but weights that a far change cannot sway, else it would take the more steps the farther one is.
    """
    typical = _squared_distances(gram).sqrt().quantile(0.5, 1)
    nu = max(_SMOOTH * float(typical.median()), torch.finfo(gram.dtype).tiny)
    weights = _normed(nu / typical.clamp_min(nu))
    for _ in range(_STEPS):
        before, distances = weights, _distances_to(gram, weights)
        weights = _normed(nu / distances.clamp_min(nu))
        if float((weights - before).abs().max()) < _STILL:
            break
    weights = torch.where(weights < _STILL * weights.max(), 0.0, weights)  # no more than rounding, and no number to add
    middle = float(distances.median())
    little = where(weights < NAMED / len(weights))
    return Verdict(weights, {k: f"{as_far(float(distances[k]), middle)} off as is typical" for k in little})


def trust(gram: Tensor, byzantine: int) -> Verdict:
    """FLTrust (Cao et al. 2021, equations 2 to 4), with the server's own change U_0 as the last of n + 1.

    The factors, one for each client, are TS_k / sum_j TS_j ||U_0|| / ||U_k|| with TS_k = max(0, cos(U_k, U_0)). Where
    nobody is trusted all are 0: the model stays as it is.
    """
    norms = gram.diagonal().clamp_min(0).sqrt()
    own = norms[-1]
    cosines = torch.where((norms > 0) & (own > 0), gram[-1] / norms / own, 0.0)[:-1]
    scores = cosines.clamp_min(0)
    weights = torch.where(scores > 0, scores / scores.sum() * own / norms[:-1], 0.0)
    return Verdict(
        weights, {k: f"cosine {float(cosines[k]):.2f} to the server's own update" for k in where(scores == 0)}
    )


def where(mask: Tensor) -> list[int]:
    """The places where a mask (n,) holds."""
    return [int(k) for k in mask.nonzero()]


def as_far(value: float, reference: float) -> str:
    """How a distance compares with what is usual, for a note: the start of a sentence that goes on with `as`."""
    if not reference:
        return "many times as far" if value else "just as far"
    return "just as far" if f"{value / reference:.3g}" == "1" else f"{times(value, reference)} as far"


def times(value: float, reference: float) -> str:
    """How many times the reference a value is, for a note."""
    return f"{value / reference if reference else math.inf:.3g} times"


def _squared_distances(gram: Tensor) -> Tensor:
    """||U_j - U_k||^2, (n, n); of float64 sums over what are small changes already, so that cancelling costs little.

    Symmetric to the last bit, for two that are each other's nearest must tie; and 0 for equal ones, as mixing makes.
    """
    squares = gram.diagonal()
    sums = squares[:, None] + squares[None]
    apart = sums - (gram + gram.T)
    return apart.masked_fill(apart <= _ROUNDING * sums, 0.0)


def _distances_to(gram: Tensor, weights: Tensor) -> Tensor:
    """The distance of each change to sum_k weights_k U_k."""
    toward = gram @ weights
    return (gram.diagonal() - 2 * toward + weights @ toward).clamp_min(0).sqrt()


def _normed(weights: Tensor) -> Tensor:
    return weights / weights.sum()
