"""Starting a run on a federation's server, following it, and saying how things stand."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from apiary import config as configs
from apiary import runlog
from apiary.config import RunConfig, UserError
from apiary.runlog import Event, Observer
from deploy import bundle, flower, kits, server

_LOOK_S, _ASK_S = 0.5, 20.0  # how often the run's log is read, and Flower is asked whether the run is alive
_SHOWN = 20  # runs
_APP = "apiary-run"  # the folder that Flower bundles
_NAME = re.compile(r"[^A-Za-z0-9._-]+")


def start(state: Path, config: RunConfig, out: Path, *, resume: bool = False) -> str:
    """Start a run; returns its id at the SuperLink.

    Args:
        state: of a running server.
        config: the run.
        out: the run directory on this machine.
        resume: go on after the last finished round in `out`.

    Raises:
        UserError: no server is running, no site is online, or `out` does not fit.
        flower.FlowerError: the SuperLink refused the run.
    """
    server.port_of(state)
    check_folder(config, out, resume)
    online = [name for name, status in sites(state).items() if status == "online"]
    if not online:
        raise UserError("no site is online: start `apiary deploy client` there first")
    values = {
        "config": config.to_json(),
        "out": str(out),
        "name": run_name(out.name),
        "expected": max(config.strategy.min_clients, len(online)),
    }
    app = bundle.write(state / _APP)
    given = state / "run-config.toml"
    kits.write(given, "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()), 0o600)
    return str(flower.call(state, "run", str(app), options=("--run-config", str(given)))["run-id"])


def check_folder(config: RunConfig, out: Path, resume: bool) -> None:
    """Check that the run directory can take this run.

    Raises:
        UserError: it holds another one, or nothing to go on with.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{str(out)!r} is a file; choose another --out")
    if not resume and out.exists() and any(out.iterdir()):
        raise UserError(f"{str(out)!r} is not empty: add --resume to go on with that run, or choose another --out")
    if resume:
        if not (out / "config.toml").exists():
            raise UserError(f"--resume: {str(out)!r} holds no run (no config.toml)")
        if configs.load(out / "config.toml") != config:
            raise UserError("--resume: the configuration differs from the run's own; leave CONFIG and -s away")


def run_name(text: str) -> str:
    """A name that every site takes: letters, digits, '.', '_' and '-', without a dot in front."""
    return _NAME.sub("-", text).lstrip(".")[:100] or "run"


def follow(state: Path, run: str, out: Path, observers: Iterable[Observer]) -> str | None:
    """Tell the observers what the run logs, until it ends; None when it went well, else the reason in one line."""
    known = sum(1 for _ in _events(out))  # of the part before, in a resumed run
    asked = time.monotonic()
    failure: str | None = None
    while True:
        events = _events(out)
        known = min(known, len(events))  # a resumed run cuts what it tells again
        for event in events[known:]:
            for observer in observers:
                observer(event)
            if event["event"] == "finish":
                return None
            if event["event"] == "failed":
                failure = str(event["message"])
        known = len(events)
        if failure is not None:
            return failure
        if time.monotonic() - asked > _ASK_S:
            asked = time.monotonic()
            status = status_of(state, run)
            if status.startswith("finished") and not any(e["event"] == "finish" for e in _events(out)[known:]):
                return f"the server's process ended ({status}); superlink.log in the state folder says more"
        time.sleep(_LOOK_S)


def _events(out: Path) -> list[Event]:
    with contextlib.suppress(UserError, OSError):
        return runlog.read_events(out)
    return []


def status_of(state: Path, run: str) -> str:
    """What Flower says of a run; "unknown" when it cannot be asked."""
    try:
        found = runs(state, run)
    except flower.FlowerError:
        return "unknown"
    return str(found[0].get("status", "unknown")) if found else "unknown"


def runs(state: Path, run: str | None = None) -> list[dict[str, Any]]:
    """Flower's runs, newest first, or one of them.

    Raises:
        flower.FlowerError: it cannot be asked.
    """
    options = ("--run-id", run) if run else ()
    found: list[dict[str, Any]] = flower.call(state, "list", options=options).get("runs", [])
    return found


def sites(state: Path) -> dict[str, str]:
    """Each registered site with its status: online, offline, or registered (never seen).

    Raises:
        flower.FlowerError: Flower cannot be asked.
    """
    status = {node["node-id"]: node["status"] for node in flower.call(state, "supernode", "list").get("nodes", [])}
    return {name: str(status.get(node, "unknown")) for name, node in server.site_nodes(state).items()}


def describe(state: Path) -> list[str]:
    """Lines about the sites and the newest runs.

    Raises:
        UserError: no server is running.
        flower.FlowerError: Flower cannot be asked.
    """
    server.port_of(state)
    lines = [f"site {name}: {status}" for name, status in sites(state).items()]
    for run in runs(state)[:_SHOWN]:
        lines.append(f"run {run.get('run-id')}: {run.get('status')}, {run.get('elapsed', '')}".rstrip(", "))
    return lines
