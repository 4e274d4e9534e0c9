"""Which round a run delivers and which rows decided that: one value and one sentence for terminal and report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, Literal, NamedTuple, TypeAlias

from apiary.config.schema import RunConfig

EVENT: Final = "delivered"
BEST: Final = "adapter-best"  # folder of the best round's adapter, where the last round is delivered
Rows: TypeAlias = Literal["clients", "clients_half", "server", "server_half"]
_ROWS: Mapping[str, str] = {
    "clients": "the clients' own held-out rows",
    "clients_half": "the half of each client's own held-out rows that is set apart for this",
    "server": "the server's held-out rows, those of the table",
    "server_half": "the half of the server's held-out rows that is set apart for this",
}


class Delivery(NamedTuple):
    """What a run delivers."""

    round: int  # whose adapter stands in `adapter/`
    last: int  # the last round that was done
    best: int | None = None  # the best round on `rows`; None where that is not known
    rows: str = ""  # of `Rows`: which rows decide which round is best
    kept: str = ""  # folder of the best round's adapter, where another one is delivered


def rows_of(config: RunConfig) -> Rows:
    """The rows that decide which round of a run is best; with `evaluate.patience` they are apart from the figures'."""
    if config.scores_from_clients:
        return "clients_half" if config.evaluate.patience else "clients"
    return "server_half" if config.evaluate.patience or config.evaluate.set_apart else "server"


def words(rows: str) -> str:
    """How a sentence names the rows that decide."""
    return _ROWS.get(rows, "held-out rows")


def read(values: Mapping[str, Any]) -> Delivery:
    """The delivery that an event, or a part of metrics.json, tells of."""
    return Delivery(**{name: values[name] for name in Delivery._fields if name in values})


def of_events(events: Iterable[Mapping[str, Any]]) -> Delivery | None:
    """What the log says that the run delivers; None in a log that does not tell."""
    told = [event for event in events if event["event"] == EVENT]
    return read(told[-1]) if told else None


def sentence(delivery: Delivery) -> str:
    """Which round is delivered, by which rows, and where the best one is kept if that is another."""
    found = delivery
    # Of clients the median one counts, so that one that lies decides nothing.
    whose = "the median client's loss" if found.rows.startswith("clients") else "the loss"
    by = f"{whose} on {words(found.rows)}"
    if found.best is None:
        return f"Delivered: the last round, {found.last}."
    if found.round == found.last == found.best:
        return f"Delivered: the last round, {found.last}, which is the best by {by}."
    if found.round == found.best:
        return f"Delivered: round {found.round} of the {found.last} that were done, the best by {by}."
    return (
        f"Delivered: the last round, {found.last}. Round {found.best} is the best by {by}; its adapter "
        f"is in {found.kept}. The figures are of the round delivered: on the rows that picked it, the best round would "
        "look better than it is."
    )
