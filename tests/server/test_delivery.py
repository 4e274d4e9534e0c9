"""Which round is delivered, that its checkpoint is there for it, and what is kept beside it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from apiary.config import loading
from apiary.config.schema import RunConfig
from apiary.core.errors import RunFailed
from apiary.core.messages import Score
from apiary.tracking.delivery import BEST, Delivery
from server import app, checkpoint, delivery
from server.rounds import Progress
from strategies import ServerState


def state(number: int) -> ServerState:
    return ServerState(number, {"w": torch.full((3,), float(number))}, {}, {})


def measured(losses: list[float]) -> list[Progress]:
    """The progress after the evaluation before training and after each round, two clients having these losses."""
    made = [Progress()]
    for number, loss in enumerate(losses):
        made.append(made[-1].with_scores(number, {name: Score(10 * loss, 10, 5) for name in ("a", "b")}))
    return made[1:]


def saved(folder: Path, config: RunConfig, losses: list[float]) -> Progress:
    """Rounds that end with these losses, the first one before training, each with its checkpoint."""
    found = measured(losses)
    for number, progress in enumerate(found[1:], 1):
        app.save(folder, config, state(number), progress)
    return found[-1]


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ([9.0], None),  # the untuned model is no round
        ([9.0, 5.0, 3.0, 4.0, 6.0], 2),
        ([9.0, 5.0, 3.0, 3.0], 2),  # as good is not better
        ([2.0, 5.0, 3.0, 4.0], 2),  # of rounds that are all worse than no training, the nearest
        ([4.0, 5.0, 3.0, 3.5, 2.0], 4),
        ([1.0, float("nan"), 4.0, 5.0], 2),
    ],
)
def test_the_best_round_is_the_one_with_the_lowest_loss_after_training(losses: list[float], best: int | None) -> None:
    assert measured(losses)[-1].best_round == best


def test_patience_still_counts_from_the_untuned_model() -> None:
    found = measured([2.0, 5.0, 3.0, 1.0, 1.5])
    assert [progress.evaluations_without_gain for progress in found] == [0, 1, 2, 0, 1]


def test_an_evaluation_in_which_nobody_told_a_loss_changes_nothing() -> None:
    found = measured([9.0, 5.0])[-1]
    assert found.with_scores(2, {}) == found


STOPS = loading.load(None, ["evaluate.patience=2"])


def test_the_checkpoint_of_the_best_round_outlives_newer_ones(tmp_path: Path) -> None:
    progress = saved(tmp_path, STOPS, [9.0, 5.0, 3.0, 4.0, 6.0, 7.0, 8.0])
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["round-0002", "round-0005", "round-0006"]
    loaded = checkpoint.load(tmp_path / "checkpoints", STOPS)
    assert loaded is not None and loaded[0].round == 6
    assert Progress(**loaded[1]).best_round == progress.best_round == 2  # a resumed run knows it too
    app.save(tmp_path, STOPS, state(7), progress.with_scores(7, {name: Score(10.0, 10, 5) for name in ("a", "b")}))
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["round-0006", "round-0007"]  # a better one has come


def test_a_run_that_may_stop_delivers_the_best_round(tmp_path: Path) -> None:
    progress = saved(tmp_path, STOPS, [9.0, 5.0, 3.0, 4.0, 6.0])
    chosen = delivery.choose(STOPS, state(4), progress, tmp_path)
    assert chosen.told == Delivery(2, 4, 2, "clients_half") and chosen.best is None
    assert torch.equal(chosen.delivered.adapter["w"], state(2).adapter["w"])
    assert delivery.remarks(STOPS, progress) == []
    shutil.rmtree(tmp_path / "checkpoints" / "round-0002")
    with pytest.raises(RunFailed, match="checkpoint of round 2, which is the best, is gone or damaged"):
        delivery.choose(STOPS, state(4), progress, tmp_path)


def test_a_run_that_may_not_stop_delivers_the_last_round_and_keeps_the_best(tmp_path: Path) -> None:
    config = RunConfig()
    progress = saved(tmp_path, config, [9.0, 5.0, 3.0, 4.0, 6.0])
    chosen = delivery.choose(config, state(4), progress, tmp_path)
    assert chosen.told == Delivery(4, 4, 2, "clients", BEST) and chosen.delivered.round == 4
    assert chosen.best is not None and torch.equal(chosen.best.adapter["w"], state(2).adapter["w"])
    (tmp_path / "checkpoints" / "round-0002" / "adapter.safetensors").write_bytes(b"")
    assert delivery.choose(config, state(4), progress, tmp_path).told == Delivery(4, 4)


@pytest.mark.parametrize("patience", [0, 2])
def test_the_last_round_may_be_the_best(tmp_path: Path, patience: int) -> None:
    config = loading.load(None, [f"evaluate.patience={patience}", "evaluate.clients=false"])
    progress = saved(tmp_path, config, [9.0, 5.0, 3.0])
    chosen = delivery.choose(config, state(2), progress, tmp_path)
    assert chosen.told == Delivery(2, 2, 2, "server_half" if patience else "server") and chosen.best is None


def test_factors_that_have_gone_on_at_the_clients_cannot_be_brought_back(tmp_path: Path) -> None:
    config = loading.load(None, ["adapter.share=a"])
    progress = saved(tmp_path, config, [9.0, 3.0, 4.0])
    assert delivery.choose(config, state(2), progress, tmp_path).told == Delivery(2, 2)


def test_a_best_round_that_is_worse_than_no_training_is_said_to_be(tmp_path: Path) -> None:
    (line,) = delivery.remarks(STOPS, measured([2.0, 5.0, 3.0, 4.0])[-1])
    assert "no round is better than the untuned model" in line and "round 2 comes nearest" in line
