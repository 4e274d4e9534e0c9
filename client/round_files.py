"""What a client keeps by round: one file for each kind and round in its own folder of the run, for its owner alone.

A server that was killed goes back to an earlier round; it then finds the client as it was at that moment, and the run
repeats itself bit for bit. So a file is written whole or not at all, the newest few are kept, and `begin` removes what
a crashed run left of the round that is about to be done, and of later ones. Everything of a round is saved before the
memory of that round (`client.state`), which says that the round was done.

Answers under differential privacy are kept by request and never taken back: see `client.releases`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from safetensors.torch import load_file
from safetensors.torch import save as pack
from torch import Tensor

from apiary.core.files import own_folder, sweep, write_atomic
from apiary.core.tensors import StateDict

_NAME = re.compile(r"[a-z]+-(\d{4,})\.(json|safetensors)")  # a release has its request in its name besides


def begin(folder: Path, number: int) -> None:
    """Make a client's folder ready for round `number`: drafts, and files of that round and later ones, are removed."""
    own_folder(folder)
    sweep(folder)
    for path in folder.iterdir():
        if (match := _NAME.fullmatch(path.name)) and int(match[1]) >= number:
            path.unlink()


class RoundFiles(NamedTuple):
    """The files of one kind."""

    folder: Path
    kind: str  # the first part of the files' names
    suffix: str  # the last one, such as ".json"
    keep: int = 3  # how many of the newest are kept

    def path(self, number: int) -> Path:
        """The file of a round, whether or not it is there."""
        return self.folder / f"{self.kind}-{number:04d}{self.suffix}"

    def numbers(self) -> list[int]:
        """The rounds that there is a file of, in order."""
        found = self.folder.glob(f"{self.kind}-*{self.suffix}")
        return sorted(int(path.name[len(self.kind) + 1 : -len(self.suffix)]) for path in found)

    def newest(self, before: int) -> int | None:
        """The newest round earlier than `before` that there is a file of."""
        return max((number for number in self.numbers() if number < before), default=None)

    def write(self, number: int, body: str | bytes, *, also: int = 0) -> None:
        """Write the file of a round, and remove all but the newest `keep` and that of round `also`.

        A straggler that ends after a later round has been saved changes nothing.
        """
        if any(later > number for later in self.numbers()):
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path(number), body, private=True)
        for old in self.numbers()[: -self.keep]:
            if old != also:
                self.path(old).unlink(missing_ok=True)


def load(folder: Path, kind: str, number: int | None) -> dict[str, Tensor]:
    """The tensors that were kept in round `number`; nothing where there is no such file, or no such round."""
    if number is None:
        return {}
    path = RoundFiles(folder, kind, ".safetensors").path(number)
    return load_file(path) if path.exists() else {}


def newest(folder: Path, kind: str, before: int) -> dict[str, Tensor]:
    """The tensors that were kept in the newest round earlier than `before`; nothing where there is none."""
    return load(folder, kind, RoundFiles(folder, kind, ".safetensors").newest(before))


def save(folder: Path, kind: str, number: int, tensors: StateDict, *, also: int = 0) -> None:
    """Write the tensors of a round, and remove all but the newest few and those of round `also`."""
    body = pack({name: tensor.contiguous() for name, tensor in tensors.items()})
    RoundFiles(folder, kind, ".safetensors").write(number, body, also=also)
