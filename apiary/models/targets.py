"""Which weights of a base get an adapter: what `adapter.targets` names, and what no adapter can reach.

Three kinds of weights are set apart. Mixtures of experts keep the weights of all experts of a layer in one 3-D
parameter, which peft adapts by its name (`target_parameters`). State-space layers (Gu and Dao 2023) hand the weights of
most of their linear layers to a kernel, which would pass an adapter by. Towers for pictures and sound see no token.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from apiary.config.schema import AdapterConfig
from apiary.core.errors import UserError

ALL_LINEAR = "all-linear"
_STATE_SPACE = ("A_log", "D")  # the parameters that every Mamba layer has, whatever its class is called
_EXPERT = re.compile(r"expert", re.IGNORECASE)


class Targets(NamedTuple):
    """Full names in the base of what gets an adapter."""

    modules: tuple[str, ...]  # linear layers
    parameters: tuple[str, ...]  # weights that peft adapts as parameters: (e, ., .) of experts, or (d_out, d_in)
    plain: bool  # whether peft, asked for the same endings, would find these by itself

    @property
    def weights(self) -> frozenset[str]:
        """The names of the adapted weights."""
        return frozenset([*(f"{name}.weight" for name in self.modules), *self.parameters])


class _Known(NamedTuple):
    """What a base is made of."""

    linear: dict[str, nn.Module]  # layers that an adapter works in
    stacks: tuple[str, ...]  # parameters that hold the weights of several experts
    bypassed: frozenset[str]  # layers whose weights a kernel reads
    unseen: frozenset[str]  # modules that no token passes
    head: str  # the output embedding


def find(base: PreTrainedModel, adapter: AdapterConfig, name: str) -> Targets:
    """What `adapter.targets` names in a base.

    Args:
        base: the model.
        adapter: the targets: `all-linear`, or endings of names as peft takes them.
        name: of the base, for errors.

    Raises:
        UserError: a target is not there or can't have an adapter, or there is dropout on the adapters of experts.
    """
    known = _look(base)
    wanted = adapter.targets
    if wanted == ALL_LINEAR:
        modules = [n for n in known.linear if n != known.head]
        stacks = [*known.stacks]
    else:
        endings = [wanted] if isinstance(wanted, str) else [*wanted]
        for ending in endings:
            _check(base, known, ending, name)
        modules = [n for n in known.linear if _ends(n, endings)]
        stacks = [n for n in known.stacks if _ends(n, endings)]
    if not modules and not stacks:
        raise UserError(f"adapter.targets = {wanted!r}: {name} has no linear layers that an adapter works in")
    if stacks and adapter.dropout:
        raise UserError(
            f"adapter.dropout = {adapter.dropout}: {name} keeps the weights of its experts in {_last(stacks[0])!r}, on "
            "whose adapter there can be no dropout; set it to 0, or name other adapter.targets"
        )
    as_parameters = _renamed(base)
    moved = [n for n in modules if _last(n) in as_parameters]
    kept = tuple(n for n in modules if _last(n) not in as_parameters)
    others = any(map(_is_own, base.modules()))
    plain = not (stacks or moved or others or known.bypassed or known.unseen)
    return Targets(kept, (*stacks, *(f"{n}.weight" for n in moved)), plain)


def endings(names: Sequence[str], others: Iterable[str], least: int = 1) -> list[str]:
    """The shortest endings that match these names, as peft matches, and none of the others.

    Args:
        names: what is to be matched.
        others: what is not.
        least: parts that an ending has at the least.
    """
    theirs = [f".{other}" for other in others]
    found: list[str] = []
    for name in names:
        if _ends(name, found):
            continue
        parts = name.split(".")
        tails = (".".join(parts[-n:]) for n in range(min(least, len(parts)), len(parts) + 1))
        found.append(next(t for t in tails if not any(other.endswith(f".{t}") for other in theirs)))
    return sorted(set(found))


class Coverage(NamedTuple):
    """How much of a base its adapter reaches; embeddings, the head and towers for pictures or sound do not count."""

    adapted: int  # weights that have an adapter
    weights: int  # of all
    left: Mapping[str, int]  # of matrices without one, by the last part of their names, largest first

    @property
    def share(self) -> float:
        """Between 0 and 1."""
        return self.adapted / self.weights if self.weights else 0.0

    @property
    def words(self) -> str:
        """One line for people."""
        text = f"adapters on {100 * self.share:.1f}% of the weights outside the embeddings and the head"
        if not self.left:
            return text
        named = [f"{kind} ({100 * size / self.weights:.1f}%)" for kind, size in [*self.left.items()][:5]]
        more = f" and {len(self.left) - 5} more kinds" if len(self.left) > 5 else ""
        return f"{text}; none on {', '.join(named)}{more}"


def coverage(base: PreTrainedModel, targets: Targets) -> Coverage:
    """How much of a base the targets are."""
    known, adapted = _look(base), targets.weights
    tables = {id(m.weight) for m in base.modules() if isinstance(m, nn.Embedding)}
    head = base.get_output_embeddings()
    sizes: dict[str, int] = {}
    for name, parameter in base.named_parameters():
        owner = name.rpartition(".")[0]
        if id(parameter) in tables or owner in known.unseen or base.get_submodule(owner) is head:
            continue
        layer: Any = known.linear.get(owner)
        packed = isinstance(layer, nn.Linear) and name.endswith(".weight")
        sizes[name] = layer.in_features * layer.out_features if packed else parameter.numel()
    shapes = {name: parameter.ndim for name, parameter in base.named_parameters()}
    left: dict[str, int] = {}
    for name in sizes.keys() - adapted:
        if shapes[name] > 1:
            kind = _last(name.removesuffix(".weight"))
            left[kind] = left.get(kind, 0) + sizes[name]
    ordered = dict(sorted(left.items(), key=lambda item: (-item[1], item[0])))
    return Coverage(sum(sizes[name] for name in adapted & sizes.keys()), sum(sizes.values()), ordered)


def _look(base: PreTrainedModel) -> _Known:
    modules = dict(base.named_modules())
    unseen = _unseen(base, modules)
    bypassed = frozenset(
        f"{name}.{child}"
        for name, module in modules.items()
        if all(isinstance(getattr(module, part, None), nn.Parameter) for part in _STATE_SPACE)
        for child, layer in module.named_children()
        if isinstance(layer, nn.Linear) and child != "in_proj"
    )
    head = base.get_output_embeddings()
    return _Known(
        linear={
            name: module
            for name, module in modules.items()
            if isinstance(module, nn.Linear | Conv1D) and name not in bypassed | unseen and not _is_own(module)
        },
        stacks=tuple(
            name
            for name, parameter in base.named_parameters()
            if parameter.ndim == 3 and _EXPERT.search(name) and name.rpartition(".")[0] not in unseen
        ),
        bypassed=bypassed,
        unseen=unseen,
        head=next((name for name, module in modules.items() if module is head), ""),
    )


def _is_own(module: nn.Module) -> bool:
    """Whether it is a model's own kind of linear layer that gives something else than the product, as a router."""
    if not isinstance(module, nn.Linear) or not type(module).__module__.startswith("transformers.models."):
        return False
    x = torch.ones(1, module.in_features, dtype=module.weight.dtype, device=module.weight.device)
    with torch.no_grad():
        found, product = module(x), nn.functional.linear(x, module.weight, module.bias)
    if not isinstance(found, Tensor) or found.shape != product.shape:
        return True
    return bool((found - product).norm() > 0.05 * product.norm())  # more than the rounding of 16 bits


def _unseen(base: PreTrainedModel, modules: Mapping[str, nn.Module]) -> frozenset[str]:
    """The modules of a model for several media that are not of its language model."""
    if base.config.get_text_config(decoder=True) is base.config:
        return frozenset()
    language = {id(module) for module in base.get_decoder().modules()}
    language.add(id(base.get_output_embeddings()))
    inner = {name for name, module in modules.items() if id(module) in language}
    above = {name for name in modules if any(other.startswith(f"{name}.") for other in inner) or not name}
    return frozenset(modules.keys() - inner - above)


def _check(base: PreTrainedModel, known: _Known, ending: str, name: str) -> None:
    """Raises a UserError for a target that is not in the base, or that can't have an adapter."""
    say = f"adapter.targets: {name}"
    modules = {n: m for n, m in base.named_modules() if _ends(n, [ending])}
    if any(n in known.linear for n in modules) or any(_ends(n, [ending]) for n in known.stacks):
        others = {n for n in modules if n not in known.linear and n not in known.bypassed | known.unseen}
        if known.head in modules and base.config.get_text_config().tie_word_embeddings:
            raise UserError(
                f"{say}: {ending!r} is the head, whose weights are those of the embedding as well; leave it out"
            )
        if not others:
            return
        modules = {n: modules[n] for n in others}
    if modules.keys() & known.bypassed:
        kinds = sorted({_last(n) for n in known.linear if n != known.head})
        raise UserError(
            f"{say}: {ending!r} is in a state-space layer, whose kernel passes an adapter by; "
            f"possible are {', '.join(kinds)}"
        )
    if modules.keys() & known.unseen:
        raise UserError(f"{say}: {ending!r} is in a part for pictures or sound, which no token passes")
    if modules:
        kind = type(next(iter(modules.values()))).__name__
        raise UserError(f"{say}: {ending!r} is no linear layer but of the kind {kind}; {_possible(known)}")
    raise UserError(f"{say} has no module {ending!r}; {_possible(known)}")


def _possible(known: _Known) -> str:
    kinds = ", ".join(sorted({_last(n) for n in known.linear})) or "none"
    experts = ", ".join(sorted({".".join(n.split(".")[-2:]) for n in known.stacks}))
    return f"linear modules: {kinds}; " + (f"experts: {experts}; " if experts else "") + f"or '{ALL_LINEAR}'"


def _renamed(base: PreTrainedModel) -> frozenset[str]:
    """Last parts of names that peft takes for those of experts in this base, whatever they are.

    For adapters of an earlier Transformers it turns such a target into the experts' weights, and so misses a layer of
    the same name that is linear (a shared expert, a dense layer). As parameters they are adapted as they are.
    """
    try:
        from peft.utils import transformers_weight_conversion as conversion
    except ImportError:  # peft before 0.19 leaves names alone
        return frozenset()
    kinds = getattr(conversion, "_MODEL_TO_CONVERSION_PATTERN", {})
    names = getattr(conversion, "_MOE_TARGET_MODULE_MAPPING", {})
    return frozenset(names.get(kinds.get(base.config.model_type), ()))


def _ends(name: str, tails: Iterable[str]) -> bool:
    return any(name == tail or name.endswith(f".{tail}") for tail in tails)


def _last(name: str) -> str:
    return name.rpartition(".")[2]
