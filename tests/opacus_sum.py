"""The clipped sum of per-row gradients by another library, for tests and for `benchmarks/rows_alone.py`."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from unittest import mock

import numpy as np
import torch
from opacus.grad_sample import GradSampleHooks

from apiary.core.tensors import StateDict
from apiary.data.batches import Corpus, collate
from apiary.models import adapters, fused_layers
from apiary.models.loss import row_losses


def opacus_sum(lm: adapters.LanguageModel, corpus: Corpus, rows: list[int], clip: float) -> StateDict:
    """The clipped sum over rows that share one batch, by the hooks of Opacus on peft's own modules."""
    layers = [m for m in lm.model.modules() if any(p.requires_grad for p in m.parameters(recurse=False))]
    lean = [m for m in lm.model.modules() if isinstance(m, fused_layers.LeanLinear)]
    with warnings.catch_warnings(), ExitStack() as patches:
        warnings.filterwarnings("ignore", "Full backward hook is firing")
        for layer in lean:  # the lean forward passes by the modules that Opacus watches
            patches.enter_context(mock.patch.object(layer, "is_plain", return_value=False))
        for layer in layers:  # Opacus passes over a layer that is not in training
            patches.enter_context(mock.patch.object(layer, "training", True))
        hooks = GradSampleHooks(lm.model, loss_reduction="sum")
        try:
            batch = collate(corpus, np.array(rows), 0)
            with adapters.autocast(lm):
                losses = row_losses(lm.model, batch)
            (losses / batch.targets.sum(1).clamp(min=1)).sum().backward()
            single = {name: p.grad_sample.double() for name, p in lm.adapter.items()}
        finally:
            hooks.cleanup()
            for parameter in lm.adapter.values():
                parameter.grad = parameter.grad_sample = None
    norms = torch.stack([g.flatten(1).square().sum(1) for g in single.values()]).sum(0).sqrt()
    return {name: torch.tensordot((clip / norms).clamp(max=1.0), g, 1) for name, g in single.items()}
