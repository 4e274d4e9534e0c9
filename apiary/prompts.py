"""Conversations as token ids with a loss mask that is right by construction.

Every segment of a template is tokenised by itself and the pieces are joined, so no boundary can
fall inside a token, and what training puts before a response is, id by id, the generation prompt.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, groupby
from typing import TYPE_CHECKING

import numpy as np

from apiary.batches import Batch, Corpus, CorpusStats, Encoded, collate, gather, plan_batches
from apiary.config import PromptConfig, UserError
from apiary.examples import Example
from apiary.templates import Segment, Template, asking, make_template, short_digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Batch",
    "Corpus",
    "CorpusStats",
    "Encoded",
    "Segment",
    "Template",
    "collate",
    "encode",
    "encode_all",
    "encode_prompt",
    "make_template",
    "plan_batches",
    "preview",
    "tokenizer_digest",
]

_CHUNK = 4096  # rows tokenised in one call


def encode(
    example: Example,
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    config: PromptConfig,
) -> Encoded | None:
    """One example as tokens; None when `prompt.max_tokens` leaves nothing of it to train."""
    segments = template.segments(example.turns)
    return _assemble(segments, _tokenise(segments, tokenizer), config)


def encode_all(
    examples: Sequence[Example],
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    config: PromptConfig,
) -> Corpus:
    """All examples that fit as one corpus, in order; the stats count those cut or dropped."""

    def encoded() -> Iterator[Encoded | None]:
        for start in range(0, len(examples), _CHUNK):
            chunk = [template.segments(e.turns) for e in examples[start : start + _CHUNK]]
            ids = _tokenise(chain.from_iterable(chunk), tokenizer)
            yield from (_assemble(segments, ids, config) for segments in chunk)

    return gather(encoded())


def encode_prompt(
    example: Example,
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
) -> list[int]:
    """The ids before the last assistant turn: exactly those that training puts before it.

    A long chat loses its oldest exchanges (never the system message) until a response token fits.

    Raises:
        UserError: the last question alone is too long.
    """
    turns = asking(example.turns)
    while True:
        segments = template.segments(turns)
        ids = _tokenise(segments, tokenizer)
        prompt = [int(i) for segment in segments for i in ids[segment.text]]
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


def _tokenise(segments: Iterable[Segment], tokenizer: PreTrainedTokenizerBase) -> Mapping[str, np.ndarray]:
    """The ids of each distinct text: constant segments are tokenised once."""
    texts = list(dict.fromkeys(segment.text for segment in segments))
    if not texts:
        return {}
    rows = tokenizer(
        texts,
        add_special_tokens=False,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]
    return {text: np.array(ids, np.int32) for text, ids in zip(texts, rows, strict=True)}


def _assemble(segments: Sequence[Segment], ids_of: Mapping[str, np.ndarray], config: PromptConfig) -> Encoded | None:
    """The segments' ids end to end, up to the last trained token that fits."""
    parts = [ids_of[segment.text] for segment in segments]
    ids = np.concatenate(parts)
    trained = np.repeat([segment.trained for segment in segments], [len(part) for part in parts])
    trained[:1] = False  # nothing comes before the first token to predict it from
    end = _end(trained)
    cut = end > config.max_tokens
    if cut and config.on_long == "drop":
        return None
    if cut:
        end = _end(trained[: config.max_tokens])
    return Encoded(ids[:end], trained[:end], cut) if end else None


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
