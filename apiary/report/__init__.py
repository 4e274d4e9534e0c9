"""The results of a run for people: a table on the terminal, and `report.html`, whole in one file.

Model output, client names and messages are untrusted text: the page escapes them, holds no script,
and forbids itself every request by its content security policy.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from apiary.core import formatting
from apiary.core.files import finite, write_atomic
from apiary.core.formatting import clean, plural
from apiary.evaluation import intervals
from apiary.privacy import statement
from apiary.report import sites
from apiary.report.audit import audit_content, read_audit
from apiary.report.data import Interval, Metrics, Row, gain_on_all, gain_on_own, parse_metrics
from apiary.report.injection import probe_content, read_probe
from apiary.report.page import PAGE
from apiary.report.personal import WAYS, own_lines
from apiary.report.verdict import (
    against,
    attacked,
    delivered,
    headline,
    nobody_joined,
    not_alike,
    outcomes_text,
    personal,
    row_by_row,
    rows_text,
)
from apiary.tracking.event_log import METRICS_FILE, Event, read_events
from apiary.tracking.metrics_file import read_metrics

__all__ = [
    "headline",
    "personal_lines",
    "render",
    "table_plain",
    "table_text",
    "write_finding",
    "write_report",
]

REPORT_FILE = "report.html"
_BOLD = ("federated", sites.TOGETHER)


def write_report(folder: Path) -> Path:
    """The path of `report.html`, written from the metrics, log and configuration of a run folder.

    Raises:
        UserError: no such folder, or its metrics are absent or broken.
        OSError: the file cannot be written; an older report stays as it was.
    """
    metrics = parse_metrics(read_metrics(folder))
    events = read_events(folder)
    config = folder / "config.toml"
    text = config.read_text(encoding="utf-8", errors="replace") if config.exists() else ""
    path = folder / REPORT_FILE
    write_atomic(path, render(metrics, events, text, read_audit(folder), read_probe(folder)))
    return path


def write_finding(folder: Path, name: str, found: Mapping[str, Any]) -> None:
    """Write what was found of a run beside its metrics, and its report, if it has results, again."""
    write_atomic(folder / name, json.dumps(finite(found), indent=1) + "\n")
    if (folder / METRICS_FILE).exists():
        write_report(folder)


def render(
    metrics: Metrics,
    events: Sequence[Event] = (),
    config: str = "",
    audit: Mapping[str, Any] | None = None,
    probe: Mapping[str, Any] | None = None,
) -> str:
    """The page as one HTML text; the same input gives the same bytes."""
    from apiary.report.content import page_content  # draws with Matplotlib, which a table does without

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    for name in (
        "loss_text",
        "share_text",
        "count_text",
        "bytes_text",
        "seconds_text",
        "change_text",
    ):
        environment.filters[name.removesuffix("_text")] = getattr(formatting, name)
    environment.filters["up"] = statement.rounded_up
    return environment.from_string(PAGE).render(
        **page_content(metrics, events, config), **audit_content(audit, metrics.private), **probe_content(probe)
    )


def table_text(metrics: Mapping[str, Any]) -> RenderableType:
    """The table for a terminal, and what sites of a deployment tell; works on `{"table": [...]}` alone.

    Raises:
        UserError: the rows have another shape than `metrics.json`.
    """
    parsed = parse_metrics(metrics)
    parts = [
        _table(grid, caption, title=_title(parsed) if number == 0 else None)
        for number, (grid, caption) in enumerate(_parts(parsed))
    ]
    return parts[0] if len(parts) == 1 else Group(*parts)


def _table(grid: Sequence[Sequence[str]], caption: str, title: str | None) -> Table:
    """A table whose first line is its head; all text stands as it is, for names come from other machines."""
    table = Table(
        title=Text(title) if title else None,
        title_justify="left",
        caption=Text(caption) if caption else None,
        caption_justify="left",
    )
    head, *rows = grid
    for number, name in enumerate(head):
        table.add_column(Text(name), justify="right" if number else "left", no_wrap=number > 0)
    for cells in rows:
        table.add_row(*map(Text, cells), style="bold" if cells[0] in _BOLD else "")
    return table


def personal_lines(metrics: Mapping[str, Any]) -> list[str]:
    """The table of the clients' own models as aligned plain lines, and the sentences on them.

    Raises:
        UserError: the metrics have another shape than `metrics.json`.
    """
    parsed = parse_metrics(metrics)
    if parsed.personal is None:
        return []
    grid = [("", "own rows [95%]", "everyone's rows", "steps")]
    for row in parsed.personal.table:
        own = formatting.loss_text(row.own) + _between(row.own_ci95, 1, 3)
        grid.append((WAYS[row.method][0], own, formatting.loss_text(row.mix), formatting.count_text(row.steps)))
    return [*_plain(grid, "").splitlines(), *own_lines(parsed)]


def table_plain(metrics: Mapping[str, Any]) -> str:
    """The same as aligned plain lines, for a pipe or a file."""
    return "\n".join(_plain(grid, caption) for grid, caption in _parts(parse_metrics(metrics)))


def _plain(grid: Sequence[Sequence[str]], caption: str) -> str:
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    lines = ["  ".join([cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])]).rstrip() for cells in grid]
    return "\n".join([*lines, *filter(None, [caption])]) + "\n"


def _parts(metrics: Metrics) -> list[tuple[Sequence[Sequence[str]], str]]:
    """What is shown at the end of a run, each with the lines below it: the table, and the sites of a deployment."""
    parts: list[tuple[Sequence[Sequence[str]], str]] = []
    found = sites.grid(metrics)
    if metrics.table or found is None:
        rows = [("method", *_columns(metrics)), *(_cells(row, metrics) for row in metrics.table)]
        parts.append((rows, _caption(metrics)))
    if found is not None:
        more = [f"{found.left_out:,} more sites are in metrics.json."] if found.left_out else []
        lines = map(clean, [*more, *sites.sentences(metrics)])
        parts.append(([found.columns, *(tuple(map(clean, row)) for row in found.rows)], "\n".join(lines)))
    if metrics.private:
        shown, caption = parts[-1]
        parts[-1] = shown, "\n".join(filter(None, [caption, clean(statement.sentence(metrics.privacy))]))
    return parts


def _columns(metrics: Metrics) -> list[str]:
    names = ["held-out loss [95%]"]
    if any(row.accuracy is not None for row in metrics.table):
        names.append("exact match [95%]")
    if any(row.steps is not None for row in metrics.table):
        names.append("steps")
    if any(row.tokens is not None for row in metrics.table):
        names.append("tokens")
    return names


def _cells(row: Row, metrics: Metrics) -> tuple[str, ...]:
    cells = {
        "held-out loss [95%]": formatting.loss_text(row.loss) + _between(row.ci95.loss, 1, 3),
        "exact match [95%]": formatting.share_text(row.accuracy) + _between(row.ci95.accuracy, 100, 1),
        "steps": formatting.count_text(row.steps),
        "tokens": formatting.count_text(row.tokens),
    }
    mark = " *" if row.method in metrics.unlike else ""
    return (row.method + mark, *(cells[name] for name in _columns(metrics)))


def _between(interval: Interval | None, scale: float, digits: int) -> str:
    if interval is None:
        return ""
    return f" [{interval[0] * scale:.{digits}f}, {interval[1] * scale:.{digits}f}]"


def _title(metrics: Metrics) -> str | None:
    return " · ".join(filter(None, (metrics.run, metrics.task))) or None


def _caption(metrics: Metrics) -> str:
    count = max((row.n or 0 for row in metrics.table), default=0)
    notes = [f"loss in nats per response token, on {plural(count, 'held-out example')}"]
    other, why = against(metrics), not_alike(metrics)
    notes += filter(None, [row_by_row(metrics, other) if other and metrics.paired else "", why and f"* {why}"])
    notes += filter(None, [nobody_joined(metrics)])
    if count and not any(row.ci95.loss for row in metrics.table):
        notes.append(f"no interval of the loss: fewer than {intervals.FEWEST_ROWS} held-out examples")
    notes += filter(None, [clean(delivered(metrics)), personal(metrics), clean(attacked(metrics))])
    noise = " without noise" if "local" in metrics.noiseless else " (not alike)" if "local" in metrics.unlike else ""
    own = gain_on_own(metrics)
    rows = f" ({rows_text(own)})" if own and own.rows else ""
    for gain, where in ((own, f"on its own rows{rows}"), (gain_on_all(metrics), "on the rows of the table")):
        if gain is not None:
            name, least = gain.worst
            notes.append(
                f"against training alone{noise} {where}: {outcomes_text(gain)}; mean gain "
                f"{formatting.change_text(gain.mean)}, least {formatting.change_text(least)} ({clean(name)})"
            )
    notes += own_lines(metrics)
    return "\n".join(notes)
