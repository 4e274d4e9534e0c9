"""Finished simulations that differ in their seed alone, put together: intervals over seeds and rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from apiary.config import loading
from apiary.config.schema import RunConfig
from apiary.core.errors import UserError
from apiary.core.formatting import MISSING, change_text, loss_text
from apiary.evaluation import intervals
from apiary.evaluation.intervals import SeedRows
from apiary.evaluation.row_losses import RowLosses, read_row_losses

_FREE = {"seed", "simulate", "log"}  # tables and keys in which runs of one kind may differ


class _Run(NamedTuple):
    folder: Path
    config: RunConfig
    losses: RowLosses


def compare_runs(folders: Sequence[Path], method: str = "federated") -> dict[str, Any]:
    """The mean table of several runs, and how far `method` lies from each other one, over seeds and rows.

    Args:
        folders: run directories of `apiary simulate`, equal in all settings but the seed.
        method: the one that is compared.

    Returns:
        `seeds`, `rows` (measured in each run), `table` (by method that all runs have: `method`, `loss`, the mean over
        runs, `lowest` and `highest`) and `paired` (by other method: `difference`, its 95% interval `ci95` or None,
        `sd` between runs and `over`, what the interval is over).

    Raises:
        UserError: fewer than two runs, one that cannot be read, two of one seed, or other settings that differ.
    """
    if len(folders) < 2:
        raise UserError("give at least two runs: of one alone, apiary report and its metrics.json tell all there is")
    runs = [_read(folder) for folder in folders]
    _check_alike(runs)
    names = [name for name in runs[0].losses.nats if all(name in run.losses.nats for run in runs)]
    if method not in names:
        raise UserError(f"no run has a row {method!r}: the methods of all runs are {', '.join(names) or 'none'}")
    return {
        "seeds": [run.config.seed for run in runs],
        "rows": [len(run.losses.rows) for run in runs],
        "table": [_row(name, runs) for name in names],
        "paired": {name: _paired(method, name, runs) for name in names if name != method},
    }


def _read(folder: Path) -> _Run:
    if not (folder / "config.toml").exists():
        raise UserError(f"{str(folder)!r} holds no run (no config.toml); give run directories of apiary simulate")
    return _Run(folder, loading.load(folder / "config.toml"), read_row_losses(folder))


def _check_alike(runs: Sequence[_Run]) -> None:
    """Check that seeds differ, and nothing else that changes a result.

    Raises:
        UserError: two runs have one seed, or settings differ, which are named.
    """
    first = runs[0]
    seen: dict[int, Path] = {}
    for run in runs:
        if (before := seen.setdefault(run.config.seed, run.folder)) is not run.folder:
            raise UserError(
                f"{str(before)!r} and {str(run.folder)!r} both have seed = {run.config.seed}: the same training twice "
                "tells nothing new; run one of them with another seed (-s seed=N)"
            )
        if different := _different(first.config, run.config):
            raise UserError(
                f"{str(first.folder)!r} and {str(run.folder)!r} differ in {', '.join(different)}; compare runs that "
                "differ in the seed alone"
            )


def _different(a: RunConfig, b: RunConfig) -> list[str]:
    left, right = a.model_dump(), b.model_dump()
    found = []
    for section, value in left.items():
        if section in _FREE or value == right[section]:
            continue
        keys = [f"{section}.{key}" for key in value if value[key] != right[section][key]] if _is_table(value) else []
        found += keys or [section]
    return found


def _is_table(value: object) -> bool:
    return isinstance(value, dict)


def _row(name: str, runs: Sequence[_Run]) -> dict[str, Any]:
    losses = [float(run.losses.nats[name].sum() / run.losses.tokens.sum()) for run in runs]
    return {"method": name, "loss": sum(losses) / len(losses), "lowest": min(losses), "highest": max(losses)}


def _paired(method: str, other: str, runs: Sequence[_Run]) -> dict[str, Any]:
    found = intervals.over_seeds_and_rows(
        [SeedRows(run.losses.rows, run.losses.nats[method] - run.losses.nats[other], run.losses.tokens) for run in runs]
    )
    return {
        "difference": found.mean,
        "ci95": None if found.ends is None else list(found.ends),
        "sd": found.spread,
        "over": "seeds and rows",
    }


def lines(found: Mapping[str, Any], method: str = "federated") -> list[str]:
    """What `compare_runs` found, as a table of plain lines and a sentence below it."""
    grid = [("method", "held-out loss", "lowest", "highest", f"{method} less it [95%]", "sd of that")]
    for row in found["table"]:
        pair = found["paired"].get(row["method"])
        cells = (row["method"], *(loss_text(row[key]) for key in ("loss", "lowest", "highest")))
        grid.append((*cells, _less(pair), "" if pair is None else loss_text(pair["sd"])))
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    told = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in grid]
    seeds = len(found["seeds"])
    told.append(f"means over {seeds} seeds, nats per response token; intervals are over seeds and rows")
    if few := min(found["rows"]) < intervals.FEWEST_ROWS:
        told.append(f"no intervals: a run has {min(found['rows'])} held-out rows, fewer than {intervals.FEWEST_ROWS}")
    if seeds < _MANY and not few:
        told.append(f"of {seeds} seeds the spread between seeds is hardly known, so that the intervals are wide")
    return told


_MANY = 5  # seeds from which on Student's factor is below 3


def _less(pair: Mapping[str, Any] | None) -> str:
    if pair is None:
        return ""
    ends = f" [{', '.join(map(change_text, pair['ci95']))}]" if pair["ci95"] else f" [{MISSING}]"
    return change_text(pair["difference"]) + ends
