"""FedSA-LoRA: A is shared and averaged, each client keeps a B of its own (`adapter.share` = "a").

Guo et al. 2024 (arXiv 2410.01463): clients train both factors, the server averages A, and each B stays where it is, on
the client's own disk. A client that was never asked, or lost its disk, has the B of a new adapter, zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from apiary.core.lora import is_b, only_a
from apiary.core.messages import Payload
from apiary.core.tensors import StateDict
from strategies.aggregator import Aggregator
from strategies.local import Client, LocalAlgorithm, Opened


def with_own_b(aggregator: Aggregator) -> Aggregator:
    """The method over A alone: the server's half as it is, and clients that complete the adapter with their own B."""
    return aggregator._replace(local=LOCAL)


def _open(state: StateDict, payload: Payload, client: Client) -> Opened:
    own = {name: state.get(name, torch.zeros(shape)) for name, shape in client.shapes.items() if is_b(name)}
    return Opened({**own, **payload.adapter})


def _finish(start: StateDict, delta: dict[str, Tensor]) -> tuple[dict[str, Tensor], StateDict]:
    return only_a(delta), {name: start[name] + d for name, d in delta.items() if is_b(name)}


LOCAL = LocalAlgorithm(
    _open,
    _finish,
    keeps="personal",
    reaches=True,
    shares=lambda name: not is_b(name),
    personal="Clients share the factors A of the adapter, and each keeps a B of its own",
)
