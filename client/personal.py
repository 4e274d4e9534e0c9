"""The half of the adapter that a client keeps to itself (`adapter.share` = "a"; FedSA-LoRA, Guo et al. 2024).

Guo et al. 2024 (arXiv 2410.01463): clients train both factors, the server averages A, and each B stays where it is,
on the client's own disk. A client that was never asked, or lost its disk, has the B of a new adapter, zero.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from apiary.core.lora import is_b
from apiary.core.tensors import StateDict
from apiary.models.adapters import LanguageModel
from client import round_files

KIND = "personal"


def complete(lm: LanguageModel, folder: Path, before: int, shared: StateDict) -> dict[str, Tensor]:
    """The client's whole adapter: the shared factors, and its own as they were before round `before`."""
    own = round_files.newest(folder, KIND, before)
    zeros = {name: torch.zeros(p.shape) for name, p in lm.adapter.items() if is_b(name)}
    return {**zeros, **own, **shared}


def keep(folder: Path, number: int, start: StateDict, delta: StateDict) -> None:
    """Keep the client's own factors as a visit left them: those of `start` with its change."""
    round_files.save(folder, KIND, number, {name: start[name] + d for name, d in delta.items() if is_b(name)})
