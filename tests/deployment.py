"""Real processes of a deployment on this machine, for tests: each in a session of its own, all ended by their pid."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from conftest import instruction_rows, overrides_for

APIARY = Path(sys.executable).with_name("apiary")
SITES = ("ant", "bee", "cricket")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def write_rows(folder: Path) -> Path:
    """A folder with a file of 40 rows for each site."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = instruction_rows(40 * len(SITES))
    for number, site in enumerate(SITES):
        own = rows[40 * number : 40 * (number + 1)]
        (folder / f"{site}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own), encoding="utf-8")
    return folder


def write_held_out(path: Path) -> Path:
    """A file of rows that no site has."""
    path.write_text("".join(json.dumps(row) + "\n" for row in instruction_rows(160)[40 * len(SITES) :]))
    return path


def overrides(model: Path, rows: Path) -> list[str]:
    return [
        *overrides_for(model, rows),
        "data.partition=natural",
        "strategy.min_clients=3",
        "evaluate.baselines=['base']",
        "evaluate.clients=false",
    ]


class Deployment:
    """A server and sites, as the command line starts them."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model, self.port = folder, model, free_port()
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        kit = ["--server", f"127.0.0.1:{self.port}", *(word for site in SITES for word in ("--site", site))]
        assert self.call("deploy", "init", str(folder / "kits"), *kit).returncode == 0
        self.kits = folder / "kits"

    def call(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([str(APIARY), *words], cwd=self.folder, capture_output=True, text=True, timeout=600)

    def status_once(self, text: str) -> str:
        """What `deploy status` says once it says this; a run's log tells its end before Flower has noted it."""
        deadline = time.monotonic() + 60
        while True:
            done = self.call("deploy", "status", str(self.kits / "server"))
            if text in done.stdout:
                return done.stdout
            assert time.monotonic() < deadline, done.stdout + done.stderr
            time.sleep(0.5)

    def start(self, name: str, *words: str) -> None:
        with (self.folder / f"{name}.out").open("ab") as out:
            self.running[name] = subprocess.Popen(
                [str(APIARY), *words],
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def serve(self) -> None:
        self.start("server", "deploy", "server", str(self.kits / "server"), "--bind", "127.0.0.1")
        self.wait_for("server", "server ready")

    def join(self, site: str, rows: Path) -> None:
        own = ("--data", str(rows / f"{site}.jsonl"), "--model", str(self.model), "--counts", "exact")
        self.start(site, "deploy", "client", str(self.kits / site), *own)

    def said(self, name: str) -> str:
        return (self.folder / f"{name}.out").read_text(errors="replace")

    def wait_for(self, name: str, text: str, times: int = 1, limit_s: float = 600.0) -> None:
        deadline = time.monotonic() + limit_s
        while self.said(name).count(text) < times:
            assert time.monotonic() < deadline, f"{name} never said {text!r}:\n{self.said(name)[-2000:]}"
            assert self.running[name].poll() is None, f"{name} ended:\n{self.said(name)[-2000:]}"
            time.sleep(0.2)

    def end(self) -> None:
        """End everything that was started, whatever state it is in."""
        everything = {pid for process in self.running.values() for pid in [process.pid, *descendants(process.pid)]}
        for process in self.running.values():
            if process.poll() is None:
                process.terminate()
        deadline = time.monotonic() + 30.0
        for process in self.running.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, deadline - time.monotonic()))
        for pid in everything:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self.running.values():
            process.wait()


@contextlib.contextmanager
def running(folder: Path, model: Path) -> Iterator[Deployment]:
    """A server and its sites, all connected, with a folder `rows` of what is theirs."""
    rows = write_rows(folder / "rows")
    made = Deployment(folder, model)
    try:
        made.serve()
        for site in SITES:
            made.join(site, rows)
        for site in SITES:
            made.wait_for(site, "connected to")
        yield made
    finally:
        made.end()


def descendants(pid: int) -> list[int]:
    """The processes below one, at any depth, that run now."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if fields[0] != "Z":
                parents[int(path.parent.name)] = int(fields[1])
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found[1:]


def events_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]
