"""Starting a run on a federation's server, following it, and saying how things stand."""

from __future__ import annotations

import contextlib
import re
import secrets
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from apiary.config import compatibility, defaults
from apiary.config.schema import RunConfig
from apiary.core import files
from apiary.core.errors import UserError
from apiary.core.formatting import seconds_text
from apiary.tracking import event_log, run_directory
from apiary.tracking.event_log import Event, Observer
from apiary.tracking.run_directory import StillGoing
from deploy import attendance, bundle, flower_cli, kits, server
from deploy import going as going_runs
from deploy.attendance import Attendance
from deploy.going import Going, read, write

_LOOK_S, _ASK_S = 0.5, 20.0  # how often the run's log is read, and Flower is asked whether the run is alive
_PATIENCE_S = 15.0  # an earlier run has said its last word, and its process is about to end
_LOST_S = 60.0  # how long the server may give no answer
_STOP_S = 150.0  # how long `stop` waits for who submits the run at this moment: longer than Flower's command may take
_SHOWN = 20  # runs
_APP = "apiary-run"  # the folder that Flower bundles
# All that is in a run directory before the first checkpoint.
_FIRST = frozenset({run_directory.RUN_ID, run_directory.CONFIG, event_log.LOG_FILE})
_STARTED = "started"  # folder of the server's state: the newest of Flower's runs for each run directory
_DIRECTORIES = "directories"  # folder of the server's state: where each of Flower's runs writes
_FINISHED = "[code: 18]"  # Flower: the run has ended already
_GOING = ("pending", "starting", "running")  # as Flower calls it
_ONLY_SIMULATED = {
    "relays": "sites send their answers to the server itself",
    "away": "sites are real, and come and fail as they do",
    "failing": "sites are real, and come and fail as they do",
    "attackers": "sites are real, and none is made to attack",
}
_NAME = re.compile(r"[^A-Za-z0-9._-]+")
_LONGEST = 90  # characters of a run's name; sites take 100, and the id follows


def start(state: Path, config: RunConfig, out: Path, *, resume: bool = False) -> str:
    """Start a run; returns its id at the SuperLink.

    Args:
        state: of a running server.
        config: the run.
        out: the run directory on this machine.
        resume: go on after the last finished round in `out`, if there is a run in it.

    Raises:
        UserError: no server is running, no site is online, the configuration cannot be run here, `out` does not fit,
            or a run still writes it.
        flower_cli.FlowerError: the SuperLink refused the run.
    """
    server.port_of(state)
    config = begun(config)
    if resume or not _failed_at_once(out):
        run_directory.check_folder(config, out, resume)
    check(config)
    online = [name for name, status in sites(state).items() if status == "online"]
    if not online:
        raise UserError("no site is online: start `apiary deploy client` there first")
    expected = max(config.strategy.min_clients, len(online))
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return _start_alone(state, config, out, expected, resume)
        except StillGoing:
            if time.monotonic() > deadline:
                raise
            time.sleep(_LOOK_S)


def _start_alone(state: Path, config: RunConfig, out: Path, expected: int, resume: bool) -> str:
    if not resume and _failed_at_once(out):
        _clear(state, out)
    with _reserved(out) as number:
        known = state / _STARTED / number
        _check_earlier(state, known, out)
        going = Going(number, "", config.to_json(), str(out), f"{run_name(out.name)}-{number}", expected)
        before = read(state, number)
        run = _submit(state, going._replace(earlier=_earlier(before)), expected, before)
    if run is None:
        raise UserError(f"{str(out)!r}: {going_runs.STOPPED} while it was started")
    return run


def resume(state: Path, going: Going, expected: int) -> str | None:
    """Submit a run again whose process was killed; its new id, or None where somebody else has meanwhile.

    Args:
        state: of the running server.
        going: what is remembered of it.
        expected: sites that its first round waits for this time.

    Raises:
        StillGoing: a process still writes the run directory.
        flower_cli.FlowerError: Flower refused.
        OSError: the disk is full.
    """
    with _reserved(going.folder) as number:
        if number != going.number or read(state, number) != going:
            return None
        lost = going._replace(lost=True)
        write(state, lost)
        with contextlib.suppress(flower_cli.FlowerError):  # it knows already that it has ended
            flower_cli.call(state, "stop", going.run)
        done = going_runs.rounds_done(going.folder)
        tries = 1 if done > going.done else going.tries + 1
        again = going._replace(earlier=_earlier(going), lost=False, done=done, tries=tries)
        return _submit(state, again, expected, lost)


def _earlier(before: Going | None) -> tuple[str, ...]:
    return () if before is None else (*before.earlier, before.run)


def _submit(state: Path, going: Going, expected: int, before: Going | None) -> str | None:
    """Give a run to Flower and remember it; its new id, or None where a person has ended it meanwhile.

    Args:
        state: of the running server.
        going: the run, without that id.
        expected: sites that its first round waits for this time.
        before: what is remembered of the run directory; only `stop` may change that while the run is submitted.
    """
    if _ended_since(state, going.number, before):
        return None
    values = {key: getattr(going, key) for key in ("config", "out", "name")}
    run = _start(state, {**values, "expected": expected})
    ended = _ended_since(state, going.number, before)
    write(state, going._replace(run=run, ended=ended))
    for path, text in (
        (state / _STARTED / going.number, f"{run} {server.port_of(state)}\n"),
        (state / _DIRECTORIES / run, f"{going.out}\n"),
    ):
        path.parent.mkdir(mode=0o700, exist_ok=True)
        files.write_atomic(path, text)
    if ended is None:
        return run
    _end(state, run)
    return None


def _ended_since(state: Path, number: str, before: Going | None) -> str | None:
    """Why a run was ended after it was remembered as `before`; None = it was not."""
    now = read(state, number)
    return None if now is None or now == before else now.ended


def stop(state: Path, what: str) -> str:
    """End a run for good, by Flower's number of it or by its run directory; returns the number.

    It may be said again where Flower could not be asked the first time.

    Raises:
        UserError: no such run, or it has ended.
        flower_cli.FlowerError: Flower cannot be asked.
        OSError: the disk is full.
    """
    server.port_of(state)
    out = Path(what).resolve()
    found = next((g for g in going_runs.every(state) if what in (g.run, *g.earlier) or out == g.folder), None)
    if found is None:
        raise UserError(f"{what!r}: no run of this server has this number or run directory; see `apiary deploy status`")
    with _no_start(found.folder):
        going = read(state, found.number) or found  # it may have been submitted again meanwhile
        if going.ended not in (None, going_runs.STOPPED):
            raise UserError(f"{what!r}: this run has ended already")
        write(state, going._replace(ended=going_runs.STOPPED))
        if not _end(state, going.run) and going.ended is not None:
            raise UserError(f"{what!r}: this run has ended already")
    return going.run


def _end(state: Path, run: str) -> bool:
    """Let Flower end a run; whether it had not ended already.

    Raises:
        flower_cli.FlowerError: Flower cannot be asked.
    """
    try:
        flower_cli.call(state, "stop", run)
    except flower_cli.FlowerError as error:
        if _FINISHED in str(error):
            return False
        raise
    return True


@contextlib.contextmanager
def _no_start(out: Path) -> Iterator[None]:
    """Keep others from starting a run in a directory. Where that cannot be, `_submit` sees what happened meanwhile."""
    deadline = time.monotonic() + _STOP_S
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(run_directory.claim(out, run_directory.STARTING))
            except StillGoing:
                if time.monotonic() < deadline:
                    time.sleep(_LOOK_S)
                    continue
            except (UserError, OSError):  # the directory is gone, or its disk full
                pass
            break
        yield


def _clear(state: Path, out: Path) -> None:
    """Take away what a run left that failed before its first checkpoint, with its id: the next is another to sites.

    Raises:
        StillGoing: another process still writes the folder.
    """
    with _reserved(out) as number:
        _check_earlier(state, state / _STARTED / number, out)
        for name in _FIRST:
            (out / name).unlink(missing_ok=True)


def _check_earlier(state: Path, known: Path, out: Path) -> None:
    """Check that the run started before in `out` has ended; until its process is up, nobody but Flower knows of it.

    Raises:
        StillGoing: the earlier run in this folder has not ended.
    """
    if not known.exists():
        return
    run, port = known.read_text(encoding="utf-8").split()
    # A server that was started anew since has another port; its Flower takes an old run for alive for a while.
    if int(port) == server.port_of(state) and status_of(state, run).startswith(_GOING):
        raise run_directory.still_going(out, f"run {run}")


def _start(state: Path, values: dict[str, str | int]) -> str:
    with tempfile.TemporaryDirectory(dir=state, prefix=".submit-") as own:  # others may submit at this moment
        app, given = bundle.write(Path(own) / _APP), Path(own) / "run-config.toml"
        kits.write(given, "".join(f"{key} = {flower_cli.toml(value)}\n" for key, value in values.items()), 0o600)
        return str(flower_cli.call(state, "run", str(app), options=("--run-config", str(given)))["run-id"])


@contextlib.contextmanager
def _reserved(out: Path) -> Iterator[str]:
    """The id of a run directory, made where there is none; held, so that nobody else starts a run in it meanwhile.

    Raises:
        StillGoing: somebody does, or a run still writes it.
    """
    path = out / run_directory.RUN_ID
    with run_directory.claim(out, run_directory.STARTING):
        with run_directory.claim(out):  # which the server's process has as long as it works
            if new := not path.exists():
                files.write_atomic(path, f"{secrets.token_hex(4)}\n")
        try:
            yield path.read_text(encoding="utf-8").strip()
        except BaseException:
            if new:
                path.unlink(missing_ok=True)
            raise


def begun(config: RunConfig) -> RunConfig:
    """The configuration with what it leaves to the run, and what `adapter.start` says: sites have no copy of that.

    Raises:
        UserError: it cannot be read or honoured.
    """
    config = defaults.resolved(config)
    if config.adapter.start is None:
        return config
    from apiary.models.start import resolved  # here, for `status` needs no torch

    return resolved(config)


def check(config: RunConfig) -> None:
    """Check that sites can take this run, and that this machine can.

    Raises:
        UserError: it names a template file, which no site would open; or the server has not the model, the device, the
            held-out rows or its own root set; or no rows decide when it stops; or attackers are to be simulated.
    """
    from apiary.data import (
        examples,
        templates,  # here, for `status` needs no torch
    )
    from apiary.models import availability

    if config.prompt.template not in templates.BUILTIN:
        known = ", ".join(templates.BUILTIN)
        raise UserError(f"prompt.template = {config.prompt.template!r}: sites take the built-in ones alone ({known})")
    if config.data.max_rows is not None:
        raise UserError(
            f"data.max_rows = {config.data.max_rows}: sites choose their rows themselves; leave it out, or let them "
            "shorten their files"
        )
    availability.check_device(config.model.device, "model.device =")
    availability.check_model(config.model.name, "model.name =", config.model.revision)
    if config.data.test is not None:
        examples.read(config.data.test, split="test", columns=config.data.columns, key="data.test")
    if config.strategy.root is not None:
        examples.read(config.strategy.root, columns=config.data.columns, key="strategy.root")
    if config.data.test is None and (undecided := compatibility.nothing_decides(config)):
        raise UserError(undecided)
    for key, why in _ONLY_SIMULATED.items():
        if getattr(config.simulate, key):
            raise UserError(f"simulate.{key}: {why}; leave it out")


def remarks(config: RunConfig) -> list[str]:
    """What means something else than in a simulation, or may hurt; a line for each."""
    lines = []
    if config.strategy.deadline_s == 0:
        lines.append("strategy.deadline_s = 0: a round waits without end for a site that is alive but stuck; set it")
    if config.personal.enabled:
        lines.append(
            "personal.enabled = true: sites set rows apart for models of their own, and each makes its own at home, "
            "once the adapter is handed out (apiary deploy personal); no figure of it comes here"
        )
    return lines


def _failed_at_once(out: Path) -> bool:
    """Whether all that is in a run directory is a run that failed before its first checkpoint."""
    events = _events(out)
    return bool(events) and events[-1]["event"] == "failed" and run_directory.content(out) <= _FIRST


def run_name(text: str) -> str:
    """A name that every site takes: letters, digits, '.', '_' and '-', without a dot in front."""
    return _NAME.sub("-", text).lstrip(".")[:_LONGEST] or "run"


def follow(state: Path, run: str, out: Path, observers: Sequence[Observer]) -> str | None:
    """Tell the observers what the run logs, until it ends; None when it went well, else the reason in one line.

    A run whose process was killed is followed on when the server has submitted it again.

    Raises:
        flower_cli.FlowerError: the server has not answered for a minute, and the log tells no end.
    """
    asked = answered = time.monotonic()
    known, told, waits = 0, False, ""
    while True:
        going = going_runs.of_folder(state, out)
        if going is not None and run in going.earlier:
            run, known, told, answered = going.run, 0, False, time.monotonic()
            _tell(observers, f"the run's process was gone: it goes on after round {going.done}, as run {run}")
        before, waits = waits, going_runs.noted(state, going) if going is not None else ""
        if waits and waits != before:
            _tell(observers, f"the run {waits}")
        events = going_runs.events(out, run)
        for event in events[known:]:
            for observer in observers:
                observer(event)
        if len(events) > known:
            answered = time.monotonic()  # in its way
        known = len(events)
        end = _end_of(events, going)
        if end is not None:
            return end or None
        if time.monotonic() - asked > _ASK_S:
            status = status_of(state, run)
            asked = time.monotonic()
            if status != "unknown":
                answered = asked
            elif asked - answered > _LOST_S and not going_runs.events(out, run)[known:]:
                why = f"the server cannot be asked for {_LOST_S:g} s: is it gone?"
                raise flower_cli.FlowerError(f"{why} Once it is back, the run goes on by itself")
            if status.startswith("finished") and going_runs.verdict(going_runs.events(out, run)) is None:
                if going is None:
                    return f"the server's process ended ({status}); superexec.log in the state folder says more"
                if not told:
                    _tell(observers, f"the run's process ended ({status}): the server submits it again")
                told = True
        time.sleep(_LOOK_S)


def _end_of(events: Sequence[Event], going: Going | None) -> str | None:
    """How a run ended for good: empty = well; None = it goes on, or will."""
    end = going_runs.verdict(events)
    if end is None and going is not None and going.ended:
        return going.ended
    if end is None and going is None:  # of a server that resumes nothing
        return next((str(event["message"]) for event in events if event["event"] == "failed"), None)
    return end


def _tell(observers: Sequence[Observer], line: str) -> None:
    for observer in observers:
        observer({"event": "warning", "time": time.time(), "message": line})


def _events(out: Path) -> list[Event]:
    with contextlib.suppress(UserError, OSError):
        return event_log.read_events(out)
    return []


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
    if going.ended is None and going_runs.verdict(going_runs.events(going.folder, going.run)) is None:
        return {"status": f"going: {going_runs.noted(state, going) or 'to be resumed'}"}
    return {}


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
    with futures.ThreadPoolExecutor(2) as pool:  # each question is a process of Flower's, which takes a second to start
        asked = pool.submit(sites, state), pool.submit(runs, state)
        there, found = asked[0].result(), asked[1].result()
    folders = {}
    for run in found:
        with contextlib.suppress(OSError):  # of a run that was started by an earlier version, or by hand
            path = state / _DIRECTORIES / _number(run)
            folders[_number(run)] = path.read_text(encoding="utf-8").strip()
    newest = _number(found[0]) if found else ""
    out = Path(folders.get(newest, ""))
    known = newest in folders and going_runs.events(out, newest)
    events = _events(out) if known else []  # of the parts before a resume too
    return Standing(there, found, folders, attendance.of_events(events, time.time()))


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
