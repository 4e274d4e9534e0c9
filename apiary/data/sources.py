"""Raw rows out of files, folders and hub data sets, with row numbers and nothing judged yet.

A row that cannot be read is kept as `Unreadable`, so that `apiary.data.examples` can count and report
it. Rows are numbered from 1: by line in JSON Lines (blank lines are skipped but counted), by data
row everywhere else.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from apiary.config.errors import shown
from apiary.core.errors import UserError
from apiary.core.formatting import first_line, is_unicode, name_text

log = logging.getLogger(__name__)

_LIST_KEYS = ("data", "rows", "train", "examples")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+)?")
_HUB_PATIENCE_S = 10.0  # for its first answer


class Unreadable(NamedTuple):
    """A row that could not be read, and why."""

    reason: str


class RawFile(NamedTuple):
    """The rows of one file, each with its 1-based number; a readable row is usually a dict."""

    name: str
    origin: str
    rows: list[tuple[int, object]]
    held_out: bool = False


def load(source: str, split: str = "train", key: str = "data.source") -> list[RawFile]:
    """The files behind `source`: built-in corpus, file, folder (natural order), or hub data set.

    In a folder each data file is one origin (`test.*` is held out), and so is each sub-folder with
    a `train.*` (its `test.*` is held out): the layout of the Super-NaturalInstructions tasks. `key`
    is what error lines call the source.

    Raises:
        UserError: nothing there, an unknown extension, or a file that cannot be parsed.
    """
    if source.startswith("builtin:"):
        return _builtin(source, key)
    path = _path(source, key)
    if path.is_dir():
        return _folder(path, source, key)
    if path.exists():
        reader = _READERS.get(path.suffix.lower())
        if reader is None:
            raise UserError(f"{key} = {source!r}: the extension must be one of {_allowed()}, or give a folder")
        return [RawFile(path.name, path.stem, list(_guarded(path, reader)))]
    if path.suffix.lower() in _READERS or not _HUB_ID.fullmatch(source):
        is_path = path.suffix.lower() in _READERS or "/" in source
        hint = "relative paths start from the current folder" if is_path else "a hub id is owner/name"
        raise UserError(f"{key} = {source!r}: no such file or folder; {hint}")
    return [_hub(source, split, key)]


def _path(source: str, key: str) -> Path:
    """The path that `source` may be.

    Raises:
        UserError: no file system takes such a name, or none may be looked at there.
    """
    if not is_unicode(source):
        raise UserError(f"{key} = '{name_text(source)}': this name is not UTF-8; rename the file or folder")
    try:
        path = Path(source).expanduser()
        path.stat()
    except FileNotFoundError:
        pass
    except (OSError, ValueError, RuntimeError) as error:  # too long, a null byte, a user without a home
        why = error.strerror if isinstance(error, OSError) else first_line(error)
        raise UserError(f"{key} = {shown(name_text(source))}: cannot be read: {why}") from None
    return path


def _allowed() -> str:
    return ", ".join(_READERS)


def _builtin(source: str, key: str) -> list[RawFile]:
    if source != "builtin:skills":
        raise UserError(f"{key} = {source!r}: the only built-in data is 'builtin:skills'")
    from apiary.data.skills.corpus import rows

    return [
        RawFile(f"{source} {part}", "skills", list(enumerate(rows(part), 1)), part == "test")
        for part in ("train", "test")
    ]


def _folder(folder: Path, source: str, key: str) -> list[RawFile]:
    members = list(_members(folder))
    if not any(not held_out for _, _, held_out in members):
        raise UserError(
            f"{key} = {source!r}: no training file in this folder; put one {_allowed()} file per client in it"
        )
    seen: dict[str, str] = {}
    for path, origin, held_out in members:
        if not held_out and origin in seen:
            raise UserError(
                f"{key} = {source!r}: {seen[origin]!r} and {path.name!r} both name the client "
                f"{origin!r}; rename or remove one"
            )
        if not held_out:
            seen[origin] = path.name
    return [
        RawFile(
            path.name if path.parent == folder else f"{path.parent.name}/{path.name}",
            origin,
            list(_guarded(path, _READERS[path.suffix.lower()])),
            held_out,
        )
        for path, origin, held_out in members
    ]


def _members(folder: Path) -> Iterator[tuple[Path, str, bool]]:
    ignored = []
    for entry in sorted(_entries(folder), key=lambda p: _natural(p.name)):
        if entry.name.startswith("."):
            continue
        inside = _split_files(entry) if entry.is_dir() else []
        if entry.is_file() and entry.suffix.lower() in _READERS:
            yield entry, entry.stem, entry.stem.lower() == "test"
        elif inside:
            yield from ((path, entry.name, path.stem.lower() == "test") for path in inside)
        else:
            ignored.append(entry.name)
    if ignored:
        log.warning("%s: ignored %s (not %s)", folder.name, ", ".join(ignored), _allowed())


def _entries(folder: Path) -> list[Path]:
    """What is in a folder.

    Raises:
        UserError: it may not be read, or a name in it is not UTF-8: it would be the name of a client.
    """
    try:
        entries = list(folder.iterdir())
    except OSError as error:
        raise UserError(f"{name_text(folder.name)}: this folder cannot be read: {error.strerror}") from None
    if odd := next((entry.name for entry in entries if not is_unicode(entry.name)), None):
        raise UserError(f"{name_text(folder.name)}: the name '{name_text(odd)}' in it is not UTF-8; rename it")
    return entries


def _split_files(folder: Path) -> list[Path]:
    return sorted(
        path for path in _entries(folder) if path.stem.lower() in ("train", "test") and path.suffix.lower() in _READERS
    )


def _natural(name: str) -> list[str | int]:
    """A sort key that puts client_2 before client_10."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))]


Rows = Iterable[tuple[int, object]]


def _guarded(path: Path, reader: Callable[[Path], Rows]) -> Iterator[tuple[int, object]]:
    """The rows of `reader`, with whatever it trips over told as one line."""
    try:
        yield from reader(path)
    except OSError as error:
        raise UserError(f"{path.name}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path.name}: not UTF-8 text at byte {error.start}; save it as UTF-8") from None


def _json_lines(path: Path) -> Rows:
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if line.strip():
            yield number, _parse_line(line)


def _parse_line(line: bytes) -> object:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return Unreadable("not UTF-8 text")
    except (ValueError, RecursionError):
        return Unreadable("bad JSON")


def _json(path: Path) -> Rows:
    text = path.read_text(encoding="utf-8-sig")
    if not text.strip():
        return []
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and isinstance(_parse_line(text.split("\n", 1)[0].encode()), dict):
            return _json_lines(path)  # JSON Lines under the name .json, as many data sets have it
        raise UserError(f"{path.name}: not valid JSON in line {error.lineno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path.name}: not valid JSON: {error}") from None
    if isinstance(value, dict) and isinstance(value.get("Instances"), list):
        task = path.parent.name if path.stem.lower() in ("train", "test") else path.stem
        return _task(value, task)
    return enumerate(_only_list(value, path.name), 1)


def _only_list(value: object, name: str) -> list[object]:
    if isinstance(value, list):
        return value
    keys = [k for k in _LIST_KEYS if isinstance(value, dict) and isinstance(value.get(k), list)]
    if isinstance(value, dict) and len(keys) == 1:
        return list(value[keys[0]])
    found = f"lists under {', '.join(keys)}" if keys else "none"
    raise UserError(
        f"{name}: expected a list of rows, or an object with one list under {', '.join(_LIST_KEYS)}; found {found}"
    )


def _task(value: dict[str, Any], name: str) -> Rows:
    """The instances of a Super-NaturalInstructions task (Wang et al., 2022) as rows."""
    definition = _first(value.get("Definition"))
    for number, instance in enumerate(value["Instances"], 1):
        if not isinstance(instance, dict):
            yield number, instance
            continue
        row = {"instruction": definition, "input": instance.get("input"), "task": name}
        yield number, {**row, "output": _first(instance.get("output"))}


def _first(value: object) -> object:
    """The first entry of a list (None when it is empty), and anything else as it is."""
    if isinstance(value, list):
        return value[0] if value else None
    return value


def _csv(path: Path) -> Rows:
    text = path.read_bytes().decode("utf-8-sig")
    header = text.split("\n", 1)[0]
    delimiter = max(",;\t", key=header.count)  # ties go to the comma
    limit = csv.field_size_limit(max(len(text), 1))  # long answers pass the module's default of 128 KiB
    try:
        yield from _csv_rows(
            csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True),
            path.name,
        )
    finally:
        csv.field_size_limit(limit)


def _csv_rows(reader: csv.DictReader[str], name: str) -> Rows:
    try:
        columns = reader.fieldnames or ()
        twice = [c for c in columns if columns.count(c) > 1]
        if twice:
            raise UserError(f"{name}: two columns are named {twice[0]!r}; rename one")
        for number, row in enumerate(reader, 1):
            yield number, Unreadable("more fields than the header has") if None in row else row
    except csv.Error as error:
        raise UserError(f"{name}: not valid CSV near line {reader.line_num}: {error}") from None


def _parquet(path: Path) -> Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except pa.ArrowException as error:
        raise UserError(f"{path.name}: not a readable Parquet file: {first_line(error)}") from None


_READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}


def _hub(source: str, split: str, key: str) -> RawFile:
    """One split of the hub data set `owner/name`, or of `owner/name:configuration`."""
    import datasets

    name, _, configuration = source.partition(":")
    log.info("%s = %r is no file or folder here; asking the hub", key, source)
    away = _unreachable(name)
    try:
        with _hub_client(offline=away is not None):
            data = datasets.load_dataset(name, configuration or None, split=split)
    except Exception as error:  # the hub client raises a dozen unrelated types
        why = (
            first_line(error)
            if away is None
            else f"the hub does not answer ({first_line(away)}), and no copy of it is here"
        )
        raise UserError(
            f"{key} = {source!r}: no file or folder of that name here, and as a hub data set "
            f"(split {split!r}) "
            f"it cannot be loaded: {why}"
        ) from None
    if away is not None:
        log.warning("%s = %r: the hub does not answer; this is the copy that was loaded before", key, source)
    return RawFile(source, name.rpartition("/")[2], list(enumerate(data, 1)))


def _unreachable(name: str) -> Exception | None:
    """What keeps the hub from answering one short question; its own client would try on for half a minute."""
    from huggingface_hub import HfApi, constants, errors

    if constants.HF_HUB_OFFLINE:
        return None
    try:
        HfApi().dataset_info(name, timeout=_HUB_PATIENCE_S)
    except errors.HfHubHTTPError:  # an answer too; `datasets` words it better
        return None
    except Exception as error:
        return error
    return None


@contextmanager
def _hub_client(*, offline: bool) -> Iterator[None]:
    """Within it the hub's libraries log errors alone, and where `offline` they look only into their cache."""
    import datasets.config

    # Each sets its level when it is imported, whatever the command line asked for before.
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels, was_offline = [logger.level for logger in loggers], datasets.config.HF_HUB_OFFLINE
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    datasets.config.HF_HUB_OFFLINE = offline or was_offline
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = was_offline
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
