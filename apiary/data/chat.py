r"""The tokenizer's own chat template: where each answer begins and ends in what it writes.

    <|im_start|>user\nA bee?<|im_end|>\n<|im_start|>assistant\n | Maja<|im_end|> | \n
    no                                                             trained         no

A conversation is written as it grows, one turn after the other; an answer is what comes after the generation prompt.
Some templates write an answer in another way once more turns follow: they drop its thinking, or move what was said of
tools. Such a conversation is cut up as it stands in the end. An answer is then trained where the template writes it
after one of its own generation prompts, as it writes a last one; elsewhere it is context.

An answer's calls are part of it. What a template is given is in OpenAI's form.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

from apiary.data.chat_messages import Form, chat_source, declared, eos_text, job_of, message_of, message_text, render
from apiary.data.neutral import is_plain
from apiary.data.rendering import DATE, Job, render_ahead, rendered
from apiary.data.segments import NoPlace, Segment, Unwritable
from apiary.data.tokens import tokenise
from apiary.data.turns import ToolCall, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Chat", "read_chat"]

_log = logging.getLogger(__name__)

# What nobody says, to see where a template writes it.
_QUESTION, _ANSWER, _THOUGHT, _NAME, _KEY, _VALUE, _RESULT = (f"x{c}{n}x{c}x" for n, c in enumerate("QATNKVR", 1))
_ASK = Turn("user", _QUESTION)
_CALL = ToolCall(_NAME, json.dumps({_KEY: _VALUE}), "xCx0xCx00")
_CALLING = Turn("assistant", "", calls=(_CALL,))
_FORM = Form()
_NO_ARGUMENTS = {"type": "object", "properties": {}, "required": []}


def _declaring(name: str, description: str) -> list[dict[str, Any]]:
    function = {"name": name, "description": description, "parameters": _NO_ARGUMENTS}
    return [{"type": "function", "function": function}]


_OPENED = re.compile(r"\s*<[^<>\s/]*think[^<>\s]*>\s*\Z", re.IGNORECASE)  # the end of a prompt, as DeepSeek R1's
_STAND_IN = _declaring("xDx8xDx", "xDx9xDx")  # for templates that are read only where there are tools


class _Talk(NamedTuple):
    """A conversation as it is given to a template; messages: its turns, each as JSON, written once for all its cuts."""

    turns: Sequence[Turn]
    tools: list[dict[str, Any]] | None
    form: Form
    messages: tuple[str, ...]

    def having(self, turns: Sequence[Turn]) -> _Talk:
        return _talk(turns, self.tools, self.form)

    def upto(self, end: int) -> _Talk:
        return self._replace(turns=self.turns[:end], messages=self.messages[:end])


def _talk(turns: Sequence[Turn], tools: list[dict[str, Any]] | None = None, form: Form = _FORM) -> _Talk:
    """As a template is given it.

    Raises:
        NoPlace: a call's arguments are not a JSON object.
    """
    return _Talk(turns, tools, form, tuple([message_text(message_of(turn, form)) for turn in turns]))


@dataclass(frozen=True)
class Chat:
    """Finds the segments of conversations, by a chat template.

    lead: what the template writes between its generation prompt and an answer; tail: what it writes after one; eos:
    added where the tail does not end the turn with a token of its own; source: its Jinja text where a tokenizer has
    several templates; close: what it writes after the tail of a last answer alone, which belongs to no answer.
    """

    tokenizer: PreTrainedTokenizerBase
    lead: str
    tail: str
    eos: str
    takes_system: bool
    source: str | None = None
    close: str = ""

    def __call__(self, turns: Sequence[Turn], tools: str = "", think: bool = False) -> list[Segment]:
        """The segments of a conversation.

        Args:
            turns: the conversation; one that does not end in an assistant's turn asks for it.
            tools: what the assistant may call, a JSON list as text; "" for none.
            think: whether the answer that is asked for is to begin with thinking.

        Raises:
            Unwritable: the template refuses the conversation, has no place for a part of it, or writes its last answer
                in another way than it was asked for.
        """
        if is_plain(turns, tools):
            think = think and self.thinking_lead is not None
            talk = self._plain(turns)
        else:
            if self.for_tools is not self and _has_tools(turns, tools):
                return self.for_tools(turns, tools, think)
            talk = self._with_tools(turns, tools)
            if self.thinking_lead is None:
                think = False
                talk = talk.having([turn._replace(thinking="") for turn in talk.turns])
        try:
            return self._grown(talk, think)
        except Unwritable:
            if sum(turn.role == "assistant" for turn in talk.turns[:-1]) == 0:
                raise
            return self._finished(talk, think)

    def render_ahead(self, conversations: Iterable[tuple[Sequence[Turn], str]]) -> None:
        """Say what most of these conversations, with their tools, are going to need: it is written in few requests."""
        jobs = []
        for turns, tools in conversations:
            if is_plain(turns, tools):
                talk = self._plain(turns)
                for k, _ in _answers(talk.turns):
                    before, whole = talk.upto(k), talk.upto(k + 1)
                    jobs += [self._job(before, ask=True), self._job(whole, ask=False)]
        render_ahead(jobs)

    def _plain(self, turns: Sequence[Turn]) -> _Talk:
        return _talk(turns if self.takes_system else _merge_system(turns))

    # -- as a conversation grows

    def _grown(self, talk: _Talk, think: bool) -> list[Segment]:
        segments: list[Segment] = []
        done, eos, whole = "", "", ""  # the text that the segments so far stand for, what was added to it, all of it
        for k, turn in _answers(talk.turns):
            asked = self._ask(talk.upto(k), bool(turn.thinking))
            whole = self._whole(talk.upto(k + 1))
            answer = self._answer(_rest(whole, asked, k), turn)
            segments.append(_between(asked, done, eos, k))
            done, eos = asked + answer, self._eos_of(turn)
            segments.append(Segment(answer + eos, turn.trained))
            if k + 1 < len(talk.turns):
                whole = ""
        if talk.turns[-1].role != "assistant":
            segments.append(_between(self._ask(talk, think), done, eos, len(talk.turns)))
        elif left := _rest(whole or self._whole(talk), done, len(talk.turns)):
            segments.append(Segment(left, False))
        return segments

    # -- as it stands in the end

    def _finished(self, talk: _Talk, think: bool) -> list[Segment]:
        last = talk.turns[-1] if talk.turns[-1].role == "assistant" else None
        end = len(talk.turns) - (last is not None)
        before = talk.upto(end)
        prompt = self._ask(before, bool(last.thinking) if last else think)
        before = self._without_dropped_thinking(before, prompt, bool(last.thinking) if last else think)
        segments: list[Segment] = []
        done, eos = "", ""
        for k, turn in enumerate(before.turns):
            found = self._place(before.upto(k + 1), prompt) if turn.role == "assistant" else None
            if found is not None and len(found[0]) >= len(done):
                asked, answer = found
                segments.append(_between(asked, done, eos, k))
                done, eos = asked + answer, self._eos_of(turn)
                segments.append(Segment(answer + eos, turn.trained))
        segments.append(_between(prompt, done, eos, end))
        if last is not None:
            written = _rest(self._whole(talk), prompt, end)
            answer = self._answer(written, last)
            segments.append(Segment(answer + self._eos_of(last), last.trained))
            if left := written[len(answer) :]:
                segments.append(Segment(left, False))
        return segments

    def _without_dropped_thinking(self, talk: _Talk, prompt: str, think: bool) -> _Talk:
        """The same without the thinking before the last question, if the template leaves that out itself."""
        newest = max((k for k, turn in enumerate(talk.turns) if turn.role == "user"), default=0)
        turns = [turn._replace(thinking="") if k < newest else turn for k, turn in enumerate(talk.turns)]
        bare = talk.having(turns)
        return bare if turns != list(talk.turns) and self._ask(bare, think) == prompt else talk

    def _place(self, talk: _Talk, prompt: str) -> tuple[str, str] | None:
        """Where the prompt has the last answer of `talk`: the text before it, and the answer; None where it differs."""
        *_, turn = talk.turns
        before = talk.upto(len(talk.turns) - 1)
        try:
            think = bool(turn.thinking)
            own = self._ask(before, think)
            answer = self._answer(_rest(self._whole(talk), own, len(before.turns)), turn)
            # An answer without thinking may later stand where one with thinking would have begun.
            other = "" if self.thinking_lead is None else self._ask(before, not think)
        except Unwritable:
            return None
        return next(((asked, answer) for asked in (own, other) if asked and prompt.startswith(asked + answer)), None)

    # -- parts

    def _ask(self, talk: _Talk, think: bool) -> str:
        """The conversation up to where the next answer begins."""
        return self._render(talk, ask=True, think=think) + ((self.thinking_lead or "") if think else self.lead)

    def _whole(self, talk: _Talk) -> str:
        """The conversation with its last answer, in the mode that it was asked for."""
        return self._render(talk, ask=False, think=bool(talk.turns[-1].thinking)).removesuffix(self.close)

    def _render(self, talk: _Talk, *, ask: bool, think: bool = False) -> str:
        return rendered(self._job(talk, ask=ask, think=think))

    def _job(self, talk: _Talk, *, ask: bool, think: bool = False) -> Job:
        return job_of(self.tokenizer, talk.messages, ask=ask, tools=talk.tools, think=think, source=self.source)

    def _answer(self, written: str, turn: Turn) -> str:
        """The answer with its end mark, without the white space after that."""
        if turn.calls:
            names = [call.name for call in turn.calls]
            if any(written.count(name) < names.count(name) for name in names):
                raise NoPlace("each of several tool calls")
            return written.rstrip()
        content = written.removesuffix(self.tail)
        text = turn.text.strip()
        as_said = content.strip() == text
        if turn.thinking and not as_said:
            as_said = content.rstrip().endswith(text) and turn.thinking.strip() in content
        if not written.endswith(self.tail) or not as_said:
            raise Unwritable("rewrites what the assistant said", "a thinking part, perhaps")
        return content + self.tail.rstrip()

    def _eos_of(self, turn: Turn) -> str:
        return self._call_eos if turn.calls else self.eos

    # -- what the template has a place for, found out when first needed

    @cached_property
    def for_tools(self) -> Chat:
        """The template for conversations with tools: another one where the tokenizer names one `tool_use`."""
        several = self.tokenizer.chat_template
        if self.source is None and isinstance(several, Mapping) and "tool_use" in several:
            return read_chat(self.tokenizer, str(several["tool_use"]))
        return self

    @property
    def _stand_in(self) -> list[dict[str, Any]] | None:
        """The tools with which it is tried out."""
        return None if self.source is None else _STAND_IN

    @cached_property
    def thinking_lead(self) -> str | None:
        """As `lead`, before an answer that begins with thinking; None where the template does not write thinking."""
        plain = _talk([_ASK, Turn("assistant", _ANSWER, thinking=_THOUGHT)], self._stand_in)
        try:
            asked = self._render(plain.upto(1), ask=True, think=True)
            written = _rest(self._whole(plain), asked, 1)
        except Unwritable:
            return None
        if _THOUGHT not in written or _ANSWER not in written.partition(_THOUGHT)[2]:
            return None
        return self.lead if written.startswith(self.lead) else ""

    @cached_property
    def writes_date(self) -> bool:
        """Whether it writes what day it is, which is always `DATE`."""
        messages = [message_of(_ASK, Form())]
        days = (
            render(self.tokenizer, messages, ask=True, source=self.source, date=day) for day in (DATE, "2031-03-05")
        )
        return len(set(days)) > 1

    @cached_property
    def _writes_tools(self) -> bool:
        try:
            return _NAME in self._render(_talk([_ASK], _declaring(_NAME, _RESULT)), ask=True)
        except Unwritable:
            return False

    @cached_property
    def _call_form(self) -> Form | None:
        """The first form in which a call is written with its name and arguments, no part of them quoted twice."""
        for form in (Form(as_text, blank) for as_text, blank in product((False, True), ("", None))):
            try:
                written = self._whole(_talk([_ASK, _CALLING], self._stand_in, form))
            except Unwritable:
                continue
            whole = all(word in written for word in (_NAME, _KEY, _VALUE))
            if whole and f"'{_KEY}'" not in written and f'\\"{_KEY}' not in written:
                return form
        return None

    @cached_property
    def _writes_results(self) -> bool:
        turns = [_ASK, _CALLING, Turn("tool", _RESULT, name=_NAME, call_id=_CALL.id)]
        try:
            return _RESULT in self._render(_talk(turns, self._stand_in, self._call_form or Form()), ask=True)
        except Unwritable:
            return False

    @cached_property
    def _call_eos(self) -> str:
        """As `eos`, after a call."""
        form = self._call_form or Form()
        written = self._whole(_talk([_ASK, _CALLING], self._stand_in, form))
        return "" if _ends_turn(written, self.tokenizer) else eos_text(self.tokenizer)

    def _with_tools(self, turns: Sequence[Turn], tools: str) -> _Talk:
        """The conversation as the template wants it.

        Raises:
            NoPlace: the template does not write tools, calls or results, of which there are some.
        """
        if tools and not self._writes_tools:
            raise NoPlace("tools")
        calls = any(turn.calls for turn in turns)
        if calls and self._call_form is None:
            raise NoPlace("tool calls")
        if any(turn.role == "tool" for turn in turns) and not self._writes_results:
            raise NoPlace("results of tools")
        turns = turns if self.takes_system else _merge_system(turns)
        return _talk(turns, declared(tools) if tools else None, self._call_form or Form() if calls else Form())


def read_chat(tokenizer: PreTrainedTokenizerBase, source: str | None = None) -> Chat:
    """Learns how a chat template frames an answer from one that nobody would give.

    Args:
        tokenizer: whose template it is.
        source: the Jinja text of the one for conversations with tools, which may count on some being declared; None
            for the template that is used by itself.

    Raises:
        UserError: there is no chat template, or it cannot be masked.
    """
    chat_source(tokenizer)
    messages = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
    tools = None if source is None else _STAND_IN
    asked = render(tokenizer, messages[:1], ask=True, tools=tools, source=source)
    whole = render(tokenizer, messages, ask=False, tools=tools, source=source)
    opened = _OPENED.search(asked)
    if opened and not whole.startswith(asked) and whole.startswith(asked[: opened.start()]):
        raise Unwritable(
            "opens thinking in each generation prompt, and writes answers without it",
            f"its prompts end in {opened[0].strip()}",
        )
    written = _rest(whole, asked, 1)
    lead, separator, tail = written.partition(_ANSWER)
    inner = _inner_tail(tokenizer, messages, tail, source)
    if not separator or _QUESTION not in asked:
        raise Unwritable("does not write out what is said")
    return Chat(
        tokenizer,
        # A header belongs to the prompt. White space is left for the model to write, because
        # tokenizers glue it to the word that follows.
        lead=lead if lead.strip() else "",
        tail=inner,
        eos="" if _ends_turn(inner, tokenizer) else eos_text(tokenizer),
        takes_system=_takes_system(tokenizer, source),
        source=source,
        close=tail.removeprefix(inner),
    )


def _inner_tail(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], tail: str, source: str | None
) -> str:
    """What follows an answer wherever it stands; Phi-3, for one, writes EOS after the end of a last turn.

    Where an answer ends in another way once more turns follow, it is the tail of a last one.
    """
    more = [*messages, {"role": "user", "content": "xMx"}]
    try:
        tools = None if source is None else _STAND_IN
        after = render(tokenizer, more, ask=True, tools=tools, source=source).partition(_ANSWER)[2]
    except Unwritable:
        return tail
    if after.startswith(tail):
        return tail
    same = next((n for n, (one, other) in enumerate(zip(tail, after, strict=False)) if one != other), len(after))
    starts = (tail[:n] for n in range(same, 0, -1))
    return next((start for start in starts if start.strip() and _ends_turn(start, tokenizer)), tail)


def _answers(turns: Sequence[Turn]) -> Iterator[tuple[int, Turn]]:
    """The answers that are segments of their own, each with its place: not one that opens a talk and is not trained."""
    asked = False
    for k, turn in enumerate(turns):
        asked = asked or turn.role == "user"
        if turn.role == "assistant" and (turn.trained or asked):
            yield k, turn


def _has_tools(turns: Sequence[Turn], tools: str) -> bool:
    return bool(tools) or any(turn.calls or turn.role == "tool" for turn in turns)


def _ends_turn(tail: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    text = tail.rstrip()
    end = tokenise([text], tokenizer)[text][-1:].tolist()
    return bool(end) and end[0] in tokenizer.added_tokens_decoder


def _takes_system(tokenizer: PreTrainedTokenizerBase, source: str | None) -> bool:
    """Whether a system message is written, and still there once it is answered: Mistral v0.3 writes it to ask alone."""
    system = "xSx3xSx"
    tools = None if source is None else _STAND_IN
    messages = [
        {"role": role, "content": text} for role, text in (("system", system), ("user", "a"), ("assistant", "b"))
    ]
    try:
        takes = all(
            system in render(tokenizer, messages[:end], ask=ask, tools=tools, source=source)
            for end, ask in ((2, True), (3, False))
        )
    except Unwritable:
        takes = False
    if not takes:
        _log.info("the chat template has no system role: it goes before the first question")
    return takes


def _merge_system(turns: Sequence[Turn]) -> Sequence[Turn]:
    """The same conversation with the system message at the head of the first question."""
    if turns[0].role != "system":
        return turns
    system, *rest = turns
    if not rest or rest[0].role != "user":
        return (Turn("user", system.text), *rest)
    first, *rest = rest
    return (first._replace(text=f"{system.text}\n\n{first.text}"), *rest)


def _between(asked: str, done: str, eos: str, k: int) -> Segment:
    text = _rest(asked, done, k)
    if done and eos:  # some templates end an answer only once another turn follows
        text = re.sub(rf"^(\s*){re.escape(eos)}", r"\1", text)
    return Segment(text, False)


def _rest(text: str, start: str, turn: int) -> str:
    if not text.startswith(start):
        raise Unwritable("changes earlier text as a conversation grows", f"seen at turn {turn + 1}")
    return text[len(start) :]
