"""What can be known of a model, a device and rows before anything starts: no weight is read, nothing is trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from apiary.config.schema import ModelConfig, UserError
from apiary.data import examples, sources
from apiary.data.columns import is_absent, scalar_text
from apiary.data.sources import RawFile, Unreadable
from apiary.models.base import BUILTIN, ask_hub, first_line, resolve_device


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
    return len(texts) > 1 or bool(chats)


def check_device(name: str, key: str) -> None:
    """Check that this machine has a device.

    Args:
        name: as `model.device` names it.
        key: what error lines call it.

    Raises:
        UserError: not a device name, or not here.
    """
    config = ModelConfig(device=name)
    try:
        resolve_device(config)
    except UserError as error:
        raise UserError(f"{key} {str(error).removeprefix('model.device = ')}") from None


def check_model(name: str, key: str, revision: str | None = None) -> None:
    """Check that a base model is there, with a configuration and a tokenizer that Transformers can read.

    Args:
        name: as `model.name` has it.
        key: what error lines call it.
        revision: of a model on the hub.

    Raises:
        UserError: it is not.
    """
    if name.startswith("builtin:"):
        if name != BUILTIN:
            raise UserError(f"{key} {name!r}: the only built-in model is {BUILTIN!r}")
        return
    local = is_folder(name)
    if not local and name.startswith(("/", "./", "../", "~")):
        raise UserError(f"{key} {name!r}: no such folder")
    from transformers import AutoConfig, AutoTokenizer

    source = str(Path(name).expanduser()) if local else name
    if not local:
        try:
            ask_hub(name, revision)
        except Exception as error:  # the hub's errors share no other base
            told = f"no such folder here, and the hub does not give it ({first_line(error)})"
            raise UserError(f"{key} {name!r}: {told}") from error
    for part, reader in (("configuration", AutoConfig), ("tokenizer", AutoTokenizer)):
        try:
            reader.from_pretrained(source, revision=revision)
        except Exception as error:  # the model classes' errors share no other base
            told = f"has no {part} that Transformers can read ({first_line(error)})"
            raise UserError(f"{key} {name!r}: {told}") from error


def is_folder(name: str) -> bool:
    """Whether a model's name is that of a folder here, which then comes before one on the hub."""
    try:
        return Path(name).expanduser().is_dir()
    except (OSError, RuntimeError):  # a name that no file system takes, or of nobody's home
        return False
