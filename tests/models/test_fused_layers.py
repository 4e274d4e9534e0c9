from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import small_models
import torch
from torch import nn
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from apiary.config.schema import AdapterConfig, ModelConfig
from apiary.models import adapters, fused_layers
from apiary.models.cpu_attention import attention


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("length", [1, 7, 128, 130, 300])
@pytest.mark.parametrize("shared", [1, 3])
def test_attention_and_its_gradient_are_those_of_the_definition(length: int, shared: int) -> None:
    query = random(2, 2 * shared, length, 8, seed=1).requires_grad_()
    key, value = (random(2, 2, length, 8, seed=s).requires_grad_() for s in (2, 3))
    ours, _ = attention(SimpleNamespace(is_causal=True), query, key, value, None, scaling=0.3)  # type: ignore[arg-type]
    keys, values = (x.repeat_interleave(shared, 1) for x in (key, value))
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    weights = torch.softmax((0.3 * query @ keys.transpose(2, 3)).masked_fill(future, -torch.inf), -1)
    expected = (weights @ values).transpose(1, 2)
    torch.testing.assert_close(ours, expected)
    up = random(*ours.shape, seed=4)
    mine = torch.autograd.grad(ours, (query, key, value), up)
    theirs = torch.autograd.grad(expected, (query, key, value), up)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class _OddRMSNorm(LlamaRMSNorm):
    """Looks like the usual norm and is not: its weight is an offset from 1, as Gemma's is."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) + hidden_states * 0.01


def test_a_norm_is_replaced_only_where_it_is_the_same() -> None:
    plain, odd = LlamaRMSNorm(6, eps=1e-3), _OddRMSNorm(6, eps=1e-3)
    plain.requires_grad_(False)
    plain.weight += random(6)
    fused_layers._replace_norm(plain)
    fused_layers._replace_norm(odd)
    assert type(odd) is _OddRMSNorm
    assert type(plain) is not LlamaRMSNorm
    x = random(2, 3, 6).requires_grad_()
    expected = plain.weight * x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    torch.testing.assert_close(plain(x), expected)
    (mine,), (theirs,) = (torch.autograd.grad(y, x, random(2, 3, 6, seed=1)) for y in (plain(x), expected))
    torch.testing.assert_close(mine, theirs)


def test_a_gated_block_has_the_gradient_of_its_formula() -> None:
    shape = SimpleNamespace(hidden_size=6, intermediate_size=10, mlp_bias=True, hidden_act="silu")
    block = LlamaMLP(shape)
    fused_layers._replace_gated(block)
    assert type(block) is not LlamaMLP
    x = random(2, 3, 6).requires_grad_()
    gate, up = block.gate_proj(x), block.up_proj(x)
    expected = block.down_proj(gate * torch.sigmoid(gate) * up)
    torch.testing.assert_close(block(x), expected)
    wanted = [x, *block.parameters()]
    mine = torch.autograd.grad(block(x).sum(), wanted)
    theirs = torch.autograd.grad(expected.sum(), wanted)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_a_quantised_block_keeps_its_own_forward() -> None:
    block = LlamaMLP(SimpleNamespace(hidden_size=6, intermediate_size=10, mlp_bias=True, hidden_act="silu"))
    packed = torch.zeros(30, 1, dtype=torch.uint8)  # as bitsandbytes holds two 4-bit weights in a byte
    block.gate_proj.weight = torch.nn.Parameter(packed, requires_grad=False)
    fused_layers._replace_gated(block)
    assert type(block) is LlamaMLP


def layer_of(folder: Path, **adapter: object) -> fused_layers.LeanLinear:
    config = AdapterConfig.model_validate({"rank": 4, "alpha": 6, **adapter})
    lm = adapters.load(ModelConfig(name=str(folder), dtype="float32", device="cpu"), config)
    adapters.set_adapter(lm, small_models.random_state(adapters.get_adapter(lm)))
    layer = lm.model.get_base_model().model.layers[0].mlp.up_proj
    assert isinstance(layer, fused_layers.LeanLinear)
    return layer


def test_a_lora_layer_is_its_formula(tiny_model: Path) -> None:
    layer = layer_of(tiny_model)
    x = random(2, 5, 32)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = functional.linear(x, layer.base_layer.weight) + 6 / 2 * (x @ a.T) @ b.T
    torch.testing.assert_close(layer(x), expected)


def test_dropout_scales_what_it_keeps(tiny_model: Path) -> None:
    layer = layer_of(tiny_model, dropout=0.5)
    x = torch.ones(4000, 32)
    still = layer(x)
    assert layer.is_plain()
    layer.lora_dropout["default"].train()
    assert not layer.is_plain()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shaken = layer(x)
    layer.lora_dropout["default"].eval()
    assert not torch.equal(shaken, still)
    torch.testing.assert_close(shaken.mean(0), still.mean(0), rtol=0.1, atol=0.05)


def test_a_module_without_the_parts_is_left_alone() -> None:
    for module in (nn.Linear(3, 3), nn.Module()):
        kind = type(module)
        assert not fused_layers._is_gated(module)
        fused_layers._replace_rotary(module)
        assert type(module) is kind
