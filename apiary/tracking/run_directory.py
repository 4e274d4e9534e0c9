"""What a finished run's folder keeps of its results."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class ResultFolders(NamedTuple):
    """Where a run directory keeps its baselines, and what belongs to clients."""

    alone: Path  # a PEFT folder for each client
    central: Path  # a PEFT folder
    central_serial: Path  # likewise
    personal: Path  # a PEFT folder for each client, where each has a model of its own


def result_folders(run: Path) -> ResultFolders:
    """The places in a run directory."""
    baselines = run / "baselines"
    return ResultFolders(baselines / "local", baselines / "central", baselines / "central_serial", run / "personal")
