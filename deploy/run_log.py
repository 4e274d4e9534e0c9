"""The log of a run directory, read as it grows: what one of Flower's runs says in it."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import BinaryIO

from apiary.core.errors import UserError
from apiary.tracking import event_log
from apiary.tracking.event_log import Event


class RunReader:
    """Reads what one of Flower's runs logs, each line once; owns its place in the log, and keeps no event.

    The run's part of the log begins with its start and ends with another's, wherever a resumed run has cut the log.

    Args:
        out: the run directory.
        run: Flower's number.
    """

    def __init__(self, out: Path, run: str) -> None:
        self.run = run
        self.started = False  # it has logged its start
        self.end: str | None = None  # its last word: empty = it finished, else why it failed
        self._again = False  # it failed by nothing of its own doing
        self._path = out / event_log.LOG_FILE
        self._offset, self._last = 0, b""  # the bytes that are read, and the line that ends there
        self._own = False  # the part that is being read is the run's

    @property
    def verdict(self) -> str | None:
        """How the run ended for good by its log: empty = it finished, else its own error; None = it did not end so."""
        return None if self._again else self.end

    def look(self) -> list[Event]:
        """Read on; returns what the run has logged since the last look, in whole lines. No log is as an empty one."""
        new: list[Event] = []
        with contextlib.suppress(OSError), self._path.open("rb") as file:
            told = self._is_another(file) and self._begin_anew()
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break  # it is just being written
                self._offset, self._last = self._offset + len(line), line
                event = event_log.parse(line)
                if event is not None and self._take(event) and not told:
                    new.append(event)
        return new

    def _is_another(self, file: BinaryIO) -> bool:
        """Whether the log was written anew since: what ended where we are does not end there."""
        file.seek(self._offset - len(self._last))
        return file.read(len(self._last)) != self._last

    def _begin_anew(self) -> bool:
        """Go back to the beginning; whether the run's part was told before.

        Who cuts a log in which the run has begun is the next process in the directory: this run says nothing more.
        """
        told = self.started
        self._offset, self._last, self._own = 0, b"", False
        self.started, self.end, self._again = False, None, False
        return told

    def _take(self, event: Event) -> bool:
        """Note what counts of an event; whether it is in the run's part."""
        kind = event["event"]
        if kind == "start":
            self._own = event.get("run") == self.run
            self.started = self.started or self._own
        if self._own and self.end is None and kind in ("finish", "failed"):
            self.end = "" if kind == "finish" else str(event["message"])
            self._again = kind == "failed" and bool(event.get("again"))
        return self._own


def every(out: Path) -> list[Event]:
    """All that is in the log of a run directory; [] where it cannot be read."""
    with contextlib.suppress(UserError, OSError):
        return event_log.read_events(out)
    return []
