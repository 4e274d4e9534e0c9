"""What people bring in a row: each shape is read as the right turns or told in a line, and is written back as such."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apiary.core.errors import UserError
from apiary.data.examples import Example, FileReport, as_read, check, read
from apiary.data.sources import RawFile
from apiary.data.turns import ToolCall, Turn

Q, A = Turn("user", "Who?"), Turn("assistant", "Me.")
GOOD = {"instruction": "Who?", "output": "Me."}


def user(text: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": text, **more}


def says(text: Any = "Me.", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def system(text: Any, **more: Any) -> dict[str, Any]:
    return {"role": "system", "content": text, **more}


def file_of(*rows: object) -> list[RawFile]:
    return [RawFile("d.jsonl", "d", list(enumerate(rows, 1)))]


def one(row: dict[str, Any], columns: dict[str, str] | None = None) -> tuple[Example, list[str]]:
    """What a row alone is read as, and the remarks on it."""
    source = check(file_of(row), columns=columns or {})
    (example,) = source.examples
    return example, list(source.reports[0].remarks)


def refused(row: object, columns: dict[str, str] | None = None) -> str:
    """Why a row beside a good one is left out."""
    good: dict[str, Any] = GOOD if not columns else dict.fromkeys(columns.values(), "x")
    (report,) = check(file_of(good, row), columns=columns or {}).reports
    ((reason, (count, rows)),) = report.problems.items()
    assert (count, rows) == (1, (2,))
    return reason


def test_of_several_flags_of_a_message_one_no_is_enough() -> None:
    talk = [user("Who?"), says("I."), user("Sure?"), says("No.")]
    for flags in ({"weight": 1, "train": False}, {"train": True, "weight": 0}, {"loss": "0", "train": "true"}):
        example, _ = one({"messages": [talk[0], {**talk[1], **flags}, *talk[2:]]})
        assert [turn.trained for turn in example.turns if turn.role == "assistant"] == [False, True]


def test_a_number_that_is_too_large_is_not_learnt_as_a_word() -> None:
    assert refused({**GOOD, "output": json.loads("1e400")}) == "a number too large in field 'output'"


# --- answers that are not to be learnt as they stand


@pytest.mark.parametrize(
    "row", [{"prompt": "Who?", "completion": "Me."}, {"prompt": [user("Who?")], "completion": [says()]}]
)
def test_a_completion_that_is_marked_as_a_bad_one_is_not_imitated(row: dict[str, Any]) -> None:
    """Unpaired preferences (TRL's KTO trainer)."""
    assert one({**row, "label": True})[0].turns == (Q, A)
    for label in (False, "false"):
        assert "label = false" in refused({**row, "label": label})
    assert one({"instruction": "Who?", "output": "Me.", "label": False})[0].turns == (Q, A)  # a class of the text


@pytest.mark.parametrize("options", [["He", "Me", "We"], {"text": ["He", "Me"], "label": ["A", "B"]}])
def test_an_answer_that_only_names_a_choice_is_refused(options: object) -> None:
    row = {"question": "Who?", "choices": options}
    for answer in (1, "B", "(b)", "b."):
        assert "write them into the question" in refused({**row, "answer": answer})
    example, remarks = one({**row, "answer": "Me."})
    assert example.turns == (Q, A) and remarks == ["column choices is not used (read: answer, question)"]


@pytest.mark.parametrize("name", ["history", "documents", "options"])
def test_what_a_question_may_need_and_is_not_read_is_said(name: str) -> None:
    assert one({**GOOD, name: [["Hi", "Ho"]]})[1] == [f"column {name} is not used (read: instruction, output)"]


@pytest.mark.parametrize("key", ["arguments", "parameters", "args", "input"])
def test_arguments_of_calls_under_any_name(key: str) -> None:
    for call in ({"name": "f", key: {"x": 1}}, {"type": "tool_use", "name": "f", key: '{"x": 1}'}):
        example, _ = one({"messages": [user("Who?"), says("", tool_calls=[call])]})
        assert example.turns[1].calls == (ToolCall("f", '{"x": 1}'),)
    other = refused({"messages": [user("Who?"), says("", tool_calls=[{"name": "f", "kwargs": {"x": 1}}])]})
    assert "no arguments but 'kwargs'" in other


# --- the system column


@pytest.mark.parametrize("name", ["system", "system_prompt", "System Prompt", " SYSTEM "])
@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Who?", "output": "Me."},
        {"question": "Who?", "response": "Me."},  # OpenOrca
        {"messages": [user("Who?"), says()]},
        {"prompt": [user("Who?")], "completion": [says()]},
    ],
)
def test_a_system_column_is_the_system_turn(row: dict[str, Any], name: str) -> None:
    example, remarks = one({name: " Be brief.\n", **row})
    assert example.turns == (Turn("system", "Be brief."), Q, A)
    assert (example.tags, remarks) == ({}, [])


def test_an_empty_system_column_is_no_turn() -> None:
    for value in ("", "  ", None, float("nan")):
        assert one({"system": value, **GOOD})[0].turns == (Q, A)


def test_a_system_column_beside_messages_with_their_own_is_not_used_and_that_is_said() -> None:
    example, remarks = one({"system": "Be long.", "messages": [system("Be brief."), user("Who?"), says()]})
    assert example.turns == (Turn("system", "Be brief."), Q, A)
    assert remarks == ["column system is not used (read: messages)"]


def test_a_system_column_of_another_type_is_a_problem() -> None:
    assert refused({"system": {"a": 1}, **GOOD}) == "wrong type in field 'system' (dict)"


# --- what a message carries beside its text


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_thinking_is_read(name: str) -> None:
    example, remarks = one({"messages": [user("Who?"), says(**{name: "It is I.\n"})]})
    assert example.turns == (Q, A._replace(thinking="It is I."))
    assert remarks == []


def test_thinking_of_the_user_or_of_another_type_is_not_used_and_that_is_said() -> None:
    example, remarks = one({"messages": [user("Who?", thinking="hm"), says(reasoning={"effort": 1})]})
    assert example.turns == (Q, A)
    assert remarks == ["field 'thinking' of messages is not used", "field 'reasoning' of messages is not used"]


@pytest.mark.parametrize("name", ["thinking", "Reasoning", "reasoning_content"])
@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Who?", "output": "Me."},
        {"question": "Who?", "answers": {"text": ["Me."], "answer_start": [0]}},
    ],
)
def test_a_column_of_thinking_is_that_of_the_answer(row: dict[str, Any], name: str) -> None:
    example, remarks = one({**row, name: "\n It is I.\n"})
    assert example.turns == (Q, A._replace(thinking="It is I."))
    assert (example.tags, remarks) == ({}, [])


def test_of_thinking_the_first_column_with_text_is_read_and_others_are_said() -> None:
    example, remarks = one({**GOOD, "reasoning_content": " ", "thinking": "It is I.", "reasoning": "Hm."})
    assert (example.turns[1].thinking, remarks) == (
        "It is I.",
        ["column reasoning is not used (read: instruction, output, thinking)"],
    )
    example, remarks = one({**GOOD, "thinking": True})  # a setting, it seems
    assert (example.turns, remarks) == ((Q, A), ["column thinking is not used (read: instruction, output)"])
    example, remarks = one({"messages": [user("Who?"), says()], "thinking": "It is I."})  # whose, of several answers?
    assert (example.turns, remarks) == ((Q, A), ["column thinking is not used (read: messages)"])


@pytest.mark.parametrize("no", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"trainable": "false"}, {"loss": 0}])
def test_a_turn_of_weight_nought_is_context(no: dict[str, Any]) -> None:
    example, remarks = one({"messages": [user("Who?"), says("You.", **no), user("Who?"), says(weight=1, train=True)]})
    assert example.turns == (Q, Turn("assistant", "You.", trained=False), Q, A)
    assert remarks == []


def test_other_weights_are_read_as_one_and_said() -> None:
    example, remarks = one({"messages": [user("Who?"), says(weight=0.5)]})
    assert (example.turns, remarks) == ((Q, A), ["a weight or train flag other than 0 and 1 is read as 1"])


def test_flags_of_other_turns_are_ignored_and_said() -> None:
    example, remarks = one({"messages": [system("Be brief.", weight=0), user("Who?", train=False), says()]})
    assert example.turns == (Turn("system", "Be brief."), Q, A)
    assert remarks == ["weights and train flags of turns other than the assistant's are ignored"]


def test_a_row_in_which_nothing_is_trained_is_left_out() -> None:
    rows = {"messages": [user("Who?"), says(weight=0)]}
    assert refused(rows) == "no assistant turn is trained (by its weight or train flag)"
    assert refused({"messages": [says(), *rows["messages"]]}) == refused(rows)  # the first answers no question


def test_unknown_fields_are_counted_and_named_only_if_they_are_names() -> None:
    rows = [
        {"messages": [user("Who?", id=3, name="bob"), says(annotations=[], refusal=None, more={})]},
        {"messages": [user("Who?", id=4), says(**{"Bob's secret, in a key": 1})]},
    ]
    assert check(file_of(*rows)).reports[0].remarks == {
        "field 'id' of messages is not used": (2, (1, 2)),
        "field 'name' of messages is not used": (1, (1,)),
        "other fields of messages are not used": (1, (2,)),
    }


def test_a_file_of_endless_names_gives_no_endless_report() -> None:
    rows = [{"messages": [user("Who?", **{f"field_{i}": 1}), says()]} for i in range(100)]
    (report,) = check(file_of(*rows)).reports
    assert len(report.remarks) == 31
    assert report.remarks["more of other kinds"] == (70, (31, 32, 33, 34, 35))


# --- content, roles


def test_parts_of_text_are_joined() -> None:
    parts = [{"type": "text", "text": "Who?", "image_url": None}, {"type": "text", "text": "And why?"}]
    example, remarks = one({"messages": [user(parts), says([{"type": "text", "text": "Me."}])]})
    assert example.turns == (Turn("user", "Who?\nAnd why?"), A)
    assert remarks == ["the text parts of a message are joined"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "secret"}}],
            "the type 'image_url'",
        ),
        ([{"type": "input_audio", "data": "secret"}], "the type 'input_audio'"),
        ([{"type": "secret"}], "an unknown type"),
        ([{"type": ["secret"]}], "an unknown type"),
        ([{"secret": 1}], "an unknown type"),
        ([{"type": "text", "text": 3}], "an unknown type"),
        ([3], "wrong type in field 'content' (list)"),
        ([{"type": "text", "text": " "}], "empty field 'content'"),
        ([], "empty field 'content'"),
        ({"a": "secret"}, "wrong type in field 'content' (dict)"),
        ([{"type": "text", "text": "\ud800"}], "broken Unicode in field 'content'"),
    ],
)
def test_other_parts_cost_the_row_and_their_kind_is_named_never_their_text(content: Any, reason: str) -> None:
    said = refused({"messages": [user(content), says()]})
    assert reason in said and "secret" not in said


@pytest.mark.parametrize("first", ["user", "human", "Human", " USER "])
@pytest.mark.parametrize("second", ["assistant", "gpt", "bot", "model", "chatgpt", "ChatGPT", "Model"])
@pytest.mark.parametrize("form", [("role", "content"), ("from", "value"), ("from", "content"), ("role", "value")])
def test_roles_have_many_names(first: str, second: str, form: tuple[str, str]) -> None:
    role, content = form
    messages = [{role: first, content: "Who?"}, {role: second, content: "Me."}]
    assert one({"messages": messages})[0].turns == (Q, A)
    assert one({"Conversations": messages})[0].turns == (Q, A)


@pytest.mark.parametrize(("name", "role"), [("developer", "system"), ("System", "system")])
def test_a_developer_is_the_system(name: str, role: str) -> None:
    example, _ = one({"messages": [{"role": name, "content": "Be brief."}, user("Who?"), says()]})
    assert example.turns[0] == Turn(role, "Be brief.")  # type: ignore[arg-type]


def test_messages_may_be_written_as_json_text() -> None:
    row = {"messages": json.dumps([user("Who?"), says()])}
    assert one(row)[0].turns == (Q, A)
    assert refused({"messages": "[secret"}) == "wrong type in field 'messages' (str)"


# --- tools

CALL = ToolCall("weather", '{"city": "Oslo", "days": 2}', "call_1")
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
TOOL_TEXT = '[{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]'
ARGUMENTS = {"city": "Oslo", "days": 2}
CALLED = (
    Q,
    Turn("assistant", "", calls=(CALL,)),
    Turn("tool", "4 degrees", name="weather", call_id="call_1"),
    A,
)
RESULT = {"role": "tool", "content": "4 degrees", "name": "weather", "tool_call_id": "call_1"}


@pytest.mark.parametrize(
    "calls",
    [
        [{"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": json.dumps(ARGUMENTS)}}],
        [{"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}],
        [{"id": "call_1", "name": "weather", "arguments": ARGUMENTS}],
        [{"id": "call_1", "name": "weather", "parameters": {**ARGUMENTS, "unit": None}}],  # as an Arrow schema fills up
        json.dumps([{"id": "call_1", "name": "weather", "arguments": ARGUMENTS}]),
        {"id": "call_1", "function": {"name": "weather", "arguments": ARGUMENTS}},
    ],
)
@pytest.mark.parametrize("content", ["", None])
@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), [TOOL["function"]], json.dumps(TOOL["function"])])
def test_calls_of_tools_are_read_in_every_form(calls: Any, content: str | None, tools: Any) -> None:
    row = {"messages": [user("Who?"), says(content, tool_calls=calls), RESULT, says()], "tools": tools}
    example, remarks = one(row)
    assert (example.turns, example.tools, example.tags, remarks) == (CALLED, TOOL_TEXT, {}, [])


@pytest.mark.parametrize("role", ["tool", "function", "ipython", "observation", "Tool"])
def test_results_of_tools_have_many_roles(role: str) -> None:
    call = {"from": "function_call", "value": json.dumps({"name": "weather", "arguments": ARGUMENTS})}
    chat = [
        {"from": "human", "value": "Who?"},
        call,
        {"from": role, "value": "4 degrees"},
        {"from": "gpt", "value": "Me."},
    ]
    turns = one({"conversations": chat})[0].turns
    assert turns == (Q, Turn("assistant", "", calls=(CALL._replace(id=""),)), Turn("tool", "4 degrees"), A)


def test_the_older_field_and_columns_of_calls_are_read() -> None:
    call = {"name": "weather", "arguments": json.dumps(ARGUMENTS)}
    row = {
        "messages": [user("Who?"), says(None, function_call=call), {**RESULT, "role": "function"}, says()],
        "functions": [TOOL["function"]],
    }
    example, _ = one(row)
    assert example.turns[1].calls == (CALL._replace(id=""),)
    assert example.tools == TOOL_TEXT


def test_nulls_of_a_schema_are_stripped_and_nulls_in_text_are_kept() -> None:
    """Arrow gives each object the keys of all others; what was written as JSON text was written on purpose."""
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"a": {"b": None, "c": [{"d": None}]}}}}
    inner = {"x": None, "y": {"z": None, "w": [1, {"v": None}]}}
    row = {"messages": [user("Who?"), says("", tool_calls=[{"name": "weather", "arguments": inner}])], "tools": [tool]}
    example, _ = one(row)
    assert json.loads(example.turns[1].calls[0].arguments) == {"y": {"w": [1, {}]}}
    assert json.loads(example.tools)[0]["function"]["parameters"] == {"a": {"c": [{}]}}
    row = {"messages": [user("Who?"), says("", tool_calls=[{"name": "weather", "arguments": json.dumps(inner)}])]}
    example, _ = one({**row, "tools": json.dumps([tool])})
    assert json.loads(example.turns[1].calls[0].arguments) == inner
    assert json.loads(example.tools) == [tool]


def test_calls_out_of_a_parquet_file(tmp_path: Path) -> None:
    """Every message and every call gets the keys of all, filled with nulls."""
    calls = [
        {"id": "call_1", "name": "weather", "arguments": ARGUMENTS},
        {"id": "b", "name": "time", "arguments": {"zone": 1}},
    ]
    row = {"messages": [user("Who?"), says(None, tool_calls=calls), RESULT, says()], "tools": [TOOL]}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "d.parquet")
    source = read(str(tmp_path / "d.parquet"))
    (example,) = source.examples
    second = ToolCall("time", '{"zone": 1}', "b")
    assert example.turns == (Q, Turn("assistant", "", calls=(CALL, second)), CALLED[2], A)
    assert (example.tools, dict(source.reports[0].remarks)) == (TOOL_TEXT, {})


def test_a_call_without_arguments_has_none() -> None:
    for given_ in ({}, {"arguments": None}, {"arguments": ""}, {"arguments": {}}, {"arguments": "{}"}):
        example, _ = one({"messages": [user("Who?"), says(None, tool_calls=[{"name": "now", **given_}])]})
        assert example.turns[1].calls == (ToolCall("now", "{}"),)


@pytest.mark.parametrize(
    ("calls", "reason"),
    [
        ([{"arguments": {}}], "a call of a tool has no name"),
        ([{"function": {"name": " "}}], "a call of a tool has no name"),
        ([{"function": 3}], "a call of a tool has no name"),
        ([3], "a call of a tool is no object"),
        ("no JSON", "a call of a tool is no object"),
        ([{"name": "f", "arguments": "secret"}], "the arguments of a call are no JSON object"),
        ([{"name": "f", "arguments": "[1]"}], "the arguments of a call are no JSON object"),
        ([{"name": "f", "arguments": [1]}], "the arguments of a call are no JSON object"),
        ([{"name": "f", "arguments": '{"x": NaN}'}], "the arguments of a call are no JSON object"),
        ([{"name": "f", "arguments": {"x": float("inf")}}], "the arguments of a call are no JSON object"),
        ([{"name": "f", "arguments": {"x": "\ud800"}}], "the arguments of a call are no JSON object"),
    ],
)
def test_broken_calls_cost_the_row(calls: Any, reason: str) -> None:
    assert refused({"messages": [user("Who?"), says("", tool_calls=calls)]}) == reason


@pytest.mark.parametrize(
    ("tools", "reason"),
    [
        ("secret", "tools are no list of objects"),
        ([3], "tools are no list of objects"),
        (7, "tools are no list of objects"),
        ([{"type": "function"}], "a tool has no name"),
        ([{"name": "f", "x": float("nan")}], "tools are no JSON"),
    ],
)
def test_broken_tools_cost_the_row(tools: Any, reason: str) -> None:
    assert refused({"messages": [user("Who?"), says()], "tools": tools}) == reason


@pytest.mark.parametrize("content", ["", "  \n", None, [], [{"type": "text", "text": ""}]])
def test_a_tool_that_returns_nothing_is_an_empty_turn(content: Any) -> None:
    calls = [{"id": "1", "name": "f"}]
    result = {"role": "tool", "content": content, "tool_call_id": "1"}
    example, remarks = one({"messages": [user("Who?"), says("", tool_calls=calls), result, says()]})
    called = Turn("assistant", "", calls=(ToolCall("f", "{}", "1"),))
    assert example.turns == (Q, called, Turn("tool", "", call_id="1"), A)
    assert remarks == []
    assert round_trip([{"messages": [user("Who?"), says("", tool_calls=calls), result, says()]}]) == 2


XLAM = [{"name": "find", "arguments": {"who": "me"}}, {"name": "now", "arguments": {}}]


@pytest.mark.parametrize("answers", [json.dumps(XLAM), XLAM])
def test_answers_of_xlam_are_calls(answers: Any) -> None:
    row = {"id": 3, "query": "Who?", "tools": json.dumps([TOOL["function"]]), "answers": answers}
    example, remarks = one(row)
    called = Turn("assistant", "", calls=(ToolCall("find", '{"who": "me"}'), ToolCall("now", "{}")))
    assert (example.turns, example.tools, example.tags, remarks) == ((Q, called), TOOL_TEXT, {"id": "3"}, [])


def test_answers_beside_tools_that_are_no_calls() -> None:
    row = {"query": "Who?", "tools": [TOOL]}
    assert refused({**row, "answers": "[]"}) == refused({**row, "answers": []}) == "a question without an answer"
    broken = json.dumps([{"name": "find", "arguments": "me"}])
    assert refused({**row, "answers": broken}) == "the arguments of a call are no JSON object"
    assert one({**row, "answers": "I cannot."})[0].turns == (Q, Turn("assistant", "I cannot."))
    assert one({"query": "Who?", "answers": json.dumps(XLAM)})[0].turns[1].text == json.dumps(XLAM)


def test_no_tools_are_none() -> None:
    for tools in (None, "", "[]", [], {}, "{}"):
        assert one({"messages": [user("Who?"), says()], "tools": tools})[0].tools == ""


# --- the order of turns

JOINED = "turns of one role in a row are joined"
MOVED = "a system turn after the first turn is read as the user's"
CALLS = Turn("assistant", "", calls=(ToolCall("f", "{}"),))
BRIEF = Turn("system", "Be brief.")
OPENING = "what stands before the first user turn is left out"
TAIL = "what follows the last trained answer is left out"


@pytest.mark.parametrize(
    ("messages", "turns", "remarks"),
    [
        ([user("Who?"), says(), user("Why?")], (Q, A), [TAIL]),
        ([user("Who?"), says(), user("Why?"), says("x", weight=0)], (Q, A), [TAIL]),
        ([user("Who?"), says(None, tool_calls=[{"name": "f"}]), RESULT], (Q, CALLS), [TAIL]),
        ([says("Hello."), user("Who?"), says()], (Q, A), [OPENING]),
        ([says("Hello."), system("Be brief."), user("Who?"), says()], (BRIEF, Q, A), [OPENING]),
        ([system("Be brief."), says("Hello."), user("Who?"), says()], (BRIEF, Q, A), [OPENING]),
        ([user("Oh."), user("Who?"), says()], (Turn("user", "Oh.\n\nWho?"), A), [JOINED]),
        ([user("Who?"), says(), says("Only me.")], (Q, Turn("assistant", "Me.\n\nOnly me.")), [JOINED]),
        ([user("Who?"), says("I", weight=0), says()], (Q, Turn("assistant", "I", trained=False), A), []),
        ([system("Be"), system("brief."), user("Who?"), says()], (Turn("system", "Be\n\nbrief."), Q, A), [JOINED]),
        ([user("Who?"), says(), system("Be brief."), user("Who?"), says()],
         (Q, A, Turn("user", "Be brief.\n\nWho?"), A), [MOVED, JOINED]),
        ([user("Who?"), system("Be brief."), says()], (Turn("user", "Who?\n\nBe brief."), A), [MOVED, JOINED]),
        ([user("Who?"), says(), system("Go on."), says()], (Q, A, Turn("user", "Go on."), A), [MOVED]),
        ([system(""), user("Who?"), says()], (Q, A), ["an empty system turn is left out"]),
    ],
)  # fmt: skip
def test_what_is_out_of_order_is_put_in_order_and_said(
    messages: list[dict[str, Any]], turns: tuple[Turn, ...], remarks: list[str]
) -> None:
    example, said = one({"messages": messages})
    assert example.turns == turns
    assert sorted(said) == sorted(remarks)


def test_results_of_tools_stand_each_alone() -> None:
    calls = [{"name": "f", "id": "1"}, {"name": "g", "id": "2"}]
    results = [
        {"role": "tool", "content": "one", "tool_call_id": "1"},
        {"role": "tool", "content": "two", "tool_call_id": "2"},
    ]
    example, remarks = one({"messages": [user("Who?"), says("", tool_calls=calls), *results, says()]})
    assert example.turns[2:] == (Turn("tool", "one", call_id="1"), Turn("tool", "two", call_id="2"), A)
    assert remarks == []


def test_calls_are_joined_only_where_the_order_stays_what_it_was() -> None:
    f, g = ToolCall("f", "{}"), ToolCall("g", "{}")
    first, second = (says(None, tool_calls=[{"name": name}]) for name in "fg")
    example, remarks = one({"messages": [user("Who?"), says("Let me see."), first, second]})
    assert example.turns == (Q, Turn("assistant", "Let me see.", calls=(f, g)))
    assert remarks == [JOINED]
    example, remarks = one({"messages": [user("Who?"), first, says()]})  # text after a call is not text before it
    assert example.turns == (Q, Turn("assistant", "", calls=(f,)), A)
    assert remarks == []
    example, remarks = one({"messages": [user("Who?"), says(), says("Yes.", thinking="hm")]})
    assert example.turns == (Q, A, Turn("assistant", "Yes.", thinking="hm"))
    assert remarks == []


# --- columns


@pytest.mark.parametrize(
    "row",
    [
        {"Instruction": "Who?", " Output ": "Me."},
        {"INSTRUCTION": "Who?", "Input": "", "Response": "Me."},
        {"query": "Who?", "response": "Me."},
        {"Prompt": "Who?", "response": "Me."},
        {"question": "Who?", "response": "Me."},
        {"question": "Who?", "answers": {"text": ["Me."], "answer_start": [4]}},
        {"question": "Who?", "answers": [{"text": "Me.", "answer_start": 4}]},
        {"question": "Who?", "answers": ["Me."]},
        {"question": "Who?", "answers": "Me."},
    ],
)
def test_columns_have_many_names(row: dict[str, Any]) -> None:
    example, remarks = one(row)
    assert (example.turns, example.tags, remarks) == ((Q, A), {}, [])


def test_of_two_columns_that_differ_in_case_the_filled_one_is_read() -> None:
    assert one({"Output": "Me.", "output": None, "instruction": "Who?"})[0].turns == (Q, A)
    assert one({"Output": "You.", "output": "Me.", "instruction": "Who?"})[0].turns == (Q, A)


def test_the_data_part_of_a_question_begins_where_the_input_does() -> None:
    for name in ("input", "context", "Context "):
        turns = one({"instruction": " Who?\n", name: "Ann and I\n\nwere there", "output": "Me."})[0].turns
        assert turns[0] == Turn("user", "Who?\n\nAnn and I\n\nwere there", data=6)
        assert turns[0].text[6:] == "Ann and I\n\nwere there"
    assert one({"instruction": "Who?", "input": " ", "output": "Me."})[0].turns == (Q, A)
    assert one({"instruction": "Who?", "input": "", "context": "I", "output": "Me."})[0].turns[0].data == 6


def test_squad_rows_are_a_question_about_a_context_and_its_first_answer() -> None:
    row = {
        "id": "7",
        "context": "I did.",
        "question": "Who?",
        "answers": {"text": ["I", "I did"], "answer_start": [0, 0]},
    }
    example, remarks = one(row)
    assert example.turns == (Turn("user", "Who?\n\nI did.", data=6), Turn("assistant", "I"))
    assert remarks == ["of several answers the first is read"]
    row["answers"] = {"text": [], "answer_start": []}
    assert refused(row) == "a question without an answer"
    assert refused({**row, "answers": []}) == "a question without an answer"


def test_text_alone_is_continued_as_it_stands_and_said_once_a_file() -> None:
    texts = ["Once upon\n a time.\n\n", "  indented", "more"]
    source = check(file_of(*({"text": text, "source": "book"} for text in texts)))
    assert source.examples == tuple(Example((Turn("assistant", text),), {"source": "book"}) for text in texts)
    assert source.reports[0].lines() == [
        "d.jsonl: 3 of 3 rows: read as text to continue: all of it is trained (rows 1, 2, 3)"
    ]


@pytest.mark.parametrize("other", [{"messages": [user("Who?"), says()]}, {"question": "Who?", "answer": "Me."}])
def test_text_beside_a_conversation_is_not_used_and_said(other: dict[str, Any]) -> None:
    example, remarks = one({"text": "Once", **other})
    assert example.turns == (Q, A)
    assert remarks == [f"column text is not used (read: {', '.join(sorted(other))})"]


def test_text_beside_half_a_pair_or_a_label_is_not_all_there_is_to_learn() -> None:
    assert refused({"text": "Once", "instruction": "Who?"}) == "missing field 'output'"
    assert refused({"text": "Once", "label": 1}) == "no columns known as instruction data"
    assert one({"text": "Once", "label": None})[0].turns == (Turn("assistant", "Once"),)
    assert one({"text": "Once", "label": 1}, {"text": "text"})[0].tags == {"label": "1"}


def test_of_two_column_sets_the_one_that_is_not_read_is_named() -> None:
    example, remarks = one({"messages": [user("Who?"), says()], "instruction": "x", "output": "y", "reward": 1})
    assert (example.turns, example.tags["reward"]) == ((Q, A), "1")
    assert remarks == ["columns instruction, output are not used (read: messages)"]
    _, remarks = one({**GOOD, "response": "You.", "query": "hm", "rejected": None})
    assert remarks == ["columns query, response are not used (read: instruction, output)"]


PREFERENCES = "columns chosen and rejected are preference data, which needs an objective for preferences"


@pytest.mark.parametrize(
    ("row", "fix"),
    [
        ({"prompt": "Who?", "chosen": "Me.", "rejected": "You."}, '{ instruction = "prompt", output = "chosen" }'),
        ({"chosen": [user("Who?"), says()], "rejected": [user("Who?"), says("You.")]}, '{ messages = "chosen" }'),
        (
            {"prompt": "Who?", "Chosen": [user("Who?"), says()], "rejected": [user("Who?"), says("You.")]},
            '{ messages = "Chosen" }',
        ),
        (
            {"prompt": [user("Who?")], "chosen": [says()], "rejected": [says("You.")]},
            '{ instruction = "prompt", output = "chosen" }',
        ),
    ],
)
def test_preferences_are_named_with_what_can_be_done(row: dict[str, Any], fix: str) -> None:
    with pytest.raises(UserError) as error:
        check(file_of(row))
    assert str(error.value) == (
        f"d.jsonl: none of its 1 rows is usable; the first problem, in row 1, is: {PREFERENCES}; "
        f"to learn the chosen answers alone, set data.columns = {fix}"
    )
    assert refused(row) == PREFERENCES
    advice = dict(part.split(" = ") for part in fix.strip("{ }").replace('"', "").split(", "))
    assert one(row, advice)[0].turns == (Q, A)


def test_preferences_in_one_text_can_be_learnt_as_text() -> None:
    row = {"chosen": "Human: Who?\n\nAssistant: Me.", "rejected": "Human: Who?\n\nAssistant: You."}
    with pytest.raises(UserError, match=r'set data\.columns = \{ text = "chosen" \}$'):
        check(file_of(row))
    assert one(row, {"text": "chosen"})[0].turns == (Turn("assistant", row["chosen"]),)


def test_columns_that_the_user_names() -> None:
    row = {"s": "Be brief.", "q": "Who?", "c": "I did.", "a": "Me.", "t": [TOOL], "tools": [TOOL], "system": "x"}
    row |= {"w": "It is I."}
    names = {"instruction": "q", "context": "c", "output": "a", "system": "s", "tools": "t", "thinking": "w"}
    example, remarks = one(row, names)
    answer = A._replace(thinking="It is I.")
    assert example.turns == (Turn("system", "Be brief."), Turn("user", "Who?\n\nI did.", data=6), answer)
    assert example.tools == TOOL_TEXT
    assert remarks == ["columns system, tools are not used (data.columns names others)"]
    assert one({"body": " a b "}, {"text": "body"})[0].turns == (Turn("assistant", " a b "),)
    example, _ = one({"talk": [user("Who?"), says()], "s": "Be brief."}, {"messages": "talk", "system": "s"})
    assert example.turns == (Turn("system", "Be brief."), Q, A)


@pytest.mark.parametrize(
    "names",
    [
        {"text": "a", "output": "b"},
        {"text": "a", "system": "b"},
        {"text": "a", "messages": "b"},
        {"system": "a"},
        {"messages": "a", "context": "b"},
        {"messages": "a", "thinking": "b"},
        {"text": "a", "thinking": "b"},
        {"instruction": "a", "output": "b", "input": "c", "context": "d"},
    ],
)
def test_names_that_do_not_go_together_are_refused(names: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"^data\.columns"):
        check(file_of(dict.fromkeys("abcd", "x")), columns=names)


# --- white space


@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        ("    return x\n", "    return x"),
        ("\n \n    if x:\n        y()\n", "    if x:\n        y()"),
        ("\treturn x", "\treturn x"),
        (" four ", "four"),
        ("\r\n  a\r\n", "  a"),
        ("```\na\n\n\n```\n\n", "```\na\n\n\n```"),
        ("Here:\n```python\na\n\n", "Here:\n```python\na\n\n"),  # the fence is open: a part of the code
        ("~~~\na\n```\n ", "~~~\na\n```\n "),
        ("````\n```\n````\n", "````\n```\n````"),
        ("`x` and ```y```\n", "`x` and ```y```"),
        ("a\n\n  b", "a\n\n  b"),
    ],
)
def test_white_space_that_is_part_of_code_stays(answer: str, kept: str) -> None:
    assert one({"instruction": " Who?", "output": answer})[0].turns == (Q, Turn("assistant", kept))
    assert one({"messages": [user("Who? "), says(answer)]})[0].turns == (Q, Turn("assistant", kept))
    given_ = one({"instruction": "Who?", "input": answer, "output": "Me."})[0].turns[0]
    assert given_.text[6:] == kept
    assert one({"instruction": "Who?", "output": kept})[0].turns == (Q, Turn("assistant", kept))


@settings(max_examples=60, deadline=None)
@given(text=st.text("ab`~ \t\n\r\u3000", max_size=24))
def test_text_without_white_space_around_it_is_as_it_was(text: str) -> None:
    if not text.strip():
        return
    kept = one({"instruction": "Who?", "output": text})[0].turns[1].text
    assert kept.strip() == text.strip()
    assert text.strip() != text or kept == text


# --- any row


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 2)
    | st.floats()
    | st.sampled_from(["", "x", "\ud800", "[1]", "{}", "0"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["name", "text", "type", "a"]), inner),
    max_leaves=6,
)
FIELDS = [
    "role",
    "from",
    "content",
    "value",
    "tool_calls",
    "function_call",
    "thinking",
    "weight",
    "train",
    "name",
    "id",
]
ROLES = st.sampled_from(["user", "assistant", "system", "tool", "function_call", "gpt", "x"])
MESSAGE = st.builds(
    lambda role, fields: {"role": role, "content": "x", **fields}, ROLES, st.dictionaries(st.sampled_from(FIELDS), JSON)
)
NAMES = [
    *("messages", "conversations", "instruction", "Input", "output", "response", "prompt", "completion", "question"),
    *("answers", "text", "system", "tools", "chosen", "rejected", "label", "context", "other", "query", "thinking"),
]
ANY_ROW = st.dictionaries(st.sampled_from(NAMES), JSON | st.lists(MESSAGE, max_size=4)) | JSON


@settings(max_examples=300, deadline=None)
@given(rows=st.lists(ANY_ROW, max_size=4))
def test_any_row_is_an_example_or_a_problem(rows: list[Any]) -> None:
    """Nothing that JSON can say ends in a traceback, and what can be used is in the one shape that is promised."""
    source = check(file_of(GOOD, *rows))
    (report,) = source.reports
    assert report.rows == 1 + len(rows) == report.usable + sum(count for count, _ in report.problems.values())
    for example in source.examples:
        roles = [turn.role for turn in example.turns]
        assert roles[-1] == "assistant" and example.turns[-1].trained
        assert roles == ["assistant"] or "user" in roles[:2]
        assert "system" not in roles[1:]
        assert all(turn.text or turn.calls or turn.role == "tool" for turn in example.turns)
        assert all(isinstance(json.loads(call.arguments), dict) for turn in example.turns for call in turn.calls)
        assert not example.tools or isinstance(json.loads(example.tools), list)
    assert round_trip(rows) == report.usable


def test_deep_nesting_costs_the_row_alone() -> None:
    deep: Any = {}
    for _ in range(3000):
        deep = {"a": deep}
    call = [user("Who?"), says("", tool_calls=[{"name": "f", "arguments": deep}])]
    assert refused({"messages": call}) == "an object is nested too deeply"
    assert refused({"messages": [user("Who?"), says()], "tools": [{"name": "f", "a": deep}]})
    text = [user("Who?"), says("", tool_calls=[{"name": "f", "arguments": "[" * 100_000}])]
    assert refused({"messages": text}) == "the arguments of a call are no JSON object"


# --- and back


def said(example: Example) -> tuple[tuple[Turn, ...], str]:
    return tuple(turn._replace(data=None) for turn in example.turns), example.tools


def marked(turn: Turn) -> Turn:
    """The turn with other words in it, as a step that masks would write them."""
    text = turn.text and f"{turn.text}!"
    calls = tuple(call._replace(arguments=json.dumps({"masked": True})) for call in turn.calls)
    return turn._replace(text=text, calls=calls, thinking=turn.thinking and f"{turn.thinking}!")


def round_trip(rows: list[Any]) -> int:
    """Rows with rewritten turns, and rows as they were, read back as what was written; how many can be used."""
    files = file_of(GOOD, *rows)
    source = check(files)
    for change in (lambda turn: turn, marked):
        wanted = [example._replace(turns=tuple(map(change, example.turns))) for example in source.examples]
        back = check(file_of(*as_read(files, zip(source.places, wanted, strict=True))))
        assert list(map(said, back.examples)) == list(map(said, wanted))
    return len(source.examples)


SHAPES = [
    {
        "System": "Be brief.",
        "Question": "Who?",
        "context": "I did.\n\nReally.",
        "answers": {"text": ["I", "Me"]},
        "k": 3,
    },
    {"query": "Who?", "tools": [TOOL], "answers": json.dumps(XLAM)},
    {"query": "Who?", "tools": [TOOL], "answers": XLAM, "thinking": "hm"},
    {"instruction": "Who?", "output": 7, "Reasoning": "hm"},
    {"system_prompt": "Be brief.", "messages": [user([{"type": "text", "text": "Who?"}]), says(thinking="hm")]},
    {
        "messages": [user("Who?"), says(None, tool_calls=[{"name": "f", "arguments": {}}]), RESULT, says()],
        "tools": [TOOL],
    },
    {"messages": [says("Hello."), user("Oh."), user("Who?"), says(weight=0), says("You."), user("Why?")]},
    {"conversations": json.dumps([{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Me."}])},
    {"prompt": [user("Oh."), user("Who?")], "completion": [says()]},
    {"prompt": [system("Be brief."), user("Who?")], "completion": [says()]},
    {"text": " Once upon a time.\n"},
    {" INSTRUCTION": "Who?", "Output": "    return 1\n"},
    {"instruction": "Who?\n\nYou?", "input": "I did.", "output": 7},
]


@pytest.mark.parametrize("row", SHAPES)
def test_every_shape_is_written_back(row: dict[str, Any]) -> None:
    assert round_trip([row]) == 2


def test_what_is_written_back_stays_where_it_was() -> None:
    row = {"System": "Be brief.", "Question": "Who?", "context": "I did.", "answers": {"text": ["I", "Me"]}, "k": 3}
    source = check(file_of(row))
    assert as_read(file_of(row), [(source.places[0], source.examples[0])]) == [row]
    changed = source.examples[0]._replace(turns=tuple(map(marked, source.examples[0].turns)))
    assert as_read(file_of(row), [(source.places[0], changed)]) == [
        {"System": "Be brief.!", "Question": "Who?", "context": "I did.!", "answers": "I!", "k": 3}
    ]


def test_what_was_left_out_is_not_written_back_unseen() -> None:
    """A step that masks never saw it."""
    row = {"messages": [user("Who?", id=1), says(), user("ann@x.example")], "id": 4}
    source = check(file_of(row))
    (written,) = as_read(file_of(row), [(source.places[0], source.examples[0])])
    assert written == {"messages": [user("Who?"), says()], "id": 4}


def test_a_rewritten_message_keeps_its_other_fields_where_only_its_text_changed() -> None:
    row = {"messages": [user("Who?", id=1), says(thinking="hm", id=2)]}
    source = check(file_of(row))
    turns = source.examples[0].turns
    new = (turns[0]._replace(text="Who!"), turns[1]._replace(thinking="ha"))
    (written,) = as_read(file_of(row), [(source.places[0], source.examples[0]._replace(turns=new))])
    assert written == {"messages": [user("Who!", id=1), says(reasoning_content="ha")]}


def test_rewritten_tools_are_written_back() -> None:
    row = {"messages": [user("Who?"), says()], "tools": [TOOL]}
    source = check(file_of(row))
    new = source.examples[0]._replace(tools=TOOL_TEXT.replace("weather", "masked"))
    (written,) = as_read(file_of(row), [(source.places[0], new)])
    assert check(file_of(written)).examples == (new,)


# --- the report


def test_remarks_are_lines_like_problems_and_change_no_count() -> None:
    rows = [GOOD, {"messages": [user("Who?"), says(), user("Why?")]}, {"instruction": "x"}] * 3
    (report,) = check(file_of(*rows)).reports
    assert report == FileReport("d.jsonl", 9, 6, {"missing field 'output'": (3, (3, 6, 9))}, {TAIL: (3, (2, 5, 8))})
    assert report.lines() == [
        "d.jsonl: 3 of 9 rows left out: missing field 'output' (rows 3, 6, 9)",
        f"d.jsonl: 3 of 9 rows: {TAIL} (rows 2, 5, 8)",
    ]


@pytest.mark.parametrize(
    ("row", "fix"),
    [
        ({"messages": [user("Who?"), says(tool_calls=[{"name": "f", "arguments": "me"}])]}, "a call is {"),
        ({"messages": [user([{"type": "tool_use"}]), says()]}, "only text is learnt"),
        ({"messages": [user("Who?"), says(weight=0)]}, "the weight 1"),
        ({"messages": [says()]}, "the assistant answers the user"),
        ({"question": "Who?", "answers": []}, "give answers"),
    ],
)
def test_a_file_of_such_rows_alone_is_told_what_helps(row: dict[str, Any], fix: str) -> None:
    with pytest.raises(UserError) as error:
        check(file_of(row))
    assert fix in str(error.value).rpartition("row 1, is: ")[2] and "\n" not in str(error.value)
