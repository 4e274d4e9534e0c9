"""Starting a run on a federation's server: for a person, and again for a run whose process was killed."""

from __future__ import annotations

import contextlib
import re
import secrets
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from apiary.config.schema import RunConfig
from apiary.core import files
from apiary.core.errors import UserError
from apiary.tracking import event_log, run_directory
from apiary.tracking.run_directory import StillGoing
from deploy import bundle, flower_cli, kits, run_checks, run_log, runs, server, stopping
from deploy import going as going_runs
from deploy.going import Going, read, write

_PATIENCE_S, _LOOK_S = 15.0, 0.5  # an earlier run has said its last word, and its process is about to end
_APP = "apiary-run"  # the folder that Flower bundles
# All that is in a run directory before the first checkpoint.
_FIRST = frozenset({run_directory.RUN_ID, run_directory.CONFIG, event_log.LOG_FILE})
_STARTED = "started"  # folder of the server's state: the newest of Flower's runs for each run directory
_GOING = ("pending", "starting", "running")  # as Flower calls it
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
    config = run_checks.begun(config)
    if resume or not _failed_at_once(out):
        run_directory.check_folder(config, out, resume)
    run_checks.check(config)
    online = [name for name, status in runs.sites(state).items() if status == "online"]
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


def resume(state: Path, going: Going, expected: int, done: int) -> str | None:
    """Submit a run again whose process was killed; its new id, or None where somebody else has meanwhile.

    Args:
        state: of the running server.
        going: what is remembered of it.
        expected: sites that its first round waits for this time.
        done: rounds that it has finished.

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
        (state / runs.DIRECTORIES / run, f"{going.out}\n"),
    ):
        path.parent.mkdir(mode=0o700, exist_ok=True)
        files.write_atomic(path, text)
    if ended is None:
        return run
    stopping.end(state, run)
    return None


def _ended_since(state: Path, number: str, before: Going | None) -> str | None:
    """Why a run was ended after it was remembered as `before`; None = it was not."""
    now = read(state, number)
    return None if now is None or now == before else now.ended


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
    if int(port) == server.port_of(state) and runs.status_of(state, run).startswith(_GOING):
        raise run_directory.still_going(out, f"run {run}")


def _failed_at_once(out: Path) -> bool:
    """Whether all that is in a run directory is a run that failed before its first checkpoint."""
    events = run_log.every(out)
    return bool(events) and events[-1]["event"] == "failed" and run_directory.content(out) <= _FIRST


def run_name(text: str) -> str:
    """A name that every site takes: letters, digits, '.', '_' and '-', without a dot in front."""
    return _NAME.sub("-", text).lstrip(".")[:_LONGEST] or "run"
