"""The only door from data to a model: losses of examples, and answers to prompts."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer

from apiary.core.errors import UserError
from apiary.core.formatting import first_line
from apiary.core.tensors import generator, threads
from apiary.data.batches import Corpus, collate, plan_batches
from apiary.data.tokens import decode
from apiary.models import generation
from apiary.models.adapters import LanguageModel, autocast, pad_id
from apiary.models.fused_layers import give_memory_back
from apiary.models.loss import row_losses, to_device

_FEW_TOKENS = 1024
_BATCH_TOKENS, _ON_CPU = 8192, 4096  # padded tokens; larger batches no longer fit in the caches of a CPU


class Probe(Protocol):
    """What code about data may ask of a model."""

    def losses(self, corpus: Corpus) -> tuple[np.ndarray, np.ndarray]:
        """Summed nats (n,) float64 and response tokens (n,) int64 of each example."""

    def generate(self, prompts: list[list[int]], max_new_tokens: int) -> list[str]:
        """A greedy answer to each prompt, in order."""


class ModelProbe:
    """A probe over the model and adapter as they are when it is asked.

    Args:
        lm: the model.
        batch_tokens: padded tokens in one forward pass; None is what suits the device.
    """

    def __init__(self, lm: LanguageModel, batch_tokens: int | None = None) -> None:
        self._lm = lm
        self._batch_tokens = batch_tokens or (_ON_CPU if lm.device.type == "cpu" else _BATCH_TOKENS)

    def losses(self, corpus: Corpus) -> tuple[np.ndarray, np.ndarray]:
        """Summed nats (n,) float64 and response tokens (n,) int64 of each example."""
        nats, tokens = np.zeros(len(corpus)), np.zeros(len(corpus), np.int64)
        pad = pad_id(self._lm.tokenizer)
        # Of a few rows, as a small client has, a second thread costs more than it saves.
        few = self._lm.device.type == "cpu" and int(corpus.offsets[-1]) <= _FEW_TOKENS
        with torch.inference_mode(), autocast(self._lm), threads(1 if few else None):
            for rows in plan_batches(corpus.lengths, self._batch_tokens, generator(0, "probe")):
                batch = to_device(collate(corpus, rows, pad), self._lm.device)
                nats[rows] = row_losses(self._lm.model, batch).double().cpu().numpy()
                tokens[rows] = batch.targets.sum(1).cpu().numpy()
        give_memory_back()
        return nats, tokens

    def generate(self, prompts: list[list[int]], max_new_tokens: int, kept: Collection[int] = ()) -> list[str]:
        """The greedy answer to each prompt, in order.

        Args:
            prompts: token ids.
            max_new_tokens: of an answer.
            kept: the special tokens that stay in the text, by id; others are left out.
        """
        answers = [""] * len(prompts)
        order = sorted((i for i, ids in enumerate(prompts) if ids), key=lambda i: len(prompts[i]))
        for chosen in self._groups(order, prompts, max_new_tokens):
            written = self._answer([prompts[i] for i in chosen], max_new_tokens)
            for index, ids in zip(chosen, written, strict=True):
                answers[index] = text_of(self._lm, ids, kept)
        return answers

    def _groups(self, order: list[int], prompts: list[list[int]], new: int) -> Iterator[list[int]]:
        group: list[int] = []
        for index in order:  # shortest first, so the newest member is the widest
            if group and (len(group) + 1) * (len(prompts[index]) + new) > self._batch_tokens:
                yield group
                group = []
            group.append(index)
        if group:
            yield group

    def _answer(self, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        lm, width, pad = self._lm, max(map(len, prompts)), pad_id(self._lm.tokenizer)
        # Decoding appends on the right, so here the padding is on the left, and the mask is needed:
        # generate() counts positions from each prompt's own first token.
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=lm.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=lm.device)
        stops, places, cache = stop_ids(lm), list(range(len(prompts))), None
        written: list[list[int]] = [[]] * len(prompts)
        with torch.inference_mode(), autocast(lm):
            while places:  # most answers are short: when half of the rows have ended, the others go on without them
                out = self._decode(ids, mask, cache, stops, width + max_new_tokens - ids.shape[1])
                rows = out.sequences[:, width:].tolist()
                for place, row in zip(places, rows, strict=True):
                    written[place] = row
                left = [i for i, row in enumerate(rows) if len(row) < max_new_tokens and not set(row) & set(stops)]
                places, chosen = [places[i] for i in left], torch.tensor(left, dtype=torch.long, device=lm.device)
                ids = out.sequences[chosen]
                mask = torch.nn.functional.pad(mask[chosen], (0, ids.shape[1] - mask.shape[1]), value=1)
                cache = _rows_of(out.past_key_values, chosen)
        return written

    def _decode(self, ids: Tensor, mask: Tensor, cache: DynamicCache | None, stops: list[int], new: int) -> Any:
        """At most `new` more tokens of each row: fewer when half of the rows have ended."""
        return self._lm.model.generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            generation_config=generation.greedy(new, stops, pad_id(self._lm.tokenizer)),
            stopping_criteria=StoppingCriteriaList([_HalfEnded(ids, stops)]),
        )


class _HalfEnded(StoppingCriteria):
    """Ends a generate() call for all rows once half of them have written a stop token."""

    def __init__(self, ids: Tensor, stops: list[int]) -> None:
        self._stops = torch.tensor(stops, dtype=ids.dtype, device=ids.device)
        self._ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Whether each row is to end: all of them or none."""
        self._ended |= torch.isin(input_ids[:, -1], self._stops)
        return (2 * self._ended.sum() >= len(self._ended)).expand(len(self._ended))


def _rows_of(cache: Any, rows: Tensor) -> DynamicCache | None:
    """The keys and values of these rows alone; None (compute them again) for a cache that may hold something else."""
    if not isinstance(cache, DynamicCache) or not all(isinstance(layer, DynamicLayer) for layer in cache.layers):
        return None
    cache.reorder_cache(rows)  # type: ignore[arg-type]  # a legacy class, which no tensor is an instance of
    return cache


def check_decoding(lm: LanguageModel) -> None:
    """Decode one token after two prompts of different lengths, as answers are, and turn it into text.

    Raises:
        UserError: the model's own code, or its tokenizer's, fails.
    """
    first = pad_id(lm.tokenizer)
    try:
        ModelProbe(lm).generate([[first], [first, first]], 1)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model's own code raises
        raise UserError(
            f"model.name = {lm.name!r}: answers cannot be decoded ({first_line(error)}); "
            "set evaluate.generate = false to measure losses alone"
        ) from error


def text_of(lm: LanguageModel, ids: Sequence[int], kept: Collection[int] = ()) -> str:
    """The text of an answer up to where it ends, without special tokens but those of `kept`."""
    stops, tokenizer = stop_ids(lm), lm.tokenizer
    end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    text, start = "", 0
    for place in [*(i for i, token in enumerate(ids[:end]) if token in kept), end]:
        text += decode(tokenizer, ids[start:place], skip_special=True)
        text += decode(tokenizer, [ids[place]]) if place < end else ""
        start = place + 1
    return text


_END_OF_TURN = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|end|>",
    "<end_of_turn>",
    "<turn|>",
    "<|end_of_turn|>",
)


def stop_ids(lm: LanguageModel) -> list[int]:
    """Token ids that end an answer: the model's, the tokenizer's, and the end-of-turn marks it knows."""
    ids: set[Any] = set(lm.model.generation_config.eos_token_id or ())  # ours (`generation.of_model`)
    ids.add(lm.tokenizer.eos_token_id)
    special = set(lm.tokenizer.all_special_tokens) | set(lm.tokenizer.get_added_vocab())
    ids.update(lm.tokenizer.convert_tokens_to_ids(mark) for mark in _END_OF_TURN if mark in special)
    return sorted(token for token in ids if isinstance(token, int))
