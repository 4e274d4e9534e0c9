"""Instruction data: rows become checked conversations.

Every row either becomes an `Example` or is counted in the `FileReport` of its file under its first
problem, so that `rows == usable + all counts` holds for each report. What was read otherwise than it
stands in the file is counted there as a remark.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from apiary.core.errors import UserError
from apiary.data import store
from apiary.data.columns import (
    NO_ANSWER,
    POINTS,
    PREFERENCES,
    UNWANTED,
    Columns,
    Reading,
    check_columns,
    columns_of,
    given_columns,
    has_known,
    read_row,
    with_tools,
    with_turns,
)
from apiary.data.fields import RowProblem, is_absent, scalar_text
from apiary.data.sources import RawFile, Unreadable, load
from apiary.data.turns import Turn

__all__ = ["Example", "FileReport", "Place", "Source", "answer", "as_read", "check", "read"]

OVER_MAX_ROWS = "left out by data.max_rows"

_FIRST_ROWS = 5  # row numbers kept per problem
_KINDS = 30  # of problems and of remarks that a report tells apart: names in a file could be without end
_MORE = "more of other kinds"


class Example(NamedTuple):
    """A conversation, by rule one that ends in an assistant turn.

    tags: the row's other scalar columns; tools: what the assistant may call, a JSON list as text, "" for none.
    """

    turns: tuple[Turn, ...]
    tags: Mapping[str, str]
    tools: str = ""


class FileReport(NamedTuple):
    """What became of a file's rows.

    problems: reason -> (count, first 1-based row numbers), of rows that are left out; remarks: the same of what was
    read otherwise than it stands, in rows that are usable; notes: on how the file was read.
    """

    name: str
    rows: int
    usable: int
    problems: Mapping[str, tuple[int, tuple[int, ...]]]
    remarks: Mapping[str, tuple[int, tuple[int, ...]]] = MappingProxyType({})
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """A line for each note, problem and remark, with the first rows that have it."""
        return [f"{self.name}: {note}" for note in self.notes] + [
            f"{self.name}: {count} of {self.rows} rows{what}: {reason}"
            + (f" ({rows_text(rows, count)})" if rows else "")
            for what, found in ((" left out", self.problems), ("", self.remarks))
            for reason, (count, rows) in found.items()
        ]


def rows_text(rows: Sequence[int], count: int) -> str:
    """The first row numbers of `count`, as a warning names them."""
    first = rows[:_FIRST_ROWS]
    return f"rows {', '.join(map(str, first))}{', ...' if count > len(first) else ''}"


class Place(NamedTuple):
    """Where an example came from: index into the reports, and its 1-based row number there."""

    file: int
    row: int


class Source(NamedTuple):
    """Checked examples, the origin (file stem or task) of each, and the source's own test; large ones are on disk."""

    examples: Sequence[Example]
    origins: Sequence[str]
    test: Sequence[Example] | None
    reports: tuple[FileReport, ...]
    places: Sequence[Place] = ()


def read(
    source: str,
    *,
    split: str = "train",
    columns: Mapping[str, str] = MappingProxyType({}),
    max_rows: int | None = None,
    key: str = "data.source",
    query: str | None = None,
    guess: bool = True,
) -> Source:
    """The checked examples of a file, a folder, a hub data set or the built-in corpus.

    Args:
        source: what `data.source` names.
        split: split of a hub data set.
        columns: the user's own names for instruction, input and output, or for messages.
        max_rows: keep this many examples, taken at even distances so that every file has its share.
        key: what error lines call the source.
        query: of a database.
        guess: read text that is not UTF-8 by a guess; False where no row may decide about another.

    Raises:
        UserError: nothing there, unknown format, or a file without a usable row.
    """
    return check(load(source, split, key, query, guess=guess), columns=columns, max_rows=max_rows)


def check(
    files: Sequence[RawFile], *, columns: Mapping[str, str] = MappingProxyType({}), max_rows: int | None = None
) -> Source:
    """As `read`, of files that were loaded before."""
    given = given_columns(columns)
    on_disk = not all(store.is_small(file.rows) for file in files)  # what is made of rows takes about as much
    train, test = _Kept(on_disk), _Kept(on_disk)
    reports: list[FileReport] = []
    for index, file in enumerate(files):
        report = _check_file(file, given, index, test if file.held_out else train)
        reports.append(report._replace(notes=file.notes))
    held_out = test.examples() if any(file.held_out for file in files) else None
    whole = Source(train.examples(), train.origins(files), held_out, tuple(reports), train.places())
    return whole if max_rows is None else _thin(whole, max_rows)


class _Kept:
    """The usable rows of files. Owns them, and where each came from."""

    def __init__(self, on_disk: bool) -> None:
        self._on_disk = on_disk
        self._examples: list[Example] | store.OnDisk[Example] = store.OnDisk() if on_disk else []
        self._files, self._rows = array("q"), array("q")

    def append(self, example: Example, file: int, row: int) -> None:
        """Add one more, with the index of its file and its number there."""
        self._examples.append(example)
        self._files.append(file)
        self._rows.append(row)

    def examples(self) -> Sequence[Example]:
        return self._examples if self._on_disk else tuple(self._examples)

    def origins(self, files: Sequence[RawFile]) -> Sequence[str]:
        """The origin of each."""
        if self._on_disk:
            return store.Mapped(lambda file: files[file].origin, np.frombuffer(self._files, np.int64))
        return tuple(files[file].origin for file in self._files)

    def places(self) -> Sequence[Place]:
        """Where each stands."""
        if self._on_disk:
            return store.Mapped(_place, np.stack([np.frombuffer(a, np.int64) for a in (self._files, self._rows)], 1))
        return tuple(map(Place, self._files, self._rows))


def _place(pair: store.Indices) -> Place:
    return Place(*pair.tolist())


def _thin(source: Source, max_rows: int) -> Source:
    n = len(source.examples)
    if n <= max_rows:
        return source
    wanted = np.zeros(n, bool)
    wanted[[i * n // max_rows for i in range(max_rows)]] = True
    kept = np.flatnonzero(wanted)
    return source._replace(
        examples=store.pick(source.examples, kept),
        origins=store.pick(source.origins, kept),
        places=store.pick(source.places, kept),
        reports=take_out(source.reports, store.pick(source.places, np.flatnonzero(~wanted)), OVER_MAX_ROWS),
    )


def take_out(reports: Sequence[FileReport], places: Iterable[Place], reason: str) -> tuple[FileReport, ...]:
    """The reports with some of the usable rows counted under `reason` instead."""
    lost: dict[int, Counts] = {}
    for place in places:
        lost.setdefault(place.file, Counts()).add(reason, place.row)
    return tuple(
        report._replace(
            usable=report.usable - lost[i].found()[reason][0],
            problems={**report.problems, **lost[i].found()},
        )
        if i in lost
        else report
        for i, report in enumerate(reports)
    )


def _check_file(file: RawFile, given: Columns | None, index: int, kept: _Kept) -> FileReport:
    """Keep the usable rows of a file, the `index`-th, and report on all of them.

    Raises:
        UserError: the file has no usable row, or not the columns that the user named.
    """
    problems, remarks = Counts(), Counts()
    first: tuple[int, str, str] | None = None  # the first problem: row, reason, what helps
    names: dict[str, None] = {}  # of columns, in order of appearance
    total, usable, known = 0, 0, False
    for number, row in file.rows:
        total += 1
        if isinstance(row, Mapping):
            names |= dict.fromkeys(row)
            known = known or given is not None or has_known(row)
        try:
            example, said = _example(row, given)
        except RowProblem as problem:
            problems.add(str(problem), number)
            first = first or (number, str(problem), problem.fix or _fix(str(problem)))
            continue
        usable += 1
        kept.append(example, index, number)
        for remark in said:
            remarks.add(remark, number)
    if not total:
        raise UserError(f"{file.name}: empty, it holds no rows; remove it or fill it")
    if names and not (first and first[1] == PREFERENCES):
        check_columns(file.name, list(names), given, known)
    if first is not None and not usable:
        number, reason, fix = first
        raise UserError(
            f"{file.name}: none of its {total} rows is usable; the first problem, in row {number}, is: {reason}; {fix}"
        )
    return FileReport(file.name, total, usable, problems.found(), remarks.found())


class Counts:
    """How many rows have what, with the numbers of the first ones."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, tuple[int, ...]]] = {}

    def add(self, what: str, row: int) -> None:
        """Count a row under `what`."""
        if what not in self._found and len(self._found) >= _KINDS:
            what = _MORE
        count, rows = self._found.get(what, (0, ()))
        self._found[what] = (count + 1, (*rows, row) if count < _FIRST_ROWS else rows)

    def found(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """How many rows have what, and the first of them."""
        return self._found


def as_read(
    files: Sequence[RawFile],
    rows: Iterable[tuple[Place, Example]],
    *,
    columns: Mapping[str, str] = MappingProxyType({}),
) -> list[dict[str, object]]:
    """Rows as they stand in their files, with what the examples now say in the fields that they came from.

    Args:
        files: what the examples were made of by `check`.
        rows: where each example came from, and what it says now.
        columns: as for `check`.

    Raises:
        ValueError: an example has other turns than its row.
    """
    given = given_columns(columns)
    numbers = [np.fromiter((number for number, _ in file.rows), np.int64, len(file.rows)) for file in files]
    rewritten = []
    for place, example in rows:
        row = files[place.file].rows[int(np.searchsorted(numbers[place.file], place.row))][1]
        if not isinstance(row, Mapping):
            raise ValueError(f"row {place.row} of {files[place.file].name} is no row of these files")
        columns_here = columns_of(row, given)
        rewritten.append(with_turns(with_tools(row, columns_here, example.tools), columns_here, example.turns))
    return rewritten


def _fix(reason: str) -> str:
    for words, fix in _FIXES.items():
        if any(word in reason for word in words):
            return fix
    return "fill it in, or name your columns with data.columns"


# Words of a reason -> what helps; the first that has one.
_FIXES: Mapping[tuple[str, ...], str] = {
    ("part of",): "only text is learnt; take such messages out",
    ("call", "tool"): 'a call is {"name": ..., "arguments": {...}}, and a tool has a name',
    ("is trained",): "give the answers to learn the weight 1",
    (NO_ANSWER,): "give answers, or take such rows out",
    (UNWANTED, "nested more"): "take such rows out",
    (POINTS,): "the model would learn a number, without what it stands for",
    ("bad JSON", "UTF-8"): "expected one JSON object per line, in UTF-8",
    ("role", "turn"): "roles are system, user (human), assistant (gpt) and tool; the assistant answers the user",
    ("not an object",): "expected an object with a value for each column",
}


def _example(row: object, given: Columns | None) -> tuple[Example, tuple[str, ...]]:
    """The example in a row, and the remarks on it."""
    if isinstance(row, Unreadable):
        raise RowProblem(row.reason)
    if not isinstance(row, Mapping):
        raise RowProblem("not an object")
    reading = read_row(row, columns_of(row, given), is_given=given is not None)
    return Example(reading.turns, _tags(row, reading), reading.tools), reading.remarks


def _tags(row: Mapping[str, object], reading: Reading) -> dict[str, str]:
    tags = {name: _tag(value) for name, value in row.items() if name not in reading.used}
    return {name: tag for name, tag in tags.items() if tag}


def _tag(value: object) -> str:
    text = "" if is_absent(value) else (scalar_text(value) or "").strip()
    return text.encode("utf-8", "replace").decode("utf-8")


def answer(example: Example) -> str:
    """The text of the last assistant turn."""
    return example.turns[-1].text
