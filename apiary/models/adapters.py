"""The frozen base model, its tokenizer and the adapter on it, made once per process and shared by everyone in it.

`load` is the only way in. A base is read from disk once for each `ModelConfig`; every adapter
configuration gets a skeleton of modules of its own around the same weights, so a second adapter
costs no second copy of the base.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from apiary.config.schema import AdapterConfig, ModelConfig
from apiary.core import lora
from apiary.core.errors import UserError
from apiary.core.formatting import first_line
from apiary.core.lora import Factors, is_b
from apiary.core.messages import Fingerprint
from apiary.core.tensors import StateDict, generator
from apiary.models import experts, targets
from apiary.models.base import base_digest, read, resolve_device, resolve_dtype
from apiary.models.fused_layers import add_to_base, set_gate, slim
from apiary.models.generation import BaseGeneration
from apiary.models.targets import Coverage, Targets

_log = logging.getLogger(__name__)
PREFIX = "base_model.model."  # before the base's own names in those of an adapter
_LOCK = threading.RLock()


@dataclass(frozen=True)
class _Base:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    digest: str
    generation: BaseGeneration


_bases: dict[ModelConfig, _Base] = {}
_models: dict[tuple[ModelConfig, AdapterConfig], LanguageModel] = {}
_loads = 0


@dataclass(frozen=True)
class LanguageModel:
    """A frozen base with one trainable adapter.

    Args:
        model: the base with the adapter injected; always in eval mode, so that only the adapter
            ever has dropout.
        adapter: the live float32 adapter parameters by the name they have in
            `adapter_model.safetensors`.
        digest: of the base weights; the same whatever dtype or device they are held on.
    """

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    dtype: torch.dtype
    digest: str
    name: str
    adapter: Mapping[str, nn.Parameter]
    rank: int
    scale: float  # the s in W + s B A
    init: Literal["kaiming", "orthonormal"]
    dropouts: tuple[nn.Module, ...]  # of the adapter's inputs
    coverage: Coverage  # how much of the base has an adapter
    adding: set[str]  # modules that now compute as if something were added to their base
    gates: dict[str, nn.Parameter]  # the live gates of the adapter that is set, by their names in it; empty: none
    generation: BaseGeneration  # what the base says of decoding


class HasDigest(Protocol):
    """Anything with a digest; here: an `apiary.data.tokenization.Template`."""

    @property
    def digest(self) -> str:
        """Hex digits that differ when the thing differs."""


def load(model: ModelConfig, adapter: AdapterConfig) -> LanguageModel:
    """The model for a configuration, the same object every time within a process.

    Raises:
        UserError: the base cannot be had, or the adapter's targets are not in it.
    """
    adapter = adapter.of_rank(adapter.rank)  # the ranks of others make no difference
    key = (model, adapter)
    with _LOCK:
        if key not in _models:
            _models[key] = _adapt(_base(model), model, adapter)
        return _models[key]


def load_base(config: ModelConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model and its tokenizer from the process-wide cache: look, do not change.

    Raises:
        UserError: no such folder or hub id, no way to reach it, or a model this machine cannot
            hold.
    """
    base = _base(config)
    return base.model, base.tokenizer


def base_loads() -> int:
    """How many times a base was really read in this process."""
    return _loads


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills short rows; which one does not matter, for no real token ever sees it."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    return 0


def _base(config: ModelConfig) -> _Base:
    global _loads
    with _LOCK:
        if config not in _bases:
            model, tokenizer, generation = read(config)
            _loads += 1
            _bases[config] = _Base(model, tokenizer, base_digest(model, config.quantization), generation)
        return _bases[config]


def _adapt(base: _Base, config: ModelConfig, adapter: AdapterConfig) -> LanguageModel:
    found = targets.find(base.model, adapter, config.name)
    with quiet_peft():
        shared = share(base.model)
        shared.name_or_path = config.name  # what peft writes down as the adapter's base
        try:
            model = get_peft_model(shared, _lora(config, adapter, base.model, found))
        except (ValueError, TypeError) as error:
            raise UserError(f"adapter.targets: peft can't adapt {config.name}: {first_line(error)}") from error
    _check_adapted(model, found, config.name)
    _warn_of_rounding(base.model, found)
    experts.unpack(model)
    model.eval()
    device = resolve_device(config)
    slim(model, device)
    return LanguageModel(
        model=model,
        tokenizer=base.tokenizer,
        device=device,
        dtype=resolve_dtype(config, device),
        digest=base.digest,
        name=config.name,
        adapter=experts.live(model),
        rank=adapter.rank,
        scale=lora.scaling(adapter.alpha, adapter.scaling)(adapter.rank),
        init=adapter.init,
        dropouts=tuple(module for path, module in model.named_modules() if ".lora_dropout." in path),
        coverage=targets.coverage(base.model, found),
        adding=set(),
        gates={},
        generation=base.generation,
    )


def _warn_of_rounding(model: PreTrainedModel, found: Targets) -> None:
    """Says that experts in a short type add their products to weights of that type, where a small one is lost."""
    held = {model.get_parameter(name).dtype for name in found.parameters}
    for short in held & {torch.bfloat16, torch.float16}:
        _log.warning(
            "the experts' weights are %s, and their adapters are added to them in that type: most of a change that is "
            'small beside a weight is rounded away; use model.dtype = "float32", or adapter.targets = ["q_proj", '
            '"k_proj", "v_proj", "o_proj"] to leave experts as they are',
            str(short).removeprefix("torch."),
        )


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Peft asks Transformers for a property by its old name, and says what it does for GPT-2: neither is news."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        warnings.filterwarnings("ignore", ".*fan_in_fan_out", UserWarning)
        yield


def share(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the modules around the very same weights: peft rewrites the modules that it adapts."""
    keep = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, keep)


def _lora(config: ModelConfig, adapter: AdapterConfig, base: PreTrainedModel, found: Targets) -> LoraConfig:
    chosen: str | list[str] | None = adapter.targets if isinstance(adapter.targets, str) else list(adapter.targets)
    if not found.plain:
        modules = {n for n, _ in base.named_modules()}
        chosen = targets.endings(found.modules, modules.difference(found.modules))
    elif chosen != targets.ALL_LINEAR and isinstance(chosen, str):
        chosen = [chosen]
    weights = {n for n, _ in base.named_parameters()}
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]  # annotated int, a float works
        lora_dropout=adapter.dropout,
        use_rslora=adapter.scaling == "rslora",
        target_modules=chosen,
        target_parameters=targets.endings(found.parameters, weights.difference(found.parameters), least=2) or None,
        base_model_name_or_path=config.name,
        revision=config.revision,
    )


def _check_adapted(model: PeftModel, found: Targets, name: str) -> None:
    """Raises a UserError where peft has adapted other weights than it was asked to."""
    adapted = set()
    for path, layer in model.get_base_model().named_modules():
        if isinstance(layer, LoraLayer):
            adapted.add(f"{path.replace('.base_layer', '')}.{getattr(layer, 'parameter_name', 'weight')}")
    if wrong := sorted(adapted ^ found.weights):
        what = "leaves out" if wrong[0] in found.weights else "adapts"
        raise UserError(f"adapter.targets: this version of peft {what} {wrong[0]!r} of {name}; name other targets")


def get_adapter(lm: LanguageModel) -> dict[str, Tensor]:
    """CPU float32 copies of the adapter's tensors, named as in a PEFT folder."""
    return {name: p.detach().to("cpu", torch.float32, copy=True) for name, p in lm.adapter.items()}


def live(lm: LanguageModel) -> dict[str, nn.Parameter]:
    """The parameters of the adapter that is set: its factors, and its gates if it has any."""
    return {**lm.adapter, **lm.gates}


def set_adapter(lm: LanguageModel, state: StateDict) -> None:
    """Writes `state` into the live adapter, in place.

    Args:
        state: an adapter, or an adapter and what it adds to the base (`lora.whole`); without that the base is as it
            was read. Modules with something added may have gates (`lora.gate_name`), which are new parameters then,
            in `lm.gates`, until another state is set.

    Raises:
        ValueError: a name is missing or unknown, or a shape differs; the live adapter is then
            untouched.
    """
    state, base_delta = lora.parts(state)
    state, gates = lora.ungated(state)
    added = _added(lm, base_delta)
    missing = [name for name in lm.adapter if name not in state]
    unknown = [name for name in state if name not in lm.adapter]
    if missing or unknown:
        kind, names = ("lacks", missing) if missing else ("has the unknown tensor", unknown)
        raise ValueError(f"adapter {kind} {names[0]!r} ({len(missing)} missing, {len(unknown)} unknown)")
    for name, parameter in lm.adapter.items():
        if state[name].shape != parameter.shape:
            raise ValueError(f"adapter tensor {name!r}: shape {tuple(state[name].shape)}, not {tuple(parameter.shape)}")
    _check_gates(lm, gates, added)
    with torch.no_grad():
        for name, parameter in lm.adapter.items():
            parameter.copy_(state[name])
    for module in lm.adding | added.keys():
        if expert := experts.place(lm.model, module):
            experts.add_to_base(expert, added.get(module))
        else:
            add_to_base(lm.model.get_submodule(module), added.get(module))
    for module in {lora.module_of(name) for name in lm.gates} - gates.keys():
        set_gate(lm.model.get_submodule(module), None)
    lm.gates.clear()
    for module, gate in gates.items():
        weight = lm.gates[lora.gate_name(module)] = nn.Parameter(gate.detach().to(lm.device, torch.float32, copy=True))
        set_gate(lm.model.get_submodule(module), weight)
    lm.adding.clear()
    lm.adding.update(added)


def _check_gates(lm: LanguageModel, gates: StateDict, added: Mapping[str, Factors]) -> None:
    for module, gate in gates.items():
        if module not in added:
            raise ValueError(f"a gate for {module!r}, to whose base nothing is added, has nothing to weigh")
        if experts.place(lm.model, module):
            raise ValueError(f"a gate for {module!r}: experts of one weight see their inputs only inside their module")
        if tuple(gate.shape) != (1, added[module].a.shape[1]):
            raise ValueError(f"gate for {module!r}: shape {tuple(gate.shape)}, not {(1, added[module].a.shape[1])}")


def _added(lm: LanguageModel, base_delta: StateDict) -> dict[str, Factors]:
    own = lora.split({name: p.detach() for name, p in lm.adapter.items()}) if base_delta else {}
    added = lora.split(base_delta)
    for module, (b, a) in added.items():
        if module not in own or (len(b), a.shape[1]) != (len(own[module].b), own[module].a.shape[1]):
            raise ValueError(f"base delta for {module!r} of {len(b)} x {a.shape[1]} does not fit the adapter's modules")
    return added


@contextmanager
def training(lm: LanguageModel, factors: Literal["both", "b", "a"]) -> Iterator[LanguageModel]:
    """Within it only these factors get gradients; it yields the model with them, and the gates, as its adapter."""
    frozen = [p for name, p in lm.adapter.items() if factors != "both" and is_b(name) != (factors == "b")]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield replace(lm, adapter={name: p for name, p in live(lm).items() if p.requires_grad})
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


def fresh_adapter(lm: LanguageModel, seed: int) -> dict[str, Tensor]:
    """A new adapter that changes nothing yet: A random as `adapter.init` says, B zero (Hu et al. 2021, section 4.1).

    Each A has a CPU generator of its own, derived from `seed` and its name. Kaiming-uniform gives the same values on
    every machine. Orthonormal rows, scaled to the length that Kaiming's have on average, waste none of the rank on
    directions that A has already, and so let least noise through where A stays as it is (Sun et al. 2024).
    """
    state = {}
    for name, parameter in lm.adapter.items():
        state[name] = torch.zeros(parameter.shape)
        if "lora_A" in name:
            rng, bound = generator(seed, "adapter", name), parameter.shape[1] ** -0.5
            if lm.init == "orthonormal":
                state[name] = _orthonormal_rows(parameter.shape, rng) * 3**-0.5
            else:
                state[name].uniform_(-bound, bound, generator=rng)  # with a = sqrt(5), as peft and nn.Linear have it
    return state


def _orthonormal_rows(shape: torch.Size, rng: torch.Generator) -> Tensor:
    """As many orthonormal rows as fit, uniformly distributed; unit rows if there are more of them than columns."""
    rows, columns = shape
    noise = torch.randn(max(rows, columns), min(rows, columns), generator=rng, dtype=torch.float64)
    q, r = torch.linalg.qr(noise)
    q *= r.diagonal().sign()  # else the distribution depends on the routine's choice of signs
    orthonormal: Tensor = q.T if rows <= columns else q / q.norm(dim=1, keepdim=True)
    return orthonormal.float()


@contextmanager
def autocast(lm: LanguageModel) -> Iterator[None]:
    """Within it, matrix products run in the base's dtype (no effect for a float32 base)."""
    with torch.autocast(lm.device.type, torch.bfloat16, enabled=lm.dtype is torch.bfloat16):
        yield


def fingerprint(lm: LanguageModel, template: HasDigest) -> Fingerprint:
    """What the handshake compares."""
    from apiary.data.tokenization import tokenizer_digest

    # Without the ranks, which may differ between clients.
    shapes = json.dumps(sorted((name, len(p) if is_b(name) else p.shape[1]) for name, p in lm.adapter.items()))
    return Fingerprint(
        base=lm.digest,
        tokenizer=tokenizer_digest(lm.tokenizer),
        template=template.digest,
        adapter=hashlib.sha256(shapes.encode()).hexdigest()[:16],
    )
