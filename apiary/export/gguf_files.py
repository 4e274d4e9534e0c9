"""GGUF files for llama.cpp: an adapter, or a merged model with its tokenizer.

The architectures are those whose files were held to llama.cpp itself (docs/serving.md); others are refused by name.
Tensors have the names and the layout of llama.cpp's own converters. Its llama architecture turns neighbouring pairs of
a head's entries by one angle in its rotary embedding (Su et al. 2021), where Transformers turns entry i with entry
i + d/2, so there the rows of q and k are put in another order, those of their factors B likewise.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from apiary.core import lora
from apiary.core.errors import UserError
from apiary.export import gguf_tokenizer
from apiary.models.adapter_files import Written
from apiary.models.adapters import PREFIX


class _Architecture(NamedTuple):
    """How llama.cpp has a family of Transformers."""

    name: str
    permuted: bool  # whether rows of q and k stand in the order of pairs


_ARCHITECTURES = {
    "llama": _Architecture("llama", True),
    "mistral": _Architecture("llama", True),
    "qwen2": _Architecture("qwen2", False),
    "qwen3": _Architecture("qwen3", False),
}


def require() -> Any:
    """The package gguf.

    Raises:
        UserError: it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise UserError("--gguf: needs the package gguf (pip install 'apiary[gguf]')") from None
    return gguf


def check(config: Any) -> None:
    """Check that a base can be written as llama.cpp has it.

    Args:
        config: the base's configuration in Transformers.

    Raises:
        UserError: it cannot, with what stands against it.
    """
    known = _ARCHITECTURES.get(config.model_type)
    say = f"--gguf: {config.model_type}"
    if known is None:
        raise UserError(
            f"{say} is not one of the architectures written here ({', '.join(_ARCHITECTURES)}); export with --merge "
            "and convert the folder with llama.cpp's convert_hf_to_gguf.py"
        )
    rope = config.rope_parameters
    if (kind := rope.get("rope_type", "default")) not in ("default", "linear", "llama3"):
        raise UserError(f"{say}: rope_type = {kind!r} is not written here; possible are default, linear and llama3")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"{say}: llama.cpp turns whole heads; partial_rotary_factor = {rope['partial_rotary_factor']}")
    if config.hidden_act not in ("silu", "swish"):
        raise UserError(f"{say}: llama.cpp has SiLU there, and this model has hidden_act = {config.hidden_act!r}")


def remark(config: Any) -> list[str]:
    """What llama.cpp does otherwise with this base."""
    window = getattr(config, "sliding_window", None)
    if window is None or not getattr(config, "use_sliding_window", True):
        return []
    return [f"llama.cpp has no sliding window for {config.model_type}: answers differ past {window} tokens"]


def write_adapter(written: Written, config: Any, file: Path) -> None:
    """A LoRA adapter as `llama-server --lora` takes it, in float32.

    llama.cpp scales by alpha / rank, so alpha is scale * rank here whatever the PEFT folder says.

    Raises:
        UserError: a module that llama.cpp has no name for, or no adapter on.
    """
    gguf = require()
    writer = gguf.GGUFWriter(str(file), _ARCHITECTURES[config.model_type].name)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", written.scale * written.rank)
    names = _names(gguf, config)
    for module, (b, a) in lora.split(written.factors).items():
        path = module.removeprefix(PREFIX)
        name = names(f"{path}.weight")
        if name is None or name == "output.weight" or name == "token_embd.weight":
            raise UserError(f"--gguf: llama.cpp has no adapter on {path!r}; export with --merge --gguf")
        writer.add_tensor(f"{name}.lora_a", _array(a))
        writer.add_tensor(f"{name}.lora_b", _array(_rows(config, path, b)))
    _finish(writer)


def read_adapter(file: Path, modules: list[str], config: Any) -> dict[str, lora.Factors]:
    """The factors in a file that `write_adapter` wrote, by module; their product has the scale in it.

    Args:
        file: the GGUF file.
        modules: whose factors are looked for.
        config: of the base.

    Raises:
        KeyError: the file lacks a module.
    """
    gguf = require()
    reader = gguf.GGUFReader(str(file))
    tensors = {t.name: torch.from_numpy(np.array(t.data)) for t in reader.tensors}
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    names, found = _names(gguf, config), {}
    for module in modules:
        path = module.removeprefix(PREFIX)
        name = names(f"{path}.weight")
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        found[module] = lora.Factors(_rows(config, path, b, back=True) * (alpha / len(a)), a)
    return found


def write_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, file: Path, kind: str) -> None:
    """A model with its tokenizer as `llama-server -m` takes it.

    Args:
        model: a merged model on the CPU.
        tokenizer: its own.
        file: where to.
        kind: of the matrices, f32, f16, bf16 or q8_0. Vectors stay in float32; a matrix whose rows q8_0 cannot divide
            into blocks of 32 is f16.

    Raises:
        UserError: llama.cpp cannot have the model or its tokenizer.
    """
    gguf = require()
    config = model.config
    check(config)
    writer = gguf.GGUFWriter(str(file), _ARCHITECTURES[config.model_type].name)
    writer.add_type("model")
    _add_shape(writer, config)
    file_type = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}[kind]
    writer.add_file_type(gguf.LlamaFileType[file_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    gguf_tokenizer.add(writer, tokenizer, len(model.get_input_embeddings().weight))  # type: ignore[arg-type]
    if (factors := _rope_factors(model)) is not None:
        writer.add_tensor("rope_freqs.weight", _array(factors))
    names = _names(gguf, config)
    for path, tensor in model.state_dict().items():
        if path == "lm_head.weight" and config.tie_word_embeddings:
            continue
        name = names(path)
        if name is None:
            raise UserError(f"--gguf: llama.cpp has no tensor for {path!r} of {config.model_type}")
        data, stored = _stored(gguf, _array(_rows(config, path.rpartition(".")[0], tensor)), kind)
        writer.add_tensor(name, data, raw_dtype=stored)
    _finish(writer)


def round_matrices(model: PreTrainedModel, kind: str) -> None:
    """Rounds a model's matrices, in place, as `write_model` rounds them."""
    gguf = require()
    with torch.no_grad():
        for parameter in model.parameters():
            data, stored = _stored(gguf, _array(parameter), kind)
            parameter.copy_(torch.from_numpy(gguf.quants.dequantize(data, stored)))


def _stored(gguf: Any, data: np.ndarray, kind: str) -> tuple[np.ndarray, Any]:
    types = gguf.GGMLQuantizationType
    if data.ndim == 1:
        return data, types.F32
    if kind == "q8_0" and data.shape[-1] % 32:
        kind = "f16"
    stored = types[kind.upper()]
    return gguf.quants.quantize(data, stored), stored


def _names(gguf: Any, config: Any) -> Any:
    """A function from the names of Transformers to llama.cpp's; None where there is none."""
    architecture = next(
        key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == _ARCHITECTURES[config.model_type].name
    )
    known = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    return lambda name: known.get_name(name, try_suffixes=(".weight", ".bias"))


def _rows(config: Any, path: str, x: Tensor, *, back: bool = False) -> Tensor:
    """A weight or bias (d_out, ...) or a factor B (d_out, r) with its rows as llama.cpp has them; `back` undoes it."""
    if not _ARCHITECTURES[config.model_type].permuted or not path.endswith((".q_proj", ".k_proj")):
        return x
    heads = config.num_attention_heads if path.endswith(".q_proj") else config.num_key_value_heads
    halves = (-1, 2) if back else (2, -1)  # from (half, entry) to (entry, half), or the other way
    return x.reshape(heads, *halves, *x.shape[1:]).transpose(1, 2).reshape(x.shape)


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _add_shape(writer: Any, config: Any) -> None:
    rope = config.rope_parameters
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_rope_dimension_count(_head_dim(config))
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(require().RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _rope_factors(model: PreTrainedModel) -> Tensor | None:
    """What Llama 3.1's scaling divides each frequency of the rotary embedding by, (d / 2,); None without it."""
    rope: Any = model.config.rope_parameters
    if rope.get("rope_type") != "llama3":
        return None
    width = _head_dim(model.config)
    plain = rope["rope_theta"] ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)
    scaled: Any = model.get_decoder().rotary_emb.inv_freq
    return plain / scaled.cpu()  # type: ignore[no-any-return]


def _array(x: Tensor) -> np.ndarray:
    return np.ascontiguousarray(x.detach().to("cpu", torch.float32).numpy())


def _finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
