"""A tokenizer's vocabulary counts; what a caller once set in its files does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizer_kinds import KINDS, TEXT, Letters
from tokenizers import normalizers
from transformers import AutoTokenizer

from apiary.config.schema import PromptConfig
from apiary.core.errors import UserError
from apiary.data import tokenization
from apiary.data.examples import Example
from apiary.data.tokens import decode, opening, settle, tokenise
from apiary.data.turns import Turn

BYTES, PIECES, WORDS = "byte-level BPE, ChatML", "Unigram with NFKC", "WordPiece in small letters"
TALK = Example((Turn("user", "The hive, does n't it hum ? " * 6), Turn("assistant", "It 's warm .  So yes !")), {})
PROMPT = PromptConfig(max_tokens=4096)


def truncated(spec: dict[str, Any]) -> None:
    spec["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}


def padded(spec: dict[str, Any]) -> None:
    spec["padding"] = {
        **{"strategy": {"Fixed": 64}, "direction": "Left", "pad_to_multiple_of": None},
        **{"pad_id": 1, "pad_type_id": 0, "pad_token": spec["added_tokens"][1]["content"]},
    }


def by_chance(spec: dict[str, Any]) -> None:
    if spec["model"]["type"] == "BPE":
        spec["model"]["dropout"] = 0.5


def nothing(spec: dict[str, Any]) -> None:
    pass


SETTINGS: dict[str, tuple[dict[str, Any], Callable[[dict[str, Any]], None]]] = {
    "padding on the left": ({"padding_side": "left"}, nothing),
    "truncation on the left, and a greatest length": ({"truncation_side": "left", "model_max_length": 8}, nothing),
    "truncation in the file": ({}, truncated),
    "padding in the file": ({}, padded),
    "blanks that are cleaned up": ({"clean_up_tokenization_spaces": True}, nothing),
    "blanks that are cleaned up all the same": (
        {
            "clean_up_tokenization_spaces": True,
            "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True,
        },
        nothing,
    ),
    "special tokens that are split": ({"split_special_tokens": True}, nothing),
    "blanks between special tokens": ({"spaces_between_special_tokens": True}, nothing),
    "marks of an older version": ({"legacy": True, "use_fast": False}, nothing),
    "merges left out by chance": ({}, by_chance),
}


def saved(name: str, folder: Path, settings: dict[str, Any], change: Callable[[dict[str, Any]], None]) -> Any:
    """A tokenizer of a kind, saved, changed in its files, and read again as a model's is."""
    KINDS[name]().save_pretrained(folder)
    for file, edit in {"tokenizer_config.json": lambda found: found.update(settings), "tokenizer.json": change}.items():
        content = json.loads((folder / file).read_text())
        edit(content)
        (folder / file).write_text(json.dumps(content))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    settle(tokenizer, "a base")
    return tokenizer


def written(tokenizer: Any, template: str) -> tuple[Any, ...]:
    """All that becomes of a row: its ids and mask, the question's, a bare text's, and their texts."""
    config = PROMPT.model_copy(update={"template": template})
    made = tokenization.make_template(config, tokenizer)
    encoded = tokenization.encode(TALK, made, tokenizer, config)
    bare = tokenization.encode(Example((Turn("assistant", TALK.turns[0].text),), {}), made, tokenizer, config)
    assert encoded is not None and bare is not None
    question = tokenization.encode_prompt(TALK, made, tokenizer, 4096)
    assert encoded.ids[: len(question)].tolist() == question
    shown = tokenization.preview(TALK, made, tokenizer, config)
    text = decode(tokenizer, encoded.ids.tolist(), skip_special=True)
    return encoded.ids.tolist(), encoded.trained.tolist(), question, bare.ids.tolist(), shown, text


@pytest.mark.parametrize("template", ["chat", "alpaca"])
@pytest.mark.parametrize("kind", [BYTES, PIECES, WORDS])
@pytest.mark.parametrize("about", SETTINGS)
def test_settings_of_a_caller_change_neither_ids_nor_texts(
    about: str, kind: str, template: str, tmp_path: Path
) -> None:
    plain = written(saved(kind, tmp_path / "plain", {}, nothing), template)
    for _ in range(3):
        assert written(saved(kind, tmp_path / "set", *SETTINGS[about]), template) == plain
    if kind == BYTES:
        assert TALK.turns[1].text in plain[-1]


@pytest.mark.parametrize("kind", [BYTES, PIECES, WORDS])
def test_the_digest_of_a_tokenizer_does_not_depend_on_them(kind: str, tmp_path: Path) -> None:
    plain = tokenization.tokenizer_digest(saved(kind, tmp_path / "plain", {}, nothing))
    for number, (about, (settings, change)) in enumerate(SETTINGS.items()):
        if about != "padding in the file":  # it names a pad token
            found = saved(kind, tmp_path / str(number), settings, change)
            assert tokenization.tokenizer_digest(found) == plain, about


def test_answers_of_a_tokenizer_in_python_keep_their_blanks() -> None:
    cleaning = Letters(bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=True)
    text = "It does n't hum . Does it ?"
    ids = tokenise([text], cleaning)[text].tolist()
    assert cleaning.decode(ids) != text
    assert decode(cleaning, ids) == text


def lower(spec: dict[str, Any]) -> None:
    spec["normalizer"] = json.loads(normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]).__getstate__())


def test_a_normaliser_belongs_to_the_vocabulary(tmp_path: Path) -> None:
    """A model that has seen small letters alone is given small letters."""
    plain, small = saved(BYTES, tmp_path / "a", {}, nothing), saved(BYTES, tmp_path / "b", {}, lower)
    text = "The HIVE is Warm"
    assert tokenise([text], small)[text].tolist() == tokenise([text.lower()], plain)[text.lower()].tolist()
    assert tokenise([text], small)[text].tolist() != tokenise([text], plain)[text].tolist()


# --- the beginning of a text


def rule(*before: str, after: str = "") -> Callable[[dict[str, Any]], None]:
    """A post-processor that puts tokens before a text and after it."""

    def change(spec: dict[str, Any]) -> None:
        ids = {token["content"]: token["id"] for token in spec["added_tokens"]}
        single: list[dict[str, Any]] = [{"SpecialToken": {"id": token, "type_id": 0}} for token in before]
        single.append({"Sequence": {"id": "A", "type_id": 0}})
        single += [{"SpecialToken": {"id": after, "type_id": 0}}] if after else []
        spec["post_processor"] = {
            "type": "TemplateProcessing",
            "single": single,
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {
                token: {"id": token, "ids": [ids[token]], "tokens": [token]} for token in {*before, after} - {""}
            },
        }

    return change


@pytest.mark.parametrize(
    ("change", "begins"),
    [
        (nothing, []),
        (rule("<s>"), ["<s>"]),
        (rule("<s>", after="</s>"), ["<s>"]),
        (rule(after="</s>"), []),
        (rule("<|im_start|>", "<s>"), ["<|im_start|>", "<s>"]),  # GLM begins with two tokens, of which BOS is one
        (rule("<|im_start|>"), ["<|im_start|>"]),
    ],
)
def test_a_text_begins_once_with_what_the_tokenizer_by_its_own_rule_puts_there(
    change: Callable[[dict[str, Any]], None], begins: list[str], tmp_path: Path
) -> None:
    tokenizer = saved(BYTES, tmp_path / "tokenizer", {}, change)
    tokenizer.chat_template = None
    expected = [tokenizer.convert_tokens_to_ids(token) for token in begins]
    assert opening(tokenizer) == "".join(begins)
    ids, _, question, bare, *_ = written(tokenizer, "alpaca")
    special = set(tokenizer.all_special_ids)
    for found in (ids, question, bare):
        assert found[: len(begins)] == expected
        assert found[len(begins)] not in special
        assert [i for i in found[len(begins) :] if i in special] in ([], [tokenizer.eos_token_id])


@pytest.mark.parametrize("writes", [False, True])
def test_a_chat_template_alone_says_how_a_conversation_begins(writes: bool, tmp_path: Path) -> None:
    """Whatever the tokenizer puts before other texts: no second BOS, and none that the template does not write."""
    tokenizer = saved(BYTES, tmp_path / "tokenizer", {}, rule("<s>", after="</s>"))
    tokenizer.chat_template = ("{{ bos_token }}" if writes else "") + str(tokenizer.chat_template)
    ids, *_ = written(tokenizer, "chat")
    assert ids[:2].count(tokenizer.bos_token_id) == ids.count(tokenizer.bos_token_id) == writes


# --- chance


class Sampling(Letters):
    """As SentencePiece reads with `enable_sampling`: another cut of the same text each time."""

    def _tokenize(self, text: str, **given: Any) -> list[str]:
        at = int(np.random.default_rng().integers(len(text) + 1))
        return [*super()._tokenize(text[:at]), *super()._tokenize(text[at:].upper())]


def test_a_tokenizer_that_still_draws_lots_is_refused() -> None:
    with pytest.raises(UserError, match="reads the same text in several ways, by chance; set enable_sampling = false"):
        settle(Sampling(bos_token="<s>", eos_token="</s>"), "somebody/model")


def test_dropout_would_have_read_texts_in_several_ways(tmp_path: Path) -> None:
    """That is what is taken out."""
    folder = tmp_path / "tokenizer"
    saved(BYTES, folder, {}, by_chance)
    unsettled = AutoTokenizer.from_pretrained(folder)
    text = " ".join(TEXT)
    assert len({tokenise([text], unsettled)[text].tobytes() for _ in range(8)}) > 1
