"""What a client remembers between rounds, in files under its own organisation's folder.

One file a round, so that a server that was killed and goes back to an earlier round finds the client's memory of that
moment, and the run repeats itself bit for bit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from apiary.runlog import write_atomic
from client.trainer import Cursor


class Memory(NamedTuple):
    """A client's state after a round."""

    round: int = 0  # 0 = never trained
    cursor: Cursor = Cursor()


def load(folder: Path, before: int) -> Memory:
    """The newest memory of a round earlier than `before`; a blank one when there is none."""
    for number in sorted(_rounds(folder), reverse=True):
        if number < before:
            values = json.loads(_path(folder, number).read_text(encoding="utf-8"))
            return Memory(values["round"], Cursor(*values["cursor"]))
    return Memory()


def save(folder: Path, memory: Memory, keep: int = 3) -> None:
    """Write the memory of a round atomically; files of later rounds (from before a crash) and old ones go."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"round": memory.round, "cursor": list(memory.cursor)})
    write_atomic(_path(folder, memory.round), text)
    rounds = sorted(_rounds(folder))
    stale = [number for number in rounds if number > memory.round]
    old = [number for number in rounds if number <= memory.round][:-keep]
    for number in stale + old:
        _path(folder, number).unlink(missing_ok=True)


def _path(folder: Path, number: int) -> Path:
    return folder / f"round-{number:04d}.json"


def _rounds(folder: Path) -> list[int]:
    return [int(path.stem.removeprefix("round-")) for path in folder.glob("round-*.json")]
