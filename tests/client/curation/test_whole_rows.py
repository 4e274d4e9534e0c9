"""Rows with thinking, calls, results and tools, text without a question, answers that are context: all of it counts."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apiary.config.schema import Method
from apiary.data.examples import Example
from apiary.data.turns import ToolCall, Turn, turn_values
from client.curation import Context, curate

TOOLS = '[{"type": "function", "function": {"name": "send", "description": "Sends a mail."}}]'
ASK, ANSWER = Turn("user", "Write to her"), Turn("assistant", "Done.")
CALL = ToolCall("send", '{"to": "her", "copies": 2}', "call_1")
CALLING = Turn("assistant", "", calls=(CALL,))
RESULT = Turn("tool", "sent", name="send", call_id="call_1")
TALK = (ASK, CALLING, RESULT, ANSWER)


def kept(rows: list[Example], name: str, context: Context = Context(), **options: Any) -> list[int]:
    return list(curate(rows, [Method.model_validate({"name": name, **options})], context).kept)


def masked(row: Example, **options: Any) -> Example:
    (made,) = curate([row], [Method.model_validate({"name": "mask", **options})]).examples
    return made


def text(said: str) -> Example:
    """A row that is to be continued."""
    return Example((Turn("assistant", said),), {})


def calling(arguments: str) -> Example:
    return Example((ASK, Turn("assistant", "", calls=(ToolCall("send", arguments),)), RESULT, ANSWER), {}, TOOLS)


def arguments_of(row: Example) -> str:
    return row.turns[1].calls[0].arguments


# --- masking

PLACES: dict[str, Callable[[str], Example]] = {
    "system": lambda said: Example((Turn("system", said), ASK, ANSWER), {}),
    "user": lambda said: Example((Turn("user", said), ANSWER), {}),
    "data": lambda said: Example((Turn("user", f"Sum up.\n\n{said}", data=9), ANSWER), {}),
    "answer": lambda said: Example((ASK, Turn("assistant", said)), {}),
    "untrained": lambda said: Example((ASK, Turn("assistant", said, trained=False), ASK, ANSWER), {}),
    "text": text,
    "thinking": lambda said: Example((ASK, ANSWER._replace(thinking=said)), {}),
    "arguments": lambda said: calling(json.dumps({"to": said})),
    "key": lambda said: calling(json.dumps({said: 1})),
    "nested": lambda said: calling(json.dumps({"a": [{"b": ["x", said]}]}, ensure_ascii=False)),
    "name of a call": lambda said: Example((ASK, CALLING._replace(calls=(CALL._replace(name=said),)), ANSWER), {}),
    "id of a call": lambda said: Example((ASK, CALLING._replace(calls=(CALL._replace(id=said),)), ANSWER), {}),
    "result": lambda said: Example((ASK, CALLING, RESULT._replace(text=said), ANSWER), {}),
    "JSON result": lambda said: Example((ASK, CALLING, RESULT._replace(text=json.dumps([said])), ANSWER), {}),
    "name of a tool": lambda said: Example((ASK, CALLING, RESULT._replace(name=said), ANSWER), {}),
    "id of a result": lambda said: Example((ASK, CALLING, RESULT._replace(call_id=said), ANSWER), {}),
    "tools": lambda said: Example(TALK, {}, TOOLS.replace("Sends a mail.", json.dumps(said)[1:-1])),
}


@pytest.mark.parametrize("place", PLACES)
@settings(max_examples=15, deadline=None)
@given(before=st.text('aé中\n\\" {}[],:', max_size=6), after=st.text('aé中\n\\" {}[],:', max_size=6))
def test_no_detail_survives_wherever_it_stands(place: str, before: str, after: str) -> None:
    """An address and a number, whatever letters and signs of JSON stand beside them; and JSON stays JSON."""
    row = PLACES[place](f"{before} ann@x.example or +49 30 123456 {after}")
    made = masked(row)
    everything = json.dumps([turn_values(made.turns), made.tools])
    assert "ann@" not in everything and "123456" not in everything and "x.example" not in everything
    assert "EMAIL_1>" in everything and "PHONE_1>" in everything
    for turn in made.turns:
        for call in turn.calls:
            json.loads(call.arguments)
    json.loads(made.tools or "0")
    assert masked(made) == made


def test_one_person_has_one_number_in_all_of_a_row() -> None:
    row = Example(
        (
            Turn("user", "Write to bo@x.example"),
            Turn(
                "assistant",
                "",
                thinking="Not ann@x.example but bo@x.example.",
                calls=(ToolCall("send", '{"to":"BO@x.example","cc":["ann@x.example"]}', "bo@x.example"),),
            ),
            Turn("tool", '{"failed": "ann@x.example"}', call_id="bo@x.example"),
            Turn("assistant", "Not ann@x.example"),
        ),
        {},
        '[{"name": "send", "description": "as cy@x.example and bo@x.example"}]',
    )
    asked, call, result, answer = masked(row).turns
    assert asked.text == "Write to <EMAIL_1>"
    assert call.thinking == "Not <EMAIL_2> but <EMAIL_1>."
    assert call.calls == (ToolCall("send", '{"to":"<EMAIL_1>","cc":["<EMAIL_2>"]}', "<EMAIL_1>"),)
    assert (result.text, result.call_id, answer.text) == ('{"failed": "<EMAIL_2>"}', "<EMAIL_1>", "Not <EMAIL_2>")
    assert masked(row).tools == '[{"name": "send", "description": "as <EMAIL_3> and <EMAIL_1>"}]'


@pytest.mark.parametrize(
    ("given", "right"),
    [
        ('{"phone": 4155550123, "n": 12}', '{"phone": "<PHONE_1>", "n": 12}'),
        ('{"phoneNumber":"4155550123"}', '{"phoneNumber":"<PHONE_1>"}'),
        ('{"home_phone": ["4155550123", 4155550199]}', '{"home_phone": ["<PHONE_1>", "<PHONE_2>"]}'),
        ('{"order": 4155550123}', '{"order": 4155550123}'),
        ('{"kind": "phone", "is": 4155550123}', '{"kind": "phone", "is": "<PHONE_1>"}'),
        ('{"cards": [1,4111111111111111,2]}', '{"cards": [1,"<CARD_1>",2]}'),
        (r'{"to": "ann\u0040x.example", "u": "\u00fc"}', r'{"to": "<EMAIL_1>", "u": "\u00fc"}'),
        (r'{"to": "M\u00fcller@x.example \u00fc"}', r'{"to": "<EMAIL_1> \u00fc"}'),
        ('{"to": "ü\\nann@x.example"}', '{"to": "ü\\n<EMAIL_1>"}'),
        (r'{"had": "\u003cEMAIL_7\u003e", "to": "a@x.example"}', r'{"had": "\u003cEMAIL_7\u003e", "to": "<EMAIL_8>"}'),
        ('{"1":  1.50, "b" :"x",\n"1": true}', '{"1":  1.50, "b" :"x",\n"1": true}'),
        ("[1] see ann@x.example", "[1] see <EMAIL_1>"),
    ],
)
def test_json_keeps_its_layout_and_a_key_says_what_a_number_is(given: str, right: str) -> None:
    assert arguments_of(masked(calling(given), regions=["US"])) == right


def test_where_the_data_of_a_question_begins_moves_with_the_text_before_it() -> None:
    def data_of(said: str, data: int) -> str:
        turn = masked(Example((Turn("user", said, data=data), ANSWER), {})).turns[0]
        return turn.text[turn.data :]

    said = "Write to ann@x.example:\n\nAsk bo@x.example."
    assert data_of(said, said.index("Ask")) == "Ask <EMAIL_2>."
    across = "Call\n\n+49 30\n\n123456 now"
    made = masked(Example((Turn("user", across, data=across.index("123456")), ANSWER), {})).turns[0]
    assert made.data is not None and "123456" not in made.text[: made.data]


# --- what is compared


def test_rows_that_differ_in_a_call_its_tools_or_what_is_trained_are_not_the_same() -> None:
    first, second = (Turn("user", "a"), Turn("assistant", "b")), (Turn("user", "c"), Turn("assistant", "d"))
    untrained = (first[0], first[1]._replace(trained=False), *second)
    rows = [
        Example(TALK, {}, TOOLS),
        Example(TALK, {}),
        Example((ASK, CALLING._replace(calls=(CALL._replace(name="post"),)), RESULT, ANSWER), {}, TOOLS),
        Example((ASK, CALLING._replace(thinking="Hm."), RESULT, ANSWER), {}, TOOLS),
        Example((ASK, CALLING, RESULT, CALLING), {}, TOOLS),
        Example((*first, *second), {}),
        Example(untrained, {}),
    ]
    again = [
        calling('{"copies":2,  "to": "her"}'),  # in another order and layout, under other ids
        Example((ASK, CALLING._replace(thinking="HM. "), RESULT, ANSWER), {}, TOOLS),
    ]
    assert kept([*rows, *again], "duplicates") == list(range(len(rows)))


def test_calls_are_part_of_what_near_duplicates_share() -> None:
    long = {"body": " ".join(f"word{i}" for i in range(40))}
    other = {"body": " ".join(f"term{i}" for i in range(40))}
    rows = [calling(json.dumps(arguments)) for arguments in (long, other, {**long, "n": 1})]
    assert kept(rows, "near_duplicates") == [1, 2]


def test_a_row_that_ends_in_a_call_has_an_answer_and_thinking_is_none() -> None:
    ends = Example((ASK, CALLING), {}, TOOLS)  # send to her copies 2: five words
    assert [kept([ends], "length", min=5), kept([ends, ends], "length", max=5)] == [[0], [0, 1]]
    thinks = Example((ASK, Turn("assistant", "Yes.", thinking="I see. " * 20)), {})
    rows = [thinks, Example((ASK, Turn("assistant", "one two")), {})]
    assert kept(rows, "length", min=2) == [1]
    assert kept(rows, "length", max=2) == [0, 1]
    assert kept(rows, "length", repetition=0.5) == [1]
    drafted = Example((ASK, Turn("assistant", "a b c d", thinking="a b c d")), {})
    assert kept([drafted], "length", repetition=0.1) == [0]


def test_the_answer_that_is_learnt_is_the_one_that_is_judged() -> None:
    rows = [
        Example((ASK, Turn("assistant", "one two three"), ASK, Turn("assistant", "x", trained=False)), {}),
        Example((ASK, Turn("assistant", "x", trained=False), ASK, Turn("assistant", "one two three")), {}),
        Example((ASK, Turn("assistant", "one two three", trained=False), ASK, Turn("assistant", "x")), {}),
    ]
    assert kept(rows, "length", min=3) == [0, 1]


def test_a_held_out_row_without_a_question_is_not_the_question_of_all_such_rows() -> None:
    apart = Context(held_out=[text("A tale of bees."), Example(TALK, {}, TOOLS)])
    rows = [text("a tale of  BEES"), text("Another tale."), Example((Turn("user", "other"), *TALK[1:]), {}, TOOLS)]
    assert kept(rows, "held_out", apart) == [1, 2]


def test_a_run_of_words_in_a_call_or_a_result_is_found_in_held_out_rows() -> None:
    words = " ".join(f"word{i}" for i in range(12))
    apart = Context(held_out=[Example((ASK, CALLING, RESULT._replace(text=words), ANSWER), {}, TOOLS)])
    rows = [
        Example((Turn("user", "other"), *calling(json.dumps({"body": words})).turns[1:]), {}),
        Example((Turn("user", "third"), ANSWER._replace(thinking=words)), {}),
        Example((Turn("user", "fourth"), ANSWER), {}, json.dumps([{"name": words}])),
    ]
    assert kept([*rows, rows[-1]._replace(turns=(Turn("user", "x"), ANSWER))], "held_out", apart) == [2, 3]
