"""Adapters of experts whose weights are one 3-D parameter: an adapter of its own for each expert.

peft holds the factors A of all experts of a layer in one matrix, and their factors B in another, in an order in which
the product of the two means nothing. Here each expert has an A and a B that are parameters by themselves, under names
such as `...experts.down_proj.3.lora_A.weight`: so whatever is computed of factors (products, spectra, ranks, norms)
holds for experts as for any layer. `to_peft` and `from_peft` translate where a PEFT folder is written or read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from apiary.core.lora import Factors
from apiary.core.tensors import StateDict

_BASE_DELTA = "apiary_base_delta"  # expert -> the factors that are added to its frozen weight


class _Parts(nn.Module):
    """A factor of each expert, in the place of the linear layer in which peft holds them all."""

    def __init__(self, whole: Tensor, experts: int, is_b: bool) -> None:
        super().__init__()
        self.is_b = is_b
        self.parts = nn.ParameterList(nn.Parameter(p.clone()) for p in _split(whole.detach(), experts, is_b))

    @property
    def weight(self) -> Tensor:
        """All factors as peft holds them."""
        return _joined(list(self.parts), self.is_b)


def _joined(parts: list[Tensor], is_b: bool) -> Tensor:
    """A of (e * r, d_in), expert after expert; B of (d_out, r * e), the columns of a direction side by side."""
    return torch.stack(parts, -1).flatten(1) if is_b else torch.cat(parts)


def _split(whole: Tensor, experts: int, is_b: bool) -> list[Tensor]:
    if whole.shape[1 if is_b else 0] % experts:
        raise ValueError(f"a factor of {tuple(whole.shape)} is not one of {experts} experts")
    if is_b:
        return [p.contiguous() for p in whole.reshape(len(whole), -1, experts).unbind(-1)]
    return [p.contiguous() for p in whole.chunk(experts)]


class LeanExperts(ParamWrapper):
    """peft's layer for one weight (e, ., .) of a module of experts, with parameters of its own for each expert.

    As peft's does, it adds the products to a copy of the weight for each pass: the memory of a pass is that of all
    experts of a layer, in training of every layer.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the module of experts makes of its inputs with the adapted weight."""
        added = self._terms()
        if not added:
            return self.base_layer(x, *args, **kwargs)  # type: ignore[no-any-return]
        owner, weight = self.get_base_layer(), self.weight_of()
        with torch.autocast(weight.device.type, enabled=False):
            for left, right, scale in added:
                weight = torch.baddbmm(weight, left, right, alpha=scale)
        # An attribute of the instance is found before a parameter.
        vars(owner)[self.parameter_name] = weight
        try:
            return self.base_layer(x, *args, **kwargs)  # type: ignore[no-any-return]
        finally:
            del vars(owner)[self.parameter_name]

    def _terms(self) -> list[tuple[Tensor, Tensor, float]]:
        """Factors (e, ., r) and (e, r, .) and the scale of each product that stands beside the weight now."""
        found = []
        if not (self.disable_adapters or self.merged):
            for name in self.active_adapters:
                halves: Any = (self.lora_B[name], self.lora_A[name])
                factors = [Factors(b, a) for b, a in zip(*(half.parts for half in halves), strict=True)]
                found.append((*self._stacked(factors), self.scaling[name]))
        if delta := vars(self).get(_BASE_DELTA):
            wide = max(f.rank for f in delta.values())
            rows, columns = self.out_features, self.in_features
            b, a = (next(iter(delta.values()))[i].new_zeros(shape) for i, shape in enumerate([(rows, 0), (0, columns)]))
            every = [delta.get(e, Factors(b, a)) for e in range(self.num_experts)]
            pad = nn.functional.pad
            padded = [Factors(pad(f.b, (0, wide - f.rank)), pad(f.a, (0, 0, 0, wide - f.rank))) for f in every]
            found.append((*self._stacked(padded), 1.0))
        return found

    def _stacked(self, factors: list[Factors]) -> tuple[Tensor, Tensor]:
        weight = self.weight_of()
        b, a = (torch.stack([f[i] for f in factors]).to(weight.device, weight.dtype) for i in (0, 1))
        return (b, a) if self.is_rows_out else (a.transpose(1, 2), b.transpose(1, 2))

    def weight_of(self) -> Tensor:
        """The frozen weight (e, ., .) of all experts."""
        return getattr(self.get_base_layer(), self.parameter_name)  # type: ignore[no-any-return]

    @property
    def is_rows_out(self) -> bool:
        """Whether an expert's weight is (d_out, d_in), and not the other way round."""
        return bool(getattr(self, "_did_swap_in_out_features", False))


class Place(NamedTuple):
    """Where the adapter of one expert is."""

    layer: LeanExperts
    expert: int


def unpack(model: PeftModel) -> None:
    """Gives each expert parameters of its own, in place."""
    for _, layer in [*_wrappers(model)]:
        if getattr(layer.get_base_layer(), layer.parameter_name).ndim == 3:
            layer.__class__ = LeanExperts
            for name in list(layer.lora_A):
                for half, is_b in ((layer.lora_A, False), (layer.lora_B, True)):
                    whole: Any = half[name]
                    half[name] = _Parts(whole.weight, layer.num_experts, is_b)


def live(model: PeftModel) -> dict[str, nn.Parameter]:
    """The trainable parameters of a model by their names in an adapter: as in a PEFT folder, but for experts."""
    own = {}
    for path, layer in _stacks(model):
        for half in ("lora_A", "lora_B"):
            for e, part in enumerate(getattr(layer, half)["default"].parts):
                own[id(part)] = f"{_clean(path)}.{layer.parameter_name}.{e}.{half}.weight"
    named = ((own.get(id(p), n.replace(".default.", ".")), p) for n, p in model.named_parameters() if p.requires_grad)
    return dict(named)


def place(model: PeftModel, module: str) -> Place | None:
    """The expert that a module of an adapter's names is, or None for any other layer."""
    path, parameter, number = (*module.rsplit(".", 2), "", "")[:3]
    if not number.isdigit():
        return None
    try:
        layer: Any = model.get_submodule(path)
    except AttributeError:
        return None
    while isinstance(layer, LeanExperts) and layer.parameter_name != parameter:
        layer = layer.base_layer
    return Place(layer, int(number)) if isinstance(layer, LeanExperts) else None


def add_to_base(where: Place, factors: Factors | None) -> None:
    """Lets an expert compute as if the product were added to its frozen weight; None takes it back."""
    held = vars(where.layer).setdefault(_BASE_DELTA, {})
    held.pop(where.expert, None)
    if factors is not None:
        weight = where.layer.weight_of()
        held[where.expert] = Factors(*(half.to(weight.device, weight.dtype) for half in factors))


def merge_into_base(where: Place, factors: Factors) -> None:
    """Adds the product to an expert's own weight, for good."""
    weight = where.layer.weight_of()[where.expert]
    product = factors.b @ factors.a
    weight += product if where.layer.is_rows_out else product.T


def to_peft(model: PeftModel, state: StateDict) -> dict[str, Tensor]:
    """The adapter as a PEFT folder has it."""
    state = dict(state)
    for path, half, names in _groups(model):
        if all(name in state for name in names):
            parts = [state.pop(name) for name in names]
            state[f"{path}.{half}.weight"] = _joined(parts, half == "lora_B")
    return state


def from_peft(model: PeftModel, tensors: StateDict) -> dict[str, Tensor]:
    """The adapter in the tensors of a PEFT folder.

    Raises:
        ValueError: a tensor for experts does not divide among them.
    """
    tensors = dict(tensors)
    for path, half, names in _groups(model):
        if (whole := tensors.pop(f"{path}.{half}.weight", None)) is not None:
            tensors.update(zip(names, _split(whole, len(names), half == "lora_B"), strict=True))
    return tensors


def split(b: Tensor, a: Tensor, experts: int) -> list[Factors]:
    """The factors of each expert in those of all of a layer, as peft holds them."""
    return [Factors(*halves) for halves in zip(_split(b, experts, True), _split(a, experts, False), strict=True)]


def _groups(model: PeftModel) -> Iterator[tuple[str, str, list[str]]]:
    """Of each stack of experts its path in a PEFT folder, a half, and the names of that half, expert by expert."""
    for path, layer in _stacks(model):
        stem = f"{_clean(path)}.{layer.parameter_name}"
        for half in ("lora_A", "lora_B"):
            yield path, half, [f"{stem}.{e}.{half}.weight" for e in range(layer.num_experts)]


def _stacks(model: nn.Module) -> Iterator[tuple[str, LeanExperts]]:
    return ((path, layer) for path, layer in _wrappers(model) if isinstance(layer, LeanExperts))


def _wrappers(model: nn.Module) -> Iterator[tuple[str, ParamWrapper]]:
    return ((path, module) for path, module in model.named_modules() if isinstance(module, ParamWrapper))


def _clean(path: str) -> str:
    """The path of the module of experts: several adapted weights of one are wrapped within each other."""
    return path.replace(".base_layer", "")
