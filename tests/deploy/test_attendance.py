"""What `apiary deploy status` says of each site: the last round that it answered, and if not the newest, why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from apiary.tracking import reply_log
from apiary.tracking.console import State, line
from apiary.tracking.event_log import RunLog, read_events
from apiary.tracking.reply_log import ReplyLog
from deploy import attendance, flower_cli, runs, server
from server import deployment_run
from server.site_grid import Waits


def events(*given: tuple[str, float, dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"event": kind, "time": time, **fields} for kind, time, fields in given]


BEGUN = events(
    ("start", 0.0, {"run": "7"}),
    ("handshake", 1.0, {"client": "ant"}),
    ("handshake", 1.0, {"client": "bee"}),
    ("refused", 2.0, {"client": "cricket", "reason": "its answer is not signed"}),
    ("asked", 10.0, {"round": 1, "clients": ["ant", "bee"]}),
    ("client", 12.0, {"round": 1, "client": "ant"}),
)


def said(given: list[dict[str, Any]], now: float) -> dict[str, str]:
    return {name: found.sentence() for name, found in attendance.of_events(given, now).items()}


def test_who_has_answered_who_is_waited_for_and_who_was_refused() -> None:
    assert said(BEGUN, 50.0) == {
        "ant": "last answered round 1",
        "bee": "has answered no round yet; no answer to round 1 for 40 s",
        "cricket": "has answered no round yet; refused at the handshake: its answer is not signed",
    }


def test_an_answer_that_has_come_and_waits_for_the_others_is_one(tmp_path: Path) -> None:
    """It counts, and is in the log, when the medians of the round are there."""
    asked = [*BEGUN, *events(("round", 13.0, {"round": 1}), ("asked", 20.0, {"round": 2, "clients": ["ant", "bee"]}))]
    kept = ReplyLog(tmp_path)
    for number in range(2000):
        kept.add(site="bee", round="1", kind="train", verdict="signed", signature="x" * 200 + str(number))
    for site, number, kind, verdict in (
        ("bee", "2", "evaluate", "signed"),
        ("bee", "2", "train", "stale"),
        ("ant", "2", "train", "signed"),
    ):
        kept.add(site=site, round=number, kind=kind, verdict=verdict)
    found = attendance.of_events(asked, 60.0, reply_log.newest(tmp_path))
    assert found["ant"].sentence() == "last answered round 2"
    assert found["bee"].sentence() == "has answered no round yet; no answer to round 2 for 40 s"
    assert 1000 < len(reply_log.newest(tmp_path)) < 2003 and reply_log.newest(tmp_path / "none") == []


def test_who_did_not_answer_in_time_stays_so_until_it_answers() -> None:
    late = [
        *BEGUN,
        *events(
            ("refused", 40.0, {"round": 1, "client": "bee", "reason": "no answer within 30 s"}),
            ("round", 40.0, {"round": 1}),
        ),
    ]
    assert said(late, 99.0)["bee"] == "has answered no round yet; refused in round 1: no answer within 30 s"
    again = [*late, *events(("asked", 41.0, {"round": 2, "clients": ["ant", "bee"]}))]
    assert said(again, 51.0)["bee"] == "has answered no round yet; no answer to round 2 for 10 s"
    assert said(again, 51.0)["ant"] == "last answered round 1; no answer to round 2 for 10 s"
    back = [*again, *events(("declined", 44.0, {"round": 2, "client": "bee", "reason": "idle"}))]
    assert said(back, 51.0)["bee"] == "last answered round 2"


def test_an_evaluation_without_an_answer_is_told_and_forgotten_when_it_is_over() -> None:
    waiting = [
        *BEGUN,
        *events(
            ("round", 20.0, {"round": 1}),
            ("waiting", 45.0, {"round": 1, "question": "evaluate", "clients": ["bee"], "seconds": 20.0}),
        ),
    ]
    assert said(waiting, 55.0)["bee"].endswith("; no answer to round 1 (evaluation) for 30 s")
    assert said([*waiting, *events(("evaluate", 56.0, {"round": 1}))], 60.0)["bee"] == "has answered no round yet"


def test_a_silent_handshake_is_told_and_an_ended_run_waits_for_nobody() -> None:
    begun = events(("waiting", 25.0, {"question": "query.hello", "clients": ["ant"], "seconds": 20.0}))
    assert said(begun, 26.0) == {"ant": "has answered no round yet; no answer to the handshake for 21 s"}
    assert said([*BEGUN, *events(("failed", 30.0, {"message": "x"}))], 90.0)["bee"] == "has answered no round yet"


def test_a_run_that_goes_on_keeps_what_was_answered_before_and_nothing_else() -> None:
    assert said([*BEGUN, *events(("start", 60.0, {"run": "8"}))], 70.0) == {
        "ant": "last answered round 1",
        "bee": "has answered no round yet",
        "cricket": "has answered no round yet",
    }


def test_status_tells_it_beside_the_sites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = RunLog(tmp_path / "run")
    log.event("start", run="5")
    log.event("handshake", client="ant")
    log.event("client", client="ant", round=4)
    log.event("start", run="7")
    log.event("asked", round=5, clients=["ant"])
    log.close()
    ReplyLog(tmp_path / "run").add(site="ant", round="5", kind="train", verdict="signed")
    (tmp_path / "directories").mkdir()
    (tmp_path / "directories" / "7").write_text(f"{tmp_path / 'run'}\n")

    def call(state: Path, *words: str, **more: Any) -> dict[str, Any]:
        return {
            "runs": [
                {"run-id": "7", "status": "running", "elapsed": 3.0},
                {"run-id": "6", "status": "finished:failed"},
            ],
            "nodes": [{"node-id": "1", "status": "online"}, {"node-id": "2", "status": "offline"}],
        }

    monkeypatch.setattr(flower_cli, "call", call)
    monkeypatch.setattr(server, "port_of", lambda state: 1)
    monkeypatch.setattr(server, "site_nodes", lambda state: {"ant": "1", "bee": "2"})
    found = runs.standing(tmp_path)
    assert runs.describe(found)[1:3] == ["site ant: online; last answered round 5", "site bee: offline"]
    assert runs.document(found)["sites"] == [
        {"name": "ant", "status": "online", "answered": 5, "why": ""},
        {"name": "bee", "status": "offline"},
    ]


def test_the_event_names_sites_and_has_a_line_for_who_follows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nodes.json").write_text('{"bee": {"node": "5", "key": "k"}}')
    monkeypatch.setenv("APIARY_NODES", str(tmp_path / "nodes.json"))
    log = RunLog(tmp_path)
    deployment_run.log_waits(log, Waits(7, "train", (5, 6), 41.26))
    deployment_run.log_waits(log, Waits(None, "query.hello", (5,), 20.0))
    log.close()
    one, other = read_events(tmp_path)
    assert (one["round"], one["clients"], one["seconds"]) == (7, ["bee", "node 6"], 41.3)
    assert line(State(), one) == "round 7: no answer for 41 s from bee, node 6"
    assert "round" not in other and line(State(), other) == "handshake: no answer for 20 s from bee"
