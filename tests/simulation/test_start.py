"""What a simulated run refuses, or warns of, before anything is trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from apiary.config import loading
from apiary.core.errors import UserError
from apiary.tracking.event_log import read_events
from simulation.run import plan, simulate

PRIVATE = ["privacy.unit=record", "privacy.batch_rows=8"]
SHORT = ["evaluate.baselines=[]", "evaluate.generate=false", "evaluate.every=0", "train.steps=1"]
STAGES = ['continual.stages=[["first"], ["last"]]', "rounds=2"]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ([*PRIVATE, "privacy.noise_multiplier=0.05"], "epsilon after round 1 would be"),
        ([*PRIVATE, "privacy.batch_rows=500"], "privacy.batch_rows = 500: at most"),
        ([*PRIVATE, "privacy.epsilon=1e-6"], "no noise keeps to it"),
        (["data.partition=natural"], "strategy.min_clients = 2: there is 1 client, for"),
    ],
)
def test_what_cannot_work_is_refused(more: list[str], told: str, small_run: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=told):
        simulate(loading.load(None, [*small_run, *more]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_noise_that_lasts_is_not_refused(small_run: list[str]) -> None:
    plan(loading.load(None, [*small_run, *PRIVATE, "privacy.noise_multiplier=2.0"]))
    plan(loading.load(None, [*small_run, *PRIVATE]))


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ([*PRIVATE, "rounds=1", "privacy.noise_multiplier=50.0"], "noise drowns what the rows say"),
        ([*STAGES, "continual.buffer=5000"], "continual.buffer = 5000: every client would keep all rows"),
    ],
)
def test_what_leads_nowhere_is_warned_of_once(more: list[str], told: str, small_run: list[str], tmp_path: Path) -> None:
    simulate(loading.load(None, [*small_run, *SHORT, *more]), tmp_path)
    events = read_events(tmp_path)
    warned = [event["message"] for event in events if event["event"] == "warning"]
    assert len([line for line in warned if told in line]) == 1


@pytest.mark.slow
def test_a_budget_that_ends_early_is_foretold_and_comes_true(small_run: list[str], tmp_path: Path) -> None:
    noise = ["privacy.noise_multiplier=1.0", "privacy.epsilon=2.9", "rounds=3"]
    simulate(loading.load(None, [*small_run, *SHORT, *PRIVATE, *noise]), tmp_path)
    events = read_events(tmp_path)
    (line,) = [e["message"] for e in events if e["event"] == "warning" and "noise_multiplier" in e["message"]]
    assert "privacy.epsilon = 2.9 lasts for 1 of 3 rounds at a client of" in line
    assert {e["round"] for e in events if e["event"] == "client"} == {1}
    assert {e["round"] for e in events if e["event"] == "declined"} == {2}
