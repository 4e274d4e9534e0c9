"""From one row to one conversation: which columns hold what, what of them is not used, and the way back.

Names of columns are taken in any case, with white space around them, and with blanks or hyphens for underscores.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from apiary.core.errors import UserError
from apiary.data.fields import (
    RowProblem,
    check_unicode,
    field,
    is_absent,
    is_blank,
    list_field,
    optional_field,
    parsed,
    scalar_text,
    tidy,
)
from apiary.data.messages import (
    BORDER,
    THINKING,
    calls_in,
    calls_value,
    conversation,
    is_chat,
    question_about,
    rewritten,
    tools_text,
)
from apiary.data.turns import ToolCall, Turn

__all__ = [
    "CONTINUED",
    "NO_ANSWER",
    "POINTS",
    "PREFERENCES",
    "UNWANTED",
    "Columns",
    "Reading",
    "check_columns",
    "columns_of",
    "given_columns",
    "has_known",
    "read_row",
    "with_tools",
    "with_turns",
]

CONTINUED = "read as text to continue: all of it is trained"
FIRST_ANSWER = "of several answers the first is read"
NO_ANSWER = "a question without an answer"
_UNKNOWN = "no columns known as instruction data"
UNWANTED = "a completion with label = false is one not to be given, which needs an objective for preferences"
POINTS = "the answer only names one of the choices; write them into the question, or the choice as the answer"
PREFERENCES = "columns chosen and rejected are preference data, which needs an objective for preferences"


class Columns(NamedTuple):
    """Which column holds what: `messages`, or `instruction` (and perhaps `input`) with `output`, or `text` alone.

    system: the system message of the first two; tools: what the assistant may call; thinking: what it thought before
    the output.
    """

    instruction: str = ""
    input: str = ""
    output: str = ""
    messages: str = ""
    system: str = ""
    tools: str = ""
    text: str = ""
    thinking: str = ""

    @property
    def required(self) -> tuple[str, ...]:
        """The columns without which a row cannot be used."""
        return _required(self.instruction, self.output, self.messages, self.text)


@lru_cache(256)  # asked many times of each row
def _required(*names: str) -> tuple[str, ...]:
    return tuple(name for name in names if name)


# Of each row the first that it fills is taken.
_KNOWN = (
    Columns(messages="messages"),
    Columns(messages="conversations"),
    Columns(instruction="instruction", output="output"),
    Columns(instruction="instruction", output="response"),
    Columns(instruction="prompt", output="completion"),
    Columns(instruction="prompt", output="response"),
    Columns(instruction="question", output="answer"),
    Columns(instruction="question", output="answers"),  # SQuAD
    Columns(instruction="question", output="response"),  # OpenOrca
    Columns(instruction="query", output="response"),
    Columns(instruction="query", output="answers"),  # xLAM, whose answers are calls
)
_TEXT = Columns(text="text")
_INPUTS = ("input", "context")
_SYSTEMS = ("system", "system_prompt", "system_message")
_TOOLS = ("tools", "functions")
_CHOICES = ("chosen", "rejected")
_SETS = dict.fromkeys(name for known in _KNOWN for name in known.required)
# Beside one of these a text is what a question is about, not all that is to be learnt.
_LABELS = ("label", "labels", "target", "targets", "summary")
_OPTIONS = ("choices", "options")
_BESIDE = (*_OPTIONS, "history", "documents")  # what a question may need and Apiary does not read
_NAMES = {*_SETS, "text", *_INPUTS, *_SYSTEMS, *_TOOLS, *_CHOICES, *THINKING, *_BESIDE}


class Reading(NamedTuple):
    """What a row was read as.

    tools: JSON text, "" for none; remarks: what was read otherwise than it stands; used: the columns that were read.
    """

    turns: tuple[Turn, ...]
    tools: str
    remarks: tuple[str, ...]
    used: frozenset[str]


def given_columns(columns: Mapping[str, str]) -> Columns | None:
    """The user's own column names, checked; None where there are none. `context` is another word for `input`.

    Raises:
        UserError: an unknown field, or not exactly one way to make a conversation.
    """
    if not columns:
        return None
    allowed = (*Columns._fields, "context")
    for name in columns:
        if name not in allowed:
            close = difflib.get_close_matches(name, allowed, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise UserError(f"unknown key 'data.columns.{name}': allowed are {', '.join(allowed)}{hint}")
    if "context" in columns and "input" in columns:
        raise UserError("data.columns.context and data.columns.input name the same thing: give one of them")
    fields = {"input" if name == "context" else name: column for name, column in columns.items()}
    given = Columns(**fields)
    pair = (given.instruction, given.output)
    ways = [bool(given.messages), all(pair), bool(given.text)]
    of_pair = (*pair, given.input, given.thinking)
    is_mixed = (given.messages and any(of_pair)) or (given.text and any((*of_pair, given.system, given.tools)))
    if is_mixed or sum(ways) != 1:
        raise UserError(
            f"data.columns = {dict(columns)!r}: give either messages, or instruction and output (and perhaps input), "
            "or text alone; system and tools go with the first two, thinking with output"
        )
    return given


def check_columns(file: str, names: Sequence[str], given: Columns | None, known: bool) -> None:
    """Check that some row of a file has the columns that the user named, or else known ones.

    Args:
        file: its name.
        names: the columns of all its rows, in order of appearance.
        given: the user's own columns.
        known: a row has known columns (`has_known`).

    Raises:
        UserError: a column that the user named is not there, or none of the known ones is.
    """
    if given is not None:
        _check_given(file, names, given)
    elif not known:
        raise UserError(
            f"{file}: {_UNKNOWN} (it has {_listed(names)}); say which "
            'to use, e.g. data.columns = { instruction = "...", output = "..." }'
        )


def _check_given(file: str, names: Sequence[str], given: Columns) -> None:
    for key, name in given._asdict().items():
        if name and name not in names:
            close = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
            hint = f"did you mean {close[0]!r}?" if close else f"it has {_listed(names)}"
            raise UserError(f"data.columns.{key} = {name!r}: {file} has no such column; {hint}")


def _listed(names: Sequence[str], most: int = 12) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more if names else "none"


# --- which columns a row fills


def columns_of(row: Mapping[str, object], given: Columns | None = None) -> Columns:
    """The columns to use for a row: the user's, or the known ones that this row fills, the first of several.

    Text alone is read only where a row fills none of the others. Other rows are not asked. Under record-level privacy a
    row that could change how its neighbours are read would make the sensitivity that of the whole file.

    Args:
        row: one of a file.
        given: the user's own columns, where there are any.
    """
    if given is not None:
        return given
    own = _own_names(row)
    if _is_text_alone(row, own):
        return Columns(text=own["text"])
    best = max(_KNOWN, key=lambda known: _fills(row, known, own))
    named = Columns(*(own.get(name, name) for name in best))
    named = named._replace(system=_filled(row, _SYSTEMS, own), tools=_filled(row, _TOOLS, own))
    if _chat_columns(row, named):  # their messages say what they were given and what was thought
        return named
    texts = (name for name in THINKING if name in own and isinstance(row[own[name]], str))  # others are settings
    thinking = _filled(row, texts, own)
    return named._replace(input=_filled(row, _INPUTS, own), thinking=thinking)


def has_known(row: Mapping[str, object]) -> bool:
    """Whether a row has the columns of a known set, filled or not."""
    own = _own_names(row)
    return any(all(name in own for name in known.required) for known in _KNOWN) or _is_text_alone(row, own)


def _own_names(row: Mapping[str, object]) -> dict[str, str]:
    """The row's own names of known columns; of two that differ in case alone the exact one, or else the filled one."""
    own: dict[str, str] = {}
    for name in row:
        known = _plain_name(name)
        if known in _NAMES:
            before = own.get(known)
            if before is None or (is_blank(row[before]), before != known) > (is_blank(row[name]), name != known):
                own[known] = name
    return own


@lru_cache(4096)
def _plain_name(name: object) -> str:
    return re.sub(r"[\s-]+", "_", name.strip("\ufeff \t\r\n\f\v\xa0").casefold()) if isinstance(name, str) else ""


def _is_text_alone(row: Mapping[str, object], own: Mapping[str, str]) -> bool:
    if "text" not in own or is_blank(row[own["text"]]):
        return False
    if _filled(row, (*_SETS, *_CHOICES), own):
        return False
    return not any(_plain_name(name) in _LABELS and not is_blank(value) for name, value in row.items())


def _points_at_option(row: Mapping[str, object], columns: Columns, answer: str) -> bool:
    """Whether an answer is the number or letter of a choice that stands in a column by itself (MMLU, ARC)."""
    own = _own_names(row)
    return (
        bool(columns.output)
        and bool(_filled(row, _OPTIONS, own))
        and re.fullmatch(r"\(?[A-Za-z0-9]\W?", answer) is not None
    )


def _is_unwanted(row: Mapping[str, object], columns: Columns) -> bool:
    """Whether an answer is marked as a bad one: unpaired preferences (TRL), prompt, completion and label."""
    if _plain_name(columns.output) != "completion":
        return False
    labels = [value for name, value in row.items() if _plain_name(name) == "label"]
    return any(value is False or (isinstance(value, str) and value.strip().casefold() == "false") for value in labels)


def _filled(row: Mapping[str, object], names: Iterable[str], own: Mapping[str, str]) -> str:
    """The row's own name of the first of these columns that it fills, "" for none."""
    return next((own[name] for name in names if name in own and not is_blank(row[own[name]])), "")


def _fills(row: Mapping[str, object], columns: Columns, own: Mapping[str, str]) -> tuple[bool, bool, int]:
    """How well a row fills columns: with something in each; with no null; else how many of them are there."""
    values = [row.get(own.get(name, name)) for name in columns.required]
    there = not any(map(is_absent, values))
    return (
        there and not any(map(is_blank, values)),
        there,
        0 if there else sum(name in own for name in columns.required),
    )


# --- the conversation in a row


def read_row(row: Mapping[str, object], columns: Columns, *, is_given: bool = False) -> Reading:
    """The conversation in a row: [system] user ... assistant, or one assistant turn of text to continue.

    Args:
        row: one of a file.
        columns: which of its columns to read (`columns_of`).
        is_given: the user named the columns.

    Raises:
        RowProblem: a field is missing, empty or of the wrong type, or the turns are out of order.
    """
    try:
        said = _said(row, columns)
    except RowProblem:
        if not is_given:
            _check_known(row)
        raise
    if not is_given and _is_unwanted(row, columns):
        raise RowProblem(UNWANTED)
    if not is_given and _points_at_option(row, columns, said.turns[-1].text):
        raise RowProblem(POINTS)
    tools = tools_text(row.get(columns.tools)) if columns.tools else ""
    used = {name for name in (*said.used, columns.tools) if name}
    remarks = (*said.remarks, *_unused(row, used, is_given))
    return Reading(said.turns, tools, remarks, frozenset(used))


def _said(row: Mapping[str, object], columns: Columns) -> Reading:
    if columns.text:
        text = field(row, columns.text, may_be_number=False, clean=str)
        return Reading((Turn("assistant", text),), "", (CONTINUED,), frozenset({columns.text}))
    system = optional_field(row, columns.system, may_be_number=False, clean=str.strip) if columns.system else ""
    before = (Turn("system", system),) if system else ()
    chats = _chat_columns(row, columns)
    if chats:
        talk = conversation([message for name in chats for message in list_field(row, name)])
        if talk.turns[0].role == "system":  # its own, which stands nearer
            before = ()
        used = (*chats, columns.system) if before else chats
        return Reading((*before, *talk.turns), "", talk.remarks, frozenset(used))
    user = field(row, columns.instruction, may_be_number=False, clean=str.strip)
    extra = optional_field(row, columns.input) if columns.input else ""
    thinking = optional_field(row, columns.thinking, may_be_number=False) if columns.thinking else ""
    calls = _answer_calls(row, columns)
    text, remarks = ("", ()) if calls else _answer(row, columns.output)
    answer = Turn("assistant", text, thinking=thinking, calls=calls)
    used = (*columns[:3], columns.system, columns.thinking)
    return Reading((*before, question_about(user, extra), answer), "", remarks, frozenset(used))


def _chat_columns(row: Mapping[str, object], columns: Columns) -> tuple[str, ...]:
    """The columns with messages: one, or TRL's conversational prompt and completion; none where they hold text."""
    if columns.messages:
        return (columns.messages,)
    pair = (columns.instruction, columns.output)
    return pair if all(is_chat(row.get(name)) for name in pair) else ()


def _answer_calls(row: Mapping[str, object], columns: Columns) -> tuple[ToolCall, ...]:
    """The calls that are the answer where a row has tools and a list of objects with names for answers (xLAM).

    Raises:
        RowProblem: the list is empty, or one of them is no call.
    """
    if not columns.tools or _plain_name(columns.output) != "answers":
        return ()
    value = row.get(columns.output)
    found: Any = parsed(value) if isinstance(value, str) else value
    if found == []:
        raise RowProblem(NO_ANSWER)
    return calls_in(value) if is_chat(found) and all("name" in call for call in found) else ()


def _answer(row: Mapping[str, object], name: str) -> tuple[str, tuple[str, ...]]:
    """The answer, and what there is to say of it; of SQuAD's several, {"text": [...], ...} or a list, the first."""
    value = row.get(name)
    several = value.get("text") if isinstance(value, Mapping) else value
    if not isinstance(several, list) or (several is value and _plain_name(name) != "answers"):
        return field(row, name), ()
    texts = [one.get("text") if isinstance(one, Mapping) else one for one in several]
    texts = [text for text in texts if not is_blank(text)]
    if not texts:
        raise RowProblem(NO_ANSWER)
    if not isinstance(texts[0], str):
        raise RowProblem(f"wrong type in field {name!r} ({type(value).__name__})")
    check_unicode(texts[0], name)
    return tidy(texts[0]), (FIRST_ANSWER,) if any(text != texts[0] for text in texts) else ()


def _check_known(row: Mapping[str, object]) -> None:
    """Say more of a row that cannot be read: it holds preferences, or no column that could hold an answer.

    Raises:
        RowProblem: it is of one of these kinds.
    """
    own = _own_names(row)
    if any(_fills(row, known, own)[0] for known in _KNOWN):
        return
    if all(_filled(row, (name,), own) for name in _CHOICES):
        prompt, chosen = own.get("prompt"), own["chosen"]
        named = f'instruction = "{prompt}", output = "{chosen}"'
        if prompt is None or is_chat(row[chosen]) > is_chat(row[prompt]):
            named = f'messages = "{chosen}"' if is_chat(row[chosen]) else f'text = "{chosen}"'
        raise RowProblem(PREFERENCES, f"to learn the chosen answers alone, set data.columns = {{ {named} }}")
    if not any(name in own for name in _SETS):
        raise RowProblem(_UNKNOWN)


def _unused(row: Mapping[str, object], used: Collection[str], is_given: bool) -> list[str]:
    """A remark on the known columns that a row fills and that are not read."""
    names = sorted(
        {_plain_name(name) for name, value in row.items() if name not in used and not is_blank(value)} & _NAMES
    )
    if not names:
        return []
    what = "column {} is not used" if len(names) == 1 else "columns {} are not used"
    why = "data.columns names others" if is_given else f"read: {', '.join(sorted(map(_plain_name, used)))}"
    return [f"{what.format(', '.join(names))} ({why})"]


# --- and back


def with_tools(row: Mapping[str, object], columns: Columns, tools: str) -> dict[str, object]:
    """The row with other tools, as JSON text, in the column that they came from; as it was where they are the same."""
    same = not columns.tools or tools == tools_text(row.get(columns.tools))
    return dict(row) if same else {**row, columns.tools: tools}


def with_turns(row: Mapping[str, object], columns: Columns, turns: Sequence[Turn]) -> dict[str, object]:
    """The row with what `turns` now say in the columns that they came from; the other columns are left as they were.

    Where a rewritten question no longer shows where the input begins, all of it becomes the instruction. Messages that
    were joined, moved or left out are written as the turns that they were read as; of several answers the first stays.

    Args:
        row: one that `read_row` takes.
        columns: as there.
        turns: the row's own, some of them rewritten.

    Raises:
        ValueError: they are not of the same number or roles.
    """
    said = _said(row, columns)
    if [turn.role for turn in turns] != [turn.role for turn in said.turns]:
        raise ValueError("the turns are not those of the row")
    new_row = dict(row)
    before, after = said.turns, tuple(turns)
    if columns.text:
        return new_row | ({} if after == before else {columns.text: after[0].text})
    if columns.system and columns.system in said.used and before[0].role == "system":
        if after[0] != before[0]:
            new_row[columns.system] = after[0].text
        before, after = before[1:], after[1:]
    if chats := _chat_columns(row, columns):
        return new_row | _chat_values(row, chats, after)
    if after == before:
        return new_row
    if after[1].calls:
        if after[1].calls != before[1].calls:
            new_row[columns.output] = calls_value(after[1].calls)
    elif after[1].text != before[1].text or scalar_text(row[columns.output]) is None:  # places in the context are off
        new_row[columns.output] = after[1].text
    if after[1].thinking != before[1].thinking:
        new_row[columns.thinking] = after[1].thinking
    for parts in _parts(before[0], after[0]) if after[0] != before[0] else ():
        tried = new_row | dict(zip((columns.instruction, columns.input), parts, strict=False))
        if _question(tried, columns) == after[0].text:
            return tried
    return new_row


def _question(row: Mapping[str, object], columns: Columns) -> str | None:
    try:
        return _said(row, columns).turns[-2].text
    except RowProblem:
        return None


def _chat_values(row: Mapping[str, object], names: Sequence[str], turns: Sequence[Turn]) -> dict[str, object]:
    """The columns with messages, of which those that changed are written anew."""
    lists = [list_field(row, name) for name in names]
    messages = [message for part in lists for message in part]
    new = rewritten(messages, turns)
    if new == messages:
        return {}
    # Two columns part where they did, or else before the last answer.
    end = len(lists[0]) if len(names) == 1 or len(new) == len(messages) else len(new) - 1
    return dict(zip(names, (new, []) if len(names) == 1 else (new[:end], new[end:]), strict=False))


def _parts(was: Turn, now: Turn) -> Iterator[tuple[str, ...]]:
    """Ways to write a rewritten question as instruction and input, best first.

    The input begins where the turn says, or after as many blank lines as before; or nowhere.
    """
    if was.data is not None:
        start = now.data or 0
        if now.text[:start].endswith(BORDER):
            yield now.text[: start - len(BORDER)], now.text[start:]
        parts = now.text.split(BORDER)
        first = was.text[: was.data].count(BORDER)
        if len(parts) == was.text.count(BORDER) + 1:
            yield BORDER.join(parts[:first]), BORDER.join(parts[first:])
        yield now.text, ""
    yield (now.text,)
