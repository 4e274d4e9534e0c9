"""Rows as plain words: the form in which they are compared, and the one place that says what a word is."""

from __future__ import annotations

import json
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator

from apiary.data.examples import Example
from apiary.data.turns import Turn, answer_index


def _ranges(points: Iterable[int]) -> str:
    """Code points, rising, as the inside of a character class."""
    runs: list[list[int]] = []
    for point in points:
        if runs and point == runs[-1][1] + 1:
            runs[-1][1] = point
        else:
            runs.append([point, point])
    return "".join(rf"\U{first:08x}-\U{last:08x}" for first, last in runs)


# Scripts that put no space between words count each character as a word.
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
# Vowel signs, viramas, accents, points of Arabic and Hebrew: Python's \w knows none of them. All but a block of
# variation selectors lie in the first two planes, which is quick to look through.
_SELECTORS = "\ufe00-\ufe0f\U000e0100-\U000e01ef"
MARKS = _ranges(
    point
    for point in range(min(0x20000, sys.maxunicode))
    if unicodedata.category(chr(point)) in ("Mn", "Mc") and not 0xFE00 <= point <= 0xFE0F
)
_JOINED = (
    rf"{MARKS}{_SELECTORS}\u20dd-\u20e4\u200c\u200d"  # what goes on a word: also joiners, and rings around letters
)
_WORD = re.compile(rf"(?=\w)[{UNSPACED}][{_JOINED}]*|(?:[^\W{UNSPACED}]|[{MARKS}])(?:[^\W{UNSPACED}]|[{_JOINED}])*")


def normalise(text: str) -> str:
    """The text after NFKC, case folding, and with each run of white space as one space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def words(text: str) -> list[str]:
    """The normalised words, without punctuation.

    A word is a run of letters and digits with the combining marks and joiners on them, as in rule WB4 of Unicode
    Standard Annex 29; so rows that differ in a vowel sign differ in a word. In a script without spaces a word is one
    letter with its marks.
    """
    return _WORD.findall(normalise(text))


def ngrams(tokens: list[str], n: int) -> list[tuple[str, ...]]:
    """Every run of `n` words; none where there are fewer."""
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def question(example: Example) -> str:
    """What users say before the last answer that is trained, without a system message, which many rows may share.

    Results of tools are no question: they follow from one.
    """
    turns = example.turns[: answer_index(example.turns)]
    return "\n".join(turn.text for turn in turns if turn.role == "user")


def response(example: Example) -> str:
    """The last answer that is trained: its text and its calls, without the thinking before them."""
    return _told(example.turns[answer_index(example.turns)]._replace(thinking=""))


def spoken(example: Example) -> str:
    """What users, assistant and tools say, thinking and calls too, without a system message and the tools' manual."""
    return "\n".join(_told(turn) for turn in example.turns if turn.role != "system")


def _told(turn: Turn) -> str:
    """All that a turn says, of its calls the names, the keys and the values without JSON's signs."""
    calls = (" ".join([call.name, *_leaves(call.arguments)]) for call in turn.calls)
    return "\n".join(part for part in (turn.thinking, turn.text, *calls) if part)


def _leaves(arguments: str) -> Iterator[str]:
    try:
        left = [json.loads(arguments)]
    except (ValueError, RecursionError):
        yield arguments
        return
    while left:
        match left.pop():
            case dict(fields):
                left += [part for field in reversed(fields.items()) for part in reversed(field)]
            case list(items):
                left += reversed(items)
            case value:
                yield value if isinstance(value, str) else json.dumps(value)
