"""A word keeps the marks on it, and every step that compares words sees them."""
# ruff: noqa: RUF001 (words in many scripts)

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apiary.config.schema import Method
from apiary.data.examples import Example
from apiary.data.turns import Turn
from client.curation import Context, curate
from client.curation.text import words


def row(question: str, answer: str) -> Example:
    return Example((Turn("user", question), Turn("assistant", answer)), {})


def kept(examples: Sequence[Example], name: str, context: Context = Context(), **options: Any) -> list[int]:
    return list(curate(examples, [Method.model_validate({"name": name, **options})], context).kept)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("मेरी चाची की शादी", ["मेरी", "चाची", "की", "शादी"]),
        ("শিশু, தமிழ்", ["শিশু", "தமிழ்"]),
        ("كِتَابٌ كتاب", ["كِتَابٌ", "كتاب"]),
        ("שָׁלוֹם", ["שָׁלוֹם"]),
        ("Cafe\u0301 café", ["café", "café"]),
        ("q\u0307x y", ["q\u0307x", "y"]),  # has no composed form
        ("می\u200cخواهم", ["می\u200cخواهم"]),
        ("ที่นี่", ["ที่", "นี่"]),
        ("◌ा ◌ि", ["ा", "ि"]),
        ("我们。好・ミル", ["我", "们", "好", "ミ", "ル"]),
        ("❤\ufe0f 🙂 ... 1\ufe0f\u20e3", ["1\ufe0f\u20e3"]),
        ("don't a_b x-y", ["don", "t", "a_b", "x", "y"]),
    ],
)
def test_words(text: str, right: list[str]) -> None:
    assert words(text) == right


@given(st.text())
def test_no_letter_digit_or_mark_is_lost(text: str) -> None:
    """Every character that the standard calls letter, mark on something, or number stands in exactly one word."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    alnum = [c for c in plain if c.isalnum() or c == "_"]
    assert [c for c in "".join(words(text)) if c.isalnum() or c == "_"] == alnum


def test_rows_that_differ_in_a_vowel_sign_are_different() -> None:
    uncle = row("मेरे चाचा की शादी में क्या पहनूँ और क्या उपहार दूँ?", "चाचा के लिए काला कुर्ता और किताब ठीक रहेगी")
    aunt = row("मेरी चाची की शादी में क्या पहनूँ और क्या उपहार दूँ?", "चाची के लिए काली कुर्ती और किताब ठीक रहेगी")
    two, gave = (row("दिन में कितनी बार दवा लूँ बताइए साफ साफ?", answer) for answer in ("दो बार", "दी बार"))
    rows = [uncle, aunt, two, gave]
    for step in ("duplicates", "near_duplicates"):
        assert kept(rows, step) == [0, 1, 2, 3]
    assert kept([aunt, gave], "held_out", Context(held_out=[uncle])) == [0, 1]
    arabic = [row("ما معنى هذه الكلمة في الجملة؟", word) for word in ("كَتَبَ الولد", "كُتِبَ الولد")]
    assert kept(arabic, "near_duplicates") == [0, 1]


def test_marks_make_no_words_and_accents_no_characters() -> None:
    hindi = row("कितने?", "हिन्दी की किताबें")  # three words, which were six pieces without their vowel signs
    assert kept([hindi], "length", max=3) == [0]
    decomposed = row("Where?", unicodedata.normalize("NFD", "éàü"))
    assert kept([decomposed, row("x", "no")], "length", unit="characters", max=3) == [0, 1]
