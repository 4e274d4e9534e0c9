"""The rank that a client's device has room for (`adapter.ranks` = "memory")."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Literal

import torch

from apiary.config.schema import RunConfig
from apiary.core.files import own_folder, write_atomic
from apiary.models import adapters
from apiary.models.base import resolve_device

SHARE = 0.25  # of the memory that is free once the base is loaded; activations take the most of the rest
_ENTRY: dict[Literal["adamw", "sgd"], int] = {"adamw": 16, "sgd": 8}  # bytes: weight and gradient; with two moments
_LIMIT, _USED = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")  # of a container
_MEMORY = Path("/proc/meminfo")


def fitting(most: int, entries: int, free: int | None, optimizer: Literal["adamw", "sgd"]) -> int:
    """The largest of `most` and the powers of two below it whose adapter fits; 1 where not even that does.

    An adapter of rank r takes r * `entries` * b bytes, in float32 whatever the base is held in: 4 for each weight, 4
    for its gradient and 8 for AdamW's moments, so b = 16, or 8 for "sgd". It fits in a quarter of the free memory.

    Args:
        most: `adapter.rank`.
        entries: of the adapter for each rank, the sum of d_in + d_out over its modules.
        free: bytes that are free with the base loaded; None where that cannot be known, and everything fits.
        optimizer: `train.optimizer`.
    """
    powers = [2**k for k in reversed(range(most.bit_length())) if 2**k < most]
    if free is None:
        return most
    return next((rank for rank in (most, *powers) if rank * entries * _ENTRY[optimizer] <= SHARE * free), 1)


def of_device(config: RunConfig, folder: Path) -> int:
    """A client's rank in a run: what `fitting` says the first time, and that for the whole run.

    Free memory differs from minute to minute, but the server takes updates of the rank of the handshake alone. So the
    rank is written to `folder`, the client's own of this run.
    """
    path = folder / "rank"
    with suppress(OSError, ValueError):
        if 1 <= (kept := int(path.read_text(encoding="utf-8"))) <= config.adapter.rank:
            return kept
    one = adapters.load(config.model, config.adapter.of_rank(1))  # the base with it, once for the process
    entries = sum(parameter.numel() for parameter in one.adapter.values())
    rank = fitting(config.adapter.rank, entries, free_bytes(resolve_device(config.model)), config.train.optimizer)
    own_folder(folder)
    write_atomic(path, str(rank), private=True)
    return rank


def free_bytes(device: torch.device) -> int | None:
    """The memory that can still be had on a device; for the CPU that of this machine or container, None if unknown."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # freed, but not given back
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory()) - int(torch.mps.driver_allocated_memory())
    known = []
    with suppress(OSError, StopIteration):
        lines = _MEMORY.read_text(encoding="utf-8").splitlines()
        known.append(1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")))
    with suppress(OSError, ValueError):  # "max" where there is no limit
        known.append(max(0, int(_LIMIT.read_text(encoding="utf-8")) - int(_USED.read_text(encoding="utf-8"))))
    return min(known, default=None)
