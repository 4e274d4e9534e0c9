"""What chat templates are given, in OpenAI's form, and what they write of it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from apiary.core.errors import UserError
from apiary.data.rendering import DATE, Job, rendered
from apiary.data.segments import OTHERS, NoPlace
from apiary.data.turns import ToolCall, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Form",
    "chat_source",
    "declared",
    "eos_text",
    "has_chat",
    "job_of",
    "message_of",
    "message_text",
    "render",
    "with_short_ids",
]

_ID = re.compile(r"[A-Za-z0-9]{9}")  # the only ids that Mistral's templates take


class Form(NamedTuple):
    """How a template wants calls: arguments as text or as an object, and what stands for an answer without text."""

    as_text: bool = False
    blank: str | None = ""


def message_of(turn: Turn, form: Form) -> dict[str, Any]:
    """A turn as OpenAI's interface and the templates of the hub have it."""
    message: dict[str, Any] = {"role": turn.role, "content": turn.text}
    if not (turn.thinking or turn.calls or turn.name or turn.call_id):
        return message
    if turn.thinking:
        message["reasoning_content"] = turn.thinking
    if turn.calls:
        message["content"] = turn.text or form.blank
        message["tool_calls"] = [
            {
                **({"id": call.id} if call.id else {}),
                "type": "function",
                "function": {"name": call.name, "arguments": _arguments(call, form)},
            }
            for call in turn.calls
        ]
    if turn.role == "tool":
        message |= {"name": turn.name} if turn.name else {}
        message |= {"tool_call_id": turn.call_id} if turn.call_id else {}
    return message


def _arguments(call: ToolCall, form: Form) -> object:
    value = _json(call.arguments, "a tool call whose arguments are not a JSON object")
    if not isinstance(value, dict):
        raise NoPlace("a tool call whose arguments are not a JSON object")
    return json.dumps(value, ensure_ascii=False) if form.as_text else value


def declared(tools: str) -> list[dict[str, Any]]:
    """The declared tools, each as `{"type": "function", "function": ...}`, which templates expect."""
    value = _json(tools, "tools that are not a JSON list of objects")
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise NoPlace("tools that are not a JSON list of objects")
    bare = [("function" not in tool and "name" in tool, tool) for tool in value]
    return [{"type": "function", "function": tool} if is_bare else tool for is_bare, tool in bare]


def _json(text: str, problem: str) -> object:
    try:
        value: object = json.loads(text)
        if "\\u" in text:  # it may hold half a surrogate pair, which no tokenizer takes
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError):
        raise NoPlace(problem) from None
    return value


def with_short_ids(turns: Sequence[Turn]) -> Sequence[Turn]:
    """The same calls and results with ids of nine letters and digits, which Mistral's templates insist on.

    A call without an id gets one, and results without take those of the calls before them in turn.
    """
    renamed: list[Turn] = []
    waiting: list[str] = []
    for k, turn in enumerate(turns):
        if turn.calls:
            calls = [call._replace(id=_short(call.id or f"{k}.{n}")) for n, call in enumerate(turn.calls)]
            waiting = [call.id for call in calls]
            turn = turn._replace(calls=tuple(calls))
        elif turn.role == "tool" and (turn.call_id or waiting):
            id_ = _short(turn.call_id) if turn.call_id else waiting[0]
            waiting = [other for other in waiting if other != id_]
            turn = turn._replace(call_id=id_)
        renamed.append(turn)
    return tuple(renamed)


def _short(id_: str) -> str:
    return id_ if _ID.fullmatch(id_) else hashlib.sha256(id_.encode("utf-8", "surrogatepass")).hexdigest()[:9]


def eos_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """The EOS token.

    Raises:
        UserError: there is none.
    """
    if not tokenizer.eos_token:
        raise UserError(
            "model.name: its tokenizer has no EOS token, so answers could never end; "
            "set eos_token in its tokenizer_config.json"
        )
    return str(tokenizer.eos_token)


def has_chat(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer has a chat template."""
    try:
        chat_source(tokenizer)
    except UserError:
        return False
    return True


def chat_source(tokenizer: PreTrainedTokenizerBase) -> str:
    """The Jinja text of the chat template.

    Raises:
        UserError: there is none.
    """
    try:
        return str(tokenizer.get_chat_template())
    except ValueError:
        raise UserError(f'prompt.template = "chat": this tokenizer has no chat template; {OTHERS}') from None


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    *,
    ask: bool,
    tools: list[dict[str, Any]] | None = None,
    think: bool = False,
    source: str | None = None,
    date: str = DATE,
) -> str:
    """What the chat template writes, in the sandbox (`rendering`).

    Args:
        tokenizer: whose template it is.
        messages: the conversation, in OpenAI's form.
        ask: whether it ends in the generation prompt.
        tools: declarations of functions, in OpenAI's form.
        think: whether the answer that is asked for is to begin with thinking.
        source: the Jinja text of one of several templates.
        date: the day that the template is told, as 2024-07-26.

    Raises:
        Unwritable: it refuses the conversation.
        UserError: it breaks the limits of the sandbox.
    """
    texts = tuple(map(message_text, messages))
    return rendered(job_of(tokenizer, texts, ask=ask, tools=tools, think=think, source=source, date=date))


def job_of(
    tokenizer: PreTrainedTokenizerBase,
    messages: tuple[str, ...],
    *,
    ask: bool,
    tools: list[dict[str, Any]] | None = None,
    think: bool = False,
    source: str | None = None,
    date: str = DATE,
) -> Job:
    """What `render` has the sandbox do with these `message_text`s, and the variables that transformers gives."""
    variables: dict[str, Any] = dict(tokenizer.special_tokens_map)
    variables |= {
        "tools": tools,
        "documents": None,
        "add_generation_prompt": ask,
        # Known names in hub templates: most rows have no thinking part, and a prompt with today's date would change
        # from one day of a run to the next.
        "enable_thinking": think,
        "date_string": datetime.fromisoformat(date).strftime("%d %b %Y"),
    }
    if think:
        variables["thinking"] = True
    written = json.dumps(variables, default=str)
    return Job(chat_source(tokenizer) if source is None else source, date, written, messages)


def message_text(message: Mapping[str, Any]) -> str:
    """A message as JSON, without what is None, and with its thinking under the other name that templates read, too."""
    known = {name: value for name, value in message.items() if value is not None}
    if thinking := known.get("reasoning_content"):
        known = {"thinking": thinking, **known}
    return json.dumps(known, default=str)
