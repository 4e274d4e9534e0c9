"""The final figures of a run: metrics.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apiary.core.errors import UserError
from apiary.core.files import finite, write_atomic
from apiary.tracking.event_log import (
    LOG_FILE,
    METRICS_FILE,
    SCHEMA,
)


def write_metrics(folder: Path, metrics: Mapping[str, Any]) -> None:
    """Writes `metrics.json` atomically: NaN and infinities as null, the schema number in front."""
    values = {"schema": SCHEMA, **finite(metrics)}
    write_atomic(folder / METRICS_FILE, json.dumps(values, ensure_ascii=False, indent=1) + "\n")


def read_metrics(folder: Path) -> dict[str, Any]:
    """What `write_metrics` wrote.

    Raises:
        UserError: no such folder, no metrics in it, not JSON, or a schema that this version does
            not know.
    """
    path = folder / METRICS_FILE
    if not folder.is_dir():
        raise UserError(f"run folder {str(folder)!r} does not exist")
    if not path.exists():
        begun = (folder / LOG_FILE).exists()
        hint = "the run has not finished: --resume continues it" if begun else "is it a run folder?"
        raise UserError(f"run folder {str(folder)!r} has no {METRICS_FILE}; {hint}")
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{str(path)!r} is not valid JSON: {error}") from None
    if not isinstance(values, dict) or values.get("schema") != SCHEMA:
        found = values.get("schema") if isinstance(values, dict) else None
        raise UserError(f"{str(path)!r}: schema = {found!r}, but this version reads schema {SCHEMA}")
    return values


def read_finding(path: Path, schema: int, kind: str, again: str) -> dict[str, Any] | None:
    """What was found of a finished run and lies beside its metrics; None where nothing does.

    Args:
        path: the file.
        schema: that this version knows.
        kind: of finding, for the error: an audit, say.
        again: what to run for another one.

    Raises:
        UserError: it is not JSON, or of another schema.
    """
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{str(path)!r} is not valid JSON: {error}; remove it, or run {again} again") from None
    if not isinstance(found, dict) or found.get("schema") != schema:
        raise UserError(f"{str(path)!r} is no {kind} that this version reads; remove it, or run {again} again")
    return found


def rounds_table(events: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rounds of metrics.json: training and held-out figures by round, from the log."""
    rounds: dict[int, dict[str, Any]] = {}
    for event in events:
        if event["event"] in ("round", "evaluate"):
            kept = {
                k: v
                for k, v in event.items()
                if k not in ("event", "time", "clients") or (event["event"] == "round" and k == "clients")
            }
            rounds.setdefault(event["round"], {}).update(kept)
    return [rounds[number] for number in sorted(rounds)]


def ranks(events: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """The rank of each client's factors, as it last told it."""
    return {e["client"]: e["rank"] for e in events if e["event"] in ("handshake", "client") and "rank" in e}


def curation_counts(events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The `curation` part of metrics.json: rows, kept and dropped by step, by client, as each last told them."""
    newest = {
        event["client"]: event["curated"] for event in events if event["event"] == "client" and "curated" in event
    }
    return {name: newest[name] for name in sorted(newest)}
