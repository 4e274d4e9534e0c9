"""Which clients take part in a round, and on which ones its outcome is measured."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from apiary.core.tensors import derive_seed, generator


def choose(clients: Iterable[str], *, fraction: float, minimum: int, seed: int, round_number: int) -> list[str]:
    """The cohort of a round, sorted by name: `fraction` of the clients without replacement, at least `minimum`.

    The draw depends on the seed, the round and the set of names alone, so that every engine and a resumed run ask
    the same clients.
    """
    names = sorted(clients)
    order = torch.randperm(len(names), generator=generator(seed, round_number, "sampling"))
    return sorted(names[i] for i in order[: _size(len(names), fraction, minimum)].tolist())


def panel(clients: Iterable[str], *, fraction: float, minimum: int, seed: int) -> list[str]:
    """The clients whose losses are compared from round to round, sorted by name: as many as a cohort.

    Every name has a place in one random order, and those in front are taken. Who comes or leaves thus changes the place
    of one other client at most.
    """
    order = sorted(clients, key=lambda name: (derive_seed(seed, name, "panel"), name))
    return sorted(order[: _size(len(order), fraction, minimum)])


def _size(clients: int, fraction: float, minimum: int) -> int:
    return min(clients, max(minimum, math.ceil(fraction * clients - 1e-9)))
