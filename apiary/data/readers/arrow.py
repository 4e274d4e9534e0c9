"""Arrow's formats: Parquet, IPC streams and files, Feather, and the folders that `datasets` saves (`save_to_disk`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from apiary.core.errors import UserError
from apiary.core.formatting import first_line
from apiary.data.readers.files import DataFile, Part
from apiary.data.readers.splits import choose

_ROWS = 1024  # turned into Python values at a time
_STATE, _SPLITS = "state.json", "dataset_dict.json"


def parquet(file: DataFile, split: str) -> list[Part]:
    """The rows of a Parquet file."""

    def batches() -> Iterator[Any]:
        import pyarrow.parquet as pq

        with pq.ParquetFile(file.path) as opened:
            yield from opened.iter_batches(_ROWS)

    return [Part(_numbered(_rows(file.name, "Parquet", batches)))]


def ipc(file: DataFile, split: str) -> list[Part]:
    """The rows of an Arrow IPC stream or file, or of a Feather file of either version."""
    return [Part(_numbered(_rows(file.name, "Arrow", lambda: _batches(file.path))))]


def _batches(path: Path) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.feather
    import pyarrow.ipc

    with path.open("rb") as stream:
        magic = stream.read(6)
    if magic.startswith(b"FEA1"):
        yield from pyarrow.feather.read_table(path).to_batches(_ROWS)
        return
    with pa.memory_map(str(path)) as source:
        if magic == b"ARROW1":
            with pa.ipc.open_file(source) as opened:
                yield from (opened.get_batch(i) for i in range(opened.num_record_batches))
        else:
            with pa.ipc.open_stream(source) as stream_of:
                yield from stream_of


def _rows(name: str, kind: str, batches: Callable[[], Iterable[Any]]) -> Iterator[object]:
    import pyarrow as pa

    try:
        for batch in batches():
            names = batch.schema.names
            if twice := next((column for column in names if names.count(column) > 1), None):
                raise UserError(f"{name}: two columns are named {twice!r}; rename one")
            for start in range(0, batch.num_rows, _ROWS):
                yield from batch.slice(start, _ROWS).to_pylist()
    except UserError:
        raise
    except (pa.ArrowException, pa.ArrowInvalid, ValueError, OverflowError) as error:
        raise UserError(f"{name}: not a readable {kind} file: {first_line(error)}") from None


def _numbered(rows: Iterable[object]) -> Iterator[tuple[int, object]]:
    return iter(enumerate(rows, 1))


def is_saved(folder: Path) -> bool:
    """Whether `datasets` saved a folder: a data set, or several splits of one."""
    return (folder / _SPLITS).is_file() or ((folder / _STATE).is_file() and (folder / "dataset_info.json").is_file())


def saved(file: DataFile, split: str) -> list[Part]:
    """The rows of such a folder: those of `data.split`, and its test split as held-out rows.

    Raises:
        UserError: it is not whole, or has no such split.
    """
    folder = file.path
    if not (folder / _SPLITS).is_file():
        return [Part(_saved_rows(file, folder))]
    with _whole(file):
        names = json.loads((folder / _SPLITS).read_text(encoding="utf-8"))["splits"]
        found = {str(name): None for name in names if Path(str(name)).name == name and (folder / name).is_dir()}
    chosen, held_out = choose(file, found, split)
    parts = [Part(_saved_rows(file, folder / chosen))]
    return [*parts, Part(_saved_rows(file, folder / held_out), True)] if held_out else parts


def _saved_rows(file: DataFile, folder: Path) -> Iterator[tuple[int, object]]:
    with _whole(file):
        state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        files = [folder / Path(str(entry["filename"])).name for entry in state["_data_files"]]
        if state.get("_indices_files"):  # of versions before 1.2, which saved a selection beside the rows
            raise ValueError("it is a selection of rows; load it and save it again")
    yield from _numbered(row for path in files for row in _rows(file.name, "Arrow", lambda path=path: _batches(path)))  # type: ignore[misc]


@contextmanager
def _whole(file: DataFile) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = error.strerror if isinstance(error, OSError) else first_line(error)
        raise UserError(f"{file.name}: not a whole data set of save_to_disk: {why}; save it again") from None
