"""What all tries of a soak come to, by fault."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.soak.faults import FAULTS


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each fault that was tried: how often, how soon it was told, what was lost, and the promises that broke."""
    found: dict[str, dict[str, Any]] = {}
    for fault in FAULTS:
        own = [row for row in rows if row["fault"] == fault]
        if not own:
            continue
        said = [min(times) for row in own if (times := [t for t in (row["log_s"], row["status_s"]) if t is not None])]
        compared = [row["same_adapter"] for row in own if row["same_adapter"] is not None]
        private = [row["ledger"] for row in own if row["ledger"] is not None]
        back = [row["back_s"] for row in own if row["back_s"] is not None]
        found[fault] = {
            "tries": len(own),
            "said": {"tries": len(said), **_spread(said)},
            "back": _spread(back),
            "rounds_again": sum(row["rounds_again"] for row in own),
            "rounds_lost": sum(row["rounds_lost"] for row in own),
            "messages_lost": sum(row["messages_lost"] for row in own),
            "wait": _spread([row["longest_wait_s"] for row in own]),
            "compared": len(compared),
            "same": sum(compared),
            "private": len(private),
            "exact": private.count("exact"),
            "failures": sum(bool(row["failures"]) for row in own),
            "kinds": sorted({line for row in own for line in row["failures"]}),
        }
    return found


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 1), "most": round(max(values), 1)} if values else {}


_HEAD = (
    *("fault", "tries", "told after, s", "longest wait, s", "all again after, s", "rounds done again", "answers lost"),
    *("same adapter", "ledger exact", "promises broken"),
)


def cells(found: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """The table's rows, its head first."""
    rows = [_HEAD]
    for fault, one in found.items():
        told = _words(one["said"])
        if one["said"]["tries"] < one["tries"]:
            told = f"{told} ({one['said']['tries']} of them)" if told else "nothing to tell"
        rows.append(
            (
                FAULTS[fault].words,
                str(one["tries"]),
                told,
                _words(one["wait"]),
                _words(one["back"]),
                str(one["rounds_again"]),
                str(one["messages_lost"]),
                _part(one["same"], one["compared"]),
                _part(one["exact"], one["private"]),
                str(one["failures"]),
            )
        )
    return rows


def _part(some: int, of: int) -> str:
    return f"{some} of {of}" if of else ""


def _words(spread: Mapping[str, float]) -> str:
    return f"{spread['median']:g}, at most {spread['most']:g}" if "median" in spread else ""


def text(found: Mapping[str, Mapping[str, Any]]) -> str:
    """For a terminal."""
    rows = cells(found)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def page(results: Mapping[str, Any]) -> str:
    """For a page, with the machine below."""
    head, *rows = cells(results["faults"])
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(row)} |" for row in rows)]
    machine = results["machine"]
    note = "Medians and the most; the adapter is compared where all answers counted, the ledger under privacy."
    return "\n".join([*lines, "", f"{note} On {machine['cores']} cores of an {machine['cpu']}."])
