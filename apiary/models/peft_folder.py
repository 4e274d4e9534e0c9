"""Adapters that other tools made, in the form of ours: one rank, one scale, and the modules that they adapt.

Plain peft itself says what a folder means: it puts the adapter on a copy of the base's modules and loads the tensors,
so patterns, regular expressions, layers and names of earlier versions are what they are there. From that the factors
of each module are read with the rank and scale that it has, and brought to one rank by zeros and to one scale by
factors of B, which leaves all products as they are.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.utils import set_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from apiary.config.schema import AdapterConfig, ModelConfig
from apiary.core import lora
from apiary.core.errors import UserError
from apiary.core.formatting import first_line
from apiary.core.lora import Factors
from apiary.core.tensors import StateDict
from apiary.models import adapters, experts, targets
from apiary.models.adapters import PREFIX, LanguageModel
from apiary.models.peft_keys import PISSA, PeftFolder, read_tensors

_WIDEST = 1024  # as `adapter.rank` allows
_OF_PEFT = (
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters"),
)


# What peft raises for settings and tensors that do not fit: re.error for a name that is no regular expression.
_PEFT_ERRORS = (
    *(ValueError, TypeError, KeyError, AttributeError, NotImplementedError, RuntimeError, ArithmeticError),
    re.error,
)


class Part(NamedTuple):
    """The change of one weight: scale * b @ a."""

    b: Tensor  # (d_out, r)
    a: Tensor  # (r, d_in)
    scale: float


class Foreign(NamedTuple):
    """An adapter that another tool made, on a base."""

    settings: AdapterConfig  # of an adapter of ours that can hold it
    parts: Mapping[str, Part]  # by module, as in the names of an adapter of ours
    digest: str  # of all factors and scales, 16 hex digits
    remarks: tuple[str, ...]  # what there is to say of it, a line each

    def state(self, lm: LanguageModel) -> dict[str, Tensor]:
        """The adapter as `set_adapter` takes it, for a model of its modules and of its rank or a higher one."""
        held = {module: Factors(p.b * (p.scale / lm.scale), p.a) for module, p in self.parts.items()}
        return lora.join({module: lora.resize(factors, lm.rank) for module, factors in held.items()})


def folder_of(path: Path) -> Path:
    """The adapter folder at a path; of a run directory the one in it."""
    inner = path / "adapter"
    return inner if (inner / "adapter_config.json").is_file() else path


def open_folder(folder: PeftFolder, model: ModelConfig) -> Foreign:
    """The adapter in a folder as plain peft loads it on a base.

    Args:
        folder: its settings.
        model: the base.

    Raises:
        UserError: the base cannot be had, or the adapter does not fit it: a tensor is missing, not explained by the
            settings or of another shape, or it changes something that no adapter of ours can.
    """
    if (most := max([folder.values.get("r") or 0, *(folder.values.get("rank_pattern") or {}).values()])) > _WIDEST:
        raise UserError(f"{str(folder.path)!r}: its rank of {most} is above {_WIDEST}")  # before peft makes room for it
    tensors = read_tensors(folder)
    base, _ = adapters.load_base(model)
    said = _of_the_base(folder, base, tensors.others, model.name)
    plain = _in_plain_peft(folder, base, tensors.factors, model.name)
    found = {PREFIX + name: part for name, part in _parts(folder, plain, model.name).items()}
    digest = _digest(found, folder.start)
    remarks = [*folder.remarks, *tensors.remarks, *said]
    if folder.start:
        _undo_start(folder, plain, found)
        remarks.append(
            f"init_lora_weights = {folder.start!r} changed the base; the change is made again "
            "from the base in use, as peft does, and is part of the adapter, which has twice the rank for it"
        )
    rank = max(len(part.a) for part in found.values())
    if rank > _WIDEST:
        raise UserError(f"{str(folder.path)!r}: its rank of {rank} is above {_WIDEST}")
    return Foreign(_settings(folder, base, [*found], rank), found, digest, tuple(remarks))


def _of_the_base(folder: PeftFolder, base: PreTrainedModel, others: StateDict, name: str) -> list[str]:
    """That weights of the base stand in the folder too, as peft writes them where the head has an adapter.

    Raises:
        UserError: one is another than the base's, or is none of its weights.
    """
    held = dict(base.named_parameters(remove_duplicate=False))
    for key, tensor in sorted(others.items()):
        own = held.get(key.removeprefix(PREFIX).replace(".base_layer.", "."))
        what = "no factor of an adapter"
        if own is not None:
            if own.shape == tensor.shape and torch.equal(tensor.to(own.device, own.dtype), own):
                continue
            what = f"a whole weight, and another one than {name} has: it was trained, or its vocabulary was changed"
        raise UserError(f"{str(folder.path)!r}: the tensor {key!r} is {what}; only factors can be read")
    if not others:
        return []
    return [f"weights of the base stand in it too ({len(others)}); they are those that the base in use has"]


def _in_plain_peft(folder: PeftFolder, base: PreTrainedModel, tensors: StateDict, name: str) -> PeftModel:
    """The base's modules with the adapter on them as plain peft loads it; the weights of the base stay shared."""
    where = f"{str(folder.path)!r}"
    given = {key: value for key, value in folder.values.items() if key in _OF_PEFT and value is not None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft tells of names that it translates; what does not fit is an error here
        try:
            # Not on the meta device, from which peft would round the factors to the base's dtype. No start: one that
            # changes the base would change the weights that are shared.
            settings = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **given)
            model = get_peft_model(adapters.share(base), settings)
            loaded: Any = set_peft_model_state_dict(model, dict(tensors))
        except _PEFT_ERRORS as error:
            sizes = [line.strip() for line in str(error).splitlines() if "size mismatch" in line]
            reason = sizes[0].replace(".default", "") if sizes else first_line(error)
            raise UserError(f"{where}: peft can't load it on {name}: {reason}") from error
    if loaded.unexpected_keys:
        key = sorted(loaded.unexpected_keys)[0].replace(".default.", ".")
        raise UserError(
            f"{where}: the tensor {key!r} is on no module that adapter_config.json names in {name} "
            f"({len(loaded.unexpected_keys)} such); peft would leave it out in silence"
        )
    if missing := sorted(key for key in loaded.missing_keys if ".lora_" in key):
        raise UserError(
            f"{where}: the tensor {missing[0].replace('.default', '')!r} is missing, for adapter_config.json names its "
            f"module in {name} ({len(missing)} such); peft would leave it as it was drawn"
        )
    return model


def _parts(folder: PeftFolder, plain: PeftModel, name: str) -> dict[str, Part]:
    """Of each weight that has an adapter in plain peft its factors and scale, by the name that it has in ours."""
    found: dict[str, Part] = {}
    for path, layer in _modules(plain):
        if not isinstance(layer, LoraLayer):
            continue
        clean, held = path.replace(".base_layer", ""), layer.get_base_layer()
        parameter = getattr(layer, "parameter_name", "weight")
        if not isinstance(layer, ParamWrapper) and not isinstance(held, nn.Linear | Conv1D):
            raise UserError(
                f"{str(folder.path)!r}: adapter_config.json: target_modules: {clean!r} of {name} is no linear layer "
                f"but of the kind {type(held).__name__}"
            )
        halves: Any = (layer.lora_B, layer.lora_A)
        b, a = (half["default"].weight.detach().to("cpu", torch.float32) for half in halves)
        scale = float(layer.scaling["default"])
        if isinstance(layer, ParamWrapper) and getattr(held, parameter).ndim == 3:
            for expert, part in enumerate(experts.split(b, a, layer.num_experts)):
                found[f"{clean}.{parameter}.{expert}"] = Part(part.b, part.a, scale)
        elif parameter == "weight" and isinstance(held, nn.Linear | Conv1D):
            found[clean] = Part(b, a, scale)
        else:
            raise UserError(
                f"{str(folder.path)!r}: adapter_config.json: target_parameters: {clean}.{parameter!r} of {name} is no "
                "weight of a linear layer or of experts"
            )
    return found


def _modules(plain: PeftModel) -> Iterator[tuple[str, nn.Module]]:
    base: Any = plain.get_base_model()
    yield from base.named_modules()


def _undo_start(folder: PeftFolder, plain: PeftModel, found: dict[str, Part]) -> None:
    """Adds what a start took from the base, in place: peft takes it from the base again whenever it loads the folder.

    PiSSA (Meng et al. 2024) takes the best approximation of rank r of each weight, OLoRA (Buyukakyuz 2024) s Q_r R_r of
    its QR decomposition, with s the adapter's scale. So the whole change of the base is s B A less that, of rank 2 r.
    """
    for path, layer in _modules(plain):
        if not isinstance(layer, LoraLayer):
            continue
        held, part = layer.get_base_layer(), found.get(PREFIX + path)
        transposed = isinstance(held, Conv1D)
        where = f"{str(folder.path)!r}: adapter_config.json: init_lora_weights = {folder.start!r}"
        if part is None or isinstance(layer, ParamWrapper) or (transposed and folder.start != PISSA):
            raise UserError(f"{where}: cannot be made again on {path!r}, which is no plain linear layer")
        weight: Any = held.weight
        if not weight.is_floating_point():
            raise UserError(f"{where}: changed the base, which is quantized here; set model.quantization to none")
        weight = (weight.T if transposed else weight).detach().to("cpu", torch.float32)
        rank = layer.r["default"]
        if folder.start == PISSA:
            u, s, vt = torch.linalg.svd(weight, full_matrices=False)
            root = (s[:rank] / part.scale).sqrt()
            taken = Factors(u[:, :rank] * root, root[:, None] * vt[:rank])
        else:
            q, r = torch.linalg.qr(weight)
            taken = Factors(q[:, :rank], r[:rank])
        whole = lora.stack([Factors(part.b, part.a), taken], [1.0, -1.0])
        found[PREFIX + path] = Part(whole.b, whole.a, part.scale)


def _settings(folder: PeftFolder, base: PreTrainedModel, modules: list[str], rank: int) -> AdapterConfig:
    """Those of an adapter of ours on exactly these modules, with the scale that the folder has where no pattern is."""
    defaults = LoraConfig()
    own: int = folder.values.get("r") or defaults.r
    kind: Literal["rslora", "lora"] = "rslora" if folder.values.get("use_rslora") else "lora"
    alpha = float(folder.values.get("lora_alpha") or defaults.lora_alpha)
    if rank != own:
        alpha *= lora.scaling(1.0, kind)(own) / lora.scaling(1.0, kind)(rank)
    return AdapterConfig(rank=rank, alpha=alpha, scaling=kind, targets=_targets(base, modules))


def _targets(base: PreTrainedModel, modules: list[str]) -> str | tuple[str, ...]:
    """`adapter.targets` that names these modules of an adapter, and no others."""
    linear = {name for name, module in base.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    names = {module.removeprefix(PREFIX) for module in modules}
    chosen = {name if name in linear else name.rpartition(".")[0] for name in names}  # of an expert: its stack
    try:
        everything = targets.find(base, AdapterConfig(), "")
    except UserError:  # a base without any; naming them says what is wrong
        everything = None
    if everything and {w.removesuffix(".weight") for w in everything.weights} == chosen:
        return targets.ALL_LINEAR
    every = {name for name, _ in base.named_modules()} | {name for name, _ in base.named_parameters()}
    return tuple(targets.endings(sorted(chosen), every - chosen))


def _digest(parts: Mapping[str, Part], start: str) -> str:
    hasher = hashlib.sha256(start.encode())
    for module, part in sorted(parts.items()):
        hasher.update(f"\n{module} {tuple(part.b.shape)} {tuple(part.a.shape)} {part.scale!r}".encode())
        hasher.update(part.b.contiguous().numpy().tobytes() + part.a.contiguous().numpy().tobytes())
    return hasher.hexdigest()[:16]


def load(folder: PeftFolder, model: ModelConfig) -> tuple[LanguageModel, StateDict, Foreign]:
    """The model with the adapter of a folder on it, and the adapter.

    Raises:
        UserError: as `open_folder`; or an adapter of ours cannot stand where this one does.
    """
    foreign = open_folder(folder, model)
    try:
        lm = adapters.load(model, foreign.settings)
        state = foreign.state(lm)
        adapters.set_adapter(lm, state)
    except UserError as error:
        said = str(error).removeprefix("adapter.targets: ")
        raise UserError(f"{str(folder.path)!r}: adapter_config.json: target_modules: {said}") from None
    except ValueError as error:
        raise UserError(f"{str(folder.path)!r} does not fit the base {model.name!r}: {error}") from None
    return lm, state, foreign
