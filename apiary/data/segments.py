"""What templates make of a conversation: segments of text, each trained or not, or a reason why there are none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from apiary.core.errors import UserError
from apiary.data.turns import Turn

OTHERS = 'use prompt.template = "alpaca" or "plain"'
_TOOLS = "use a model whose chat template does, or leave these rows out"


class Segment(NamedTuple):
    """A stretch of text that is tokenised by itself, and whether its tokens are trained."""

    text: str
    trained: bool


class Thinking(NamedTuple):
    """What a template writes around the thinking of an answer, without outer white space.

    open: "" where the generation prompt itself opens the thinking; close: never "".
    """

    open: str
    close: str

    def cut(self, written: str, asked: bool) -> tuple[str, str]:
        """The thinking of an answer as a model wrote it, and what the answer says after it.

        Without thinking these are "" and `written`. Thinking that does not end is all there is.

        Args:
            written: the answer, with the marks in it.
            asked: whether the prompt asked for thinking.
        """
        said = written.lstrip()
        if not said.startswith(self.open) or not (self.open or asked):
            return "", written
        thinking, _, text = said.removeprefix(self.open).partition(self.close)
        return thinking.strip(), text.strip()


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
            f"so prompt and response cannot be told apart safely; {OTHERS}"
        )


class NoPlace(Unwritable):
    """The template has no place for something that the conversation has, such as tool calls.

    Args:
        what: what it does not write.
        chat: whether it is a chat template; one with slots has no place for tools at all.
    """

    def __init__(self, what: str, *, chat: bool = True) -> None:
        self.reason = f"the chat template does not write {what}" if chat else f"prompt.template has no slot for {what}"
        fix = _TOOLS if chat else 'use prompt.template = "chat" with a model whose chat template writes them'
        UserError.__init__(self, f"{self.reason}; {fix}")


class Splitter(Protocol):
    """Writes conversations."""

    def __call__(self, turns: Sequence[Turn], tools: str = "", think: bool = False) -> list[Segment]:
        """The segments of a conversation.

        Args:
            turns: the conversation; one that does not end in an assistant's turn asks for it.
            tools: what the assistant may call, a JSON list as text; "" for none.
            think: whether the answer that is asked for is to begin with thinking.

        Raises:
            Unwritable: the template cannot write this conversation with a right mask.
        """
        ...
