"""What a configuration will cost each row, before anything is trained: `apiary privacy plan`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from apiary import draws
from apiary.config import RunConfig, UserError
from apiary.draws import Draw
from apiary.privacy import Accountant, epsilon

_LINES = 12  # of the table


class Line(NamedTuple):
    """What the worst-off rows of a client have spent after a round."""

    round: int
    steps: int  # so far
    pld: float
    rdp: float


class Plan(NamedTuple):
    """A run as the client meets it whose rows pay most."""

    client: str  # "" where the number of rows was given
    rows: tuple[int, ...]  # in each stage; one number without stages
    noise_multiplier: float
    rounds: list[Draw | None]
    lines: list[Line]


def plan(config: RunConfig, rows: int | None = None) -> Plan:
    """The plan for `config`, with the client data it names, or for a client of `rows` rows, spread evenly over stages.

    Raises:
        UserError: the data cannot be read, or the settings cannot keep the promise for so many rows.
    """
    client, counts = _worst_client(config) if rows is None else ("", _spread(rows, len(config.continual.stages) or 1))
    noise = draws.noise_multiplier(config, counts)
    rounds = [draws.draw(config, counts, number) for number in range(1, config.rounds + 1)]
    lines = [
        Line(
            number,
            sum(made.steps for made in rounds[:number] if made),
            cost(config, counts, noise, "pld", number),
            cost(config, counts, noise, "rdp", number),
        )
        for number in _shown(config.rounds)
    ]
    return Plan(client, counts, noise, rounds, lines)


def cost(
    config: RunConfig, rows: Sequence[int], noise: float, accountant: Accountant, rounds: int | None = None
) -> float:
    """The epsilon of a client's worst-off rows after so many rounds (all of them where None)."""
    histories = draws.histories(config, rows, noise, rounds)
    return max((epsilon(history, config.privacy.delta, accountant) for history in histories), default=0.0)


def _worst_client(config: RunConfig) -> tuple[str, tuple[int, ...]]:
    """The client whose rows are drawn most often, with its rows by stage: without stages the one with the fewest."""
    from apiary.continual import rows_by_stage, within
    from apiary.examples import federate

    try:
        clients = within(federate(config.data, config.seed), config).clients
    except UserError as error:
        raise UserError(f"{error.problems[0]}; or give the rows of the smallest client with --rows N") from None
    found = [(client, tuple(rows_by_stage(train, config))) for client, train, _ in clients]
    return max(found, key=lambda pair: cost(config, pair[1], 1.0, "rdp"))


def _spread(rows: int, stages: int) -> tuple[int, ...]:
    return tuple((rows + at) // stages for at in range(stages))


def describe(config: RunConfig, made: Plan) -> Iterator[str]:
    """The plan as lines of text."""
    privacy = config.privacy
    if privacy.unit == "none":
        yield "privacy.unit = 'none': nothing is promised; with 'record' it would be this."
    whose = f"{made.client}, whose rows pay most" if made.client else "as given"
    origin = "as set" if privacy.noise_multiplier else f"the least that keeps to epsilon {privacy.epsilon:g}"
    yield "unit         one row of one client's data"
    yield "adjacency    one row blanked; how many rows a client has is taken to be public"
    yield f"sampler      Poisson: each row is in a step by itself, with chance {_chances(made)}"
    yield f"accountant   {privacy.accountant}, at delta {privacy.delta:g}"
    yield f"rows         {' + '.join(map(str, made.rows))} ({whose}); {privacy.batch_rows} expected in a step"
    yield f"steps        {made.lines[-1].steps} in {config.rounds} rounds"
    yield f"noise        {made.noise_multiplier:.4f} x clip {privacy.clip:g} ({origin})"
    if any(made_round and made_round.old > made_round.new for made_round in made.rounds):
        yield "buffer       its few rows are drawn more often than new ones, and set the noise: a larger one costs less"
    yield ""
    yield "round   steps   epsilon (pld)   epsilon (rdp)"
    for line in made.lines:
        spent = line.pld if privacy.accountant == "pld" else line.rdp
        remark = "   over the budget: a client stops before" if spent > privacy.epsilon else ""
        yield f"{line.round:5d} {line.steps:7d} {line.pld:15.3f} {line.rdp:15.3f}{remark}"


def _chances(made: Plan) -> str:
    drawn = [each for each in made.rounds if each]
    new = " to ".join(dict.fromkeys(f"{pick(each.new for each in drawn):.4g}" for pick in (min, max)))
    kept = max((each.old for each in drawn), default=0.0)
    return f"{new}; from the buffer up to {kept:.4g}" if kept else new


def _shown(rounds: int) -> list[int]:
    """Some round numbers, evenly spread, the first and the last among them."""
    return sorted({1 + at * (rounds - 1) // (_LINES - 1) for at in range(_LINES)})
