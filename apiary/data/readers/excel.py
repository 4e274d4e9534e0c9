"""Excel workbooks (.xlsx), by openpyxl: the first sheet with a header, row by row."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any

from apiary.core.errors import UserError
from apiary.core.formatting import first_line
from apiary.data.readers.files import WHOLE_BYTES, DataFile, Part, Unreadable


def workbook(file: DataFile, split: str) -> list[Part]:
    """The rows after the header of the first sheet that has one; blank rows are skipped, other sheets are noted.

    Raises:
        UserError: openpyxl is not installed, or the workbook cannot be read.
    """
    return [Part(_rows(file))]


def _rows(file: DataFile) -> Iterator[tuple[int, object]]:
    try:
        import openpyxl
    except ImportError:
        raise UserError(f"{file.name}: Excel files need openpyxl; install apiary[excel], or save it as CSV") from None
    _check_size(file)
    try:
        with warnings.catch_warnings():  # on formats and validations of cells, which say nothing of their values
            warnings.simplefilter("ignore")
            book = openpyxl.load_workbook(file.path, read_only=True, data_only=True)
        try:
            yield from _sheets(file, book)
        finally:
            book.close()
    except UserError:
        raise
    except Exception as error:  # the library raises whatever its XML and zip readers do
        raise UserError(f"{file.name}: not a readable Excel file: {first_line(error)}") from None


def _check_size(file: DataFile) -> None:
    """Check that the workbook is not far larger than it looks: its table of texts is held in memory.

    Raises:
        UserError: it is, or it is no workbook.
    """
    try:
        with zipfile.ZipFile(file.path) as archive:
            size = sum(info.file_size for info in archive.infolist())
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise UserError(f"{file.name}: not a readable Excel file: {first_line(error)}") from None
    if size > WHOLE_BYTES:
        raise UserError(f"{file.name}: unpacks to more than {WHOLE_BYTES >> 20:,} MiB; save it as CSV")


def _sheets(file: DataFile, book: Any) -> Iterator[tuple[int, object]]:
    used = None
    for sheet in book.worksheets:
        if used is not None:
            file.notes.append(f"sheet {sheet.title!r} is not used; only the first one is, {used!r}")
            continue
        lines = (line for line in sheet.iter_rows(values_only=True) if any(cell is not None for cell in line))
        if (header := next(lines, None)) is not None:
            used = sheet.title
            yield from _records(file, header, lines)


def _records(
    file: DataFile, header: Sequence[object], lines: Iterator[Sequence[object]]
) -> Iterator[tuple[int, object]]:
    names = [None if cell is None else str(cell) for cell in header]
    twice = next((name for name in names if name is not None and names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{file.name}: two columns are named {twice!r}; rename one")
    for number, line in enumerate(lines, 1):
        nameless = [*line[len(names) :], *(cell for name, cell in zip(names, line, strict=False) if name is None)]
        if any(cell is not None for cell in nameless):
            yield number, Unreadable("a value in a column without a name")
        else:
            yield number, {name: cell for name, cell in zip(names, line, strict=False) if name is not None}
