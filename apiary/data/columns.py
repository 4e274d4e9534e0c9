"""From one row to one conversation: which columns hold what, and what makes a row unusable."""

from __future__ import annotations

import datetime
import decimal
import difflib
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from apiary.core.errors import UserError
from apiary.data.turns import Role, Turn

_ROLES: Mapping[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


class Columns(NamedTuple):
    """Which column holds what: `messages`, or `instruction` (and perhaps `input`) with `output`."""

    instruction: str = ""
    input: str = ""
    output: str = ""
    messages: str = ""

    @property
    def required(self) -> tuple[str, ...]:
        """The columns without which a row cannot be used."""
        return tuple(name for name in (self.instruction, self.output, self.messages) if name)


# Of each row the first that it fills is taken.
_KNOWN = (
    Columns(messages="messages"),
    Columns(messages="conversations"),
    Columns(instruction="instruction", output="output"),
    Columns(instruction="instruction", output="response"),
    Columns(instruction="prompt", output="completion"),
    Columns(instruction="question", output="answer"),
)


_BORDER = "\n\n"  # between an instruction and its input


class RowProblem(Exception):
    """The reason why a row cannot be used; never a part of its text."""


def given_columns(columns: Mapping[str, str]) -> Columns | None:
    """The user's own column names, checked; None where there are none.

    Raises:
        UserError: an unknown field, or not exactly one way to make a conversation.
    """
    if not columns:
        return None
    for name in columns:
        if name not in Columns._fields:
            close = difflib.get_close_matches(name, Columns._fields, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            allowed = ", ".join(Columns._fields)
            raise UserError(f"unknown key 'data.columns.{name}': allowed are {allowed}{hint}")
    given = Columns(**columns)
    is_pair = bool(given.instruction and given.output)
    is_mixed = bool(given.messages and any((given.instruction, given.input, given.output)))
    if is_mixed or not (given.messages or is_pair):
        raise UserError(
            f"data.columns = {dict(columns)!r}: give either messages, or instruction and output (and perhaps input)"
        )
    return given


def check_columns(file: str, rows: Sequence[Mapping[str, object]], given: Columns | None) -> None:
    """Check that some row of a file has the columns that the user named, or else known ones.

    Raises:
        UserError: a column that the user named is not there, or none of the known ones is.
    """
    names = list({name: None for row in rows for name in row})  # in order of appearance
    if given is not None:
        _check_given(file, names, given)
    elif not any(all(name in row for name in known.required) for row in rows for known in _KNOWN):
        raise UserError(
            f"{file}: no columns known as instruction data (it has {_listed(names)}); say which "
            'to use, e.g. data.columns = { instruction = "...", output = "..." }'
        )


def columns_of(row: Mapping[str, object], given: Columns | None = None) -> Columns:
    """The columns to use for a row: the user's, or the known ones that this row fills, the first of several.

    Other rows are not asked. Under record-level privacy a row that could change how its neighbours are read would make
    the sensitivity that of the whole file.

    Args:
        row: one of a file.
        given: the user's own columns, where there are any.
    """
    if given is not None:
        return given
    best = max(_KNOWN, key=lambda known: _fills(row, known))
    extra = next((name for name in ("input", "context") if not is_absent(row.get(name))), "")
    return best if best.messages else best._replace(input=extra)


def _fills(row: Mapping[str, object], columns: Columns) -> tuple[bool, bool, int]:
    """How well a row fills columns: with something in each; with no null; else how many of them are there."""
    values = [row.get(name) for name in columns.required]
    there = not any(map(is_absent, values))
    blank = any(not value.strip() if isinstance(value, str) else value == [] for value in values)
    return there and not blank, there, 0 if there else sum(name in row for name in columns.required)


def _check_given(file: str, names: Sequence[str], given: Columns) -> None:
    for field, name in given._asdict().items():
        if name and name not in names:
            close = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
            hint = f"did you mean {close[0]!r}?" if close else f"it has {_listed(names)}"
            raise UserError(f"data.columns.{field} = {name!r}: {file} has no such column; {hint}")


def _listed(names: Sequence[str], most: int = 12) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more if names else "none"


def turns_of(row: Mapping[str, object], columns: Columns) -> tuple[Turn, ...]:
    """The conversation in a row: [system] user assistant ... assistant, every text non-empty.

    Raises:
        RowProblem: a field is missing, empty or of the wrong type, or the turns are out of order.
    """
    if columns.messages:
        return _conversation(_list_field(row, columns.messages))
    prompt, answer = row.get(columns.instruction), row.get(columns.output)
    if _is_chat(prompt) and _is_chat(answer):  # TRL's conversational prompt and completion
        return _conversation(_list_field(row, columns.instruction) + _list_field(row, columns.output))
    user = _field(row, columns.instruction, may_be_number=False)
    extra = _optional_field(row, columns.input) if columns.input else ""
    return (
        Turn("user", f"{user}{_BORDER}{extra}", data=len(user) + len(_BORDER)) if extra else Turn("user", user),
        Turn("assistant", _field(row, columns.output)),
    )


def with_turns(row: Mapping[str, object], columns: Columns, turns: Sequence[Turn]) -> dict[str, object]:
    """The row with what `turns` now say in the fields that they came from; the other fields are left as they were.

    Where a rewritten question no longer shows where the input begins, all of it becomes the instruction.

    Args:
        row: one that `turns_of` takes.
        columns: as there.
        turns: the row's own, some of them rewritten.

    Raises:
        ValueError: they are not of the same number or roles.
    """
    before = turns_of(row, columns)
    if [turn.role for turn in turns] != [turn.role for turn in before]:
        raise ValueError("the turns are not those of the row")
    new = [None if now == was else now.text for was, now in zip(before, turns, strict=True)]
    new_row = dict(row)
    if columns.messages:
        new_row[columns.messages] = _rewritten(_list_field(row, columns.messages), new)
    elif _is_chat(row[columns.instruction]):
        prompt = _list_field(row, columns.instruction)
        new_row[columns.instruction] = _rewritten(prompt, new[: len(prompt)])
        new_row[columns.output] = _rewritten(_list_field(row, columns.output), new[len(prompt) :])
    else:
        question, answer = new
        if answer is not None:
            new_row[columns.output] = answer
        if question is not None:
            new_row |= _parted(row, columns, question)
            if turns_of(new_row, columns) != tuple(turns):
                new_row |= {columns.instruction: question, columns.input: ""}
    return new_row


def _rewritten(messages: Sequence[object], texts: Sequence[str | None]) -> list[object]:
    """The messages with the texts that are not None."""
    rewritten: list[object] = []
    for message, text in zip(messages, texts, strict=True):
        if text is not None and isinstance(message, Mapping):
            rewritten.append({**message, "content" if message.get("role") is not None else "value": text})
        else:
            rewritten.append(message)
    return rewritten


def _parted(row: Mapping[str, object], columns: Columns, text: str) -> dict[str, object]:
    """A rewritten question as instruction and input, told apart by how many blank lines stood in each."""
    if not (columns.input and _optional_field(row, columns.input)):
        return {columns.instruction: text}
    parts = text.split(_BORDER)
    first = _field(row, columns.instruction).count(_BORDER) + 1
    if len(parts) <= first or len(parts) - first != _optional_field(row, columns.input).count(_BORDER) + 1:
        return {columns.instruction: text, columns.input: ""}
    return {columns.instruction: _BORDER.join(parts[:first]), columns.input: _BORDER.join(parts[first:])}


def _is_chat(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) for item in value)


def _conversation(messages: Sequence[object]) -> tuple[Turn, ...]:
    turns = tuple(_turn(message) for message in messages)
    roles = [turn.role for turn in turns]
    spoken = roles[1:] if roles[0] == "system" else roles
    if "assistant" not in spoken:
        raise RowProblem("no assistant turn")
    if "system" in spoken:
        raise RowProblem("a system turn that is not the first turn")
    if any(a == b for a, b in itertools.pairwise(spoken)):
        raise RowProblem("two turns of the same role in a row")
    if spoken[0] != "user":
        raise RowProblem("starts with an assistant turn")
    if spoken[-1] != "assistant":
        raise RowProblem("does not end in an assistant turn")
    return turns


def _turn(message: object) -> Turn:
    """The turn in a message with role and content, or from and value (ShareGPT)."""
    if not isinstance(message, Mapping):
        raise RowProblem("a message is not an object")
    by_role = message.get("role") is not None
    role = message.get("role" if by_role else "from")
    if role is None:
        raise RowProblem("a message has no role")
    if not isinstance(role, str) or role not in _ROLES:
        raise RowProblem("unknown role in a message")
    return Turn(_ROLES[role], _field(message, "content" if by_role else "value"))


def _list_field(row: Mapping[str, object], name: str) -> list[object]:
    value = row.get(name)
    if value is None:
        raise RowProblem(f"missing field {name!r}")
    if not isinstance(value, list):
        raise RowProblem(f"wrong type in field {name!r} ({type(value).__name__})")
    if not value:
        raise RowProblem(f"empty field {name!r}")
    return value


def _field(row: Mapping[str, object], name: str, *, may_be_number: bool = True) -> str:
    """The text of a required field; numbers, booleans and dates as JSON would write them."""
    value = row.get(name)
    if is_absent(value):
        raise RowProblem(f"missing field {name!r}")
    text = scalar_text(value)
    if text is None or not (may_be_number or isinstance(value, str)):
        raise RowProblem(f"wrong type in field {name!r} ({type(value).__name__})")
    if not text.strip():
        raise RowProblem(f"empty field {name!r}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate: no tokenizer takes it
        raise RowProblem(f"broken Unicode in field {name!r}") from None
    return text.strip()


def _optional_field(row: Mapping[str, object], name: str) -> str:
    value = row.get(name)
    is_blank = is_absent(value) or (isinstance(value, str) and not value.strip())
    return "" if is_blank else _field(row, name)


def is_absent(value: object) -> bool:
    """Whether a cell holds nothing: null, or the NaN that data frames write for it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


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
