"""Masks, cutting and digests, against plain decoding of what the batches train."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_templates import (
    BYTE_TOKENIZER,
    CHATML,
    CHATS,
    GEMMA,
    MISTRAL,
    TALK,
    THOUGHTLESS,
    build,
    cached,
    make_tokenizer,
    talk,
    trained_texts,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from apiary.config.schema import PromptConfig
from apiary.core.errors import UserError
from apiary.data import tokenization
from apiary.data.examples import Example, read


def every_template() -> list[tuple[str, str | None]]:
    return [("plain", None), ("alpaca", None), *(("chat", source) for source, _ in CHATS.values())]


_WORDS = (
    st.text(st.characters(codec="utf-8", exclude_characters="<[#|"), min_size=1, max_size=30)
    .map(str.strip)
    .filter(bool)
)
_TALKS = st.lists(st.tuples(_WORDS, _WORDS), min_size=1, max_size=3)


@pytest.mark.parametrize(("name", "source"), every_template())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(talks=st.lists(_TALKS, min_size=1, max_size=4))
def test_every_response_token_is_trained_once_and_no_prompt_token_ever(
    name: str, source: str | None, talks: list[list[tuple[str, str]]]
) -> None:
    tokenizer = cached(source, pad="</s>")
    template, config = build(name, tokenizer, max_tokens=4096)
    examples = [talk(*itertools.chain.from_iterable(pairs)) for pairs in talks]
    corpus = tokenization.encode_all(examples, template, tokenizer, config)
    assert corpus.stats.cut == corpus.stats.dropped == 0
    seen: dict[int, list[str]] = {}
    for rows in tokenization.plan_batches(corpus.lengths, 200, _rng()):
        batch = tokenization.collate(corpus, rows, tokenizer.pad_token_id)  # pad is EOS here
        for row, ids, targets in zip(batch.rows, batch.ids, batch.targets, strict=True):
            assert int(row) not in seen
            stretches = itertools.groupby(zip(ids.tolist(), targets.tolist(), strict=True), key=lambda pair: pair[1])
            seen[int(row)] = [tokenizer.decode([i for i, _ in g]) for on, g in stretches if on]
    end = dict(CHATS.values()).get(source or "", "</s>")
    lead = " " if source == MISTRAL else ""
    for row, pairs in enumerate(talks):
        assert seen[row] == [lead + answer + end for _, answer in pairs]


def _rng() -> Any:
    import torch

    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize(("name", "source"), every_template())
def test_generation_prompt_is_a_strict_prefix_of_what_is_trained(name: str, source: str | None) -> None:
    tokenizer = make_tokenizer(source, bos=True)
    template, config = build(name, tokenizer, system="Be brief.")
    for example in (TALK, talk("q", "  spaced  "), talk("\n", "\n\nx", system="s")):
        encoded = tokenization.encode(example, template, tokenizer, config)
        assert encoded is not None
        prompt = tokenization.encode_prompt(example, template, tokenizer, config.max_tokens)
        assert encoded.ids[: len(prompt)].tolist() == prompt
        rest = encoded.trained[len(prompt) :]
        assert len(rest) > 0
        assert rest.all()
        question = Example(example.turns[:-1], {})
        assert tokenization.encode_prompt(question, template, tokenizer, 512) == prompt
        if name != "chat":
            assert encoded.ids[:2].tolist().count(tokenizer.bos_token_id) == 1


def test_a_real_sentencepiece_tokenizer_keeps_prompt_and_answer_apart(shared: Path) -> None:
    folder = shared / "models" / "stories260k"
    if not folder.exists():
        pytest.skip("the model is not here")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    template, config = build("alpaca", tokenizer)
    encoded = tokenization.encode(TALK, template, tokenizer, config)
    assert trained_texts(encoded, tokenizer) == [
        "The bees — 蜂 🐝.</s>",
        "Home, to the hive.</s>",
    ]
    assert encoded.ids[0] == tokenizer.bos_token_id
    prompt = tokenization.encode_prompt(TALK, template, tokenizer, config.max_tokens)
    assert encoded.ids[: len(prompt)].tolist() == prompt


# --- long examples


@pytest.mark.parametrize("on_long", ["truncate", "drop"])
def test_cutting_at_every_length_keeps_a_prefix(on_long: str) -> None:
    example = talk("Who flies home?", "The bees fly.", "Who else?", "Willy.")
    template, wide = build("plain", BYTE_TOKENIZER)
    full = tokenization.encode(example, template, BYTE_TOKENIZER, wide)
    assert full is not None
    first = int(np.flatnonzero(full.trained)[0])
    for limit in range(8, len(full.ids) + 3):
        config = PromptConfig(template="plain", max_tokens=limit, on_long=on_long)
        encoded = tokenization.encode(example, template, BYTE_TOKENIZER, config)
        if limit >= len(full.ids):
            assert encoded is not None
            assert not encoded.cut
            assert encoded.ids.tolist() == full.ids.tolist()
        elif on_long == "drop" or limit <= first:
            assert encoded is None
        else:
            assert encoded is not None
            assert encoded.cut
            n = len(encoded.ids)
            assert encoded.ids.tolist() == full.ids[:n].tolist()
            assert encoded.trained.tolist() == full.trained[:n].tolist()
            assert encoded.trained[-1]
            ends = [0, *(np.flatnonzero(np.diff(full.trained.astype(int)) == -1) + 1), len(full.ids)]  # of the answers
            whole = max(int(end) for end in ends if end <= limit)
            assert n == (whole or limit)  # an end of an answer here is one token, so no mark makes it shorter
            assert encoded.within == (whole == 0)
            assert (encoded.whole, encoded.lost) == (len(full.ids), int(full.trained[n:].sum()))


def test_stats_count_what_was_cut_and_dropped() -> None:
    rows = [talk("a", "b"), talk("a", "b" * 99), talk("a" * 99, "b")]
    template, config = build("plain", BYTE_TOKENIZER, max_tokens=40)
    corpus = tokenization.encode_all(rows, template, BYTE_TOKENIZER, config)
    stats = corpus.stats
    assert (stats.examples, stats.cut, stats.dropped, stats.cut_within) == (2, 1, 1, 1)
    begin = int(np.flatnonzero(corpus.trained[corpus.offsets[1] :])[0])
    assert stats.trained_cut == begin + 99 + 1 - 40 and stats.trained_dropped == 2  # with the EOS of each
    assert corpus.whole.tolist() == [begin + 2, begin + 100, begin + 98 + 2]
    assert stats.tokens == len(corpus.ids) == corpus.lengths.sum()
    assert corpus.lengths.tolist()[1] == 40
    assert stats.response_tokens == corpus.trained.sum()
    eos = BYTE_TOKENIZER.eos_token_id
    assert (corpus.ids == eos).sum() == 1  # a cut answer has no end
    config = config.model_copy(update={"on_long": "drop"})
    stats = tokenization.encode_all(rows, template, BYTE_TOKENIZER, config).stats
    assert (stats.examples, stats.cut, stats.dropped) == (1, 0, 2)
    assert len(tokenization.encode_all([], template, BYTE_TOKENIZER, config)) == 0


def test_encode_all_is_encode_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenization, "_CHUNK", 2)
    rows = [TALK, talk("x", "y"), talk("a" * 900, "b"), talk("Who?", "The bees.")]
    template, config = build("plain", BYTE_TOKENIZER, max_tokens=120)
    corpus = tokenization.encode_all(rows, template, BYTE_TOKENIZER, config)
    singles = [tokenization.encode(row, template, BYTE_TOKENIZER, config) for row in rows]
    kept = [single for single in singles if single]
    assert len(kept) == len(corpus) == 3
    for i, single in enumerate(kept):
        where = slice(corpus.offsets[i], corpus.offsets[i + 1])
        assert corpus.ids[where].tolist() == single.ids.tolist()
        assert corpus.trained[where].tolist() == single.trained.tolist()


def test_a_long_chat_forgets_its_oldest_exchanges() -> None:
    template, _ = build("plain", BYTE_TOKENIZER)
    long = talk("a" * 50, "b" * 50, "c" * 30, "d", system="S")
    ids = tokenization.encode_prompt(long, template, BYTE_TOKENIZER, 80)
    assert BYTE_TOKENIZER.decode(ids) == "S\n\nUser: " + "c" * 30 + "\n\nAssistant:\n"
    with pytest.raises(UserError, match=r"prompt\.max_tokens = 8"):
        tokenization.encode_prompt(long, template, BYTE_TOKENIZER, 8)


# --- what cannot be used


def test_a_conversation_the_template_cannot_write_costs_one_row_and_is_told_without_its_words() -> None:
    source = CHATML.replace(
        "{% for m in messages %}",
        "{% for m in messages %}{% if 'odd' in m['content'] %}{{ raise_exception(m['content']) }}{% endif %}",
        1,
    ).replace(
        "{{ m['content'] + '<|im_end|>' }}{% endgen", "{{ m['content'].split('</think>')[-1] + '<|im_end|>' }}{% endgen"
    )
    tokenizer = make_tokenizer(source)
    template, config = build("chat", tokenizer)
    rows = [talk("q", "a"), talk("q", "<think>hm</think>a"), talk("an odd secret", "a"), talk("r", "b" * 9)]
    corpus = tokenization.encode_all(rows, template, tokenizer, config)
    alone = tokenization.encode_all([rows[0], rows[3]], template, tokenizer, config)
    assert corpus.ids.tolist() == alone.ids.tolist()
    assert (corpus.stats.examples, corpus.stats.dropped) == (2, 2)
    assert "rewrites" in corpus.dropped[1]
    assert "refuses" in corpus.dropped[2]
    assert "secret" not in corpus.dropped[2]
    assert tokenization.encode(rows[1], template, tokenizer, config) is None
    tokenization.check_template(rows[1:], template)
    with pytest.raises(UserError, match="rewrites what the assistant said"):
        tokenization.check_template(rows[1:3], template)


def test_lost_rows_are_told_by_file_with_their_numbers(tmp_path: Path) -> None:
    def chat(*texts: str) -> str:
        messages = [{"role": turn.role, "content": turn.text} for turn in talk(*texts).turns]
        return json.dumps({"messages": messages}) + "\n"

    fine, cut, long, odd = chat("q", "a"), chat("q", "b" * 99), chat("q" * 99, "a"), chat("q", "<think>x</think>a")
    (tmp_path / "one.jsonl").write_text(fine + "\n" + cut + long + fine + odd, encoding="utf-8")
    (tmp_path / "two.jsonl").write_text(fine * 3, encoding="utf-8")
    (tmp_path / "three.jsonl").write_text(fine + cut * 7, encoding="utf-8")
    (tmp_path / "test.jsonl").write_text(fine + long, encoding="utf-8")
    tokenizer = make_tokenizer(THOUGHTLESS)
    template, config = build("chat", tokenizer, max_tokens=80)
    source = read(str(tmp_path))
    parts = [
        (rows, tokenization.encode_all(rows, template, tokenizer, config)) for rows in (source.examples, source.test)
    ]
    assert sorted(tokenization.rows_lost(parts, [read(str(tmp_path))], 80)) == [
        "one.jsonl: 1 of 5 rows cut at prompt.max_tokens = 80 within an answer (rows 3); "
        "1 of 5 rows left out: too long for prompt.max_tokens = 80 (rows 4); "
        "1 of 5 rows left out: the chat template rewrites what the assistant said (rows 6)",
        "three.jsonl: 7 of 8 rows cut at prompt.max_tokens = 80 within an answer (rows 2, 3, 4, 5, 6, ...)",
    ]
    (tmp_path / "test.jsonl").write_text(fine + chat("p" * 99, "a"), encoding="utf-8")
    test = read(str(tmp_path)).test or ()
    parts = [(test, tokenization.encode_all(test, template, tokenizer, config))]
    assert tokenization.rows_lost(parts, [read(str(tmp_path))], 80) == [
        "test part of data.source: 1 left out: too long for prompt.max_tokens = 80"
    ]


# --- preview and digests


def test_preview_shows_the_text_and_its_mask() -> None:
    template, config = build("plain", BYTE_TOKENIZER)
    assert tokenization.preview(TALK, template, BYTE_TOKENIZER, config) == [
        ("User: Who flies?\n\nAssistant:\n", False),
        ("The bees — 蜂 🐝.</s>", True),
        ("\n\nUser: Where to?\n\nAssistant:\n", False),
        ("Home, to the hive.</s>", True),
    ]
    tight = PromptConfig(template="plain", max_tokens=8)
    assert tokenization.preview(TALK, template, BYTE_TOKENIZER, tight) == []


def test_template_digest_tells_templates_and_systems_apart(tmp_path: Path) -> None:
    configs = [("plain", None), ("alpaca", None), ("plain", "S"), ("plain", "T"), ("chat", None)]
    for name in ("one", "two"):
        (tmp_path / name).write_text("Q {instruction} A {response}", encoding="utf-8")
    files = [(str(tmp_path / "one"), None)]
    chatty = make_tokenizer(CHATML)
    digests = [build(n, chatty, system=s)[0].digest for n, s in configs + files]
    digests.append(build("chat", make_tokenizer(GEMMA))[0].digest)
    assert len(set(digests)) == len(digests)
    same = [build(str(tmp_path / name), chatty)[0].digest for name in ("one", "two")]
    assert same[0] == same[1]  # what counts is the text, not where a site keeps it


def test_tokenizer_digest_sees_content_and_not_passing_state(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    digest = tokenization.tokenizer_digest(tokenizer)
    assert tokenization.tokenizer_digest(make_tokenizer()) == digest
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    loaded(["a", "bb"], padding="max_length", truncation=True, max_length=9)
    loaded.padding_side = "left"
    assert json.loads(loaded.backend_tokenizer.to_str())["padding"] is not None
    assert tokenization.tokenizer_digest(loaded) == digest
    assert tokenization.tokenizer_digest(make_tokenizer(bos=True)) != digest
    assert tokenization.tokenizer_digest(make_tokenizer(pad="</s>")) != digest
    tokenizer.add_tokens(["hive"])
    assert tokenization.tokenizer_digest(tokenizer) != digest
