"""Whether the rows that a configuration names are there, before anything heavy is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from apiary.core.errors import UserError
from apiary.data import examples, sources
from apiary.data.columns import columns_of
from apiary.data.fields import is_absent, scalar_text
from apiary.data.sources import RawFile, Unreadable


class Rows(NamedTuple):
    """What was found of rows."""

    total: int
    warnings: tuple[str, ...] = ()  # what is left out, or needs a word from the run


def check_rows(source: str, key: str, *, columns_may_be_named: bool = True) -> Rows:
    """Check that a run can use rows, read with the default settings.

    Args:
        source: a file, or a folder of files.
        key: what error lines call it.
        columns_may_be_named: whether a later run may say by `data.columns` which columns to use; what it could mend
            is then a warning.

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
        reports = examples.check(files).reports
    except UserError as error:
        if not columns_may_be_named:
            raise UserError(f"{error}; but this site takes no names from a run, so rename them in the file") from None
        return Rows(count, (f"{error}; without that this site cannot take part",))
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
