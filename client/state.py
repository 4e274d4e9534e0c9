"""What a client remembers between rounds, in files under its own organisation's folder: see `client.round_files`.

Of what the server sends in changes there is one copy, the newest, for
the server asks which one that is.
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from safetensors.torch import load_file
from safetensors.torch import save as pack

from apiary.core.files import finite, for_owner, own_folder, write_atomic
from apiary.core.messages import Fingerprint
from apiary.core.tensors import StateDict
from client.round_files import RoundFiles
from client.training.trainer import Cursor, Observer, StepRecord

_COPY = "copy.safetensors"  # of the server's adapter
_STEPS, _FINGERPRINT = "steps.jsonl", "fingerprint.json"


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


def save(folder: Path, memory: Memory, sound: int = 0) -> None:
    """Write the memory of a round, and keep that of the rounds just before and of round `sound`.

    A straggler that ends after a later round has been saved changes nothing.
    """
    _files(folder).write(memory.round, json.dumps(memory._asdict()), back={sound})


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


def step_log(folder: Path, number: int, *, own: bool = False) -> Observer:
    """An observer that adds each step of round `number` to `steps.jsonl`: the client's own, which nobody else is sent.

    A round that is done again after a crash is told again. Steps of an `own` adapter beside what is sent say so.
    """
    folder.mkdir(parents=True, exist_ok=True)
    whose = {"own": True} if own else {}

    def observe(record: StepRecord) -> None:
        with open(folder / _STEPS, "a", encoding="utf-8", opener=for_owner) as file:
            file.write(json.dumps(finite({"round": number, **whose, **record._asdict()})) + "\n")

    return observe


def steps_of(folder: Path) -> dict[int, int]:
    """The optimizer steps of each round that the client has finished, by its step log; empty without one.

    What a round logged before a crash and logs again counts once, and rounds behind the newest memory, which a server
    that went back never did again, do not count.
    """
    last, seen = load(folder, sys.maxsize).round, dict[int, set[tuple[bool, int]]]()
    path = folder / _STEPS
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with suppress(ValueError, KeyError):  # a kill may have torn a line
            record = json.loads(line)
            step = (bool(record.get("own")), int(record["step"]))
            seen.setdefault(int(record["round"]), set()).add(step)
    return {number: len(steps) for number, steps in sorted(seen.items()) if number <= last}


def save_fingerprint(folder: Path, fingerprint: Fingerprint) -> None:
    """Write what the client told of its base, tokenizer, template and adapter in the handshake."""
    own_folder(folder)
    write_atomic(folder / _FINGERPRINT, json.dumps(fingerprint._asdict()), private=True)


def load_fingerprint(folder: Path) -> Fingerprint | None:
    """What `save_fingerprint` wrote; None where there is none that can be read."""
    try:
        return Fingerprint(**json.loads((folder / _FINGERPRINT).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # a run of an earlier version has none
        return None


def _files(folder: Path) -> RoundFiles:
    return RoundFiles(folder, "round", ".json")
