"""The only door from data to a model: losses of examples, and answers to prompts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch

from apiary.core.tensors import generator
from apiary.data.batches import Corpus, collate, plan_batches
from apiary.models.adapters import LanguageModel, autocast, pad_id
from apiary.models.loss import row_losses, to_device


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
        batch_tokens: padded tokens in one forward pass.
    """

    def __init__(self, lm: LanguageModel, batch_tokens: int = 8192) -> None:
        self._lm = lm
        self._batch_tokens = batch_tokens

    def losses(self, corpus: Corpus) -> tuple[np.ndarray, np.ndarray]:
        """Summed nats (n,) float64 and response tokens (n,) int64 of each example."""
        nats, tokens = np.zeros(len(corpus)), np.zeros(len(corpus), np.int64)
        pad = pad_id(self._lm.tokenizer)
        with torch.inference_mode(), autocast(self._lm):
            for rows in plan_batches(corpus.lengths, self._batch_tokens, generator(0, "probe")):
                batch = to_device(collate(corpus, rows, pad), self._lm.device)
                nats[rows] = row_losses(self._lm.model, batch).double().cpu().numpy()
                tokens[rows] = batch.targets.sum(1).cpu().numpy()
        return nats, tokens

    def generate(self, prompts: list[list[int]], max_new_tokens: int) -> list[str]:
        """The greedy answer to each prompt, decoded without special tokens, in order."""
        answers = [""] * len(prompts)
        order = sorted((i for i, ids in enumerate(prompts) if ids), key=lambda i: len(prompts[i]))
        for chosen in self._groups(order, prompts, max_new_tokens):
            for index, text in zip(chosen, self._answer([prompts[i] for i in chosen], max_new_tokens), strict=True):
                answers[index] = text
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

    def _answer(self, prompts: list[list[int]], max_new_tokens: int) -> list[str]:
        lm, width, pad = self._lm, max(map(len, prompts)), pad_id(self._lm.tokenizer)
        # Decoding appends on the right, so here the padding is on the left, and the mask is needed:
        # generate() counts positions from each prompt's own first token.
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=lm.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=lm.device)
        stops = stop_ids(lm)
        with torch.inference_mode(), autocast(lm):
            out = lm.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=pad,
                eos_token_id=stops or None,
            )
        return [self._text(row, stops) for row in out[:, width:].tolist()]

    def _text(self, ids: list[int], stops: list[int]) -> str:
        end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
        return str(self._lm.tokenizer.decode(ids[:end], skip_special_tokens=True))


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
    config = getattr(lm.model, "generation_config", None)
    listed = getattr(config, "eos_token_id", None)
    found = set(listed if isinstance(listed, list) else [listed])
    found.add(lm.tokenizer.eos_token_id)
    special = set(lm.tokenizer.all_special_tokens) | set(lm.tokenizer.get_added_vocab())
    found.update(lm.tokenizer.convert_tokens_to_ids(mark) for mark in _END_OF_TURN if mark in special)
    return sorted(token for token in found if isinstance(token, int))
