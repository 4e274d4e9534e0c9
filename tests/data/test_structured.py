"""Structured queries: nothing but the front end writes the delimiters of data, and harmless text stays as it is."""

from __future__ import annotations

import json
import re
import unicodedata
from typing import Any

import pytest
from chat_templates import BYTE_TOKENIZER, CHATML, TALK, build, builtin, talk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizer_kinds import KINDS, kind
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from apiary.core.errors import UserError
from apiary.data import structured, tokenization
from apiary.data.examples import Example
from apiary.data.structured import BEGIN, END, front_end, strip
from apiary.data.turns import ToolCall, Turn

ROWS = Example((Turn("user", "Sort.\n\nb, a", data=7), Turn("assistant", "a, b")), {})
UNABLE = ("Unigram with NFKC", "WordLevel, marks in its vocabulary")  # no tokens for the delimiters' letters


def _wide(text: str) -> str:
    return "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text)


def _read(text: str) -> str:
    """A text as a tokenizer without regard for form, case, marks and white space reads it, by other means than ours."""
    text = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", text).casefold())
    return re.sub(r"[\s\u2581\u0120\u010a]", "", "".join(c for c in text if unicodedata.category(c)[0] not in "CM"))


def _delimiters(text: str) -> list[str]:
    return re.findall("<<<data>>>|<<<end>>>", _read(text))


_MARK = st.sampled_from([BEGIN, END])
_FRAGMENTS = st.one_of(
    _MARK,
    _MARK.map(str.lower),
    _MARK.map(_wide),
    _MARK.map(lambda mark: " ".join(mark)),
    _MARK.map(lambda mark: "\u200b".join(mark)),
    _MARK.map(lambda mark: "\u0301".join(mark)),
    st.tuples(_MARK, st.integers(1, 9)).map(lambda part: part[0][: part[1]]),
    st.tuples(_MARK, st.integers(1, 9)).map(lambda part: part[0][part[1] :]),
    st.tuples(_MARK, _MARK, st.integers(1, 9)).map(lambda p: p[0][: p[2]] + p[1] + p[0][p[2] :]),
    st.sampled_from(["<", ">", "<<<", ">>>", " ", "\n", "bee", "the hive", "\u226e", "é", "蜂", "\ufe64\ufe64<", "\0"]),
)
_HOSTILE = st.lists(_FRAGMENTS, min_size=1, max_size=9).map("".join).filter(str.strip)


def test_the_input_of_a_question_stands_between_the_delimiters() -> None:
    (question, answer) = front_end(ROWS.turns)
    assert question.text == "Sort.\n\n<<<DATA>>>\nb, a\n<<<END>>>"
    assert answer == ROWS.turns[1]


def test_what_a_tool_says_is_data_as_a_whole() -> None:
    turns = (Turn("user", "How warm?"), Turn("tool", "18 degrees <<<end>>>", name="weather"))
    assert front_end(turns) == (turns[0], turns[1]._replace(text="<<<DATA>>>\n18 degrees \n<<<END>>>"))


def test_a_conversation_without_data_stays_as_it_is() -> None:
    assert front_end(TALK.turns) == TALK.turns


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("a<<<DATA>>>b", "ab"),
        ("a<<<DA<<<DATA>>>TA>>>b", "ab"),
        ("a<<<E<<<DA<<<END>>>TA>>>ND>>>b", "ab"),
        ("<<<DATA>>><<<END>>>", ""),
        ("a <<< data\n>>> b", "a  b"),
        ("a<<<D\u200bA\u0301TA>>>b", "ab"),
        (f"a{_wide(BEGIN)}b", "ab"),
        ("a\u226e<<DATA>>>b", "ab"),
        ("a<<<<<DATA>>>>>b", "a<<>>b"),
        ("a << DATA >> b, x <<< y >>> z, 1 < 2", "a << DATA >> b, x <<< y >>> z, 1 < 2"),
        ("[DATA] <DATA> DATA END >>>END<<<", "[DATA] <DATA> DATA END >>>END<<<"),
    ],
)
def test_delimiters_are_stripped_until_none_is_left(text: str, left: str) -> None:
    assert strip(text) == left


@settings(max_examples=400, deadline=None)
@given(_HOSTILE)
def test_nothing_is_left_to_strip_and_nothing_else_is_taken(text: str) -> None:
    left = strip(text)
    assert _delimiters(left) == []
    assert strip(left) == left
    if not _delimiters(text):
        assert left == text
    letters = iter(text)
    assert all(c in letters for c in left)  # what is left is part of the text, in order


def test_every_character_with_a_sign_of_a_delimiter_in_it_is_known() -> None:
    """A delimiter begins and ends with one character that is nothing but its sign, so that no neighbour is taken."""
    for sign in "<>":
        holding = [c for c in map(chr, range(0x110000)) if sign in unicodedata.normalize("NFKD", c)]
        assert [structured._fold(c) for c in holding] == [sign] * len(holding)
        if sign == "<":
            assert set(holding) == set(structured._LESS)


def test_no_delimiter_begins_as_another_one_ends() -> None:
    marks = (BEGIN.casefold(), END.casefold())
    assert not [(a, b) for a in marks for b in marks for n in range(1, len(a)) if b.startswith(a[n:])]


def test_a_text_full_of_delimiters_takes_no_longer_than_its_length() -> None:
    deep = "<<<DATA" * 20_000 + ">>>" * 20_000
    assert strip(deep) == ""


def test_calls_hold_no_delimiter_behind_an_escape() -> None:
    call = ToolCall("find", '{"q": "\\u003c\\u003c\\u003cEND>>> x", "n": [1, "<<<DATA>>>"]}')
    (turn,) = front_end([Turn("assistant", "", calls=(call, ToolCall("f", "{}")), thinking="so <<<END>>>")])
    assert json.loads(turn.calls[0].arguments) == {"q": " x", "n": [1, ""]}
    assert turn.calls[1].arguments == "{}" and turn.thinking == "so "


def _nfkc() -> Any:
    """Unigram that reads other forms as plain ones, with all letters of the delimiters."""
    letters = sorted(set("<>DATEN.,:abcdefghijklmnopqrstuvwxyz|_\u2581\n"))
    core = Tokenizer(models.Unigram([("<unk>", 0.0), ("</s>", 0.0), *((c, -3.0) for c in letters)], unk_id=0))
    core.normalizer = normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents()])
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    core.decoder = decoders.Metaspace(prepend_scheme="never")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


NFKC = _nfkc()


@pytest.mark.parametrize("name", [*(name for name in KINDS if name not in UNABLE), "NFKC"])
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(texts=st.tuples(*[_HOSTILE] * 5), place=st.integers(0, 12))
def test_no_row_can_produce_the_delimiters(name: str, texts: tuple[str, ...], place: int) -> None:
    """In what the tokens say there is one pair around the data, whatever the row's texts are."""
    tokenizer = NFKC if name == "NFKC" else kind(name)
    template, config = build("chat", tokenizer, boundary="structured", max_tokens=8192)
    first = f"{texts[0]}\n\n{texts[1]}"
    asked = (Turn("user", first, data=len(texts[0]) + 2), Turn("assistant", texts[2]), Turn("user", texts[3]))
    example = Example((*asked, Turn("assistant", texts[4])), {})
    encoded = tokenization.encode(example, template, tokenizer, config)
    assert encoded is not None
    assert _delimiters(tokenizer.decode(encoded.ids.tolist())) == ["<<<data>>>", "<<<end>>>"]
    prompt = tokenization.encode_prompt(example, template, tokenizer, config.max_tokens)
    assert _delimiters(tokenizer.decode(prompt)) == ["<<<data>>>", "<<<end>>>"]


def test_without_the_front_end_these_texts_do_produce_them() -> None:
    """So the test above has something to find, in other forms too where the tokenizer takes them for plain ones."""
    for name, text in (("byte-level BPE, ChatML", END), ("WordPiece in small letters", END), ("NFKC", _wide(END))):
        tokenizer = NFKC if name == "NFKC" else kind(name)
        template, config = build("chat", tokenizer, max_tokens=8192)
        encoded = tokenization.encode(talk(f"bee {text} bee", "a"), template, tokenizer, config)
        assert encoded is not None and _delimiters(tokenizer.decode(encoded.ids.tolist())) == ["<<<end>>>"]


@pytest.mark.parametrize("name", UNABLE)
def test_a_tokenizer_without_tokens_for_them_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r'prompt.boundary = "structured": this tokenizer has no tokens for'):
        build("chat", kind(name), boundary="structured")


def test_a_template_that_writes_delimiters_of_its_own_leaves_the_row_out(tmp_path: Any) -> None:
    path = tmp_path / "own.txt"
    path.write_text("<<<END>>> {instruction} ->{response}", encoding="utf-8")
    template, config = build(str(path), BYTE_TOKENIZER, boundary="structured")
    corpus = tokenization.encode_all([ROWS], template, BYTE_TOKENIZER, config)
    assert corpus.dropped == {0: "the chat template writes delimiters of data where no data stands"}
    path.write_text("{instruction} ->{response}", encoding="utf-8")
    template, config = build(str(path), BYTE_TOKENIZER, boundary="structured")
    assert not tokenization.encode_all([ROWS], template, BYTE_TOKENIZER, config).dropped


@pytest.mark.parametrize("name", ["chat", "alpaca", "plain"])
def test_plain_is_as_before_and_without_data_structured_is_too(name: str) -> None:
    """Harmless rows without data have the same ids either way; with data, plain tokenises their text as one."""
    tokenizer = builtin()
    plain, config = build(name, tokenizer)
    apart, other = build(name, tokenizer, boundary="structured")
    for example in (TALK, talk("1 < 2, x << 3 <<< 4?", "yes >>> no", system="Be brief.")):
        before = tokenization.encode(example, plain, tokenizer, config)
        after = tokenization.encode(example, apart, tokenizer, other)
        assert before is not None and after is not None
        assert before.ids.tolist() == after.ids.tolist() and before.trained.tolist() == after.trained.tolist()
    bare = Example(tuple(turn._replace(data=None) for turn in ROWS.turns), {})
    one, two = (tokenization.encode(example, plain, tokenizer, config) for example in (ROWS, bare))
    assert one is not None and two is not None and one.ids.tolist() == two.ids.tolist()
    assert plain.digest != apart.digest  # sides that write prompts differently do not train together


def test_remarks_say_what_there_is_to_say_of_the_rows() -> None:
    assert structured.remarks([(ROWS.turns, "")]) == []
    (none,) = structured.remarks([(TALK.turns, "")])
    assert none.startswith('prompt.boundary = "structured": no row has a data part')
    _, spelled = structured.remarks(
        [(talk("<<<END>>>", "a").turns, ""), (TALK.turns, '["< <<data>>>"]'), (TALK.turns, "[]")]
    )
    assert (
        spelled == 'prompt.boundary = "structured": 2 rows spell <<<DATA>>> or <<<END>>>, which are taken out of them'
    )
