"""`apiary deploy submit` as a process: what it starts, what it leaves alone, and what it holds while it follows."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
import venv
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from command_line import ROOT, assert_refused, finish, start
from deployment import descendants
from fake_run import fake_events, fake_metrics, fake_run

from apiary.tracking.event_log import RunLog
from deploy import flower_cli, kits

HEAVY = ("torch", "numpy", "scipy", "matplotlib", "tokenizers", "pyarrow", "grpc")  # with compiled parts
MOST_MB = 80
RUN = "7"


class _Answers(BaseHTTPRequestHandler):
    """What our SuperLink says to who asks for nodes or runs."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        nodes, runs = [{"node-id": "1", "status": "online"}], [{"run-id": RUN, "status": "running"}]
        text = json.dumps({"success": True, "nodes": nodes, "runs": runs}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        pass


class Server:
    """A server that is up as far as `submit` can tell; Flower's command is a script beside a Python of its own."""

    def __init__(self, folder: Path) -> None:
        kits.init(folder / "kits", "127.0.0.1:18443", ["ant"])
        self.kit, self.state = folder / "kits" / "server", folder / "kits" / "server" / "state"
        self.begun = folder / "begun"
        venv.create(folder / "python", symlinks=True)
        self.bin = folder / "python" / "bin"
        self.answers(json.dumps({"success": True, "run-id": RUN}))
        trust = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        trust.load_cert_chain(self.kit / kits.CERTIFICATE, self.kit / kits.SERVER_KEY)
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), _Answers)
        self.http.socket = trust.wrap_socket(self.http.socket, server_side=True)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.state.mkdir()
        flower_cli.configure(kits.read(self.kit, "server"), self.state, self.http.server_port)
        (self.state / "running.json").write_text(json.dumps({"port": self.http.server_port}))
        (self.state / "nodes.json").write_text(json.dumps({"ant": {"node": "1", "key": "a b"}}))

    def answers(self, text: str, then: str = "exit 0") -> None:
        """Let `flwr` say this, and then go on."""
        script = self.bin / "flwr"
        script.write_text(f"#!/bin/sh\ntouch '{self.begun}'\necho '{text}'\n{then}\n")
        script.chmod(0o755)

    def submit(self, *words: str | Path) -> subprocess.Popen[str]:
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
        return start("deploy", "submit", self.kit, *words, python=self.bin / "python", env=env)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path)
    yield made
    made.http.shutdown()
    made.http.server_close()


@pytest.fixture
def submitted(server: Server, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """`apiary deploy submit` of the default run into `run`."""
    process = server.submit("--out", tmp_path / "run")
    everything = {process.pid}
    try:
        yield process
    finally:
        everything |= set(descendants(process.pid))
        for pid in everything:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


def _wait(process: subprocess.Popen[str], until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not until():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _held(pid: int) -> set[str]:
    """Which of the heavy packages a process has loaded."""
    with contextlib.suppress(OSError):  # it is gone
        maps = Path(f"/proc/{pid}/maps").read_text()
        return {name for name in HEAVY if f"/site-packages/{name}/" in maps}
    return set()


def _below(process: subprocess.Popen[str]) -> set[str]:
    return {name for pid in descendants(process.pid) for name in _held(pid)}


def test_who_follows_a_run_holds_nothing_that_its_checks_and_its_table_load(
    server: Server, submitted: subprocess.Popen[str], tmp_path: Path
) -> None:
    assert submitted.stdout and submitted.stderr
    ours: set[str] = set()
    seen: set[str] = set()

    def look() -> bool:
        ours.update(_held(submitted.pid))
        seen.update(_below(submitted))
        return server.begun.exists()

    _wait(submitted, look)
    assert {"torch", "numpy"} <= seen  # as the checks have them, so these names are found where they are
    assert submitted.stdout.readline() == f"run {RUN} started: {tmp_path / 'run'}\n"
    assert descendants(submitted.pid) == []
    log = RunLog(tmp_path / "run")
    for event in fake_events(fake_metrics()):
        told = {key: value for key, value in event.items() if key not in ("event", "time")}
        log.event(event["event"], **told, run=RUN)
    log.event("warning", message="all is told")
    while "all is told" not in (line := submitted.stderr.readline()):
        assert line
    (size,) = re.findall(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{submitted.pid}/status").read_text())
    assert int(size) * 1024 < MOST_MB * 1e6
    shutil.copy(fake_run(tmp_path / "whole") / "metrics.json", tmp_path / "run")
    log.event("finish")
    log.close()
    deadline = time.monotonic() + 300
    while submitted.poll() is None and time.monotonic() < deadline:
        look()
    assert ours == set()
    said, last = submitted.communicate(timeout=300)
    assert submitted.returncode == 0, last
    assert "federated" in said and "report: " in said and "Traceback" not in last


@pytest.mark.parametrize("during", ["checks", "start"])
def test_ctrl_c_before_a_run_is_started_leaves_nothing(
    during: str, server: Server, submitted: subprocess.Popen[str], tmp_path: Path
) -> None:
    server.answers("", then="exec sleep 600")
    _wait(submitted, server.begun.exists if during == "start" else lambda: "torch" in _below(submitted))
    before = descendants(submitted.pid)
    submitted.send_signal(signal.SIGINT)
    said, told = submitted.communicate(timeout=300)
    assert (submitted.returncode, said) == (130, "") and "Traceback" not in told
    assert not any(Path(f"/proc/{pid}").exists() for pid in before)
    assert server.begun.exists() == (during == "start")
    assert not (server.state / "runs").exists() and not (tmp_path / "run" / "run-id").exists()


@pytest.mark.parametrize(
    ("answer", "code", "line"),
    [
        ('{"success": false, "error-message": "it is full"}', 1, "the run could not be started: it is full"),
        ("", 2, "data.test = 'nowhere.jsonl'"),
    ],
)
def test_what_keeps_a_run_from_starting_is_one_line(
    answer: str, code: int, line: str, server: Server, tmp_path: Path
) -> None:
    server.answers(answer)
    done = finish(
        server.submit("--quiet", "--out", tmp_path / "run", *(["-s", "data.test=nowhere.jsonl"] * (code == 2)))
    )
    assert_refused(done, line, code=code)
    assert done.stderr.count("\n") == 1 and not (tmp_path / "run" / "run-id").exists()


def test_ctrl_c_leaves_a_run_alone_that_is_started(server: Server, submitted: subprocess.Popen[str]) -> None:
    assert submitted.stdout
    assert submitted.stdout.readline().startswith(f"run {RUN} started: ")
    submitted.send_signal(signal.SIGINT)
    _, told = submitted.communicate(timeout=300)
    assert submitted.returncode == 130 and "no longer followed; the run goes on" in told
