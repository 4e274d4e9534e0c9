"""Chat templates in the styles of published families: by hand, against transformers, and against ourselves."""

from __future__ import annotations

import itertools
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from chat_styles import CASES, STYLES, outcome, table, tokenizer_of
from chat_templates import build

from apiary.core.errors import UserError
from apiary.data import tokenization
from apiary.data.chat_messages import Form, declared, message_of, render
from apiary.data.examples import Example
from apiary.data.rendering import DATE
from apiary.data.segments import Unwritable

WRITTEN = [name for name, style in STYLES.items() if style.written]
DOCS = Path(__file__).resolve().parents[2] / "docs" / "boundary.md"


def marked(encoded: Any, tokenizer: Any) -> str:
    """The text of the ids, with trained stretches in double angle brackets."""
    pairs = zip(encoded.ids.tolist(), encoded.trained.tolist(), strict=True)
    groups = [(on, tokenizer.decode([i for i, _ in group])) for on, group in itertools.groupby(pairs, lambda p: p[1])]
    return "".join(f"\u27ea{text}\u27eb" if on else text for on, text in groups)


@pytest.mark.parametrize("name", WRITTEN)
def test_a_conversation_stands_as_worked_out_by_hand(name: str) -> None:
    tokenizer = tokenizer_of(STYLES[name])
    template, config = build("chat", tokenizer, max_tokens=4096)
    encoded = tokenization.encode(CASES["two exchanges"], template, tokenizer, config)
    assert marked(encoded, tokenizer) == STYLES[name].written


@pytest.mark.parametrize("name", [name for name in STYLES if name not in WRITTEN])
def test_what_cannot_be_masked_is_refused_at_the_start(name: str) -> None:
    with pytest.raises(UserError, match="opens thinking in each generation prompt, and writes answers without it"):
        build("chat", tokenizer_of(STYLES[name]))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", WRITTEN)
def test_the_prompt_is_what_training_puts_before_the_last_answer(name: str, case: str) -> None:
    tokenizer = tokenizer_of(STYLES[name])
    template, config = build("chat", tokenizer, max_tokens=4096)
    encoded = tokenization.encode(CASES[case], template, tokenizer, config)
    if encoded is None:
        assert outcome(STYLES[name], case).startswith("refused")
        return
    prompt = tokenization.encode_prompt(CASES[case], template, tokenizer, 4096)
    assert encoded.ids[: len(prompt)].tolist() == prompt and encoded.trained[len(prompt) :].all()


@pytest.mark.parametrize("name", WRITTEN)
def test_a_conversation_of_our_own_output_gives_the_same_tokens(name: str) -> None:
    """As a chat goes on: each answer is what was generated, up to the end mark, and the next prompt repeats it."""
    tokenizer = tokenizer_of(STYLES[name])
    template, config = build("chat", tokenizer, max_tokens=4096)
    turns = CASES["two exchanges"].turns
    encoded = tokenization.encode(Example(turns, {}), template, tokenizer, config)
    assert encoded is not None
    again = []
    for k, turn in enumerate(turns):
        if turn.role == "assistant":
            so_far = Example((*again, turn), {})
            ids = tokenization.encode(so_far, template, tokenizer, config)
            assert ids is not None
            prompt = tokenization.encode_prompt(so_far, template, tokenizer, 4096)
            text = tokenizer.decode(ids.ids[len(prompt) :].tolist(), skip_special_tokens=True).strip()
            turn = turn._replace(text=text)
        again.append(turn)
        assert turn.text == turns[k].text
    repeated = tokenization.encode(Example(tuple(again), {}), template, tokenizer, config)
    assert repeated is not None and repeated.ids.tolist() == encoded.ids.tolist()
    assert repeated.trained.tolist() == encoded.trained.tolist()


@pytest.mark.parametrize("name", STYLES)
def test_the_sandbox_writes_what_transformers_writes(name: str) -> None:
    tokenizer = tokenizer_of(STYLES[name])
    date = datetime.fromisoformat(DATE)
    compared = 0
    for example, think in itertools.product(CASES.values(), (False, True)):
        messages = [message_of(turn, Form()) for turn in example.turns]
        tools = declared(example.tools) if example.tools else None
        for upto in range(1, len(messages) + 1):
            ask = messages[upto - 1]["role"] != "assistant"
            more: dict[str, Any] = {"thinking": True} if think else {}
            try:
                ours = render(tokenizer, messages[:upto], ask=ask, tools=tools, think=think)
            except Unwritable:
                ours = ""
            more |= {"date_string": date.strftime("%d %b %Y"), "enable_thinking": think}
            given: Any = tools
            try:
                theirs = _with_clock(tokenizer, date).apply_chat_template(
                    messages[:upto], tools=given, tokenize=False, add_generation_prompt=ask, **more
                )
            except Exception:  # what a template refuses
                theirs = ""
            assert ours == theirs
            compared += bool(ours)
    assert compared > 8


def _with_clock(tokenizer: Any, date: datetime) -> Any:
    """The tokenizer, whose template has the date written in: transformers tells templates today's."""
    for form in ("%Y-%m-%d", "%d %B %Y", "%B %d, %Y"):
        tokenizer.chat_template = tokenizer.chat_template.replace(f"strftime_now('{form}')", f"'{date.strftime(form)}'")
    return tokenizer


def test_the_table_in_the_docs_is_what_happens() -> None:
    shown = DOCS.read_text(encoding="utf-8").partition("<!-- styles -->\n")[2].partition("\n<!-- /styles -->")[0]
    assert shown == table(), "write it anew: PYTHONPATH=. python tests/chat_styles.py"
