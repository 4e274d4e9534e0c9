"""What goes with what, asked of the code that decides: the pairs, and the tables of the docs."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Final, NamedTuple

from apiary.config.loading import load
from apiary.core.errors import UserError
from simulation.run import check_names
from strategies import AGGREGATORS


class Feature(NamedTuple):
    """A method as the table names it, and the settings that switch it on."""

    name: str
    settings: tuple[str, ...]


_STAGES = 'continual.stages=[["copy", "reverse"], ["sort", "count"]]'
FEATURES: Final = (
    Feature("curation, row by row", ('curate.steps=["mask", "length"]',)),
    Feature(
        "curation that compares rows",
        ('curate.steps=["duplicates", "near_duplicates", "held_out", { name = "random", keep = 0.9 }, "ifd"]',),
    ),
    Feature("stages without replay", (_STAGES,)),
    Feature("replay, reservoir", (_STAGES, "continual.buffer=0.2")),
    Feature("replay, poisson", (_STAGES, "continual.buffer=0.2", "continual.policy=poisson")),
    Feature("record-level privacy", ("privacy.unit=record", "privacy.batch_rows=8")),
    Feature("FedProx", ('train.penalties=[{ name = "fedprox", mu = 0.01 }]',)),
    Feature("SCAFFOLD", ("strategy.name=scaffold", "train.optimizer=sgd", "train.lr=0.1")),
    Feature("a B of each client's own", ("adapter.share=a",)),
    Feature("several batches a step", ("train.accumulate=2",)),
    Feature("adapter dropout", ("adapter.dropout=0.1",)),
    Feature("clients' own scores", ("evaluate.clients=true",)),
    Feature("early stopping", ("evaluate.patience=3", "data.test_fraction=0.3")),
    Feature("Ray engine", ("simulate.engine=ray",)),
)


def exclusive(one: Feature, other: Feature) -> bool:
    """Whether two features are values of the same keys, so that nobody can ask for both."""
    keys = [{setting.partition("=")[0]: setting for setting in feature.settings} for feature in (one, other)]
    return any(keys[0][key] != keys[1][key] for key in keys[0].keys() & keys[1].keys()) or (
        set(one.settings) <= set(other.settings) or set(other.settings) <= set(one.settings)
    )


def pairs() -> Iterator[tuple[Feature, Feature, tuple[str, ...]]]:
    """Every pair that can be asked for, with the reasons against it (none: it works)."""
    for one, other in combinations(FEATURES, 2):
        if exclusive(one, other):
            continue
        yield one, other, against([*one.settings, *other.settings])


def against(settings: Sequence[str]) -> tuple[str, ...]:
    """The reasons against a configuration; none: it works."""
    try:
        check_names(load(None, settings))
    except UserError as error:
        return tuple(error.problems)
    return ()


def table() -> str:
    """The pairs as a Markdown table, a mark or the number of the reason in each cell, and the reasons below."""
    reasons: list[str] = []
    cells: dict[frozenset[str], str] = {}
    for one, other, against in pairs():
        cells[frozenset((one.name, other.name))] = _cell(against, reasons)
    names = [feature.name for feature in FEATURES]
    lines = [f"| | {' | '.join(names[:-1])} |", "|---" * len(names) + "|"]
    for at, row in enumerate(names[1:], 1):
        shown = [cells.get(frozenset((row, column)), "-") for column in names[:at]]
        lines.append(f"| {row} | {' | '.join(shown + [''] * (len(names) - 1 - at))} |")
    return _page(lines, reasons)


def _cell(found: Sequence[str], reasons: list[str]) -> str:
    """A mark, or the numbers of the reasons found; new ones are added to `reasons`."""
    reasons += [reason for reason in found if reason not in reasons]
    numbers = ", ".join(str(reasons.index(reason) + 1) for reason in found)
    return f"no ({numbers})" if found else "yes"


def _page(lines: Sequence[str], reasons: Sequence[str]) -> str:
    """A table and its reasons."""
    return "\n".join([*lines, "", *(f"{number}. `{reason}`" for number, reason in enumerate(reasons, 1))])


BESIDE: Final = (
    Feature("record-level privacy", ("privacy.unit=record", "privacy.batch_rows=8")),
    Feature("FedProx", ('train.penalties=[{ name = "fedprox", mu = 0.01 }]',)),
    Feature("curation", ('curate.steps=["mask", "duplicates"]',)),
    Feature("stages and replay", (_STAGES, "continual.buffer=0.2")),
    Feature("several ranks", ("adapter.ranks=[2, 4]",)),
    Feature("B alone", ("adapter.train=b",)),
    Feature("B and A in turns", ("adapter.train=alternate",)),
    Feature("own B", ("adapter.share=a",)),
    Feature("orthonormal A", ("adapter.init=orthonormal",)),
    Feature("server step `plain`", ('strategy.server_optimizer={ name = "plain", lr = 1.4 }',)),
    Feature("server `nesterov`", ("strategy.server_optimizer=nesterov",)),
    Feature("`int8` up", ("wire.up=int8",)),
    Feature("`int4` up", ("wire.up=int4",)),
    Feature("`int8` down", ("wire.down=int8",)),
    Feature("attackers", ("simulate.attackers=0.4",)),
)
"""What is asked of each aggregation method."""

_METHOD = re.compile(r"(strategy\.name = )(?:'\w+'|\"\w+\")")


def method(name: str) -> Feature:
    """An aggregation method with the settings that it needs in any run, for a federation of three clients or more."""
    needs = {"scaffold": ("train.optimizer=sgd", "train.lr=0.1"), "fltrust": ("strategy.root=builtin:skills",)}
    parameters = inspect.signature(AGGREGATORS.builder(name)).parameters
    told = ("strategy.options.byzantine=0", "strategy.min_clients=3") if "byzantine" in parameters else ()
    return Feature(name, (f"strategy.name={name}", *told, *needs.get(name, ())))


def runs(name: str) -> Iterator[tuple[Feature, ...]]:
    """Sets of features that go with a method all at once, as few as cover each that goes with it at all."""
    own = method(name).settings
    fine = [feature for feature in BESIDE if not against([*own, *feature.settings])]
    left = list(fine)
    while left:
        chosen = [left[0]]
        for feature in [*left[1:], *(f for f in fine if f not in left)]:
            settings = [setting for f in (*chosen, feature) for setting in f.settings]
            if not any(exclusive(feature, other) for other in chosen) and not against([*own, *settings]):
                chosen.append(feature)
        left = [feature for feature in left if feature not in chosen]
        yield tuple(chosen)


def methods_table() -> str:
    """Each aggregation method with what may stand beside it, as `table`."""
    reasons: list[str] = []
    lines = [f"| | {' | '.join(feature.name for feature in BESIDE)} |", "|---" * (len(BESIDE) + 1) + "|"]
    for name in AGGREGATORS:
        cells = [
            _cell(
                [_METHOD.sub(r"\1...", reason) for reason in against([*method(name).settings, *feature.settings])],
                reasons,
            )
            for feature in BESIDE
        ]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return _page(lines, reasons)
