"""Which run comes next, what a spent budget leaves, and what becomes of runs that end badly; without real runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from apiary.core.errors import UserError
from simulation.sweep import definition, loop
from simulation.sweep.definition import Budget, Sweep
from simulation.sweep.loop import Loop
from simulation.sweep.workers import Job, Message

Play = Callable[[Job], Iterator[Message]]


def finish(folder: Path, loss: float = 1.0) -> None:
    """What a finished run leaves, as far as a sweep reads it."""
    folder.mkdir(exist_ok=True)
    table = [{"method": "federated", "loss": loss, "accuracy": None}]
    metrics = {"schema": 1, "table": table, "rounds": [], "deciding": {"loss": loss, "n": 9}}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "row_losses.json").write_text(
        json.dumps({"schema": 1, "rows": ["a"], "tokens": [1], "nats": {"federated": [loss]}})
    )


def done(job: Job) -> Iterator[Message]:
    finish(Path(job.folder))
    yield Message("done", job)


class Fake:
    """Takes the place of a worker: plays what it is told of each job."""

    begun: list[str]
    play: Play
    answers: list[bool]

    def __init__(self, threads: int = 1) -> None:
        self.job: Job | None = None

    def start(self, job: Job) -> None:
        self.job = job
        Fake.begun.append(job.name)
        self._messages = Fake.play(job)

    def receive(self) -> Message:
        message = next(self._messages)
        if message.kind != "round":
            self.job = None
        return message

    def answer(self, go_on: bool) -> None:
        Fake.answers.append(go_on)

    def stop(self) -> None:
        pass


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Loop]:
    def messages(workers: Sequence[Any]) -> Iterator[tuple[Any, Message]]:
        for worker in [one for one in workers if one.job is not None]:
            yield worker, worker.receive()

    monkeypatch.setattr(loop, "Worker", Fake)
    monkeypatch.setattr(loop, "messages", messages)
    Fake.begun, Fake.play, Fake.answers = [], done, []

    def make(sweep: Sweep, budget: Budget = Budget(), jobs: int = 1, play: Play = done) -> Loop:
        Fake.play = staticmethod(play)  # type: ignore[assignment]
        Fake.begun = []
        return Loop(sweep, tmp_path, [], jobs, 1, budget, lines.append)

    lines: list[str] = []
    make.lines = lines  # type: ignore[attr-defined]
    return make


def grid(seeds: int = 2) -> Sweep:
    return definition.make(None, ["train.lr=1e-3,3e-3,6e-3"], seeds=seeds)


def names(*pairs: tuple[int, int]) -> list[str]:
    return [f"s{number:04d}-seed{seed}" for number, seed in pairs]


ALL = [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)]


@pytest.mark.parametrize("jobs", [1, 2, 9])
def test_a_grid_runs_every_setting_with_one_seed_before_the_next(make: Callable[..., Loop], jobs: int) -> None:
    made = make(grid(), jobs=jobs)
    made.run()
    assert Fake.begun == names(*ALL) and made.spent == ""
    assert len(made._workers) == min(jobs, 6)
    again = make(grid())
    again.run()
    assert Fake.begun == []  # all of it is there


def test_more_seeds_run_what_is_missing(make: Callable[..., Loop]) -> None:
    make(grid()).run()
    make(grid(seeds=3)).run()
    assert Fake.begun == names((0, 2), (1, 2), (2, 2))


@pytest.mark.parametrize("jobs", [1, 2])
def test_no_more_runs_begin_than_the_budget_has(make: Callable[..., Loop], jobs: int, tmp_path: Path) -> None:
    made = make(grid(), Budget(runs=4), jobs=jobs)
    made.run()
    assert Fake.begun == names(*ALL[:4]) and made.spent == "--runs 4"
    (tmp_path / "runs" / names(ALL[1])[0] / "metrics.json").unlink()  # as of one that was killed on the way
    same = make(grid(), Budget(runs=4), jobs=jobs)
    same.run()
    assert Fake.begun == names(ALL[1])  # it has begun, so it goes on, and no new one begins
    more = make(grid(), Budget(runs=5))
    more.run()
    assert Fake.begun == names(ALL[4])


def test_no_run_begins_after_the_minutes_of_all_calls_together(
    make: Callable[..., Loop], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(loop.time, "monotonic", lambda: clock[0])

    def play(job: Job) -> Iterator[Message]:
        clock[0] += 50
        return done(job)

    made = make(grid(), Budget(minutes=2), play=play)
    made.run()
    assert Fake.begun == names(*ALL[:3]) and made.spent == "--minutes 2"  # at 0, 50 and 100 seconds
    make(grid(), Budget(minutes=2), play=play).run()
    assert Fake.begun == []
    make(grid(), Budget(minutes=3), play=play).run()
    assert Fake.begun == names(*ALL[3:4])  # at 150 seconds


def test_a_run_that_fails_takes_its_setting_out_and_no_other(make: Callable[..., Loop]) -> None:
    def play(job: Job) -> Iterator[Message]:
        if job.name == names((1, 0))[0]:
            Path(job.folder).mkdir()
            return iter([Message("failed", job, "the federated model gives no number")])
        return done(job)

    made = make(grid(), play=play)
    made.run()
    assert Fake.begun == names((0, 0), (1, 0), (2, 0), (0, 1), (2, 1))
    assert made.progress.ended == {names((1, 0))[0]: {"state": "failed", "why": "the federated model gives no number"}}
    assert any("seed 0: failed: the federated model" in line for line in make.lines)  # type: ignore[attr-defined]
    make(grid(), play=play).run()
    assert Fake.begun == []  # neither again


def test_a_process_that_dies_is_tried_once_more_with_fewer_at_a_time(make: Callable[..., Loop]) -> None:
    deaths = {names((1, 0))[0]: 1, names((2, 1))[0]: 9}

    def play(job: Job) -> Iterator[Message]:
        if deaths.get(job.name, 0):
            deaths[job.name] -= 1
            return iter([Message("died", job, -9)])
        return done(job)

    made = make(grid(), jobs=3, play=play)
    made.run()
    assert Fake.begun.count(names((1, 0))[0]) == 2 and Fake.begun.count(names((2, 1))[0]) == 2
    assert set(Fake.begun) == set(names(*ALL))
    ((name, ended),) = made.progress.ended.items()
    assert name == names((2, 1))[0] and ended["state"] == "failed" and "code -9" in ended["why"]
    assert made._jobs == 1
    assert any("tried again, 2 runs at a time" in line for line in make.lines)  # type: ignore[attr-defined]


def test_what_refuses_the_first_run_ends_the_sweep(make: Callable[..., Loop]) -> None:
    def play(job: Job) -> Iterator[Message]:
        return iter([Message("refused", job, ["data.source = 'x': no such file"])])

    with pytest.raises(UserError, match="no such file"):
        make(grid(), play=play).run()


def test_runs_with_fresh_seeds_come_on_top_of_the_budget(make: Callable[..., Loop]) -> None:
    made = make(grid(), Budget(runs=4))
    made.run()
    made.run_besides([(0, 5), (2, 5)])
    assert Fake.begun == names(*ALL[:4], (0, 5), (2, 5))
    again = make(grid(), Budget(runs=5))
    again.run()
    again.run_besides([(0, 5), (2, 5)])
    assert Fake.begun == names(ALL[4])


# -- searches ----------------------------------------------------------------------------------------------------------


def search(trials: int | None = 4, pruner: str = "none", budget: Budget = Budget()) -> Sweep:
    pytest.importorskip("optuna")
    texts = ["train.lr=1e-4..1e-2:log", "rounds=2"]
    return definition.make(None, texts, seeds=2, trials=trials, pruner=pruner, budget=budget)


def test_a_search_finishes_a_setting_before_it_draws_the_next(make: Callable[..., Loop]) -> None:
    made = make(search())
    made.run()
    assert Fake.begun == names(*[(number, seed) for number in range(4) for seed in (0, 1)])
    assert made.search is not None and made.search.open == [] and len(made.settings) == 4
    assert made.settings[0] == {"train.lr": 6e-3}  # what the configuration has by itself
    make(search()).run()
    assert Fake.begun == []
    make(search(trials=5)).run()
    assert Fake.begun == names((4, 0), (4, 1))


def test_a_search_that_was_killed_goes_on_with_the_setting_it_was_at(make: Callable[..., Loop], tmp_path: Path) -> None:
    def play(job: Job) -> Iterator[Message]:
        if job.name == names((1, 1))[0]:
            raise KeyboardInterrupt
        return done(job)

    with pytest.raises(KeyboardInterrupt):
        make(search(), play=play).run()
    killed = make(search())
    assert killed.search is not None and killed.search.open == [1]
    drawn = killed.settings
    killed.run()
    assert Fake.begun == names((1, 1), (2, 0), (2, 1), (3, 0), (3, 1))
    assert killed.settings[:2] == drawn


def test_a_search_ends_with_its_budget(make: Callable[..., Loop]) -> None:
    budget = Budget(runs=3)
    made = make(search(None, budget=budget), budget)
    made.run()
    made.run_besides([(0, 7)])
    assert Fake.begun == names((0, 0), (0, 1), (1, 0), (0, 7)) and made.spent == "--runs 3"


def test_a_setting_far_behind_is_given_up_on_the_way(make: Callable[..., Loop]) -> None:
    """Six alike, then one with a loss of 9 in its first round: the median pruner ends it there."""

    def play(job: Job) -> Iterator[Message]:
        assert job.reports
        loss = 9.0 if job.name.startswith("s0006") else 1.0
        Path(job.folder).mkdir()
        yield Message("round", job, (1, loss))
        if not Fake.answers[-1]:
            yield Message("pruned", job)
        finish(Path(job.folder), loss)
        yield Message("done", job)

    made = make(search(8, "median"), play=play)
    made.run()
    assert Fake.answers.count(False) == 1
    assert made.progress.ended == {
        names((6, 0))[0]: {"state": "pruned", "why": "given up on the way, far behind the others"}
    }
    assert names((6, 1))[0] not in Fake.begun and names((7, 1))[0] in Fake.begun
    assert made.search is not None and made.search.open == []
