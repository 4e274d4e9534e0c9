"""Tokenised examples in columns, the order in which an epoch visits them, and padded batches."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from apiary.data import store

# Rows are sorted by length only within windows of about this many batches: long enough that
# neighbours have nearly the same length, short enough that an epoch still mixes the data.
_WINDOW = 50


class Encoded(NamedTuple):
    """One example as tokens: ids (t,) int32, trained (t,) bool.

    cut: its end did not fit; spelled: its text spells control tokens, and was read as plain text; within: it was cut
    within an answer; whole: its tokens before it was cut, 0 for as many as now; lost: trained tokens that were cut off;
    notes: what of it the template does not write or train.
    """

    ids: np.ndarray
    trained: np.ndarray
    cut: bool
    spelled: bool = False
    within: bool = False
    whole: int = 0
    lost: int = 0
    notes: tuple[str, ...] = ()


class Dropped(NamedTuple):
    """Why an example is not used; whole: the tokens that it would have had, lost: the trained ones; 0 if unknown."""

    why: str
    whole: int = 0
    lost: int = 0


class CorpusStats(NamedTuple):
    """What encoding kept and lost: examples kept, their tokens, and rows cut short or dropped.

    cut_within: those of the cut rows that were cut within an answer; the others lost whole turns. trained_cut and
    trained_dropped: trained tokens that were cut off, and of rows that were too long.
    """

    examples: int
    tokens: int
    response_tokens: int
    cut: int
    dropped: int
    cut_within: int = 0
    trained_cut: int = 0
    trained_dropped: int = 0


@dataclass(frozen=True)
class Corpus:
    """All examples end to end; example i is `ids[offsets[i]:offsets[i + 1]]`.

    ids: (N,) int32; trained: (N,) bool, True where the token's loss counts (never an example's
    first token, which nothing predicts); offsets: (n + 1,) int64. Of the rows it was made from, by
    their number there: cut, those that were cut short; dropped, why the missing ones are not in it;
    spelled, those whose text spells control tokens; within, those that were cut within an answer; notes, what of a row
    the template does not write or train. whole: (m,) int64, tokens before cutting, of all rows that can be written.
    """

    ids: np.ndarray
    trained: np.ndarray
    offsets: np.ndarray
    stats: CorpusStats
    cut: tuple[int, ...] = ()
    dropped: Mapping[int, str] = field(default_factory=dict)
    spelled: tuple[int, ...] = ()
    within: tuple[int, ...] = ()
    notes: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    whole: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def tokens_in_memory(self) -> int:
        """As many as it has, or 0 where they are on disk."""
        return 0 if store.is_mapped(self.ids) else len(self.ids)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, (n,) int64."""
        return np.diff(self.offsets)


def gather(encoded: Iterable[Encoded | Dropped]) -> Corpus:
    """The corpus of the examples that could be encoded; in the place of one that could not stands why.

    Many tokens are kept on disk.

    Raises:
        UserError: the disk is full.
    """
    ids, trained = store.Numbers(np.int32), store.Numbers(bool)
    ends, whole, cut, within, spelled = (array("q") for _ in range(5))
    notes: dict[int, tuple[str, ...]] = {}
    dropped: dict[int, str] = {}
    alike: dict[tuple[str, ...], tuple[str, ...]] = {}  # equal notes once
    responses = trained_cut = trained_dropped = at = 0
    for i, row in enumerate(encoded):
        if isinstance(row, Dropped):
            dropped[i] = row.why
            trained_dropped += row.lost
            if row.whole:
                whole.append(row.whole)
            continue
        ids.append(row.ids)
        trained.append(row.trained)
        at += len(row.ids)
        ends.append(at)
        whole.append(row.whole or len(row.ids))
        responses += int(np.count_nonzero(row.trained))
        trained_cut += row.lost
        for rows, holds in ((cut, row.cut), (within, row.within), (spelled, row.spelled)):
            if holds:
                rows.append(i)
        if row.notes:
            notes[i] = alike.setdefault(row.notes, row.notes)
    stats = CorpusStats(
        examples=len(ends),
        tokens=at,
        response_tokens=responses,
        cut=len(cut),
        dropped=len(dropped),
        cut_within=len(within),
        trained_cut=trained_cut,
        trained_dropped=trained_dropped,
    )
    offsets = np.concatenate([np.zeros(1, np.int64), np.frombuffer(ends, np.int64)])
    lengths = np.frombuffer(whole, np.int64)
    marked = (tuple(cut), dropped, tuple(spelled), tuple(within), notes)
    return Corpus(ids.done(), trained.done(), offsets, stats, *marked, lengths)


def plan_batches(lengths: np.ndarray, batch_tokens: int, rng: torch.Generator) -> list[np.ndarray]:
    """The batches of one epoch as arrays of row numbers, every row exactly once.

    Rows are shuffled, sorted by length within windows and cut into batches with
    rows x longest <= batch_tokens (a longer row is a batch of its own); the batches are then
    shuffled. The same generator state gives the same plan.

    Args:
        lengths: (n,) tokens of each row.
        batch_tokens: padded tokens a batch may have.
        rng: a CPU generator; it is advanced.
    """
    order = torch.randperm(len(lengths), generator=rng).numpy()
    lengths = np.maximum(np.asarray(lengths, np.int64), 1)
    windows = max(1, round(lengths.sum() / (_WINDOW * batch_tokens)))
    batches: list[np.ndarray] = []
    for window in np.array_split(order, windows) if len(order) else []:
        window = window[np.argsort(-lengths[window], kind="stable")]
        batches += np.split(window, _even_cuts(lengths[window], batch_tokens))
    return [batches[i] for i in torch.randperm(len(batches), generator=rng).tolist()]


def _even_cuts(lengths: np.ndarray, budget: int) -> list[int]:
    """Where to cut falling `lengths` into as few batches as filling them up would give.

    Filling up leaves a last batch of a few rows, which would weigh as much in its step as a full
    one; the smallest budget that needs no more batches spreads them evenly.
    """
    best = _cuts(lengths, budget)
    low, high = 1, budget
    while low < high:
        middle = (low + high) // 2
        cuts = _cuts(lengths, middle)
        if len(cuts) <= len(best):
            best, high = cuts, middle
        else:
            low = middle + 1
    return best


def _cuts(lengths: np.ndarray, budget: int) -> list[int]:
    cuts: list[int] = []
    at = 0
    while (at := at + max(1, budget // int(lengths[at]))) < len(lengths):
        cuts.append(at)
    return cuts


class Batch(NamedTuple):
    """Right-padded examples.

    ids: (b, t) int64; targets: (b, t) bool, True where token j is trained (predicted from position
    j - 1, so column 0 is always False); rows: (b,) int64, where in the corpus each one stands.
    """

    ids: Tensor
    targets: Tensor
    rows: Tensor


def collate(corpus: Corpus, rows: np.ndarray, pad_id: int) -> Batch:
    """The given rows as one batch.

    Any `pad_id` will do, EOS too: padding stands on the right, where causal attention hides it
    from every real token, and it is never a target.
    """
    rows = np.asarray(rows, np.int64)
    start, lengths = corpus.offsets[rows][:, None], corpus.lengths[rows][:, None]
    columns = np.arange(int(lengths.max(initial=0)))
    real = columns < lengths  # (b, t)
    places = np.where(real, start + columns, 0)
    ids = np.where(real, store.take(corpus.ids, places), pad_id).astype(np.int64)
    targets = real & store.take(corpus.trained, places)
    targets[:, :1] = False
    return Batch(torch.from_numpy(ids), torch.from_numpy(targets), torch.from_numpy(rows))
