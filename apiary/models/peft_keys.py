"""An adapter folder as it lies on disk: `adapter_config.json` key by key, and the tensors beside it.

Every key is honoured, of no bearing on what the adapter computes, or refused by its name. No model is needed for that.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from apiary.core.errors import UserError
from apiary.core.formatting import first_line

CONFIG: Final = "adapter_config.json"
SAFE, PICKLED = "adapter_model.safetensors", "adapter_model.bin"
PISSA, OLORA = "pissa", "olora"
_MOST: Final = 1e30  # of an alpha: far from where products of float32 are no numbers

HONOURED: Final = (
    *("peft_type", "task_type", "base_model_name_or_path", "revision"),
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters"),
    "init_lora_weights",
)
"""Keys that say what an adapter computes, on what."""

NO_BEARING: Final = (
    *("inference_mode", "auto_mapping", "peft_version", "megatron_core", "runtime_config", "lora_dropout"),
    "fan_in_fan_out",  # peft sets it itself, by the kind of the layer
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # of a start: `init_lora_weights` decides
    "qalora_group_size",  # of `use_qalora`
    "ensure_weight_tying",  # of embeddings and tied heads, which are refused by the keys that name them
)
"""Keys that change nothing in a finished adapter, whatever their value."""

REFUSED: Final[Mapping[str, str]] = {
    "modules_to_save": "whole modules were trained beside the adapter, and only factors are read",
    "trainable_token_indices": "embeddings of tokens were trained beside the adapter, and only factors are read",
    "bias": "biases of the base were trained beside the adapter, and only factors are read",
    "lora_bias": "its factors B have biases, which no product of factors is",
    "use_dora": "DoRA scales whole columns of the weight, which no product of factors does",
    "use_qalora": "QALoRA pools the inputs, so its factors fit no other base than its quantized one",
    "use_bdlora": "block-diagonal factors are laid out for a server of their own",
    "alora_invocation_tokens": "it adapts only what follows its invocation, and would here adapt all",
    "arrow_config": "it routes between several adapters",
    "kasa_config": "KaSA cuts the base's own weights and scales the factors in between",
    "velora_config": "VeLoRA keeps tensors beside the factors",
    "monteclora_config": "its factors are drawn at random around what is stored",
    "layer_replication": "it repeats layers of the base",
    "megatron_config": "it is made for Megatron's parallel layers",
}
"""Keys that must be unset, and why."""

_UNSET: Final[Mapping[str, str]] = {"bias": "none"}  # what a key of `REFUSED` may be beside null, false and empty
_CONVERT = (
    "; where it was trained, save it again with save_pretrained(..., path_initial_model_for_weight_conversion=...), "
    "which makes a plain LoRA of it"
)
_STARTS: Final[Mapping[str, str]] = {
    "corda": f"CorDA changed the base by statistics of data that are not here{_CONVERT}",
    "lora_ga": f"LoRA-GA changed the base by gradients that are not here{_CONVERT}",
    "loftq": "LoftQ quantized the base in a way of its own; merge it where it was trained, and give the merged model",
}
_FACTOR = re.compile(r"\.lora_[AB]\.weight$")


class PeftFolder(NamedTuple):
    """What an adapter folder says."""

    path: Path
    values: Mapping[str, Any]  # of the keys in `HONOURED` that are there
    remarks: tuple[str, ...]  # what is known of it and not used, a line each, without paths: they stand in logs

    @property
    def base(self) -> str | None:
        """The base that it names: a hub id or a folder."""
        name = self.values.get("base_model_name_or_path")
        inside = isinstance(name, str) and bool(name) and not os.path.exists(name) and os.path.isdir(self.path / name)
        return str(self.path / str(name)) if inside else (name or None)

    @property
    def start(self) -> str:
        """The start by which training changed the base: pissa, olora, or "" for one that left it alone."""
        name = str(self.values.get("init_lora_weights", True)).lower()
        return name if name in (PISSA, OLORA) else ""


def read_folder(path: Path) -> PeftFolder:
    """The settings of an adapter folder, each key of them checked.

    Raises:
        UserError: it is no adapter folder, or a key has a value that cannot be honoured.
    """
    where = repr(str(path))
    if not path.is_dir():
        raise UserError(f"{where}: no such folder")
    if not (path / CONFIG).is_file():
        inner = sorted(p.parent.name for p in path.glob(f"*/{CONFIG}"))
        hint = f"; its folder {inner[0]!r} is one, give that" if inner else ""
        raise UserError(f"{where} is no adapter folder: it has no {CONFIG}{hint}")
    try:
        values = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{where}: {CONFIG} cannot be read: {first_line(error)}") from None
    if not isinstance(values, dict):
        raise UserError(f"{where}: {CONFIG} holds no settings but {type(values).__name__}")
    if problem := next(_problems(values), None):
        raise UserError(f"{where}: {CONFIG}: {problem}")
    unknown = values.keys() - {*HONOURED, *NO_BEARING, *REFUSED}
    remarks = [f"{CONFIG}: {key!r} is not known here; it is unset, so it is left aside" for key in unknown]
    if (path / "chat_template.jinja").exists() or (path / "tokenizer_config.json").exists():
        remarks.append("the tokenizer and its template are those of the base, not the ones in this folder")
    return PeftFolder(path, {k: v for k, v in values.items() if k in HONOURED}, tuple(sorted(remarks)))


def _problems(values: Mapping[str, Any]) -> Iterator[str]:
    """What cannot be honoured, a line for each key."""
    kind = values.get("peft_type")
    if kind != "LORA":
        yield f"peft_type = {_shown(kind)}: only LORA adapters can be opened"
        return
    if (task := values.get("task_type")) not in (None, "CAUSAL_LM"):
        yield f"task_type = {_shown(task)}: only CAUSAL_LM adapters can be opened"
    for key, value in values.items():
        if key in REFUSED and value and value != _UNSET.get(key):
            yield f"{key} = {_shown(value)}: {REFUSED[key]}"
        if key not in (*HONOURED, *NO_BEARING, *REFUSED) and value:
            yield f"{key} = {_shown(value)}: this key of another version of peft is not known here, so it is refused"
    for key in ("base_model_name_or_path", "revision"):
        if not isinstance(values.get(key), str | None):
            yield f"{key} = {_shown(values[key])}: must be a text or null"
    yield from _wrong_numbers(values)
    start = values.get("init_lora_weights", True)
    name = str(start).lower()
    if name in _STARTS:
        yield f"init_lora_weights = {_shown(start)}: {_STARTS[name]}"
    elif name.startswith("pissa_"):
        yield f"init_lora_weights = {_shown(start)}: its change of the base was drawn at random{_CONVERT}"
    elif not isinstance(start, bool) and name not in ("gaussian", "eva", "orthogonal", "mica", PISSA, OLORA):
        yield f"init_lora_weights = {_shown(start)}: this start is not known here, and may have changed the base"


def _wrong_numbers(values: Mapping[str, Any]) -> Iterator[str]:
    ranks = {"r": values.get("r", 8), **_pattern(values, "rank_pattern")}
    alphas = {"lora_alpha": values.get("lora_alpha", 8), **_pattern(values, "alpha_pattern")}
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(values.get(key) or {}, dict):
            yield f"{key} = {_shown(values[key])}: must be a table of names or patterns"
    for name, rank in ranks.items():
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            key = "r" if name == "r" else f"rank_pattern[{name!r}]"
            yield f"{key} = {_shown(rank)}: must be a whole number from 1"
    for name, alpha in alphas.items():
        whole = isinstance(alpha, int | float) and not isinstance(alpha, bool) and abs(alpha) <= _MOST
        if not whole or (name == "lora_alpha" and alpha < 1 / _MOST):
            key = "lora_alpha" if name == "lora_alpha" else f"alpha_pattern[{name!r}]"
            yield f"{key} = {_shown(alpha)}: must be a number" + (" above 0" if name == "lora_alpha" else "")


def _pattern(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = values.get(key) or {}
    return found if isinstance(found, dict) else {}


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


class Tensors(NamedTuple):
    """What the file of an adapter folder holds."""

    factors: Mapping[str, Tensor]  # CPU float32, by name
    others: Mapping[str, Tensor]  # what is no factor
    remarks: tuple[str, ...]  # what there is to say, a line each


def read_tensors(folder: PeftFolder) -> Tensors:
    """The tensors of an adapter folder.

    A pickle is read as plain tensors alone, as peft does: nothing in it runs.

    Raises:
        UserError: there is no file of them, it cannot be read, it holds no factor, or one that is no finite matrix.
    """
    path, remarks = folder.path, list[str]()
    where = repr(str(path))
    if (path / SAFE).is_file():
        name = SAFE
        try:
            tensors: dict[str, Tensor] = load_file(path / SAFE)
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{where}: {SAFE} cannot be read: {first_line(error)}") from None
    elif (path / PICKLED).is_file():
        name = PICKLED
        remarks.append(f"{PICKLED} is read as plain tensors; nothing else in it would be")
        tensors = _unpickled(path / PICKLED, where)
    else:
        parts = sorted(p.name for p in path.glob("adapter_model*"))
        hint = f"{parts[0]!r} is a part of one; join the parts where it was made" if parts else f"it has no {SAFE}"
        raise UserError(f"{where}: no adapter: {hint}")
    plain = {re.sub(r"(\.lora_[AB])\.default\.weight$", r"\1.weight", key): t for key, t in tensors.items()}
    if plain.keys() != tensors.keys():
        remarks.append(f"{name}: 'default' is taken out of its names, where peft itself writes none")
    factors = {key: tensor.float() for key, tensor in plain.items() if _FACTOR.search(key)}
    for key, tensor in factors.items():
        if tensor.ndim != 2 or not tensor.numel():
            what = "was saved before its shards were gathered" if tensor.ndim < 2 else "is no matrix"
            raise UserError(f"{where}: {name}: {key!r} of shape {tuple(tensor.shape)} {what}")
        if not torch.isfinite(tensor).all():
            raise UserError(f"{where}: {name}: {key!r} holds values that are no finite numbers")
    if not factors:
        raise UserError(f"{where}: {name} holds no factors of an adapter")
    return Tensors(factors, {key: t for key, t in plain.items() if key not in factors}, tuple(remarks))


def _unpickled(file: Path, where: str) -> dict[str, Tensor]:
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a broken or hostile pickle raises
        raise UserError(
            f"{where}: {PICKLED} cannot be read as plain tensors ({first_line(error)}); save it as {SAFE}"
        ) from None
    if not isinstance(found, dict) or not all(
        isinstance(key, str) and isinstance(t, Tensor) and t.layout is torch.strided and not t.is_meta
        for key, t in found.items()
    ):
        raise UserError(f"{where}: {PICKLED} holds something else than dense tensors by name")
    return found
