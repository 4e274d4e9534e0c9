"""Adapters as safetensors files, and the base with an adapter merged into it."""

from __future__ import annotations

import copy
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from safetensors.torch import save as pack
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from apiary.core import lora
from apiary.core.files import sync
from apiary.core.lora import Factors, is_b
from apiary.core.tensors import StateDict
from apiary.models import experts
from apiary.models.adapters import LanguageModel


def merged(lm: LanguageModel, state: StateDict) -> PreTrainedModel:
    """A copy of the base, on the CPU in float32, with the state (as for `set_adapter`) folded into its weights."""
    whole = copy.deepcopy(lm.model).to("cpu", torch.float32)
    adapter, base_delta = lora.parts(state)
    with torch.no_grad():
        for name, parameter in experts.live(whole).items():
            parameter.copy_(adapter[name])
        for module, (b, a) in lora.split(base_delta).items():
            if expert := experts.place(whole, module):
                experts.merge_into_base(expert, Factors(b, a))
                continue
            layer = whole.get_submodule(module).get_base_layer()  # type: ignore[operator]
            layer.weight += (b @ a).T if isinstance(layer, Conv1D) else b @ a
    merged_model: PreTrainedModel = whole.merge_and_unload(safe_merge=True)
    return merged_model


class Written(NamedTuple):
    """An adapter as a PEFT folder holds it: one A and one B of a module, of one rank, under one scale."""

    factors: StateDict
    rank: int
    alpha: float
    rslora: bool  # whether the scale is alpha / sqrt(rank), else alpha / rank

    @property
    def scale(self) -> float:
        """The s in W + s B A."""
        return lora.scaling(self.alpha, "rslora" if self.rslora else "lora")(self.rank)


def as_written(lm: LanguageModel, state: StateDict) -> Written:
    """A state (as for `set_adapter`) as a PEFT folder holds it; what it adds to the base makes the rank larger."""
    factors, rank = _as_one(lm, state)
    made: Any = lm.model.peft_config["default"]
    alpha = made.lora_alpha * (rank / made.r) ** (0.5 if made.use_rslora else 1.0)  # the scale stays
    return Written(factors, rank, alpha, bool(made.use_rslora))


def save_adapter(lm: LanguageModel, state: StateDict, folder: str | Path, card: str | None = None) -> None:
    """Writes a PEFT folder that `peft.PeftModel.from_pretrained(base, folder)` loads.

    What the state adds to the base becomes further rows and columns of one adapter of a larger rank: `read_adapter`
    takes it apart again. It is written beside its place and moved there whole: at any moment the folder is absent, the
    old one, or the new one.

    Args:
        card: text of the folder's README.md.

    Raises:
        OSError: the disk is full or the place cannot be written; nothing is left behind.
    """
    write_adapter(lm, as_written(lm, state), folder, card)


def write_adapter(lm: LanguageModel, written: Written, folder: str | Path, card: str | None = None) -> None:
    """`save_adapter` for an adapter that has its final form.

    Raises:
        OSError: the disk is full or the place cannot be written; nothing is left behind.
    """
    target = Path(folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        config: Any = copy.copy(lm.model.peft_config["default"])
        config.inference_mode = True  # what peft itself writes: the folder is loaded frozen
        config.lora_alpha, config.r, config.use_rslora = written.alpha, written.rank, written.rslora
        config.save_pretrained(str(work))
        tensors = {
            name: tensor.detach().to("cpu", torch.float32).contiguous()
            for name, tensor in experts.to_peft(lm.model, written.factors).items()
        }
        # As bytes: safetensors' own writer hides a full disk behind an error type of its own.
        (work / "adapter_model.safetensors").write_bytes(pack(tensors, metadata={"format": "pt"}))
        if card is not None:
            (work / "README.md").write_text(card, encoding="utf-8")
        work.chmod(0o755)  # mkdtemp's folders are private; this one is a result
        for path in [*work.iterdir(), work]:
            sync(path)
        _swap(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def widened(lm: LanguageModel, adapter: StateDict) -> StateDict:
    """An adapter of a lower rank as one of the model's, with the same products; what it lacks is zero."""
    factors = lora.split(adapter)
    rank = max((f.rank for f in factors.values()), default=lm.rank)
    if rank >= lm.rank:
        return adapter
    made: Any = lm.model.peft_config["default"]
    scale = lora.scaling(made.lora_alpha, "rslora" if made.use_rslora else "lora")
    ratio = scale(rank) / scale(lm.rank)
    return lora.join({m: lora.resize(Factors(f.b * ratio, f.a), lm.rank) for m, f in factors.items()})


def read_adapter(lm: LanguageModel, file: Path) -> dict[str, Tensor]:
    """The state in the weights of a folder that `save_adapter` wrote, as `set_adapter` takes it.

    An adapter of a lower rank than the model's comes as one of that rank, with the same products.
    """
    tensors = dict(widened(lm, experts.from_peft(lm.model, load_file(file))))
    if not any(is_b(name) and tensor.shape[1] > lm.rank for name, tensor in tensors.items()):
        return tensors
    adapter, base_delta = {}, {}
    for module, factors in lora.split(tensors).items():
        adapter[module] = lora.resize(factors, lm.rank)
        base_delta[module] = Factors(factors.b[:, lm.rank :] * lm.scale, factors.a[lm.rank :])
    return lora.whole(lora.join(adapter), lora.join(base_delta))


def _as_one(lm: LanguageModel, state: StateDict) -> tuple[StateDict, int]:
    """An adapter, of the scale of `lm`, for all of `state`, and its rank."""
    adapter, base_delta = lora.parts(state)
    if not base_delta:
        return adapter, lm.rank
    added = lora.split(base_delta)
    wide = max(factors.rank for factors in added.values())  # modules may differ; a PEFT folder has one rank
    joined = {}
    for module, factors in lora.split(adapter).items():
        more = added.get(module) or Factors(factors.b[:, :0], factors.a[:0])
        joined[module] = lora.stack([factors, lora.resize(Factors(more.b / lm.scale, more.a), wide)])
    return lora.join(joined), lm.rank + wide


def _swap(work: Path, target: Path) -> None:
    old = work.with_name(work.name + "-old")
    if target.exists():
        target.rename(old)
    work.rename(target)
    shutil.rmtree(old, ignore_errors=True)
