"""The server's state on disk, one folder a round: complete or not there at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from safetensors.torch import save as pack

from apiary.core.files import sync
from apiary.core.tensors import StateDict, digest
from strategies import ServerState

_PARTS = ("adapter", "base_delta", "memory", "copies")
_ALWAYS = frozenset(_PARTS) - {"copies"}  # the others have a file only where they hold something


def save(folder: Path, state: ServerState, progress: Mapping[str, Any], keep: int = 2) -> Path:
    """Save the state in a folder `round-NNNN`.

    Everything is written to a folder beside it, flushed to disk, and renamed: a kill at any moment leaves either the
    whole checkpoint or none.

    Args:
        folder: of all checkpoints.
        state: the server's after a round.
        progress: plain values that belong to the state, such as the best loss so far.
        keep: how many of the newest checkpoints stay; older ones are removed.

    Returns:
        The folder of this checkpoint.
    """
    final = folder / f"round-{state.round:04d}"
    draft = folder / ".draft"
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir(parents=True)
        held = [part for part in _PARTS if part in _ALWAYS or getattr(state, part)]
        digests = {part: _write(draft / f"{part}.safetensors", getattr(state, part)) for part in held}
        index = {"round": state.round, "digests": digests, "progress": dict(progress)}
        (draft / "state.json").write_text(json.dumps(index), encoding="utf-8")
        for path in [*draft.iterdir(), draft]:
            sync(path)
        shutil.rmtree(final, ignore_errors=True)
        draft.rename(final)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    sync(folder)
    for old in _rounds(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def load(folder: Path) -> tuple[ServerState, dict[str, Any]] | None:
    """Load the newest complete checkpoint.

    A folder that cannot be read, or whose tensors do not match their digests, is passed over.

    Returns:
        The state and its progress values; None where there is no complete checkpoint.
    """
    for path in reversed(_rounds(folder)):
        try:
            index = json.loads((path / "state.json").read_text(encoding="utf-8"))
            held = [part for part in _PARTS if part in _ALWAYS or part in index["digests"]]
            parts = {part: load_file(path / f"{part}.safetensors") for part in held}
        except Exception:  # safetensors raises its own error type for a torn file
            continue
        if all(digest(parts[part]) == index["digests"][part] for part in held):
            return ServerState(round=index["round"], **parts), index["progress"]
    return None


def _rounds(folder: Path) -> list[Path]:
    return sorted(folder.glob("round-*"), key=lambda path: int(path.name.removeprefix("round-")))


def _write(path: Path, state: StateDict) -> str:
    # As bytes: safetensors' own writer hides a full disk behind an error type of its own.
    path.write_bytes(pack({name: tensor.contiguous() for name, tensor in state.items()}))
    return digest(state)
