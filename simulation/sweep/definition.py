"""A sweep as it was asked for, kept in its folder, so that it goes on as it began. Needs no torch."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from apiary.config import loading, resuming, toml_text
from apiary.config.schema import RunConfig
from apiary.core.errors import UserError
from apiary.core.files import write_atomic
from simulation.sweep import space
from simulation.sweep.space import Axis, Choice, Range, Values

FILE: Final = "sweep.json"
SEARCHES: Final = ("grid", "tpe", "gp", "qmc", "random")
PRUNERS: Final = ("none", "median", "halving", "hyperband")
_SCHEMA = 1


class Sweep(NamedTuple):
    """What is run."""

    base: RunConfig  # of all runs, without what is varied; its held-out rows are in two halves
    axes: tuple[Axis, ...]
    seeds: tuple[int, ...]
    search: str  # of SEARCHES
    pruner: str  # of PRUNERS
    trials: int | None  # settings that a search draws; None: until the budget is spent
    source: str  # the configuration's file, as the user named it; "" for none
    fixed: tuple[str, ...]  # overrides of all runs, as the user wrote them

    def config(self, values: Values, seed: int) -> RunConfig:
        """The configuration of a run."""
        return space.assign(self.base, values).model_copy(update={"seed": seed})

    def settings(self) -> list[Values] | None:
        """All settings of a grid; None of a search, which draws them."""
        return space.grid(self.axes) if self.search == "grid" else None

    def command(self, values: Values) -> str:
        """The shell command of one run with a setting, for a person to paste."""
        varied = [f"{key}={_typed(value)}" for key, value in values.items()]
        words = ["apiary", "simulate", *([self.source] if self.source else [])]
        return shlex.join([*words, *(word for text in (*self.fixed, *varied) for word in ("-s", text))])


class Budget(NamedTuple):
    """Where a sweep ends, whatever is left; None: no such end."""

    runs: int | None = None  # runs begun, with those of earlier calls
    minutes: float | None = None  # of this sweep, with those of earlier calls; runs that have begun go on to their end


def _typed(value: object) -> str:
    """A value as one types it: a bare word where TOML would take it as the same text."""
    if isinstance(value, str) and value and all(letter.isalnum() or letter in "-_./:" for letter in value):
        (plain,) = space.parse([f"k={value}"])[0] or [""]
        if plain and not _reads_as_toml(value):
            return value
    return toml_text.shown(value)


def _reads_as_toml(text: str) -> bool:
    tables: dict[str, Any] = {}
    toml_text.override(tables, f"k={text}", partition={})
    return bool(tables["k"] != text)


def make(
    config: Path | None,
    overrides: Sequence[str],
    *,
    seeds: int = 1,
    search: str | None = None,
    pruner: str = "none",
    trials: int | None = None,
    budget: Budget = Budget(),
) -> Sweep:
    """A sweep from the command line, checked as far as that is possible without data and model.

    Args:
        config: a TOML file; None for the defaults.
        overrides: settings of all runs and what is varied, see `space.parse`.
        seeds: runs of each setting, the first one with the configuration's seed.
        search: of SEARCHES; None: a grid, and TPE where a range is among what is varied.
        pruner: of PRUNERS.
        trials: settings that a search draws.
        budget: where it ends.

    Raises:
        UserError: all problems found.
    """
    fixed, axes = space.parse(overrides)
    if not axes:
        raise UserError("nothing is varied: give a key several values, such as -s train.lr=1e-3,3e-3,6e-3")
    ranges = [axis.key for axis in axes if isinstance(axis, Range)]
    search = search or ("tpe" if ranges else "grid")
    base = loading.load(config, [*fixed, "evaluate.set_apart=true"])
    sweep = Sweep(
        base,
        tuple(axes),
        tuple(range(base.seed, base.seed + seeds)),
        search,
        pruner,
        trials,
        str(config or ""),
        tuple(fixed),
    )
    check_options(sweep, budget)
    space.check(base, axes, sweep.settings())
    return sweep


def check_options(sweep: Sweep, budget: Budget) -> None:
    """Check that the options of a sweep go together.

    Raises:
        UserError: a line for each problem.
    """
    choices = (("--search", sweep.search, SEARCHES), ("--pruner", sweep.pruner, PRUNERS))
    problems = [
        f"{name} {value}: allowed are {', '.join(known)}" for name, value, known in choices if value not in known
    ]
    if problems:
        raise UserError(*problems)
    search = "is for a search: a grid runs all combinations; add --search tpe, or leave it out"
    if sweep.search == "grid":
        problems += [f"--trials {search}"] if sweep.trials is not None else []
        problems += [f"--pruner {search}"] if sweep.pruner != "none" else []
    elif sweep.trials is None and budget == Budget():
        problems.append(f"--search {sweep.search}: a search has no end of its own; add --trials, --runs or --minutes")
    if sweep.seeds[-1] >= 2**63:
        problems.append(f"--seeds {len(sweep.seeds)}: seeds from {sweep.seeds[0]} on leave the allowed range; lower it")
    if sweep.pruner != "none" and not sweep.base.evaluate.every:
        problems.append("--pruner: evaluate.every = 0 measures nothing between rounds to prune by; set 1, or no pruner")
    if problems:
        raise UserError(*problems)


# -- in a folder -------------------------------------------------------------------------------------------------------


def write(folder: Path, sweep: Sweep, machine: dict[str, int]) -> None:
    """Keep a sweep in its folder, with how its runs share the machine."""
    values = {
        "schema": _SCHEMA,
        "base": sweep.base.model_dump(mode="json"),
        "axes": [{"kind": type(axis).__name__.lower(), **axis._asdict()} for axis in sweep.axes],
        **{name: getattr(sweep, name) for name in ("seeds", "search", "pruner", "trials", "source", "fixed")},
        "machine": machine,
    }
    write_atomic(folder / FILE, json.dumps(values, ensure_ascii=False, indent=1) + "\n")


def read(folder: Path) -> tuple[Sweep, dict[str, int]]:
    """What `write` wrote.

    Raises:
        UserError: no sweep is there, or none that this version reads.
    """
    path = folder / FILE
    if not path.exists():
        raise UserError(f"{str(folder)!r} holds no sweep (no {FILE}); give the --out of one")
    try:
        values = json.loads(path.read_bytes())
        if values["schema"] != _SCHEMA:
            raise ValueError(f"schema {values['schema']}")
        axes = tuple(map(_axis, values["axes"]))
        names = ("search", "pruner", "trials", "source")
        sweep = Sweep(
            base=loading.parse(values["base"]),
            axes=axes,
            seeds=tuple(values["seeds"]),
            fixed=tuple(values["fixed"]),
            **{name: values[name] for name in names},
        )
        return sweep, dict(values["machine"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{str(path)!r} cannot be read ({error}); was it edited, or made by another version?") from None


def _axis(values: dict[str, Any]) -> Axis:
    kind = values.pop("kind")
    return Choice(values["key"], tuple(values["values"])) if kind == "choice" else Range(**values)


def check_same(begun: Sweep, asked: Sweep) -> None:
    """Check that a sweep that is to go on is asked for as it was begun.

    A grid may get more seeds and a search more settings; what a search has learnt is of the seeds it began with.

    Raises:
        UserError: what differs.
    """
    base = resuming.differences(begun.base, asked.base)
    different = [f"{key} = {toml_text.shown(then)}" for key, (then, _) in base.items()]
    if _plain(begun.axes) != _plain(asked.axes):
        different.append("other values: " + "; ".join(map(_axis_text, begun.axes)))
    different += [
        f"--{name} {getattr(begun, name)}"
        for name in ("search", "pruner")
        if getattr(begun, name) != getattr(asked, name)
    ]
    fewer = len(asked.seeds) < len(begun.seeds)
    if begun.seeds[0] != asked.seeds[0] or fewer or (begun.search != "grid" and begun.seeds != asked.seeds):
        different.append(f"--seeds {len(begun.seeds)}")
    if different:
        raise UserError(
            f"--resume: the sweep was begun with {', '.join(different)}; leave CONFIG and -s out to go on as it began, "
            "or choose another --out"
        )


def _axis_text(axis: Axis) -> str:
    if isinstance(axis, Choice):
        return f"{axis.key} = {', '.join(map(toml_text.shown, axis.values))}"
    more = ":log" if axis.log else "" if axis.step is None else f":{axis.step}"
    return f"{axis.key} = {axis.low}..{axis.high}{more}"


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))
