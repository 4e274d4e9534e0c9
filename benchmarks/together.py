"""What goes with what, asked of the code that decides (`apiary.together`): the pairs, and the docs' table."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Final, NamedTuple

from apiary.config import UserError, load


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
    Feature("early stopping", ("evaluate.patience=3",)),
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
        try:
            load(None, [*one.settings, *other.settings])
        except UserError as error:
            yield one, other, tuple(error.problems)
        else:
            yield one, other, ()


def table() -> str:
    """The pairs as a Markdown table, a mark or the number of the reason in each cell, and the reasons below."""
    reasons: list[str] = []
    cells: dict[frozenset[str], str] = {}
    for one, other, against in pairs():
        for reason in against:
            if reason not in reasons:
                reasons.append(reason)
        numbers = ", ".join(str(reasons.index(reason) + 1) for reason in against)
        cells[frozenset((one.name, other.name))] = f"no ({numbers})" if against else "yes"
    names = [feature.name for feature in FEATURES]
    lines = [f"| | {' | '.join(names[:-1])} |", "|---" * len(names) + "|"]
    for at, row in enumerate(names[1:], 1):
        shown = [cells.get(frozenset((row, column)), "-") for column in names[:at]]
        lines.append(f"| {row} | {' | '.join(shown + [''] * (len(names) - 1 - at))} |")
    return "\n".join([*lines, "", *(f"{number}. `{reason}`" for number, reason in enumerate(reasons, 1))])
