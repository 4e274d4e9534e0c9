"""Clients of a simulation that are away, or fail: to see what a method makes of whoever is left.

Who is away and who fails is drawn anew in every round, from the run's seed, the round and the number of clients alone:
a resumed run, and one on another engine, misses the same ones. A client that is away is not asked, neither to train nor
to measure, and trains on from where it was when it is back. One that fails has been asked and answers with an error.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch

from apiary.config.schema import RunConfig
from apiary.core.errors import UserError
from apiary.core.tensors import generator


def check(config: RunConfig, clients: int) -> None:
    """Check that somebody is left.

    Raises:
        UserError: all clients would be away, or fail, in every round.
    """
    for key in ("away", "failing"):
        share = getattr(config.simulate, key)
        if _count(share, clients) == clients:
            raise UserError(f"simulate.{key} = {share:g}: that is all of {clients} clients; at least one must stay")


def away(config: RunConfig, clients: Sequence[str], number: int) -> frozenset[str]:
    """The names of those that are away in round `number`, from 1; 0 for the measurement before the first one."""
    return frozenset(
        clients[index] for index in _drawn(config.simulate.away, len(clients), config.seed, number, "away")
    )


def fails(config: RunConfig, clients: int, index: int, number: int) -> bool:
    """Whether the client at place `index` of so many fails in round `number`."""
    return index in _drawn(config.simulate.failing, clients, config.seed, number, "failing")


@functools.lru_cache(maxsize=2)
def _drawn(share: float, clients: int, seed: int, number: int, kind: str) -> frozenset[int]:
    """The clients, by their place, that something happens to in a round; asked for every message, drawn once."""
    order = torch.randperm(clients, generator=generator(seed, number, kind))
    return frozenset(order[: _count(share, clients)].tolist())


def _count(share: float, clients: int) -> int:
    """`share` of all clients to the nearest number."""
    return math.floor(share * clients + 0.5)
