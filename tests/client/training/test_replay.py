"""Replay in the training loop: what a step is made of, its gradient, and where the next visit goes on."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models
import torch

from apiary.config.schema import AdapterConfig, ModelConfig, TrainConfig
from apiary.core.tensors import StateDict, add, generator
from apiary.data.batches import Batch, Corpus, collate, plan_batches
from apiary.models import adapters
from apiary.models.loss import row_losses
from client.training import trainer
from client.training.trainer import Cursor, FitResult, Replay, StepRecord, VisitPlan

NEW = small_models.make_corpus(40)
OLD = small_models.make_corpus(25, seed=1)
EMPTY = Corpus(np.zeros(0, np.int32), np.zeros(0, bool), np.zeros(1, np.int64), NEW.stats)


@pytest.fixture
def lm(tiny_model: Path) -> adapters.LanguageModel:
    config = AdapterConfig.model_validate({"rank": 4, "alpha": 6})
    return adapters.load(ModelConfig(name=str(tiny_model), dtype="float32", device="cpu"), config)


def settings_of(**keys: object) -> TrainConfig:
    base = {"batch_tokens": 96, "lr": 1e-2, "warmup": 0.0, "steps": 1, "schedule": "constant"}
    return TrainConfig.model_validate({**base, **keys})


def replay_of(share: float = 0.5, cursor: Cursor = Cursor(), corpus: Corpus = OLD) -> Replay:
    return Replay(corpus, cursor, share)


def fit(
    lm: adapters.LanguageModel,
    steps: int,
    config: TrainConfig | None = None,
    *,
    start: StateDict | None = None,
    corpus: Corpus = NEW,
    **keys: Any,
) -> FitResult:
    plan = VisitPlan(**{"seed": 5, "client": "a", "steps": steps, "total_steps": steps, **keys})
    begin = adapters.fresh_adapter(lm, 0) if start is None else start
    return trainer.fit(lm, begin, corpus, config or settings_of(), plan)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def untimed(result: FitResult) -> tuple[object, ...]:
    return result.cursor, result.report._replace(seconds=0.0), result.replay


def plans(corpus: Corpus, budget: int, purpose: str, epochs: int) -> list[np.ndarray]:
    """What the walk is meant to visit, from the planner alone."""
    made = [plan_batches(corpus.lengths, budget, generator(5, "a", purpose, epoch)) for epoch in range(epochs)]
    return [rows for plan in made for rows in plan]


def test_nothing_to_replay_is_the_same_training_bit_for_bit(lm: adapters.LanguageModel) -> None:
    plain = fit(lm, 4)
    empty = fit(lm, 4, replay=replay_of(corpus=EMPTY))
    assert same(plain.delta, empty.delta)
    assert untimed(plain) == untimed(empty)
    assert plain.report.replayed == 0
    assert not same(plain.delta, fit(lm, 4, replay=replay_of()).delta)


@pytest.mark.parametrize("share", [0.25, 0.5])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_gradient_is_that_of_the_mean_over_all_tokens_of_the_step(
    lm: adapters.LanguageModel, share: float, accumulate: int
) -> None:
    """New and replayed batches of different sizes, against one plain sum over their union."""
    config = settings_of(batch_tokens=64, clip_norm=0.0, accumulate=accumulate)
    start = small_models.random_state(adapters.get_adapter(lm))
    seen = {name: torch.zeros_like(p) for name, p in lm.adapter.items()}

    def note(name: str, gradient: torch.Tensor) -> None:
        seen[name] += gradient

    hooks = [p.register_hook(functools.partial(note, n)) for n, p in lm.adapter.items()]
    result = fit(lm, 1, config, start=start, replay=replay_of(share))
    for hook in hooks:
        hook.remove()

    old_budget = round(64 * share)
    parts = [(NEW, 64 - old_budget, "epoch"), (OLD, old_budget, "replay")]
    batches = [collate(c, rows, 0) for c, b, purpose in parts for rows in plans(c, b, purpose, 1)[:accumulate]]
    adapters.set_adapter(lm, start)
    total = sum(row_losses(lm.model, batch).sum() for batch in batches)
    tokens = sum(int(batch.targets.sum()) for batch in batches)
    (total / tokens).backward()
    for name, parameter in lm.adapter.items():
        torch.testing.assert_close(seen[name], parameter.grad, rtol=1e-4, atol=1e-7)
    new, old = batches[:accumulate], batches[accumulate:]
    assert result.report.tokens == sum(int(batch.targets.sum()) for batch in new)
    assert result.report.replayed == sum(int(batch.targets.sum()) for batch in old)
    assert result.report.examples == sum(len(batch.rows) for batch in new)
    by_hand = sum(float(row_losses(lm.model, b).sum().detach()) for b in new) / result.report.tokens
    assert result.report.loss == pytest.approx(by_hand, rel=1e-5)


PADDED: list[int] = []


def measuring(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    PADDED.append(batch.ids.numel())
    return row_losses(model, batch)


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_over_epochs_replay_has_its_share_of_the_padded_tokens(
    lm: adapters.LanguageModel, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer.OBJECTIVES, "build", lambda name: measuring)
    config = settings_of(batch_tokens=240)
    epoch = len(plans(NEW, 240 - round(240 * share), "epoch", 1))
    PADDED.clear()
    result = fit(lm, 4 * epoch, config, replay=replay_of(share))
    assert result.cursor == Cursor(4, 0)
    assert len(PADDED) == 8 * epoch
    assert sum(PADDED[1::2]) / sum(PADDED) == pytest.approx(share, abs=0.06)


def test_every_replayed_row_has_its_turn_whatever_the_visits(lm: adapters.LanguageModel) -> None:
    """One visit of n steps sees the same batches in the same order as several that add up to n."""

    def visits(*steps: int) -> tuple[list[list[int]], Cursor, Cursor]:
        small_models.SEEN.clear()
        new, old = Cursor(), Cursor()
        for count in steps:
            config = settings_of(objective="small_models:recording")
            result = fit(lm, count, config, cursor=new, replay=replay_of(cursor=old))
            new, old = result.cursor, result.replay
        return list(small_models.SEEN), new, old

    once = visits(24)
    assert visits(5, 1, 18) == once
    seen, new, old = once
    news, olds = plans(NEW, 48, "epoch", 3), plans(OLD, 48, "replay", 3)
    assert seen[0::2] == [rows.tolist() for rows in news[:24]]
    assert seen[1::2] == [rows.tolist() for rows in olds[:24]]
    length = len(plans(OLD, 48, "replay", 1))
    assert sorted(row for rows in seen[1 : 2 * length : 2] for row in rows) == list(range(len(OLD)))
    assert old.epoch > 0
    assert new != old


def test_two_visits_are_one_of_double_steps_where_the_optimizer_has_no_memory(lm: adapters.LanguageModel) -> None:
    """Plain descent at a constant rate keeps nothing between steps but the adapter and the cursors."""
    config = settings_of(optimizer="sgd", lr=0.1, clip_norm=0.0)
    start = small_models.random_state(adapters.get_adapter(lm))
    whole = fit(lm, 6, config, start=start, replay=replay_of())
    first = fit(lm, 3, config, start=start, replay=replay_of(), total_steps=6)
    middle = add(start, first.delta)
    second = fit(lm, 3, config, start=middle, cursor=first.cursor, replay=replay_of(cursor=first.replay), first_step=3)
    assert (second.cursor, second.replay) == (whole.cursor, whole.replay)
    for name in start:
        torch.testing.assert_close(add(middle, second.delta)[name], add(start, whole.delta)[name], rtol=0, atol=1e-6)


def test_plain_descent_by_hand(lm: adapters.LanguageModel) -> None:
    config = settings_of(optimizer="sgd", lr=0.1, clip_norm=0.0, weight_decay=0.5)
    start = small_models.random_state(adapters.get_adapter(lm))
    result = fit(lm, 1, config, start=start)
    batch = collate(NEW, plans(NEW, 96, "epoch", 1)[0], 0)
    adapters.set_adapter(lm, start)
    (row_losses(lm.model, batch).sum() / batch.targets.sum()).backward()
    for name, parameter in lm.adapter.items():
        torch.testing.assert_close(result.delta[name], -0.1 * parameter.grad, rtol=1e-3, atol=1e-7)


def test_epochs_count_new_batches(lm: adapters.LanguageModel) -> None:
    config = settings_of(steps=None, epochs=1.5, batch_tokens=96)
    batches = len(plan_batches(NEW.lengths, 48, generator(0, "", "epoch", 0)))
    assert trainer.steps_per_round(config, NEW, replay_of()) == math.ceil(1.5 * batches)
    assert trainer.steps_per_round(config, NEW, replay_of(corpus=EMPTY)) == trainer.steps_per_round(config, NEW)


def test_extreme_shares_leave_room_for_both(lm: adapters.LanguageModel) -> None:
    for share in (1e-6, 1 - 1e-6):
        report = fit(lm, 2, replay=replay_of(share)).report
        assert report.tokens > 0
        assert report.replayed > 0


def test_observers_are_told_both_kinds_apart(lm: adapters.LanguageModel) -> None:
    seen: list[StepRecord] = []
    report = fit(lm, 3, replay=replay_of(), observers=(seen.append,)).report
    assert sum(record.tokens for record in seen) == report.tokens
    assert sum(record.replayed for record in seen) == report.replayed > 0


@pytest.mark.slow
def test_replay_keeps_what_training_on_new_rows_alone_forgets(lm: adapters.LanguageModel) -> None:
    """Learn the old rows, then the new ones with and without the old: the one thing replay is for."""

    def loss(state: dict[str, torch.Tensor], corpus: Corpus) -> float:
        adapters.set_adapter(lm, state)
        with torch.no_grad():
            batch = collate(corpus, np.arange(len(corpus)), 0)
            return float(row_losses(lm.model, batch).sum() / batch.targets.sum())

    config = settings_of(batch_tokens=512)
    start = adapters.fresh_adapter(lm, 0)
    learnt = add(start, fit(lm, 60, config, corpus=OLD).delta)
    alone = add(learnt, fit(lm, 60, config, start=learnt).delta)
    mixed = add(learnt, fit(lm, 60, config, start=learnt, replay=replay_of()).delta)
    before = loss(learnt, OLD)
    assert loss(alone, OLD) - before > 2 * abs(loss(mixed, OLD) - before)
    assert loss(mixed, NEW) < loss(learnt, NEW) - 0.2
