"""What the runs of a sweep say: a table of settings with paired differences, the choice, and how far to trust it.

Half of the held-out rows choose the winner, and the figures are on the other half (`evaluate.set_apart`), so no row
makes the winner look better than it is. The models can: the one that wins may owe it to the luck of its seeds, and that
luck is in the figures too. Only runs with other seeds, which chose nothing, are free of it (`confirmed`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from apiary.core.errors import RunFailed, UserError
from apiary.evaluation import intervals
from apiary.evaluation.intervals import LEVEL, SeedRows
from apiary.evaluation.row_losses import RowLosses, read_row_losses
from apiary.tracking.metrics_file import read_metrics
from simulation.sweep import space
from simulation.sweep.definition import Sweep
from simulation.sweep.space import Choice, Values

METHOD = "federated"
MEASURED, PART = "measured", "part"  # with all seeds of the sweep, or with fewer
_DRAWS = 10_000  # resamples of an interval that allows for many comparisons
_MANY = 5  # seeds from which on Student's factor is below 3


class Run(NamedTuple):
    """A finished run."""

    losses: RowLosses  # on the rows of the figures
    choosing: float  # loss on the rows that choose, nats per response token
    chose: int  # how many these are
    loss: float
    accuracy: float | None
    seconds: float  # of the federation's rounds
    bytes: int  # up and down in the rounds
    curve: Mapping[int, float]  # loss on the rows of the figures by round


class Setting(NamedTuple):
    """What is known of a setting."""

    number: int
    values: Values
    runs: Mapping[int, Run]  # by seed
    state: str  # MEASURED, PART, or what ended it: "failed", "refused", "pruned"
    why: str = ""


def run_name(number: int, seed: int) -> str:
    """The name of a run's folder."""
    return f"s{number:04d}-seed{seed}"


def is_finished(folder: Path) -> bool:
    """Whether a run has come to its end."""
    return (folder / "metrics.json").exists() and (folder / "row_losses.json").exists()


def read_run(folder: Path) -> Run:
    """A finished run of a sweep.

    Raises:
        UserError: its files are not those of a finished run of a sweep.
    """
    metrics, losses = read_metrics(folder), read_row_losses(folder)
    try:
        row = next(row for row in metrics["table"] if row["method"] == METHOD)
        return Run(
            losses=losses,
            choosing=_number(metrics["deciding"]["loss"]),
            chose=int(metrics["deciding"]["n"]),
            loss=_number(row["loss"]),
            accuracy=row["accuracy"],
            seconds=sum(one.get("seconds", 0.0) for one in metrics["rounds"]),
            bytes=sum(one.get("bytes_up", 0) + one.get("bytes_down", 0) for one in metrics["rounds"]),
            curve={one["round"]: _number(one["loss"]) for one in metrics["rounds"] if "loss" in one},
        )
    except (KeyError, TypeError, StopIteration):
        raise UserError(f"{str(folder)!r} is no finished run of a sweep; remove it, and it is run anew") from None


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def gather(
    sweep: Sweep, folder: Path, settings: Sequence[Values], ended: Mapping[str, Mapping[str, str]]
) -> list[Setting]:
    """All settings with their finished runs.

    Args:
        sweep: what was asked for.
        folder: of the runs.
        settings: by number.
        ended: why a run came to no result, by its name.
    """
    found = []
    for number, values in enumerate(settings):
        names = {seed: run_name(number, seed) for seed in sweep.seeds}
        runs = {seed: read_run(folder / name) for seed, name in names.items() if is_finished(folder / name)}
        ends = [ended[name] for name in names.values() if name in ended]
        if ends:
            found.append(Setting(number, values, runs, ends[0]["state"], ends[0]["why"]))
        else:
            found.append(Setting(number, values, runs, MEASURED if len(runs) == len(sweep.seeds) else PART))
    return found


def compared(settings: Sequence[Setting], whole: bool) -> tuple[list[Setting], list[int]]:
    """The settings that a choice can be made between, and the seeds that all of these have.

    Args:
        settings: all of them.
        whole: take every setting that has a run, on the seeds that all have: of a grid, which runs all settings with
            one seed before the next. Else only those with the most seeds.
    """
    alive = [one for one in settings if one.runs and one.state in (MEASURED, PART)]
    most = max((len(one.runs) for one in alive), default=0)
    if not (whole and _common(alive)):
        alive = [one for one in alive if len(one.runs) == most]
    return alive, _common(alive)


def _common(settings: Sequence[Setting]) -> list[int]:
    return sorted(set.intersection(*(set(one.runs) for one in settings))) if settings else []


def choose(settings: Sequence[Setting], seeds: Iterable[int]) -> Setting:
    """The setting with the lowest mean loss on the rows that choose; of equal ones the first."""
    numbers = list(seeds)
    return min(settings, key=lambda one: (_mean(one.runs[seed].choosing for seed in numbers), one.number))


def _mean(values: Iterable[float]) -> float:
    known = list(values)
    return sum(known) / len(known) if all(map(math.isfinite, known)) and known else math.inf


def paired(ours: Mapping[int, Run], other: Mapping[int, Run], comparisons: int) -> dict[str, Any] | None:
    """How far the loss of a setting lies from another one's, seed by seed and row by row.

    Args:
        ours: the runs of the setting by seed.
        other: those of the other one.
        comparisons: how many intervals are to hold together: each then has the level 1 - 0.05 / comparisons, so that
            all of them hold at once in at least 95 of 100 sweeps (Bonferroni).

    Returns:
        `difference` (nats per response token, below 0 where `ours` is better), `ci95`, `simultaneous` (the wider
        interval), `sd` between seeds, `seeds`, `rows` and what it is `over`. None without a seed that both have, or
        where they were measured on different rows.
    """
    seeds = sorted(set(ours) & set(other))
    if not seeds or not all(_same_rows(ours[seed], other[seed]) for seed in seeds):
        return None
    less = [
        SeedRows(a.losses.rows, a.losses.nats[METHOD] - b.losses.nats[METHOD], a.losses.tokens)
        for a, b in ((ours[seed], other[seed]) for seed in seeds)
    ]
    wider = 1 - (1 - LEVEL) / max(1, comparisons)
    if len(seeds) == 1:
        ((_, values, weights),) = less
        difference, spread, over = float(values.sum() / weights.sum()), None, "rows"
        ends = intervals.over_rows(values, weights, seed=seeds[0])
        wide = intervals.over_rows(values, weights, seed=seeds[0], draws=_DRAWS, level=wider)
    else:
        found = intervals.over_seeds_and_rows(less)
        difference, spread, over, ends = found.mean, found.spread, "seeds and rows", found.ends
        wide = intervals.over_seeds_and_rows(less, wider).ends
    return {
        "difference": difference,
        "ci95": None if ends is None else list(ends),
        "simultaneous": None if wide is None else list(wide),
        "sd": spread,
        "seeds": seeds,
        "rows": min(len(one.values) for one in less),
        "over": over,
    }


def _same_rows(a: Run, b: Run) -> bool:
    return a.losses.rows == b.losses.rows and np.array_equal(a.losses.tokens, b.losses.tokens)


def document(sweep: Sweep, settings: Sequence[Setting], fresh: Mapping[int, Mapping[int, Run]]) -> dict[str, Any]:
    """The content of results.json.

    Args:
        sweep: what was asked for.
        settings: what is known of each setting.
        fresh: by number of a setting its runs with seeds that chose nothing.

    Raises:
        RunFailed: no run has come to a result.
    """
    between, seeds = compared(settings, sweep.search == "grid")
    if not between:
        first = next((f"{space.words(one.values)}: {one.why}" for one in settings if one.why), "none was finished")
        raise RunFailed(f"no run of the sweep has come to a result; {first}")
    winner = choose(between, seeds)
    reference = next((one for one in between if one.values == space.own(sweep.base, sweep.axes)), between[0])
    others = [one for one in settings if one.runs and one.number != reference.number]
    table = [_row(one, None if one is reference else paired(one.runs, reference.runs, len(others))) for one in settings]
    again = sorted(set(fresh.get(winner.number, {})) & set(fresh.get(reference.number, {})))
    confirmed = paired(fresh[winner.number], fresh[reference.number], 1) if again else None
    example = winner.runs[seeds[0]]
    return {
        "schema": 1,
        "keys": [axis.key for axis in sweep.axes],
        "search": sweep.search,
        "seeds": list(sweep.seeds),
        "table": table,
        "comparisons": len(others),
        "reference": {"number": reference.number, "configured": reference.values == space.own(sweep.base, sweep.axes)},
        "winner": {
            "number": winner.number,
            "values": dict(winner.values),
            "choosing": _mean(winner.runs[seed].choosing for seed in seeds),
            "reference_choosing": _mean(reference.runs[seed].choosing for seed in seeds),
            "settings": len(between),
            "seeds": seeds,
            "rows": example.chose,
        },
        "rows": {"choosing": example.chose, "figures": len(example.losses.rows)},
        "confirmed": confirmed,
        "edges": edges(sweep, winner.values),
        "command": sweep.command(winner.values),
    }


def _row(one: Setting, against: Mapping[str, Any] | None) -> dict[str, Any]:
    runs = list(one.runs.values())
    losses = [run.loss for run in runs]
    rounds = sorted(set.intersection(*(set(run.curve) for run in runs))) if runs else []
    hits = [run.accuracy for run in runs if run.accuracy is not None]
    return {
        "number": one.number,
        "values": dict(one.values),
        "state": one.state,
        "why": one.why,
        "seeds": sorted(one.runs),
        "choosing": sum(run.choosing for run in runs) / len(runs) if runs else None,
        "loss": sum(losses) / len(runs) if runs else None,
        "lowest": min(losses, default=None),
        "highest": max(losses, default=None),
        "accuracy": sum(hits) / len(hits) if runs and len(hits) == len(runs) else None,
        "seconds": sum(run.seconds for run in runs) / len(runs) if runs else None,
        "bytes": sum(run.bytes for run in runs) / len(runs) if runs else None,
        "paired": against,
        "curve": [[number, sum(run.curve[number] for run in runs) / len(runs)] for number in rounds],
    }


def edges(sweep: Sweep, values: Values) -> list[str]:
    """The keys of which a setting has the least or the greatest value that was to be tried, where these are numbers."""
    found = []
    for axis in sweep.axes:
        tried = axis.values if isinstance(axis, Choice) else (axis.low, axis.high)
        numbers = [value for value in tried if isinstance(value, int | float) and not isinstance(value, bool)]
        value = values.get(axis.key)
        if len(numbers) == len(tried) and value in (min(numbers), max(numbers)):
            found.append(axis.key)
    return found
