"""What a client remembers between rounds, in files under its own organisation's folder: see `client.round_files`.

Of what the server sends in changes there is one copy, the newest, for
the server asks which one that is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from safetensors.torch import load_file
from safetensors.torch import save as pack

from apiary.core.files import finite, for_owner, own_folder, write_atomic
from apiary.core.tensors import StateDict
from client.round_files import RoundFiles
from client.training.trainer import Cursor, Observer, StepRecord

_COPY = "copy.safetensors"  # of the server's adapter


class Memory(NamedTuple):
    """A client's state after a round."""

    round: int = 0  # 0 = never trained
    cursor: Cursor = Cursor()
    stage: int = 0  # of that round, from 0
    replay: Cursor = Cursor()  # in the rows kept of earlier stages
    choice: int = 0  # the round in which the rows were chosen that the cursor walks through


def load(folder: Path, before: int) -> Memory:
    """The newest memory of a round earlier than `before`; a blank one when there is none."""
    files = _files(folder)
    number = files.newest(before)
    if number is None:
        return Memory()
    values = json.loads(files.path(number).read_text(encoding="utf-8"))
    cursors = {name: Cursor(*values.get(name, ())) for name in ("cursor", "replay")}
    return Memory(**{**values, **cursors})


def save(folder: Path, memory: Memory) -> None:
    """Write the memory of a round. A straggler that ends after a later round has been saved changes nothing."""
    _files(folder).write(memory.round, json.dumps(memory._asdict()))


def load_copy(folder: Path) -> StateDict | None:
    """The server's adapter as this client holds it; None where it holds none that can be read."""
    try:
        return load_file(folder / _COPY)
    except Exception:  # not there, or torn: safetensors raises an error type of its own
        return None


def save_copy(folder: Path, adapter: StateDict) -> None:
    """Write the server's adapter in place of the one before."""
    own_folder(folder)
    body = pack({name: tensor.contiguous() for name, tensor in adapter.items()})
    write_atomic(folder / _COPY, body, private=True, of_round=True)  # torn, it counts as none


def step_log(folder: Path, number: int) -> Observer:
    """An observer that adds each step of round `number` to `steps.jsonl`: the client's own, which nobody else is sent.

    A round that is done again after a crash is told again.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def observe(record: StepRecord) -> None:
        with open(folder / "steps.jsonl", "a", encoding="utf-8", opener=for_owner) as file:
            file.write(json.dumps(finite({"round": number, **record._asdict()})) + "\n")

    return observe


def _files(folder: Path) -> RoundFiles:
    return RoundFiles(folder, "round", ".json")
