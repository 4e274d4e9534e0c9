"""The server's watch over its runs: one whose process is gone is submitted again, with nobody there."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from apiary.core.errors import UserError
from apiary.tracking.event_log import LOG_FILE, Event
from deploy import flower_cli, runs
from deploy import going as going_runs
from deploy.going import Going

_SITES_S = 180.0  # how long a run waits for as many sites as it began with; SuperNodes come back within a minute or two
_ASK_S = 3.0


class Tending:
    """Looks after the runs of one server; each look is short unless a run is submitted again.

    Args:
        state: of the running server.
        say: told a line for each thing that happens, once.
    """

    def __init__(self, state: Path, say: Callable[[str], None]) -> None:
        self._state, self._say = state, say
        self._said: dict[str, str] = {}  # by run
        self._gone: dict[str, float] = {}  # by run: when its process was found gone (monotonic seconds)
        self._asked: dict[str, tuple[float, str]] = {}  # by run: when Flower was asked for its status, and the answer
        self._read: dict[str, tuple[tuple[int, int], list[Event]]] = {}  # by run: the log as it was last read

    def look(self) -> None:
        """See to each run that goes on; what goes wrong is said, and tried again at the next look."""
        for going in going_runs.every(self._state):
            if going.ended is None:
                try:
                    self._tend(going)
                except (UserError, flower_cli.FlowerError, OSError) as error:
                    self._tell(going, f"cannot be submitted again now: {error}")

    def _tend(self, going: Going) -> None:
        if not self._is_over(going):
            return
        end = going_runs.verdict(going_runs.events(going.folder, going.run))  # anew: it may have ended just now
        if end is None and self._status(going) == "finished:stopped" and not going.lost:
            end = "it was stopped"
        if end is not None:
            self._end(going, end)
            return
        if going_runs.is_free(going.folder):
            self._go_on(going)

    def _is_over(self, going: Going) -> bool:
        """Whether the process of a run has said its last word, or is gone."""
        logged = self._events(going)
        if any(event["event"] in ("finish", "failed") for event in logged):
            return True
        if logged:  # from its first word on it holds the directory
            return going_runs.is_free(going.folder)
        return going.lost or self._status(going).startswith("finished")

    def _go_on(self, going: Going) -> None:
        gone = self._gone.setdefault(going.run, time.monotonic())
        since = time.monotonic() - gone
        tries = 0 if going_runs.rounds_done(going.folder) > going.done else going.tries
        if tries >= going_runs.TRIES:
            end = f"its process ended {tries} times without finishing a round (superexec.log in the state folder)"
            self._end(going, end)
            self._tell(going, f"is given up: {end}")
            return
        if since < going_runs.pause(tries):
            return
        if not going_runs.has_room(going.folder) or not going_runs.has_room(self._state):
            self._tell(going, "waits for room on the disk")
            return
        online = sum(status == "online" for status in runs.sites(self._state).values())
        if not online or (online < going.expected and since < _SITES_S):
            self._tell(going, f"waits for its sites ({online} of {going.expected} are online)")
            return
        new = runs.resume(self._state, going, min(going.expected, online))
        if new is not None:
            done = going_runs.rounds_done(going.folder)
            self._tell(going, f"its process was gone; it goes on after round {done}, as run {new}")

    def _end(self, going: Going, why: str) -> None:
        if going_runs.read(self._state, going.number) == going:  # a person may have ended or submitted it just now
            going_runs.write(self._state, going._replace(ended=why))

    def _status(self, going: Going) -> str:
        asked, answer = self._asked.get(going.run, (-_ASK_S, "unknown"))
        if time.monotonic() - asked >= _ASK_S:
            answer = runs.status_of(self._state, going.run)
            self._asked[going.run] = time.monotonic(), answer
        return answer

    def _events(self, going: Going) -> Sequence[Event]:
        try:
            found = os.stat(going.folder / LOG_FILE)
        except OSError:
            return []
        sign = (found.st_size, found.st_mtime_ns)
        if self._read.get(going.run, (None,))[0] != sign:
            self._read[going.run] = sign, going_runs.events(going.folder, going.run)
        return self._read[going.run][1]

    def _tell(self, going: Going, line: str) -> None:
        if self._said.get(going.run) != line:
            self._said[going.run] = line
            self._say(f"run {going.run} ({going.out}): {line}")
