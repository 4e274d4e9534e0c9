"""The loss of rows under a causal language model, without ever holding all logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from apiary.data.batches import Batch

_ROWS = 256  # rows of logits that the loss turns into float32 at a time


def row_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Summed nats of each row's trained tokens, (b,) float32, differentiable in the adapter.

    Equal to the cross-entropy over all logits, but the head is computed only where a trained token is
    predicted.
    """
    # Token j is predicted from position j - 1.
    rows, columns = batch.targets[:, 1:].nonzero(as_tuple=True)
    with _head_at(model, rows * batch.ids.shape[1] + columns):
        # No attention mask: rows are padded on the right, and under causal attention what comes
        # later never reaches a real token. Without one, scaled-dot-product attention keeps to its
        # fast causal kernel.
        logits = model(input_ids=batch.ids, use_cache=False).logits
    nats = token_nats(logits, batch.ids[rows, columns + 1])
    return torch.zeros(len(batch.ids), device=nats.device).index_add(0, rows, nats)


@contextmanager
def _head_at(model: nn.Module, places: Tensor) -> Iterator[None]:
    """Within it, the head sees only the hidden states at `places` of the flattened (b * t) positions.

    The hook sits on the head itself, so it works for every causal model, and what a model does to its
    logits afterwards (a soft cap, a scale) still happens, to (places, V) logits.
    """

    def pick(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = inputs[0]
        return (hidden.reshape(-1, hidden.shape[-1]).index_select(0, places), *inputs[1:])

    hook = model.get_output_embeddings().register_forward_pre_hook(pick)  # type: ignore[operator]
    try:
        yield
    finally:
        hook.remove()


def token_nats(logits: Tensor, tokens: Tensor) -> Tensor:
    """-log softmax(logits)[token] for each row, (n,) float32.

    Args:
        logits: (n, V), any floating dtype.
        tokens: (n,) int64.
    """
    return _TokenNats.apply(logits.reshape(-1, logits.shape[-1]), tokens)  # type: ignore[no-any-return,no-untyped-call]


class _TokenNats(torch.autograd.Function):
    """Cross-entropy in float32, a few rows at a time, whose gradient is made on the way forwards.

    With a vocabulary of 150,000 the usual one holds the logits, their float32 copy, its softmax and its gradient at
    once, which is most of the memory of a step. This one keeps the softmax in the dtype of the logits.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor) -> Tensor:
        nats, slopes = [], []
        for rows, wanted in zip(logits.split(_ROWS), tokens.unsqueeze(-1).split(_ROWS), strict=True):
            scores = torch.log_softmax(rows, -1, dtype=torch.float32)
            nats.append(-scores.gather(-1, wanted)[:, 0])
            if ctx.needs_input_grad[0]:
                slope = scores.exp_().scatter_add_(-1, wanted, scores.new_full(wanted.shape, -1.0))
                slopes.append(slope.to(logits.dtype))
        if slopes:
            ctx.save_for_backward(*slopes)
        return torch.cat(nats)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        pieces = zip(ctx.saved_tensors, grads[0].unsqueeze(-1).split(_ROWS), strict=True)
        return torch.cat([slope.float().mul_(grad).to(slope.dtype) for slope, grad in pieces]), None


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The same batch on `device`."""
    return type(batch)(*(tensor.to(device, non_blocking=True) for tensor in batch))
