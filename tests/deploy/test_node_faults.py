"""Sites of real processes in the middle of a message: what is left, what is sent, and who takes part next."""

from __future__ import annotations

import datetime
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from deployment import SITES, Deployment, descendants, events_of, overrides, running

from deploy import fleet, flower_cli
from deploy.session import Journal

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Deployment]:
    with running(tmp_path_factory.mktemp("federation"), tiny_model) as made:
        yield made


def _below(made: Deployment, site: str, module: str) -> int:
    (found,) = [
        pid
        for pid in descendants(made.running[site].pid)
        if module.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    ]
    return found


def _in_work(made: Deployment, site: str) -> bool:
    return bool(Journal(made.kits / site / "state").read().message)


def _steps(made: Deployment, site: str) -> set[Path]:
    """The records of steps that a site has begun, one a run."""
    return set((made.kits / site / "state").glob("runs/*/steps.jsonl"))


def _until(made: Deployment, true: Callable[[], object], limit_s: float = 240.0) -> None:
    deadline = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < deadline, made.said("submit")
        time.sleep(0.2)


def _submit(made: Deployment, model: Path, out: str, *more: str) -> None:
    texts = [*overrides(model, made.folder / "rows"), "strategy.min_clients=1", "train.steps=1", *more]
    words = [word for text in texts for word in ("-s", text)]
    made.start("submit", "deploy", "submit", str(made.kits / "server"), "--out", out, *words)


def _hold_at(made: Deployment, out: str, number: int, sites: tuple[str, ...]) -> list[int]:
    """The workers of sites, stopped in a round, with their messages in work."""
    log = made.folder / out / "log.jsonl"
    _until(made, lambda: log.exists() and len(events_of(made.folder / out, "round")) >= number - 1)
    workers = [_below(made, site, "client.site_worker") for site in sites]
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    _until(made, lambda: all(_in_work(made, site) for site in sites))
    return workers


def test_who_does_not_answer_is_named_and_a_node_killed_in_mid_message_costs_a_round_and_no_deadline(
    federation: Deployment, tiny_model: Path
) -> None:
    _submit(federation, tiny_model, "killed", "rounds=6", "strategy.deadline_s=900")
    out = federation.folder / "killed"
    (worker,) = _hold_at(federation, "killed", 2, ("bee",))
    held = len(events_of(out, "round"))
    _until(federation, lambda: events_of(out, "waiting"), 60.0)
    (waited,) = events_of(out, "waiting")
    assert waited["clients"] == ["bee"] and waited["round"] == held + 1 and 20 <= waited["seconds"] < 30
    federation.wait_for("submit", "no answer for", limit_s=30.0)
    line = next(line for line in federation.said("submit").splitlines() if "no answer for" in line)
    assert line.startswith(f"round {held + 1}: ") and line.endswith("from bee")
    os.kill(_below(federation, "bee", "deploy.node"), signal.SIGKILL)
    # With the worker held still, nobody waits for it.
    _until(federation, lambda: len(events_of(out, "round")) > held, 45.0)
    os.kill(worker, signal.SIGCONT)
    federation.running["submit"].wait(timeout=300)
    assert federation.running["submit"].returncode == 0, federation.said("submit")
    assert "the node ended (exit code -9) and is started again" in federation.said("bee")
    assert {e["client"] for e in events_of(out, "client") if e["round"] == 6} == set(SITES)
    reasons = [e["reason"] for e in events_of(out, "refused") if e["client"] == "bee"]
    assert len(reasons) == 1 and "node" in reasons[0].lower(), reasons


def test_a_run_stopped_in_mid_message_leaves_no_process_and_no_late_answer(
    federation: Deployment, tiny_model: Path
) -> None:
    before = {site: len(descendants(federation.running[site].pid)) for site in SITES}
    earlier = {site: _steps(federation, site) for site in SITES}
    assert set(before.values()) == {2}  # the worker and the node
    _submit(federation, tiny_model, "stopped", "rounds=50", "train.steps=10000000")  # hours, were it not stopped
    _until(federation, lambda: all(_steps(federation, site) - earlier[site] for site in SITES))  # in the midst of it
    workers = _hold_at(federation, "stopped", 1, SITES)
    status = federation.call("deploy", "status", str(federation.kits / "server"), "--json")
    number = json.loads(status.stdout)["runs"][0]["id"]
    flower_cli.call(federation.kits / "server" / "state", "stop", number)
    _until(federation, lambda: not any(_in_work(federation, site) for site in SITES), 60.0)
    for pid in workers:
        os.kill(pid, signal.SIGCONT)
    federation.running["submit"].wait(timeout=120)
    for site in SITES:
        log = federation.kits / site / "state" / "node.log"
        assert "dropped" in log.read_text().splitlines()[-1], log.read_text()[-500:]
        _until(federation, lambda site=site: "started again, for nobody waited" in federation.said(site), 60.0)
        _until(federation, lambda site=site: len(descendants(federation.running[site].pid)) == before[site], 60.0)
    _submit(federation, tiny_model, "next", "rounds=2")
    federation.running["submit"].wait(timeout=300)
    assert federation.running["submit"].returncode == 0, federation.said("submit")
    taken = [(e["round"], e["client"]) for e in events_of(federation.folder / "next", "client")]
    assert sorted(taken) == [(number, site) for number in (1, 2) for site in SITES]
    assert events_of(federation.folder / "next", "refused") == []


def test_a_site_whose_clock_is_a_day_off_is_told_so_by_the_real_server(federation: Deployment) -> None:
    kit = federation.kits / "ant"
    line = fleet.Line(
        f"127.0.0.1:{federation.port}",
        kit / "ca.crt",
        kit / "site.key",
        threading.Event(),
        clock=lambda: fleet.utc_now() + datetime.timedelta(days=1),
    )
    try:
        with pytest.raises(fleet.Refused, match="its clock is 1 day ahead of the server's"):
            line.open()
    finally:
        line.hang_up()
