"""Instruction data: rows become checked conversations.

Every row either becomes an `Example` or is counted in the `FileReport` of its file under its first
problem, so that `rows == usable + all counts` holds for each report. What was read otherwise than it
stands in the file is counted there as a remark.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from apiary.core.errors import UserError
from apiary.data.columns import (
    NO_ANSWER,
    PREFERENCES,
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
    """Checked examples, the origin (file stem or task) of each, and the source's own test."""

    examples: tuple[Example, ...]
    origins: tuple[str, ...]
    test: tuple[Example, ...] | None
    reports: tuple[FileReport, ...]
    places: tuple[Place, ...] = ()


def read(
    source: str,
    *,
    split: str = "train",
    columns: Mapping[str, str] = MappingProxyType({}),
    max_rows: int | None = None,
    key: str = "data.source",
    query: str | None = None,
) -> Source:
    """The checked examples of a file, a folder, a hub data set or the built-in corpus.

    Args:
        source: what `data.source` names.
        split: split of a hub data set.
        columns: the user's own names for instruction, input and output, or for messages.
        max_rows: keep this many examples, taken at even distances so that every file has its share.
        key: what error lines call the source.
        query: of a database.

    Raises:
        UserError: nothing there, unknown format, or a file without a usable row.
    """
    return check(load(source, split, key, query), columns=columns, max_rows=max_rows)


def check(
    files: Sequence[RawFile], *, columns: Mapping[str, str] = MappingProxyType({}), max_rows: int | None = None
) -> Source:
    """As `read`, of files that were loaded before."""
    given = given_columns(columns)
    rows: list[tuple[Example, str, Place]] = []
    reports: list[FileReport] = []
    test: list[Example] | None = None
    for index, file in enumerate(files):
        checked, report = _check_file(file, given)
        reports.append(report._replace(notes=file.notes))
        if file.held_out:
            test = (test or []) + [example for _, example in checked]
        else:
            rows += [(example, file.origin, Place(index, row)) for row, example in checked]
    examples, origins, places = zip(*rows, strict=True)
    held_out = None if test is None else tuple(test)
    whole = Source(examples, origins, held_out, tuple(reports), places)
    return whole if max_rows is None else _thin(whole, max_rows)


def _thin(source: Source, max_rows: int) -> Source:
    n = len(source.examples)
    if n <= max_rows:
        return source
    kept = {i * n // max_rows for i in range(max_rows)}
    return _keep(source, [i in kept for i in range(n)], OVER_MAX_ROWS)


def _keep(source: Source, wanted: Sequence[bool], reason: str) -> Source:
    """`source` with only the wanted examples; the others are counted under `reason`."""
    kept = [i for i, wants in enumerate(wanted) if wants]
    return source._replace(
        examples=tuple(source.examples[i] for i in kept),
        origins=tuple(source.origins[i] for i in kept),
        places=tuple(source.places[i] for i in kept),
        reports=take_out(
            source.reports,
            (source.places[i] for i, wants in enumerate(wanted) if not wants),
            reason,
        ),
    )


def take_out(reports: Sequence[FileReport], places: Iterable[Place], reason: str) -> tuple[FileReport, ...]:
    lost: dict[int, list[int]] = {}
    for place in places:
        lost.setdefault(place.file, []).append(place.row)
    return tuple(
        report._replace(
            usable=report.usable - len(lost[i]),
            problems={**report.problems, reason: (len(lost[i]), tuple(lost[i][:_FIRST_ROWS]))},
        )
        if i in lost
        else report
        for i, report in enumerate(reports)
    )


def _check_file(file: RawFile, given: Columns | None) -> tuple[list[tuple[int, Example]], FileReport]:
    """The usable rows of a file with their numbers, and the report on all of them.

    Raises:
        UserError: the file has no usable row, or not the columns that the user named.
    """
    usable: list[tuple[int, Example]] = []
    problems, remarks = _Counts(), _Counts()
    first: tuple[int, str, str] | None = None  # the first problem: row, reason, what helps
    names: dict[str, None] = {}  # of columns, in order of appearance
    total, known = 0, False
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
        usable.append((number, example))
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
    return usable, FileReport(file.name, total, len(usable), problems.found(), remarks.found())


class _Counts:
    """How many rows have what, with the numbers of the first ones."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, tuple[int, ...]]] = {}

    def add(self, what: str, row: int) -> None:
        if what not in self._found and len(self._found) >= _KINDS:
            what = _MORE
        count, rows = self._found.get(what, (0, ()))
        self._found[what] = (count + 1, (*rows, row) if count < _FIRST_ROWS else rows)

    def found(self) -> dict[str, tuple[int, tuple[int, ...]]]:
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
    rows_of = [dict(file.rows) for file in files]
    rewritten = []
    for place, example in rows:
        row = rows_of[place.file][place.row]
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
