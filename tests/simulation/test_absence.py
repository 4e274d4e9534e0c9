"""Clients that are away or fail in a simulation: who, how many, and what the run makes of the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import overrides_for

from apiary.config import loading
from apiary.config.schema import RunConfig
from apiary.core.errors import UserError
from apiary.tracking.event_log import read_events
from simulation import absence
from simulation.run import simulate

NAMES = [f"client-{number:02d}" for number in range(40)]


def config_of(*overrides: str) -> RunConfig:
    return loading.load(None, overrides)


def test_others_are_away_in_every_round_and_the_seed_says_who() -> None:
    config = config_of("simulate.away=0.5", "seed=3")
    rounds = [absence.away(config, NAMES, number) for number in range(12)]
    assert {len(away) for away in rounds} == {20} and len(set(rounds)) == 12
    assert set.union(*map(set, rounds)) == set(NAMES)
    assert set.union(*(set(NAMES) - away for away in rounds)) == set(NAMES)
    assert rounds == [absence.away(config, NAMES, number) for number in range(12)]
    assert rounds != [absence.away(config_of("simulate.away=0.5", "seed=4"), NAMES, number) for number in range(12)]


def test_who_fails_is_drawn_apart_from_who_is_away() -> None:
    config = config_of("simulate.away=0.5", "simulate.failing=0.25")
    failing = {index for index in range(40) if absence.fails(config, 40, index, 1)}
    away = {NAMES.index(name) for name in absence.away(config, NAMES, 1)}
    assert len(failing) == 10 and failing & away and failing - away
    assert not any(absence.fails(config_of(), 40, index, 1) for index in range(40))


@pytest.mark.parametrize(("share", "clients"), [(0.99, 10), (0.5, 1)])
def test_somebody_must_stay(share: float, clients: int) -> None:
    for key in ("away", "failing"):
        with pytest.raises(UserError, match=f"simulate.{key} = {share:g}: that is all of {clients} clients"):
            absence.check(config_of(f"simulate.{key}={share}"), clients)
    absence.check(config_of("simulate.away=0.5"), 2)


class Killed(BaseException):
    """Ends the run where it is raised, as a kill would."""


def run(folder: Path, overrides: list[str], kill: int = 0) -> list[dict[str, Any]]:
    def observe(event: dict[str, Any]) -> None:
        if event["event"] == "client" and event["round"] == kill:
            raise Killed

    simulate(loading.load(None, overrides), folder, resume=folder.exists(), observers=[observe])
    return read_events(folder)


@pytest.mark.slow
def test_a_run_goes_on_with_whoever_is_there(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    more = ["data.clients=6", "rounds=3", "simulate.away=0.5", "simulate.failing=0.34", "strategy.quorum=0.1"]
    plain = ["evaluate.baselines=['base']", "evaluate.generate=false", "train.steps=1"]
    overrides = [*overrides_for(tiny_model, rows_file), *more, *plain]
    config = loading.load(None, overrides)
    events = run(tmp_path / "whole", overrides)
    names = [event["client"] for event in events if event["event"] == "handshake"]
    for number in (1, 2, 3):
        there = set(names) - absence.away(config, names, number)
        failed = {name for index, name in enumerate(names) if absence.fails(config, 6, index, number)}
        by = {e["event"]: e for e in events if e.get("round") == number}
        assert set(by["asked"]["clients"]) == there and len(there) == 3
        assert {e["client"] for e in events if e["event"] == "client" and e["round"] == number} == there - failed
        refused = {e["client"]: e["reason"] for e in events if e["event"] == "refused" and e["round"] == number}
        assert refused == dict.fromkeys(there & failed, "it failed, as simulate.failing has it")
        assert set(by["evaluate"]["clients"]) <= there
    with pytest.raises(Killed):
        run(tmp_path / "broken", overrides, kill=2)
    run(tmp_path / "broken", overrides)
    adapters = [
        (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("whole", "broken")
    ]
    assert adapters[0] == adapters[1]
