"""What a configuration will cost each row, before anything is trained: `apiary privacy plan`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from apiary.config import RunConfig, UserError
from apiary.privacy import Mechanism, epsilon_by_round, round_of

_LINES = 12  # of the table


class Plan(NamedTuple):
    """A run as the rows of its smallest client meet it."""

    client: str  # "" where the number of rows was given
    rows: int
    round: Mechanism  # of each round
    pld: list[float]  # epsilon after each round
    rdp: list[float]


def smallest_client(config: RunConfig) -> tuple[str, int]:
    """The client with the fewest training rows: its rows are drawn most often, so they pay most.

    Raises:
        UserError: the data cannot be read here.
    """
    from apiary.examples import federate

    try:
        clients = federate(config.data, config.seed).clients
    except UserError as error:
        raise UserError(f"{error.problems[0]}; or give the rows of the smallest client with --rows N") from None
    return min(((client, len(train)) for client, train, _ in clients), key=lambda pair: pair[1])


def plan(config: RunConfig, rows: int | None = None) -> Plan:
    """The plan for `config`, with the client data it names, or for a client of `rows` rows.

    Raises:
        UserError: the data cannot be read, or the settings cannot keep the promise for so many rows.
    """
    client, count = smallest_client(config) if rows is None else ("", rows)
    each, delta = round_of(config, count), config.privacy.delta
    pld, rdp = (epsilon_by_round(each, config.rounds, delta, accountant) for accountant in ("pld", "rdp"))
    return Plan(client, count, each, pld, rdp)


def describe(config: RunConfig, made: Plan) -> Iterator[str]:
    """The plan as lines of text."""
    privacy = config.privacy
    if privacy.unit == "none":
        yield "privacy.unit = 'none': nothing is promised; with 'record' it would be this."
    yield "unit         one row of one client's data"
    yield "adjacency    one row added or removed; how many rows a client has is taken to be public"
    yield f"sampler      Poisson: each row is in a step by itself, with chance {made.round.sample_rate:.4g}"
    yield f"accountant   {privacy.accountant}, at delta {privacy.delta:g}"
    whose = f"{made.client}, the client with the fewest" if made.client else "as given"
    yield f"rows         {made.rows} ({whose}); {privacy.batch_rows} expected in a step"
    yield f"steps        {made.round.steps} a round, {made.round.steps * config.rounds} in {config.rounds} rounds"
    origin = "as set" if privacy.noise_multiplier else f"the least that keeps to epsilon {privacy.epsilon:g}"
    yield f"noise        {made.round.noise_multiplier:.4f} x clip {privacy.clip:g} ({origin})"
    if config.continual.stages:
        yield "stages       not planned for: a stage has fewer rows and rounds, and the ledger counts each by itself"
    yield ""
    yield "round   steps   epsilon (pld)   epsilon (rdp)"
    for number in _shown(config.rounds):
        spent = f"{made.pld[number - 1]:15.3f} {made.rdp[number - 1]:15.3f}"
        yield f"{number:5d} {number * made.round.steps:7d} {spent}{_remark(config, made, number)}"


def _remark(config: RunConfig, made: Plan, number: int) -> str:
    spent = made.pld if config.privacy.accountant == "pld" else made.rdp
    return "   over the budget: a client stops before" if spent[number - 1] > config.privacy.epsilon else ""


def _shown(rounds: int) -> list[int]:
    """Some round numbers, evenly spread, the first and the last among them."""
    if rounds <= _LINES:
        return list(range(1, rounds + 1))
    return sorted({1 + at * (rounds - 1) // (_LINES - 1) for at in range(_LINES)})
