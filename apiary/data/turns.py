"""A conversation: its turns, what an assistant's turn may carry beside its text, and one form for digests and files."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

Role = Literal["system", "user", "assistant", "tool"]


class ToolCall(NamedTuple):
    """A call that an assistant makes. arguments: a JSON object as text; id: what its result refers to, "" for none."""

    name: str
    arguments: str
    id: str = ""


class Turn(NamedTuple):
    """One message of a conversation.

    text: what is said; "" only where an assistant calls tools and says nothing.
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
    turns = (Turn(*values) for values in rows)
    return tuple(turn._replace(calls=tuple(ToolCall(*call) for call in turn.calls)) for turn in turns)


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
