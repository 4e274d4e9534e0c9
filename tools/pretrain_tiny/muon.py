"""Muon: momentum steps whose singular values are all pushed to one.

Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; the scale 0.2 *
sqrt(max(rows, columns)), which gives a step the usual size of an AdamW step, is Liu et al. 2025,
arXiv:2502.16982, equation 4. PyTorch has a Muon too; this one takes equal shapes together in one
batched product, which on a small model costs a third as much.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor


def orthogonal(matrices: Tensor, rounds: int = 5) -> Tensor:
    """Returns about U V^T for each U S V^T of a (batch, rows, columns) stack: Newton-Schulz."""
    x = matrices.to(torch.bfloat16)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    for _ in range(rounds):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    turned: Tensor = (x.mT if tall else x).to(matrices.dtype)
    return turned


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, made orthogonal, with decoupled weight decay; for matrices only."""

    def __init__(
        self,
        matrices: Iterable[Tensor],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Takes one step."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    by_shape[matrix.shape].append(matrix)
            for shape, matrices in by_shape.items():
                turned = orthogonal(torch.stack([self._moved(m, group["momentum"]) for m in matrices]))
                scale = 0.2 * max(shape) ** 0.5
                for matrix, direction in zip(matrices, turned, strict=True):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"])
                    matrix.add_(direction, alpha=-group["lr"] * scale)

    def _moved(self, matrix: Tensor, momentum: float) -> Tensor:
        state = self.state[matrix]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(matrix)
        held: Tensor = state["momentum"]
        gradient = matrix.grad
        if gradient is None:
            return held
        held.lerp_(gradient, 1 - momentum)
        return gradient.lerp(held, momentum)
