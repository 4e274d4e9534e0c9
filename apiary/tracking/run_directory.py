"""A run directory: whose it is, which run it takes, and where what lies in it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from apiary.config import loading, resuming, toml_text
from apiary.config.schema import RunConfig
from apiary.core import files
from apiary.core.errors import UserError

CONFIG = "config.toml"
RUN_ID = "run-id"  # of a deployment: what tells the directory's run from others of its name
CHECKPOINTS = "checkpoints"
GROUPS = "groups"  # folder of a PEFT folder for each group of clients, where groups have adapters of their own
MADE_BY = "made_by"  # in a checkpoint's `state.json`: the configuration that made it, as JSON
WRITING, STARTING = ".lock", ".starting.lock"  # lock files: of who writes the directory, and of who starts a run in it
_NOT_LOCKED = (
    "the file system of the run directory has no locks, so nothing keeps a second process out; start only one run in it"
)


class ResultFolders(NamedTuple):
    """Where a run directory keeps its baselines, and what belongs to clients."""

    alone: Path  # a PEFT folder for each client
    central: Path  # a PEFT folder
    central_serial: Path  # likewise
    personal: Path  # a PEFT folder for each client, where each has a model of its own
    alone_best: Path  # likewise, of training alone where it is best, where clients choose their own model


def result_folders(run: Path) -> ResultFolders:
    """The places in a run directory."""
    baselines = run / "baselines"
    return ResultFolders(
        alone=baselines / "local",
        central=baselines / "central",
        central_serial=baselines / "central_serial",
        personal=run / "personal",
        alone_best=baselines / "local_best",
    )


# -- one process at a time ---------------------------------------------------------------------------


class StillGoing(UserError):
    """A process still writes the run directory."""


def still_going(folder: Path, who: str) -> StillGoing:
    """The refusal of a second process, in one line."""
    return StillGoing(f"{str(folder)!r}: a run still goes on in it ({who}); wait for its end, or choose another --out")


@contextlib.contextmanager
def claim(folder: Path, lock: str = WRITING) -> Iterator[list[str]]:
    """Take a run directory for this process alone, until the block ends or the process dies.

    The directory is made where there is none, and taken away again if nothing has been written into it.

    Args:
        folder: the run directory.
        lock: the name of the lock file in it.

    Yields:
        Warnings, a line each: that the file system has no locks.

    Raises:
        StillGoing: another process has it, with or without a run in it.
        UserError: it is a file.
        OSError: it cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{str(folder)!r} is a file; choose another --out")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with contextlib.ExitStack() as stack:
            try:
                locked = stack.enter_context(files.hold(folder / lock))
            except files.Held as held:
                raise still_going(folder, str(held)) from None
            yield [] if locked else [_NOT_LOCKED]
    finally:
        with contextlib.suppress(OSError):  # not empty, as after any run
            for path in made:
                path.rmdir()


# -- which run it takes ------------------------------------------------------------------------------


def content(folder: Path) -> set[str]:
    """The names of what stands in a run directory; drafts and locks do not count."""
    return {path.name for path in folder.iterdir() if not files.is_draft(path)} - {WRITING, STARTING}


def check_folder(config: RunConfig, folder: Path, resume: bool) -> None:
    """Check that a run directory can take this run, in a simulation and in a deployment.

    Args:
        config: the run.
        folder: its directory.
        resume: whether it may go on with the run that is there.

    Raises:
        UserError: the directory holds another run, or something that is none, or a run that is not to go on; or it was
            begun, or its newest checkpoint made, with another value of a key that decides the result.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{str(folder)!r} is a file; choose another --out")
    if not folder.exists() or content(folder) <= {RUN_ID}:
        return  # with --resume as well: a scheduler that always gives it begins the run so
    if not resume:
        raise UserError(f"{str(folder)!r} is not empty: add --resume to go on with that run, or choose another --out")
    if not (folder / CONFIG).exists():
        raise UserError(f"--resume: {str(folder)!r} holds no run (no {CONFIG}), but other files; choose another --out")
    if changed := resuming.differences(loading.load(folder / CONFIG), config):
        raise UserError(
            f"--resume: the configuration differs from the run's own in {_named(changed)}; leave CONFIG and -s away, "
            "or choose another --out"
        )
    for path in reversed(checkpoints(folder / CHECKPOINTS)):
        with contextlib.suppress(OSError, ValueError):  # not whole: the run goes on from an earlier one
            index = json.loads((path / "state.json").read_text(encoding="utf-8"))
            break
    else:
        return
    check_made_by(index.get(MADE_BY), config, path.name)


def checkpoints(folder: Path) -> list[Path]:
    """The folders of the rounds in a folder of checkpoints, in order, whole or not."""
    return sorted(folder.glob("round-*"), key=lambda path: int(path.name.removeprefix("round-")))


def last_checkpoint(folder: Path) -> int:
    """The round of the newest checkpoint of a run directory, from which its run goes on; 0 where it has none."""
    found = checkpoints(folder / CHECKPOINTS)
    return int(found[-1].name.removeprefix("round-")) if found else 0


def check_made_by(made_by: str | None, config: RunConfig, name: str) -> None:
    """Check that a checkpoint was made with a configuration.

    Args:
        made_by: the JSON that the checkpoint holds; None in one of an earlier version, which is taken as it is.
        config: of the run that is to go on.
        name: of the checkpoint.

    Raises:
        UserError: a key that decides the result has another value.
    """
    if made_by is None:
        return
    try:
        changed = resuming.differences(loading.from_json(made_by), config)
    except ValueError:
        raise UserError(f"--resume: checkpoint {name} was made by another version; choose another --out") from None
    if changed:
        raise UserError(
            f"--resume: checkpoint {name} was made with another {_named(changed)}; was {CONFIG} edited? Put the value "
            "back, or choose another --out"
        )


def _named(changed: dict[str, tuple[object, object]]) -> str:
    """The keys, each with its value then and now."""
    shown = ((key, *map(toml_text.shown, values)) for key, values in changed.items())
    return ", ".join(f"{key} ({then} then, {now} now)" for key, then, now in shown)
