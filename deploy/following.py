"""Following a run to its end, over the times that the server submits it again."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from apiary.tracking.event_log import Observer
from deploy import flower_cli, runs
from deploy import going as going_runs
from deploy.going import Going
from deploy.run_log import RunReader

_LOOK_S, _ASK_S = 0.5, 20.0  # how often the run's log is read, and Flower is asked whether the run is alive
_LOST_S = 60.0  # how long the server may give no answer


def follow(state: Path, run: str, out: Path, observers: Sequence[Observer]) -> str | None:
    """Tell the observers what the run logs, until it ends; None when it went well, else the reason in one line.

    A run whose process was killed is followed on when the server has submitted it again.

    Raises:
        flower_cli.FlowerError: the server has not answered for a minute, and the log tells no end.
    """
    log, asked, said = RunReader(out, run), time.monotonic(), set[str]()
    answered = asked

    def say(line: str) -> None:
        """Tell a line, once for each of Flower's runs."""
        if line not in said:
            said.add(line)
            for observer in observers:
                observer({"event": "warning", "time": time.time(), "message": line})

    while True:
        status = None
        if time.monotonic() - asked > _ASK_S:
            status, asked = runs.status_of(state, log.run), time.monotonic()
        going = going_runs.of_folder(state, out)
        if going is not None and log.run in going.earlier:
            log, status, answered = RunReader(out, going.run), None, time.monotonic()
            said.clear()
            say(f"the run's process was gone: it goes on after round {going.done}, as run {going.run}")
        if going is not None and (waits := going_runs.noted(state, going)):
            say(f"the run {waits}")
        new = log.look()  # after Flower was asked: what has ended by then has said so
        for event in new:
            for observer in observers:
                observer(event)
        end = _end_of(log, going)
        if end is not None:
            return end or None
        if new or status not in (None, "unknown"):
            answered = time.monotonic()  # a log that grows is an answer too
        elif status is not None and going_runs.is_full(state):
            answered = time.monotonic()  # its database takes nothing, which is why
            say(f"the run {going_runs.NO_ROOM}")
        elif status is not None and asked - answered > _LOST_S:
            why = f"the server cannot be asked for {_LOST_S:g} s: is it gone?"
            raise flower_cli.FlowerError(f"{why} Once it is back, the run goes on by itself")
        if status is not None and status.startswith("finished") and log.verdict is None:
            if going is None:
                return f"the server's process ended ({status}); superexec.log in the state folder says more"
            say(f"the run's process ended ({status}): the server submits it again")
        time.sleep(_LOOK_S)


def _end_of(log: RunReader, going: Going | None) -> str | None:
    """How a run ended for good: empty = well; None = it goes on, or will."""
    if going is None:  # of a server that resumes nothing
        return log.end
    return log.verdict if log.verdict is not None else going.ended or None
