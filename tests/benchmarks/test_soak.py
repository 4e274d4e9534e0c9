"""What the soak calls a broken promise is one, and what it does to the network happens."""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

from benchmarks.soak import table, tries, watch  # noqa: E402
from benchmarks.soak.__main__ import read, runs_of  # noqa: E402
from benchmarks.soak.faults import FAULTS, Strike  # noqa: E402
from benchmarks.soak.field import SITES  # noqa: E402
from benchmarks.soak.relay import Relay  # noqa: E402
from deploy.processes import free_port  # noqa: E402

HELD: dict[str, Any] = {
    **{"fault": "node", "number": 1, "site": "ant", "exit": 0, "back_s": 4.0, "log_s": 2.0, "rounds_again": 0},
    **{"rounds_lost": 0, "messages_lost": 1, "others_lost": 0, "longest_wait_s": 5.0, "same_adapter": None},
    **{"ledger": None, "left_over": [], "printed_s": 0.5, "late": [], "account": "", "status_s": 12.0},
    **{"others_away": [], "absent": [], "may_lose": 2},
}


def test_a_try_that_holds_breaks_no_promise() -> None:
    assert tries.failures(HELD) == []
    nothing_to_tell = {"log_s": None, "status_s": None, "messages_lost": 0}
    assert tries.failures({**HELD, **nothing_to_tell, "same_adapter": True, "ledger": "exact"}) == []


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"exit": 1}, "exit code 1"),
        ({"exit": None}, "exit code None"),
        ({"back_s": None}, "not all took part again"),
        ({"rounds_lost": 1}, "a finished round was lost"),
        ({"rounds_again": 2}, "more than the running round"),
        ({"others_lost": 1}, "another site"),
        ({"others_away": ["bee"]}, "not asked, though it was not hit: bee"),
        ({"absent": ["bee"]}, "not asked in the run's first round, before any fault: bee"),
        ({"messages_lost": 3}, "3 answers lost; it may cost 2"),
        ({"fault": "door", "site": "server", "messages_lost": 2, "may_lose": 1}, "2 answers lost; it may cost 1"),
        ({"longest_wait_s": 46.0}, "a wait of 46.0 s; 45 s is allowed"),
        ({"fault": "superlink", "site": "server", "longest_wait_s": 91.0}, "a wait of 91.0 s; 90 s is allowed"),
        ({"log_s": None}, "no reason within 30 s in the log"),
        ({"log_s": 31.0}, "no reason within 30 s in the log"),
        ({"log_s": None, "messages_lost": 0, "longest_wait_s": 31.0}, "no reason within 30 s in the log"),
        ({"status_s": None, "longest_wait_s": 31.0}, "no reason within 30 s in the status"),
        ({"printed_s": None}, "ant did not say so"),
        ({"same_adapter": False}, "another adapter"),
        ({"ledger": "ant has 2 charges for round 3, which counted"}, "2 charges"),
        ({"late": ["ant in round 3"]}, "given up: ant in round 3"),
        ({"account": "round 2: no signature of ant"}, "no signature of ant"),
        ({"left_over": ["ant has 2 of deploy.node"]}, "left over: ant"),
    ],
)
def test_each_broken_promise_is_named(changed: dict[str, Any], words: str) -> None:
    (line,) = tries.failures({**HELD, **changed})
    assert words in line


class _Log(watch.Watch):
    """What was seen of a run that never was: an event each second."""

    def __init__(self, events: list[dict[str, Any]]) -> None:
        self.name, self.status, self.printed = "run", [], []
        self.seen = [watch.Seen(float(at), event) for at, event in enumerate(events)]


def _asked(number: int) -> dict[str, Any]:
    return {"event": "asked", "round": number, "clients": list(SITES)}


def _round(number: int) -> dict[str, Any]:
    return {"event": "round", "round": number}


def _start(resumed: int) -> dict[str, Any]:
    return {"event": "start", "resumed": resumed}


def test_rounds_that_were_done_again_are_told_from_rounds_that_were_lost() -> None:
    running = _Log([_start(0), _asked(1), _round(1), _asked(2), _start(1), _asked(2), _round(2), _asked(3)])
    assert tries._again(running, 3.5, 100.0) == 1 and tries._rounds_lost(running, 3.5, 100.0) == 0
    lost = _Log([_start(0), _asked(1), _round(1), _asked(2), _start(0), _asked(1), _round(1), _asked(2)])
    assert tries._again(lost, 3.5, 100.0) == 2 and tries._rounds_lost(lost, 3.5, 100.0) == 1
    unsaved = _Log([_start(0), _asked(1), _round(1), _start(0), _asked(1), _round(1), _asked(2)])
    assert tries._again(unsaved, 2.5, 100.0) == 1 and tries._rounds_lost(unsaved, 2.5, 100.0) == 0
    assert tries._again(lost, 5.5, 100.0) == 1 and tries._rounds_lost(lost, 5.5, 100.0) == 0


def test_an_answer_after_its_round_was_over_is_a_late_one() -> None:
    refused = {"event": "refused", "client": "bee", "reason": "no answer within 12 s", "round": 2}
    answers = [{"event": "client", "round": 2, "client": site} for site in SITES]
    assert tries._late([_asked(2), refused, answers[0], answers[2]], 2) == set()
    assert tries._late([_asked(2), refused, *answers], 2) == {"bee"}


def _tried(fault: str = "node") -> tries.Try:
    return tries.Try(tries.Plan(fault, 1, "bee", "asked", 0.0), 0.5, 1, Strike(), 0.5, None)


def test_a_fault_is_told_by_the_log_or_by_status_and_by_nothing_usual() -> None:
    def told(
        events: list[dict[str, Any]], status: list[tuple[float, list[str]]], fault: str = "node"
    ) -> tuple[float | None, float | None, str]:
        log = _Log(events)
        log.status = status
        return tries._told(log, _tried(fault), 100.0)

    usual = "site bee: online; last answered round 4; no answer to round 5 for 3.0 s"
    assert told([_start(0), _asked(1), _round(1)], [(2.0, ["3 of 3 sites online", usual])])[:2] == (None, None)
    assert told([], [(13.0, [usual.replace("3.0", "12.0")])])[:2] == (None, 12.5)
    assert told([], [(40.0, ["site bee: offline"]), (50.0, ["site ant: offline"])])[:2] == (None, 39.5)
    refused = {"event": "refused", "client": "bee", "reason": "its node ended", "round": 1}
    assert told([_start(0), refused, refused], [(3.0, ["site bee: offline"])]) == (
        0.5,
        2.5,
        "bee refused: its node ended",
    )
    waiting = {"event": "waiting", "clients": ["bee"], "seconds": 20.0}
    assert (
        told([_start(0), waiting], [])[0] == 0.5 and told([_start(0), {**waiting, "clients": ["ant"]}], [])[0] is None
    )
    assert told([_start(0), {**refused, "client": "ant"}], [])[:2] == (None, None)
    assert told([_start(0), _start(1)], [(2.0, ["no status: no server is running"])], "superlink")[:2] == (0.5, None)
    assert told([], [(2.0, ["no status: the SuperLink gives no answer: refused"])], "superlink")[1] == 1.5
    assert (
        told([], [(2.0, ["123  going: its process ended, it is to be resumed  41 s  runs/first"])], "serverapp")[1]
        == 1.5
    )


def test_all_are_back_when_a_round_that_began_afterwards_has_every_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tries, "_step", lambda watch: None)
    answers = [{"event": "client", "round": 2, "client": site} for site in SITES]
    log = _Log([_asked(1), _asked(2), *answers, _round(2)])
    log.ended = lambda: False  # type: ignore[method-assign]
    monkeypatch.setattr(tries, "_LONGEST_S", -1e9)
    assert tries._back(log, 0.5) is None  # a time that has passed
    monkeypatch.setattr(tries, "_LONGEST_S", 1e9)
    assert tries._back(log, 0.5) == 5.0
    assert tries._whole_round(log, 1.5) is None  # that round had begun before
    without = _Log([_asked(1), _asked(2), *answers[:2], _round(2)])
    assert tries._whole_round(without, 0.5) is None


def test_where_the_run_ends_first_all_must_be_online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tries, "_step", lambda watch: None)
    monkeypatch.setattr(tries, "_LONGEST_S", 0.2)
    now = time.monotonic()
    log = _Log([_asked(1), _round(1)])
    log.ended = lambda: True  # type: ignore[method-assign]
    online = [f"site {site}: online; last answered round 1" for site in SITES]
    log.status = [(now + 30.0, online)]  # of a node that is gone, it may be
    assert tries._back(log, time.monotonic()) is None
    log.status.append((now + 40.0, [*online[:2], "site cricket: offline"]))
    assert tries._back(log, time.monotonic()) is None
    log.status.append((now + 42.0, online))
    assert tries._back(log, time.monotonic()) == now + 42.0


def test_a_ledger_that_charges_twice_or_not_at_all_is_not_exact(tmp_path: Path) -> None:
    class Field:
        def site_state(self, site: str) -> Path:
            return tmp_path / site

    log = [_asked(1), *({"event": "client", "round": 1, "client": site} for site in SITES), _round(1)]
    followed = _Log(log)
    followed.field = Field()  # type: ignore[assignment]
    for site in SITES:
        (tmp_path / site / "runs" / "run-1").mkdir(parents=True)
        (tmp_path / site / "runs" / "run-1" / "release-0001-abc.safetensors").touch()

    def ledger(*charged: tuple[int, str]) -> str:
        entries = [{"run": "run-1", "round": number, "request": request} for number, request in charged]
        for site in SITES:
            (tmp_path / site / "ledger.json").write_text(json.dumps({"entries": entries}))
        return tries._ledger(followed, log, [1])

    assert ledger((1, "abc")) == "exact"
    assert "2 charges for round 1" in ledger((1, "abc"), (1, "def"))
    assert "0 charges for round 1" in ledger((2, "abc"))
    assert "1 answers that it has not charged" in ledger((1, "def"))


def test_every_moment_is_drawn_once_and_each_run_takes_faults_of_one_kind() -> None:
    plans = [tries.Plan.drawn(0, fault, number) for number in range(1, 21) for fault in FAULTS]
    assert plans == [tries.Plan.drawn(0, fault, number) for number in range(1, 21) for fault in FAULTS]
    assert {plan.phase for plan in plans} == {"start", "asked", "round"} and {plan.site for plan in plans} == set(SITES)
    assert len({plan.after_s for plan in plans}) > 100
    runs = list(runs_of(plans, 24))
    assert sorted(plan for run in runs for plan in run) == sorted(plans)
    for run in runs:
        assert len({(FAULTS[plan.fault].of_site, FAULTS[plan.fault].slow) for plan in run}) == 1
        assert all(plan.phase != "start" for plan in run[1:])


def test_the_table_counts_what_was_tried() -> None:
    silent = {"number": 2, "log_s": None, "status_s": None, "back_s": 6.0, "failures": ["x"]}
    rows = [{**HELD, "failures": []}, {**HELD, **silent}]
    head, row = table.cells(table.summary(rows))
    assert len(head) == len(row)
    assert row[:5] == ("a site's node killed", "2", "2, at most 2 (1 of them)", "5, at most 5", "5, at most 6")
    assert row[5:7] == ("0", "2")
    assert row[-1] == "1"


def test_a_soak_goes_on_after_the_last_whole_line(tmp_path: Path) -> None:
    assert read(tmp_path / "none.jsonl") == []
    (tmp_path / "soak.jsonl").write_text('{"fault": "node", "number": 1}\n{"fault": "no')
    assert read(tmp_path / "soak.jsonl") == [{"fault": "node", "number": 1}]
    assert (tmp_path / "soak.jsonl").read_text() == '{"fault": "node", "number": 1}\n'


@pytest.fixture
def relayed() -> Iterator[Relay]:
    """A relay to a server that sends everything back."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def echo(peer: socket.socket) -> None:
            with peer, contextlib.suppress(ConnectionError):
                while data := peer.recv(4096):
                    peer.sendall(data)

        def serve() -> None:
            while True:
                try:
                    peer = server.accept()[0]
                except OSError:
                    return
                threading.Thread(target=echo, args=(peer,), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        relay = Relay(free_port(), server.getsockname()[1])
        yield relay
        relay.end()


def _connect(relay: Relay) -> socket.socket:
    return socket.create_connection(("127.0.0.1", relay.port), timeout=10.0)


def _send_on_and_on(caller: socket.socket) -> None:
    caller.sendall(b"x" * 20_000)
    while True:
        caller.recv(4096)
        time.sleep(0.05)
        caller.sendall(b"x")


def test_a_relay_can_be_cut_in_three_ways_and_mended(relayed: Relay) -> None:
    with _connect(relayed) as caller:
        caller.sendall(b"before")
        assert caller.recv(100) == b"before"
        relayed.hush()
        time.sleep(0.2)
        caller.sendall(b"silence")
        caller.settimeout(0.5)
        with pytest.raises(TimeoutError):
            caller.recv(100)
        relayed.mend()
        caller.settimeout(10.0)
        assert caller.recv(100) == b"silence"
        relayed.close()
        with pytest.raises(ConnectionResetError):
            caller.recv(100)
    with pytest.raises(ConnectionResetError), contextlib.closing(_connect(relayed)) as caller:  # by then, or at once
        caller.recv(100)
    relayed.mend()
    relayed.reset(1, 10_000)
    time.sleep(0.2)
    with _connect(relayed) as caller, pytest.raises((ConnectionResetError, BrokenPipeError)):
        _send_on_and_on(caller)
    assert relayed.resets == 0
    with _connect(relayed) as caller:
        caller.sendall(b"after")
        assert caller.recv(100) == b"after"
