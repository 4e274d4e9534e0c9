"""Files that survive a kill: written whole or not at all, and for their owner alone where they must be."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_logger = logging.getLogger(__name__)


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
def hold(folder: Path) -> Iterator[None]:
    """Holds a run directory for one process, until the end or the process's death; no file is written for it.

    Raises:
        BlockingIOError: another process holds it.
    """
    import fcntl  # not on every system that simulates

    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:  # a file system without locks
            _logger.debug("%s cannot be locked", folder)
        yield
    finally:
        os.close(handle)


def own_folder(folder: Path) -> None:
    """Make a folder for the eyes of its owner alone, as what is kept in a client's tells of its rows."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)


def is_draft(path: Path) -> bool:
    """Whether it is an unfinished file or adapter folder of ours; other names with a dot in front are the user's."""
    return path.name.startswith(".") and (path.name.endswith(".tmp") or path.name.startswith(".adapter-"))


def sweep(folder: Path) -> None:
    """Remove drafts that a killed run left in its run directory, or a killed visit in that of its client."""
    made_by_us = [folder / place for place in ("checkpoints", "baselines", "baselines/local", "personal")]
    drafts = [path for path in folder.iterdir() if is_draft(path)]
    for draft in [*drafts, *(path for place in made_by_us for path in place.glob(".*"))]:
        shutil.rmtree(draft, ignore_errors=True) if draft.is_dir() else draft.unlink()


def write_atomic(path: Path, content: str | bytes, *, private: bool = False) -> None:
    """Writes a file whole or not at all: a temporary file beside it, fsync, rename.

    Args:
        path: the file.
        content: all of it.
        private: for its owner's eyes only, at every moment.

    Raises:
        OSError: the disk is full or the folder read-only; an older file stays as it was and nothing
            else is left.
    """
    body = content.encode() if isinstance(content, str) else content
    beside = path.with_name(f".{path.name}.tmp")
    if private:
        beside.unlink(missing_ok=True)  # an old draft would keep its own permissions
    try:
        with open(beside, "wb", opener=_private if private else None) as file:
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise
    _sync_folder(path.parent)


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
