"""Tiny random models with trained byte-level BPE tokenizers, as the families that llama.cpp serves have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import small_models
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

TEXTS = (
    "The bees of 3 hives made 12345 jars, didn't they? WE'LL see:\n\n   two  spaces\tand a tab.\r\n",
    "Ünïcode ist schön ✅ 🦙🦙 нещо на Български 我想在 apple 工作 3.14 1,000",
    "def f(x):\n    return x**2  # I've 'LL don'T\n\n\n\n",
)
SHAPE: dict[str, Any] = {
    **small_models.SHAPE,
    "vocab_size": 328,  # eight rows more than there are tokens
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
}
TOKENS = 320
_LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 64,
}


class Served(NamedTuple):
    """How a model is made: a class of Transformers, its options, and how its tokenizer splits text."""

    config: str
    options: dict[str, Any]
    pre: str  # as llama.cpp calls it
    bos: bool = False


SERVED = {
    "Llama": Served("LlamaConfig", {"attention_bias": True, "mlp_bias": True}, "smollm"),
    "Llama 3.1": Served(
        "LlamaConfig", {"tie_word_embeddings": True, "rope_parameters": _LLAMA3}, "llama-bpe", bos=True
    ),
    "Llama, linear positions": Served(
        "LlamaConfig", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}, "gpt-2"
    ),
    "Mistral": Served("MistralConfig", {"sliding_window": None, "head_dim": 32}, "gpt-2"),
    "Qwen2": Served("Qwen2Config", {"tie_word_embeddings": True}, "qwen2"),
    "Qwen3": Served("Qwen3Config", {"head_dim": 32}, "qwen2"),
}
# As the tokenizer.json files of Llama 3 and Qwen2 have them.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")


def make_tokenizer(pre: str, bos: bool = False, pattern: str = "") -> Any:
    """A tokenizer trained on `TEXTS`; pattern: to split by, in the place of the family's own."""
    core = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    digits, plain = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    by = pattern or {"llama-bpe": LLAMA3, "qwen2": QWEN2}.get(pre, "")
    if by:
        whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(by), "isolated"), whole])
    else:
        core.pre_tokenizer = pre_tokenizers.Sequence([digits, plain]) if pre == "smollm" else plain
    core.decoder = decoders.ByteLevel()
    special = ["<pad>", "<eos>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS, special_tokens=special, initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    core.train_from_iterator([" ".join(TEXTS) * 3], trainer)
    assert core.get_vocab_size() == TOKENS
    if bos:
        first = [("<|im_start|>", 2)]
        core.post_processor = processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=first)
    names = {"pad_token": "<pad>", "eos_token": "<eos>", **({"bos_token": "<|im_start|>"} if bos else {})}
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


def make_folder(name: str, folder: Path) -> Path:
    """A model folder; norms and biases are random too, so that none of them drops out of a sum."""
    served = SERVED[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, served.config)(**{**SHAPE, **served.options}))
    small_models.spread(model)
    model.save_pretrained(folder)
    make_tokenizer(served.pre, served.bos).save_pretrained(folder)
    return folder
