"""What a configuration will cost each row, before anything is trained: `apiary privacy plan`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from apiary.config.schema import RunConfig
from apiary.core.errors import UserError
from apiary.privacy import sampling
from apiary.privacy.mechanism import VisitMechanism, mechanism

_LINES = 12  # of the table
# `benchmarks/privacy.py --seeds 1 --epsilons 1,0.1,0.04` on configs/private.toml, whose untuned held-out loss is 2.50:
# signals of 590, 87 and 38 end at 1.26, 2.16 and 2.33.
FAINT = 40.0


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
    rounds: list[VisitMechanism | None]
    lines: list[Line]
    remarks: list[str]


def plan(config: RunConfig, rows: int | None = None) -> Plan:
    """The plan for `config`, with the client data it names, or for clients of `rows` rows, spread evenly over stages.

    Raises:
        UserError: the data cannot be read, or the settings cannot keep the promise for so many rows.
    """
    if rows is None:
        return plan_for(config, _clients(config))
    return plan_for(config, [("", _spread(rows, len(config.continual.stages) or 1))] * config.data.clients)


def plan_for(config: RunConfig, clients: Sequence[tuple[str, Sequence[int]]]) -> Plan:
    """The plan for clients of these names, with so many rows in each stage.

    Raises:
        UserError: the settings cannot keep the promise for so many rows.
    """
    every = [rows for _, rows in clients]
    client, counts = clients[sampling.worst(config, every)]
    noise = sampling.noise_multiplier(config, counts)
    rounds = [mechanism(config, counts, number, noise) for number in range(1, config.rounds + 1)]
    lines = [
        Line(
            number,
            sum(made.sampler.steps for made in rounds[:number] if made),
            sampling.cost(config, counts, noise, "pld", number),
            sampling.cost(config, counts, noise, "rdp", number),
        )
        for number in _shown(config.rounds)
    ]
    return Plan(client, tuple(counts), noise, rounds, lines, remarks(config, every))


def remarks(config: RunConfig, clients: Sequence[Sequence[int]]) -> list[str]:
    """Warnings: a budget that ends before the run does, and noise that leaves next to nothing to be learnt.

    Args:
        config: the run.
        clients: the rows of each client in each stage.

    Raises:
        UserError: the settings cannot keep the promise for so many rows.
    """
    lines = sampling.short_budget(config, clients)
    cohort = config.strategy.cohort_size(len(clients))
    rows = sorted(clients, key=sum)[len(clients) // 2]  # of the one in the middle, for most have noise like its
    steps = sum(made.steps for n in range(1, config.rounds + 1) if (made := sampling.draw(config, rows, n)))
    found = signal(config, sampling.noise_multiplier(config, rows), steps * cohort)
    if found < FAINT:
        lines.append(
            f"noise drowns what the rows say: over {steps:,} steps of {cohort:,} clients it leaves their mean gradient "
            f"a signal of {found:.0f} at most, and below {FAINT:.0f} next to nothing is learnt; what helps is a larger "
            f"privacy.batch_rows (now {config.privacy.batch_rows}), more rows, clients or rounds, or a larger "
            f"privacy.epsilon (now {config.privacy.epsilon:g})"
        )
    return lines


def signal(config: RunConfig, noise: float, steps: int) -> float:
    """How far the mean gradient stands out, at most, of the noise along it, over `steps` private steps of all clients.

    A row's gradient is clipped to C, so their mean is no longer than C. Noise of deviation z C on the sum is
    z C / batch_rows on the mean, and its mean over n steps has that over sqrt(n): the ratio is
    batch_rows sqrt(n) / z, whatever C is.

    Args:
        config: the run.
        noise: z.
        steps: n.
    """
    return config.privacy.batch_rows * math.sqrt(steps) / noise


def _clients(config: RunConfig) -> list[tuple[str, tuple[int, ...]]]:
    """All clients with their rows by stage."""
    from apiary.data.stages import rows_by_stage, rows_of_run

    try:
        clients = rows_of_run(config).clients
    except UserError as error:
        raise UserError(f"{error.problems[0]}; or give the rows of the smallest client with --rows N") from None
    return [(client.name, tuple(rows_by_stage(client.train, config))) for client in clients]


def _spread(rows: int, stages: int) -> tuple[int, ...]:
    return tuple((rows + at) // stages for at in range(stages))


def describe(config: RunConfig, made: Plan) -> Iterator[str]:
    """The plan as lines of text."""
    privacy, runs = config.privacy, next(each for each in made.rounds if each)
    if privacy.unit == "none":
        yield "privacy.unit = 'none': nothing is promised; with 'record' it would be this."
    whose = f"{made.client}, whose rows pay most" if made.client else "as given"
    origin = "as set" if privacy.noise_multiplier else f"the least that keeps to epsilon {privacy.epsilon:g}"
    yield "unit         one row of one client's data"
    yield "adjacency    one row blanked; the number of rows that a client plans with is taken to be public"
    yield f"sampler      Poisson: each row is in a step by itself, with chance {_chances(made)}"
    yield f"accountant   {privacy.accountant}, at delta {privacy.delta:g}"
    yield f"rows         {' + '.join(map(str, made.rows))} ({whose}); {runs.batch_rows} expected in a step"
    yield f"steps        {made.lines[-1].steps} in {config.rounds} rounds"
    yield f"noise        {runs.noise_multiplier:.4f} x clip {runs.sensitivity.l2:g} ({origin})"
    if any(each and each.sampler.old > each.sampler.new for each in made.rounds):
        yield "buffer       its few rows are drawn more often than new ones, and set the noise: a larger one costs less"
    yield from (f"warning: {remark}" for remark in made.remarks)
    yield ""
    yield "round   steps   epsilon (pld)   epsilon (rdp)"
    for line in made.lines:
        spent = line.pld if privacy.accountant == "pld" else line.rdp
        remark = "   over the budget: a client stops before" if spent > privacy.epsilon else ""
        yield f"{line.round:5d} {line.steps:7d} {line.pld:15.3f} {line.rdp:15.3f}{remark}"


def document(config: RunConfig, made: Plan) -> dict[str, Any]:
    """The plan as plain values; a round without rows of its stage has no chances."""
    privacy, runs = config.privacy, next(each for each in made.rounds if each)
    return {
        "unit": privacy.unit,
        "accountant": privacy.accountant,
        "epsilon": privacy.epsilon,
        "delta": privacy.delta,
        "clip": runs.sensitivity.l2,
        "noise_multiplier": runs.noise_multiplier,
        "client": made.client or None,
        "rows": list(made.rows),
        "batch_rows": runs.batch_rows,
        "steps": made.lines[-1].steps,
        "rounds": [
            {
                "round": number,
                "steps": each.sampler.steps,
                "chance": each.sampler.new,
                "chance_in_buffer": each.sampler.old,
            }
            for number, each in enumerate(made.rounds, 1)
            if each
        ],
        "spent": [
            {"round": line.round, "steps": line.steps, "epsilon_pld": line.pld, "epsilon_rdp": line.rdp}
            for line in made.lines
        ],
        "warnings": made.remarks,
    }


def _chances(made: Plan) -> str:
    drawn = [each.sampler for each in made.rounds if each]
    new = " to ".join(dict.fromkeys(f"{pick(each.new for each in drawn):.4g}" for pick in (min, max)))
    kept = max((each.old for each in drawn), default=0.0)
    return f"{new}; from the buffer up to {kept:.4g}" if kept else new


def _shown(rounds: int) -> list[int]:
    """Some round numbers, evenly spread, the first and the last among them."""
    return sorted({1 + at * (rounds - 1) // (_LINES - 1) for at in range(_LINES)})
