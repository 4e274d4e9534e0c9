"""CSV and TSV with a header; the delimiter is the one that the header has most of."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator

from apiary.core.errors import UserError
from apiary.data.readers import encodings
from apiary.data.readers.files import LINE_BYTES, DataFile, Part, Unreadable


def table(file: DataFile, split: str) -> list[Part]:
    """The rows after the header.

    Raises:
        UserError: two columns of one name, text that is no CSV, or of no known encoding.
    """
    return [Part(_rows(file))]


def _rows(file: DataFile) -> Iterator[tuple[int, object]]:
    limit = csv.field_size_limit(LINE_BYTES)  # long answers pass the module's default of 128 KiB
    try:
        with file.open() as stream, io.TextIOWrapper(stream, _encoding(file), newline="") as text:
            header = text.readline(LINE_BYTES)
            delimiter = max(",;\t", key=header.count)  # ties go to the comma
            yield from _parsed(csv.DictReader(_from_start(header, text), delimiter=delimiter, strict=True), file.name)
    finally:
        csv.field_size_limit(limit)


def _from_start(header: str, rest: io.TextIOWrapper) -> Iterator[str]:
    yield header.removeprefix("\ufeff")
    yield from iter(lambda: rest.readline(LINE_BYTES + 1), "")


def _encoding(file: DataFile) -> str:
    """The encoding of the text; another than UTF-8 is noted.

    The whole file is decoded once before its first row, in pieces: no row is given out of a text whose later part
    says that it was read wrongly.
    """
    encoding = encodings.declared(file.head()) or "utf-8"
    try:
        with file.open() as stream, io.TextIOWrapper(stream, encoding) as text:
            while text.read(2**20):
                pass
    except UnicodeDecodeError:
        encodings.decode(file)  # notes what it is, or says that it cannot be told or is not to be guessed
        return encodings.guess(file.whole()) or encoding
    if not encoding.startswith("utf-8"):
        file.notes.append(encodings.note(encoding))
    return encoding


def _parsed(reader: csv.DictReader[str], name: str) -> Iterator[tuple[int, object]]:
    try:
        columns = reader.fieldnames or ()
        twice = [c for c in columns if columns.count(c) > 1]
        if twice:
            raise UserError(f"{name}: two columns are named {twice[0]!r}; rename one")
        for number, row in enumerate(reader, 1):
            yield number, Unreadable("more fields than the header has") if None in row else row
    except csv.Error as error:
        raise UserError(f"{name}: not valid CSV near line {reader.line_num}: {error}") from None
