r"""How a conversation is written for the model: as segments of text, each trained or not.

    <s> | User: A bee?\n\nAssistant:\n | Maja</s> | \n\nUser: Another?\n\nAssistant:\n | Willy</s>
    no    no                            trained    no                                trained

Segments come from the template's own structure, never from searching a finished text for a marker,
which an answer might contain. A row of bare text is written by no template: BOS where the tokenizer uses one, the text,
EOS, and all of it is trained.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from apiary.config.schema import PromptConfig, RunConfig
from apiary.core.errors import UserError
from apiary.data import structured
from apiary.data.chat import Chat, read_chat
from apiary.data.chat_messages import chat_source, eos_text, has_chat, render, with_short_ids
from apiary.data.rendering import DATE
from apiary.data.segments import NoPlace, Segment, Splitter, Thinking, Unwritable
from apiary.data.tokens import decode, opening, tokenise
from apiary.data.turns import Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "BUILTIN",
    "Segment",
    "Splitter",
    "Template",
    "Thinking",
    "Unwritable",
    "asking",
    "literal_text",
    "make_template",
    "short_digest",
    "with_template",
]

_ALPACA = (  # Taori et al., "Stanford Alpaca", 2023: the prompt for an instruction without input
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:{response}\n\n"
)
_PLAIN = "User: {instruction}\n\nAssistant:\n{response}\n\n"
BUILTIN = ("auto", "chat", "alpaca", "plain")  # what `prompt.template` names without a file


@dataclass(frozen=True)
class Template:
    """How a conversation is written for the model.

    name: as configured, with `auto` settled; digest: 16 hex digits over all that shapes the text; system: put before
    conversations without a system turn; split: turns -> segments; why: what there is to say of the choice; structured:
    whether data stands between delimiters (`apiary.data.structured`); chat: what splits, where it is a chat template.
    """

    name: str
    digest: str
    system: str | None
    split: Splitter
    why: str = ""
    structured: bool = False
    chat: Chat | None = None

    @property
    def words(self) -> str:
        """The choice on one line, such as `chat (the tokenizer's own)`; of a file its name alone."""
        return Path(self.name).name + (f" ({self.why})" if self.why else "")

    def segments(self, turns: Sequence[Turn], tools: str = "", think: bool = False) -> list[Segment]:
        """The conversation in segments; one that does not end in an assistant turn asks for it.

        Args:
            turns: the conversation.
            tools: what the assistant may call, a JSON list as text; "" for none.
            think: whether the answer that is asked for is to begin with thinking.

        Raises:
            Unwritable: the template cannot write this conversation with a right mask.
        """
        return self.write(turns, tools, think)[1]

    def write(
        self, turns: Sequence[Turn], tools: str = "", think: bool = False
    ) -> tuple[Sequence[Turn], list[Segment]]:
        """As `segments`, with the turns as they were given to the template.

        These have the configured system message, and ids of calls that the template takes.
        """
        whole, tools = self.whole(turns), self.declared(tools)
        try:
            return whole, self.split(whole, tools, think)
        except Unwritable:
            if not any(turn.calls for turn in whole) or (renamed := with_short_ids(whole)) == whole:
                raise
            return renamed, self.split(renamed, tools, think)

    def render_ahead(self, conversations: Iterable[tuple[Sequence[Turn], str]]) -> None:
        """Have a chat template write many conversations, with their tools, for `write` to find; a matter of speed."""
        if self.chat is not None:
            talks = ((self.whole(turns), tools) for turns, tools in conversations)
            self.chat.render_ahead((turns, tools) for turns, tools in talks if not _is_bare(turns))

    def whole(self, turns: Sequence[Turn]) -> Sequence[Turn]:
        """The turns as they are written: a conversation with the configured system message, and data set apart."""
        if self.system is not None and not _is_bare(turns) and turns[0].role != "system":
            turns = (Turn("system", self.system), *turns)
        return structured.front_end(turns) if self.structured else turns

    def declared(self, tools: str) -> str:
        """The tools as they are written, JSON text: without delimiters of data where data is set apart."""
        return structured.strip_json(tools) if self.structured else tools

    def prompt(self, turns: Sequence[Turn]) -> str:
        """The text that the model continues, without the last assistant turn if there is one."""
        return "".join(segment.text for segment in self.segments(asking(turns)))

    @cached_property
    def thinking(self) -> Thinking | None:
        """What stands around the thinking of an answer; None where the template knows none.

        A chat template that refuses an answer with `<think>` in its text, as it takes that out of earlier answers,
        knows these marks too.
        """
        return _thinking(self.split)

    def answer(self, written: str) -> Turn:
        """An answer that was not asked to think, as the turn to be put back into the conversation.

        Args:
            written: what the model wrote, with the marks of thinking in it.
        """
        if self.thinking is None:
            return Turn("assistant", written)
        thinking, text = self.thinking.cut(written, asked=False)
        return Turn("assistant", text, thinking=thinking)


def make_template(config: PromptConfig, tokenizer: PreTrainedTokenizerBase) -> Template:
    """The template that `prompt.template` names: chat, alpaca, plain, or a file of your own.

    `auto` is chat where the tokenizer has a chat template, else alpaca: the digest is that of the one it came to.

    Raises:
        UserError: no such file, no slot for the response, no chat template or one that cannot be
            masked, or a tokenizer without an EOS token.
    """
    split: Splitter
    chat: Chat | None = None
    has_one = has_chat(tokenizer)
    name = config.template if config.template != "auto" else "chat" if has_one else "alpaca"
    if name == "chat":
        split = chat = read_chat(tokenizer)
        text = chat_source(tokenizer)
        if isinstance(tokenizer.chat_template, Mapping):
            text += str(tokenizer.chat_template.get("tool_use", ""))
    else:
        text = {"alpaca": _ALPACA, "plain": _PLAIN}.get(name) or _read_file(name)
        before, after = text.split("{response}")
        eos = eos_text(tokenizer)
        bos = _bos(tokenizer)
        split = _Pattern(before, after.removeprefix(eos), "" if before.startswith(bos) else bos, eos)
    shape = ["chat" if name == "chat" else "pattern", text, config.system]
    split = _or_bare(split, tokenizer)
    if apart := config.boundary == "structured":
        _check_delimiters(tokenizer)
        split, shape = _delimited(split), [*shape, structured.BEGIN, structured.END]
    why = "" if has_one else "the tokenizer has no chat template"
    dated = f", always dated {DATE}" if chat is not None and chat.writes_date else ""
    why = {"chat": f"the tokenizer's own{dated}", "alpaca": why}.get(name, "")
    return Template(name, short_digest(json.dumps(shape)), config.system, split, why, apart, chat)


def _check_delimiters(tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that the tokenizer tells the delimiters of data from other text: by tokens that read as they do.

    Raises:
        UserError: it has unknown characters in one of them, or reads it as something else.
    """
    for mark in (structured.BEGIN, structured.END):
        text = f"a\n{mark}\na"
        ids = tokenise([text], tokenizer)[text].tolist()
        unknown = tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids
        if unknown or structured.count([decode(tokenizer, ids)]) != 1:
            raise UserError(
                f'prompt.boundary = "structured": this tokenizer has no tokens for {mark!r}, so other text could pass '
                'for it; use another base model, or "plain"'
            )


def _delimited(split: Splitter) -> Splitter:
    """The same, where no delimiter of data is written but those that stand in the turns."""

    def checked(turns: Sequence[Turn], tools: str = "", think: bool = False) -> list[Segment]:
        segments = split(turns, tools, think)
        if structured.count(["".join(s.text for s in segments)]) != structured.count(turn.text for turn in turns):
            raise Unwritable("writes delimiters of data where no data stands")
        return segments

    return checked


def with_template(config: RunConfig, name: str) -> RunConfig:
    """The configuration with this `prompt.template`, such as the one that `auto` came to."""
    return config.model_copy(update={"prompt": config.prompt.model_copy(update={"template": name})})


def literal_text(template: Template, tokenizer: PreTrainedTokenizerBase) -> str:
    """All text that the template can write of its own: what it writes around a few turns, and its strings."""
    user, answer = Turn("user", "xQx1xQx"), Turn("assistant", "xAx2xAx")
    texts = [] if not tokenizer.chat_template else _strings(str(tokenizer.chat_template))
    for turns in ([Turn("system", "xSx3xSx"), user, answer, user, answer], [user, answer]):
        try:
            texts += [segment.text for segment in template.split(turns)]
        except Unwritable:
            continue
    return "\0".join(texts)


def _strings(source: str) -> list[str]:
    """The text of a Jinja template outside its blocks, and the quoted strings within them, tools' included."""
    blocks = re.findall(r"\{[{%].*?(?:[%}]\}|\Z)", source, re.DOTALL)
    quoted = re.findall(r"'([^']*)'|\"([^\"]*)\"", "\n".join(blocks))
    return [*re.split(r"\{[{%#].*?(?:[%}#]\}|\Z)", source, flags=re.DOTALL), *(one or other for one, other in quoted)]


def asking(turns: Sequence[Turn]) -> Sequence[Turn]:
    """The conversation up to where the last answer would begin."""
    return turns[:-1] if turns and turns[-1].role == "assistant" else turns


def short_digest(text: str) -> str:
    """A SHA-256 of the text, 16 hex digits."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


# --- thinking

_COMMON = Thinking("<think>", "</think>")


def _thinking(split: Splitter) -> Thinking | None:
    user, thought, text = Turn("user", "xQx1xQx"), "xTx3xTx", "xAx2xAx"
    try:
        written = "".join(s.text for s in split([user, Turn("assistant", text, thinking=thought)]) if s.trained)
    except Unwritable:
        written = ""
    before, _, after = written.partition(thought)
    between, found, _ = after.partition(text)
    if found:
        return Thinking(before.strip(), between.strip()) if between.strip() else None
    if _is_written(split, (user, Turn("assistant", text))):
        inline = f"{_COMMON.open}\n{thought}\n{_COMMON.close}\n\n{text}"
        return None if _is_written(split, (user, Turn("assistant", inline))) else _COMMON
    return None


def _is_written(split: Splitter, turns: Sequence[Turn]) -> bool:
    try:
        split(turns)
    except Unwritable:
        return False
    return True


# --- bare text


def _is_bare(turns: Sequence[Turn]) -> bool:
    """Whether this is no conversation: one text that is learnt as it stands, or nothing, to be continued."""
    return not turns or (len(turns) == 1 and turns[0].role == "assistant" and not turns[0].calls)


def _or_bare(split: Splitter, tokenizer: PreTrainedTokenizerBase) -> Splitter:
    """The splitter, which writes bare text as it stands. A text that is asked for begins with BOS, or else EOS.

    GPT-2 and its kind have no token of their own before a text; they saw EOS there.
    """
    bos, eos = _bos(tokenizer), str(tokenizer.eos_token or "")

    def write(turns: Sequence[Turn], tools: str = "", think: bool = False) -> list[Segment]:
        if not _is_bare(turns):
            return split(turns, tools, think)
        if not turns:
            return [Segment(bos or eos, False)]
        (turn,) = turns
        return [*([Segment(bos, False)] if bos else []), Segment(turn.text + eos, turn.trained)]

    return write


# --- templates with slots


@dataclass(frozen=True)
class _Pattern:
    """Writes each exchange as `before` response EOS `after`, with the slots of `before` filled."""

    before: str
    after: str
    bos: str
    eos: str

    def __call__(self, turns: Sequence[Turn], tools: str = "", think: bool = False) -> list[Segment]:
        """The segments of a conversation; of thinking there is none, for no slot takes it.

        Raises:
            NoPlace: there are tools, calls or results of tools, or a system message that does not come first.
        """
        if tools or any(turn.calls or turn.role == "tool" for turn in turns):
            raise NoPlace("tools or tool calls", chat=False)
        if any(turn.role == "system" for turn in turns[1:]):
            raise NoPlace("a system message after the first turn", chat=False)
        system = turns[0].text if turns[0].role == "system" else ""
        # BOS alone: after it, tokenizers that mark word starts treat the text as a beginning.
        segments = [Segment(self.bos, False)] if self.bos else []
        opening = "" if "{system}" in self.before or not system else f"{system}\n\n"
        between = ""
        for turn in turns:
            if turn.role == "user":
                segments.append(Segment(between + opening + self._fill(system, turn.text), False))
                system, opening, between = "", "", self.after
            elif turn.role == "assistant":
                segments.append(Segment(turn.text + self.eos, turn.trained))
                between = self.after
        if self.after and turns[-1].role == "assistant":
            segments.append(Segment(self.after, False))
        return segments

    def _fill(self, system: str, instruction: str) -> str:
        values = {"{system}": system, "{instruction}": instruction}
        # One pass, so that a slot's name within somebody's text is text.
        return re.sub(r"\{system\}|\{instruction\}", lambda slot: values[slot[0]], self.before)


def _read_file(name: str) -> str:
    """The text of a template file with one {response} after at least one {instruction}."""
    where = f"prompt.template = {name!r}"
    try:
        text = Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(
            f"{where}: cannot read this file ({reason}); allowed are auto, chat, alpaca, plain, or a file"
        ) from None
    if (count := text.count("{response}")) != 1:
        raise UserError(
            f"{where}: the file has {count} {{response}} slots and must have one; "
            "write {response} where the answer goes"
        )
    before, after = text.split("{response}")
    if "{instruction}" not in before:
        raise UserError(f"{where}: the file has no {{instruction}} slot before {{response}}; add it")
    for slot in ("{input}", "{instruction}", "{system}"):
        if slot in after or (slot == "{input}" and slot in text):
            raise UserError(
                f"{where}: {slot} cannot stand there; allowed are {{system}} and "
                "{instruction} (which carries the input) before {response}"
            )
    return text


def _bos(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the tokenizer starts a text with, mostly BOS; or else BOS where its chat template does."""
    if by_rule := opening(tokenizer):
        return by_rule
    if tokenizer.bos_token is None:
        return ""
    adds = False
    if tokenizer.chat_template:
        try:
            messages = [{"role": "user", "content": "a"}]
            adds = render(tokenizer, messages, ask=True).startswith(tokenizer.bos_token)
        except UserError:
            adds = False  # a chat template that is not used may be broken
    return str(tokenizer.bos_token) if adds else ""
