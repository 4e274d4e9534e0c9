"""Adapters whose products are weighed by the input: W x + alpha(x) s B A x + (1 - alpha(x)) D x in each module.

D is what the adapter's state adds to the base, and alpha(x) = sigmoid(<g, x>) with a gate g of (1, d_in) for each
module: the first of the two outputs of softmax(G x), for g the difference of the rows of G (2, d_in). Such a state is
one for `apiary.models.adapters.set_adapter`, and for nobody else: no tool that adds one matrix to a weight can hold it.
`fixed` makes of it one that every tool takes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from apiary.core import lora
from apiary.core.errors import UserError
from apiary.core.lora import Factors
from apiary.core.tensors import StateDict, generator
from apiary.data.batches import Corpus, collate, plan_batches
from apiary.models import adapters, experts
from apiary.models.adapters import LanguageModel, autocast, pad_id
from apiary.models.fused_layers import note_gate
from apiary.models.loss import row_losses, to_device

_T = TypeVar("_T")
_SAMPLE = 32  # rows that are enough for the mean of a number between 0 and 1 over all their tokens
_BATCH_TOKENS = 4096  # padded

FIXED = (
    "\nThe model that this adapter stands for weighs two products in each layer, its client's own and the mean of the "
    "others', by the layer's input. No adapter file can hold that: here each layer has the mean of its weights over "
    "training rows of the client, whatever the input. The table of the run is of the models that weigh.\n"
)
"""A paragraph for the card of what `fixed` made."""


def check(lm: LanguageModel, key: str) -> None:
    """Check that every module with an adapter can have a gate.

    Args:
        lm: the model.
        key: what asks for gates, for the error.

    Raises:
        UserError: the adapter is also on experts whose weights are one parameter.
    """
    found = {lora.module_of(name) for name in lm.adapter}
    if stacked := sorted(module for module in found if experts.place(lm.model, module)):
        raise UserError(
            f"{key}: {lm.name} keeps the weights of its experts in one parameter (here {stacked[0]!r}), whose adapters "
            "cannot be weighed by their input; name adapter.targets without them, such as "
            '["q_proj", "k_proj", "v_proj", "o_proj"]'
        )


def sample(rows: Sequence[_T]) -> list[_T]:
    """Up to 32 of a client's rows, evenly spread, over which `fixed` takes its mean."""
    places = np.linspace(0, len(rows) - 1, min(_SAMPLE, len(rows))).round().astype(int)
    return [rows[i] for i in places]


def fixed(lm: LanguageModel, state: StateDict, corpus: Corpus) -> StateDict:
    """A state without gates: each module weighs by the mean of its alpha(x) over all tokens of a corpus.

    B is scaled by that mean, and what is added to the base by what it lacks to 1. With an empty corpus the mean counts
    as 1/2. A state without gates is returned as it is. The model holds the given state from then on.

    Args:
        lm: the model.
        state: as for `set_adapter`.
        corpus: the rows.
    """
    whole, base_delta = lora.parts(state)
    adapter, gates = lora.ungated(whole)
    if not gates:
        return state
    weights = means(lm, state, corpus)
    own = {m: Factors(f.b * weights.get(m, 1.0), f.a) for m, f in lora.split(adapter).items()}
    added = {m: Factors(f.b * (1 - weights.get(m, 0.0)), f.a) for m, f in lora.split(base_delta).items()}
    return lora.whole(lora.join(own), lora.join(added))


def means(lm: LanguageModel, state: StateDict, corpus: Corpus) -> dict[str, float]:
    """The mean of alpha(x) over all tokens of a corpus, by module; 1/2 with an empty one.

    Where a module does not see its inputs as rows of tokens, as experts that are layers by themselves do not, it is the
    mean over all that it sees, padding included.
    """
    adapters.set_adapter(lm, state)
    modules = [lora.module_of(name) for name in lm.gates]
    layers = {module: lm.model.get_submodule(module) for module in modules}
    sums = {module: [0.0, 0.0] for module in modules}
    real = torch.zeros(0)

    def note(module: str, alpha: Tensor) -> None:
        alpha = alpha[..., 0]
        mask = real if alpha.shape == real.shape else torch.ones_like(alpha)
        sums[module][0] += float((alpha * mask).sum())
        sums[module][1] += float(mask.sum())

    for module, layer in layers.items():
        note_gate(layer, functools.partial(note, module))
    try:
        with torch.inference_mode(), autocast(lm):
            for rows in plan_batches(corpus.lengths, _BATCH_TOKENS, generator(0, "gates")):
                batch = to_device(collate(corpus, rows, pad_id(lm.tokenizer)), lm.device)
                columns = torch.arange(batch.ids.shape[1])
                real = (columns < torch.from_numpy(corpus.lengths[rows])[:, None]).float().to(lm.device)
                row_losses(lm.model, batch)
    finally:
        for layer in layers.values():
            note_gate(layer, None)
    return {module: total / count if count else 0.5 for module, (total, count) in sums.items()}
