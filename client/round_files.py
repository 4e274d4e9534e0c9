"""Tensors that a client keeps from round to round, beside its memory: a file for each kind and round, for its owner.

They follow the rules of `client.state`: a server that was killed and goes back to an earlier round finds what the
client had at that moment. Save them before the memory of their round, which says that the round was done.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from safetensors.torch import save as pack
from torch import Tensor

from apiary.core.files import write_atomic
from apiary.core.tensors import StateDict


def load(folder: Path, kind: str, number: int) -> dict[str, Tensor]:
    """What was kept in round `number`; nothing where there is no such file."""
    path = _path(folder, kind, number)
    return load_file(path) if path.exists() else {}


def newest(folder: Path, kind: str, before: int) -> dict[str, Tensor]:
    """What was kept in the newest round earlier than `before`; nothing where there is none."""
    earlier = [number for number in _rounds(folder, kind) if number < before]
    return load(folder, kind, max(earlier)) if earlier else {}


def save(folder: Path, kind: str, number: int, tensors: StateDict, *, keep: int = 3, also: int = 0) -> None:
    """Write what is to be kept in a round, atomically, and remove all but the newest `keep` and round `also`.

    A straggler that ends after a later round has been saved changes nothing.
    """
    if any(later > number for later in _rounds(folder, kind)):
        return
    folder.mkdir(parents=True, exist_ok=True)
    body = pack({name: tensor.contiguous() for name, tensor in tensors.items()})
    write_atomic(_path(folder, kind, number), body, private=True)
    for old in sorted(_rounds(folder, kind))[:-keep]:
        if old != also:
            _path(folder, kind, old).unlink(missing_ok=True)


def forget_from(folder: Path, kind: str, number: int) -> None:
    """Remove what a run that crashed left of round `number` and later, before that round is done again."""
    for later in _rounds(folder, kind):
        if later >= number:
            _path(folder, kind, later).unlink(missing_ok=True)


def _path(folder: Path, kind: str, number: int) -> Path:
    return folder / f"{kind}-{number:04d}.safetensors"


def _rounds(folder: Path, kind: str) -> list[int]:
    return [int(path.stem.removeprefix(f"{kind}-")) for path in folder.glob(f"{kind}-*.safetensors")]
