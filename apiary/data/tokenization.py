"""Conversations as token ids with a loss mask that is right by construction.

Every segment of a template is tokenised by itself and the pieces are joined, so no boundary can
fall inside a token, and what training puts before a response is, id by id, the generation prompt.
Control tokens are the template's alone: what a turn spells stays text (`boundary`).
"""

from __future__ import annotations

import json
import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain, groupby
from typing import TYPE_CHECKING

import numpy as np

from apiary.config.schema import DataConfig, PromptConfig
from apiary.core.errors import UserError
from apiary.data.batches import Batch, Corpus, CorpusStats, Encoded, collate, gather, plan_batches
from apiary.data.boundary import UNSAFE, Tokens, boundary_of, tokenise
from apiary.data.examples import Example, Source, read, rows_text
from apiary.data.templates import Segment, Template, Unwritable, asking, make_template, short_digest
from apiary.data.turns import Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Batch",
    "Corpus",
    "CorpusStats",
    "Encoded",
    "Segment",
    "Template",
    "check_template",
    "collate",
    "encode",
    "encode_all",
    "encode_prompt",
    "make_template",
    "plan_batches",
    "preview",
    "rows_lost",
    "tokenizer_digest",
]

_CHUNK = 4096  # rows tokenised in one call
SPELLED = "spell control tokens of the tokenizer, which stay plain text"


def encode(
    example: Example,
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    config: PromptConfig,
) -> Encoded | None:
    """One example as tokens; None when the template cannot write it, or `prompt.max_tokens` leaves nothing to train."""
    (encoded,) = _encode([example], template, tokenizer, config)
    return encoded if isinstance(encoded, Encoded) else None


def encode_all(
    examples: Sequence[Example],
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    config: PromptConfig,
) -> Corpus:
    """All examples that can be used as one corpus, in order; it tells which of them were cut or dropped, and why."""
    chunks = (examples[start : start + _CHUNK] for start in range(0, len(examples), _CHUNK))
    return gather(chain.from_iterable(_encode(chunk, template, tokenizer, config) for chunk in chunks))


def _encode(
    examples: Sequence[Example], template: Template, tokenizer: PreTrainedTokenizerBase, config: PromptConfig
) -> list[Encoded | str]:
    """The tokens of each example, or why there are none."""
    boundary = boundary_of(template, tokenizer)
    turns = [template.whole(example.turns) for example in examples]
    written = [_write(each, template) for each in turns]
    texts = (segment.text for part in written if not isinstance(part, str) for segment in part)
    ids = tokenise(texts, tokenizer)
    return [
        part if isinstance(part, str) else _assemble(part, boundary.tokens(each, part, ids), config)
        for each, part in zip(turns, written, strict=True)
    ]


def _write(turns: Sequence[Turn], template: Template) -> list[Segment] | str:
    try:
        return template.split(turns)
    except Unwritable as refusal:
        return refusal.reason


def check_template(examples: Iterable[Example], template: Template) -> None:
    """Check that the template can write one of the examples at least.

    Raises:
        UserError: it can write none of them; what it says of the first.
    """
    first: UserError | None = None
    for example in examples:
        try:
            template.segments(example.turns)
        except Unwritable as refusal:
            first = first or refusal
        else:
            return
    if first is not None:
        raise first


def rows_lost(parts: Iterable[tuple[Sequence[Example], Corpus]], data: DataConfig, max_tokens: int) -> list[str]:
    """What encoding cut, dropped and read as plain text: a line for each file, with counts and the first row numbers.

    Args:
        parts: examples, and what `encode_all` made of them.
        data: where they came from; read again if there is something to tell, for an example does not know its row.
        max_tokens: their limit.
    """
    fates: dict[tuple[Turn, ...], tuple[str, ...]] = {}  # a conversation's fates depend on nothing else
    for given, corpus in parts:
        of: dict[int, tuple[str, ...]] = dict.fromkeys(corpus.cut, (f"cut at prompt.max_tokens = {max_tokens}",))
        for i in corpus.spelled:
            of[i] = (*of.get(i, ()), SPELLED)
        of |= {i: (f"left out: {why}",) for i, why in corpus.dropped.items()}
        fates |= {given[i].turns: what for i, what in of.items()}
    lines: list[str] = []
    unplaced = dict(fates)
    for source in _sources(data) if fates else ():
        rows_by_fate: dict[int, dict[str, list[int]]] = {}
        for example, place in zip(source.examples, source.places, strict=True):
            for fate in fates.get(example.turns, ()):
                rows_by_fate.setdefault(place.file, {}).setdefault(fate, []).append(place.row)
                unplaced.pop(example.turns, None)
        for file, fate_rows in sorted(rows_by_fate.items()):
            name, total = source.reports[file].name, source.reports[file].rows
            losses = (
                f"{len(rows)} of {total} rows {fate} ({rows_text(rows, len(rows))})" for fate, rows in fate_rows.items()
            )
            lines.append(f"{name}: {'; '.join(losses)}")
    if unplaced:
        counts = Counter(chain.from_iterable(unplaced.values())).items()
        lines.append("test part of data.source: " + "; ".join(f"{count} {fate}" for fate, count in counts))
    return lines


def _sources(data: DataConfig) -> list[Source]:
    sources = [read(data.source, split=data.split, columns=data.columns, max_rows=data.max_rows, query=data.query)]
    if data.test is not None:
        sources.append(read(data.test, split="test", columns=data.columns, key="data.test"))
    return sources


def encode_prompt(
    example: Example,
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
) -> list[int]:
    """The ids before the last assistant turn: exactly those that training puts before it.

    A long chat loses its oldest exchanges (never the system message) until a response token fits.

    Raises:
        UserError: the last question alone is too long, the template cannot write the conversation, or its text
            cannot be kept from becoming control tokens.
    """
    turns = asking(example.turns)
    while True:
        whole = template.whole(turns)
        segments = template.split(whole)
        ids = tokenise((segment.text for segment in segments), tokenizer)
        tokens = boundary_of(template, tokenizer).tokens(whole, segments, ids)
        if tokens is None:
            raise UserError(f"the conversation cannot be put to the model: {UNSAFE}; leave these words out")
        prompt = [int(i) for part in tokens.parts for i in part]
        if len(prompt) < max_tokens:
            return prompt
        starts = [i for i, turn in enumerate(turns) if turn.role == "user"]
        if len(starts) < 2:
            raise UserError(
                f"the prompt has {len(prompt)} tokens and prompt.max_tokens = {max_tokens} leaves "
                "no room for an answer; shorten it or raise prompt.max_tokens"
            )
        turns = (*turns[: starts[0]], *turns[starts[1] :])


def preview(
    example: Example,
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    config: PromptConfig,
) -> list[tuple[str, bool]]:
    """The text that the model sees in stretches, and whether each is trained; [] if dropped.

    Decoded from the ids, so that it shows what the tokens say and not what they should say.
    """
    if (encoded := encode(example, template, tokenizer, config)) is None:
        return []
    pairs = zip(encoded.ids.tolist(), encoded.trained.tolist(), strict=True)
    return [
        (str(tokenizer.decode([i for i, _ in stretch], skip_special_tokens=False)), trained)
        for trained, stretch in groupby(pairs, key=lambda pair: pair[1])
    ]


def _assemble(segments: Sequence[Segment], tokens: Tokens | None, config: PromptConfig) -> Encoded | str:
    """The segments' ids end to end, up to the last trained token that fits; or why none is left to train."""
    if tokens is None:
        return UNSAFE
    ids = np.concatenate(tokens.parts)
    trained = np.repeat([segment.trained for segment in segments], [len(part) for part in tokens.parts])
    trained[:1] = False  # nothing comes before the first token to predict it from
    end = _end(trained)
    cut = end > config.max_tokens
    if cut:
        end = _end(trained[: config.max_tokens]) if config.on_long == "truncate" else 0
    if not end:
        return f"too long for prompt.max_tokens = {config.max_tokens}" if cut else "no token of it is trained"
    return Encoded(ids[:end], trained[:end], cut, tokens.spelled)


def _end(trained: np.ndarray) -> int:
    """One past the last trained token; what follows it cannot change any loss."""
    places = np.flatnonzero(trained)
    return int(places[-1]) + 1 if len(places) else 0


_digests: weakref.WeakKeyDictionary[object, tuple[object, str]] = weakref.WeakKeyDictionary()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A SHA-256 (16 hex digits) over vocabulary, merges, normaliser and special tokens.

    Padding and truncation are a caller's passing wishes and do not count. Computed once for each
    tokenizer (big ones take a second, and every client is asked) until tokens are added to it.
    """
    special = {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())}
    state = (len(tokenizer), str(special))
    known, digest = _digests.get(tokenizer, (None, ""))
    if known == state:
        return digest
    parts: dict[str, object] = {"special": special, "vocab": sorted(tokenizer.get_vocab().items())}
    if backend := getattr(tokenizer, "backend_tokenizer", None):
        parts["backend"] = json.loads(backend.to_str()) | {"padding": None, "truncation": None}
    digest = short_digest(json.dumps(parts, sort_keys=True))
    _digests[tokenizer] = (state, digest)
    return digest
