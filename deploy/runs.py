"""How the sites and the runs of a federation's server stand."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from concurrent import futures
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from apiary.core.formatting import seconds_text
from apiary.tracking import reply_log
from deploy import attendance, flower_cli, run_log, server
from deploy import going as going_runs
from deploy.attendance import Attendance
from deploy.going import Going
from deploy.run_log import RunReader

DIRECTORIES = "directories"  # folder of the server's state: where each of Flower's runs writes
_SHOWN = 20  # runs


def status_of(state: Path, run: str) -> str:
    """What Flower says of a run; "unknown" when it cannot be asked."""
    try:
        found = flower_cli.call(state, "list", options=("--run-id", run)).get("runs", [])
    except flower_cli.FlowerError:
        return "unknown"
    return str(found[0].get("status", "unknown")) if found else "unknown"


def runs(state: Path, run: str | None = None) -> list[dict[str, Any]]:
    """Flower's runs, newest first, or one of them.

    Raises:
        flower_cli.FlowerError: the SuperLink can't be asked.
    """
    options = ("--run-id", run) if run else ()
    found: list[dict[str, Any]] = flower_cli.call(state, "list", options=options).get("runs", [])
    remembered = {name: going for going in going_runs.every(state) for name in (*going.earlier, going.run)}
    return [{**row, **_standing_of(state, row, remembered.get(_number(row)))} for row in found]


def _standing_of(state: Path, row: Mapping[str, Any], going: Going | None) -> dict[str, str]:
    """The status of a run where it is another than Flower knows."""
    if going is None or str(row.get("status")) not in ("finished:failed", "finished:stopped"):
        return {}
    if _number(row) != going.run:
        return {"status": f"resumed as {going.run}"}
    if going.ended is None and _read(going.folder, going.run).verdict is None:
        return {"status": f"going: {going_runs.noted(state, going) or 'its process ended, it is to be resumed'}"}
    return {}


def _read(out: Path, run: str) -> RunReader:
    """What one of Flower's runs has logged by now."""
    log = RunReader(out, run)
    log.look()
    return log


def sites(state: Path) -> dict[str, str]:
    """Each registered site with its status: online, offline, or registered (never seen).

    Raises:
        flower_cli.FlowerError: Flower cannot be asked.
    """
    status = {node["node-id"]: node["status"] for node in flower_cli.call(state, "supernode", "list").get("nodes", [])}
    return {name: str(status.get(node, "unknown")) for name, node in server.site_nodes(state).items()}


class Standing(NamedTuple):
    """How a federation stands."""

    sites: Mapping[str, str]  # name -> online, offline, or registered (never seen)
    runs: Sequence[Mapping[str, Any]]  # Flower's, newest first
    folders: Mapping[str, str]  # the run directories that are known, by the run's id
    attendance: Mapping[str, Attendance] = MappingProxyType({})  # in the newest run, by site, of those that it knows


def standing(state: Path) -> Standing:
    """The sites and the runs of a server.

    Raises:
        UserError: no server is running.
        flower_cli.FlowerError: Flower cannot be asked.
    """
    server.port_of(state)
    with futures.ThreadPoolExecutor(2) as pool:
        asked = pool.submit(sites, state), pool.submit(runs, state)
        there, found = asked[0].result(), asked[1].result()
    folders = {}
    for run in found:
        with contextlib.suppress(OSError):  # of a run that was started by an earlier version, or by hand
            path = state / DIRECTORIES / _number(run)
            folders[_number(run)] = path.read_text(encoding="utf-8").strip()
    newest = _number(found[0]) if found else ""
    out = Path(folders.get(newest, ""))
    known = newest in folders and _read(out, newest).started
    events = run_log.every(out) if known else []  # of the parts before a resume too
    replies = reply_log.newest(out) if known else []
    return Standing(there, found, folders, attendance.of_events(events, time.time(), replies))


def _number(run: Mapping[str, Any]) -> str:
    return str(run.get("run-id"))


def describe(found: Standing) -> list[str]:
    """Lines about the sites and the newest runs."""
    online = sum(status == "online" for status in found.sites.values())
    lines = [f"{online} of {len(found.sites)} sites online"]
    for name, status in found.sites.items():
        told = f"; {found.attendance[name].sentence()}" if name in found.attendance else ""
        lines.append(f"site {name}: {status}{told}")
    if not found.runs:
        return [*lines, "no run yet"]
    if len(found.runs) > _SHOWN:
        lines.append(f"{len(found.runs)} runs; the newest {_SHOWN}:")
    rows = [("run", "status", "time", "run directory"), *(_row(found, run) for run in found.runs[:_SHOWN])]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return lines + ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _row(found: Standing, run: Mapping[str, Any]) -> tuple[str, str, str, str]:
    taken = seconds_text(_seconds(run))
    return _number(run), str(run.get("status")), taken, found.folders.get(_number(run), "not known")


def _seconds(run: Mapping[str, Any]) -> float | None:
    elapsed = run.get("elapsed")
    return float(elapsed) if isinstance(elapsed, int | float) else None


def document(found: Standing) -> dict[str, Any]:
    """The sites and all runs as `apiary deploy status --json` tells them."""
    return {
        "sites": [
            {"name": name, "status": status, **(found.attendance[name]._asdict() if name in found.attendance else {})}
            for name, status in found.sites.items()
        ],
        "runs": [
            {
                "id": _number(run),
                "status": str(run.get("status")),
                "seconds": _seconds(run),
                "folder": found.folders.get(_number(run)),
            }
            for run in found.runs
        ],
    }
