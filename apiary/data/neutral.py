"""A conversation with words that say nothing in the place of its own, to see what a template writes around them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from apiary.data.turns import ToolCall, Turn

__all__ = ["NUMBERED", "Neutral", "is_plain", "neutral", "variants"]

NUMBERED = re.compile(r"xT(\d+)xTx")
_WORD = "xT{:04}xTx"  # nine letters and digits: an id of a call that Mistral's templates take
# Words of JSON Schema, by which templates tell one declaration from another. They are the same in all rows.
_SCHEMA = (
    "type function name description parameters properties required items enum default title format strict return "
    "additionalProperties anyOf oneOf allOf minimum maximum minItems maxItems minLength maxLength pattern nullable "
    "object string number integer boolean array null float int str bool list dict any"
)
_SCHEMA_WORDS = frozenset(re.findall(r"\w+", _SCHEMA))
_WORDS = tuple(_WORD.format(k) for k in range(64))
_NOTHING_MORE = ("", (), "", "")  # thinking, calls, name and call_id of a turn that has none


class Neutral(NamedTuple):
    """The conversation in numbered words, and what each number stands for: first the texts of the turns in order."""

    turns: tuple[Turn, ...]
    tools: str
    texts: Sequence[str]


def is_plain(turns: Sequence[Turn], tools: str = "") -> bool:
    """Whether texts are all there is: no thinking, no tools, no calls and no results of calls."""
    return not tools and all(turn[3:7] == _NOTHING_MORE and turn[0] != "tool" for turn in turns)


def neutral(turns: Sequence[Turn], tools: str = "") -> Neutral:
    """The same shape of conversation, said in numbered words.

    Texts, thinking, names, ids, and all strings within arguments and tools are replaced, equal strings by equal words,
    but for those that are blank, which a template may skip, and the words of JSON Schema in tools.

    Args:
        turns: the conversation.
        tools: what the assistant may call, a JSON list as text; "" for none.
    """
    texts = [turn.text for turn in turns]
    words = _WORDS if len(texts) <= len(_WORDS) else [_WORD.format(k) for k in range(len(texts))]
    plain = tuple(
        [
            Turn(turn.role, word if turn.text.strip() else turn.text, turn.trained)
            for turn, word in zip(turns, words, strict=False)
        ]
    )
    if is_plain(turns, tools):
        return Neutral(plain, "", texts)
    numbers: dict[str, int] = {}

    def word(text: str) -> str:
        if not text.strip():
            return text
        return _WORD.format(numbers.setdefault(text, len(texts) + len(numbers)))

    def schema_word(text: str) -> str:
        return text if text in _SCHEMA_WORDS else word(text)

    def call(one: ToolCall) -> ToolCall:
        return ToolCall(word(one.name), _reworded(one.arguments, word), word(one.id))

    full = tuple(
        turn._replace(
            thinking=word(own.thinking),
            calls=tuple(map(call, own.calls)),
            name=word(own.name),
            call_id=word(own.call_id),
        )
        for turn, own in zip(plain, turns, strict=True)
    )
    declared = _reworded(tools, schema_word) if tools else ""
    return Neutral(full, declared, [*texts, *numbers])


def _reworded(text: str, word: Callable[[str], str]) -> str:
    """JSON text with all its strings and keys replaced."""

    def of(value: object) -> object:
        match value:
            case str():
                return word(value)
            case dict():
                return {word(key): of(item) for key, item in value.items()}
            case list():
                return [of(item) for item in value]
            case _:
                return value

    return json.dumps(of(json.loads(text)), ensure_ascii=False)


def variants(text: str) -> Iterator[str]:
    """The ways in which a template may write a text: as it is, without outer white space, within a JSON string."""
    yield text
    stripped = (
        text.lstrip(),
        text.rstrip(),
        text.strip(),
        text.lstrip("\n"),
        text.rstrip("\n"),
        text.strip("\n"),
    )
    seen = {text}
    for short in stripped:
        if short not in seen:
            seen.add(short)
            yield short
    for raw in (text, text.strip()):
        for ascii_only in (False, True):
            escaped = json.dumps(raw, ensure_ascii=ascii_only)[1:-1]
            if escaped not in seen:
                seen.add(escaped)
                yield escaped
