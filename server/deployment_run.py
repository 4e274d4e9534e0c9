"""A run on the server of a deployment: its folder, log, table and report, around the rounds."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

import strategies
from apiary.config import summary
from apiary.config.compatibility import nothing_decides
from apiary.config.schema import RunConfig
from apiary.config.summary import public_name
from apiary.core import files
from apiary.core.errors import RunFailed, UserError
from apiary.core.tensors import StateDict
from apiary.data import examples, stages, tokenization
from apiary.data.federation import Federation, set_deciding_apart
from apiary.evaluation import comparison, continual
from apiary.evaluation.comparison import HeldOut
from apiary.export.adapter_folder import exported_rank
from apiary.models import adapters
from apiary.models.adapters import LanguageModel
from apiary.models.start import named_start
from apiary.privacy import statement
from apiary.report import write_report
from apiary.report.sites import own_rounds
from apiary.tracking import delivery, environment, event_log, metrics_file, reply_log, run_directory, trackers
from apiary.tracking.event_log import RunLog
from apiary.tracking.reply_log import ReplyLog
from server import checkpoint
from server.seals import Seals, Site
from server.site_grid import Waits
from strategies.from_config import check_for_sites, local_from_config

Federate = Callable[[RunLog, HeldOut | None], StateDict]
_NOT_MEASURED = "data.test is not measured: the sites have models of their own, and score them on their own rows"
_NODES = "APIARY_NODES"  # in the environment: the file in which `apiary deploy server` keeps which site is which node


def site_name(node: int) -> str | None:
    """The name under which a site's key was registered: empty for a node without one, None outside a deployment."""
    return _site(node).name if _NODES in os.environ else None


def _site(node: int) -> Site:
    """Who is registered as a node; a site without name and key where nobody is."""
    try:
        sites = json.loads(Path(os.environ[_NODES]).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return Site("", "")
    found = (Site(name, entry["key"]) for name, entry in sites.items() if entry["node"] == str(node % 2**64))
    return next(found, Site("", ""))


def seals(run: str, folder: Path) -> Seals | None:
    """What opens the signed answers of a run's sites; None where there are no keys, outside a deployment.

    Args:
        run: its name, as the sites know it.
        folder: the run directory.
    """
    return Seals(run, _site, ReplyLog(folder)) if _NODES in os.environ else None


def log_waits(log: RunLog, waits: Waits) -> None:
    """Log which sites have not answered for a while."""
    clients = [site_name(node) or f"node {node}" for node in waits.nodes]
    where = {} if waits.round is None else {"round": waits.round}
    log.event("waiting", **where, question=waits.kind, clients=clients, seconds=round(waits.seconds, 1))


def run(config: RunConfig, folder: Path, expected: int, federate: Federate, number: int = 0) -> None:
    """A whole run on the server of a deployment, from its newest checkpoint in `folder` or from the start.

    Args:
        config: the run.
        folder: the run directory, on the server's disk.
        expected: clients that the first round waits for.
        federate: does the rounds, given the log and the server's held-out examples (None without `data.test`), and
            returns the final adapter.
        number: the number that Flower gave the run, by which `apiary deploy` finds the run's part of the log.

    Raises:
        UserError: another process still writes the folder, or it holds another run; nothing in it was touched.
        Exception: whatever ended the run, once it is in the log as a `failed` event.
    """
    with run_directory.claim(folder) as warnings:
        run_directory.check_folder(config, folder, resume=True)
        _run(config, folder, expected, federate, number, warnings)


def _run(
    config: RunConfig, folder: Path, expected: int, federate: Federate, number: int, warnings: Sequence[str]
) -> None:
    began = time.monotonic()
    log = _open(config, folder, expected, number)
    try:
        for line in warnings:
            log.event("warning", message=line)
        check_for_sites(config)
        held_out = _held_out(config, log)
        adapter = federate(log, held_out)
        metrics = _summarise(config, folder, adapter, held_out)
        metrics["seconds"] = round(event_log.spent_before(folder) + time.monotonic() - began, 1)
        metrics_file.write_metrics(folder, metrics)
        write_report(folder)
        log.event("finish", seconds=metrics["seconds"])  # last: who follows the log then finds everything there
    except BaseException as error:
        log.event("failed", message=_line(error), **({"again": True} if _passes(error) else {}))
        raise
    finally:
        log.close()


def _open(config: RunConfig, folder: Path, expected: int, number: int) -> RunLog:
    files.sweep(folder)
    files.write_atomic(folder / "config.toml", config.to_toml())
    found = checkpoint.load(folder / "checkpoints", config)
    done = found[0].round if found else 0
    if (folder / event_log.LOG_FILE).exists():
        event_log.truncate_after(folder, done)
        reply_log.truncate_after(folder, done)
    log = RunLog(folder, [trackers.tracker(config, folder)] if config.log.trackers else [])
    start = environment.start_fields(config)
    start["outline"] = summary.sentence(config)
    with contextlib.suppress(Exception):  # what is wrong with the method the rounds will say, with a log to say it in
        start["method"] = strategies.traits(strategies.from_config(config))
    log.event("start", **start, rounds=config.rounds, clients=expected, resumed=done, run=str(number))
    return log


def _held_out(config: RunConfig, log: RunLog) -> HeldOut | None:
    """The server's own held-out examples, where `data.test` names some; what is wrong with them is logged.

    Raises:
        UserError: they cannot be read, none is in a stage of the run, or none fits the prompt.
    """
    if config.data.test is None:
        if undecided := nothing_decides(config):
            raise UserError(undecided)
        return None
    if personal := local_from_config(config).personal:
        log.event("warning", message=f"{_NOT_MEASURED} ({personal[0].lower()}{personal[1:]})")
        return None
    source = examples.read(config.data.test, split="test", columns=config.data.columns, key="data.test")
    rows = stages.inside(source.examples if source.test is None else source.test, config)
    if not rows and config.continual.stages:
        raise UserError(f"data.test = {config.data.test!r}: no row of it is in a stage of continual.stages")
    lm, template = _model(config)
    held_out = Federation((), rows, source.reports, (source,))
    figures, deciding = set_deciding_apart(held_out, config)
    prepared = comparison.prepare_apart(figures.test, deciding, template, lm, config)
    if not prepared.examples:
        raise UserError(f"data.test = {config.data.test!r}: no example fits prompt.max_tokens and prompt.template")
    lines = [line for report in source.reports for line in report.lines()]
    lines += comparison.data_warnings(held_out, prepared, template, lm, config)
    for line in [*lines, *continual.unmeasured(prepared, config)]:
        log.event("warning", message=line)
    return prepared


def _model(config: RunConfig) -> tuple[LanguageModel, tokenization.Template]:
    lm = adapters.load(config.model, config.adapter)
    return lm, tokenization.make_template(config.prompt, lm.tokenizer)


def _summarise(config: RunConfig, folder: Path, adapter: StateDict, held_out: HeldOut | None) -> dict[str, Any]:
    """The content of metrics.json: what the server can know, which leaves out the sites' rows and baselines."""
    events = event_log.read_events(folder)
    clients = {e["client"]: e for e in events if e["event"] == "handshake"}
    ranks, delivered = metrics_file.ranks(events), delivery.of_events(events)
    upto = delivered.round if delivered else config.rounds
    made = Counter[str]()  # optimizer steps that led to what is delivered
    for event in events:
        if event["event"] == "client" and event["round"] <= upto:
            made[event["client"]] += event["steps"]
    table: list[dict[str, Any]] = []
    more: dict[str, Any] = {}
    if held_out is not None:
        lm = _model(config)[0]
        rows = comparison.compare(lm, held_out, config, adapter, {}, {}, start=named_start(lm, config)).rows
        steps = {"base": 0, "start": 0, "federated": made.total()}
        table = [{**comparison.table_row(name, row, config.seed), "steps": steps[name]} for name, row in rows.items()]
        more = {
            "paired": comparison.differences(rows, config.seed),
            **continual.results(events, rows, held_out, config),
        }
    return {
        "schema": event_log.SCHEMA,
        "run": folder.name,
        "task": f"{len(clients)} sites, {public_name(config.model.name)}",
        "table": table,
        "clients": [{**_client(name, clients[name], ranks.get(name)), "steps": made[name]} for name in sorted(clients)],
        "rounds": metrics_file.rounds_table(events),
        "sites": own_rounds(events),
        "delivered": delivered._asdict() if delivered else None,
        **more,
        "rank": exported_rank(adapter),
        "curation": metrics_file.curation_counts(events),
        "privacy": statement.read(folder),
        **{key: value for key, value in environment.start_fields(config).items() if key in ("machine", "versions")},
    }


def _client(name: str, hello: Mapping[str, Any], rank: int | None) -> dict[str, Any]:
    told = {key: hello.get(key) for key in ("examples", "tokens")}
    return {"client": name, **told, "counts": hello.get("counts", "exact"), "rank": rank}


def _passes(error: BaseException) -> bool:
    """Whether what ended a run was none of its doing: its process was ended, the disk full, or the SuperLink gone."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return isinstance(error, KeyboardInterrupt | SystemExit | httpx.HTTPError)


def _line(error: BaseException) -> str:
    """What ended a run, in one line for its log."""
    if isinstance(error, KeyboardInterrupt | SystemExit):
        return "it was stopped"
    lines: Sequence[str] = str(error).strip().splitlines() or [type(error).__name__]
    known = isinstance(error, UserError | RunFailed)
    return lines[0] if known else f"{type(error).__name__}: {lines[0]}"
