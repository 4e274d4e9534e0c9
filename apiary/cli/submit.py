"""What `apiary deploy submit` does before and after it follows a run, each in a Python of its own that then ends.

The checks load torch and Transformers, and the table SciPy. Whoever follows a run, for days perhaps, holds neither.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import typer

from apiary.cli import shared
from apiary.config import loading
from apiary.config.schema import RunConfig
from apiary.core.errors import UserError
from deploy import processes
from deploy.flower_cli import FlowerError

# What the other Python imports is what this one would: a method may come from a file beside the configuration.
_BEGIN = """
import json, socket, sys
line = socket.socket(fileno=int(sys.argv[1]))
asked = json.load(line.makefile())
sys.path[:] = asked.pop("path")
from apiary.cli import submit
submit.answer(line, **asked)
"""


class Started(NamedTuple):
    """A run that was started."""

    run: str  # its id at the SuperLink
    state: Path  # of the server
    interrupted: bool  # Ctrl-C came too late to prevent it


def start(config: RunConfig, kit: Path, state: Path | None, out: Path, resume: bool) -> Started:
    """Check a run and start it, in another process; see `deploy.starting.start`.

    Raises:
        UserError: the run cannot be started so.
        FlowerError: the SuperLink refused it.
        KeyboardInterrupt: Ctrl-C came, and nothing was started.
        typer.Exit: the process failed, and has said why.
    """
    where = None if state is None else str(state)
    asked = {"config": config.to_json(), "kit": str(kit), "state": where, "out": str(out), "resume": resume}
    told, interrupted = _apart("start", asked)
    return Started(told["run"], Path(told["state"]), interrupted)


def print_table(folder: Path) -> None:
    """Print the table of a finished run from another process.

    Raises:
        UserError: the run has no metrics that can be read.
        KeyboardInterrupt: Ctrl-C came.
        typer.Exit: the process failed, and has said why.
    """
    _apart("table", {"folder": str(folder)})


def _apart(what: str, asked: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """What a Python of its own answers, and whether Ctrl-C came meanwhile."""
    request = {"path": sys.path, "parent": os.getpid(), "what": what, "asked": asked}
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:  # a group of its own: Ctrl-C reaches it through us alone, once, and as SIGTERM
            command = [sys.executable, "-P", "-c", _BEGIN, str(theirs.fileno())]
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(),), process_group=0)
        with process:
            try:
                interrupted, text = _exchange(ours, process, json.dumps(request).encode())
            except BaseException:  # Ctrl-C again
                process.kill()
                raise
    if interrupted and not text:
        raise KeyboardInterrupt
    if not text:  # it has said why, if it could
        if process.returncode < 0:
            name = signal.Signals(-process.returncode).name
            typer.echo(f"apiary: the checks were ended by {name}: is there too little memory?", err=True)
        raise typer.Exit(1)
    told = json.loads(text)
    if "done" not in told:
        _raise(told)
    return told["done"], interrupted


def _exchange(line: socket.socket, process: subprocess.Popen[bytes], request: bytes) -> tuple[bool, bytes]:
    told = bytearray()

    def hear() -> None:
        while part := line.recv(65_536):
            told.extend(part)

    interrupted = False
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it ended at once
        try:
            line.sendall(request)
            line.shutdown(socket.SHUT_WR)
            hear()
        except KeyboardInterrupt:
            interrupted = True
            process.terminate()  # it takes back what it has begun, unless it is done
            hear()
    return interrupted, bytes(told)


def _raise(told: Mapping[str, Any]) -> NoReturn:
    if "wrong" in told:
        raise UserError(*told["wrong"])
    if "refused" in told:
        raise FlowerError(told["refused"])
    raise OSError(*told["system"])


# -- in the other process ------------------------------------------------------------------------


def answer(line: socket.socket, parent: int, what: str, asked: Mapping[str, Any]) -> None:
    """Do what was asked for, and tell what came of it in JSON; nothing where we are interrupted."""
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # in the background, and yet it may write on the terminal
    shared.set_up_output()
    processes.end_with_parent(parent)
    told: dict[str, Any]
    try:
        told = {"done": _ANSWERS[what](**asked)}
    except KeyboardInterrupt:
        sys.exit(130)
    except UserError as error:
        told = {"wrong": error.problems}
    except FlowerError as error:
        told = {"refused": str(error)}
    except OSError as error:
        if error.errno is None:
            raise
        told = {"system": (error.errno, error.strerror, error.filename and os.fsdecode(error.filename))}
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    line.sendall(json.dumps(told).encode())


def _interrupt(*_: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once, so that nothing is left half taken back
    raise KeyboardInterrupt


def _start(config: str, kit: str, state: str | None, out: str, resume: bool) -> dict[str, str]:
    from apiary.tracking import trackers
    from deploy import kits, starting
    from simulation.run import check_names
    from strategies.from_config import check_for_sites

    run = loading.from_json(config)
    check_names(run)
    check_for_sites(run)
    trackers.check(run)
    opened = kits.read(Path(kit), "server")
    where = (Path(state) if state else opened.folder / "state").resolve()
    return {"run": starting.start(where, run, Path(out), resume=resume), "state": str(where)}


def _table(folder: str) -> dict[str, str]:
    from apiary.tracking.metrics_file import read_metrics

    shared.print_table(read_metrics(Path(folder)))
    sys.stdout.flush()
    return {}


_ANSWERS: dict[str, Callable[..., dict[str, str]]] = {"start": _start, "table": _table}
