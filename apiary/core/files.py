"""Files that survive a kill: written whole or not at all, and for their owner alone where they must be."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import math
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

_held: set[int] = set()  # descriptors of the locks of this process
_together: ContextVar[bool] = ContextVar("_together", default=False)  # whether who writes flushes later, all at once


def finite(value: Any) -> Any:
    """`value` as JSON can hold it: containers and numpy scalars plain, NaN and infinities None."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [finite(item) for item in (sorted(value) if isinstance(value, (set, frozenset)) else value)]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if hasattr(value, "tolist"):  # numpy scalars and arrays, tensors
        return finite(value.tolist())
    return str(value)


@contextlib.contextmanager
def hold(path: Path) -> Iterator[bool]:
    """Hold a lock file for this process, until the block ends or the process dies, however it dies.

    The lock is flock(2) on an open file, not the presence of the file: a killed process leaves none behind. The file is
    made here, holds the id of the process and its machine for whoever is refused, and is removed at the end. It is open
    for writing, for NFS locks no other; on NFS it holds for all machines that mount the folder so. Other programs that
    this process starts do not inherit it, and a fork lets go of it: what outlives a killed process holds nothing.

    Args:
        path: the lock file; its folder exists.

    Yields:
        Whether the lock protects; False where the system or the file system has no locks.

    Raises:
        Held: another process, or another block of this one, holds it.
        OSError: the file cannot be made.
    """
    handle, locked = _lock(path)
    _held.add(handle)
    try:
        yield locked
    finally:
        if handle in _held:  # not in a forked child, which has let go of it
            path.unlink(missing_ok=True)  # still held: who opened this file meanwhile finds that it is gone
            _held.discard(handle)
            os.close(handle)


class Held(Exception):
    """A lock is held; the text says by whom, as far as that is known."""


def _lock(path: Path) -> tuple[int, bool]:
    """An open lock file, and whether it is locked."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not _flock(handle):
                return handle, False
            if _is_at(handle, path):
                with contextlib.suppress(OSError):  # a full disk takes no word, and has the lock all the same
                    os.ftruncate(handle, 0)
                    os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
                return handle, True
        except BlockingIOError:
            whose = os.pread(handle, 200, 0).decode(errors="replace").strip()
            os.close(handle)
            raise Held(whose or "another process") from None
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its holder has removed the file between our two calls


def _flock(handle: int) -> bool:
    """Whether a file could be locked; False where there are no locks.

    Raises:
        BlockingIOError: another open file holds the lock.
    """
    try:
        import fcntl  # not on every system that simulates
    except ImportError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise BlockingIOError(error.errno, os.strerror(error.errno)) from None
        return False  # a file system without locks
    return True


def _is_at(handle: int, path: Path) -> bool:
    """Whether an open file is the one that `path` names."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _let_go() -> None:
    """In a forked child: close its copies of the locks, which would otherwise outlive the parent."""
    for handle in _held:
        os.close(handle)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def own_folder(folder: Path) -> None:
    """Make a folder for the eyes of its owner alone, as what is kept in a client's tells of its rows."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)


LOG_BYTES = 20_000_000  # a log that has grown beyond this is begun anew


def begin_anew(log: Path, *, in_use: bool = False) -> bool:
    """Begin a log anew where it has grown beyond `LOG_BYTES`; the part before stays beside it, as NAME.old.log.

    Args:
        log: the file; it need not be there.
        in_use: a process has it open, and only ever appends to it. The file is then copied, its end alone where it has
            grown fast, and cut off, and what is written between the two is lost. A disk that takes no copy is freed.

    Returns:
        Whether it was.

    Raises:
        OSError: it cannot be looked at, moved or cut off.
    """
    if not log.exists() or log.stat().st_size <= LOG_BYTES:
        return False
    older = log.with_suffix(".old.log")
    if not in_use:
        log.replace(older)
        return True
    try:
        with log.open("rb") as source, open(older, "wb", opener=for_owner) as target:
            source.seek(-LOG_BYTES, os.SEEK_END)
            target.write(source.read(LOG_BYTES))
    except OSError:
        with contextlib.suppress(OSError):
            older.unlink()
    os.truncate(log, 0)
    return True


def is_draft(path: Path) -> bool:
    """Whether it is an unfinished file or adapter folder of ours; other names with a dot in front are the user's."""
    return path.name.startswith(".") and (path.name.endswith(".tmp") or path.name.startswith(".adapter-"))


_OF_CLIENTS = ("baselines/local", "baselines/local_best", "personal")  # places with a folder for each client


def sweep(folder: Path) -> None:
    """Remove drafts that a killed run left in its run directory."""
    made_by_us = [folder / place for place in ("checkpoints", "baselines", "groups", *_OF_CLIENTS)]
    drafts = [path for path in folder.iterdir() if is_draft(path)]
    for draft in [*drafts, *(path for place in made_by_us for path in place.glob(".*"))]:
        remove(draft)


def remove(draft: Path) -> None:
    """Remove an unfinished file or folder."""
    shutil.rmtree(draft, ignore_errors=True) if draft.is_dir() else draft.unlink()


def write_atomic(path: Path, content: str | bytes, *, private: bool = False, of_round: bool = False) -> None:
    """Writes a file whole or not at all: a temporary file beside it, fsync, rename.

    Args:
        path: the file.
        content: all of it.
        private: for its owner's eyes only, at every moment.
        of_round: it belongs to a round that is done again where its checkpoint is not there; within `flushed_together`
            it then need not reach the disk before the checkpoint does, and is not waited for.

    Raises:
        OSError: the disk is full or the folder read-only; an older file stays as it was and nothing
            else is left.
    """
    body = content.encode() if isinstance(content, str) else content
    beside, waits = path.with_name(f".{path.name}.tmp"), of_round and _together.get()
    if private:
        beside.unlink(missing_ok=True)  # an old draft would keep its own permissions
    try:
        with open(beside, "wb", opener=_private if private else None) as file:
            file.write(body)
            file.flush()
            if not waits:
                os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise
    if not waits:
        _sync_folder(path.parent)


@contextlib.contextmanager
def flushed_together() -> Iterator[None]:
    """Within it files of a round are not flushed one by one: their writer calls `flush` before its checkpoint.

    A kill of the process takes nothing of them away. Of a failure of the power it may leave any part of the round, in
    files that may be torn; there is no checkpoint of that round then, and whoever does it again removes them first.
    Nothing changes where the system cannot flush all at once.
    """
    token = _together.set(_flush_of_system() is not None)
    try:
        yield
    finally:
        _together.reset(token)


def flush(folder: Path) -> None:
    """Wait until all that any process has written to the file system of a folder is on the disk.

    It costs about as much as to flush one file, however many there are. Where the system cannot do so, nothing was
    left to be flushed by `flushed_together`.

    Raises:
        OSError: something could not be written.
    """
    if (flush_all := _flush_of_system()) is None:
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        flush_all(handle)
    finally:
        os.close(handle)


@functools.cache
def _flush_of_system() -> Callable[[int], None] | None:
    """Linux's syncfs(2), which Python does not have; None elsewhere, for sync(2) need not wait."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None) if sys.platform == "linux" else None
    if call is None:
        return None

    def flush_all(handle: int) -> None:
        if call(handle):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    return flush_all


def for_owner(path: str, flags: int) -> int:
    """An opener for `open` whose new files are for their owner's eyes only."""
    return os.open(path, flags, 0o600)


def _private(path: str, flags: int) -> int:
    return for_owner(path, flags | os.O_EXCL)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems cannot sync a folder; the rename still stands
        sync(folder)
