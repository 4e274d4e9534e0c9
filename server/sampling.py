"""Which clients take part in a round."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from apiary.tensors import generator


def choose(clients: Iterable[str], *, fraction: float, minimum: int, seed: int, round_number: int) -> list[str]:
    """The cohort of a round, sorted by name: `fraction` of the clients without replacement, at least `minimum`.

    The draw depends on the seed, the round and the set of names alone, so that every engine and a resumed run ask
    the same clients.
    """
    names = sorted(clients)
    size = min(len(names), max(minimum, math.ceil(fraction * len(names) - 1e-9)))
    order = torch.randperm(len(names), generator=generator(seed, round_number, "sampling"))
    return sorted(names[i] for i in order[:size].tolist())
