"""What templates write, against hand-written text; their masks against transformers' own."""

from __future__ import annotations

from pathlib import Path

import pytest
from chat_templates import (
    BYTE_TOKENIZER,
    CHATML,
    CHATS,
    FORGETFUL,
    GEMMA,
    LLAMA3,
    MISTRAL,
    TALK,
    THOUGHTLESS,
    build,
    builtin,
    cached,
    make_tokenizer,
    talk,
    trained_texts,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from apiary.config.schema import PromptConfig
from apiary.core.errors import UserError
from apiary.data import tokenization


def test_alpaca_is_the_known_text() -> None:
    template, _ = build("alpaca", BYTE_TOKENIZER)
    assert template.prompt(talk("Name a bee.", "Maja").turns) == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nName a bee.\n\n### Response:"
    )


def test_plain_writes_every_exchange_and_bos_where_the_tokenizer_adds_one() -> None:
    template, _ = build("plain", make_tokenizer(bos=True), system="Be brief.")
    assert [tuple(s) for s in template.segments(TALK.turns)] == [
        ("<s>", False),
        ("Be brief.\n\nUser: Who flies?\n\nAssistant:\n", False),
        ("The bees — 蜂 🐝.</s>", True),
        ("\n\nUser: Where to?\n\nAssistant:\n", False),
        ("Home, to the hive.</s>", True),
        ("\n\n", False),
    ]
    assert build("plain", BYTE_TOKENIZER)[0].segments(TALK.turns)[0].text.startswith("User")
    by_chat = make_tokenizer(LLAMA3)
    assert build("plain", by_chat)[0].segments(TALK.turns)[0].text == "<s>"


def test_file_fills_its_slots_once_and_knows_its_own_eos(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("[{system}] {x} {instruction} -> {response}</s>\n~~\n", encoding="utf-8")
    template, config = build(str(path), BYTE_TOKENIZER)
    example = talk("say {system} {response}", "a", "b?", "b", system="S")
    assert [tuple(s) for s in template.segments(example.turns)] == [
        ("[S] {x} say {system} {response} -> ", False),
        ("a</s>", True),
        ("\n~~\n[] {x} b? -> ", False),
        ("b</s>", True),
        ("\n~~\n", False),
    ]
    encoded = tokenization.encode(example, template, BYTE_TOKENIZER, config)
    assert trained_texts(encoded, BYTE_TOKENIZER) == ["a</s>", "b</s>"]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("{instruction}", "{response}"),
        ("{response} {response} {instruction}", "2 {response}"),
        ("{response}", "{instruction}"),
        ("{response} {instruction}", "{instruction}"),
        ("{instruction} {input} {response}", "{input}"),
        ("{instruction} {response} {system}", "{system}"),
    ],
)
def test_bad_template_files_are_refused(tmp_path: Path, text: str, word: str) -> None:
    path = tmp_path / "bad.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"prompt\.template") as caught:
        build(str(path), BYTE_TOKENIZER)
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_things_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.txt.*No such file"):
        build(str(tmp_path / "nowhere.txt"), BYTE_TOKENIZER)
    (tmp_path / "latin").write_bytes(b"\xff{instruction}{response}")
    with pytest.raises(UserError, match="not UTF-8"):
        build(str(tmp_path / "latin"), BYTE_TOKENIZER)
    with pytest.raises(UserError, match=r"no chat template.*alpaca"):
        build("chat", BYTE_TOKENIZER)
    endless = make_tokenizer()
    endless.eos_token = None
    with pytest.raises(UserError, match="no EOS token"):
        build("plain", endless)


def test_auto_is_chat_where_the_tokenizer_has_a_chat_template_else_alpaca() -> None:
    with_chat = make_tokenizer(CHATML)
    for tokenizer, name, words in (
        (with_chat, "chat", "chat (the tokenizer's own)"),
        (BYTE_TOKENIZER, "alpaca", "alpaca (the tokenizer has no chat template)"),
    ):
        auto, named = build("auto", tokenizer)[0], build(name, tokenizer)[0]
        assert (auto.name, auto.words, auto.digest) == (name, words, named.digest)  # the handshake sees no difference
        assert auto.segments(TALK.turns) == named.segments(TALK.turns)
        system = build("auto", tokenizer, system="Be brief.")[0]
        assert system.digest == build(name, tokenizer, system="Be brief.")[0].digest != auto.digest
    assert build("auto", with_chat)[0].digest != build("auto", BYTE_TOKENIZER)[0].digest
    assert build("alpaca", with_chat)[0].words == "alpaca" and build("plain", BYTE_TOKENIZER)[0].words == "plain"
    assert PromptConfig().template == "auto"


def test_auto_does_not_give_way_to_alpaca_where_the_chat_template_cannot_be_masked() -> None:
    with pytest.raises(UserError, match=r"does not write out what is said.*alpaca"):
        build("auto", make_tokenizer("{{ 'always the same' }}"))


def test_of_a_template_file_only_its_name_is_told(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("{instruction}{response}")
    template, _ = build(str(tmp_path / "mine.txt"), BYTE_TOKENIZER)
    assert template.words == "mine.txt" and template.name == str(tmp_path / "mine.txt")


@pytest.mark.parametrize("name", CHATS)
def test_chat_trains_answers_and_end_marks_of_the_templates_own_text(name: str) -> None:
    source, end = CHATS[name]
    tokenizer = make_tokenizer(source)
    template, config = build("chat", tokenizer)
    encoded = tokenization.encode(TALK, template, tokenizer, config)
    answers = ["The bees — 蜂 🐝.", "Home, to the hive."]
    lead = " " if name == "mistral" else ""  # the template's own, which the model must write
    assert trained_texts(encoded, tokenizer) == [lead + answer + end for answer in answers]
    messages = [turn._asdict() | {"content": turn.text} for turn in TALK.turns]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    written = "".join(segment.text for segment in template.segments(TALK.turns))
    if name in ("headless", "unended"):  # those get an EOS where they write none, and never two
        assert written.count("</s>") == 2
        written, whole = written.replace("</s>", ""), whole.replace("</s>", "")
    assert written == whole


@pytest.mark.parametrize("source", [CHATML, "builtin"])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_chat_mask_equals_the_one_of_transformers(source: str, data: st.DataObject) -> None:
    tokenizer = builtin() if source == "builtin" else cached(source)
    words = st.text("abc .é蜂{}<|>", min_size=1, max_size=20).map(str.strip).filter(bool)
    texts = data.draw(st.lists(words, min_size=2, max_size=6).filter(lambda t: len(t) % 2 == 0))
    template, config = build("chat", tokenizer)
    encoded = tokenization.encode(talk(*texts), template, tokenizer, config)
    assert encoded is not None
    theirs = tokenizer.apply_chat_template(
        [turn._asdict() | {"content": turn.text} for turn in talk(*texts).turns],
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    n = len(encoded.ids)  # ours leaves out what follows the last trained token
    assert encoded.ids.tolist() == theirs["input_ids"][:n]
    assert encoded.trained.astype(int).tolist() == theirs["assistant_masks"][:n]
    assert not any(theirs["assistant_masks"][n:])


def test_chat_asks_for_no_thinking_and_not_for_todays_date() -> None:
    source = "{{ date_string }}" + CHATML.replace(
        "assistant\n' }}{% endif %}",
        "assistant\n' }}{% if not enable_thinking %}{{ '<think></think>' }}{% endif %}{% endif %}",
    ).replace("{% generation %}", "{{ '<think></think>' if loop.last }}{% generation %}")
    template, _ = build("chat", make_tokenizer(source))
    asked, answer, _ = template.segments(talk("q", "a").turns)
    assert asked.text.startswith("26 Jul 2024<|im_start|>user")
    assert asked.text.endswith("assistant\n<think></think>")
    assert answer == ("a<|im_end|>", True)
    # History loses its think block, so what stands there is context: only the last answer is as it was asked for.
    written = template.segments(TALK.turns)
    assert [text for text, trained in written if trained] == ["Home, to the hive.<|im_end|>"]
    assert written[-3].text.count("The bees") == 1


@pytest.mark.parametrize("source", [GEMMA, MISTRAL])
def test_a_template_without_system_role_gets_it_before_the_first_question(source: str) -> None:
    template, _ = build("chat", make_tokenizer(source), system="Be brief.")
    assert "Be brief.\n\nWho flies?" in template.prompt(TALK.turns[:2])


def test_own_system_turn_wins_over_the_configured_one() -> None:
    template, _ = build("chat", make_tokenizer(CHATML), system="Be brief.")
    assert "<|im_start|>system\nBe brief.<|im_end|>" in template.prompt(TALK.turns)
    own = template.prompt(talk("q", "a", system="Sing.").turns)
    assert "Sing." in own
    assert "brief" not in own


def test_templates_that_cannot_be_masked_are_refused_with_a_way_out() -> None:
    template, _ = build("chat", make_tokenizer(FORGETFUL))
    assert template.segments(talk("q", "a").turns)[1] == ("a<|im_end|>", True)
    written = template.segments(TALK.turns)  # the answer that it forgets is context
    assert [text for text, trained in written if trained] == ["Home, to the hive.<|im_end|>"]
    assert "assistant\n...<|im_end|>" in written[0].text
    template, _ = build("chat", make_tokenizer(THOUGHTLESS))
    with pytest.raises(UserError, match="rewrites what the assistant said"):
        template.segments(talk("q", "<think>hm</think>a").turns)
    for source, problem in [
        ("{% for m in messages %}x{% endfor %}", "does not write out"),
        ("{{ messages[0].nothing.at.all }}", "refuses a conversation"),
        ("{{ messages | length }}{{ messages[-1]['content'] }}", "changes earlier text"),
    ]:
        with pytest.raises(UserError, match=problem):
            build("chat", make_tokenizer(source))


def test_an_answer_that_quotes_markers_stays_one_answer() -> None:
    tokenizer = make_tokenizer(CHATML)
    template, _ = build("chat", tokenizer)
    quoting = "assistant\n### Response: User: {response} im_end"
    assert template.segments(talk(quoting, quoting).turns)[1].text == quoting + "<|im_end|>"
