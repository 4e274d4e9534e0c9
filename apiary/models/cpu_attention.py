"""Causal attention for training on a CPU, where PyTorch's flash kernel has a slow gradient.

Forwards the kernel is quick. Its gradient takes several times as long as the five matrix products that it is made of,
at the lengths of instructions and above all in bfloat16; so here the gradient is those products, a block of queries at
a time against the keys that they can see.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

_NAME = "apiary"  # under which Transformers finds it
_BLOCK = 128  # queries at a time: a causal half of the scores is then computed, and not much more
_LONGEST = 4096  # beyond it the kernel's better use of the cache wins


def use_on(model: PreTrainedModel) -> None:
    """Makes `model` attend by `attention`, if it attends by PyTorch's kernel now."""
    if getattr(model.config, "_attn_implementation", None) == "sdpa":
        AttentionInterface.register(_NAME, attention)
        AttentionMaskInterface.register(_NAME, sdpa_mask)
        model.set_attn_implementation(_NAME)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention (b, t, h, d) of query (b, h, t, d) on key and value (b, h or fewer, t, d).

    PyTorch's own kernel takes over for whatever is not plain training: a mask, a cache, dropout, very long rows.
    """
    plain = (
        attention_mask is None
        and not dropout
        and torch.is_grad_enabled()
        and query.requires_grad
        and query.shape[2] == key.shape[2] <= _LONGEST
        and kwargs.get("is_causal", getattr(module, "is_causal", True)) in (True, None)
        and kwargs.get("position_bias") is None
        and kwargs.get("softcap") is None
    )
    if not plain:
        options = {"dropout": dropout, "scaling": scaling, **kwargs}
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return out, None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _Attention.apply(query, key, value, scale).transpose(1, 2), None  # type: ignore[no-untyped-call]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.scale = scale
        return _attend(query, key, value, scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value = ctx.saved_tensors
        return (*_gradients(grads[0], query, key, value, ctx.scale), None)


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    shared = query.shape[1] != key.shape[1]
    return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=shared)


def _gradients(up: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, from `up` (b, h, t, d), that of the output."""
    batch, heads, length, width = query.shape
    shared = heads // key.shape[1]  # query heads that read the same key head are stacked below each other
    groups = batch * key.shape[1]
    queries, ups = (x.reshape(groups, shared, length, width) for x in (query, up))
    keys, values = key.reshape(groups, length, width), value.reshape(groups, length, width)
    key_grad = value_grad = torch.empty(0)
    query_grads: list[Tensor] = []
    for start in reversed(range(0, length, _BLOCK)):  # the last block sees all keys, so its gradients start the sums
        stop = min(start + _BLOCK, length)
        size = shared * (stop - start)
        q = queries[:, :, start:stop].reshape(groups, size, width)
        u = ups[:, :, start:stop].reshape(groups, size, width)
        k, v = keys[:, :stop], values[:, :stop]
        mask = _mask(start, stop, shared, q.dtype)
        weights = torch.softmax(torch.baddbmm(mask, q, k.transpose(1, 2), alpha=scale), -1)
        slope = torch._softmax_backward_data(torch.bmm(u, v.transpose(1, 2)), weights, -1, q.dtype)
        query_grads.append(torch.bmm(slope, k).view(groups, shared, stop - start, width))
        here = torch.bmm(slope.transpose(1, 2), q), torch.bmm(weights.transpose(1, 2), u)
        if stop == length:
            key_grad, value_grad = here
        else:
            key_grad[:, :stop] += here[0]
            value_grad[:, :stop] += here[1]
    query_grad = query_grads[0] if len(query_grads) == 1 else torch.cat(query_grads[::-1], 2)
    return query_grad.mul_(scale).view(query.shape), key_grad.mul_(scale).view(key.shape), value_grad.view(value.shape)


@functools.lru_cache(maxsize=32)
def _mask(start: int, stop: int, shared: int, dtype: torch.dtype) -> Tensor:
    """What is added to the scores of queries start..stop on keys 0..stop, for each of the stacked heads."""
    mask = torch.full((stop - start, stop), float("-inf"), dtype=dtype).triu_(start + 1)
    return mask.repeat(shared, 1).unsqueeze(0)


def rotary_forward(own: Callable[..., Any], project: Callable[[list[Any], Tensor], list[Tensor]]) -> Callable[..., Any]:
    """A forward for attention modules of Llama's kind that turns, attends and turns back in one function.

    Args:
        own: the module's own forward, for whatever is not plain training.
        project: what several layers make of one input.
    """

    def forward(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        plain = attention_mask is None and past_key_values is None and hidden_states.shape[1] <= _LONGEST
        # Where positions turn a part of each head alone, the module's own forward knows which.
        whole = position_embeddings is not None and position_embeddings[0].shape[-1] == self.head_dim
        if not (plain and whole and position_embeddings is not None and torch.is_grad_enabled()):
            more = {"position_embeddings": position_embeddings, "past_key_values": past_key_values, **kwargs}
            return own(self, hidden_states, attention_mask=attention_mask, **more)  # type: ignore[no-any-return]
        cos, sin = position_embeddings
        q, k, v = project([self.q_proj, self.k_proj, self.v_proj], hidden_states)
        out = _RotaryAttention.apply(q, k, v, cos, sin, self.head_dim, self.scaling)  # type: ignore[no-untyped-call]
        return self.o_proj(out), None

    return forward


class _RotaryAttention(torch.autograd.Function):
    """Attention (b, t, h * d) of projections in the same layout, with rotary positions (Su et al. 2021)."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, width: int, scale: float
    ) -> Tensor:
        half = width // 2
        signed = torch.cat((-sin[..., :half], sin[..., half:]), -1)
        q, k, v = (x.view(*x.shape[:2], -1, width) for x in (query, key, value))
        q, k = (_turn(x, cos.unsqueeze(2), signed.unsqueeze(2)) for x in (q, k))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        ctx.save_for_backward(q, k, v, cos, torch.cat((sin[..., half:], -sin[..., :half]), -1))
        ctx.scale = scale
        return _attend(q, k, v, scale).transpose(1, 2).flatten(2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, cos, back = ctx.saved_tensors
        up = grads[0].view(*grads[0].shape[:2], -1, q.shape[-1]).transpose(1, 2)
        query, key, value = _gradients(up, q, k, v, ctx.scale)
        query, key = (_turn(x, cos.unsqueeze(1), back.unsqueeze(1)) for x in (query, key))
        return (*(x.transpose(1, 2).flatten(2) for x in (query, key, value)), None, None, None, None)


def _turn(x: Tensor, cos: Tensor, signed: Tensor) -> Tensor:
    """The x * cos + (second half of x, first half) * signed of rotary positions."""
    first, second = x.chunk(2, -1)
    return (x * cos).addcmul_(torch.cat((second, first), -1), signed)
