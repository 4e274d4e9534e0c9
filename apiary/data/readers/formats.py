"""Every kind of file that rows can be in: its ending, its reader, and what the docs say of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from apiary.data.readers import arrow, database, delimited, excel, json_files
from apiary.data.readers.files import PACKINGS, DataFile, Part, data_file

Reader = Callable[[DataFile, str], list[Part]]

_TEXT: Mapping[str, Reader] = {
    ".jsonl": json_files.json_lines,
    ".ndjson": json_files.json_lines,
    ".json": json_files.json_value,
    ".csv": delimited.table,
    ".tsv": delimited.table,
}
_SQLITE = (".sqlite", ".sqlite3", ".db")
_READERS: Mapping[str, Reader] = {
    **_TEXT,
    ".parquet": arrow.parquet,
    ".arrow": arrow.ipc,
    ".feather": arrow.ipc,
    ".xlsx": excel.workbook,
    **dict.fromkeys(_SQLITE, database.sqlite),
}
SAVED = "save_to_disk"  # in the place of an ending, of the folders that `datasets` saves
ALLOWED = f"{', '.join(_READERS)}; text also packed as {', '.join(PACKINGS)}"


def file_of(path: Path) -> DataFile | None:
    """The data file at a path, or the folder that `datasets` saved; None for anything else.

    Raises:
        UserError: a .zip that cannot be opened, or of several files.
    """
    if path.is_dir():
        return DataFile(path, SAVED) if arrow.is_saved(path) else None
    return data_file(path, _READERS, _TEXT)


def looks_like_file(name: str) -> bool:
    """Whether a name ends as that of a data file does, whether or not one is there."""
    suffixes = [suffix.lower() for suffix in Path(name).suffixes[-2:]]
    return bool(suffixes) and (suffixes[-1] in _READERS or suffixes[-1] in PACKINGS)


def parts(file: DataFile, split: str, query: str | None = None) -> list[Part]:
    """The parts of a file: the rows to train on, and perhaps held-out ones.

    Raises:
        UserError: it cannot be read.
    """
    if file.suffix == SAVED:
        return arrow.saved(file, split)
    if file.suffix in _SQLITE:
        return database.sqlite(file, split, query)
    return _READERS[file.suffix](file, split)


def takes_query(file: DataFile) -> bool:
    """Whether rows are chosen by a query there."""
    return file.suffix in _SQLITE


class Format(NamedTuple):
    """A line of the table in docs/data.md."""

    name: str
    read_as: str
    said: str


FORMATS = (
    Format(
        "`.jsonl`, `.ndjson`", "one JSON object a line; blank lines do not count", "lines that are no JSON, by number"
    ),
    Format("`.json`, a list", "one row an object", "entries that are no objects"),
    Format(
        "`.json`, objects one after the other",
        "one row an object, with or without line breaks between or inside them; also under the name `.jsonl`",
        "",
    ),
    Format("`.json`, an object with one list", "the list under `data`, `rows`, `train` or `examples`", ""),
    Format(
        "`.json`, an object with a list for each split",
        "`train` (or `data.split`) is trained on, `test` is held out",
        "other splits and their rows, which are not used",
    ),
    Format(
        "`.json`, an object of columns",
        "one row an index; also pandas' `orient` of `columns`, `index`, `split`, `table` and `records`",
        "columns of different lengths are refused",
    ),
    Format("`.json`, a Super-NaturalInstructions task", "its instances, under its first definition", ""),
    Format("`.csv`, `.tsv`", "a header, then rows; comma, semicolon or tab", "rows with more fields than the header"),
    Format("`.parquet`, `.arrow` (stream or file), `.feather`", "one row a record", ""),
    Format(
        "a folder of `datasets.save_to_disk`",
        "its rows; of several splits `train` (or `data.split`) is trained on, `test` is held out",
        "splits that are not used",
    ),
    Format(
        "`.xlsx` (extra `excel`)",
        "the first sheet with a header; blank rows do not count",
        "sheets that are not used; values in a column without a name",
    ),
    Format(
        "`.sqlite`, `.sqlite3`, `.db`, `sqlite:///rows.db`",
        "the rows of `data.query`, or of the only table; opened read-only",
        "the tables, where there are several and no query",
    ),
    Format(
        "another database by URI (extra `sql`)",
        "the rows of `data.query`, one SELECT, in a read-only transaction where the database has that",
        "what the database answers, never a password",
    ),
    Format(
        "`.gz`, `.bz2`, `.xz`, `.zst`, `.zip` of one text file",
        "as the file in it, unpacked row by row",
        "an archive that is torn or holds several files is refused",
    ),
    Format(
        "UTF-16, UTF-32; cp1252 (Latin-1) and others",
        "by the byte order mark, else UTF-8, else what charset-normalizer finds without a rival",
        "the encoding that was taken; text that could be two is refused, and so is, under record-level privacy, any "
        "guess: all rows of a file would decide about it together",
    ),
    Format(
        "a folder",
        "one client a file, or a sub-folder with a `train` file; files called `test` are held out",
        "files of other kinds, which are ignored",
    ),
)
