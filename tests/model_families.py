"""Tiny random models of the families that people bring, made from the configurations of Transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import small_models
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast

VOCABULARY = 264
_SHAPE: dict[str, Any] = {**small_models.SHAPE, "vocab_size": VOCABULARY}
_OLD = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "eos_token_id": 1}
_MAMBA = {"vocab_size": VOCABULARY, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, "eos_token_id": 1}
_MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 4, "mamba_n_groups": 1}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
_LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}


class Family(NamedTuple):
    """How a model of a family is made, and why it is refused, where it is."""

    config: str  # a class of Transformers
    options: Mapping[str, Any]
    shape: Mapping[str, Any] = _SHAPE
    refused: str = ""  # part of the one line


def _grid(config: str, **options: Any) -> Family:
    return Family(config, options)


FAMILIES: dict[str, Family] = {
    "Llama": _grid("LlamaConfig"),
    "Mistral": _grid("MistralConfig", sliding_window=8),
    "Qwen2": _grid("Qwen2Config", tie_word_embeddings=True),
    "Qwen3": _grid("Qwen3Config", head_dim=8),
    "Gemma": _grid("GemmaConfig", head_dim=8),
    "Gemma 2": _grid("Gemma2Config", head_dim=8, sliding_window=8, query_pre_attn_scalar=8),
    "Gemma 3 (text)": _grid("Gemma3TextConfig", head_dim=8, sliding_window=8),
    "Gemma 3 (multimodal)": Family(
        "Gemma3Config",
        {
            "text_config": {**_SHAPE, "head_dim": 8, "sliding_window": 8},
            "vision_config": {
                **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2},
                **{"image_size": 28, "patch_size": 14},
            },
            **{"mm_tokens_per_image": 4, "image_token_index": 260, "boi_token_index": 261, "eoi_token_index": 262},
        },
        {},
    ),
    "Phi": _grid("PhiConfig", num_key_value_heads=None),
    "Phi-3": _grid("Phi3Config"),
    "GPT-2": Family("GPT2Config", {}, _OLD),
    "GPT-Neo": _grid(
        "GPTNeoConfig", num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=8
    ),
    "GPT-J": Family("GPTJConfig", {"rotary_dim": 4}, _OLD),
    "GPT-NeoX": _grid("GPTNeoXConfig"),
    "GPT-BigCode": Family("GPTBigCodeConfig", {}, _OLD),
    "CodeGen": Family("CodeGenConfig", {"rotary_dim": 4}, _OLD),
    "StarCoder2": _grid("Starcoder2Config"),
    "OPT": _grid("OPTConfig", ffn_dim=48, word_embed_proj_dim=32),
    "BLOOM": _grid("BloomConfig", n_layer=2, n_head=4),
    "MPT": Family("MptConfig", {}, {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 4}),
    "Falcon": _grid("FalconConfig", num_key_value_heads=None),
    "Falcon (ALiBi)": _grid("FalconConfig", alibi=True, multi_query=False, parallel_attn=False, bias=True),
    "StableLM": _grid("StableLmConfig"),
    "OLMo-2": _grid("Olmo2Config"),
    "Granite": _grid("GraniteConfig"),
    "Cohere": _grid("CohereConfig"),
    "Cohere 2": _grid("Cohere2Config", sliding_window=8),
    "SmolLM3": _grid("SmolLM3Config"),
    "GLM-4": _grid("Glm4Config", head_dim=8),
    "EXAONE 4": _grid("Exaone4Config", sliding_window=8),
    "Nemotron": _grid("NemotronConfig"),
    "Mixtral": _grid("MixtralConfig", num_local_experts=4),
    "Qwen2-MoE": _grid("Qwen2MoeConfig", **_MOE, shared_expert_intermediate_size=24),
    "Qwen3-MoE": _grid("Qwen3MoeConfig", **_MOE, head_dim=8, mlp_only_layers=[0]),
    "OLMoE": _grid("OlmoeConfig", num_experts=4, num_experts_per_tok=2),
    "GPT-OSS": _grid("GptOssConfig", num_local_experts=4, num_experts_per_tok=2, head_dim=8, sliding_window=8),
    "Granite-MoE": _grid("GraniteMoeConfig", num_local_experts=4, num_experts_per_tok=2),
    "DeepSeek-V3": _grid(
        "DeepseekV3Config",
        **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_key_value_heads": 4},
        **{"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, **_LATENT},
    ),
    "Llama 4 (text)": _grid(
        "Llama4TextConfig", intermediate_size_mlp=48, num_local_experts=4, head_dim=8, interleave_moe_layer_step=1
    ),
    "Mamba": Family("MambaConfig", {}, _MAMBA),
    "Mamba-2": Family("Mamba2Config", {"head_dim": 16, "num_heads": 4, "n_groups": 1}, _MAMBA),
    "Falcon-Mamba": Family("FalconMambaConfig", {}, _MAMBA),
    "Bamba": _grid("BambaConfig", **_MAMBA2, attn_layer_indices=[1]),
    "Falcon-H1": _grid("FalconH1Config", **_MAMBA2, mamba_d_ssm=64, head_dim=8),
    "Jamba": _grid(
        "JambaConfig",
        **{"num_experts": 2, "mamba_d_state": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
        **{"expert_layer_period": 2, "expert_layer_offset": 1},
    ),
    "LFM2": _grid("Lfm2Config", layer_types=["conv", "full_attention"]),
    "Qwen3-Next": _grid(
        "Qwen3NextConfig",
        **{**_MOE, **_LINEAR, "shared_expert_intermediate_size": 16, "head_dim": 8},
        layer_types=["linear_attention", "full_attention"],
    ),
    "BERT": Family("BertConfig", {}, refused="no causal language model"),
    "T5": Family(
        "T5Config",
        {"d_model": 32, "d_ff": 48, "num_layers": 1, "num_heads": 4, "d_kv": 8},
        {"vocab_size": VOCABULARY},
        refused="not a causal language model",
    ),
}


def make_tokenizer(folder: Path) -> None:
    """A tokenizer whose tokens are bytes, and which writes `<pad>` as 0 and `<eos>` as 1."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({token: n for n, token in enumerate(["<pad>", "<eos>", *alphabet])}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)


def make_folder(name: str, folder: Path) -> Path:
    """A model folder; norms and biases are random too, so that none of them drops out of a sum."""
    family = FAMILIES[name]
    make: Callable[..., PreTrainedConfig] = getattr(transformers, family.config)
    config = make(**{**family.shape, **family.options})
    make_tokenizer(folder)
    torch.manual_seed(0)
    kind = transformers.T5ForConditionalGeneration if name == "T5" else AutoModelForCausalLM
    model = kind(config) if name == "T5" else kind.from_config(config)
    small_models.spread(model, 3)
    model.save_pretrained(folder)
    return folder
