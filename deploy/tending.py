"""The server's watch over its runs: one whose process is gone is submitted again, with nobody there."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from apiary.config import loading
from apiary.core.errors import UserError
from apiary.tracking.event_log import LOG_FILE, Event
from deploy import flower_cli, runs
from deploy import going as going_runs
from deploy.going import Going

# How long a run waits for as many sites as it began with, once one is back; the others come within a minute or two.
_SITES_S = 180.0
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
        self._met: dict[str, float] = {}  # by run: since when a site is back (monotonic seconds)
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
        free = going_runs.is_free(going.folder)
        if self._is_gone(going) if free is None else free:
            self._go_on(going)

    def _is_over(self, going: Going) -> bool:
        """Whether the process of a run has said its last word, or is gone."""
        logged = self._events(going)
        if any(event["event"] in ("finish", "failed") for event in logged):
            return True
        if logged and (free := going_runs.is_free(going.folder)) is not None:
            return free  # from its first word on it holds the directory
        return self._is_gone(going)

    def _is_gone(self, going: Going) -> bool:
        """Whether Flower knows that a run's process has ended."""
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
            self._wait(going, "waits for room on the disk")
            return
        expected = self._sites(going)
        if not expected:
            return
        new = runs.resume(self._state, going, expected)
        if new is not None:
            done = going_runs.rounds_done(going.folder)
            self._tell(going, f"its process was gone; it goes on after round {done}, as run {new}")

    def _sites(self, going: Going) -> int:
        """How many sites a run goes on with; 0 = it waits for more, for a while for as many as it began with."""
        online, now = sum(status == "online" for status in runs.sites(self._state).values()), time.monotonic()
        if not online:
            self._met.pop(going.run, None)
        met = self._met.setdefault(going.run, now) if online else now
        least = _least(going)
        most = max(going.expected, least)
        if online >= most or (online >= least and now - met >= _SITES_S):
            return min(most, online)
        self._wait(going, f"waits for its sites ({online} of {most} are online)")
        return 0

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

    def _wait(self, going: Going, line: str) -> None:
        if self._tell(going, line):
            going_runs.note(self._state, going, line)

    def _tell(self, going: Going, line: str) -> bool:
        """Say a line, once; whether it was said now."""
        if self._said.get(going.run) == line:
            return False
        self._said[going.run] = line
        self._say(f"run {going.run} ({going.out}): {line}")
        return True


def _least(going: Going) -> int:
    """With how many sites a run can go on."""
    try:
        return loading.from_json(going.config).strategy.min_clients
    except ValueError:  # of another version: its own process says what is wrong with it
        return 1
