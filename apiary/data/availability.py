"""Whether the rows that a configuration names are there, before anything heavy is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from apiary.core.errors import UserError
from apiary.data import examples, sources
from apiary.data.columns import columns_of, given_columns
from apiary.data.fields import is_absent, scalar_text
from apiary.data.sources import RawFile, Unreadable


def parse_columns(options: Sequence[str]) -> Mapping[str, str]:
    """The names of columns that the options `--column FIELD=NAME` give, checked.

    Raises:
        UserError: not so written, a field given twice or unknown, or not exactly one way to make a conversation.
    """
    names: dict[str, str] = {}
    for option in options:
        field, is_pair, name = option.partition("=")
        if not (is_pair and field and name) or field in names:
            raise UserError(f"--column {option!r}: expected FIELD=NAME, once for a field, such as instruction=question")
        names[field] = name
    given_columns(names)
    return names


class Rows(NamedTuple):
    """What was found of rows."""

    total: int
    warnings: tuple[str, ...] = ()  # what is left out, or needs a word from the run


def check_rows(source: str, key: str, columns: Mapping[str, str] = MappingProxyType({})) -> Rows:
    """Check that a run can use the rows of a site, whose columns no run names.

    Args:
        source: a file, or a folder of files.
        key: what error lines call it.
        columns: the site's own names of its columns, as in `data.columns`.

    Raises:
        UserError: nothing there, or nothing that can be read or used.
    """
    try:
        files = sources.load(source, key=key)
    except OSError as error:
        raise UserError(f"{key} {source!r}: cannot be read ({error.strerror})") from None
    for file in files:
        _check_mendable(file, key)
    count = sum(len(file.rows) for file in files)
    try:
        reports = examples.check(files, columns=columns).reports
    except UserError as error:
        raise UserError(
            f"{error}; a site names its own columns at its start, and no run does (--column instruction=NAME)"
        ) from None
    return Rows(count, tuple(line for report in reports for line in report.lines()))


def _check_mendable(file: RawFile, key: str) -> None:
    """Check that `data.columns` could make at least one row of a file usable.

    Raises:
        UserError: no row has what a conversation needs, under whatever names.
    """
    if not file.rows:
        raise UserError(f"{key}: {file.name} is empty, it holds no rows; remove it or fill it")
    if not any(isinstance(row, Mapping) for _, row in file.rows):
        number, row = file.rows[0]
        reason = row.reason if isinstance(row, Unreadable) else "not an object with columns"
        raise UserError(f"{key}: {file.name}: none of its {len(file.rows)} rows can be read (row {number}: {reason})")
    if not any(_may_be_used(row) for _, row in file.rows):
        raise UserError(
            f"{key}: {file.name}: none of its {len(file.rows)} rows has both a question and an answer; fill them in"
        )


def _may_be_used(row: object) -> bool:
    if not isinstance(row, Mapping):
        return False
    texts = [value for value in row.values() if not is_absent(value) and (scalar_text(value) or "").strip()]
    chats = [value for value in row.values() if isinstance(value, list) and any(isinstance(m, Mapping) for m in value)]
    return len(texts) > 1 or bool(chats) or bool(columns_of(row).text)
