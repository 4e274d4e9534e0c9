"""A configuration as text: TOML files in and out, and `KEY=VALUE` on top."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apiary.core.errors import UserError

_PATH_KEYS = (
    ("data", "source"),
    ("data", "test"),
    ("model", "name"),
    ("prompt", "template"),
    ("strategy", "root"),
    ("adapter", "start"),
)


def read(path: Path) -> dict[str, Any]:
    """The tables of a TOML file; paths in it that exist beside it are made whole.

    Raises:
        UserError: it is missing, unreadable or no TOML.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"config file {str(path)!r} does not exist") from None
    except IsADirectoryError:
        raise UserError(f"config file {str(path)!r} is a folder; give the TOML file in it") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"config file {str(path)!r} is not valid TOML: {error}") from None
    except OSError as error:
        raise UserError(f"config file {str(path)!r} cannot be read: {error.strerror}") from None
    _resolve_paths(values, path.parent)
    return values


def _resolve_paths(values: dict[str, Any], folder: Path) -> None:
    for section, key in _PATH_KEYS:
        table = values.get(section)
        if isinstance(table, dict) and isinstance(value := table.get(key), str):
            beside = folder / value
            if not Path(value).is_absolute() and _exists(beside):
                table[key] = str(beside.resolve())


def _absolute(key: str, value: object) -> object:
    """The value; where it names a file or folder that exists, its whole path, for a run may be opened from anywhere."""
    if tuple(key.split(".")) in _PATH_KEYS and isinstance(value, str) and value and _exists(Path(value)):
        return str(Path(value).resolve())
    return value


def _exists(path: Path) -> bool:
    """Whether something is there; nothing is under a name that no file system takes."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def override(values: dict[str, Any], text: str, partition: Mapping[str, Any]) -> None:
    """Set what `KEY=VALUE` says, in place; the value is TOML, and a bare word a string.

    Args:
        values: the nested tables.
        text: dotted key and value.
        partition: the default of `data.partition`, on top of which goes an option of it where no file names one.

    Raises:
        UserError: no such text, or the key leads through what is no table.
    """
    key, equals, raw = text.partition("=")
    if not equals or not key.strip():
        raise UserError(f"-s {text!r}: expected KEY=VALUE, for example -s train.lr=1e-4")
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw.strip()  # a bare word is a string
    *path, last = key.strip().split(".")
    table = values
    for name in path:
        fresh = dict(partition) if name == "partition" and last != "name" else {}
        below = table.setdefault(name, fresh)
        if isinstance(below, str):  # a method's short form: partition = "iid", then partition.by=...
            below = table[name] = {"name": below}
        if not isinstance(below, dict):
            raise UserError(f"-s {text!r}: {name!r} is not a table")
        table = below
    table[last] = _absolute(key.strip(), value)
    if key.strip() in ("train.steps", "train.epochs"):  # the newer of the two wins over the file's
        table.pop("epochs" if last == "steps" else "steps", None)


def dump(values: Mapping[str, Any]) -> str:
    """Tables one deep as TOML; what is None is left out."""
    top = {k: v for k, v in values.items() if not isinstance(v, Mapping)}
    lines = [f"{k} = {shown(v)}" for k, v in top.items() if v is not None]
    for name, table in values.items():
        if isinstance(table, Mapping):
            lines += ["", f"[{name}]"]
            lines += [f"{k} = {shown(v)}" for k, v in table.items() if v is not None]
    return "\n".join(lines) + "\n"


def shown(value: Any) -> str:
    """A value as TOML; "unset" where there is none."""
    match value:
        case None:
            return "unset"
        case bool():
            return "true" if value else "false"
        case Mapping():
            inner = ", ".join(f"{shown(k)} = {shown(v)}" for k, v in value.items() if v is not None)
            return f"{{ {inner} }}" if inner else "{}"
        case list() | tuple():
            return "[" + ", ".join(shown(v) for v in value) + "]"
        case str():
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # TOML forbids it bare
        case _:
            return repr(value)
