"""Randomly made models of several families with a shared tokenizer, and corpora for them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from apiary.data.batches import Batch, Corpus, Encoded, gather
from apiary.models.loss import row_losses

_SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "eos_token_id": 1,
    "bos_token_id": None,
    "pad_token_id": 0,
}
_MAKE: dict[str, Callable[[int], PreTrainedConfig]] = {
    "llama": lambda v: LlamaConfig(vocab_size=v, **_SHAPE),
    "qwen2": lambda v: Qwen2Config(vocab_size=v, **_SHAPE),
    "qwen3": lambda v: Qwen3Config(vocab_size=v, head_dim=8, **_SHAPE),
    "gemma2": lambda v: Gemma2Config(vocab_size=v, head_dim=8, final_logit_softcapping=2.0, sliding_window=8, **_SHAPE),
    "phi3": lambda v: Phi3Config(vocab_size=v, **_SHAPE),
    "gpt2": lambda v: GPT2Config(
        vocab_size=v, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=1
    ),
}
FAMILIES = tuple(_MAKE)


def make_folder(family: str, tokenizer: Path, folder: Path) -> Path:
    """A model folder of `family`; norms and biases are random too, so that none of them drops out of a sum."""
    folder.mkdir(parents=True)
    for path in tokenizer.glob("tokenizer*"):
        shutil.copy(path, folder)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(_MAKE[family](384))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(4)
    model.save_pretrained(folder)
    return folder


def make_corpus(rows: int, seed: int = 0, longest: int = 24) -> Corpus:
    """Random tokens; the last part of each row is trained, at least one token."""
    rng = np.random.default_rng(seed)
    encoded = []
    for length in rng.integers(3, longest + 1, rows):
        trained = np.arange(length) >= rng.integers(1, length)
        encoded.append(Encoded(rng.integers(2, 320, length).astype(np.int32), trained, False))
    return gather(encoded)


def random_state(adapter: dict[str, Tensor], scale: float = 0.1) -> dict[str, Tensor]:
    """Normal values under the names and shapes of `adapter`."""
    rng = torch.Generator().manual_seed(7)
    return {n: scale * torch.randn(t.shape, generator=rng) for n, t in adapter.items()}


SEEN: list[list[int]] = []


def recording() -> Callable[[nn.Module, Batch], Tensor]:
    """An objective for `train.objective = "small_models:recording"` that notes the rows it is given."""

    def objective(model: nn.Module, batch: Batch) -> Tensor:
        SEEN.append(batch.rows.tolist())
        return row_losses(model, batch)

    return objective


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
