"""JSON: a value a line, values one after the other, a list, columns, a table of pandas, or one list for each split."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from apiary.core.errors import UserError
from apiary.core.formatting import name_text
from apiary.data.readers import encodings
from apiary.data.readers.files import DataFile, Part, Rows, Unreadable
from apiary.data.readers.splits import HELD_OUT, choose

_LIST_KEYS = ("data", "rows", "train", "examples")
_SPLITS = ("train", "test", "validation", "valid", "dev", "eval", "evaluation")
_TALKS = ("messages", "conversations")
_LISTED = 6  # names in a line
_FIRST_BYTES = 2**16  # of a file whose first line alone cannot say whether each line is a value
_SPACE = re.compile(r"[\s,]*")


def json_lines(file: DataFile, split: str) -> list[Part]:
    """One value a line; or else whatever `json_value` takes, for many a list is called .jsonl."""
    first = next((line for _, line in file.lines()), b"")
    encoding = encodings.declared(file.head())
    if encoding is not None and not encoding.startswith("utf-8"):
        file.notes.append(encodings.note(encoding))
        return [Part((number, parse(line)) for number, line in encodings.decoded_lines(file, encoding))]
    if first and _is_no_row(file, first) and (parts := _not_lines(file, split)) is not None:
        return parts
    return [Part(_lines(file))]


def _is_no_row(file: DataFile, line: bytes) -> bool:
    """Whether the first line of a file is text, and no object."""
    try:
        return not isinstance(parse(line.decode("utf-8")), Mapping)
    except UnicodeDecodeError:
        encoding = encodings.of_lines(file)
        return encoding is not None and not isinstance(_decoded(line, encoding), Mapping)


def _not_lines(file: DataFile, split: str) -> list[Part] | None:
    """The parts of a file whose first line is no object, where as a whole it can be read; None where it cannot."""
    notes = [*file.notes]
    try:
        text = encodings.decode(file)
        if not text.lstrip().startswith(("[", "{")):
            raise ValueError("a text or a number")
        parts = [part._replace(rows=[*part.rows]) for part in _parts(file, text, split)]
        if all(isinstance(row, Mapping) for part in parts for _, row in part.rows):
            return parts
    except (UserError, ValueError, RecursionError):
        pass
    file.notes[:] = notes
    return None


def _lines(file: DataFile) -> Iterator[tuple[int, object]]:
    encoding: str | None = "utf-8"
    asked = False  # whether the whole file was looked at for another encoding
    for number, line in file.lines():
        if line.isascii():
            yield number, parse(line)
            continue
        try:
            yield number, parse(line.decode(encoding or "utf-8"))
            asked = True  # one letter of UTF-8 says what the file is
        except UnicodeDecodeError:
            if not asked:
                asked = True
                if found := encodings.of_lines(file):
                    encoding = found
                    file.notes.append(encodings.note(found))
                    yield number, _decoded(line, found)
                    continue
            yield number, Unreadable("not UTF-8 text")


def _decoded(line: bytes, encoding: str) -> object:
    try:
        return parse(line.decode(encoding))
    except UnicodeDecodeError:
        return Unreadable("not UTF-8 text")


def parse(line: bytes | str) -> object:
    """The value of a line of JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return Unreadable("bad JSON")


def json_value(file: DataFile, split: str) -> list[Part]:
    """The rows of one JSON value, or of values one after the other with or without line breaks.

    Raises:
        UserError: no JSON, or none whose rows are known.
    """
    text = encodings.decode(file)
    return _parts(file, text, split) if text.strip() else [Part([])]


def _parts(file: DataFile, text: str, split: str) -> list[Part]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and (values := _one_after_the_other(text)) is not None:
            return [Part(values)]
        raise UserError(f"{file.name}: not valid JSON in line {error.lineno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file.name}: not valid JSON: {error}") from None
    if isinstance(value, dict) and isinstance(value.get("Instances"), list):
        task = file.path.parent.name if file.stem.lower() in ("train", "test") else file.stem
        return [Part(_task(value, task))]
    if isinstance(value, list):
        return [Part(enumerate(value, 1))]
    if not isinstance(value, dict):
        raise _no_rows(file.name, "none")
    if lists := _splits(value):
        _note_rest(file, value, {name for name, rows in value.items() if any(rows is each for each in lists.values())})
        return _split_parts(file, lists, split)
    if any(_is_talk(value.get(name)) for name in _TALKS):
        return [Part([(1, value)])]
    return [Part(enumerate(_table(value, file), 1))]


def _one_after_the_other(text: str) -> Rows | None:
    """The objects of a text that is nothing but objects; lines where its first one is an object by itself."""
    if isinstance(parse(text.split("\n", 1)[0]), dict):
        lines = enumerate(text.split("\n"), 1)  # JSON Lines under the name .json, as many data sets have it
        return [(number, parse(line)) for number, line in lines if line.strip()]
    decoder, at, values = json.JSONDecoder(), 0, list[object]()
    while (at := _SPACE.match(text, at).end()) < len(text):  # type: ignore[union-attr]  # it matches nothing too
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return None
        if not isinstance(value, dict):
            return None
        values.append(value)
    return [*enumerate(values, 1)]


def _is_rows(value: object) -> bool:
    return isinstance(value, list) and any(isinstance(row, Mapping) for row in value)


def _is_talk(value: object) -> bool:
    """Whether a value is the messages of one conversation."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(m, Mapping) and {"role", "from"} & {*m} for m in value)
    )


def _note_rest(file: DataFile, value: Mapping[str, Any], used: Collection[str]) -> None:
    """Say which lists and objects of a file are not rows of it."""
    rest = [name for name, inner in value.items() if name not in used and inner and isinstance(inner, list | dict)]
    if rest := [name for name in rest if name != "schema"]:  # pandas writes it beside the rows
        listed = ", ".join(repr(name_text(name)) for name in rest[:_LISTED]) + (", ..." if len(rest) > _LISTED else "")
        file.notes.append(f"beside its rows it holds {listed}, which {'is' if len(rest) == 1 else 'are'} not used")


def _splits(value: Mapping[str, Any]) -> dict[str, list[object]]:
    """The lists of rows by split, where an object has such lists for two splits or more."""
    lists = {name: rows for name, rows in value.items() if name.lower() in _SPLITS and isinstance(rows, list)}
    others = [key for key in _LIST_KEYS if key not in lists and _is_rows(value.get(key))]
    if len(others) == 1 and "train" not in map(str.lower, lists):
        lists = {"train": value[others[0]], **lists}
    return lists if len(lists) > 1 and all(_is_rows(rows) or not rows for rows in lists.values()) else {}


def _split_parts(file: DataFile, lists: Mapping[str, list[object]], split: str) -> list[Part]:
    if split not in lists and split in HELD_OUT:
        split = "train"  # held-out rows are asked for, and the file's own are told apart by themselves
    chosen, held_out = choose(file, {name: len(rows) for name, rows in lists.items() if rows}, split)
    parts = [Part(enumerate(lists[chosen], 1))]
    return [*parts, Part(enumerate(lists[held_out], 1), True)] if held_out else parts


def _table(value: Mapping[str, Any], file: DataFile) -> Sequence[object]:
    """The rows of an object: its one list of rows, its columns, or what pandas writes.

    Raises:
        UserError: none of these, or what could be two of them.
    """
    name = file.name
    keys = [key for key in _LIST_KEYS if isinstance(value.get(key), list)]
    if value.keys() >= {"columns", "data"} and value.keys() <= {"columns", "data", "index"} and len(keys) == 1:
        names = value["columns"]  # pandas, orient="split"
        if isinstance(names, list) and all(isinstance(row, list) and len(row) == len(names) for row in value["data"]):
            return [dict(zip(map(str, names), row, strict=True)) for row in value["data"]]
    if len(keys) == 1 and (_is_rows(value[keys[0]]) or not _are_columns(value)):
        _note_rest(file, value, keys)
        return list(value[keys[0]])
    if _are_columns(value) and len(keys) < 2 and any(value.values()):
        sizes = {column: len(cells) for column, cells in value.items()}
        if len({*sizes.values()}) > 1:
            listed = ", ".join(f"{column} {size}" for column, size in [*sizes.items()][:6])
            raise UserError(f"{name}: columns of different lengths ({listed}); each needs a value for every row")
        return [dict(zip(value, cells, strict=True)) for cells in zip(*value.values(), strict=True)]
    if value and all(isinstance(inner, dict) and inner for inner in value.values()):
        return _indexed(value, name)
    raise _no_rows(name, f"lists under {', '.join(keys)}" if keys else "none")


def _are_columns(value: Mapping[str, Any]) -> bool:
    """Whether an object holds lists alone, and more than one or none that is named as a list of rows is."""
    lists = all(isinstance(cells, list) for cells in value.values())
    return bool(value) and lists and (len(value) > 1 or not value.keys() & {*_LIST_KEYS})


def _indexed(value: Mapping[str, Mapping[str, Any]], name: str) -> list[object]:
    """The rows of a table by index and column, or by column and index: the index is the side with numbers for keys.

    Raises:
        UserError: that cannot be told.
    """
    outer = all(key.isdecimal() for key in value)
    inner = all(key.isdecimal() for cells in value.values() for key in cells)
    if outer and not inner:
        return [*value.values()]
    if inner and not outer:
        index = dict.fromkeys(key for cells in value.values() for key in cells)
        return [{column: cells.get(key) for column, cells in value.items()} for key in index]
    raise UserError(
        f"{name}: an object of objects, of which neither side is numbered, so rows and columns cannot be told apart; "
        'save it as a list of rows (pandas: to_json(orient="records"))'
    )


def _no_rows(name: str, found: str) -> UserError:
    return UserError(
        f"{name}: expected a list of rows, or an object with one list under {', '.join(_LIST_KEYS)}; found {found}"
    )


def _task(value: Mapping[str, Any], name: str) -> Iterator[tuple[int, object]]:
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
