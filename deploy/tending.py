"""The server's watch over its runs: one whose process is gone is submitted again, with nobody there."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from apiary.config import loading
from apiary.core.errors import UserError
from apiary.tracking import run_directory
from deploy import flower_cli, runs, starting
from deploy import going as going_runs
from deploy.going import Going
from deploy.run_log import RunReader

# How long a run waits for as many sites as it began with, once one is back; the others come within a minute or two.
_SITES_S = 180.0
_ASK_S = 3.0
_AT_ONCE = 3  # looks that may go wrong before there are pauses: a SuperLink that is started again gives no answer


class _Watched:
    """What is known of a run that goes on, from look to look; times are monotonic seconds."""

    def __init__(self, going: Going) -> None:
        self.log = RunReader(going.folder, going.run)
        self.asked, self.status = -math.inf, "unknown"  # when Flower was asked for its status, and the answer
        self.gone: float | None = None  # when its process was found gone
        self.met: float | None = None  # since when a site is back
        self.said = ""
        self.failed, self.again = 0, -math.inf  # looks that went wrong in a row, and when the next may be


class Tending:
    """Looks after the runs of one server; each look is short unless a run is submitted again.

    Args:
        state: of the running server.
        say: told a line for each thing that happens, once.
    """

    def __init__(self, state: Path, say: Callable[[str], None]) -> None:
        self._state, self._say = state, say
        self._watched: dict[str, _Watched] = {}  # by Flower's number, those that go on

    def look(self) -> None:
        """See to each run that goes on; what goes wrong is said, and tried again at the next look."""
        there = [going for going in going_runs.every(self._state) if going.ended is None]
        self._watched = {going.run: self._watched.get(going.run) or _Watched(going) for going in there}
        for going in there:
            known = self._watched[going.run]
            if time.monotonic() < known.again:
                continue
            try:
                self._tend(going, known)
                known.failed = 0
            except (UserError, flower_cli.FlowerError, OSError) as error:
                known.failed += 1
                known.again = time.monotonic() + going_runs.pause(max(0, known.failed - _AT_ONCE))
                self._wait(going, known, f"cannot be submitted again now: {error}")

    def _tend(self, going: Going, known: _Watched) -> None:
        known.log.look()
        if not self._is_over(going, known):
            return
        known.log.look()  # it may have ended just now
        end = known.log.verdict
        if end is None and self._status(going, known) == "finished:stopped" and not going.lost:
            end = "it was stopped"
        if end is not None:
            self._end(going, end)
            return
        free = going_runs.is_free(going.folder)
        if self._is_gone(going, known) if free is None else free:
            self._go_on(going, known)

    def _is_over(self, going: Going, known: _Watched) -> bool:
        """Whether the process of a run has said its last word, or is gone."""
        if known.log.end is not None:
            return True
        if known.log.started and (free := going_runs.is_free(going.folder)) is not None:
            return free  # from its first word on it holds the directory
        return self._is_gone(going, known)

    def _is_gone(self, going: Going, known: _Watched) -> bool:
        """Whether Flower knows that a run's process has ended."""
        return going.lost or self._status(going, known).startswith("finished")

    def _go_on(self, going: Going, known: _Watched) -> None:
        if known.gone is None:
            known.gone = time.monotonic()
        done = run_directory.last_checkpoint(going.folder)  # the log may already tell of a round after it
        tries = 0 if done > going.done else going.tries
        if tries >= going_runs.TRIES:
            end = f"its process ended {tries} times without finishing a round (superexec.log in the state folder)"
            self._end(going, end)
            self._tell(going, known, f"is given up: {end}")
            return
        if time.monotonic() - known.gone < going_runs.pause(tries):
            return
        needed = (going.folder, self._state, Path(tempfile.gettempdir()))  # where changes wait (`server.screen`)
        if full := [place for place in needed if not going_runs.has_room(place)]:
            self._wait(going, known, f"{going_runs.NO_ROOM} of {str(full[0])!r}")
            return
        expected = self._sites(going, known)
        if not expected:
            return
        new = starting.resume(self._state, going, expected, done)
        if new is not None:
            self._tell(going, known, f"its process was gone; it goes on after round {done}, as run {new}")

    def _sites(self, going: Going, known: _Watched) -> int:
        """How many sites a run goes on with; 0 = it waits for more, for a while for as many as it began with."""
        online, now = sum(status == "online" for status in runs.sites(self._state).values()), time.monotonic()
        known.met = None if not online else now if known.met is None else known.met
        least = _least(going)
        most = max(going.expected, least)
        if online >= most or (online >= least and known.met is not None and now - known.met >= _SITES_S):
            return min(most, online)
        self._wait(going, known, f"waits for its sites ({online} of {most} are online)")
        return 0

    def _end(self, going: Going, why: str) -> None:
        if going_runs.read(self._state, going.number) == going:  # a person may have ended or submitted it just now
            going_runs.write(self._state, going._replace(ended=why))

    def _status(self, going: Going, known: _Watched) -> str:
        if time.monotonic() - known.asked >= _ASK_S:
            known.status = runs.status_of(self._state, going.run)
            known.asked = time.monotonic()
        return known.status

    def _wait(self, going: Going, known: _Watched, line: str) -> None:
        if self._tell(going, known, line):
            going_runs.note(self._state, going, line)

    def _tell(self, going: Going, known: _Watched, line: str) -> bool:
        """Say a line, once; whether it was said now."""
        if known.said == line:
            return False
        known.said = line
        self._say(f"run {going.run} ({going.out}): {line}")
        return True


def _least(going: Going) -> int:
    """With how many sites a run can go on."""
    try:
        return loading.from_json(going.config).strategy.min_clients
    except ValueError:  # of another version: its own process says what is wrong with it
        return 1
