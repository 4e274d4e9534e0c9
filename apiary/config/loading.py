"""A configuration from TOML, JSON and the command line; all problems of it at once."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from apiary.config import compatibility, toml_text
from apiary.config.errors import error_lines
from apiary.config.schema import (
    DataConfig,
    RunConfig,
    _Section,
)
from apiary.core.errors import UserError as UserError
from apiary.core.formatting import is_unicode, name_text

_DRAFT = "https://json-schema.org/draft/2020-12/schema"


def parse(values: Mapping[str, Any]) -> RunConfig:
    """The configuration for nested plain values.

    Raises:
        UserError: every problem found, one line each.
    """
    try:
        config = RunConfig.model_validate(dict(values))
    except ValidationError as error:
        raise UserError(*error_lines(error, RunConfig)) from None
    if odd := [*_unwritable("", config.model_dump())]:
        raise UserError(*odd)
    if clashes := compatibility.problems(config):
        raise UserError(*clashes)
    return config


def _unwritable(key: str, value: object) -> Iterator[str]:
    """A line for each value, or option of a method, that JSON could not carry to the other side."""
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{key} = {value}: must be finite; leave it out for the default"
    elif isinstance(value, str) and not is_unicode(value):
        yield f"{key} = '{name_text(value)}': is not UTF-8; rename what it names"
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            if not is_unicode(str(name)):
                yield f"{key}: the name '{name_text(str(name))}' in it is not UTF-8"
            yield from _unwritable(f"{key}.{name}" if key else name, inner)
    elif isinstance(value, list | tuple):
        for place, inner in enumerate(value):
            yield from _unwritable(f"{key}[{place}]", inner)


def from_json(text: str) -> RunConfig:
    """The configuration that `RunConfig.to_json` wrote."""
    return parse(json.loads(text))


def load(path: str | Path | None = None, overrides: Iterable[str] = ()) -> RunConfig:
    """The configuration from a TOML file (or the defaults) with `key=value` overrides on top.

    A relative `data.source`, `data.test`, `model.name`, `prompt.template`, `strategy.root` or
    `adapter.start` that exists beside the
    file is read from there.

    Raises:
        UserError: missing or broken file, bad overrides and values that are not allowed, one line each.
    """
    values: dict[str, Any] = {}
    if path is not None:
        values = toml_text.read(Path(path))
    problems: list[str] = []
    for text in overrides:
        try:
            toml_text.override(values, text, partition=DataConfig().partition.model_dump())
        except UserError as error:
            problems += error.problems
    try:
        config = parse(values)
    except UserError as error:
        raise UserError(*problems, *error.problems) from None
    if problems:
        raise UserError(*problems)
    return config


def describe() -> list[tuple[str, str, str]]:
    """Every key with its default and its one-line description, in file order."""
    rows: list[tuple[str, str, str]] = []
    for name, field in RunConfig.model_fields.items():
        if isinstance(field.default, _Section):
            for key, inner in type(field.default).model_fields.items():
                value = getattr(field.default, key)
                shown = toml_text.shown(value.model_dump(mode="json") if isinstance(value, BaseModel) else value)
                rows.append((f"{name}.{key}", shown, inner.description or ""))
        else:
            rows.append((name, toml_text.shown(field.default), field.description or ""))
    return rows


def defaults(keys: Iterable[str]) -> dict[str, Any]:
    """The values of these keys where a configuration names none of them, as nested plain values."""
    everything = RunConfig().model_dump(mode="json")
    tables: dict[str, Any] = {}
    for key in keys:
        table, _, name = key.rpartition(".")
        if table:
            tables.setdefault(table, {})[name] = everything[table][name]
        else:
            tables[name] = everything[name]
    return tables


def json_schema() -> dict[str, Any]:
    """The JSON schema of a configuration as it is written, with every key's meaning and default."""
    return {"$schema": _DRAFT, **RunConfig.model_json_schema(), "title": "A run of Apiary"}
