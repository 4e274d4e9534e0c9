"""Baselines that several runs have alike: trained by the first, copied by the others.

A folder holds one folder for each baseline, under the digest of all that its training reads. Whoever trains one holds
a lock meanwhile, so that runs which go on at the same time do not train it twice.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from apiary.core import files

_LOOK_S = 0.2  # between looks whether another process has finished


def fetch(shared: Path, key: str, folder: Path, train: Callable[[], object]) -> bool:
    """Put a baseline into `folder`: the shared one, or a new one, which is then shared.

    Args:
        shared: the folder of all shared baselines; made where it is not there.
        key: the digest of what the baseline's training reads.
        folder: of the run that asks; what lies in it is replaced.
        train: trains the baseline and leaves it in `folder`.

    Returns:
        Whether it was there.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    kept = shared / key
    shared.mkdir(parents=True, exist_ok=True)
    while not kept.exists():
        try:
            with files.hold(shared / f"{key}.lock"):
                if kept.exists():
                    break
                train()
                _copy(folder, kept)
                return False
        except files.Held:
            time.sleep(_LOOK_S)
    _copy(kept, folder)
    return True


def count(shared: Path) -> int:
    """How many baselines are shared."""
    return sum(path.is_dir() and not files.is_draft(path) for path in shared.glob("*"))


def sweep(shared: Path) -> None:
    """Remove drafts that a killed process left; nobody else may be writing."""
    for path in shared.glob(".*"):
        if files.is_draft(path):
            shutil.rmtree(path, ignore_errors=True)


def _copy(source: Path, target: Path) -> None:
    """Copy a folder so that the copy is whole or not there."""
    draft = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        shutil.copytree(source, draft)
        for path in [*draft.iterdir(), draft]:
            files.sync(path)
        shutil.rmtree(target, ignore_errors=True)
        draft.rename(target)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
