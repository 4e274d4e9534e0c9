"""Processes that are kept running, and that end with the one that keeps them, however it ends."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO

from apiary.core.errors import UserError
from apiary.core.files import begin_anew, own_folder

_GRACE_S = 10.0  # from asking a process to end to ending it
_STEADY_S = 60.0  # a process that lived so long is not held to have failed at its start
_LONGEST_PAUSE_S = 15.0
_LAST_BYTES = 65_536  # of a log, when an ended process is asked for its last words
_DEATH_SIGNAL, _ADOPT_ORPHANS = 1, 36  # of prctl(2): PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


class SupervisedProcess:
    """A process that is started again when it ends, after a pause that grows while it keeps ending soon.

    Args:
        command: the program and its arguments.
        environment: all of it.
        folder: where it runs.
        log: receives its output, and is begun anew at a look that finds it too long; None = our own.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], folder: Path, log: Path | None = None
    ) -> None:
        self._command, self._environment, self._folder, self._log = list(command), environment, folder, log
        self._process: subprocess.Popen[bytes] | None = None
        self._began = self._again = 0.0  # monotonic seconds
        self._failures = 0
        self._offset = self._read = 0  # in the log: where the present process began, and how far it was searched

    @property
    def process(self) -> subprocess.Popen[bytes] | None:
        """The process while it runs."""
        return self._process

    @property
    def failures(self) -> int:
        """How often in a row it ended soon after its start."""
        return self._failures

    def look(self) -> int | None:
        """Start the process if it is due; its exit code if it has ended since the last look (negative: signal)."""
        now = time.monotonic()
        if self._process is None:
            if now >= self._again:
                self._began, self._process = now, self._start()
            return None
        code = self._process.poll()
        if code is None:
            self._keep_log_short()
        else:
            self._process = None
            self._failures = 0 if now - self._began > _STEADY_S else self._failures + 1
            self._again = now + pause(self._failures)
        return code

    def _keep_log_short(self) -> None:
        with contextlib.suppress(OSError):  # it is looked at again and again
            if self._log is not None and begin_anew(self._log, in_use=True):
                self._offset = self._read = 0

    def said(self, most: int = _LAST_BYTES) -> str:
        """What the present or last process wrote to its log, the last `most` bytes of it."""
        if self._log is None or not self._log.exists():
            return ""
        with self._log.open("rb") as file:
            file.seek(max(self._offset, file.seek(0, os.SEEK_END) - most))
            return file.read().decode(errors="replace")

    def has_said(self, text: str) -> bool:
        """Whether the present process wrote `text`, in what no earlier call has read."""
        if self._log is None or not self._log.exists():
            return False
        with self._log.open("rb") as file:
            file.seek(max(self._offset, self._read - len(text.encode())))
            seen = text.encode() in file.read()
            self._read = file.tell()
        return seen

    def _start(self) -> subprocess.Popen[bytes]:
        with _open_log(self._log) as log:
            self._offset = self._read = log.tell() if log else 0
            return subprocess.Popen(
                self._command,
                cwd=self._folder,
                env=dict(self._environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log and subprocess.STDOUT,
                preexec_fn=partial(end_with_parent, os.getpid()),  # this process has no other thread
            )


def pause(failures: int) -> float:
    """Seconds until a process that failed so often in a row is started again: 3, 6, 12, 15."""
    return min(_LONGEST_PAUSE_S, 3.0 * 2.0 ** max(0, failures - 1))


@contextlib.contextmanager
def _open_log(path: Path | None) -> Iterator[IO[bytes] | None]:
    if path is None:
        yield None
        return
    begin_anew(path)
    with path.open("ab") as file:
        file.seek(0, os.SEEK_END)
        yield file


def end_with_parent(parent: int) -> None:
    """Ask the kernel to send this process SIGTERM when its parent is gone, even by kill -9 (Linux)."""
    if _LIBC is None:
        return
    _LIBC.prctl(_DEATH_SIGNAL, signal.SIGTERM)
    if os.getppid() != parent:  # it was gone before we asked
        os._exit(1)


def end_all(kept: Iterable[SupervisedProcess]) -> None:
    """End the processes, and whatever of theirs is left: politely first, by SIGKILL after ten seconds."""
    running = [process for each in kept if (process := each.process)]
    for process in running:
        process.terminate()
    deadline = time.monotonic() + _GRACE_S
    for process in running:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
    for process in running:
        if process.poll() is None:
            process.kill()
            process.wait()
    for number in (signal.SIGTERM, signal.SIGKILL):
        end_orphans(number, ())


def end_orphans(number: signal.Signals, kept: Sequence[SupervisedProcess], patience: float = 3.0) -> None:
    """Send a signal to what our processes left behind, until it is gone or `patience` seconds are over.

    Args:
        number: the signal.
        kept: what is left alone.
        patience: seconds.
    """
    deadline = time.monotonic() + patience
    sent: set[int] = set()
    while (left := reap(kept)) and time.monotonic() < deadline:
        for pid in left - sent:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        sent |= left
        time.sleep(0.1)


def adopt_orphans() -> None:
    """Become the parent of what our processes leave behind, so that it can be found and ended (Linux)."""
    if _LIBC is not None:
        _LIBC.prctl(_ADOPT_ORPHANS, 1)


def reap(kept: Iterable[SupervisedProcess]) -> set[int]:
    """The processes adopted by this one that still run; those that have ended are cleared away."""
    ours = {process.pid for each in kept if (process := each.process)}
    pids: set[int] = set()
    for path in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            pids |= {int(pid) for pid in path.read_text().split()}
    alive = set()
    for pid in pids - ours:
        with contextlib.suppress(ChildProcessError):
            if os.waitpid(pid, os.WNOHANG) == (0, 0):
                alive.add(pid)
    return alive


def environment(state: Path) -> dict[str, str]:
    """The environment of Flower's processes: nothing phones home, nothing is installed, all its files under `state`."""
    own = Path(sys.executable).parent
    return {
        **os.environ,
        "PATH": f"{own}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "FLWR_HOME": str(state / "flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONUNBUFFERED": "1",
    }


def program(name: str) -> str:
    """The path of a program that was installed beside this Python."""
    return str(Path(sys.executable).parent / name)


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def check_port(bind: str, port: int, what: str) -> None:
    """Check that a process may listen there.

    Raises:
        UserError: it may not; the line begins with `what`.
    """
    if not 0 < port < 65536:
        raise UserError(f"{what}: a port is a number from 1 to 65535")
    family = socket.AF_INET6 if ":" in bind else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((bind, port))
        except OSError as error:
            raise UserError(f"{what}: {error.strerror}; does another process listen there?") from None


def wait_for_end() -> threading.Event:
    """An event that SIGTERM and SIGINT set."""
    end = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: end.set())
    return end


def hold(state: Path) -> IO[str]:
    """The state folder, made, for its owner alone, and locked for as long as the file returned is open.

    Raises:
        UserError: another process holds it, or it cannot be written or is another user's.
    """
    try:
        own_folder(state)
        lock = (state / "lock").open("w")
    except OSError as error:
        if state.is_dir() and state.stat().st_uid != os.geteuid():
            line = f"--state {str(state)!r}: belongs to another user, who could read it; name a folder in it"
            raise UserError(line) from None
        raise UserError(f"--state {str(state)!r}: cannot be written ({error.strerror}); name another folder") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise UserError(f"--state {str(state)!r}: another `apiary deploy` is running with it") from None
    return lock
