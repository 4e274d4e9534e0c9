"""Replay: the rows of earlier tasks that a client keeps on its own disk, and what a visit trains on in a stage.

Which rows stay is decided by a keyed hash of each row and by nothing else, so it does not matter in which order or how
often rows are offered, and a run that goes back to an earlier round finds the buffer as it was. No row, digest or size
of the buffer is sent anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from apiary.config.schema import RunConfig
from apiary.core.files import write_atomic
from apiary.core.stages import rounds_of, stage_of
from apiary.data import store
from apiary.data.examples import Example
from apiary.data.stages import stage_numbers
from apiary.data.turns import turn_values, turns_of_values
from client.continual.buffer import Buffer, BufferedRow, Rule, admit, buffer_rule
from client.round_files import RoundFiles, sound_before
from client.state import Memory
from client.training.trainer import Cursor

_KEPT_BACK = 1  # a run that was killed goes back a round or two: at one round a stage, to the stage before


class StageData(NamedTuple):
    """What a visit trains on, and where it stands in its stage, which is a training of its own."""

    stage: int  # from 0
    new: Sequence[Example]
    replay: tuple[BufferedRow, ...]
    cursor: Cursor  # in the new rows
    replay_cursor: Cursor
    rounds_before: int  # rounds of this stage that are over
    rounds: int  # of this stage, all told


# -- the buffer -------------------------------------------------------------------------------------


def load(folder: Path, stages: int) -> tuple[BufferedRow, ...]:
    """The rows kept of the first `stages` stages; none where nothing is stored.

    Raises:
        ValueError: the file was torn or edited.
    """
    path = _files(folder).path(stages)
    if not path.exists():
        return ()
    return tuple(map(_row, path.read_text(encoding="utf-8").splitlines()))


def save(folder: Path, stages: int, rows: Iterable[BufferedRow]) -> None:
    """Write what is kept of the first `stages` stages, whole or not at all, for the owner's eyes only."""
    folder.mkdir(parents=True, exist_ok=True)
    _write(_files(folder).path(stages), rows)


def remove(folder: Path, digests: Collection[str]) -> int:
    """Delete rows from every stored version, and return how many there were.

    A row that still stands in the site's data may come back when the next stage begins: take it out there first.
    """
    for draft in folder.glob(".buffer-*"):
        draft.unlink(missing_ok=True)
    wanted, removed = set(digests), set[str]()
    for number in _files(folder).numbers():
        rows = load(folder, number)
        if gone := {row.digest for row in rows} & wanted:
            removed |= gone
            _write(_files(folder).path(number), (row for row in rows if row.digest not in wanted))
    return len(removed)


def _row(line: str) -> BufferedRow:
    try:
        values = {"tools": "", **json.loads(line)}
        match [values.get(name) for name in ("digest", "stage", "turns", "tags", "tools")]:
            case [str(digest), int(stage), list(turns), dict(tags), str(tools)]:
                if all(isinstance(tag, str) for tag in tags.values()):
                    return BufferedRow(digest, stage, Example(turns_of_values(turns), tags, tools))
    except (TypeError, ValueError):  # no JSON object, or turns of another shape
        pass
    raise ValueError("a buffer file does not hold rows: was it edited? Remove it, and the stage's buffer is made again")


def _line(row: BufferedRow) -> str:
    example = row.example
    values = {"digest": row.digest, "stage": row.stage, "turns": turn_values(example.turns), "tags": dict(example.tags)}
    return json.dumps(values | ({"tools": example.tools} if example.tools else {})) + "\n"


def _write(path: Path, rows: Iterable[BufferedRow]) -> None:
    write_atomic(path, "".join(map(_line, rows)), private=True)


def _files(folder: Path) -> RoundFiles:
    """The versions of the buffer, by how many stages they hold; an older one goes once its stage is over."""
    return RoundFiles(folder, "buffer", ".jsonl")


# -- a visit ----------------------------------------------------------------------------------------


def prepare(
    rows: Sequence[Example], folder: Path, client: str, config: RunConfig, number: int, past: Memory
) -> StageData:
    """What a client trains on in a round. Without stages that is all of its rows, with nothing to replay.

    At the first visit in a stage the rows of all earlier stages are offered to the buffer, and those of the stage
    itself to its next version, which is used from the next stage on: old rows may leave the site's data once a stage is
    over, and no row is new and replayed at the same time.

    Args:
        rows: the client's training rows, curated if they are to be.
        folder: the client's own folder of this run.
        client: its name.
        config: the run.
        number: the round, from 1.
        past: the client's memory before this round.
    """
    stages = config.continual.stages
    if not stages:
        return StageData(0, rows, (), past.cursor, Cursor(), number - 1, config.rounds)
    stage = stage_of(number, config.rounds, len(stages))
    of = stage_numbers(rows, config)
    parts = [store.pick(rows, np.flatnonzero(of == s)) for s in range(len(stages))]
    entered = past.round > 0 and past.stage == stage
    kept = _kept(
        folder, buffer_rule(config.continual, config.seed, client, int((of >= 0).sum())), parts, stage, entered
    )
    cursor, replay = (past.cursor, past.replay) if entered else (Cursor(), Cursor())
    _forget_before(
        folder, min(stage - _KEPT_BACK, stage_of(sound_before(config, number) + 1, config.rounds, len(stages)))
    )
    planned = rounds_of(stage, config.rounds, len(stages))
    return StageData(stage, parts[stage], kept, cursor, replay, number - planned.start, len(planned))


def _kept(
    folder: Path, rule: Rule, parts: Sequence[Sequence[Example]], stage: int, entered: bool
) -> tuple[BufferedRow, ...]:
    """The buffer of a stage; makes it, and the next one ahead of time, when the stage is entered."""
    _forget_beyond(folder, stage + 1)
    if entered or rule.rows == 0 or rule.chance == 0:
        return load(folder, stage)
    buffer = Buffer(rule, load(folder, stage))
    for earlier in range(stage):
        buffer = admit(buffer, parts[earlier], earlier)
    if stage:
        save(folder, stage, buffer.rows)
    save(folder, stage + 1, admit(buffer, parts[stage], stage).rows)
    return buffer.rows


def _forget_before(folder: Path, stages: int) -> None:
    """Remove the versions that no round which may be done again begins with."""
    for number in _files(folder).numbers():
        if number < stages:
            _files(folder).path(number).unlink(missing_ok=True)


def _forget_beyond(folder: Path, stages: int) -> None:
    """Remove what a run that crashed wrote ahead in later stages, before they are done again."""
    for number in _files(folder).numbers():
        if number > stages:
            _files(folder).path(number).unlink(missing_ok=True)
