"""The server's state on disk, one folder a round: complete or not there at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from safetensors.torch import save as pack

from apiary.config.schema import RunConfig
from apiary.core.files import sync
from apiary.core.tensors import StateDict, digest
from apiary.tracking.run_directory import MADE_BY, check_made_by, checkpoints
from strategies import ServerState

_PARTS = ("adapter", "base_delta", "memory", "copies")
_ALWAYS = frozenset(_PARTS) - {"copies"}  # the others have a file only where they hold something


def save(
    folder: Path,
    state: ServerState,
    progress: Mapping[str, Any],
    config: RunConfig,
    *,
    keep: int = 2,
    also: Collection[int] = (),
) -> Path:
    """Save the state in a folder `round-NNNN`.

    Everything is written to a folder beside it, flushed to disk, and renamed: a kill at any moment leaves either the
    whole checkpoint or none.

    Args:
        folder: of all checkpoints.
        state: the server's after a round.
        progress: plain values that belong to the state, such as the best loss so far.
        config: the run that made it; no other takes it.
        keep: how many of the newest checkpoints stay; older ones are removed.
        also: rounds whose checkpoints stay besides, such as the best one.

    Returns:
        The folder of this checkpoint.
    """
    final = folder / _name(state.round)
    draft = folder / ".draft"
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir(parents=True)
        held = [part for part in _PARTS if part in _ALWAYS or getattr(state, part)]
        digests = {part: _write(draft / f"{part}.safetensors", getattr(state, part)) for part in held}
        index = {"round": state.round, "digests": digests, "progress": dict(progress), MADE_BY: config.to_json()}
        (draft / "state.json").write_text(json.dumps(index), encoding="utf-8")
        for path in [*draft.iterdir(), draft]:
            sync(path)
        shutil.rmtree(final, ignore_errors=True)
        draft.rename(final)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    sync(folder)
    stay = {folder / _name(number) for number in also}
    for old in checkpoints(folder)[:-keep]:
        if old not in stay:
            shutil.rmtree(old, ignore_errors=True)
    return final


def forget(folder: Path, number: int) -> None:
    """Remove the checkpoints of all rounds after `number`; there may be none yet."""
    if not folder.exists():
        return
    for path in checkpoints(folder):
        if int(path.name.removeprefix("round-")) > number:
            shutil.rmtree(path)
    sync(folder)


def _name(number: int) -> str:
    return f"round-{number:04d}"


def load(folder: Path, config: RunConfig | None = None) -> tuple[ServerState, dict[str, Any]] | None:
    """Load the newest complete checkpoint.

    A folder that cannot be read, or whose tensors do not match their digests, is passed over.

    Args:
        folder: of all checkpoints.
        config: the run that goes on; None to look at it, whoever made it.

    Returns:
        The state and its progress values; None where there is no complete checkpoint.

    Raises:
        UserError: another configuration made it.
    """
    for path in reversed(checkpoints(folder)):
        if (found := _read(path)) is not None:
            state, index = found
            if config is not None:
                check_made_by(index.get(MADE_BY), config, path.name)
            return state, index["progress"]
    return None


def load_round(folder: Path, number: int) -> ServerState | None:
    """The state after one round; None where its checkpoint is not there or not complete."""
    found = _read(folder / _name(number))
    return found[0] if found else None


def _read(path: Path) -> tuple[ServerState, dict[str, Any]] | None:
    """The state in a checkpoint and its index; None where it is not complete."""
    try:
        index = json.loads((path / "state.json").read_text(encoding="utf-8"))
        held = [part for part in _PARTS if part in _ALWAYS or part in index["digests"]]
        parts = {part: load_file(path / f"{part}.safetensors") for part in held}
    except Exception:  # safetensors raises its own error type for a torn file
        return None
    if any(digest(parts[part]) != index["digests"][part] for part in held):
        return None
    return ServerState(round=index["round"], **parts), index


def _write(path: Path, state: StateDict) -> str:
    # As bytes: safetensors' own writer hides a full disk behind an error type of its own.
    path.write_bytes(pack({name: tensor.contiguous() for name, tensor in state.items()}))
    return digest(state)
