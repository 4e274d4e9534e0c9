"""Which of its rows a client trains on: chosen by curation, kept on its own disk, and found again by a resumed run.

A choice is the numbers of the kept rows, one file for each round in which one was made, so that a run that goes back to
an earlier round finds the choice of that moment. All of a run are kept: whoever compares with the client later has to
train on the same rows. What steps rewrote is not stored: it is written again from the rows.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from apiary.config.schema import CurateConfig
from apiary.core.messages import CurationCounts
from apiary.data.examples import Example
from client import curation
from client.round_files import RoundFiles

_log = logging.getLogger(__name__)


class Choice(NamedTuple):
    """The rows to train on, as they now read."""

    examples: tuple[Example, ...]
    counts: CurationCounts
    round: int  # in which it was made


def choose(
    rows: Sequence[Example],
    config: CurateConfig,
    context: curation.Context,
    folder: Path,
    number: int,
    known: Choice | None = None,
    *,
    empty_ok: bool = False,
) -> Choice:
    """The choice for a round: the stored one, or a new one where none is there or `curate.every` rounds are over.

    Args:
        rows: the client's training rows.
        config: the steps, and how often to choose.
        context: what the steps may know; its model, if any, holds the adapter of this round.
        folder: the client's own folder of this run.
        number: the round, from 1.
        known: the choice of an earlier call for the same rows, which spares making it again from the file.
        empty_ok: whether nothing may be left; see `curation.curate`.

    Raises:
        UserError: unknown steps or options, or nothing is left.
    """
    files = _files(folder)
    last = files.newest(number)
    due = last is None or (config.every and number - last >= config.every)
    if not due and known and known.round == last:
        return known
    digest = curation.digest(rows, config.steps)
    if last is not None and not due:
        stored = json.loads(files.path(last).read_text(encoding="utf-8"))
        if stored["digest"] == digest:
            again = curation.restore(rows, config.steps, stored["kept"], context)
            counts = CurationCounts(len(rows), len(again), stored["dropped"])
            return Choice(tuple(example for _, example in again), counts, last)
    new = curation.curate(rows, config.steps, context, empty_ok=empty_ok)
    for line in new.warnings:  # for the owner: what a client logs stays on its machine
        _log.warning("%s: %s", context.client, line)
    files.write(number, json.dumps({"digest": digest, "kept": new.kept, "dropped": new.dropped}))
    return Choice(new.examples, CurationCounts(len(rows), len(new.rows), new.dropped), number)


def choices(
    rows: Sequence[Example], config: CurateConfig, context: curation.Context, folder: Path
) -> dict[int, tuple[Example, ...]]:
    """The choices of a run, by the round in which each was made: the kept rows as they were then trained on.

    Args:
        rows: the client's training rows.
        config: the steps that chose.
        context: what the steps knew; no model is needed.
        folder: the client's own folder of this run.

    Raises:
        ValueError: a choice is of other rows or steps than these.
    """
    files, digest = _files(folder), curation.digest(rows, config.steps)
    found = {}
    for number in files.numbers():
        stored = json.loads(files.path(number).read_text(encoding="utf-8"))
        if stored["digest"] != digest:
            raise ValueError(f"the rows that were chosen in round {number} are no longer there: rows or steps differ")
        again = curation.restore(rows, config.steps, stored["kept"], context)
        found[number] = tuple(example for _, example in again)
    return found


def _files(folder: Path) -> RoundFiles:
    return RoundFiles(folder, "curated", ".json", keep=sys.maxsize)
