"""Which of several models a client keeps, by the loss on validation rows that none of them was trained on.

The lowest of several noisy losses is lower than it will be on new rows, and the more so the fewer rows and the more
candidates there are (the winner's curse). So the lowest loss alone does not decide. Of the candidates that the rows
cannot tell from the best one the client keeps the one nearest to the federated model, behind which stand the most rows:
the one-standard-error rule (Breiman et al. 1984, section 3.4.3), with the distance from the federated model in place of
complexity. The standard error is that of the difference, row by row: what makes a row hard for all models cancels out.
With fewer than `FEWEST` rows a standard error says nothing, and the federated model is kept.

The losses that decide are optimistic of the chosen candidate for that same reason, and are never those that are
reported: whoever calls this gives validation rows here and measures on others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from apiary.evaluation import intervals

Floats: TypeAlias = NDArray[np.float64]
Kind: TypeAlias = Literal["federated", "earlier", "mixed", "tuned", "alone"]
FEWEST = 10  # validation rows; on fewer nothing is chosen


class Candidate(NamedTuple):
    """A model that a client may keep."""

    kind: Kind
    weight: float  # of the training alone in it: 0 in the federated model, 1 in training alone
    steps: int  # optimizer steps on the client's rows that stand behind it, those in the federation included
    distance: float  # from the federated model, in the space of products
    nats: Floats  # (n,) summed loss of each validation row


class Choice(NamedTuple):
    """What was chosen, and why."""

    chosen: int  # the candidate's index
    best: int  # that of the lowest loss
    losses: tuple[float, ...]  # of each candidate, nats per response token; infinite where it gives no number
    errors: tuple[float, ...]  # standard error of its difference to the best; NaN where there are too few rows
    enough: bool  # whether there are rows enough to choose by


def choose(candidates: Sequence[Candidate], tokens: Floats, margin: float) -> Choice:
    """The candidate nearest to the federated one of those within `margin` standard errors of the lowest loss.

    Args:
        candidates: with losses on the same validation rows.
        tokens: (n,) response tokens of each validation row.
        margin: in standard errors of the difference to the best candidate; 0 takes the lowest loss.

    Raises:
        ValueError: there is no candidate, or none that is the federated model.
    """
    federated = next((i for i, candidate in enumerate(candidates) if candidate.kind == "federated"), None)
    if federated is None:
        raise ValueError("the federated model is not among the candidates")
    losses = tuple(loss_of(candidate.nats, tokens) for candidate in candidates)
    nothing = (math.nan,) * len(candidates)
    if len(tokens) < FEWEST or not any(map(math.isfinite, losses)):
        return Choice(federated, federated, losses, nothing, enough=False)
    best = min(range(len(candidates)), key=lambda i: (losses[i], candidates[i].distance))
    errors = tuple(_error(candidate, candidates[best], tokens) for candidate in candidates)
    behind = [loss - losses[best] for loss in losses]
    fit = [i for i in range(len(candidates)) if i == best or behind[i] <= margin * errors[i]]
    chosen = min(fit, key=lambda i: (candidates[i].distance, losses[i]))
    return Choice(chosen, best, losses, errors, enough=True)


def loss_of(nats: Floats, tokens: Floats) -> float:
    """Nats per response token; infinite where a row gives no number or there is none."""
    total = float(nats.sum()) if len(nats) else math.inf
    return total / float(tokens.sum()) if math.isfinite(total) else math.inf


def _error(candidate: Candidate, best: Candidate, tokens: Floats) -> float:
    """The standard error of the difference of two losses, over rows; NaN, which is within no margin, without one."""
    difference = candidate.nats - best.nats
    if not np.isfinite(difference).all():
        return math.nan
    return intervals.ratio_with_error(difference, tokens)[1]
