"""Rows as plain words: the form in which they are compared."""

from __future__ import annotations

import re
import unicodedata

from apiary.data.examples import Example

# Scripts that put no space between words count each character as a word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")


def normalise(text: str) -> str:
    """The text after NFKC, case folding, and with each run of white space as one space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def words(text: str) -> list[str]:
    """The normalised words, without punctuation."""
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
