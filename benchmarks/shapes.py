"""The table of shapes of rows in the docs, asked of the reader itself: what a row is read as, and what is said."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from apiary.core.errors import UserError
from apiary.data.examples import Example, check
from apiary.data.sources import RawFile
from apiary.data.turns import Turn


def _chat(*turns: str) -> list[dict[str, Any]]:
    """Messages, each from "role: text"."""
    parts = (turn.partition(": ") for turn in turns)
    return [{"role": role, "content": text} for role, _, text in parts]


_PLAIN: Final = {"instruction": "Who?", "output": "You."}
_ASKED: Final = _chat("user: Who?")
_CALL: Final = {"id": "c1", "type": "function", "function": {"name": "find", "arguments": '{"who": "me"}'}}
SHAPES: Final[Mapping[str, dict[str, Any]]] = {
    "instruction, input, output": {"instruction": "Who?", "input": "I did.", "output": "You."},
    "names in any case, `context`, `response`": {"Instruction": "Who?", " Context ": "I did.", "Response": "You."},
    "`prompt` with `completion` or `response`": {"prompt": "Who?", "completion": "You."},
    "`question` with `answer` or `response`, `query` with `response`": {"query": "Who?", "response": "You."},
    "a system column (`system`, `system_prompt`)": {
        "system_prompt": "Be brief.",
        "question": "Who?",
        "response": "You.",
    },
    "SQuAD": {"context": "I did.", "question": "Who?", "answers": {"text": ["I", "I did"], "answer_start": [0, 0]}},
    "SQuAD, unanswerable": {"context": "I did.", "question": "Why?", "answers": {"text": [], "answer_start": []}},
    "`messages`": {"messages": _chat("system: Be brief.", "user: Who?", "assistant: You.")},
    "ShareGPT, TRL's `prompt` and `completion`": {
        "conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "You."}]
    },
    "content in parts": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Who?"}, {"type": "text", "text": "And why?"}]},
            *_chat("assistant: You."),
        ]
    },
    "a part that is no text": {
        "messages": [
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}}]},
            *_chat("assistant: You."),
        ]
    },
    "a thinking column (the same names)": {"instruction": "Who?", "output": "You.", "thinking": "Not I."},
    "thinking (`reasoning_content`, `thinking`, `reasoning`)": {
        "messages": [*_ASKED, {"role": "assistant", "content": "You.", "thinking": "Not I."}]
    },
    "weights (`weight`, `train`, `trainable`, `trained`, `training`, `loss`)": {
        "messages": [
            *_ASKED,
            {"role": "assistant", "content": "I.", "weight": 0},
            *_chat("user: Sure?", "assistant: No."),
        ]
    },
    "nothing is trained": {"messages": [*_ASKED, {"role": "assistant", "content": "I.", "weight": 0}]},
    "tool calls": {
        "tools": [{"name": "find", "parameters": {}}],
        "messages": [
            *_ASKED,
            {"role": "assistant", "content": None, "tool_calls": [_CALL]},
            {"role": "tool", "content": "you", "tool_call_id": "c1"},
            *_chat("assistant: You."),
        ],
    },
    "a tool that returns nothing": {
        "messages": [
            *_ASKED,
            {"role": "assistant", "tool_calls": [_CALL]},
            {"role": "tool", "content": "", "tool_call_id": "c1"},
            *_chat("assistant: You."),
        ]
    },
    "xLAM: `query`, `tools` and `answers`": {
        "query": "Who?",
        "tools": '[{"name": "find", "parameters": {}}]',
        "answers": '[{"name": "find", "arguments": {"who": "me"}}]',
    },
    "calls within a text (Hermes)": {
        "messages": _chat("user: Who?", 'assistant: <tool_call>{"name": "find", "arguments": {}}</tool_call>')
    },
    "a broken call": {
        "messages": [*_ASKED, {"role": "assistant", "tool_calls": [{"name": "find", "arguments": "me"}]}]
    },
    "ends with a question": {"messages": _chat("user: Who?", "assistant: You.", "user: Why?")},
    "begins with the assistant": {"messages": _chat("assistant: Hello.", "user: Who?", "assistant: You.")},
    "two turns of one role": {"messages": _chat("user: Hello.", "user: Who?", "assistant: You.")},
    "a system turn in the middle": {
        "messages": _chat("user: Who?", "assistant: You.", "system: Be kind.", "user: Why?", "assistant: Well.")
    },
    "fields of messages that nothing reads": {"messages": [{**_ASKED[0], "id": 7}, *_chat("assistant: You.")]},
    "two column sets": {"messages": _chat("user: Who?", "assistant: You."), "instruction": "Who?", "output": "Me."},
    "`text` alone": {"text": "Once upon a time.\n"},
    "`text` with `label`, `target` or `summary`": {"text": "I like it.", "label": 1},
    "preferences": {"prompt": "Who?", "chosen": "You.", "rejected": "Me."},
    "preferences without pairs (KTO)": {"prompt": "Who?", "completion": "Me.", "label": False},
    "choices, and only the number or letter of one": {"question": "Who?", "choices": ["I", "You"], "answer": 1},
    "`history`, `documents`, `choices` (`options`)": {**_PLAIN, "history": [["Hi", "Ho"]]},
    "code": {"instruction": "Indent it.", "output": "\n    return x\n"},
}


def table() -> str:
    """A row for each shape."""
    lines = ["| shape | row | read as | what is said |", "|---" * 4 + "|"]
    for shape, row in SHAPES.items():
        read, said = _read(row)
        lines.append(f"| {shape} | {_code(json.dumps(row))} | {read} | {said} |")
    return "\n".join(lines)


def _read(row: dict[str, Any]) -> tuple[str, str]:
    """What becomes of a row that stands beside a good one, and what a file of it alone is told."""
    good = {"instruction": "q", "output": "a"}
    source = check([RawFile("", "", [(1, good), (2, row)])])
    (report,) = source.reports
    if len(source.examples) == 2:
        return _written(source.examples[1]), "; ".join(report.remarks)
    (reason,) = report.problems
    try:
        check([RawFile("rows.jsonl", "", [(1, row)])])
    except UserError as error:
        advice = str(error).partition(f"{reason}; ")[2] or str(error).rpartition("; ")[2]
    return "left out", f"{reason}; of a file of such rows: {_escaped(advice)}"


def _written(example: Example) -> str:
    turns = [_turn(turn) for turn in example.turns]
    tools = [f"tools: {_code(example.tools)}"] if example.tools else []
    return "<br>".join([*tools, *turns])


def _turn(turn: Turn) -> str:
    parts = [f"thinks {_code(json.dumps(turn.thinking))}"] if turn.thinking else []
    if turn.data is not None:
        asked, given = turn.text[: turn.data], turn.text[turn.data :]
        parts.append(f"{_code(json.dumps(asked))}, data {_code(json.dumps(given))}")
    elif turn.text:
        parts.append(_code(json.dumps(turn.text)))
    parts += [f"calls {_code(f'{call.name}({call.arguments})')}" for call in turn.calls]
    context = " (not trained)" if turn.role == "assistant" and not turn.trained else ""
    return f"{turn.role}{context}: {', '.join(parts)}"


def _code(text: str) -> str:
    return f"`{_escaped(text)}`"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")
