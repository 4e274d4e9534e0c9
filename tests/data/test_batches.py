"""Batch plans and padding against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apiary.data.batches import Corpus, Dropped, Encoded, collate, gather, plan_batches


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def corpus_of(lengths: list[int]) -> Corpus:
    """Rows whose ids are 1, 2, 3, ... across the corpus; every third token is trained."""
    ids = np.arange(1, sum(lengths) + 1, dtype=np.int32)
    rows, at = [], 0
    for n in lengths:
        row = ids[at : at + n]
        rows.append(Encoded(row, row % 3 == 0, cut=False))
        at += n
    return gather(rows)


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 300), max_size=200),
    budget=st.integers(16, 700),
    seed=st.integers(0, 5),
)
def test_every_row_once_and_within_budget(lengths: list[int], budget: int, seed: int) -> None:
    plan = plan_batches(np.array(lengths, np.int64), budget, rng(seed))
    assert sorted(i for rows in plan for i in rows.tolist()) == list(range(len(lengths)))
    for rows in plan:
        assert len(rows)
        longest = max(lengths[i] for i in rows)
        assert len(rows) * longest <= budget or len(rows) == 1


def test_plan_follows_the_generator() -> None:
    lengths = np.random.default_rng(0).integers(5, 200, 400)
    first, again, other = (plan_batches(lengths, 1000, rng(seed)) for seed in (1, 1, 2))
    assert [r.tolist() for r in first] == [r.tolist() for r in again]
    assert [r.tolist() for r in first] != [r.tolist() for r in other]
    longest = [int(lengths[r].max()) for r in first]
    assert longest != sorted(longest)  # nor in the order of length
    assert longest != sorted(longest, reverse=True)


def test_little_padding_on_lengths_spread_like_instructions() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(4.8, 0.9, 4000), 12, 512).astype(int)
    for budget in (2048, 8192):
        plan = plan_batches(lengths, budget, rng())
        padded = sum(len(rows) * lengths[rows].max() for rows in plan)
        assert 1 - lengths.sum() / padded < 0.05


def test_no_small_leftover_batch() -> None:
    """21 rows of 10 tokens at 100 a batch: three batches of 7, not 10 + 10 + 1."""
    plan = plan_batches(np.full(21, 10), 100, rng())
    assert sorted(len(rows) for rows in plan) == [7, 7, 7]


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=9),
    pad=st.sampled_from([0, 3, 10**5]),
    data=st.data(),
)
def test_collate_is_the_padded_rows(lengths: list[int], pad: int, data: st.DataObject) -> None:
    corpus = corpus_of(lengths)
    rows = np.array(data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=6)))
    batch = collate(corpus, rows, pad)
    width = max(lengths[i] for i in rows)
    assert batch.ids.dtype is torch.int64
    assert batch.targets.dtype is torch.bool
    assert batch.rows.tolist() == rows.tolist()
    assert batch.ids.shape == batch.targets.shape == (len(rows), width)
    for row, ids, targets in zip(rows, batch.ids.tolist(), batch.targets.tolist(), strict=True):
        start = 1 + sum(lengths[:row])
        own = list(range(start, start + lengths[row]))
        assert ids == own + [pad] * (width - len(own))
        expected = [i % 3 == 0 and place > 0 for place, i in enumerate(own)]
        assert targets == expected + [False] * (width - len(own))


def test_gather_counts_and_an_empty_corpus_is_one() -> None:
    row = Encoded(np.array([4, 5], np.int32), np.array([False, True]), cut=True)
    corpus = gather([Dropped("too long", 9, 3), row._replace(within=True, whole=5, lost=2), Dropped("odd")])
    assert corpus.stats == (1, 2, 1, 1, 2, 1, 2, 3)  # kept, tokens, trained, cut, dropped, within, trained cut, dropped
    assert (corpus.cut, corpus.dropped) == ((1,), {0: "too long", 2: "odd"})
    assert (corpus.within, corpus.whole.tolist()) == ((1,), [9, 5])
    empty = gather([Dropped("odd")])
    assert len(empty) == 0
    assert empty.lengths.tolist() == []
    assert plan_batches(empty.lengths, 100, rng()) == []


@pytest.mark.parametrize("length", [1, 100, 101, 5000])
def test_a_single_row_is_a_batch_whatever_its_length(length: int) -> None:
    assert [r.tolist() for r in plan_batches(np.array([length]), 100, rng())] == [[0]]
