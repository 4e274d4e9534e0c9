"""A run's log that is read as it grows."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from apiary.config import loading
from apiary.tracking import event_log
from apiary.tracking.event_log import LOG_FILE, RunLog, read_events, truncate_after
from deploy import going
from deploy.going import Going
from deploy.run_log import RunReader
from deploy.tending import Tending


def _write(out: Path, *events: dict[str, Any]) -> None:
    log = RunLog(out)
    for event in events:
        log.event(**event)
    log.close()


def _start(run: str) -> dict[str, Any]:
    return {"kind": "start", "run": run}


def _round(number: int) -> dict[str, Any]:
    return {"kind": "round", "round": number}


def _kinds(events: list[event_log.Event]) -> list[Any]:
    return [event.get("round", event["event"]) for event in events]


def test_each_event_is_told_once_and_only_of_the_runs_own_part(tmp_path: Path) -> None:
    log = RunReader(tmp_path, "2")
    assert log.look() == [] and not log.started  # no log yet
    _write(tmp_path, _start("1"), _round(1), {"kind": "failed", "message": "of the first"})
    assert log.look() == [] and (log.started, log.end) == (False, None)
    _write(tmp_path, _start("2"), _round(2))
    assert _kinds(log.look()) == ["start", 2] and log.look() == []
    assert (log.started, log.end, log.verdict) == (True, None, None)
    _write(tmp_path, {"kind": "failed", "message": "the disk was full", "again": True})
    assert _kinds(log.look()) == ["failed"] and (log.end, log.verdict) == ("the disk was full", None)
    _write(tmp_path, _start("3"), _round(3), {"kind": "finish"})
    assert log.look() == [] and (log.end, log.verdict) == ("the disk was full", None)


@pytest.mark.parametrize(("last", "verdict"), [({"kind": "finish"}, ""), ({"kind": "failed", "message": "why"}, "why")])
def test_a_run_that_has_ended_for_good_says_how(last: dict[str, Any], verdict: str, tmp_path: Path) -> None:
    _write(tmp_path, _start("1"), last)
    log = RunReader(tmp_path, "1")
    log.look()
    assert (log.end, log.verdict) == (verdict, verdict)


def test_a_line_is_read_once_it_is_whole(tmp_path: Path) -> None:
    log = RunReader(tmp_path, "1")
    _write(tmp_path, _start("1"), _round(1), _round(2))
    whole, seen = (tmp_path / LOG_FILE).read_bytes(), list[Any]()
    for end in range(len(whole) + 1):
        (tmp_path / LOG_FILE).write_bytes(whole[:end])
        seen += _kinds(log.look())
    assert seen == ["start", 1, 2]


def test_what_is_no_event_is_passed_over(tmp_path: Path) -> None:
    """A power cut leaves blocks of zeros where lines were not flushed."""
    _write(tmp_path, _start("1"))
    with (tmp_path / LOG_FILE).open("ab") as file:
        file.write(b"\0" * 50 + b"\n")
    _write(tmp_path, _round(1))
    assert _kinds(RunReader(tmp_path, "1").look()) == ["start", 1]


def test_a_log_that_a_resumed_run_cuts_is_read_anew(tmp_path: Path) -> None:
    first, second = RunReader(tmp_path, "1"), RunReader(tmp_path, "2")
    _write(tmp_path, _start("1"), {"kind": "warning", "message": "x" * 500}, _round(1), _round(2))
    assert _kinds(first.look()) == ["start", "warning", 1, 2] and second.look() == []
    truncate_after(tmp_path, 1)
    _write(tmp_path, _start("2"))
    assert first.look() == [] and first.started
    assert _kinds(second.look()) == ["start"]
    _write(tmp_path, _round(2))
    assert first.look() == [] and _kinds(second.look()) == [2]


@pytest.mark.parametrize("seed", range(20))
def test_reading_on_is_as_reading_all(seed: int, tmp_path: Path) -> None:
    """By the events of the whole file, whatever was read when; the file grows, and is cut by whoever goes on."""
    rng = random.Random(seed)
    runs, told = 1, list[Any]()
    _write(tmp_path, _start("1"))
    log = RunReader(tmp_path, "1")
    for step in range(40):
        match rng.randrange(5):
            case 0:
                done = max((e["round"] for e in read_events(tmp_path) if e["event"] == "round"), default=0)
                truncate_after(tmp_path, rng.randint(0, done))
                told += log.look() if rng.random() < 0.5 else []
                runs += 1
                _write(tmp_path, _start(str(runs)))
                log, told = RunReader(tmp_path, str(runs)), []
            case 1:
                _write(tmp_path, {"kind": "warning", "message": "w" * rng.randrange(300), "step": step})
            case _:
                done = max((e["round"] for e in read_events(tmp_path) if e["event"] == "round"), default=0)
                _write(tmp_path, _round(done + 1))
        if rng.random() < 0.5:
            told += log.look()
    told += log.look()
    everything = read_events(tmp_path)
    start = max(i for i, e in enumerate(everything) if e["event"] == "start")
    assert told == everything[start:]


def test_the_server_reads_each_line_once_and_forgets_a_run_that_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed, parse = list[bytes](), event_log.parse

    def counted(line: bytes) -> event_log.Event | None:
        parsed.append(line)
        return parse(line)

    monkeypatch.setattr(event_log, "parse", counted)
    out, state = tmp_path / "run", tmp_path / "state"
    state.mkdir()
    going.write(state, Going("n", "1", loading.load().to_json(), str(out), "run-n", 1))
    _write(out, _start("1"), *map(_round, range(1, 1001)))
    parsed.clear()
    watch = Tending(state, print)
    monkeypatch.setattr(going, "is_free", lambda folder: False)  # it works
    for _ in range(3):
        watch.look()
    assert len(parsed) == 1001
    (known,) = watch._watched.values()
    assert (
        len(json.dumps({**vars(known.log), "_path": "", "_last": ""}, default=str)) < 200
    )  # whatever the log's length
    _write(out, {"kind": "finish"})
    parsed.clear()
    watch.look()
    assert len(parsed) == 1
    watch.look()
    assert watch._watched == {} and len(parsed) == 1
