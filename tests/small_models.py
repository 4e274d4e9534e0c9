"""Randomly made models of several families with a shared tokenizer, and corpora for them."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
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
from apiary.models.adapters import LanguageModel
from apiary.models.loss import row_losses

SHAPE: dict[str, Any] = {
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
    "llama": lambda v: LlamaConfig(vocab_size=v, **SHAPE),
    "qwen2": lambda v: Qwen2Config(vocab_size=v, **SHAPE),
    "qwen3": lambda v: Qwen3Config(vocab_size=v, head_dim=8, **SHAPE),
    "gemma2": lambda v: Gemma2Config(vocab_size=v, head_dim=8, final_logit_softcapping=2.0, sliding_window=8, **SHAPE),
    "phi3": lambda v: Phi3Config(vocab_size=v, **SHAPE),
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
    spread(model)
    model.save_pretrained(folder)
    return folder


def spread(model: nn.Module, factor: float = 4) -> None:
    """Makes norms and biases random, and the matrices `factor` times as large; those of convolutions stay."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif "conv" not in name:
                parameter.mul_(factor)


def make_adapter(base: Path, folder: Path, moved: float, seed: int, **settings: Any) -> Path:
    """An adapter folder as plain peft writes it, of rank 4 and scale 6 / 4 unless `settings` say otherwise.

    moved: how far all factors are moved, as if they had been trained a little.
    """
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        model = get_peft_model(plain, LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 6, **settings}))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".lora_" in name:
                    parameter.add_(moved * torch.randn_like(parameter))
        model.save_pretrained(folder)
    return folder


def greedy(lm: LanguageModel, prompt: list[int], new: int, stops: list[int]) -> list[int]:
    """The most likely token, from all logits of a pass over all that there is, again and again, without a cache."""
    ids = list(prompt)
    for _ in range(new):
        with torch.no_grad():
            token = int(lm.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token in stops:
            break
        ids.append(token)
    return ids[len(prompt) :]


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
