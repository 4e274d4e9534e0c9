"""Raw rows out of files, folders, databases and hub data sets, with row numbers and nothing judged yet.

A row that cannot be read is kept as `Unreadable`, so that `apiary.data.examples` can count and report
it. Rows are numbered from 1: by line in JSON Lines (blank lines are skipped but counted), by data
row everywhere else.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from apiary.config.errors import shown
from apiary.core import database_uris
from apiary.core.errors import UserError
from apiary.core.formatting import first_line, is_unicode, name_text
from apiary.data.readers import database, formats
from apiary.data.readers.files import BROKEN, DataFile, Rows, Unreadable
from apiary.data.store import Room, collect

__all__ = ["RawFile", "Unreadable", "load"]

log = logging.getLogger(__name__)

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+)?")
_HUB_PATIENCE_S = 10.0  # for its first answer
_DEEPEST = 100  # levels of lists and objects in a row


class RawFile(NamedTuple):
    """The rows of one file, each with its 1-based number; a readable row is usually a dict.

    notes: what there is to say about how the file was read, one line each.
    """

    name: str
    origin: str
    rows: Sequence[tuple[int, object]]
    held_out: bool = False
    notes: tuple[str, ...] = ()


def load(
    source: str, split: str = "train", key: str = "data.source", query: str | None = None, *, guess: bool = True
) -> list[RawFile]:
    """The files behind `source`: built-in corpus, file, folder (natural order), database, or hub data set.

    In a folder each data file is one origin (`test.*` is held out), and so is each sub-folder with
    a `train.*` (its `test.*` is held out): the layout of the Super-NaturalInstructions tasks. A file with a test split
    of its own gives it as held-out rows. `key` is what error lines call the source. Rows beyond `IN_MEMORY_BYTES` of
    `apiary.data.store` are kept on disk.

    Args:
        source: what `data.source` names.
        split: of a hub data set, a folder that `datasets` saved, or a JSON object with a list for each split.
        key: as above.
        query: of a database.
        guess: read text that is not UTF-8 by a guess, which all rows of a file decide together.

    Raises:
        UserError: nothing there, an unknown extension, or a file that cannot be parsed.
    """
    room = Room()
    if database_uris.is_uri(source):
        if (path := database.sqlite_path(source)) is None:
            return _database(source, query, key, room)
        source = str(path)
    elif source.startswith("builtin:"):
        _refuse_query(query, source, key)
        return _builtin(source, key)
    else:
        path = None
    found = _path(source, key)
    if found.exists():
        file = formats.file_of(found) if path is None else DataFile(found, ".sqlite")
        if file is not None:
            if not formats.takes_query(file):
                _refuse_query(query, source, key)
            return _read(replace(file, guesses=guess), split, room, query)
        _refuse_query(query, source, key)
        if found.is_dir():
            return _folder(found, source, split, key, room, guess=guess)
        raise UserError(f"{key} = {source!r}: the extension must be one of {formats.ALLOWED}, or give a folder")
    named_file = path is not None or formats.looks_like_file(source)
    if named_file or not _HUB_ID.fullmatch(source):
        is_path = named_file or "/" in source
        hint = "relative paths start from the current folder" if is_path else "a hub id is owner/name"
        raise UserError(f"{key} = {source!r}: no such file or folder; {hint}")
    _refuse_query(query, source, key)
    return [_hub(source, split, key, room)]


def _refuse_query(query: str | None, source: str, key: str) -> None:
    if query is not None:
        raise UserError(f"data.query: {key} = {source!r} is no database, so it takes no query; leave it out")


def _database(uri: str, query: str | None, key: str, room: Room) -> list[RawFile]:
    if database_uris.holds_secret(uri):
        raise UserError(database_uris.refusal(key))
    (part,) = database.connected(uri, query, key)
    return [RawFile(uri, "database", collect(_shallow(part.rows), room))]


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


def _builtin(source: str, key: str) -> list[RawFile]:
    """`builtin:skills`, or `builtin:skills:N` with N training rows of each skill; its held-out rows are the same."""
    named = re.fullmatch(r"builtin:skills(?::([1-9][0-9]{0,5}))?", source)
    if named is None:
        raise UserError(
            f"{key} = {source!r}: the only built-in data is 'builtin:skills', or with 100 training rows of each skill, "
            "say, 'builtin:skills:100'"
        )
    from apiary.data.skills.corpus import PER_SKILL, rows

    per_skill = int(named[1] or PER_SKILL)
    try:
        train = rows("train", per_skill)
    except ValueError as error:
        raise UserError(f"{key} = {source!r}: {error}") from None
    return [
        RawFile(f"{source} {part}", "skills", list(enumerate(found, 1)), part == "test")
        for part, found in (("train", train), ("test", rows("test")))
    ]


def _folder(folder: Path, source: str, split: str, key: str, room: Room, *, guess: bool) -> list[RawFile]:
    members = [(replace(file, guesses=guess), origin, held_out) for file, origin, held_out in _members(folder)]
    if not any(not held_out for _, _, held_out in members):
        raise UserError(
            f"{key} = {source!r}: no training file in this folder; put one file ({formats.ALLOWED}) per client in it"
        )
    seen: dict[str, str] = {}
    for file, origin, held_out in members:
        if not held_out and origin in seen:
            raise UserError(
                f"{key} = {source!r}: {seen[origin]!r} and {file.name!r} both name the client "
                f"{origin!r}; rename or remove one"
            )
        if not held_out:
            seen[origin] = file.name
    files = []
    for file, origin, held_out in members:
        inside = "" if file.path.parent == folder else f"{file.path.parent.name}/"
        for raw in _read(file, split, room, is_test=held_out):
            files.append(raw._replace(name=f"{inside}{raw.name}", origin=origin))
    return files


def _members(folder: Path) -> Iterator[tuple[DataFile, str, bool]]:
    ignored = []
    for entry in sorted(_entries(folder), key=lambda p: _natural(p.name)):
        if entry.name.startswith("."):
            continue
        if (file := formats.file_of(entry)) is not None:
            yield file, file.stem, file.stem.lower() == "test"
        elif inside := _split_files(entry) if entry.is_dir() else []:
            yield from ((file, entry.name, file.stem.lower() == "test") for file in inside)
        else:
            ignored.append(entry.name)
    if ignored:
        log.warning("%s: ignored %s (not %s)", folder.name, ", ".join(ignored), formats.ALLOWED)


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


def _split_files(folder: Path) -> list[DataFile]:
    """The train and test files of a sub-folder, without regard to others."""
    named = (path for path in sorted(_entries(folder)) if path.name.lower().startswith(("train.", "test.")))
    files = [file for path in named if path.is_file() and (file := formats.file_of(path)) is not None]
    return [file for file in files if file.stem.lower() in ("train", "test")]


def _natural(name: str) -> list[str | int]:
    """A sort key that puts client_2 before client_10."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))]


def _read(file: DataFile, split: str, room: Room, query: str | None = None, *, is_test: bool = False) -> list[RawFile]:
    """What a file holds, a `RawFile` for each part."""
    made = []
    with _one_line(file.name):
        parts = formats.parts(file, split, query)
        for part in parts:
            name = f"{file.name} test" if part.held_out and len(parts) > 1 else file.name
            rows = collect(_shallow(part.rows), room)
            made.append(RawFile(name, file.stem, rows, part.held_out or is_test))
    return [made[0]._replace(notes=tuple(file.notes)), *made[1:]]


def _shallow(rows: Rows) -> Iterator[tuple[int, object]]:
    """The rows; in the place of one that is nested deeper than anything that reads or keeps it can follow, why."""
    for number, row in rows:
        yield number, row if _is_shallow(row, _DEEPEST) else Unreadable(f"nested more than {_DEEPEST} deep")


def _is_shallow(value: object, levels: int) -> bool:
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return levels > 0 and all(_is_shallow(each, levels - 1) for each in inner)


@contextmanager
def _one_line(name: str) -> Iterator[None]:
    """Within it whatever a reader trips over is told as one line."""
    try:
        yield
    except BROKEN as error:
        raise UserError(f"{name}: the archive is torn or no archive ({first_line(error) or 'it ends early'})") from None
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        kind = "UTF-8" if error.encoding.startswith("utf-8") else error.encoding.upper()
        raise UserError(f"{name}: not {kind} text at byte {error.start}; save it as UTF-8") from None


def _hub(source: str, split: str, key: str, room: Room) -> RawFile:
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
    return RawFile(source, name.rpartition("/")[2], collect(_shallow(enumerate(data, 1)), room))


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
