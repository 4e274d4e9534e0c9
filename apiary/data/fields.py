"""The text of one field of a row: what is missing, empty or of a wrong type, and which white space is kept."""

from __future__ import annotations

import datetime
import decimal
import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

_LINE_BREAK = re.compile(r"[\r\n\v\f\x1c-\x1e\x85\u2028\u2029]")
_FENCE = re.compile(r"^[ \t>]*(`{3,}|~{3,})([^\n]*)$", re.MULTILINE)


class RowProblem(Exception):
    """The reason why a row cannot be used; never a part of its text.

    Args:
        reason: it stands in reports.
        fix: what helps, where the reason alone does not say.
    """

    def __init__(self, reason: str, fix: str = "") -> None:
        super().__init__(reason)
        self.fix = fix


def is_absent(value: object) -> bool:
    """Whether a cell holds nothing: null, or the NaN that data frames write for it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def is_blank(value: object) -> bool:
    """Whether a cell says nothing: it is absent, white space, or an empty list."""
    return not value.strip() if isinstance(value, str) else is_absent(value) or value == []


def is_hollow(value: object) -> bool:
    """Whether a value inside a message says nothing: it is blank, or an object of nulls as a schema makes them."""
    return is_blank(value) or (isinstance(value, Mapping) and all(map(is_absent, value.values())))


def scalar_text(value: object) -> str | None:
    """A scalar as text; None for lists, objects and bytes."""
    match value:
        case str():
            return value
        case bool():
            return "true" if value else "false"
        case int() | float() | decimal.Decimal():
            return str(value)
        case datetime.date() | datetime.time():
            return value.isoformat()
        case _:
            return None


def tidy(text: str) -> str:
    """An answer or given data without the white space around it that says nothing; the same when it is tidied twice.

    Taken off are blank lines before it, one blank before its first word, and all white space after it. Two things are
    kept because they are part of code: the indentation of the first line (a tab, or two blanks and more), and what
    follows the last word of a text that ends within an open code fence (CommonMark 0.31, section 4.5).
    """
    body = text.lstrip()
    indent = _LINE_BREAK.split(text[: len(text) - len(body)])[-1]
    if len(indent) > 1 or indent == "\t":
        body = indent + body
    end = body.rstrip()
    return body if len(end) < len(body) and _ends_in_code(end) else end


def _ends_in_code(text: str) -> bool:
    opened = ""
    for fence in _FENCE.finditer(text):
        marks, after = fence.groups()
        if opened:
            closes = marks[0] == opened[0] and len(marks) >= len(opened) and not after.strip()
            opened = "" if closes else opened
        elif marks[0] == "~" or "`" not in after:
            opened = marks
    return bool(opened)


def field(
    row: Mapping[str, object], name: str, *, may_be_number: bool = True, clean: Callable[[str], str] = tidy
) -> str:
    """The text of a required field; numbers, booleans and dates as JSON would write them.

    Args:
        row: a row, or a message.
        name: of the field.
        may_be_number: other scalars than text will do.
        clean: takes the white space around the text off; of a question `str.strip`.

    Raises:
        RowProblem: it is missing, empty, of a wrong type, or no Unicode.
    """
    value = row.get(name)
    if is_absent(value):
        raise RowProblem(f"missing field {name!r}")
    if isinstance(value, float) and math.isinf(value):  # 1e400, as JSON's readers take it
        raise RowProblem(f"a number too large in field {name!r}")
    text = scalar_text(value)
    if text is None or not (may_be_number or isinstance(value, str)):
        raise RowProblem(f"wrong type in field {name!r} ({type(value).__name__})")
    if not text.strip():
        raise RowProblem(f"empty field {name!r}")
    check_unicode(text, name)
    return clean(text)


def optional_field(
    row: Mapping[str, object], name: str, *, may_be_number: bool = True, clean: Callable[[str], str] = tidy
) -> str:
    """The text of a field that may be missing or empty, "" then.

    Raises:
        RowProblem: it is of a wrong type, or no Unicode.
    """
    value = row.get(name)
    if is_absent(value) or (isinstance(value, str) and not value.strip()):
        return ""
    return field(row, name, may_be_number=may_be_number, clean=clean)


def list_field(row: Mapping[str, object], name: str) -> list[object]:
    """The list in a field, which may be written as JSON text, as tables without lists have it.

    Raises:
        RowProblem: it is missing, empty or no list.
    """
    value = row.get(name)
    if is_absent(value):
        raise RowProblem(f"missing field {name!r}")
    found = parsed(value) if isinstance(value, str) and value.lstrip().startswith("[") else value
    if not isinstance(found, list):
        raise RowProblem(f"wrong type in field {name!r} ({type(value).__name__})")
    if not found:
        raise RowProblem(f"empty field {name!r}")
    return found


def check_unicode(text: str, name: str) -> None:
    """Refuse a lone surrogate: no tokenizer takes it.

    Raises:
        RowProblem: there is one.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise RowProblem(f"broken Unicode in field {name!r}") from None


def parsed(text: str) -> Any:
    """The value that JSON text stands for; None where it is none, or holds NaN or an infinity."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def json_text(value: object) -> str | None:
    """A value as JSON text, its keys in their order; None for what JSON cannot say. Dates become text."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, default=_plain)
        text.encode("utf-8")
    except (ValueError, TypeError, RecursionError):  # a UnicodeEncodeError is a ValueError
        return None
    return text


def _plain(value: object) -> str:
    if (text := scalar_text(value)) is None:
        raise TypeError
    return text


def without_nulls(value: Any) -> Any:
    """The value without the keys that hold null: a schema of columns gives every object the keys of all others.

    Raises:
        RecursionError: it is nested too deeply.
    """
    if isinstance(value, Mapping):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value
