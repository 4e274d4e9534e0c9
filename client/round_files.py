"""What a client keeps by round: one file for each kind and round in its own folder of the run, for its owner alone.

A server that was killed goes back to an earlier round; it then finds the client as it was at that moment, and the run
repeats itself bit for bit. So a file is written whole or not at all, the newest few are kept, and `begin` removes what
a crashed run left of the round that is about to be done, and of later ones. Everything of a round is saved before the
memory of that round (`client.state`), which says that the round was done. A run whose loss explodes goes back further,
to `sound_before`, and so what a client was at that round stays too.

Of virtual clients a round's files need not be on the disk before its checkpoint: see `flushed_together`.

Answers under differential privacy are kept by request and never taken back: see `client.releases`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from safetensors.torch import load_file
from safetensors.torch import save as pack
from torch import Tensor

from apiary.config.schema import RunConfig
from apiary.core.files import is_draft, own_folder, remove, write_atomic
from apiary.core.tensors import StateDict
from strategies.local import LocalAlgorithm

_NAME = re.compile(r"[a-z]+-(\d{4,})\.(json|safetensors)")  # a release has its request in its name besides


def begin(folder: Path, number: int) -> None:
    """Make a client's folder ready for round `number`: drafts, and files of that round and later ones, are removed."""
    own_folder(folder)
    for name in os.listdir(folder):
        path = folder / name
        if is_draft(path):
            remove(path)
        elif (match := _NAME.fullmatch(name)) and int(match[1]) >= number:
            path.unlink()


def sound_before(config: RunConfig, number: int) -> int:
    """The round that a run goes back to if its loss explodes in round `number` or the next; 0 = to the beginning."""
    every = config.evaluate.every
    return (number - 1) // every * every if every else 0


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
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError:
            return []
        start, end = len(self.kind) + 1, -len(self.suffix)
        ours = (name for name in names if name.startswith(f"{self.kind}-") and name.endswith(self.suffix))
        return sorted(int(name[start:end]) for name in ours)

    def newest(self, before: int) -> int | None:
        """The newest round earlier than `before` that there is a file of."""
        return max((number for number in self.numbers() if number < before), default=None)

    def write(self, number: int, body: str | bytes, *, back: Collection[int] = ()) -> None:
        """Write the file of a round, and remove all but the newest `keep` and what was the newest in the rounds `back`.

        A straggler that ends after a later round has been saved changes nothing.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        earlier = self.numbers()
        if earlier and earlier[-1] > number:
            return
        write_atomic(self.path(number), body, private=True, of_round=True)
        stay = {max((one for one in earlier if one <= round_), default=0) for round_ in back}
        for old in sorted({*earlier, number})[: -self.keep]:
            if old not in stay:
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


def save(folder: Path, kind: str, number: int, tensors: StateDict, *, back: Collection[int] = ()) -> None:
    """Write the tensors of a round, and remove all but the newest few and what was the newest in the rounds `back`."""
    body = pack({name: tensor.contiguous() for name, tensor in tensors.items()})
    RoundFiles(folder, kind, ".safetensors").write(number, body, back=back)


def of_method(folder: Path, local: LocalAlgorithm, number: int, last_round: int) -> StateDict:
    """What a client's half of a method kept for a visit of round `number`; empty for one that keeps nothing.

    Args:
        folder: of the client's state in the run.
        local: the client's half.
        number: the round.
        last_round: the last one in which, the server says, its answer counted.

    Raises:
        apiary.core.errors.StateLost: the file of that round is gone, and the method's server counts on it.
    """
    if not local.keeps:
        return {}
    return load(folder, local.keeps, last_round) if local.resumes == "counted" else newest(folder, local.keeps, number)


def save_of_method(
    folder: Path, local: LocalAlgorithm, number: int, tensors: StateDict, last_round: int, config: RunConfig
) -> None:
    """Write what a client's half of a method keeps of round `number`; the state that it counts on stays.

    Where the method's server counts on it, that is the state of `last_round`, and of what was `last_round` in the first
    visit after the round that a run goes back to: what is older then goes, and stays from then on.
    """
    back = {sound := sound_before(config, number)}
    if local.resumes == "counted":
        there = RoundFiles(folder, local.keeps, ".safetensors").numbers()
        first = not any(sound < one < number for one in there)
        back |= {last_round} if first else {last_round, *(one for one in there if one <= sound)}
    save(folder, local.keeps, number, tensors, back=back)
