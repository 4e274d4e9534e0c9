"""The run directory: an append-only event log, files whole or absent, and what the run ran on.

`log.jsonl` holds one JSON object a line; whoever follows a run (terminal, trackers) is an observer
of the same events.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from io import FileIO
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

from apiary.core.errors import UserError
from apiary.core.files import finite, write_atomic

Event: TypeAlias = dict[str, Any]
Observer: TypeAlias = Callable[[Event], None]

LOG_FILE, METRICS_FILE, SCHEMA = "log.jsonl", "metrics.json", 1

# What a resumed run tells again from its beginning; the latter where they belong to no round.
_RETOLD = frozenset({"baseline", "delivered", "finish", "personal"})
_RETOLD_BESIDE_ROUNDS = frozenset({"template", "warning", "handshake", "refused", "waiting"})
_logger = logging.getLogger(__name__)


class RunLog:
    """Appends events to `folder/log.jsonl` and hands each one to the observers.

    A last line torn by a killed process is repaired on opening. An observer that raises is reported
    once and left out from then on: a tracker's network must not cost a run of hours.

    Args:
        folder: the run directory; made if absent.
        observers: called with each event, after it is on disk.

    Raises:
        OSError: the folder or the log cannot be written.
    """

    def __init__(self, folder: Path, observers: Sequence[Observer] = ()) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / LOG_FILE
        _mend(path)
        self._observers = list(observers)
        self._lock = threading.RLock()  # reentrant: an observer may itself log an event
        self._file = path.open("ab", buffering=0)

    def event(self, kind: str, **fields: Any) -> None:
        """Logs one event; NaN and infinities become null.

        Raises:
            OSError: the disk is full; the log then still ends with a whole line.
        """
        record: Event = {"event": kind, "time": round(time.time(), 3), **finite(fields)}
        line = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            self._append(line)
            for observer in tuple(self._observers):
                self._tell(observer, record)

    def _append(self, line: bytes) -> None:
        append_whole(self._file, line)

    def _tell(self, observer: Observer, record: Event) -> None:
        try:
            observer(record)
        except Exception:
            _logger.warning("an observer of the run failed and is left out from here on", exc_info=True)
            self._observers.remove(observer)

    def close(self) -> None:
        """Closes the file; further events are an error."""
        self._file.close()


def read_events(folder: Path) -> list[Event]:
    """All events in order, or [] without a log. A torn last line is passed over.

    Raises:
        UserError: a line before the last one is not an event.
    """
    path = folder / LOG_FILE
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    events = []
    for number, line in enumerate(lines, 1):
        event = parse(line)
        if event is not None:
            events.append(event)
        elif line.strip() and number < len(lines):
            raise UserError(f"{path.name} line {number} is not an event: was the file edited? Remove that line")
    return events


def parse(line: bytes) -> Event | None:
    """The event of a line of the log; None where it is none."""
    try:
        event = json.loads(line)
    except ValueError:  # covers broken JSON and broken UTF-8
        return None
    return event if isinstance(event, dict) and "event" in event else None


def _mend(path: Path) -> None:
    """Ends the log with a whole line: adds a lacking newline, or cuts a torn line off."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        body = file.read()
        if not body or body.endswith(b"\n"):
            return
        start = body.rfind(b"\n") + 1
        if parse(body[start:]) is not None:
            file.write(b"\n")
        else:
            file.truncate(start)


def append_whole(file: FileIO, line: bytes) -> None:
    """Append a line to a file without a buffer, the whole of it or nothing.

    Raises:
        OSError: the disk is full.
    """
    end = file.seek(0, os.SEEK_END)
    try:
        view = memoryview(line)
        while view:
            view = view[file.write(view) :]
    except OSError:
        with contextlib.suppress(OSError):
            file.truncate(end)
        raise


def truncate_after(folder: Path, last_round: int) -> None:
    """Cuts the log back to the end of round `last_round`, so that a resumed run tells one story.

    Everything from the first event of a later round on goes, and so does what will be told again: the
    end of the run and its baselines, handshakes and warnings about the data. Without a finished round
    (`last_round` = 0) the measurement before the first one goes too.
    """
    kept = []
    for event in read_events(folder):
        number = event.get("round")
        if number is not None and (number > last_round or last_round == 0):
            break
        if event["event"] not in (_RETOLD if number is not None else _RETOLD | _RETOLD_BESIDE_ROUNDS):
            kept.append(event)
    lines = (json.dumps(event, ensure_ascii=False, separators=(",", ":")) + "\n" for event in kept)
    write_atomic(folder / LOG_FILE, "".join(lines))


def spent_before(folder: Path) -> float:
    """Seconds between starts and last events of the earlier parts of a resumed run."""
    events = read_events(folder)
    starts = [i for i, event in enumerate(events) if event["event"] == "start"]
    return float(sum(events[b - 1]["time"] - events[a]["time"] for a, b in pairwise(starts)))
