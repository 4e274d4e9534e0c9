"""Instruction data: rows become checked conversations.

Every row either becomes an `Example` or is counted in the `FileReport` of its file under its first
problem, so that `rows == usable + all counts` holds for each report.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from apiary.core.errors import UserError
from apiary.data.columns import (
    Columns,
    RowProblem,
    check_columns,
    columns_of,
    given_columns,
    is_absent,
    scalar_text,
    turns_of,
    with_turns,
)
from apiary.data.sources import RawFile, Unreadable, load
from apiary.data.turns import Turn

__all__ = ["Example", "FileReport", "Place", "Source", "answer", "as_read", "check", "read"]

OVER_MAX_ROWS = "left out by data.max_rows"

_FIRST_ROWS = 5  # row numbers kept per problem


class Example(NamedTuple):
    """A conversation, by rule one that ends in an assistant turn.

    tags: the row's other scalar columns; tools: what the assistant may call, a JSON list as text, "" for none.
    """

    turns: tuple[Turn, ...]
    tags: Mapping[str, str]
    tools: str = ""


class FileReport(NamedTuple):
    """What became of a file's rows; problems: reason -> (count, first 1-based row numbers)."""

    name: str
    rows: int
    usable: int
    problems: Mapping[str, tuple[int, tuple[int, ...]]]
    notes: tuple[str, ...] = ()  # on how the file was read

    def lines(self) -> list[str]:
        """A line for each problem, with the first rows that have it."""
        return [f"{self.name}: {note}" for note in self.notes] + [
            f"{self.name}: {count} of {self.rows} rows left out: {problem}"
            + (f" ({rows_text(rows, count)})" if rows else "")
            for problem, (count, rows) in self.problems.items()
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
    if not file.rows:
        raise UserError(f"{file.name}: empty, it holds no rows; remove it or fill it")
    if objects := [row for _, row in file.rows if isinstance(row, Mapping)]:
        check_columns(file.name, objects, given)
    usable: list[tuple[int, Example]] = []
    found: dict[str, list[int]] = {}
    for number, row in file.rows:
        try:
            usable.append((number, _example(row, given)))
        except RowProblem as problem:
            found.setdefault(str(problem), []).append(number)
    if not usable:
        reason, numbers = next(iter(found.items()))
        raise UserError(
            f"{file.name}: none of its {len(file.rows)} rows is usable; the first problem, "
            f"in row {numbers[0]}, is: {reason}; {_fix(reason)}"
        )
    problems = {reason: (len(rows), tuple(rows[:_FIRST_ROWS])) for reason, rows in found.items()}
    return usable, FileReport(file.name, len(file.rows), len(usable), problems)


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
        rewritten.append(with_turns(row, columns_of(row, given), example.turns))
    return rewritten


def _fix(reason: str) -> str:
    if "JSON" in reason or "UTF-8" in reason:
        return "expected one JSON object per line, in UTF-8"
    if "role" in reason or "turn" in reason:
        return "roles are system, user (human) and assistant (gpt), in turn, the last one assistant"
    if "not an object" in reason:
        return "expected an object with a value for each column"
    return "fill it in, or name your columns with data.columns"


def _example(row: object, given: Columns | None) -> Example:
    if isinstance(row, Unreadable):
        raise RowProblem(row.reason)
    if not isinstance(row, Mapping):
        raise RowProblem("not an object")
    columns = columns_of(row, given)
    turns = turns_of(row, columns)
    tags = {name: _tag(value) for name, value in row.items() if name not in columns}
    return Example(turns, {name: tag for name, tag in tags.items() if tag})


def _tag(value: object) -> str:
    text = "" if is_absent(value) else (scalar_text(value) or "").strip()
    return text.encode("utf-8", "replace").decode("utf-8")


def answer(example: Example) -> str:
    """The text of the last assistant turn."""
    return example.turns[-1].text
