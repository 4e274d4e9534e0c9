"""`apiary privacy audit`: runs the attacks and prints what they found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from apiary.core.counts import parse as parse_counts
from apiary.core.errors import UserError


def run_audit(
    run: Path,
    client: str | None,
    canaries: int,
    rounds: int | None,
    seed: int,
    data: str | None,
    state: Path | None,
    counts: str | None,
) -> dict[str, Any]:
    """The audit of a run, written to its `audit.json`; its report, if it has one, is written again.

    Raises:
        UserError: no such run or client, a deployed one without `data`, or a site's options without `data`.
        apiary.core.errors.RunFailed: the replay did not come about.
    """
    if not run.is_dir():
        raise UserError(f"run folder {str(run)!r} does not exist")
    from apiary.report import write_finding
    from apiary.report.audit import AUDIT_FILE
    from simulation import audit

    at = None
    if data is not None:
        at = audit.AtSite(data, state, parse_counts(counts or "rounded", "--counts"))
        if state is None:
            typer.echo("no --state: rows are held out by the public key, not as in the site's runs", err=True)
    elif state is not None or counts is not None:
        raise UserError(f"{'--state' if state is not None else '--counts'} is of a site: give its rows too (--data)")
    options = audit.Options(client, canaries, rounds, seed)
    bench = audit.open_bench(run, options, at)
    typer.echo(f"auditing {bench.client.name}: {len(bench.client.train):,} training rows", err=True)
    found = audit.audit(bench, options, lambda line: typer.echo(line, err=True))
    write_finding(run, AUDIT_FILE, found)
    return found


def table(found: dict[str, Any]) -> str:
    """The figures as aligned plain lines, and what they say of the claim."""
    from apiary.report.audit import intro, lines, verdict

    grid = [("", "found", "chance", ""), *lines(found)]
    widths = [max(len(row[column]) for row in grid) for column in range(3)]
    rows = [
        "  ".join([r[0].ljust(widths[0]), r[1].rjust(widths[1]), r[2].rjust(widths[2]), r[3]]).rstrip() for r in grid
    ]
    return "\n".join([intro(found), "", *rows, "", verdict(found)])
