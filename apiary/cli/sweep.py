"""`apiary sweep`: many runs that differ in a few keys."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import NamedTuple

import typer

from apiary.cli.shared import print_json, shown, stdout_kept
from apiary.core.errors import UserError
from apiary.core.formatting import is_unicode, name_text
from simulation.sweep import definition
from simulation.sweep.definition import Budget, Sweep


class Asked(NamedTuple):
    """What the command line says of a sweep; None where it says nothing."""

    config: Path | None
    overrides: tuple[str, ...]
    seeds: int | None
    search: str | None
    trials: int | None
    pruner: str | None


def budget(runs: int | None, minutes: float | None) -> Budget:
    """Where the sweep ends.

    Raises:
        UserError: no number of minutes.
    """
    if minutes is not None and not 0 < minutes < math.inf:
        raise UserError(f"--minutes {minutes:g}: expected a number above 0, such as 90")
    return Budget(runs, minutes)


def prepare(asked: Asked, out: Path | None, resume: bool, spent: Budget) -> tuple[Sweep, Path]:
    """The sweep, checked without data and model, and its folder.

    Raises:
        UserError: all that is wrong with what was asked.
    """
    if resume and out is None:
        raise UserError("--resume needs --out DIR: the sweep to go on with, or to begin")
    name = asked.config.stem if asked.config else "demo"
    folder = (out or Path("runs") / f"sweep-{name}-{time.strftime('%Y%m%d-%H%M%S')}").resolve()
    if not is_unicode(str(folder)):
        raise UserError(f"--out '{name_text(str(out or folder))}': this name is not UTF-8; name another folder")
    begun = (folder / definition.FILE).exists()
    if begun and not resume:
        raise UserError(f"{str(folder)!r} holds a sweep already; go on with it by --resume, or choose another --out")
    kept = definition.read(folder)[0] if begun else None
    if kept is not None and asked.config is None and not asked.overrides:
        return _more(kept, asked, spent), folder
    if kept is not None:
        asked = asked._replace(seeds=asked.seeds or len(kept.seeds), trials=asked.trials or kept.trials)
    made = definition.make(
        asked.config,
        asked.overrides,
        seeds=asked.seeds or 1,
        search=asked.search,
        pruner=asked.pruner or "none",
        trials=asked.trials,
        budget=spent,
    )
    if made.search != "grid":
        from simulation.sweep import study

        study.need()
    return made, folder


def _more(kept: Sweep, asked: Asked, spent: Budget) -> Sweep:
    """The sweep as it was begun, with more seeds or trials where these are asked for."""
    for option, value, known in (("--search", asked.search, kept.search), ("--pruner", asked.pruner, kept.pruner)):
        if value is not None and value != known:
            raise UserError(f"{option} {value}: the sweep was begun with {known}; choose another --out")
    first, count = kept.seeds[0], asked.seeds or len(kept.seeds)
    if count < len(kept.seeds):
        raise UserError(f"--seeds {count}: the sweep was begun with {len(kept.seeds)}; give as many or more")
    trials = kept.trials if asked.trials is None else asked.trials
    made = kept._replace(seeds=tuple(range(first, first + count)), trials=trials)
    definition.check_options(made, spent)
    definition.check_same(kept, made)
    return made


def run(made: Sweep, folder: Path, spent: Budget, jobs: int | None, confirm: int, as_json: bool) -> None:
    """Run the sweep and print what came of it."""
    told: set[str] = set()

    def tell(line: str) -> None:
        if line not in told:
            typer.echo(line, err=True)
            told.add(line)

    typer.echo("loading data and model" if not (folder / definition.FILE).exists() else "going on", err=True)
    from simulation.sweep import words
    from simulation.sweep.run import REPORT, sweep

    try:
        with stdout_kept(as_json):
            found = sweep(made, folder, budget=spent, jobs=jobs, confirm=confirm, tell=tell)
    except KeyboardInterrupt:
        begun = (folder / definition.FILE).exists()
        again = f"go on with: apiary sweep --out {shown(folder)} --resume" if begun else "nothing was written"
        typer.echo(f"apiary: interrupted; {again}", err=True)
        raise typer.Exit(130) from None
    for line in found["warnings"]:
        tell(f"warning: {line}")
    if as_json:
        print_json(found)
        return
    typer.echo("\n".join(words.lines(found)))
    typer.echo(f"report: {shown(folder / REPORT)}")
