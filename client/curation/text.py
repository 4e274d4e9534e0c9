"""Rows as plain words: the form in which they are compared, and the one place that says what a word is."""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Iterable

from apiary.data.examples import Example


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
    """What users say before the last answer, without a system message, which many rows may share."""
    return "\n".join(turn.text for turn in example.turns[:-1] if turn.role == "user")


def spoken(example: Example) -> str:
    """What users and assistant say, without a system message."""
    return "\n".join(turn.text for turn in example.turns if turn.role != "system")
