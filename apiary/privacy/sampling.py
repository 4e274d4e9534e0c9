"""How a client's rows are drawn under differential privacy, round by round, and the noise that this asks for.

All of it follows from the configuration and the number of rows in each stage, which are public: so the whole run can be
planned, and its noise found, before anything is trained.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from apiary.config.schema import RunConfig
from apiary.core.errors import UserError
from apiary.core.stages import stage_of
from apiary.privacy.accounting import Accountant, Mechanism, calibrate, epsilon, sample_rate

_LIKELY = 3  # clients that the accountant compares


class Draw(NamedTuple):
    """A round: in each of its `steps`, each row is drawn by itself with the chance of its kind."""

    steps: int
    new: float  # chance of a row of the round's own stage
    old: float  # chance of a row that is kept from an earlier stage
    stage: int  # from 0


def draw(config: RunConfig, rows: Sequence[int], number: int) -> Draw | None:
    """How rows are drawn in round `number`; None where the client has no rows for its stage.

    `privacy.batch_rows` are expected in a step, `continual.replay` of them from the buffer once there is one. The steps
    are `train.steps`, or as many as expect to see each new row `train.epochs` times.

    Args:
        config: the run.
        rows: the client's training rows in each stage, before curation; without stages one number.
        number: the round, from 1.

    Raises:
        UserError: more rows expected in a step than there are, or a delta that protects nobody.
    """
    stages, privacy, train = config.continual.stages, config.privacy, config.train
    stage = stage_of(number, config.rounds, len(stages)) if stages else 0
    if not rows[stage]:
        return None
    whole = sample_rate(privacy, rows[stage])
    # Expected rows of the buffer: its size is a fraction here (apiary.config.compatibility).
    kept = config.continual.buffer * sum(rows[:stage])
    share = config.continual.replay if kept else 0.0
    new = (1 - share) * whole
    old = min(1.0, share * privacy.batch_rows / kept) if kept else 0.0
    steps = train.steps or 1 if train.epochs is None else max(1, math.ceil(round(train.epochs / new, 6)))
    return Draw(steps, new, old, stage)


def cohort_rates(made: Draw) -> dict[str, float]:
    """The chances of a round by cohort: the rows that came in stage j are cohort j, for the ledger."""
    earlier = {str(stage): made.old for stage in range(made.stage) if made.old}
    return {**earlier, str(made.stage): made.new}


def partition(config: RunConfig) -> str:
    """What names the way in which rows are parted into cohorts; empty without stages."""
    if not config.continual.stages:
        return ""
    text = json.dumps([config.continual.by, config.continual.stages])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def histories(config: RunConfig, rows: Sequence[int], noise: float, rounds: int | None = None) -> list[list[Mechanism]]:
    """What the rows of each cohort meet in the first `rounds` rounds (all of them where None), a history each.

    Raises:
        UserError: more rows are expected in a step than there are, or delta protects nobody.
    """
    planned = [draw(config, rows, number) for number in range(1, (rounds or config.rounds) + 1)]
    met: list[Mapping[str, Mechanism]] = [
        {cohort: Mechanism(noise, rate, made.steps) for cohort, rate in cohort_rates(made).items()}
        for made in planned
        if made
    ]
    cohorts = sorted({cohort for one in met for cohort in one})
    return [[one[cohort] for one in met if cohort in one] for cohort in cohorts]


def cost(
    config: RunConfig, rows: Sequence[int], noise: float, accountant: Accountant, rounds: int | None = None
) -> float:
    """The epsilon of a client's worst-off rows after so many rounds (all of them where None).

    Raises:
        UserError: more rows are expected in a step than there are, or delta protects nobody.
    """
    found = histories(config, rows, noise, rounds)
    return max((epsilon(history, config.privacy.delta, accountant) for history in found), default=0.0)


def check(config: RunConfig, clients: Iterable[Sequence[int]]) -> None:
    """Check that every client has the rows that the promise of a run needs, and can train a round at least.

    Args:
        config: the run.
        clients: the rows of each client in each stage.

    Raises:
        UserError: the first client that has not, or noise that breaks the budget before anything is trained.
    """
    if config.privacy.unit != "record":
        return
    each = list(clients)
    for rows in each:
        histories(config, rows, noise=1.0)
    noise, privacy = config.privacy.noise_multiplier, config.privacy
    if noise is None or not each:
        return
    rows = each[worst(config, each, first=True)]
    first = _first_round(config, rows)
    after = cost(config, rows, noise, privacy.accountant, first)
    if after > privacy.epsilon:
        raise UserError(
            f"privacy.noise_multiplier = {noise:g}: epsilon after round {first} would be {after:.3g}, above "
            f"privacy.epsilon = {privacy.epsilon:g}; {_enough(config, each)}"
        )


def short_budget(config: RunConfig, clients: Sequence[Sequence[int]]) -> list[str]:
    """A warning where the noise that is set lasts some clients for fewer rounds than are planned.

    Args:
        config: the run, which `check` has passed.
        clients: the rows of each client in each stage.
    """
    noise, privacy = config.privacy.noise_multiplier, config.privacy
    if privacy.unit != "record" or noise is None or not clients:
        return []
    rows = clients[worst(config, clients)]
    within, beyond = 0, config.rounds + 1
    while beyond - within > 1:
        middle = (within + beyond) // 2
        kept = cost(config, rows, noise, privacy.accountant, middle) <= privacy.epsilon
        within, beyond = (middle, beyond) if kept else (within, middle)
    if within == config.rounds:
        return []
    return [
        f"privacy.noise_multiplier = {noise:g}: privacy.epsilon = {privacy.epsilon:g} lasts for {within} of "
        f"{config.rounds} rounds at a client of {sum(rows):,} rows, which then stops; {_enough(config, clients)}"
    ]


def worst(config: RunConfig, clients: Sequence[Sequence[int]], *, first: bool = False) -> int:
    """Which client's rows pay most for the same noise, in all rounds or in the `first` that it has rows for.

    Raises:
        UserError: more rows are expected in a step than there are, or delta protects nobody.
    """
    rounds = [_first_round(config, rows) if first else config.rounds for rows in clients]

    def rough(client: int) -> float:
        """About what epsilon is the root of, for nothing; the accountant then judges the nearest few."""
        found = histories(config, clients[client], 1.0, rounds[client])
        return max((sum(run.sample_rate**2 * run.steps for run in history) for history in found), default=0.0)

    likely = sorted(range(len(clients)), key=rough, reverse=True)[:_LIKELY]
    if len(likely) == 1:
        return likely[0]
    return max(likely, key=lambda client: cost(config, clients[client], 1.0, "rdp", rounds[client]))


def _first_round(config: RunConfig, rows: Sequence[int]) -> int:
    """The first round for which a client has rows; the last where it has none."""
    numbers = range(1, config.rounds + 1)
    return next((number for number in numbers if draw(config, rows, number)), config.rounds)


def _enough(config: RunConfig, clients: Sequence[Sequence[int]]) -> str:
    """What noise keeps all clients to the budget, rounded up."""
    needed = least_noise(config, clients[worst(config, clients)])
    digits = 2 - math.floor(math.log10(needed))
    return f"at least {math.ceil(needed * 10**digits) / 10**digits:g} keeps it for all {config.rounds} rounds"


def noise_multiplier(config: RunConfig, rows: Sequence[int]) -> float:
    """The noise of every step: as set, or the least that keeps each row to `privacy.epsilon` over all rounds planned.

    Raises:
        UserError: as `draw`, or no noise keeps to the budget.
    """
    return least_noise(config, rows) if config.privacy.noise_multiplier is None else config.privacy.noise_multiplier


def least_noise(config: RunConfig, rows: Sequence[int]) -> float:
    """The least noise that keeps each row to `privacy.epsilon` over all rounds planned, whatever is set.

    Raises:
        UserError: as `draw`, or no noise keeps to the budget.
    """
    privacy = config.privacy
    found = [_merged(history) for history in histories(config, rows, 1.0)]
    if not found:
        raise UserError("privacy.unit = 'record': there are no rows to protect in any stage")
    return max(_least(history, privacy.epsilon, privacy.delta, privacy.accountant) for history in found)


def _merged(history: Sequence[Mechanism]) -> tuple[tuple[float, int], ...]:
    """The steps at each rate."""
    steps: dict[float, int] = {}
    for run in history:
        steps[run.sample_rate] = steps.get(run.sample_rate, 0) + run.steps
    return tuple(sorted(steps.items()))


@functools.lru_cache(maxsize=256)
def _least(steps: tuple[tuple[float, int], ...], target: float, delta: float, accountant: Accountant) -> float:
    def history(noise: float) -> list[Mechanism]:
        return [Mechanism(noise, rate, count) for rate, count in steps]

    return calibrate(history, target, delta, accountant)
