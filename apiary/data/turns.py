"""A conversation: its turns, what an assistant's turn may carry beside its text, and one form for digests and files."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple, get_args

Role = Literal["system", "user", "assistant", "tool"]


class ToolCall(NamedTuple):
    """A call that an assistant makes. arguments: a JSON object as text; id: what its result refers to, "" for none."""

    name: str
    arguments: str
    id: str = ""


class Turn(NamedTuple):
    """One message of a conversation.

    text: what is said; "" only where an assistant calls tools and says nothing, or a tool returns nothing.
    trained: False for an assistant's turn that is context and not learnt; other roles are never trained.
    thinking: an assistant's reasoning before the text, "" for none.
    calls: what an assistant calls, in order.
    name, call_id: of a tool's turn, which tool answers and which call; "" where the row does not say.
    data: where in a user's text the part begins that was given and not asked (an input, a context); None for nowhere.
    A tool's turn is data as a whole.
    """

    role: Role
    text: str
    trained: bool = True
    thinking: str = ""
    calls: tuple[ToolCall, ...] = ()
    name: str = ""
    call_id: str = ""
    data: int | None = None


def turn_values(turns: Iterable[Turn]) -> list[list[Any]]:
    """The turns as JSON values: role and text, and the other fields up to the last one that says something."""
    plain = Turn("user", "")
    rows: list[list[Any]] = []
    for turn in turns:
        values: list[Any] = list(turn)
        while len(values) > 2 and values[-1] == plain[len(values) - 1]:
            del values[-1]
        rows.append(values)
    return rows


def turns_of_values(rows: Iterable[Iterable[Any]]) -> tuple[Turn, ...]:
    """The turns of which `turn_values` made these values.

    Raises:
        TypeError: they are of another shape.
    """
    turns = [Turn(*values) for values in rows]
    turns = [turn._replace(calls=tuple(ToolCall(*call) for call in turn.calls)) for turn in turns]
    if not all(map(_is_whole, turns)):
        raise TypeError("a field of a turn is of another type")
    return tuple(turns)


def _is_whole(turn: Turn) -> bool:
    texts = (turn.text, turn.thinking, turn.name, turn.call_id, *(part for call in turn.calls for part in call))
    return (
        turn.role in get_args(Role)
        and all(isinstance(text, str) for text in texts)
        and isinstance(turn.trained, bool)
        and (turn.data is None or type(turn.data) is int)
    )


def answer_index(turns: Sequence[Turn]) -> int:
    """The index of the last assistant's turn that is trained, or of the last one where none is.

    Raises:
        ValueError: there is no assistant's turn.
    """
    answers = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
    return max([i for i in answers if turns[i].trained] or answers)


def said(turn: Turn) -> str:
    """All that a turn says, for people to read: thinking, text, and each call as name(arguments), by line."""
    calls = (f"{call.name}({call.arguments})" for call in turn.calls)
    return "\n".join(part for part in (turn.thinking, turn.text, *calls) if part)


def conversation_text(turns: Iterable[Turn]) -> str:
    """What is said, as JSON, for digests: where a data part begins is how a row is laid out and does not count."""
    return json.dumps(turn_values(turn._replace(data=None) for turn in turns))


def opening_text(turns: Sequence[Turn]) -> str:
    """What rows that ask the same have in common: all up to the first question, without regard to case and white space.

    Of a row without a question it is all that is said.
    """
    end = next((i for i, turn in enumerate(turns, 1) if turn.role == "user"), len(turns))
    text = "\x1e".join(f"{turn.role}\x1f{' '.join(turn.text.split())}" for turn in turns[:end])
    return unicodedata.normalize("NFC", text).casefold()
