"""Which clients take part in a round, and on which ones its outcome is measured."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from apiary.config.schema import cohort_size
from apiary.core.tensors import derive_seed, generator


class Draw(NamedTuple):
    """How clients are drawn."""

    fraction: float  # of the clients that are there
    minimum: int  # clients, or all where there are fewer
    seed: int  # of the run


def choose(clients: Iterable[str], draw: Draw, number: int) -> list[str]:
    """The cohort of round `number`, sorted by name, drawn without replacement.

    The draw depends on the seed, the round and the set of names alone, so that every engine and a resumed run ask
    the same clients.
    """
    names = sorted(clients)
    order = torch.randperm(len(names), generator=generator(draw.seed, number, "sampling"))
    return sorted(names[i] for i in order[: _size(len(names), draw)].tolist())


def panel(clients: Iterable[str], draw: Draw) -> list[str]:
    """The clients whose losses are compared from round to round, sorted by name: as many as a cohort.

    Every name has a place in one random order, and those in front are taken. Who comes or leaves thus changes the place
    of one other client at most.
    """
    order = sorted(clients, key=lambda name: (derive_seed(draw.seed, name, "panel"), name))
    return sorted(order[: _size(len(order), draw)])


def _size(clients: int, draw: Draw) -> int:
    return cohort_size(clients, draw.fraction, draw.minimum)
