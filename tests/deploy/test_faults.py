"""What a deployment does when sites fail: real processes, and minutes: a silent node is given up after half of one."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from deployment import SITES, Deployment, descendants, events_of, overrides, running, write_held_out
from safetensors.torch import load_file

from apiary.config import loading
from simulation.run import simulate

pytestmark = pytest.mark.long
_SILENT_S = 30.0  # two intervals without a sign of life


@pytest.fixture
def federation(tmp_path: Path, tiny_model: Path) -> Iterator[Deployment]:
    with running(tmp_path, tiny_model) as made:
        yield made


def _submit(made: Deployment, model: Path, *more: str) -> None:
    texts = [*overrides(model, made.folder / "rows"), "strategy.min_clients=1", "evaluate.every=0", *more]
    words = [word for text in texts for word in ("-s", text)]
    made.start("submit", "deploy", "submit", str(made.kits / "server"), "--out", "run", *words)


def _wait_for_event(made: Deployment, kind: str, number: int, limit_s: float = 240.0) -> dict[str, Any]:
    deadline = time.monotonic() + limit_s
    while True:
        if (made.folder / "run" / "log.jsonl").exists():
            found = [event for event in events_of(made.folder / "run", kind) if event.get("round") == number]
            if found:
                return found[0]
        assert time.monotonic() < deadline, made.said("submit")
        time.sleep(0.2)


def _rounds_of(made: Deployment, site: str) -> list[int]:
    """In which a site's answer counted."""
    return [event["round"] for event in events_of(made.folder / "run", "client") if event["client"] == site]


def _kill(made: Deployment, site: str) -> None:
    """As when a machine loses its power: everything of the site at once, without a word to the server."""
    keeper = made.running[site].pid
    os.kill(keeper, signal.SIGSTOP)  # or it would start anew what is killed
    for pid in reversed([keeper, *descendants(keeper)]):
        os.kill(pid, signal.SIGKILL)
    made.running[site].wait()


def test_a_site_that_dies_costs_a_round_and_comes_back(federation: Deployment, tiny_model: Path) -> None:
    _submit(federation, tiny_model, "rounds=500", "train.steps=1")  # is stopped once all is seen
    _wait_for_event(federation, "asked", 2)
    _kill(federation, "bee")
    died = time.monotonic()
    lost = _wait_for_event(federation, "round", 2)
    assert time.monotonic() - died < _SILENT_S + 30.0
    assert (lost["asked"], lost["clients"]) == (3, 2)
    (line,) = [e for e in events_of(federation.folder / "run", "refused") if e.get("round") == 2]
    assert line["client"] == "bee" and "Node Unavailable" in line["reason"]
    federation.join("bee", federation.folder / "rows")
    federation.wait_for("bee", "connected to", times=2)
    deadline = time.monotonic() + 120.0
    while (took_part := _rounds_of(federation, "bee")) == [1]:
        assert time.monotonic() < deadline, federation.said("submit")
        time.sleep(0.2)
    assert took_part[0] == 1 and 2 not in took_part
    stopped = federation.call("deploy", "stop", str(federation.kits / "server"), "run")
    assert stopped.returncode == 0, stopped.stderr


def test_a_worker_that_dies_is_started_again(federation: Deployment, tiny_model: Path) -> None:
    _submit(federation, tiny_model, "rounds=4")
    _wait_for_event(federation, "round", 1)
    (worker,) = [
        pid
        for pid in descendants(federation.running["ant"].pid)
        if b"client.site_worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    os.kill(worker, signal.SIGKILL)
    federation.running["submit"].wait(timeout=300)
    assert federation.running["submit"].returncode == 0, federation.said("submit")
    assert "the worker ended (exit code -9) and is started again" in federation.said("ant")
    last = [e["client"] for e in events_of(federation.folder / "run", "client") if e["round"] == 4]
    assert sorted(last) == sorted(SITES)


def test_a_run_in_which_nothing_usable_arrives_fails_and_goes_on_later(
    federation: Deployment, tiny_model: Path
) -> None:
    rows = federation.folder / "rows"
    good = {site: (rows / f"{site}.jsonl").read_bytes() for site in SITES}
    _submit(federation, tiny_model, "rounds=2")
    for site in SITES:  # read when the run begins
        (rows / f"{site}.jsonl").write_text('{"instruction": "no answer"}\n')
    federation.running["submit"].wait(timeout=300)
    assert federation.running["submit"].returncode == 1
    assert "the run failed" in federation.said("submit") and "Traceback" not in federation.said("submit")
    (failed,) = events_of(federation.folder / "run", "failed")
    assert "handshake" in failed["message"]
    assert {event["client"] for event in events_of(federation.folder / "run", "refused")} == set(SITES)
    federation.status_once("finished:failed")
    told = federation.call("deploy", "status", str(federation.kits / "server"), "--json")
    assert [run["status"] for run in json.loads(told.stdout)["runs"]] == ["finished:failed"]
    for site in SITES:
        (rows / f"{site}.jsonl").write_bytes(good[site])
    again = federation.call("deploy", "submit", str(federation.kits / "server"), "--out", "run", "--resume")
    assert again.returncode == 0, again.stderr
    assert [event["round"] for event in events_of(federation.folder / "run", "round")] == [1, 2]


def _child(made: Deployment, name: str, *words: bytes) -> int:
    """The process of somebody's whose command line holds all of the words."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for pid in descendants(made.running[name].pid):
            with contextlib.suppress(OSError):
                line = Path(f"/proc/{pid}/cmdline").read_bytes()
                if all(word in line for word in words):
                    return pid
        time.sleep(0.1)
    raise AssertionError(words)


def test_a_run_goes_on_by_itself_whatever_of_the_server_is_killed(federation: Deployment, tiny_model: Path) -> None:
    """ServerApp, SuperExec, SuperLink and at last all of the server: the adapter is that of an undisturbed run."""
    texts = [*overrides(tiny_model, federation.folder / "rows"), "rounds=5", "evaluate.every=0", "data.test_fraction=0"]
    texts.append(f"data.test={write_held_out(federation.folder / 'held-out.jsonl')}")
    words = [word for text in texts for word in ("-s", text)]
    kit = str(federation.kits / "server")
    federation.start("submit", "deploy", "submit", kit, "--out", "run", *words)
    for number, which in enumerate((b"flwr-serverapp", b"deploy.superexec", b"deploy.superlink"), 1):
        _wait_for_event(federation, "round", number)
        os.kill(_child(federation, "server", which), signal.SIGKILL)
        federation.wait_for("server", "its process was gone", number)
    _wait_for_event(federation, "round", 4)
    _kill(federation, "server")
    federation.serve()
    federation.running["submit"].wait(timeout=600)
    said = federation.said("submit")
    assert federation.running["submit"].returncode == 0, said + federation.said("server")
    assert said.count("it goes on after round") == 4, said
    assert [event["round"] for event in events_of(federation.folder / "run", "round")] == [1, 2, 3, 4, 5]
    assert federation.status_once("finished:completed").count("resumed as") == 4
    simulate(loading.load(None, texts), federation.folder / "simulated")
    ours, theirs = (
        load_file(federation.folder / name / "adapter" / "adapter_model.safetensors") for name in ("run", "simulated")
    )
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    told = federation.call("deploy", "verify", "run", "--keys", str(federation.kits / "server" / "sites"))
    assert told.returncode == 0, told.stdout + told.stderr
    assert told.stdout.count("signed") == len(SITES)  # the account was cut with the log, and went on
