"""One organisation: what its operator says, a run as it is carried out there, and the site as its worker sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from apiary.config.schema import Method, RunConfig
from apiary.core.counts import EXACT, ROUNDED, CountPolicy
from apiary.data.examples import Example
from strategies.from_config import local_from_config
from strategies.local import PLAIN, LocalAlgorithm


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
    validation: Sequence[Example] = ()  # neither trained nor told of: by them it chooses its own model


class Facts(NamedTuple):
    """What the site's operator says; nothing of it comes from the server."""

    client: str  # the site's name
    data: Path  # a file, or a folder of files
    state: Path  # memory of runs, the ledger, errors in full
    model: str | None = None  # the site's own place of the base
    device: str | None = None
    rank: int | None = None  # the highest that it trains; as the run says where None
    max_epsilon: float | None = None  # train only under record-level privacy, and within this budget
    max_delta: float = 1e-5  # likewise, where there is a `max_epsilon`
    counts: CountPolicy = ROUNDED  # how it tells its counts
    columns: Mapping[str, str] = MappingProxyType({})  # its own names of them, as in `data.columns`


def at_home(config: RunConfig, facts: Facts) -> RunConfig:
    """The run's configuration with this site's own places; what the server says of data on its disk is left out."""
    model = {"name": facts.model} if facts.model else {}
    device = {"device": facts.device} if facts.device else {}
    # Which split, query and columns choose the rows, which is for the site to say as well.
    mine = {"source": str(facts.data), "split": "train", "query": None, "test": None, "columns": dict(facts.columns)}
    data = {**mine, "clients": 1, "partition": Method(name="iid")}
    return config.model_copy(
        update={
            "model": config.model.model_copy(update=model | device),
            "data": config.data.model_copy(update=data),
        }
    )


def names_code(config: RunConfig) -> bool:
    """Whether a run names a client's code by module:function, which is for the site to choose and not for a server."""
    methods = (*config.train.penalties, *config.curate.steps, config.wire.up, config.wire.down)
    return any(":" in name for name in (config.train.objective, *(method.name for method in methods)))


def local_algorithm(config: RunConfig) -> LocalAlgorithm:
    """The client's half of the run's method; plain training for one by module:function, whose code is the server's.

    The server refuses to start such a run where its method has a client half (`strategies.from_config`).
    """
    return PLAIN if ":" in config.strategy.name else local_from_config(config)
