"""Lock files: one holder at a time among processes, and none left by a killed one, whatever it has started."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from apiary.core import files

ROOT = Path(__file__).resolve().parents[2]
_HOLD = """
import os, subprocess, sys, time
from pathlib import Path
from apiary.core import files
def fork():
    back, there = os.pipe()
    child = os.fork()
    if not child:
        os.write(there, b"!")  # what a forked child does first is done by now
        time.sleep(600)
    os.read(back, 1)
    return child
with files.hold(Path(sys.argv[1])):
    started = {started}
    print(started, flush=True)
    time.sleep(600)
"""
_FORK = "fork()"
_START = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], close_fds=False).pid"


@contextlib.contextmanager
def holder(path: Path, started: str = "0") -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that holds a lock file, and the id of what it has started (0: nothing); both are ended."""
    command = [sys.executable, "-c", _HOLD.replace("{started}", started), str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        try:
            yield process, child
        finally:
            process.kill()
            if child:
                os.kill(child, signal.SIGKILL)


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    return False


@pytest.mark.parametrize("started", ["0", _FORK, _START], ids=["alone", "that has forked", "that has started another"])
def test_a_killed_process_leaves_no_lock_behind(tmp_path: Path, started: str) -> None:
    path = tmp_path / ".lock"
    with holder(path, started) as (process, child):
        with pytest.raises(files.Held, match=f"process {process.pid} on "), files.hold(path):
            pass
        process.kill()
        process.wait()
        assert path.exists()  # the file is there, and means nothing
        assert not child or alive(child)
        with files.hold(path) as locked:
            assert locked and f"process {os.getpid()} on " in path.read_text()
    assert not path.exists()


def test_a_forked_child_that_leaves_the_block_does_not_end_the_lock(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with contextlib.ExitStack() as stack:
        stack.enter_context(files.hold(path))
        if not (child := os.fork()):
            with contextlib.suppress(BaseException):
                stack.close()
            os._exit(0)
        os.waitpid(child, 0)
        assert path.exists()
        with pytest.raises(files.Held, match=f"process {os.getpid()} on "), files.hold(path):
            pass


_HAMMER = """
import os, sys
from pathlib import Path
from apiary.core import files
lock, mark, done = Path(sys.argv[1]), Path(sys.argv[2]), 0
while done < 300:
    try:
        with files.hold(lock):
            os.close(os.open(mark, os.O_CREAT | os.O_EXCL))  # two at a time would meet here
            mark.unlink()
            done += 1
    except files.Held:
        pass
"""


def test_however_often_the_lock_file_comes_and_goes_there_is_one_holder(tmp_path: Path) -> None:
    """The file is removed at the end, so one that waits may have opened the file of yesterday."""
    command = [sys.executable, "-c", _HAMMER, str(tmp_path / ".lock"), str(tmp_path / "mark")]
    processes = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    told = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], told
    assert list(tmp_path.iterdir()) == []


def test_nfs_locks_no_file_that_is_open_for_reading_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = fcntl.flock

    def as_on_nfs(handle: int, operation: int) -> None:
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "flock(2) on NFS")
        real(handle, operation)

    monkeypatch.setattr(fcntl, "flock", as_on_nfs)
    with files.hold(tmp_path / ".lock") as locked:
        assert locked


def test_without_locks_it_is_said_that_nothing_protects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    with files.hold(tmp_path / ".lock") as locked:
        assert not locked
    assert list(tmp_path.iterdir()) == []


def test_files_of_a_round_are_flushed_together_or_each_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda handle: flushed.append("one"))
    monkeypatch.setattr(files, "_flush_of_system", lambda: lambda handle: flushed.append("all"))

    def after(**options: bool) -> list[str]:
        flushed.clear()
        files.write_atomic(tmp_path / "x", "text", private=True, **options)
        return list(flushed)

    assert after(of_round=True) == ["one", "one"]  # the file, and its name in the folder
    with files.flushed_together():
        assert after(of_round=True) == []
        assert after() == ["one", "one"]  # a ledger, say, which no round makes again
        assert (tmp_path / "x").read_text() == "text"
    assert after(of_round=True) == ["one", "one"]
    flushed.clear()
    files.flush(tmp_path)
    assert flushed == ["all"]


def test_where_the_system_cannot_flush_all_each_file_is_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[int] = []
    monkeypatch.setattr(os, "fsync", flushed.append)
    monkeypatch.setattr(files, "_flush_of_system", lambda: None)
    with files.flushed_together():
        files.write_atomic(tmp_path / "x", "text", of_round=True)
    files.flush(tmp_path)
    assert len(flushed) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="syncfs(2) is Linux's")
def test_all_of_a_file_system_is_flushed_or_an_error_raised(tmp_path: Path) -> None:
    files.flush(tmp_path)
    flush_all = files._flush_of_system()
    assert flush_all is not None
    with pytest.raises(OSError, match="Bad file descriptor"):
        flush_all(-1)


def test_a_log_is_begun_anew_beyond_its_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LOG_BYTES", 10)
    log, older = tmp_path / "a.log", tmp_path / "a.old.log"
    assert not files.begin_anew(log) and not log.exists()
    log.write_text("0123456789")
    for in_use in (False, True):
        assert not files.begin_anew(log, in_use=in_use) and log.read_text() == "0123456789"
    log.write_text("0123456789a")
    assert files.begin_anew(log) and not log.exists() and older.read_text() == "0123456789a"
    with log.open("a") as writer:
        writer.write("b0123456789a")
        writer.flush()
        assert files.begin_anew(log, in_use=True) and log.read_text() == "" and older.read_text() == "123456789a"
        writer.write("next")
    assert log.read_text() == "next"


def test_a_log_is_cut_off_where_the_disk_takes_no_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LOG_BYTES", 10)
    log, older = tmp_path / "a.log", tmp_path / "a.old.log"
    older.symlink_to("/dev/full")  # every write fails by ENOSPC
    log.write_text("0123456789a")
    assert files.begin_anew(log, in_use=True) and log.read_text() == "" and not older.is_symlink()
