"""Runs that go on by themselves: what the server remembers of each, and when it submits one again.

A run whose process was killed, with the SuperLink, the whole server or by itself, is submitted again in its run
directory, from its last finished round. A run that failed by its own error is not, nor one that a person ended.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from apiary.core import files
from apiary.core.errors import UserError
from apiary.tracking import run_directory

FOLDER = "runs"  # of the server's state
TRIES = 5  # without a finished round between them
STOPPED = "it was ended by `apiary deploy stop`"
NO_ROOM = "waits for room on the disk"
_ROOM = 64_000_000  # bytes that must be free on the disk of the run directory


class Going(NamedTuple):
    """A run as the server remembers it, in `runs/NUMBER.json` of its state."""

    number: str  # of the run directory, which tells its run from others
    run: str  # Flower's, the newest
    config: str  # JSON
    out: str
    name: str
    expected: int  # sites
    earlier: tuple[str, ...] = ()  # Flower's runs that it went on from
    lost: bool = False  # the process of `run` is gone, and Flower is told so
    done: int = 0  # rounds, when it was last resumed
    tries: int = 0  # since a round was finished
    ended: str | None = None  # why; empty = it finished

    @property
    def folder(self) -> Path:
        """The run directory."""
        return Path(self.out)


def write(state: Path, going: Going) -> None:
    """Remember a run.

    Raises:
        OSError: the disk is full.
    """
    (state / FOLDER).mkdir(mode=0o700, exist_ok=True)
    files.write_atomic(state / FOLDER / f"{going.number}.json", json.dumps(going._asdict(), indent=1))


def read(state: Path, number: str) -> Going | None:
    """What is remembered of the run of a run directory, by its number; None = nothing."""
    try:
        values = json.loads((state / FOLDER / f"{number}.json").read_text(encoding="utf-8"))
        return Going(**{**values, "earlier": tuple(values["earlier"])})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def of_folder(state: Path, out: Path) -> Going | None:
    """What is remembered of the run in a run directory."""
    with contextlib.suppress(OSError):
        return read(state, (out / run_directory.RUN_ID).read_text(encoding="utf-8").strip())
    return None


def every(state: Path) -> Iterator[Going]:
    """All that are remembered."""
    for path in sorted((state / FOLDER).glob("*.json")):
        if (going := read(state, path.stem)) is not None:
            yield going


def note(state: Path, going: Going, line: str) -> None:
    """Note what a run waits for before it is submitted again, for `status` and `submit`, if the disk takes it."""
    with contextlib.suppress(OSError):
        files.write_atomic(state / FOLDER / f"{going.number}.waits", f"{going.run} {line}\n")


def noted(state: Path, going: Going) -> str:
    """What a run waits for; "" = nothing."""
    try:
        run, _, line = (state / FOLDER / f"{going.number}.waits").read_text(encoding="utf-8").strip().partition(" ")
    except (OSError, ValueError):
        return ""
    return line if run == going.run else ""


def is_free(out: Path) -> bool | None:
    """Whether no process writes a run directory; None = nothing tells, for it takes no lock."""
    if not out.is_dir():
        return True
    try:
        with run_directory.claim(out) as warnings:
            return None if warnings else True
    except run_directory.StillGoing:
        return False
    except (UserError, OSError):
        return None


def has_room(out: Path) -> bool:
    """Whether the disk of a run directory takes something; a small one, whether half of it is free."""
    with contextlib.suppress(OSError):
        disk = shutil.disk_usage(out)
        return disk.free >= min(_ROOM, disk.total // 2)
    return False


def is_full(folder: Path) -> bool:
    """Whether a folder is there and its disk takes nothing."""
    return folder.is_dir() and not has_room(folder)


def pause(tries: int) -> float:
    """Seconds from the end of a run's process to the next try."""
    return 0.0 if tries == 0 else min(60.0, 2.0**tries)
