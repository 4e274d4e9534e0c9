r"""How a conversation is written for the model: as segments of text, each trained or not.

    <s> | User: A bee?\n\nAssistant:\n | Maja</s> | \n\nUser: Another?\n\nAssistant:\n | Willy</s>
    no    no                            trained    no                                trained

Segments come from the template's own structure, never from searching a finished text for a marker,
which an answer might contain.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from apiary.config.schema import PromptConfig, RunConfig
from apiary.core.errors import UserError
from apiary.data import structured
from apiary.data.turns import Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

_ALPACA = (  # Taori et al., "Stanford Alpaca", 2023: the prompt for an instruction without input
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:{response}\n\n"
)
_PLAIN = "User: {instruction}\n\nAssistant:\n{response}\n\n"
BUILTIN = ("auto", "chat", "alpaca", "plain")  # what `prompt.template` names without a file
_OTHERS = 'use prompt.template = "alpaca" or "plain"'


class Segment(NamedTuple):
    """A stretch of text that is tokenised by itself, and whether its tokens are trained."""

    text: str
    trained: bool


class Unwritable(UserError):
    """The template cannot write a conversation with a right mask.

    Args:
        problem: what the chat template does.
        detail: more on it, for whoever may see the conversation: the template's own words could quote it.
    """

    def __init__(self, problem: str, detail: str = "") -> None:
        self.reason = f"the chat template {problem}"
        more = f" ({detail})" if detail else ""
        super().__init__(
            f'prompt.template = "chat": the chat template of this tokenizer {problem}{more}, '
            f"so prompt and response cannot be told apart safely; {_OTHERS}"
        )


Splitter = Callable[[Sequence[Turn]], list[Segment]]


@dataclass(frozen=True)
class Template:
    """How a conversation is written for the model.

    name: as configured, with `auto` settled; digest: 16 hex digits over all that shapes the text; system: put before
    conversations without a system turn; split: turns -> segments; why: what there is to say of the choice; structured:
    whether data stands between delimiters (`apiary.data.structured`).
    """

    name: str
    digest: str
    system: str | None
    split: Splitter
    why: str = ""
    structured: bool = False

    @property
    def words(self) -> str:
        """The choice on one line, such as `chat (the tokenizer's own)`; of a file its name alone."""
        return Path(self.name).name + (f" ({self.why})" if self.why else "")

    def segments(self, turns: Sequence[Turn]) -> list[Segment]:
        """The conversation in segments; one that does not end in an assistant turn asks for it.

        Raises:
            Unwritable: the template cannot write this conversation with a right mask.
        """
        return self.split(self.whole(turns))

    def whole(self, turns: Sequence[Turn]) -> Sequence[Turn]:
        """The turns as they are written: with the configured system message, if they have none, and data apart."""
        if self.system is not None and turns[0].role != "system":
            turns = (Turn("system", self.system), *turns)
        return structured.front_end(turns) if self.structured else turns

    def prompt(self, turns: Sequence[Turn]) -> str:
        """The text that the model continues, without the last assistant turn if there is one."""
        return "".join(segment.text for segment in self.segments(asking(turns)))


def make_template(config: PromptConfig, tokenizer: PreTrainedTokenizerBase) -> Template:
    """The template that `prompt.template` names: chat, alpaca, plain, or a file of your own.

    `auto` is chat where the tokenizer has a chat template, else alpaca: the digest is that of the one it came to.

    Raises:
        UserError: no such file, no slot for the response, no chat template or one that cannot be
            masked, or a tokenizer without an EOS token.
    """
    split: Splitter
    has_chat = _has_chat(tokenizer)
    name = config.template if config.template != "auto" else "chat" if has_chat else "alpaca"
    if name == "chat":
        split, text = _read_chat(tokenizer), _chat_source(tokenizer)
    else:
        text = {"alpaca": _ALPACA, "plain": _PLAIN}.get(name) or _read_file(name)
        before, after = text.split("{response}")
        eos = _eos(tokenizer)
        bos = _bos(tokenizer)
        split = _Pattern(before, after.removeprefix(eos), "" if before.startswith(bos) else bos, eos)
    shape = ["chat" if name == "chat" else "pattern", text, config.system]
    if apart := config.boundary == "structured":
        _check_delimiters(tokenizer)
        split, shape = _delimited(split), [*shape, structured.BEGIN, structured.END]
    why = "" if has_chat else "the tokenizer has no chat template"
    why = {"chat": "the tokenizer's own", "alpaca": why}.get(name, "")
    return Template(name, short_digest(json.dumps(shape)), config.system, split, why, apart)


def _check_delimiters(tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that the tokenizer tells the delimiters of data from other text: by tokens that read as they do.

    Raises:
        UserError: it has unknown characters in one of them, or reads it as something else.
    """
    for mark in (structured.BEGIN, structured.END):
        ids = tokenizer(f"a\n{mark}\na", add_special_tokens=False)["input_ids"]
        unknown = tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids
        if unknown or structured.count([str(tokenizer.decode(ids))]) != 1:
            raise UserError(
                f'prompt.boundary = "structured": this tokenizer has no tokens for {mark!r}, so other text could pass '
                'for it; use another base model, or "plain"'
            )


def _delimited(split: Splitter) -> Splitter:
    """The same, where no delimiter of data is written but those that stand in the turns."""

    def checked(turns: Sequence[Turn], *given: Any) -> list[Segment]:
        segments = split(turns, *given)
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
    blocks = re.findall(r"\{[{%].*?[%}]\}", source, re.DOTALL)
    quoted = re.findall(r"'([^']*)'|\"([^\"]*)\"", "\n".join(blocks))
    return [*re.split(r"\{[{%#].*?[%}#]\}", source, flags=re.DOTALL), *(one or other for one, other in quoted)]


def asking(turns: Sequence[Turn]) -> Sequence[Turn]:
    """The conversation up to where the last answer would begin."""
    return turns[:-1] if turns and turns[-1].role == "assistant" else turns


def short_digest(text: str) -> str:
    """A SHA-256 of the text, 16 hex digits."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


# --- templates with slots


@dataclass(frozen=True)
class _Pattern:
    """Writes each exchange as `before` response EOS `after`, with the slots of `before` filled."""

    before: str
    after: str
    bos: str
    eos: str

    def __call__(self, turns: Sequence[Turn]) -> list[Segment]:
        system = turns[0].text if turns[0].role == "system" else ""
        # BOS alone: after it, tokenizers that mark word starts treat the text as a beginning.
        segments = [Segment(self.bos, False)] if self.bos else []
        between = "" if "{system}" in self.before or not system else f"{system}\n\n"
        for turn in turns:
            if turn.role == "user":
                segments.append(Segment(between + self._fill(system, turn.text), False))
                system, between = "", self.after
            elif turn.role == "assistant":
                segments.append(Segment(turn.text + self.eos, True))
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


def _eos(tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.eos_token:
        raise UserError(
            "model.name: its tokenizer has no EOS token, so answers could never end; "
            "set eos_token in its tokenizer_config.json"
        )
    return str(tokenizer.eos_token)


def _bos(tokenizer: PreTrainedTokenizerBase) -> str:
    """The BOS token where the tokenizer, or else its chat template, starts a text with it."""
    if tokenizer.bos_token is None:
        return ""
    adds = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    if not adds and tokenizer.chat_template:
        try:
            adds = _render(tokenizer, [Turn("user", "a")], ask=True).startswith(tokenizer.bos_token)
        except UserError:
            adds = False  # a chat template that is not used may be broken
    return str(tokenizer.bos_token) if adds else ""


# --- the tokenizer's own chat template


@dataclass(frozen=True)
class _Chat:
    """Finds the segments by rendering the conversation as it grows, one turn after the other.

    lead: what the template writes between its generation prompt and an answer; tail: what it
    writes after one; eos: added where the tail does not end the turn with a token of its own.
    """

    tokenizer: PreTrainedTokenizerBase
    lead: str
    tail: str
    eos: str
    takes_system: bool

    def __call__(self, turns: Sequence[Turn]) -> list[Segment]:
        turns = turns if self.takes_system else _merge_system(turns)
        segments: list[Segment] = []
        done = ""  # the text that the segments so far stand for
        for k, turn in enumerate(turns):
            if turn.role == "assistant":
                asked = self._ask(turns[:k])
                rendered = _render(self.tokenizer, turns[: k + 1], ask=False)
                answer = self._answer(_rest(rendered, asked, k), turn.text)
                segments += [self._between(asked, done, k), Segment(answer + self.eos, True)]
                done = asked + answer
        if turns[-1].role != "assistant":
            segments.append(self._between(self._ask(turns), done, len(turns)))
        elif left := _rest(rendered, done, len(turns)):
            segments.append(Segment(left, False))
        return segments

    def _ask(self, turns: Sequence[Turn]) -> str:
        return _render(self.tokenizer, turns, ask=True) + self.lead

    def _between(self, asked: str, done: str, k: int) -> Segment:
        text = _rest(asked, done, k)
        if done and self.eos:  # some templates end an answer only once another turn follows
            text = re.sub(rf"^(\s*){re.escape(self.eos)}", r"\1", text)
        return Segment(text, False)

    def _answer(self, written: str, text: str) -> str:
        """The answer with its end mark, without the white space after that."""
        content = written.removesuffix(self.tail)
        if not written.endswith(self.tail) or content.strip() != text.strip():
            raise Unwritable("rewrites what the assistant said", "a thinking part, perhaps")
        return content + self.tail.rstrip()


def _read_chat(tokenizer: PreTrainedTokenizerBase) -> _Chat:
    """Learns how the chat template frames an answer from one that nobody would give."""
    question, answer = "xQx1xQx", "xAx2xAx"
    turns = (Turn("user", question), Turn("assistant", answer))
    asked = _render(tokenizer, turns[:1], ask=True)
    lead, separator, tail = _rest(_render(tokenizer, turns, ask=False), asked, 1).partition(answer)
    if not separator or question not in asked:
        raise Unwritable("does not write out what is said")
    end = tokenizer(tail.rstrip(), add_special_tokens=False)["input_ids"][-1:]
    ends_turn = bool(end) and end[0] in tokenizer.added_tokens_decoder
    return _Chat(
        tokenizer,
        # A header belongs to the prompt. White space is left for the model to write, because
        # tokenizers glue it to the word that follows.
        lead=lead if lead.strip() else "",
        tail=tail,
        eos="" if ends_turn else _eos(tokenizer),
        takes_system=_takes_system(tokenizer),
    )


def _takes_system(tokenizer: PreTrainedTokenizerBase) -> bool:
    system = "xSx3xSx"
    try:
        takes = system in _render(tokenizer, (Turn("system", system), Turn("user", "a")), ask=True)
    except UserError:
        takes = False
    if not takes:
        _log.info("the chat template has no system role: it goes before the first question")
    return takes


def _merge_system(turns: Sequence[Turn]) -> Sequence[Turn]:
    """The same conversation with the system message at the head of the first question."""
    if turns[0].role != "system":
        return turns
    system, first, *rest = turns
    return (Turn("user", f"{system.text}\n\n{first.text}"), *rest)


def _rest(text: str, start: str, turn: int) -> str:
    if not text.startswith(start):
        raise Unwritable("changes earlier text as a conversation grows", f"seen at turn {turn + 1}")
    return text[len(start) :]


def _has_chat(tokenizer: PreTrainedTokenizerBase) -> bool:
    try:
        _chat_source(tokenizer)
    except UserError:
        return False
    return True


def _chat_source(tokenizer: PreTrainedTokenizerBase) -> str:
    """The Jinja text of the chat template."""
    try:
        return str(tokenizer.get_chat_template())
    except ValueError:
        raise UserError(f'prompt.template = "chat": this tokenizer has no chat template; {_OTHERS}') from None


def _render(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], *, ask: bool) -> str:
    _chat_source(tokenizer)
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    try:
        return str(
            tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=ask,
                # Known names in hub templates: instruction data has no thinking part, and a prompt
                # with today's date would change from one day of a run to the next.
                enable_thinking=False,
                date_string="26 Jul 2024",
            )
        )
    except Exception as error:  # a template is a program: its own refusals, and whatever else it trips over
        raise Unwritable("refuses a conversation", " ".join(str(error).split())) from None
