"""The command line, as tests call it: in this process, where torch is loaded already, and in one of its own."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from typer.testing import CliRunner

from apiary.cli.main import main
from client import handlers

ROOT = Path(__file__).resolve().parents[1]
LONGEST_S = 600.0  # for a process that hangs; nothing is to be measured by it


def apiary(*args: str | Path, stdin: str | None = None, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """What `apiary ARGS...` does, by its entry point, called in this process; `in_a_process` gives the same."""
    words = ["apiary", *map(str, args)]
    with _as_in_a_fresh_process(words, cwd), CliRunner().isolation(stdin) as (stdout, stderr, _):
        try:
            main()
            code: object = 0
        except SystemExit as ended:
            code = ended.code
        except Exception:  # as the interpreter ends a process
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        said, told = (stream.getvalue().decode() for stream in (stdout, stderr))
    assert isinstance(code, int)
    return subprocess.CompletedProcess(words, code, said, told)


@contextlib.contextmanager
def _as_in_a_fresh_process(words: list[str], cwd: Path) -> Iterator[None]:
    """Neither loggers, variables, threads nor what was read are an earlier call's, and none of this one stays."""
    root = logging.getLogger()
    outputs, level = root.handlers, root.level
    levels = {name: logging.getLogger(name).level for name in list(root.manager.loggerDict)}
    argv, hook, environment, threads = sys.argv, sys.excepthook, dict(os.environ), torch.get_num_threads()
    root.handlers = []  # pytest's own: with them there, `logging.basicConfig` would do nothing
    sys.argv = words
    handlers.forget()
    try:
        with contextlib.chdir(cwd):
            yield
    finally:
        handlers.forget()
        sys.argv, sys.excepthook = argv, hook
        root.handlers = outputs
        root.setLevel(level)
        for name, before in levels.items():
            logging.getLogger(name).setLevel(before)
        os.environ.clear()
        os.environ.update(environment)
        torch.set_num_threads(threads)


def start(
    *args: str | Path, cwd: Path = ROOT, python: str | Path = sys.executable, env: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """A process of `apiary ARGS...`, which Ctrl-C ends even where the tests were started in the background."""
    command = [str(python), "-m", "apiary.cli.main", *map(str, args)]
    # A shell that starts a command in the background has it ignore SIGINT, and so all that the command starts. What is
    # caught here goes back to the default in the child.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, cwd=cwd, env=env, text=True, **pipes)
    finally:
        signal.signal(signal.SIGINT, before)


def finish(process: subprocess.Popen[str], stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """The process after its end; it is killed if it does not end."""
    try:
        stdout, stderr = process.communicate(stdin, timeout=LONGEST_S)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def in_a_process(*args: str | Path, stdin: str | None = None, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """What `apiary ARGS...` does in a process of its own: for tests of what only a process has."""
    return finish(start(*args, cwd=cwd), stdin)


def with_overrides(overrides: list[str], *more: str) -> list[str]:
    return [part for item in [*overrides, *more] for part in ("-s", item)]


def assert_refused(done: subprocess.CompletedProcess[str], *words: str, code: int = 2) -> None:
    assert done.returncode == code, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("apiary: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in lines[0], lines[0]
