"""The same model with less work around its matrix products, for a frozen base with LoRA on it.

`slim` gives modules a leaner forward that computes the same function: LoRA layers without float32
copies of activations, RMS norms with a written-out gradient for the input alone (the base is
frozen), gated feed-forward blocks that keep less, and on a CPU an attention whose gradient is
batched matrix products. A module whose lean form does not agree with its own on a probe is left as
it is, so an unusual model is slower, never wrong.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from apiary.core.lora import Factors
from apiary.models.cpu_attention import rotary_forward, use_on

_GIVE_BACK_S = 5.0
_BASE_DELTA, _GATE, _SEEN, _HOOK = "apiary_base_delta", "apiary_gate", "apiary_seen", "apiary_hook"


def slim(model: PeftModel, device: torch.device) -> None:
    """Gives the modules of `model` their lean forward, in place; names, parameters and results stay as they were."""
    for module in model.modules():
        if type(module) is LoraLinear and type(module.base_layer) in (nn.Linear, Conv1D):
            module.__class__ = LeanLinear
        elif type(module) is ParamWrapper and type(module.base_layer) is nn.Linear:
            module.__class__ = LeanWeight
        elif type(module).__name__.endswith("RMSNorm"):
            _replace_norm(module)
        elif _is_gated(module):
            _replace_gated(module)
    if device.type == "cpu":
        use_on(cast(PreTrainedModel, model.get_base_model()))
        for module in model.modules():
            _replace_rotary(module)
        _keep_memory()


class LeanLinear(LoraLinear):
    """peft's LoRA layer for the plain case: one active adapter, no dropout at work, nothing merged."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's x W^T + bias + s (x A^T) B^T, in the dtype of W, and what `add_to_base` adds."""
        if args or kwargs or not self.is_plain():
            return _with_base_delta(self, x, super().forward(x, *args, **kwargs))
        return _project(x, [self])[0]

    def is_plain(self) -> bool:
        """Whether the lean forward says all there is to say now."""
        return _is_plain(self)


class LeanWeight(ParamWrapper):
    """The same for a linear layer whose weight peft adapts as a parameter, without a copy of the weight."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As of `LeanLinear`."""
        if args or kwargs or not self.is_plain():
            return _with_base_delta(self, x, super().forward(x, *args, **kwargs))
        return _project(x, [self])[0]

    def is_plain(self) -> bool:
        """Whether the lean forward says all there is to say now."""
        return _is_plain(self)


def _is_plain(layer: LeanLinear | LeanWeight) -> bool:
    names = layer.active_adapters
    if layer.disable_adapters or layer.merged or layer.lora_variant or len(names) != 1:
        return False
    dropout = layer.lora_dropout[names[0]]
    return isinstance(dropout, nn.Identity) or not dropout.training


def add_to_base(layer: nn.Module, factors: Factors | None) -> None:
    """Let a LoRA layer compute as if the product of `factors`, of scale 1, were added to its frozen weight.

    The weight itself stays as it is: it may be quantised, and other adapters share it. None takes the addition back.
    """
    if factors is None:
        vars(layer).pop(_BASE_DELTA, None)
        return
    own: Any = layer
    here, weight = next(iter(own.lora_A.values())).weight, own.get_base_layer().weight
    dtype = weight.dtype if weight.is_floating_point() else here.dtype  # not that of a quantised weight
    vars(layer)[_BASE_DELTA] = factors.a.to(here.device, dtype), factors.b.to(here.device, dtype)
    if not isinstance(layer, LeanLinear | LeanWeight) and _HOOK not in vars(layer):
        vars(layer)[_HOOK] = layer.register_forward_hook(lambda own, args, out: _with_base_delta(own, args[0], out))


def set_gate(layer: nn.Module, gate: nn.Parameter | None) -> None:
    """Let a LoRA layer with something added to its base weigh the two against each other by its input.

    With D what `add_to_base` has added, it computes W x + alpha(x) s B A x + (1 - alpha(x)) D x, where
    alpha(x) = sigmoid(<gate, x>), for each position by itself. None takes the gate back.

    Args:
        layer: the layer; without dropout at work.
        gate: (1, d_in), on the layer's device. The layer reads it and does not register it.
    """
    vars(layer).pop(_SEEN, None)
    if gate is None:
        vars(layer).pop(_GATE, None)
    else:
        vars(layer)[_GATE] = gate


def note_gate(layer: nn.Module, note: Callable[[Tensor], None] | None) -> None:
    """Have `note` told of alpha(x), (..., 1) float32, in each pass through a layer with a gate; None ends that."""
    if note is None:
        vars(layer).pop(_SEEN, None)
    else:
        vars(layer)[_SEEN] = note


def _with_base_delta(layer: nn.Module, x: Tensor, out: Tensor) -> Tensor:
    factors = vars(layer).get(_BASE_DELTA)
    if factors is None:
        return out
    a, b = factors
    x = x.to(a.dtype)
    added = nn.functional.linear(nn.functional.linear(x, a), b)
    gate = vars(layer).get(_GATE)
    if gate is not None:
        added = _mixed(layer, x, added, gate)
    return out + added.to(out.dtype)


def _mixed(layer: Any, x: Tensor, added: Tensor, gate: Tensor) -> Tensor:
    """What makes of W x + s B A x the mixture: (1 - alpha) (D x - s B A x)."""
    logits = nn.functional.linear(x, gate.to(x.dtype)).float()
    if note := vars(layer).get(_SEEN):
        note(torch.sigmoid(logits.detach()))
    name = layer.active_adapters[0]
    low = nn.functional.linear(x, layer.lora_A[name].weight.to(x.dtype))
    own = nn.functional.linear(low, layer.lora_B[name].weight.to(x.dtype) * layer.scaling[name])
    return torch.sigmoid(-logits).to(added.dtype) * (added - own)


def project(layers: list[Any], x: Tensor) -> list[Tensor]:
    """What each of the layers makes of the same x; together where they are plain LoRA layers."""
    if all(isinstance(layer, LeanLinear | LeanWeight) and layer.is_plain() for layer in layers):
        return _project(x, layers)
    return [layer(x) for layer in layers]


def _project(x: Tensor, layers: Sequence[LeanLinear | LeanWeight]) -> list[Tensor]:
    tensors: list[Any] = []
    scales = []
    for layer in layers:
        base: Any = layer.base_layer
        name = layer.active_adapters[0]
        weight = base.weight.t() if isinstance(base, Conv1D) else base.weight
        tensors += [weight, base.bias, layer.lora_A[name].weight, layer.lora_B[name].weight]
        scales.append(layer.scaling[name])
    dtype = tensors[0].dtype
    outs = _LowRank.apply(x.reshape(-1, x.shape[-1]).to(dtype), scales, *tensors)  # type: ignore[no-untyped-call]
    shaped = (out.view(*x.shape[:-1], out.shape[-1]) for out in outs)
    return [_with_base_delta(layer, x, out) for layer, out in zip(layers, shaped, strict=True)]


class _LowRank(torch.autograd.Function):
    """Frozen linear maps of the same input, each with its low-rank update.

    peft's way casts the input to float32 and back, and makes three more tensors of the size of each output; here the
    matrix products themselves add the updates in place, and the A of all maps are one matrix.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scales: list[float], *tensors: Any) -> tuple[Tensor, ...]:
        weights, biases, downs, ups = (tensors[i::4] for i in range(4))
        low = torch.cat(downs).to(x.dtype)
        highs = [(up * scale).to(x.dtype) for up, scale in zip(ups, scales, strict=True)]
        inner = x @ low.t()
        sizes = [len(down) for down in downs]
        outs = []
        for weight, bias, high, part in zip(weights, biases, highs, inner.split(sizes, 1), strict=True):
            out = x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())
            outs.append(out.addmm_(part, high.t()))
        ctx.save_for_backward(x, low, inner, *weights, *highs)
        ctx.scales, ctx.sizes = scales, sizes
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, low, inner, *rest = ctx.saved_tensors
        weights, highs = rest[: len(grads)], rest[len(grads) :]
        parts = [grad @ high for grad, high in zip(grads, highs, strict=True)]
        inner_grad = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        x_grad = None
        if ctx.needs_input_grad[0]:  # not for the first layer: the embeddings are frozen
            x_grad = (grads[0] @ weights[0]).addmm_(inner_grad, low)
            for grad, weight in zip(grads[1:], weights[1:], strict=True):
                x_grad.addmm_(grad, weight)
        result: list[Any] = [x_grad, None]
        needs_downs, needs_ups = ctx.needs_input_grad[4::4], ctx.needs_input_grad[5::4]  # half of them may be frozen
        down_grads: Any = (inner_grad.t() @ x).float().split(ctx.sizes) if any(needs_downs) else [None] * len(grads)
        halves = zip(grads, down_grads, inner.split(ctx.sizes, 1), ctx.scales, needs_ups, strict=True)
        for grad, down_grad, part, scale, needs_up in halves:
            result += [None, None, down_grad, (grad.t() @ part).float().mul_(scale) if needs_up else None]
        return tuple(result)


def _replace_norm(module: nn.Module) -> None:
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    # A weight that is no parameter stands for none, and need not have the width of what is normed.
    if not isinstance(weight, nn.Parameter) or not isinstance(eps, float) or weight.ndim != 1:
        return

    def forward(self: nn.Module, hidden_states: Tensor) -> Tensor:
        if hidden_states.dtype != self.weight.dtype:
            return cast(Tensor, own(self, hidden_states))
        return cast(Tensor, _RmsNorm.apply(hidden_states, self.weight, eps))  # type: ignore[no-untyped-call]

    own = type(module).forward
    probe = _noise(4, len(weight)).to(weight)
    if _agree(own(module, probe), forward(module, probe)):
        _become(module, forward)


class _RmsNorm(torch.autograd.Function):
    """w x / rms(x) (Zhang and Sennrich 2019), with a gradient for x only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse = torch.rsqrt(length.square_().div_(x.shape[-1]).add_(eps))
        unit = (wide.mul_(inverse) if wide is not x else wide * inverse).to(x.dtype)
        ctx.save_for_backward(x, weight, inverse)
        return unit * weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x, weight, inverse = ctx.saved_tensors
        # d/dx = r g - x r^3 <g, x> / d, for g = weight * up and r = 1 / rms(x).
        g = grads[0] * weight
        along = torch.linalg.vecdot(g, x).unsqueeze(-1).float()
        pull = along.mul_(inverse.pow(3)).div_(-x.shape[-1]).to(x.dtype)
        return g.mul_(inverse.to(x.dtype)).addcmul_(x, pull), None, None


def _is_gated(module: nn.Module) -> bool:
    parts = all(isinstance(getattr(module, name, None), nn.Module) for name in ("gate_proj", "up_proj", "down_proj"))
    return parts and "silu" in type(getattr(module, "act_fn", None)).__name__.lower()


def _replace_gated(module: nn.Module) -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        gate, up = project([self.gate_proj, self.up_proj], x)
        return cast(Tensor, self.down_proj(_Gated.apply(gate, up)))  # type: ignore[operator,no-untyped-call]

    own = type(module).forward
    weight = next(module.gate_proj.parameters())  # type: ignore[union-attr]
    if not weight.is_floating_point():  # quantised
        return
    width = getattr(module.gate_proj, "in_features", weight.shape[-1])
    probe = _noise(4, width).to(weight)
    with torch.no_grad():
        same = _agree(own(module, probe), forward(module, probe))
    if same:
        _become(module, forward)


class _Gated(torch.autograd.Function):
    """The product silu(gate) * up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        lit = nn.functional.silu(gate)
        ctx.save_for_backward(gate, up, lit)
        return lit * up

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up, lit = ctx.saved_tensors
        gate_grad = torch.ops.aten.silu_backward(grads[0] * up, gate)
        return gate_grad, lit * grads[0]


def _become(module: nn.Module, forward: Any) -> None:
    kind = type(module)
    module.__class__ = type(kind.__name__, (kind,), {"forward": functools.wraps(kind.forward)(forward)})


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _agree(theirs: object, ours: Tensor) -> bool:
    if not isinstance(theirs, Tensor) or theirs.dtype != ours.dtype or theirs.shape != ours.shape:
        return False
    loose = 2e-2 if ours.dtype is torch.bfloat16 else 1e-5
    return torch.allclose(theirs, ours, rtol=loose, atol=loose)


def _replace_rotary(module: Any) -> None:
    """For attention as Llama's: four projections, rotary positions, and nothing between the two."""
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    parts = all(isinstance(getattr(module, name, None), nn.Module) for name in names)
    width = getattr(module, "head_dim", None)
    if not parts or not isinstance(width, int) or not isinstance(getattr(module, "scaling", None), float):
        return
    own = type(module).forward
    forward = rotary_forward(own, project)
    weight = next(module.q_proj.parameters())
    probe = _noise(1, 5, module.q_proj.in_features).to(weight)
    positions = tuple(_noise(1, 5, width // 2).repeat(1, 1, 2).to(weight) for _ in range(2))
    try:
        with torch.no_grad():
            theirs = own(module, probe, position_embeddings=positions, attention_mask=None)[0]
        with torch.enable_grad():
            same = _agree(theirs, forward(module, probe, position_embeddings=positions)[0].detach())
    except Exception:  # another signature, shape or attribute: another kind of attention
        return
    if same:
        _become(module, forward)


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "gnu_get_libc_version") else None


@functools.cache
def _keep_memory() -> None:
    """Lets glibc keep freed memory.

    By default every large activation goes back to the kernel when it is freed, and is zeroed page by page when the
    next layer asks for it.
    """
    if library := _glibc():
        library.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        library.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


_given_back = 0.0  # when, in seconds of the monotonic clock


def give_memory_back() -> None:
    """Gives the kernel what `_keep_memory` has kept, at most every few seconds.

    Batches of many shapes leave gaps, which would add up over the clients of a long run.
    """
    global _given_back
    if (library := _glibc()) and time.monotonic() - _given_back > _GIVE_BACK_S:
        library.malloc_trim(0)
        _given_back = time.monotonic()
