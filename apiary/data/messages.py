"""From a list of messages to the turns of a conversation, and back.

A message has `role` and `content`, or `from` and `value` (ShareGPT). Whatever people have recorded becomes one shape,
[system] user ... assistant, by rules that look at this conversation alone:

- A system turn that stands after another turn is read as the user's.
- What stands before the first user turn, but for the system's, is left out: many templates refuse it.
- What follows the last trained answer is left out: no loss depends on it.
- Two turns of one role in a row are joined with a blank line, unless one is trained and the other is not. Results of
  tools are never joined, nor what an assistant says or thinks after it has called a tool.

Each rule that was used is told as a remark. A call of a tool is `tool_calls` (OpenAI), `function_call` (its older form,
and the role of ShareGPT); arguments may be an object or its JSON text.
"""

from __future__ import annotations

import decimal
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from apiary.data.fields import (
    RowProblem,
    check_unicode,
    field,
    is_absent,
    is_blank,
    is_hollow,
    json_text,
    parsed,
    tidy,
    without_nulls,
)
from apiary.data.turns import Role, ToolCall, Turn

__all__ = [
    "BORDER",
    "THINKING",
    "Conversation",
    "calls_in",
    "calls_value",
    "conversation",
    "is_chat",
    "message_of",
    "question_about",
    "rewritten",
    "tools_text",
]

BORDER = "\n\n"  # between two texts that become one

JOINED = "turns of one role in a row are joined"
MOVED = "a system turn after the first turn is read as the user's"
OPENING = "what stands before the first user turn is left out"
TAIL = "what follows the last trained answer is left out"
SILENT = "an empty system turn is left out"
PARTS = "the text parts of a message are joined"
WEIGHTS = "a weight or train flag other than 0 and 1 is read as 1"
FLAGS = "weights and train flags of turns other than the assistant's are ignored"
_OTHER_FIELDS = "other fields of messages are not used"

_ROLES: Mapping[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "ipython": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "tool_result": "tool",
}
_CALLING = ("function_call", "tool_call", "tool_calls")  # roles of a message whose text is a call
THINKING = ("reasoning_content", "thinking", "reasoning")
_TRAINED = ("weight", "train", "trained", "trainable", "training", "loss")
_TEXT_PARTS = ("text", "input_text", "output_text")
_PART_KINDS = {  # the kinds that public formats have; others are not named, for they could be anything
    *("image", "image_url", "input_image", "audio", "audio_url", "input_audio", "video", "video_url", "input_video"),
    *("file", "input_file", "document", "thinking", "reasoning", "refusal", "resource", "tool_use", "tool_result"),
}
_FIELD_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,29}")
_ANSWERS = {"0": False, "false": False, "1": True, "true": True}


class Conversation(NamedTuple):
    """What messages were read as.

    whole: each turn is one message, in order, and no message was left out; remarks: what was read otherwise.
    """

    turns: tuple[Turn, ...]
    remarks: tuple[str, ...]
    whole: bool


def question_about(asked: str, given: str) -> Turn:
    """A user's turn that asks something about what is given (an input, a context); "" for nothing."""
    return Turn("user", f"{asked}{BORDER}{given}", data=len(asked) + len(BORDER)) if given else Turn("user", asked)


def is_chat(value: object) -> bool:
    """Whether a value looks like messages: a list of objects, and not an empty one."""
    return isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) for item in value)


def conversation(messages: Sequence[object]) -> Conversation:
    """The turns in messages, in the one shape that is described above.

    Raises:
        RowProblem: a message cannot be read, or the turns hold no question with an answer that is trained.
    """
    remarks: dict[str, None] = {}  # in order of appearance
    turns = _in_order([_turn(message, remarks) for message in messages], remarks)
    return Conversation(tuple(turns), tuple(remarks), not remarks.keys() & {JOINED, MOVED, OPENING, TAIL, SILENT})


# --- the order of turns


def _in_order(turns: Sequence[Turn], remarks: dict[str, None]) -> list[Turn]:
    kept = [turn for turn in turns if turn.text or turn.role != "system"]
    if len(kept) < len(turns):
        remarks[SILENT] = None
    answers = [i for i, turn in enumerate(kept) if turn.role == "assistant"]
    if not answers:
        raise RowProblem("no assistant turn")
    first = next((i for i, turn in enumerate(kept) if turn.role == "user"), None)
    if first is None:
        raise RowProblem("no user turn")
    if answers[-1] < first:
        raise RowProblem("no assistant turn after a user turn")
    last = max((i for i in answers if kept[i].trained and i > first), default=None)
    if last is None:
        raise RowProblem("no assistant turn is trained (by its weight or train flag)")
    system = [turn for turn in kept[:first] if turn.role == "system"]
    if len(system) < first:
        remarks[OPENING] = None
    if last + 1 < len(kept):
        remarks[TAIL] = None
    return list(_join([*system, *_without_system(kept[first : last + 1], remarks)], remarks))


def _without_system(turns: Iterable[Turn], remarks: dict[str, None]) -> Iterator[Turn]:
    for turn in turns:
        if turn.role == "system":
            remarks[MOVED] = None
            yield turn._replace(role="user")
        else:
            yield turn


def _join(turns: Iterable[Turn], remarks: dict[str, None]) -> Iterator[Turn]:
    before: Turn | None = None
    for turn in turns:
        if before is None:
            before = turn
        elif _may_join(before, turn):
            remarks[JOINED] = None
            text = BORDER.join(text for text in (before.text, turn.text) if text)
            before = before._replace(text=text, calls=(*before.calls, *turn.calls))
        else:
            yield before
            before = turn
    if before is not None:
        yield before


def _may_join(one: Turn, two: Turn) -> bool:
    """Whether a turn can hold both in the order in which they were said: thinking, text, calls."""
    if one.role != two.role or one.role == "tool" or one.trained != two.trained:
        return False
    return not two.thinking and not (one.calls and two.text)


# --- one message


def _turn(message: object, remarks: dict[str, None]) -> Turn:
    if not isinstance(message, Mapping):
        raise RowProblem("a message is not an object")
    speaker = "from" if is_absent(message.get("role")) else "role"
    if is_absent(message.get(speaker)):
        raise RowProblem("a message has no role")
    role, is_call = _role(message[speaker])
    names = ("content", "value") if speaker == "role" else ("value", "content")
    name = next((n for n in names if not is_absent(message.get(n))), names[0])
    used = {speaker, name, *_TRAINED}
    trained = _is_trained(message, role, remarks)
    if role == "assistant":
        calls = _calls(message, name if is_call else "")
        thinking = next((n for n in THINKING if isinstance(message.get(n), str) and not is_blank(message[n])), "")
        used |= {thinking, "tool_calls", "function_call"}
        silent = is_call or (bool(calls) and is_blank(message.get(name)))
        text = "" if silent else _text(message, name, role, remarks)
        thought = field(message, thinking) if thinking else ""
        turn = Turn(role, text, trained, thinking=thought, calls=calls)
    elif role == "tool":
        used |= {"name", "tool_call_id"}
        text = _text(message, name, role, remarks)
        turn = Turn(role, text, name=_label(message, "name"), call_id=_label(message, "tool_call_id"))
    else:
        silent = role == "system" and is_blank(message.get(name))
        turn = Turn(role, "" if silent else _text(message, name, role, remarks))
    for other, value in message.items():
        if other not in used and not is_hollow(value):
            remarks[_unused(other)] = None
    return turn


def _role(said: object) -> tuple[Role, bool]:
    """The role that a name stands for, and whether the text of such a message is a call."""
    name = re.sub(r"[\s-]+", "_", said.strip().casefold()) if isinstance(said, str) else ""
    if name in _CALLING:
        return "assistant", True
    if name not in _ROLES:
        raise RowProblem("unknown role in a message")
    return _ROLES[name], False


def _unused(name: object) -> str:
    known = isinstance(name, str) and _FIELD_NAME.fullmatch(name)
    return f"field {name!r} of messages is not used" if known else _OTHER_FIELDS


def _label(message: Mapping[str, object], name: str) -> str:
    value = message.get(name)
    return "" if is_blank(value) else field(message, name).strip()


def _text(message: Mapping[str, object], name: str, role: Role, remarks: dict[str, None]) -> str:
    """What a message says: text, parts of text, or an object that a tool returned; a tool may return nothing, ""."""
    value = message.get(name)
    if role == "tool" and is_blank(value):
        return ""
    if isinstance(value, Mapping) and role == "tool":
        return _strict(without_nulls_or_refuse(value), f"wrong type in field {name!r} (dict)")
    clean = tidy if role in ("assistant", "tool") else str.strip
    if not isinstance(value, list):
        return field(message, name, clean=clean)
    texts = [text for text in (_part(part, name) for part in value) if text.strip()]
    if not texts and role == "tool":
        return ""
    if not texts:
        raise RowProblem(f"empty field {name!r}")
    if len(texts) > 1:
        remarks[PARTS] = None
    text = "\n".join(texts)
    check_unicode(text, name)
    return clean(text)


def _part(part: object, name: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise RowProblem(f"wrong type in field {name!r} (list)")
    kind = part.get("type")
    if kind not in (None, *_TEXT_PARTS):
        known = isinstance(kind, str) and kind in _PART_KINDS
        raise RowProblem(f"a message has a part of the type {kind!r}, which is not text" if known else _ODD_PART)
    text = part.get("text")
    if text is not None and not isinstance(text, str):
        raise RowProblem(_ODD_PART)
    if text is None and kind is None:
        raise RowProblem(_ODD_PART)
    return text or ""


_ODD_PART = "a message has a part of an unknown type, which is not text"


def _is_trained(message: Mapping[str, object], role: Role, remarks: dict[str, None]) -> bool:
    """Whether an assistant's turn is trained: not where one of its flags says no."""
    given = [message[name] for name in _TRAINED if not is_blank(message.get(name))]
    if not given:
        return True
    if role != "assistant":
        remarks[FLAGS] = None
        return True
    flags = [_flag(value) for value in given]
    if None in flags:
        remarks[WEIGHTS] = None
    return False not in flags


def _flag(value: object) -> bool | None:
    """A flag as it is written in JSON or in a table; None for what is neither yes nor no."""
    if isinstance(value, str):
        return _ANSWERS.get(value.strip().casefold())
    if isinstance(value, bool | int | float | decimal.Decimal) and value in (0, 1):
        return bool(value)
    return None


# --- tools and their calls


def tools_text(value: object) -> str:
    """The tools of a row, a list of objects or its JSON text, as one JSON text; "" where there are none.

    A bare description becomes {"type": "function", "function": ...}, the form that chat templates expect (OpenAI).

    Raises:
        RowProblem: it is no list of tools with names.
    """
    found = parsed(value) if isinstance(value, str) and value.strip() else value
    if is_hollow(value) or found in ([], {}):
        return ""
    tools = [found] if isinstance(found, Mapping) else found
    if not is_chat(tools):
        raise RowProblem("tools are no list of objects")
    whole: Any = tools if isinstance(value, str) else without_nulls_or_refuse(tools)
    wrapped = []
    for tool in whole:
        inner = tool if is_absent(tool.get("function")) else tool["function"]
        if not (isinstance(inner, Mapping) and isinstance(inner.get("name"), str) and inner["name"].strip()):
            raise RowProblem("a tool has no name")
        wrapped.append(tool if inner is not tool else {"type": "function", "function": dict(tool)})
    return _strict(wrapped, "tools are no JSON")


def _calls(message: Mapping[str, object], name: str) -> tuple[ToolCall, ...]:
    """What an assistant's message calls.

    Args:
        message: it may have `tool_calls` or `function_call`.
        name: of the field whose text is a call, "" for none.
    """
    found: list[ToolCall] = []
    for place in (name, "tool_calls", "function_call"):
        found += calls_in(message.get(place)) if place else ()
    if name and not found:
        raise RowProblem(f"empty field {name!r}")
    return tuple(found)


def calls_in(value: object) -> tuple[ToolCall, ...]:
    """The calls in a value: an object or a list of objects, or its JSON text; none in one that says nothing.

    Raises:
        RowProblem: it is something else.
    """
    if is_hollow(value):
        return ()
    calls = parsed(value) if isinstance(value, str) else value
    return tuple(
        _call(call, is_text=isinstance(value, str)) for call in (calls if isinstance(calls, list) else [calls])
    )


def calls_value(calls: Iterable[ToolCall]) -> str:
    """The JSON text in which `calls_in` finds these calls."""
    listed = [
        {"name": call.name, "arguments": json.loads(call.arguments), **({"id": call.id} if call.id else {})}
        for call in calls
    ]
    return json.dumps(listed, ensure_ascii=False)


def _call(call: object, *, is_text: bool) -> ToolCall:
    if not isinstance(call, Mapping):
        raise RowProblem("a call of a tool is no object")
    inner = call.get("function", None)
    function = call if is_absent(inner) else inner
    name = function.get("name") if isinstance(function, Mapping) else function if isinstance(function, str) else None
    if not isinstance(name, str) or not name.strip():
        raise RowProblem("a call of a tool has no name")
    holder = function if isinstance(function, Mapping) else call
    given: Any = next((holder[key] for key in _ARGUMENTS if not is_absent(holder.get(key))), {})
    if given == {} and (unknown := [key for key in holder if key not in _CALL_FIELDS and not is_hollow(holder[key])]):
        known = isinstance(unknown[0], str) and _FIELD_NAME.fullmatch(unknown[0])
        where = f" but {unknown[0]!r}" if known else ""
        raise RowProblem(f"a call of a tool has no arguments{where}; they are read from {', '.join(_ARGUMENTS)}")
    arguments = (parsed(given) if given.strip() else {}) if isinstance(given, str) else given
    if not isinstance(arguments, Mapping):
        raise RowProblem(_NO_OBJECT)
    if not is_text and not isinstance(given, str):
        arguments = without_nulls_or_refuse(arguments)
    id_ = call.get("id")
    label = "" if is_blank(id_) else field(call, "id").strip()
    check_unicode(name, "name")
    return ToolCall(name.strip(), _strict(arguments, _NO_OBJECT), label)


_ARGUMENTS = ("arguments", "parameters", "args", "input")  # OpenAI, Llama; LangChain; Anthropic
_CALL_FIELDS = {*_ARGUMENTS, "function", "name", "id", "type", "index", "call_id", "tool_call_id", "description"}
_NO_OBJECT = "the arguments of a call are no JSON object"


def without_nulls_or_refuse(value: Any) -> Any:
    """As `without_nulls`.

    Raises:
        RowProblem: it is nested too deeply.
    """
    try:
        return without_nulls(value)
    except RecursionError:
        raise RowProblem("an object is nested too deeply") from None


def _strict(value: object, problem: str) -> str:
    if (text := json_text(value)) is None:
        raise RowProblem(problem)
    return text


# --- back to messages


def message_of(turn: Turn) -> dict[str, object]:
    """A turn as a message that `conversation` reads as the same turn; where a data part begins is not written."""
    message: dict[str, object] = {"role": turn.role, "content": turn.text}
    if turn.thinking:
        message["reasoning_content"] = turn.thinking
    if turn.calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in turn.calls
        ]
    if turn.name:
        message["name"] = turn.name
    if turn.call_id:
        message["tool_call_id"] = turn.call_id
    if turn.role == "assistant" and not turn.trained:
        message["weight"] = 0
    return message


def rewritten(messages: Sequence[object], turns: Sequence[Turn]) -> list[object]:
    """The messages with what `turns` now say.

    Only texts that changed are written anew, and messages whose thinking or calls did. Messages that were joined, moved
    or left out are all replaced by the turns: what is left out was seen by nobody and is not handed on.

    Args:
        messages: what `conversation` takes.
        turns: the conversation's, some of them rewritten.
    """
    was = conversation(messages)
    if not was.whole:
        return [message_of(turn) for turn in turns]
    result: list[object] = []
    for message, before, now in zip(messages, was.turns, turns, strict=True):
        if now == before or not isinstance(message, Mapping):
            result.append(message)
        elif now == before._replace(text=now.text):
            by_role = not is_absent(message.get("role"))
            names = ("content", "value") if by_role else ("value", "content")
            name = next((n for n in names if not is_absent(message.get(n))), names[0])
            result.append({**message, name: now.text})
        else:
            result.append(message_of(now))
    return result
