"""Reading a frozen base and its tokenizer: from the package, a folder or the hub, onto a device, in a dtype."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as progress
from transformers.utils.hub import cached_file

from apiary.config.schema import ModelConfig
from apiary.core.errors import UserError
from apiary.core.formatting import first_line
from apiary.data.tokens import settle
from apiary.models import generation
from apiary.models.generation import IF_THERE, BaseGeneration

BUILTIN = "builtin:tiny"
_PROBE = 8  # tokens
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json"),
)
_SAMPLES = 4096  # values of each tensor that go into the base's digest


def resolve_device(config: ModelConfig) -> torch.device:
    """The device that `model.device` names; `auto` is the first of CUDA, MPS and the CPU that exists.

    Raises:
        UserError: not a device name, or a device that this machine does not have.
    """
    name = config.device.strip().lower()
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    kind, colon, number = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (colon and not number.isdigit()):
        raise UserError(f"model.device = {config.device!r}: allowed are auto, cpu, cuda, cuda:N and mps")
    if kind == "mps" and not mps:
        raise UserError(f"model.device = {config.device!r}: this machine has no MPS device; use auto or cpu")
    if kind == "cuda" and not cuda:
        why = "PyTorch sees no CUDA GPU here" if torch.version.cuda else "this PyTorch is built without CUDA"
        raise UserError(f"model.device = {config.device!r}: {why}; use auto or cpu")
    if kind == "cuda" and number and int(number) >= torch.cuda.device_count():
        last = torch.cuda.device_count() - 1
        raise UserError(f"model.device = {config.device!r}: the GPUs here are cuda:0 to cuda:{last}")
    return torch.device(name)


def resolve_dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    """The dtype the base is held in and computes with; `auto` is bfloat16 only where the hardware multiplies it."""
    if config.dtype != "auto":
        return torch.float32 if config.dtype == "float32" else torch.bfloat16
    return torch.bfloat16 if _has_bfloat16(device) else torch.float32


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        # A CPU without these instructions emulates bfloat16, several times slower than float32.
        known: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
        return any(bool(known.get(name)) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return False


class Read(NamedTuple):
    """A newly read base, its tokenizer, and what it says of generation."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    generation: BaseGeneration


def read(config: ModelConfig) -> Read:
    """A newly read base, frozen and in eval mode on its device, with a generation configuration of ours.

    Raises:
        UserError: it cannot be found, reached, understood or held, or its tokenizer is not its own.
    """
    device = resolve_device(config)
    dtype = resolve_dtype(config, device)
    if config.name.startswith("builtin:"):
        model, tokenizer, said = _read_builtin(config)
    else:
        model, tokenizer, said = _read_pretrained(config, device, dtype)
    model.generation_config = generation.of_model(said.stops)
    settle(tokenizer, config.name)
    _check_vocabulary(config, model, tokenizer)
    if config.quantization == "none":
        for parameter in model.parameters():  # not the buffers: rounded RoPE frequencies would blur far positions
            parameter.data = parameter.data.to(dtype)
        nn.Module.to(model, device)
    model = model.requires_grad_(False).eval()
    _check_forward(config, model)
    return Read(model, tokenizer, said)


def _read_pretrained(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Read:
    path = Path(config.name).expanduser()
    if not path.is_dir() and (path.is_absolute() or config.name.startswith(("./", "../", "~"))):
        raise UserError(f"model.name = {config.name!r}: no such folder")
    source = str(path) if path.is_dir() else config.name
    # With a configuration given, the base's own is not read: one that Transformers refuses is no reason to refuse it.
    options: dict[str, Any] = {"dtype": dtype, "generation_config": GenerationConfig(), **_quantized(config, device)}
    try:
        if not path.is_dir():
            ask_hub(config.name, config.revision)
        with _quiet_if(path.is_dir()):
            tokenizer = _tokenizer_of(source, config.revision)
            model = AutoModelForCausalLM.from_pretrained(
                source, revision=config.revision, trust_remote_code=False, **options
            )
            said = generation.read(source, config.revision, _rows(model))
    except torch.cuda.OutOfMemoryError:
        raise UserError(f"model.name = {config.name!r}: does not fit on {device}; try model.quantization=nf4") from None
    except Exception as error:  # the hub's and the model classes' errors share no other base
        raise UserError(_unreachable(config, path.is_dir(), error)) from error
    return Read(model, tokenizer, said)


def _tokenizer_of(source: str, revision: str | None) -> PreTrainedTokenizerBase:
    """A tokenizer, without the token that Transformers adds to it where padding in its file names one it does not have.

    That one has no row in the embedding, and nobody here pads with it.
    """
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, **options)
    padding = getattr(getattr(tokenizer, "backend_tokenizer", None), "padding", None)
    if padding is None or padding["pad_token"] != tokenizer.pad_token or tokenizer.pad_token_id != len(tokenizer) - 1:
        return tokenizer
    without: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, **options, pad_token=None)
    return without if len(without) < len(tokenizer) else tokenizer


def ask_hub(name: str, revision: str | None) -> None:
    """One short question about a model that is not cached.

    It fails at once where the hub's own client would try for a minute, with whichever error that client raises.
    """
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    cached = try_to_load_from_cache(name, "config.json", revision=revision)
    if not constants.HF_HUB_OFFLINE and not isinstance(cached, str):
        HfApi().model_info(name, revision=revision, timeout=10)


@contextmanager
def _quiet_if(local: bool) -> Iterator[None]:
    """No progress bars for a folder; a download keeps its own."""
    silence = local and progress.is_progress_bar_enabled()
    if silence:
        progress.disable_progress_bar()
    try:
        yield
    finally:
        if silence:
            progress.enable_progress_bar()


def _read_builtin(config: ModelConfig) -> Read:
    if config.name != BUILTIN:
        raise UserError(f"model.name = {config.name!r}: the only built-in model is {BUILTIN!r}")
    if config.quantization != "none":
        raise UserError(f"model.quantization = {config.quantization!r}: {BUILTIN} is too small to quantize; use none")
    from apiary.models.tiny import load_tiny

    model, tokenizer = load_tiny()
    made = model.config.to_dict()
    return Read(model, tokenizer, BaseGeneration(None, made, generation.stops_of(made, len(tokenizer))))


def _quantized(config: ModelConfig, device: torch.device) -> dict[str, Any]:
    if config.quantization == "none":
        return {}
    key = f"model.quantization = {config.quantization!r}"
    if device.type != "cuda":
        raise UserError(f"{key}: needs a CUDA GPU, and the device here is {device}; use none")
    try:
        import bitsandbytes  # type: ignore[import-not-found,unused-ignore]  # noqa: F401
    except ImportError:
        raise UserError(f"{key}: needs the package bitsandbytes (pip install bitsandbytes)") from None
    from transformers import BitsAndBytesConfig

    if config.quantization == "int8":
        quantization = BitsAndBytesConfig(load_in_8bit=True)
    else:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=resolve_dtype(config, device),
        )
    return {"quantization_config": quantization, "device_map": {"": device}}


def _unreachable(config: ModelConfig, is_folder: bool, error: Exception) -> str:
    reason = first_line(error)
    name = f"model.name = {config.name!r}" + (f" (revision {config.revision!r})" if config.revision else "")
    if "trust_remote_code" in str(error):
        return (
            f"{name}: brings Python code of its own, which is never run here; use a model that Transformers has itself"
        )
    if is_folder:
        return f"{name}: not a causal language model that Transformers can read ({reason})"
    fix = "is it a folder that does not exist? does the hub id need `hf auth login`? is this machine offline?"
    return f"{name}: cannot be loaded ({reason}); {fix}"


def save_tokenizer_files(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the base's tokenizer into a folder, for other programs to read it just as they read the base's.

    Its files as they stand, for the tokenizer in hand is without the chance and the padding that they may set. Where
    they do not name its class, so that a folder without config.json could not be read, Transformers writes them.
    """
    if config.name.startswith("builtin:"):
        tokenizer.save_pretrained(folder)
        return
    path = Path(config.name).expanduser()
    source, where = (str(path) if path.is_dir() else config.name), {"revision": config.revision}
    vocabulary = {"tokenizer.json", *type(tokenizer).vocab_files_names.values()}
    several = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    names = {*_TOKENIZER_FILES, *vocabulary, *(f"additional_chat_templates/{name}.jinja" for name in several)}
    found = {name: cached_file(source, name, **where, **IF_THERE) for name in sorted(names)}
    settings = found["tokenizer_config.json"]
    named = settings is not None and '"tokenizer_class"' in Path(settings).read_text(encoding="utf-8")
    if named and any(found[name] for name in vocabulary):
        for name, file in found.items():
            if file is not None:
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(file, folder / name)
        return
    AutoTokenizer.from_pretrained(source, **where, trust_remote_code=False).save_pretrained(folder)


def _check_vocabulary(config: ModelConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None:
        raise UserError(f"model.name = {config.name!r}: has no language-model head, so it cannot write answers")
    rows = getattr(embedding, "num_embeddings", None)
    if isinstance(rows, int) and len(tokenizer) > rows:
        raise UserError(
            f"model.name = {config.name!r}: its tokenizer has {len(tokenizer)} tokens and its embedding {rows} rows; "
            "they do not belong together"
        )


def _rows(model: PreTrainedModel) -> int:
    """How many token ids the model knows."""
    return len(model.get_input_embeddings().weight)  # type: ignore[arg-type]


def _check_forward(config: ModelConfig, model: PreTrainedModel) -> None:
    """Check that token ids alone give logits, and that no token changes what stands before it.

    Rows are padded on the right without an attention mask (`apiary.models.loss`), which is right for such models alone.

    Raises:
        UserError: they do not.
    """
    name = f"model.name = {config.name!r}"
    rows = _rows(model)
    ids = (torch.arange(2, 2 + _PROBE) % rows).repeat(2, 1)
    ids[1, -1] = (ids[1, -1] + 1) % rows
    try:
        with torch.inference_mode():
            logits = model(input_ids=ids.to(model.device), use_cache=False).logits.float()
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model's own code raises
        raise UserError(f"{name}: its forward needs more than token ids ({first_line(error)})") from error
    moved = (logits[0] - logits[1]).abs().amax(-1)
    # Experts of different batches are summed in different orders: what is rounded is no look ahead.
    if moved[:-1].max() > (1e-3 if model.dtype is torch.float32 else 5e-2) * moved[-1]:
        raise UserError(
            f"{name}: a token changes what the model says before it, so it is no causal language model (is "
            "`is_decoder` missing in its config.json?)"
        )


def base_digest(model: nn.Module, quantization: str = "none") -> str:
    """A SHA-256 over names, shapes and evenly spaced values of all frozen weights (16 hex digits).

    Values are compared as bfloat16, so a base held in float32 and its rounded copy on a GPU agree. Of
    quantized layers only name and kind count: how their bytes are packed is the business of the
    library and the card.
    """
    hasher = hashlib.sha256(quantization.encode())
    for name, tensor in sorted(model.named_parameters()):
        if not tensor.is_floating_point():
            hasher.update(f"\n{name} packed".encode())
            continue
        flat = tensor.detach().reshape(-1)
        count = min(_SAMPLES, flat.numel())
        # Integer arithmetic: a floating-point linspace would pick other places on other devices.
        places = torch.arange(count, device=flat.device) * flat.numel() // max(count, 1)
        values = flat[places].to(torch.bfloat16).view(torch.int16).cpu().numpy()
        hasher.update(f"\n{name} {tuple(tensor.shape)}".encode())
        hasher.update(values.tobytes())
    return hasher.hexdigest()[:16]
