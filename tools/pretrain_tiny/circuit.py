"""A copying circuit, laid into an untrained Llama.

Everything the built-in skills ask for begins with finding something in the prompt and saying it
again. A transformer does that with two heads in a row (Elhage et al. 2021, "A mathematical
framework for transformer circuits"): one that looks at the token before, and one that looks for a
token whose predecessor is the present token, and repeats it. A base that began with
random weights had hardly found this pair after 11.7 million tokens. Here the pair is there from the
first step, made of random projections, and training goes on from it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SLOW: Final = 2e-3
"""Radians a token: rotary planes slower than this tell content, the faster ones distance."""

FAST: Final = 4
"""The fastest rotary planes, which pick a distance."""

GAIN: Final = 2.0
"""Of a query's and of a key's column where a head is to look at one place, or at one token, alone."""

SCALE: Final = 0.07
"""Standard deviation of the embedding at the start, about what it has after a thousand steps: the
circuit's gains stand in proportion to it, so it must not grow out from under them."""


@torch.no_grad()
def lay_copying_circuit(model: PreTrainedModel, rope_theta: float, copiers: int = 3) -> None:
    """Lays heads that look back into the first layer, and heads that copy into the second.

    Two heads of the first layer write a projection of the token one back, and of the token two
    back, into columns of the residual stream that the embedding leaves empty. In the second layer
    `copiers` heads find the tokens that came after the present token, and as many find those that
    came two places after the token before (in a list, what follows this comma and not any comma).
    All other heads and the feed-forward layers start with an output of zero.

    The embedding's first column is the same for all tokens, for the heads that look back ask for
    a distance and nothing else. It and the empty columns get no gradient, here or later.

    Args:
        model: an untrained LlamaForCausalLM with as many key as query heads, at least `2 * copiers`.
        rope_theta: base of its rotary embedding.
        copiers: heads of each of the two sorts; each copies through a projection of its own.
    """
    network: Any = model.model
    config = model.config
    width, size = config.hidden_size, config.hidden_size // config.num_attention_heads
    for layer in network.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    before, earlier = slice(1, 1 + size), slice(1 + size, 1 + 2 * size)
    embedding = network.embed_tokens.weight
    embedding.normal_(std=SCALE)
    embedding[:, 0] = 4 * SCALE
    embedding[:, 1 : earlier.stop] = 0.0
    kept = torch.ones(width)
    kept[: earlier.stop] = 0.0
    embedding.register_hook(lambda gradient: gradient * kept.to(gradient))
    network.norm.weight.fill_(0.3)  # or every token would foretell itself

    turns = torch.pow(rope_theta, -torch.arange(0, size, 2) / size)
    slow = torch.cat([turns < SLOW, turns < SLOW]).float()
    look = _projection(size, width, earlier.stop)
    first, second = (layer.self_attn for layer in network.layers[:2])
    for at, columns in enumerate((before, earlier)):
        rows = slice(at * size, (at + 1) * size)
        _ask_for_distance(at + 1, first.q_proj.weight[rows], first.k_proj.weight[rows], turns)
        first.v_proj.weight[rows] = look
        first.o_proj.weight[columns, rows] = 1.5 * SCALE * torch.eye(size)
    for at in range(2 * copiers):
        rows = slice(at * size, (at + 1) * size)
        query, key = second.q_proj.weight[rows], second.k_proj.weight[rows]
        query.zero_()
        key.zero_()
        if at < copiers:
            query.copy_(GAIN * slow[:, None] * look)
            key[:, before] = GAIN * torch.diag(slow)
        else:
            query[:, before] = GAIN * torch.diag(slow)
            key[:, earlier] = GAIN * torch.diag(slow)
        copied = _projection(size, width, earlier.stop)
        second.v_proj.weight[rows] = copied
        second.o_proj.weight[:, rows] = 3 * SCALE * copied.T


def _projection(rows: int, columns: int, taken: int) -> Tensor:
    """Returns (rows, columns) with orthonormal rows that are zero in the first `taken` columns."""
    free = torch.linalg.qr(torch.randn(columns - taken, rows)).Q.T
    return torch.cat([torch.zeros(rows, taken), free], dim=1)


def _ask_for_distance(distance: int, query: Tensor, key: Tensor, turns: Tensor) -> None:
    """Makes one head's scores largest `distance` tokens back, from the constant column alone.

    Rotary embedding turns plane m of a query at i and of a key at j by i and j times `turns[m]`. A query that starts
    `distance` turns behind meets a key that many tokens back in the same direction, in every plane. Only the fastest
    planes take part: the slow ones would add the same to all scores, and tokens differ in how long their keys are.
    """
    query.zero_()
    key.zero_()
    fast = range(FAST)
    query[fast, 0] = GAIN * (distance * turns[:FAST]).cos()
    query[range(len(turns), len(turns) + FAST), 0] = -GAIN * (distance * turns[:FAST]).sin()
    key[fast, 0] = GAIN
