"""What a split or a limit leaves, where that is far from what was asked: lines that say why, and what helps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from apiary.config.schema import RunConfig
from apiary.core.formatting import share_text
from apiary.data import store
from apiary.data.examples import OVER_MAX_ROWS, Example, FileReport
from apiary.data.turns import opening_text

if TYPE_CHECKING:
    from apiary.data.federation import Federation

_FEW = 5  # training rows of a site, from which little can be learned
_DEVIATIONS = 4.0  # of a binomial: chance alone strays so far once in 15,000 splits
_ALIKE = 0.2  # share of rows with one opening that a split by openings feels


def remarks(federation: Federation, config: RunConfig) -> list[str]:
    """Lines on a held-out share far from what was asked, and on sites that `data.max_rows` leaves nearly empty."""
    return [*_uneven(federation, config), *_nearly_empty(federation.reports, config)]


def no_test(federation: Federation, config: RunConfig) -> list[str]:
    """A line that says so where nothing is held out for the table, and what helps."""
    if federation.test:
        return []
    why = same_opening(store.joined([client.train for client in federation.clients]))
    fix = why or "raise it, or set data.test to a held-out source"
    return [f"data.test_fraction = {config.data.test_fraction}: leaves no held-out example; {fix}"]


def same_opening(examples: Sequence[Example]) -> str | None:
    """Why no fraction splits these rows well, and what helps; None where few of them open with the same question.

    Rows that open alike are held out together, so that no question is both trained and measured.
    """
    if not examples:
        return None
    openings = np.fromiter((hash(opening_text(example.turns)) for example in examples), np.int64, len(examples))
    _, first, counts = np.unique(openings, return_index=True, return_counts=True)
    count = int(counts.max())
    if count < 2 or count < _ALIKE * len(examples):
        return None
    opening = openings[first[counts == count].min()]  # of several the one that comes first
    alike = store.pick(examples, np.flatnonzero(openings == opening))
    longer = sum(sum(turn.role == "user" for turn in example.turns) > 1 for example in alike)
    fix = (
        "leave the turns that they share out of the rows, so that each opens with its own question"
        if longer > len(alike) / 2
        else "set data.test to rows with other questions, and data.test_fraction = 0"
    )
    return f"{count:,} of {len(examples):,} rows open with the same question and stay on one side of the split; {fix}"


def _uneven(federation: Federation, config: RunConfig) -> Iterator[str]:
    asked = config.data.test_fraction
    held = sum(len(client.test) for client in federation.clients)
    rows = held + sum(len(client.train) for client in federation.clients)
    expected = asked * rows
    strays = abs(held - expected) > _DEVIATIONS * math.sqrt(expected * (1 - asked))
    # A half or twice of what was asked, of either part.
    far = not expected / 2 <= held <= 2 * expected or 2 * (rows - held) < rows - expected
    if strays and far and federation.test:  # else `no_test` says more
        parts = [*(client.test for client in federation.clients), *(client.train for client in federation.clients)]
        why = same_opening(store.joined(parts)) or (
            "rows with the same question stay on one side of the split; set data.test to rows with other questions, "
            "and data.test_fraction = 0"
        )
        share = share_text(held / rows)
        yield f"data.test_fraction = {asked:g}: {held:,} of {rows:,} rows are held out ({share}): {why}"


def _nearly_empty(reports: Sequence[FileReport], config: RunConfig) -> Iterator[str]:
    """A line for each site, where each file is one, that `data.max_rows` leaves fewer rows than one can train on."""
    if config.data.max_rows is None or config.data.partition.name != "natural":
        return
    lost = [report.problems.get(OVER_MAX_ROWS, (0, ()))[0] for report in reports]
    whole = [report.usable + gone for report, gone in zip(reports, lost, strict=True)]
    for report, rows, gone in zip(reports, whole, lost, strict=True):
        wanted = min(_FEW, rows)
        if gone and report.usable < wanted:
            yield (
                f"data.max_rows = {config.data.max_rows}: leaves {report.name} {report.usable} of {rows:,} rows, too "
                f"few to train on; from {math.ceil(wanted * sum(whole) / rows):,} on it keeps {wanted}"
            )
