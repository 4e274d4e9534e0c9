"""Ending a run for good."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from apiary.core.errors import UserError
from apiary.tracking import run_directory
from apiary.tracking.run_directory import StillGoing
from deploy import flower_cli, server
from deploy import going as going_runs
from deploy.going import read, write

_FINISHED = "[code: 18]"  # Flower: the run has ended already
_STARTS_S, _LOOK_S = 150.0, 0.5  # for whoever submits the run at this moment: longer than Flower's command may take


def stop(state: Path, what: str) -> str:
    """End a run for good, by Flower's number of it or by its run directory; returns the number.

    It may be said again where Flower could not be asked the first time.

    Raises:
        UserError: no such run, or it has ended.
        flower_cli.FlowerError: Flower cannot be asked.
        OSError: the disk is full.
    """
    server.port_of(state)
    out = Path(what).resolve()
    found = next((g for g in going_runs.every(state) if what in (g.run, *g.earlier) or out == g.folder), None)
    if found is None:
        raise UserError(f"{what!r}: no run of this server has this number or run directory; see `apiary deploy status`")
    with _no_start(found.folder):
        going = read(state, found.number) or found  # it may have been submitted again meanwhile
        if going.ended not in (None, going_runs.STOPPED):
            raise UserError(f"{what!r}: this run has ended already")
        write(state, going._replace(ended=going_runs.STOPPED))
        if not end(state, going.run) and going.ended is not None:
            raise UserError(f"{what!r}: this run has ended already")
    return going.run


def end(state: Path, run: str) -> bool:
    """Let Flower end a run; whether it had not ended already.

    Raises:
        flower_cli.FlowerError: Flower cannot be asked.
    """
    try:
        flower_cli.call(state, "stop", run)
    except flower_cli.FlowerError as error:
        if _FINISHED in str(error):
            return False
        raise
    return True


@contextlib.contextmanager
def _no_start(out: Path) -> Iterator[None]:
    """Keep others from starting a run in a directory; where that cannot be, who starts one looks what was ended."""
    deadline = time.monotonic() + _STARTS_S
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(run_directory.claim(out, run_directory.STARTING))
            except StillGoing:
                if time.monotonic() < deadline:
                    time.sleep(_LOOK_S)
                    continue
            except (UserError, OSError):  # the directory is gone, or its disk full
                pass
            break
        yield
