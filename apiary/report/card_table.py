"""The table of a run as Markdown, for a model card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from apiary.core.formatting import loss_text
from apiary.report import sites, verdict
from apiary.report.data import parse_metrics


def card_table(metrics: Mapping[str, Any] | None) -> list[str]:
    """The lines of the card's table with what must be said of it; none without metrics."""
    if not metrics:
        return []
    parsed = parse_metrics(metrics)
    other = verdict.against(parsed)
    said = (
        verdict.row_by_row(parsed, other) if other and parsed.row("federated") else "",
        verdict.gained(parsed),
        *(verdict.attacked(parsed), verdict.not_alike(parsed), verdict.nobody_joined(parsed)),
        *(verdict.personal(parsed), sites.how_far(parsed)),
    )
    remarks = [line for line in said if line]
    below = ["", " ".join(remarks)] if remarks else []
    if not metrics["table"]:
        return below
    rows = ["", "| | held-out loss (nats per response token) | exact match |", "|---|---|---|"]
    for row in metrics["table"]:
        method = row["method"] + (" (not alike)" if row["method"] in parsed.unlike else "")
        accuracy = "" if row["accuracy"] is None else f"{100 * row['accuracy']:.1f}%"
        rows.append(f"| {method} | {loss_text(row['loss'])} | {accuracy} |")
    return rows + below
