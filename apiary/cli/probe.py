"""`apiary evaluate --probe injection`: attacks a tuned model's prompts and prints whom it follows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apiary.core.errors import UserError
from apiary.data.examples import Example


def run_probe(path: Path, data: str | None, overrides: Sequence[str]) -> dict[str, Any]:
    """What the untuned and the tuned model make of planted instructions; of a run it is written to `injection.json`.

    The run's report, if it has one, is written again.

    Args:
        path: a run directory or a PEFT adapter folder.
        data: rows to ask about; None for the held-out set of a simulated run.
        overrides: `key=value` settings on top of the stored ones.

    Raises:
        UserError: no such run, no rows, or none with data.
    """
    from apiary.evaluation import injection
    from apiary.export import tuned as results
    from apiary.models.adapters import fresh_adapter
    from apiary.report import write_finding
    from apiary.report.injection import PROBE_FILE

    opened = results.open_tuned(path, overrides)
    asked = injection.prepare(_rows(opened, data), opened.template, opened.lm, opened.config)
    methods = {"base": fresh_adapter(opened.lm, opened.config.seed), "federated": opened.adapter}
    found = injection.document(methods, opened.lm, asked, opened.config)
    if opened.run is not None:
        write_finding(opened.run, PROBE_FILE, found)
    return found


def _rows(opened: Any, data: str | None) -> Sequence[Example]:
    """The rows of `data`, its test part if it has one; without `data` the held-out set that the run was measured on."""
    from apiary.data import examples
    from apiary.data.federation import federate, set_deciding_apart
    from apiary.tracking import metrics_file

    config = opened.config
    if data is not None:
        read = examples.read(data, split=config.data.split, columns=config.data.columns, max_rows=config.data.max_rows)
        return read.test or read.examples
    if opened.run is None or metrics_file.read_metrics(opened.run).get("sites") is not None:
        raise UserError("--data is needed: only the directory of a simulated run knows its held-out rows")
    return set_deciding_apart(federate(config.data, config.seed, guess=config.privacy.unit == "none"), config)[0].test
