"""The account of all answers of a run, `replies.jsonl`: who sent what, checked by whose key, and what came of that.

With the sites' public keys anybody can check it later: `apiary deploy verify`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from apiary.core.files import write_atomic
from apiary.tracking.event_log import append_whole

REPLIES_FILE = "replies.jsonl"
_TAIL_BYTES = 500_000


class ReplyLog:
    """Appends entries to `folder/replies.jsonl`.

    Args:
        folder: the run directory; a last line torn by a killed process is cut off.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / REPLIES_FILE
        if self._path.exists():
            whole = self._path.read_bytes().rpartition(b"\n")
            if whole[2]:
                write_atomic(self._path, whole[0] + whole[1])

    def add(self, **fields: Any) -> None:
        """Append one entry.

        Raises:
            OSError: the disk is full.
        """
        line = json.dumps(fields, separators=(",", ":")).encode() + b"\n"
        with self._path.open("ab", buffering=0) as file:
            append_whole(file, line)


def newest(folder: Path) -> list[dict[str, Any]]:
    """The last entries of an account, those of a few hundred answers; none where there is no account."""
    try:
        with (folder / REPLIES_FILE).open("rb") as file:
            start = max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES)
            file.seek(start)
            lines = file.read().split(b"\n")[1 if start else 0 : -1]  # without what is torn
    except OSError:
        return []
    return [json.loads(line) for line in lines]


def truncate_after(folder: Path, last_round: int) -> None:
    """Cut the account back to the end of round `last_round`, as the log of a resumed run is; 0 takes all of it."""
    path = folder / REPLIES_FILE
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        number = json.loads(line)["round"]
        if last_round == 0 or (str(number).isdecimal() and int(number) > last_round):
            break
        kept.append(line + b"\n")
    write_atomic(path, b"".join(kept))
