"""What each client of a finished federation trained: in which rounds, for how many steps, on which rows, at which rank.

The baselines are trained from this alone, so that they differ from the clients in nothing but the company.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from apiary.config.schema import RunConfig
from apiary.data.examples import Example
from apiary.data.federation import ClientData, untrained
from client import curated_rows
from client.curation import Context

Event = Mapping[str, Any]


class ClientVisits(NamedTuple):
    """A client's part in a federation."""

    client: str
    rank: int  # of its adapter when the run began
    steps: Mapping[int, int]  # optimizer steps by round, of the visits that counted
    choices: Mapping[int, Sequence[Example]]  # its training rows, by the round from which on it trained on them
    known: bool = True  # whether these are the rows; where its choice is lost, they are all that it has

    @property
    def total(self) -> int:
        """Optimizer steps in all rounds."""
        return sum(self.steps.values())

    def until(self, number: int) -> int:
        """Optimizer steps in all rounds up to `number`."""
        return sum(steps for at, steps in self.steps.items() if at <= number)

    def choice(self, number: int) -> int:
        """The key in `choices` of the rows of round `number`; before the first choice, that one."""
        made = sorted(self.choices)
        return made[max(0, bisect.bisect_right(made, number) - 1)]


def of_run(
    clients: Iterable[ClientData], config: RunConfig, events: Sequence[Event], folder: Path
) -> tuple[ClientVisits, ...]:
    """The visits of all clients that took part, in the order of the federation.

    Args:
        clients: their data.
        config: the run.
        events: its log.
        folder: the run directory.
    """
    steps: dict[str, dict[int, int]] = {}
    for event in events:
        if event["event"] == "client" and event["steps"]:
            steps.setdefault(event["client"], {})[event["round"]] = event["steps"]
    ranks = {event["client"]: event["rank"] for event in events if event["event"] == "handshake"}
    found = []
    for client in clients:
        if client.name in steps:
            choices = _choices(client, config, folder / "clients" / client.name)
            # Runs of an earlier version kept three choices: where the first is gone, so are the rows of early rounds.
            known = bool(choices) and min(choices) <= min(steps[client.name])
            rank = ranks.get(client.name, config.adapter.rank)
            found.append(ClientVisits(client.name, rank, steps[client.name], choices or _all(client), known))
    return tuple(found)


def _choices(client: ClientData, config: RunConfig, folder: Path) -> Mapping[int, Sequence[Example]]:
    """The rows that curation left, by the round of the choice; nothing where they cannot be had any more."""
    if not config.curate.steps:
        return _all(client)
    context = Context(config.seed, client.name, untrained(client.test, client.validation))
    try:
        return curated_rows.choices(client.train, config.curate, context, folder)
    except (OSError, ValueError):
        return {}


def _all(client: ClientData) -> Mapping[int, Sequence[Example]]:
    return {0: client.train}
