"""Tool calls, results, thinking and bare text as templates write them: what is trained, and whose text it is."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from chat_templates import (
    BYTE_TOKENIZER,
    CHATML,
    LLAMA3,
    SPECIAL,
    THOUGHTLESS,
    build,
    make_tokenizer,
    talk,
    trained_texts,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from apiary.core.errors import UserError
from apiary.data import tokenization
from apiary.data.examples import Example
from apiary.data.segments import Thinking
from apiary.data.turns import ToolCall, Turn

HERMES = (  # NousResearch, "Hermes Function Calling": calls and results in tags of their own
    "{% if tools %}{{ '<|im_start|>system\n<tools>' }}{% for t in tools %}{{ '\n' + (t | tojson) }}{% endfor %}"
    "{{ '\n</tools><|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'tool' %}"
    "{{ '<|im_start|>tool\n<tool_response>\n' + m['content'] + '\n</tool_response><|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}{% for c in m.tool_calls or [] %}"
    '{{ \'<tool_call>\n{"name": "\' + c.function.name + \'", "arguments": \' }}{{ c.function.arguments | tojson }}'
    "{{ '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA31 = (  # Meta, Llama 3.1: tools before the first question, one call at a time, results as JSON from `ipython`
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'tool' %}{{ '<|start_header_id|>ipython<|end_header_id|>\n\n' + (m.content | tojson) }}"
    "{% elif m.tool_calls %}{% if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}"
    "{% set c = m.tool_calls[0].function %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{{ '{\"name\": \"' + c.name + '\", \"parameters\": ' }}{{ c.arguments | tojson }}{{ '}' }}"
    "{% else %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{% if tools and loop.index0 == 0 %}{% for t in tools %}{{ t | tojson(indent=4) }}{{ '\n\n' }}{% endfor %}"
    "{% endif %}{{ m['content'] | trim }}{% endif %}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL3 = (  # Mistral v3: tools before the last question, ids of nine letters and digits
    "{% set asked = messages | selectattr('role', 'equalto', 'user') | list %}{{ bos_token }}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{% if tools and m == asked[-1] %}"
    "{{ '[AVAILABLE_TOOLS] ' }}{{ tools | tojson }}{{ '[/AVAILABLE_TOOLS]' }}{% endif %}"
    "{{ '[INST] ' + m['content'] + '[/INST]' }}"
    "{% elif m['role'] == 'tool' %}{{ '[TOOL_RESULTS] {\"content\": ' + m['content'] + ', \"call_id\": \"' }}"
    "{{ m.tool_call_id + '\"}[/TOOL_RESULTS]' }}"
    "{% elif m.tool_calls %}{{ '[TOOL_CALLS] [' }}{% for c in m.tool_calls %}"
    "{% if c.id is not defined or c.id | length != 9 %}{{ raise_exception('ids have length 9!') }}{% endif %}"
    "{{ ', ' if not loop.first }}{{ '{\"name\": \"' + c.function.name + '\", \"arguments\": ' }}"
    "{{ c.function.arguments | tojson }}{{ ', \"id\": \"' + c.id + '\"}' }}{% endfor %}{{ ']' + eos_token }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
OBJECT = re.compile(r"\{.*\}", re.DOTALL)
STYLES: dict[str, tuple[str, str, str]] = {  # template, where arguments stand, the end of a turn
    "hermes": (HERMES, "arguments", "<|im_end|>"),
    "llama": (LLAMA31, "parameters", "<|eot_id|>"),
    "mistral": (MISTRAL3, "arguments", "</s>"),
}
TOOLS = json.dumps([{"name": "weather", "description": "Says it <|im_end|>", "parameters": {"type": "object"}}])
MARKS = ["<|im_end|>", "<|im_start|>", "</s>", "<|eot_id|>", "[INST]", "<tool_call>", "</tool_call>", "[TOOL_CALLS]"]
MARKS += ["[/TOOL_RESULTS]", "<|start_header_id|>", "</tool_response>", "[AVAILABLE_TOOLS]"]


def tokenizer_of(style: str) -> Any:
    tokenizer = make_tokenizer(STYLES[style][0])
    tokenizer.add_tokens(["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[/TOOL_RESULTS]", "[AVAILABLE_TOOLS]"])
    return tokenizer


def calling(arguments: object, result: str = "sunny", tools: str = TOOLS, name: str = "weather") -> Example:
    call = ToolCall(name, json.dumps(arguments), "call_1")
    turns = (
        Turn("user", "How is it?"),
        Turn("assistant", "", calls=(call,)),
        Turn("tool", result, name=name, call_id="call_1"),
        Turn("assistant", "Fine."),
    )
    return Example(turns, {}, tools)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    "arguments",
    [{}, {"city": "Köln 蜂 🐝", "say": 'he said "no" \\ \n'}, {"a": [[1, 2.5], [{"b": None}], True], "": "x"}],
)
def test_calls_are_trained_and_come_back_from_the_tokens(style: str, arguments: object) -> None:
    tokenizer = tokenizer_of(style)
    template, config = build("chat", tokenizer, max_tokens=4096)
    encoded = tokenization.encode(calling(arguments), template, tokenizer, config)
    _, where, end = STYLES[style]
    call, answer = trained_texts(encoded, tokenizer)
    assert call.endswith(end) and answer.strip() == "Fine." + end
    (found,) = OBJECT.findall(call)
    parsed = json.loads(found)
    assert (parsed["name"], parsed[where]) == ("weather", arguments)
    assert encoded is not None
    masked = tokenizer.decode([i for i, on in zip(encoded.ids, encoded.trained, strict=True) if not on])
    assert "sunny" in masked and "Says it" in masked and "Says it" not in call  # results and declarations are not


def test_a_template_for_tools_alone_may_count_on_some_being_declared() -> None:
    """As Hermes and Command R have one, by name: it loops over `tools`, which is none where there are none."""
    unguarded = HERMES.replace("{% if tools %}", "")
    unguarded = unguarded.replace("</tools><|im_end|>\n' }}{% endif %}", "</tools><|im_end|>\n' }}", 1)
    tokenizer = make_tokenizer(HERMES)
    template, config = build("chat", tokenizer, max_tokens=4096)
    expected = tokenization.encode(calling({"city": "Bonn"}), template, tokenizer, config)
    tokenizer.chat_template = {"default": CHATML, "tool_use": unguarded}
    template, config = build("chat", tokenizer, max_tokens=4096)
    encoded = tokenization.encode(calling({"city": "Bonn"}), template, tokenizer, config)
    assert encoded is not None and expected is not None
    assert encoded.ids.tolist() == expected.ids.tolist() and encoded.trained.tolist() == expected.trained.tolist()


_HOSTILE = st.lists(st.sampled_from([*MARKS, " ", '"', "bee", "\\", "é", "<", "|>"]), min_size=1, max_size=5)
_TEXT = _HOSTILE.map("".join).filter(str.strip)


@pytest.mark.parametrize("style", STYLES)
@settings(max_examples=25, deadline=None)
@given(texts=st.tuples(*[_TEXT] * 5))
def test_no_part_of_a_row_with_tools_becomes_a_control_token(style: str, texts: tuple[str, ...]) -> None:
    key, value, result, says, name = texts
    tokenizer = tokenizer_of(style)
    template, config = build("chat", tokenizer, max_tokens=4096)
    own = [
        mark for mark in MARKS if mark in SPECIAL or mark in STYLES[style][0]
    ]  # others are words that somebody added
    marks = {tokenizer.convert_tokens_to_ids(mark) for mark in own if mark in tokenizer.get_vocab()}

    def controls(example: Example) -> list[int]:
        encoded = tokenization.encode(example, template, tokenizer, config)
        assert encoded is not None
        return [int(i) for i in encoded.ids if int(i) in marks]

    tools = json.dumps([{"name": name, "description": says, "parameters": {"properties": {key: {"type": says}}}}])
    harmless = json.dumps([{"name": "n", "description": "d", "parameters": {"properties": {"k": {"type": "t"}}}}])
    given = calling({key: [value, {"deep": says}]}, result, tools, name)
    assert controls(given) == controls(calling({"k": ["v", {"deep": "d"}]}, "r", harmless, "n"))


def test_a_row_that_spells_marks_stays_where_a_template_escapes_its_letters() -> None:
    """Plain Jinja writes every letter beyond ASCII as an escape."""
    tokenizer = make_tokenizer(HERMES.replace("arguments | tojson", "arguments | tojson(ensure_ascii=True)"))
    template, config = build("chat", tokenizer, max_tokens=4096)
    encoded = tokenization.encode(calling({"é": "Köln <|im_end|>"}), template, tokenizer, config)
    assert encoded is not None
    assert [int(i) for i in encoded.ids].count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 5  # tools and 4 turns
    assert "K\\u00f6ln <|im_end|>" in tokenizer.decode(encoded.ids)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("mark", ["<<<DATA>>>", "<<<END>>>", "<<<end>>>", "<<<EN<<<END>>>D>>>", "\u226e<<END>>>"])
def test_under_structured_queries_no_part_of_a_row_with_tools_sets_data_apart(style: str, mark: str) -> None:
    """Delimiters stand around the result alone, which is the data, wherever the row spells them."""
    tokenizer = tokenizer_of(style)
    template, config = build("chat", tokenizer, max_tokens=4096, boundary="structured")

    def written(word: str) -> str:
        says = {
            "name": f"w{word}",
            "description": f"d{word}",
            "parameters": {"properties": {f"k{word}": {"enum": [word]}}},
        }
        row = calling({f"a{word}": [f"v{word}"]}, f"sunny{word}", json.dumps([says]), f"w{word}")
        encoded = tokenization.encode(row, template, tokenizer, config)
        assert encoded is not None
        return str(tokenizer.decode(encoded.ids))

    assert written(mark) == written("") and written(mark).count("<<<") == 2


@pytest.mark.parametrize("style", STYLES)
def test_an_empty_result_is_written_as_any_other_and_costs_nothing(style: str) -> None:
    tokenizer = tokenizer_of(style)
    template, config = build("chat", tokenizer, max_tokens=4096)
    empty, full = (tokenization.encode(calling({}, result), template, tokenizer, config) for result in ("", "sunny"))
    assert empty is not None and full is not None
    assert trained_texts(empty, tokenizer) == trained_texts(full, tokenizer)
    assert tokenizer.decode(empty.ids) == tokenizer.decode(full.ids).replace("sunny", "")


def test_templates_without_a_place_for_tools_leave_the_row_out_with_the_reason() -> None:
    example = calling({"a": 1})
    tokenizer = make_tokenizer(CHATML)
    template, config = build("chat", tokenizer)
    for row, what in (
        (example, "tools"),
        (example._replace(tools=""), "tool calls"),
        (Example((Turn("user", "q"), Turn("assistant", "a")), {}, TOOLS), "tools"),
    ):
        corpus = tokenization.encode_all([row], template, tokenizer, config)
        assert corpus.dropped == {0: f"the chat template does not write {what}"}
    for name in ("alpaca", "plain"):
        template, config = build(name, tokenizer)
        corpus = tokenization.encode_all([example], template, tokenizer, config)
        assert corpus.dropped == {0: "prompt.template has no slot for tools or tool calls"}
        with pytest.raises(UserError, match="no slot for tools"):
            tokenization.check_template([example], template)


# --- thinking

QWEN3 = (  # Qwen 3: thinking is kept after the last question alone; without it, an empty block
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.index0 > ns.last and (loop.last or m.reasoning_content) %}"
    "{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)


def test_thinking_is_trained_where_it_is_written_and_earlier_answers_without_it() -> None:
    tokenizer = make_tokenizer(QWEN3)
    template, config = build("chat", tokenizer)
    first, second = Turn("assistant", "Maja.", thinking="A bee?"), Turn("assistant", "Willy.", thinking="Who else?")
    one = Example((Turn("user", "q"), first), {})
    both = Example((Turn("user", "q"), first, Turn("user", "r"), second), {})
    thought = "<think>\nWho else?\n</think>\n\nWilly.<|im_end|>"
    for row, trained in ((one, ["<think>\nA bee?\n</think>\n\nMaja.<|im_end|>"]), (both, ["Maja.<|im_end|>", thought])):
        encoded = tokenization.encode(row, template, tokenizer, config)
        assert trained_texts(encoded, tokenizer) == trained
        assert encoded is not None
        prompt = tokenization.encode_prompt(row, template, tokenizer, 512)
        assert encoded.ids[: len(prompt)].tolist() == prompt and encoded.trained[len(prompt) :].all()
    corpus = tokenization.encode_all([one, both], template, tokenizer, config)
    assert corpus.notes == {1: (tokenization.NO_THINKING,)}  # that of the first answer
    plain = talk("q", "a", "r", "b")
    assert trained_texts(tokenization.encode(plain, template, tokenizer, config), tokenizer) == [
        "a<|im_end|>",
        "b<|im_end|>",
    ]


@pytest.mark.parametrize("name", ["chat", "alpaca"])
def test_thinking_without_a_place_is_left_out_and_told(name: str) -> None:
    tokenizer = make_tokenizer(CHATML)
    template, config = build(name, tokenizer)
    row = Example((Turn("user", "q"), Turn("assistant", "a", thinking="hm")), {})
    corpus = tokenization.encode_all([row, talk("q", "a")], template, tokenizer, config)
    assert corpus.notes == {0: (tokenization.NO_THINKING,)}
    assert np_equal(corpus, 0, 1)


R1 = QWEN3.replace(  # the prompt opens the thinking, as DeepSeek R1's does
    "{% if not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}",
    "{{ '<think>\n' }}{% if not enable_thinking %}{{ '\n</think>\n\n' }}{% endif %}",
)


@pytest.mark.parametrize(
    ("chat", "marks"),
    [
        (QWEN3, ("<think>", "</think>")),
        (R1, ("", "</think>")),
        (QWEN3.replace("<think>", "[THINK]").replace("</think>", "[/THINK]"), ("[THINK]", "[/THINK]")),
        (THOUGHTLESS, ("<think>", "</think>")),  # it has no place for thinking, and takes it out of answers
        (CHATML, None),
        (None, None),
    ],
)
def test_a_template_says_what_stands_around_thinking(chat: str | None, marks: tuple[str, str] | None) -> None:
    assert build("auto", make_tokenizer(chat))[0].thinking == marks


@pytest.mark.parametrize(
    ("written", "asked", "cut"),
    [
        ("<think>\nA bee?\n</think>\n\nMaja.\n", False, ("A bee?", "Maja.")),
        ("\n<think></think>Maja.", True, ("", "Maja.")),
        ("<think>\nA bee", True, ("A bee", "")),  # the longest answer ended it
        ("<think>a</think>b</think>c", False, ("a", "b</think>c")),
        (" Maja. </think>\n", True, ("", " Maja. </think>\n")),
        ("Say <think>a</think>.", False, ("", "Say <think>a</think>.")),
    ],
)
def test_what_a_model_thinks_is_cut_from_what_it_says(written: str, asked: bool, cut: tuple[str, str]) -> None:
    assert Thinking("<think>", "</think>").cut(written, asked) == cut


def test_thinking_that_the_prompt_opens_begins_with_the_answer_and_only_where_it_was_asked_for() -> None:
    opened = Thinking("", "</think>")
    assert opened.cut("A bee?\n</think>\n\nMaja.", asked=True) == ("A bee?", "Maja.")
    assert opened.cut("A </think> ends it.", asked=False) == ("", "A </think> ends it.")


@pytest.mark.parametrize("chat", [QWEN3, R1, THOUGHTLESS])
def test_an_answer_that_thinks_goes_back_as_the_template_has_it(chat: str) -> None:
    """As plain text it would be refused, or stand in the prompt where a trained conversation has none of it."""
    tokenizer = make_tokenizer(chat)
    template, _ = build("chat", tokenizer)
    written = "<think>\nA bee?\n</think>\n\nMaja."
    if chat == R1:  # it closes the thinking itself, so this is what a model says
        written = "Maja."
    after = (template.answer(written), Turn("user", "r"), Turn("assistant", ""))
    prompt = tokenization.encode_prompt(Example((Turn("user", "q"), *after), {}), template, tokenizer, 512)
    bare = talk("q", "Maja.", "r", "").turns
    assert prompt == tokenization.encode_prompt(Example(bare, {}), template, tokenizer, 512)
    cut_short = (Turn("user", "q"), template.answer("<think>\nA bee"), *after[1:])
    assert tokenization.encode_prompt(Example(cut_short, {}), template, tokenizer, 512)


def np_equal(corpus: Any, one: int, other: int) -> bool:
    parts = [corpus.ids[corpus.offsets[k] : corpus.offsets[k + 1]].tolist() for k in (one, other)]
    return bool(parts[0] == parts[1])


# --- masked answers, bare text, white space


@pytest.mark.parametrize("name", ["chat", "alpaca"])
def test_an_answer_that_is_context_is_not_trained(name: str) -> None:
    tokenizer = make_tokenizer(CHATML)
    template, config = build(name, tokenizer)
    example = talk("q", "a", "r", "b")
    turns = (example.turns[0], example.turns[1]._replace(trained=False), *example.turns[2:])
    masked = tokenization.encode(Example(turns, {}), template, tokenizer, config)
    full = tokenization.encode(example, template, tokenizer, config)
    assert masked is not None and full is not None and masked.ids.tolist() == full.ids.tolist()
    assert trained_texts(masked, tokenizer) == trained_texts(full, tokenizer)[1:]
    opening = (Turn("assistant", "Hello.", trained=False), *turns)
    encoded = tokenization.encode(Example(opening, {}), template, tokenizer, config)
    assert trained_texts(encoded, tokenizer) == trained_texts(full, tokenizer)[1:]


@pytest.mark.parametrize("name", ["chat", "plain"])
def test_bare_text_is_learnt_as_it_stands_between_bos_and_eos(name: str) -> None:
    row = Example((Turn("assistant", "  The bees </s> fly.\n"),), {})
    tokenizer = make_tokenizer(LLAMA3)
    template, config = build(name, tokenizer, system="Be brief.")
    encoded = tokenization.encode(row, template, tokenizer, config)
    assert encoded is not None and encoded.spelled
    assert trained_texts(encoded, tokenizer) == ["  The bees </s> fly.\n</s>"]
    assert encoded.ids[0] == tokenizer.bos_token_id and (encoded.ids == tokenizer.eos_token_id).sum() == 1
    assert tokenization.encode_prompt(row, template, tokenizer, 512) == [tokenizer.bos_token_id]
    template, config = build("plain", BYTE_TOKENIZER)  # uses no BOS
    assert tokenization.encode_prompt(row, template, BYTE_TOKENIZER, 512) == [BYTE_TOKENIZER.eos_token_id]


def test_white_space_of_answers_is_kept_or_its_loss_is_told() -> None:
    row = talk(" q\n", "    return bee\n\n")
    for source, kept, notes in (
        (CHATML, "    return bee\n\n", {}),
        (LLAMA3, "return bee", {0: (tokenization.TRIMMED,)}),
    ):
        tokenizer = make_tokenizer(source)
        template, config = build("chat", tokenizer)
        corpus = tokenization.encode_all([row], template, tokenizer, config)
        end = "<|im_end|>" if source == CHATML else "<|eot_id|>"
        encoded = tokenization.encode(row, template, tokenizer, config)
        assert trained_texts(encoded, tokenizer) == [kept + end] and corpus.notes == notes


def test_an_answer_is_never_cut_within_a_mark() -> None:
    tokenizer = make_tokenizer(CHATML)
    template, wide = build("chat", tokenizer)
    row = talk("q", "ab <|im_end|> cd")
    full = tokenization.encode(row, template, tokenizer, wide)
    assert full is not None
    seen = set()
    for limit in range(8, len(full.ids)):
        config = wide.model_copy(update={"max_tokens": limit})
        encoded = tokenization.encode(row, template, tokenizer, config)
        if encoded is not None:
            seen |= {*trained_texts(encoded, tokenizer)}
    assert "ab " in seen and "ab <|im_end|>" in seen
    assert not [text for text in seen if re.search(r"<(\|(i(m(_(e(n(d(\|)?)?)?)?)?)?)?)?$", text)]
