"""Which visits of a round count, and for how much: each is held against the others of the round and against the past.

What is well within the limits of the rounds before counts as soon as it comes, so that a server that adds updates up
holds one at a time. The rest waits until the round is over, whose medians then decide. So nothing depends on the order
in which clients answer. In a first round that is everybody, so what waits is kept on the disk beyond `_HELD` bytes.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import IO, NamedTuple

import torch
from safetensors.torch import load, save

from apiary.config import schedule
from apiary.core.messages import Decline, Visit
from apiary.core.tensors import StateDict
from server.replies import Refusal, Terms
from strategies import guard
from strategies.from_config import weighs
from strategies.guard import Medians, Reference

_HELD = 256 * 2**20  # bytes of the changes that wait in memory
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
    a longer one is refused. With `train.epochs` it may come from more rows, and is scaled down to the limit; but not
    where clients keep account of the change that they sent, which would no longer be the server's. A part in which the
    median client moves nothing has the limit of the part that moves most.

    Where `strategy.weight_cap` is c, likewise, no weight is larger than c times the median; where fewer than
    `guard.FEWEST` answer and no round before has a median, than c times the smallest of them, or what the handshakes
    lead to expect. It is for methods that weigh clients by what they trained on.

    Args:
        terms: of the round.
    """

    def __init__(self, terms: Terms) -> None:
        config, train = terms.config, terms.config.train
        self._factor = config.strategy.norm_guard
        self._cap = config.strategy.weight_cap if weighs(config) else 0.0
        self._alike = train.epochs is None or terms.aggregator.local.resumes == "counted"
        self._rate = schedule.lr_sum(config, terms.number, train.steps or 1)
        self._before: Reference = terms.reference
        self._agreed = terms.agreed
        self._seen: list[tuple[guard.Lengths, float]] = []
        self._waiting = _Queue()

    def take(self, client: str, visit: Visit, size: int) -> Settled | None:
        """The visit, if it can be said at once that it counts as it is; else it waits for `release`."""
        if not (self._factor or self._cap):
            return Settled(client, visit, size)
        sizes, weight = guard.lengths(visit.update.delta), visit.update.weight
        self._seen.append((sizes, weight))
        limits = [(value, self._factor * self._before.length(part, self._rate)) for part, value in sizes.items()]
        held = [pair for pair in limits if pair[0] > 0] if self._factor else []
        held += [(weight, self._cap * self._before.weight)] if self._cap else []
        if any(limit == 0 or limit < value for value, limit in held):
            self._waiting.put(client, visit, size)
            return None
        return Settled(client, visit, size)

    def release(self) -> Iterator[Settled]:
        """What waits, settled by the medians of the round, by name, one at a time."""
        usual = self._medians()
        for one in self._waiting.drain():
            yield self._settled(*one, usual)

    def after(self) -> Reference:
        """What is usual once this round is over."""
        return self._before.after(self._medians(), self._rate)

    def _medians(self) -> Medians:
        return guard.medians(self._seen)

    def _settled(self, client: str, visit: Visit, size: int, round_: Medians) -> Settled:
        capped = shortened = None
        sizes = guard.lengths(visit.update.delta)
        usual_of = {part: max(round_.lengths.get(part, 0.0), self._before.length(part, self._rate)) for part in sizes}
        longest = max(usual_of.values(), default=0.0)
        excess, part, usual = max(
            (
                (length / (self._factor * usual) if self._factor and usual else 0.0, part, usual)
                for part, length in sizes.items()
                for usual in [usual_of[part] or longest]
            ),
            default=(0.0, "other", 0.0),
        )
        if excess > 1 and (self._alike or excess > _FAR):
            return Settled(client, _refusal(visit, part, usual, self._factor), size)
        if excess > 1:
            visit = _with_delta(visit, {name: tensor / excess for name, tensor in visit.update.delta.items()})
            shortened = 1 / excess
        most = math.floor(self._cap * self._usual_weight(round_))
        if 0 < most < visit.update.weight:
            visit = visit._replace(update=visit.update._replace(weight=float(most)))
            capped = float(most)
        return Settled(client, visit, size, capped, shortened)

    def _usual_weight(self, round_: Medians) -> float:
        """What a weight is held against; no client alone can raise it above what an honest one has, or may have."""
        known = max(round_.weight, self._before.weight)
        return known or max(self._agreed, min(weight for _, weight in self._seen))


class _Waiting(NamedTuple):
    """A visit that waits."""

    client: str
    visit: Visit  # without its change where that is on the disk
    size: int
    read: Callable[[], StateDict] | None  # reads the change from there


class _Queue:
    """The visits that wait: their changes in memory up to `_HELD` bytes, those that come later in a file.

    The file has no name and is gone once the queue is. A full disk raises OSError, as it does anywhere in a run.
    """

    def __init__(self) -> None:
        self._waiting: list[_Waiting] = []
        self._held = 0
        self._file: IO[bytes] | None = None

    def put(self, client: str, visit: Visit, size: int) -> None:
        """Take in a visit, with who sent it and the bytes of its message's arrays."""
        delta, read = visit.update.delta, None
        length = sum(tensor.nbytes for tensor in delta.values())  # a coded change is shorter on its way
        if self._held + length > _HELD:
            self._file = self._file or tempfile.TemporaryFile()  # noqa: SIM115 - it outlives this call
            read, visit = _written(delta, self._file), _with_delta(visit, {})
        else:
            self._held += length
        self._waiting.append(_Waiting(client, visit, size, read))

    def drain(self) -> Iterator[tuple[str, Visit, int]]:
        """Take out all visits by name, each as it was put in; one of those in the file is in memory at a time."""
        waiting, self._waiting, self._held = sorted(self._waiting, key=lambda one: one.client, reverse=True), [], 0
        while waiting:
            client, visit, size, read = waiting.pop()
            yield client, visit if read is None else _with_delta(visit, read()), size
        if self._file is not None:
            self._file.close()


def _written(delta: StateDict, file: IO[bytes]) -> Callable[[], StateDict]:
    """What reads a change back that is written at the end of the file here."""
    begins = file.seek(0, os.SEEK_END)
    length = file.write(save({name: tensor.contiguous() for name, tensor in delta.items()}))
    names = tuple(delta)  # in an order by which sums go

    def read() -> StateDict:
        file.seek(begins)
        tensors = load(file.read(length))
        return {name: tensors[name] for name in names}

    return read


def _with_delta(visit: Visit, delta: StateDict) -> Visit:
    return visit._replace(update=visit.update._replace(delta=delta))


def _refusal(visit: Visit, part: str, usual: float, factor: float) -> Refusal:
    tensors = [tensor for name, tensor in visit.update.delta.items() if guard.part_of(name) == part]
    own = math.hypot(*(float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) for tensor in tensors))
    bound = factor * usual * math.sqrt(sum(tensor.numel() for tensor in tensors))
    reason = (
        f"its change of the {guard.words(part)} is {own:.3g} long; the median and strategy.norm_guard = {factor:g} "
        f"allow {bound:.3g}"
    )
    return Refusal(reason, poisoned=True, spent=visit.spent)
