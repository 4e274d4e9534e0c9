"""Sites with real keys that answer what no site should: real processes, through the real door."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from deployment import Deployment, events_of, overrides, write_rows

pytestmark = pytest.mark.long
_HOSTILE = Path(__file__).resolve().parents[1] / "hostile_site.py"


@pytest.fixture
def made(request: pytest.FixtureRequest, tmp_path: Path, tiny_model: Path) -> Iterator[Deployment]:
    """A server, two honest sites, and one that is not; a parameter is told to that one."""
    rows = write_rows(tmp_path / "rows")
    deployment = Deployment(tmp_path, tiny_model)
    try:
        deployment.serve()
        for site in ("ant", "cricket"):
            deployment.join(site, rows)
        with (tmp_path / "bee.out").open("ab") as out:
            deployment.running["bee"] = subprocess.Popen(
                [sys.executable, str(_HOSTILE), str(deployment.kits / "bee"), *getattr(request, "param", [])],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        for site in ("ant", "cricket"):
            deployment.wait_for(site, "connected to")
        deployment.wait_for("bee", "hostile site connected")
        yield deployment
    finally:
        deployment.end()


def test_a_run_ends_well_without_a_site_whose_answers_are_no_messages(made: Deployment, tiny_model: Path) -> None:
    texts = [*overrides(tiny_model, made.folder / "rows"), "strategy.min_clients=2", "rounds=2", "train.steps=1"]
    words = [word for text in texts for word in ("-s", text)]
    done = made.call("deploy", "submit", str(made.kits / "server"), "--out", "run", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "answered query.hello" in made.said("bee")
    run = made.folder / "run"
    assert {(e["client"], e["reason"]) for e in events_of(run, "refused")} == {("bee", "its answer cannot be read")}
    assert {e["client"] for e in events_of(run, "client")} == {"ant", "cricket"}
    assert len(events_of(run, "round")) == 2
    told = made.call("deploy", "verify", "run", "--keys", str(made.kits / "server" / "sites"))
    assert told.returncode == 0, told.stdout + told.stderr
    assert [line.split(",")[0] for line in told.stdout.splitlines()] == [
        "site ant: 3 signed",  # the handshake and two rounds
        "site cricket: 3 signed",
    ]


@pytest.mark.parametrize("made", [["flood"]], indirect=True)
def test_a_site_that_floods_the_superlink_holds_up_nobody_else(made: Deployment, tiny_model: Path) -> None:
    texts = [*overrides(tiny_model, made.folder / "rows"), "strategy.min_clients=2", "rounds=2", "train.steps=1"]
    words = [word for text in (*texts, "strategy.join_timeout_s=5") for word in ("-s", text)]
    done = made.call("deploy", "submit", str(made.kits / "server"), "--out", "run", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "floods query.hello" in made.said("bee")
    run = made.folder / "run"
    assert {e["client"] for e in events_of(run, "client")} == {"ant", "cricket"}
    assert len(events_of(run, "round")) == 2 and len(events_of(run, "start")) == 1
    asked = {event["round"]: event["time"] for event in events_of(run, "asked")}
    assert max(event["time"] - asked[event["round"]] for event in events_of(run, "client")) < 60
    status = made.call("deploy", "status", str(made.kits / "server"))
    assert "site ant: online" in status.stdout and "site cricket: online" in status.stdout
    said = (made.kits / "server" / "state" / "door.log").read_text()
    assert "too many calls at a time (site bee)" in said and "too many objects (site bee)" in said
    assert "at a time (site ant)" not in said and "at a time (site cricket)" not in said
