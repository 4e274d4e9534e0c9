"""The results of a run for people: a table on the terminal, and `report.html`, whole in one file.

Model output, client names and messages are untrusted text: the page escapes them, holds no script,
and forbids itself every request by its content security policy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from rich.table import Table
from rich.text import Text

from apiary import claims, units
from apiary.report.content import headline, page_content, plural
from apiary.report.data import Interval, Metrics, Row, gain_on_all, gain_on_own, parse_metrics
from apiary.report.page import PAGE
from apiary.runlog import Event, read_events, read_metrics, write_atomic

__all__ = ["headline", "render", "table_plain", "table_text", "write_report"]

REPORT_FILE = "report.html"


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
    write_atomic(path, render(metrics, events, text))
    return path


def render(metrics: Metrics, events: Sequence[Event] = (), config: str = "") -> str:
    """The page as one HTML text; the same input gives the same bytes."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    for name in (
        "loss_text",
        "share_text",
        "count_text",
        "bytes_text",
        "seconds_text",
        "change_text",
    ):
        environment.filters[name.removesuffix("_text")] = getattr(units, name)
    environment.filters["up"] = claims.rounded_up
    return environment.from_string(PAGE).render(**page_content(metrics, events, config))


def table_text(metrics: Mapping[str, Any]) -> Table:
    """The table for a terminal; works on `{"table": [...]}` alone.

    Raises:
        UserError: the rows have another shape than `metrics.json`.
    """
    parsed = parse_metrics(metrics)
    table = Table(title=_title(parsed), title_justify="left", caption=_caption(parsed), caption_justify="left")
    table.add_column("method")
    for name in _columns(parsed):
        table.add_column(name, justify="right", no_wrap=True)
    for row in parsed.table:
        style = "bold" if row.method == "federated" else ""
        table.add_row(*(Text(cell) for cell in _cells(row, parsed)), style=style)
    return table


def table_plain(metrics: Mapping[str, Any]) -> str:
    """The table as aligned plain lines, for a pipe or a file."""
    parsed = parse_metrics(metrics)
    grid = [("method", *_columns(parsed)), *(_cells(row, parsed) for row in parsed.table)]
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    lines = ["  ".join([cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])]).rstrip() for cells in grid]
    return "\n".join([*lines, *filter(None, [_caption(parsed)])]) + "\n"


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
        "held-out loss [95%]": units.loss_text(row.loss) + _between(row.ci95.loss, 1, 3),
        "exact match [95%]": units.share_text(row.accuracy) + _between(row.ci95.accuracy, 100, 1),
        "steps": units.count_text(row.steps),
        "tokens": units.count_text(row.tokens),
    }
    return (row.method, *(cells[name] for name in _columns(metrics)))


def _between(interval: Interval | None, scale: float, digits: int) -> str:
    if interval is None:
        return ""
    return f" [{interval[0] * scale:.{digits}f}, {interval[1] * scale:.{digits}f}]"


def _title(metrics: Metrics) -> str | None:
    return " · ".join(filter(None, (metrics.run, metrics.task))) or None


def _caption(metrics: Metrics) -> str:
    count = max((row.n or 0 for row in metrics.table), default=0)
    notes = [f"loss in nats per response token, on {plural(count, 'held-out example')}"]
    for gain, where in (
        (gain_on_own(metrics), "on its own data"),
        (gain_on_all(metrics), "on everyone's"),
    ):
        if gain is not None:
            name, least = gain.worst
            notes.append(
                f"{gain.improved} of {plural(len(gain.gains), 'client')} better off than alone "
                f"{where}; mean gain {units.change_text(gain.mean)}, least {units.change_text(least)} ({name})"
            )
    return "\n".join(notes)
