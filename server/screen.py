"""Which visits of a round count, and for how much: each is held against the others of the round and against the past.

What is well within the limits of the rounds before counts as soon as it comes, so that a server that adds updates up
holds one at a time. The rest waits until the round is over, whose medians then decide. So nothing depends on the order
in which clients answer.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from apiary.config import schedule
from apiary.core.messages import Decline, Visit
from server.replies import Refusal, Terms
from strategies import guard
from strategies.guard import Medians, Reference

_WAITING = 32  # clients of a round without a past that may all wait for its end, each with its change in memory
_FAR = 100.0  # times the limit: beyond it no number of steps explains a change


class Settled(NamedTuple):
    """A reply of which it is known whether and for how much it counts."""

    client: str  # by the server's own name for it
    reply: Visit | Decline | Refusal  # with the weight and the change that count
    size: int  # bytes of its arrays
    capped: float | None = None  # the weight that counts, where the client had a higher one
    shortened: float | None = None  # the factor of its change, where that was too long

    @property
    def limits(self) -> dict[str, float]:
        """The fields of the `client` event that say what of the visit did not count; none where all did."""
        told = {"capped": self.capped, "shortened": self.shortened}
        return {name: value for name, value in told.items() if value is not None}


class Screen:
    """The visits of a round that wait, and what is seen of all.

    Where `strategy.norm_guard` is k, a change may be k times as long as the median one of the round or of the rounds
    before, whichever is longer, in each part of the adapter (`strategies.guard`). Where all clients make the same steps
    a longer one is refused. With `train.epochs` it may come from more rows, and is scaled down to the limit. Where
    `strategy.weight_cap` is c, likewise, no weight is larger than c times the median.

    Args:
        terms: of the round.
        asked: clients that are asked.
    """

    def __init__(self, terms: Terms, asked: int) -> None:
        config, train = terms.config, terms.config.train
        self._factor, self._cap = config.strategy.norm_guard, config.strategy.weight_cap
        self._alike = train.epochs is None
        self._rate = schedule.lr_sum(config, terms.number, train.steps or 1)
        self._before: Reference = terms.reference
        self._patient = asked <= _WAITING
        self._seen: list[tuple[guard.Lengths, float]] = []
        self._waiting: list[tuple[str, Visit, int]] = []  # with who sent it, and its bytes

    def take(self, client: str, visit: Visit, size: int) -> Settled | None:
        """The visit, if it can be said at once that it counts as it is; else it waits for `release`."""
        if not (self._factor or self._cap):
            return Settled(client, visit, size)
        sizes, weight = guard.lengths(visit.update.delta), visit.update.weight
        self._seen.append((sizes, weight))
        limits = [(value, self._factor * self._before.length(part, self._rate)) for part, value in sizes.items()]
        held = [pair for pair in limits if pair[0] > 0] if self._factor else []
        held += [(weight, self._cap * self._before.weight)] if self._cap else []
        over = any(0 < limit < value for value, limit in held)
        if over or (self._patient and any(limit == 0 for _, limit in held)):
            self._waiting.append((client, visit, size))
            return None
        return Settled(client, visit, size)

    def release(self) -> list[Settled]:
        """What waits, settled by the medians of the round, by name."""
        usual, waiting, self._waiting = self._medians(), self._waiting, []
        return [self._settled(*one, usual) for one in sorted(waiting, key=lambda one: one[0])]

    def after(self) -> Reference:
        """What is usual once this round is over."""
        return self._before.after(self._medians(), self._rate)

    def _medians(self) -> Medians:
        return guard.medians(self._seen)

    def _settled(self, client: str, visit: Visit, size: int, round_: Medians) -> Settled:
        capped = shortened = None
        excess, part, usual = max(
            (
                (length / (self._factor * usual) if self._factor and usual else 0.0, part, usual)
                for part, length in guard.lengths(visit.update.delta).items()
                for usual in [max(round_.lengths.get(part, 0.0), self._before.length(part, self._rate))]
            ),
            default=(0.0, "other", 0.0),
        )
        if excess > 1 and (self._alike or excess > _FAR):
            return Settled(client, _refusal(visit, part, usual, self._factor), size)
        if excess > 1:
            short = {name: tensor / excess for name, tensor in visit.update.delta.items()}
            visit = visit._replace(update=visit.update._replace(delta=short))
            shortened = 1 / excess
        most = math.floor(self._cap * max(round_.weight, self._before.weight))
        if 0 < most < visit.update.weight:
            visit = visit._replace(update=visit.update._replace(weight=float(most)))
            capped = float(most)
        return Settled(client, visit, size, capped, shortened)


def _refusal(visit: Visit, part: str, usual: float, factor: float) -> Refusal:
    tensors = [tensor for name, tensor in visit.update.delta.items() if guard.part_of(name) == part]
    own = math.hypot(*(float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) for tensor in tensors))
    bound = factor * usual * math.sqrt(sum(tensor.numel() for tensor in tensors))
    reason = (
        f"its change of the {guard.words(part)} is {own:.3g} long; the median and strategy.norm_guard = {factor:g} "
        f"allow {bound:.3g}"
    )
    return Refusal(reason, poisoned=True, spent=visit.spent)
