"""One organisation, as its worker sees it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from apiary.core.counts import EXACT, CountPolicy
from apiary.data.examples import Example


class Site(NamedTuple):
    """One organisation: its name, its examples, and the places that are its own."""

    client: str
    train: Sequence[Example]
    test: Sequence[Example]
    folder: Path  # of this run
    ledger: Path  # of all runs on these data
    rank: int  # of its adapter
    counts: CountPolicy = EXACT  # how it tells its counts: exactly in a simulation, which has nobody to hide them from
    fewest: int = 0  # rows, below which without privacy it neither trains nor tells a loss; none in a simulation
