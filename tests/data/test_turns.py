"""Conversations as values: what goes to a file comes back, and old digests stay."""

from __future__ import annotations

import json

import pytest

from apiary.data.turns import (
    ToolCall,
    Turn,
    answer_index,
    conversation_text,
    opening_text,
    said,
    turn_values,
    turns_of_values,
)

CALL = ToolCall("weather", '{"city": "Oslo"}', "call_1")
TURNS = (
    Turn("system", "Be brief."),
    Turn("user", "Sum up.\n\nA text.", data=9),
    Turn("assistant", "", thinking="I need the weather.", calls=(CALL,)),
    Turn("tool", "4 degrees", name="weather", call_id="call_1"),
    Turn("assistant", "Cold.", trained=False),
)


def test_turns_survive_json() -> None:
    assert turns_of_values(json.loads(json.dumps(turn_values(TURNS)))) == TURNS


def test_a_turn_that_says_nothing_else_is_its_role_and_text() -> None:
    plain = (Turn("user", "a"), Turn("assistant", "b"))
    assert conversation_text(plain) == '[["user", "a"], ["assistant", "b"]]'


def test_where_the_data_part_begins_does_not_count_as_said() -> None:
    there, nowhere = Turn("user", "a\n\nb", data=3), Turn("user", "a\n\nb")
    assert conversation_text([there]) == conversation_text([nowhere])
    for other in (Turn("assistant", "a", trained=False), Turn("assistant", "a", thinking="b"), Turn("tool", "a")):
        assert conversation_text([other]) != conversation_text([Turn("assistant", "a")])


@pytest.mark.parametrize(
    "rows",
    [
        [["user"]],
        [["user", "a", True, "", [], "", "", None, "more"]],
        [3],
        [["bee", "a"]],
        [["user", 3]],
        [["assistant", "a", 1]],
        [["assistant", "a", True, None]],
        [["assistant", "", True, "", [["send", {"to": "her"}, ""]]]],
        [["assistant", "", True, "", [["send"]]]],
        [["tool", "a", True, "", [], 7]],
        [["user", "a", True, "", [], "", "", True]],
    ],
)
def test_other_shapes_are_refused(rows: list[object]) -> None:
    with pytest.raises(TypeError):
        turns_of_values(rows)  # type: ignore[arg-type]


def test_the_opening_of_a_row_without_a_question_is_all_of_it() -> None:
    assert opening_text([Turn("assistant", "Once  upon\na Time")]) == "assistant\x1fonce upon a time"
    assert opening_text([Turn("user", "A"), Turn("assistant", "B")]) == "user\x1fa"


def test_the_answer_that_counts_is_the_last_that_is_trained() -> None:
    assert answer_index(TURNS) == 2
    assert answer_index([Turn("user", "a"), Turn("assistant", "b", trained=False), Turn("tool", "c")]) == 1
    with pytest.raises(ValueError, match="empty"):
        answer_index(TURNS[:2])


def test_all_that_a_turn_says_is_read_in_its_order() -> None:
    assert said(TURNS[2]) == 'I need the weather.\nweather({"city": "Oslo"})'
    assert said(Turn("assistant", "Cold.", thinking="Hm.")) == "Hm.\nCold."
