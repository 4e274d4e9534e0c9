"""A whole simulated run: check, federate, compare with the baselines, write the results."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import strategies
from apiary.config import defaults, loading, summary
from apiary.config.schema import RunConfig
from apiary.core import files
from apiary.core.errors import RunFailed, UserError
from apiary.data import splits, stages, tokenization
from apiary.data.federation import set_deciding_apart, too_few_clients, undecided
from apiary.data.stages import rows_by_stage, unlimited_buffers
from apiary.evaluation import comparison, continual
from apiary.models import adapter_files, adapters, gates, start
from apiary.privacy import plan as privacy_plan
from apiary.privacy import sampling
from apiary.report import write_report
from apiary.tracking import environment, event_log, metrics_file, run_directory, trackers
from apiary.tracking.event_log import RunLog
from client import curation, handlers
from client.personal import own_model
from client.training import objectives
from server import checkpoint, trusted_update
from server.app import make_app
from simulation import absence, adversaries, personal
from simulation.engines import ENGINES
from simulation.summary import Plan, personal_of_run, summarise, with_personal
from strategies.from_config import local_from_config

Observer = Callable[[dict[str, Any]], None]


def check_names(config: RunConfig) -> None:
    """Check every method that the configuration names, with its options.

    Raises:
        UserError: all problems found.
    """
    checks: list[Callable[[], object]] = [
        lambda: strategies.from_config(config),
        lambda: ENGINES.build(config.simulate.engine, config=config),
        lambda: adversaries.check(config),
        lambda: objectives.OBJECTIVES.build(config.train.objective),
        lambda: objectives.build_penalties(config.train.penalties, {}),
        lambda: curation.build_steps(config.curate.steps),
    ]
    problems: list[str] = []
    for check in checks:
        try:
            check()
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)


def remarks(config: RunConfig, clients: Sequence[str]) -> list[str]:
    """What a run says at its start of its attack and of the server's own rows, a line each."""
    return [*adversaries.remarks(config, clients), *trusted_update.remarks(config)]


def plan(config: RunConfig) -> Plan:
    """Load the data and the model, and check that the configuration fits them.

    Raises:
        UserError: the first thing that cannot work.
    """
    check_names(config)
    trackers.check(config)
    adversaries.forget()  # the files may have changed since an earlier run in this process
    federation = handlers.federation(config.to_json())
    adversaries.attackers(config, [client.name for client in federation.clients])  # whether there can be so many
    absence.check(config, len(federation.clients))
    if few := too_few_clients(config, len(federation.clients)):
        raise UserError(*few)
    if config.privacy.unit == "record":
        rows = [stages.rows_by_stage(client.train, config) for client in federation.clients]
        sampling.check(config, rows)
        sampling.noise_multiplier(config, rows[sampling.worst(config, rows)])  # there may be none that is enough
    if none := splits.no_test(federation, config):
        raise UserError(*none)
    if wrong := undecided(federation, config):
        raise UserError(*wrong)
    trusted_update.rows(config, federation.test)
    lm = adapters.load(config.model, config.adapter)
    if local_from_config(config).mixes:
        gates.check(lm, f"strategy.name = {config.strategy.name!r}")
    template = tokenization.make_template(config.prompt, lm.tokenizer)
    figures, deciding = set_deciding_apart(federation, config)
    held_out = comparison.prepare_apart(figures.test, deciding, template, lm, config)
    tokenization.check_template((example for client in federation.clients for example in client.train), template)
    if not held_out.examples:
        tokenization.check_template(federation.test, template)
        raise UserError(f"prompt.max_tokens = {config.prompt.max_tokens}: no held-out example fits; raise it")
    return Plan(config, federation, lm, template, held_out)


def simulate(
    config: RunConfig,
    folder: Path,
    *,
    resume: bool = False,
    observers: Sequence[Observer] = (),
    shared: Path | None = None,
) -> dict[str, Any]:
    """Run to the end and return the metrics, which also stand in `folder` with the adapter and the report.

    Args:
        config: the run.
        folder: the run directory; must be new or empty unless `resume`.
        resume: go on after the last finished round of `folder`, if there is a run in it.
        observers: receive every event, for progress and trackers.
        shared: a folder in which several runs share the baselines that they have alike; None: each trains its own.

    Raises:
        UserError: wrong input, or another process writes `folder`; nothing was written.
        apiary.core.errors.RunFailed: too few clients answered well, or the model that they made gives no number.
    """
    config = defaults.resolved(start.resolved(config))
    with run_directory.claim(folder) as warnings:
        run_directory.check_folder(config, folder, resume)
        return _simulate(config, folder, observers, warnings, shared)


def _simulate(
    config: RunConfig, folder: Path, observers: Sequence[Observer], warnings: Sequence[str], shared: Path | None
) -> dict[str, Any]:
    """A run in a directory that belongs to this process and can take it."""
    began = time.monotonic()
    for observer in observers:
        observer({"event": "phase", "name": "loading"})
    prepared = plan(config)
    files.sweep(folder)
    files.write_atomic(folder / "config.toml", config.to_toml())
    log = _open_log(config, folder, observers, [client.name for client in prepared.federation.clients])
    try:
        for line in warnings:
            log.event("warning", message=line)
        _report_rows(log, prepared)
        names = [client.name for client in prepared.federation.clients]
        app = make_app(
            log, prepared.held_out, functools.partial(absence.away, config, names), personal.quarters(config)
        )
        ENGINES.build(config.simulate.engine, config=config)(app, config, len(prepared.federation.clients), folder)
        adapter = adapter_files.read_adapter(prepared.lm, folder / "adapter" / "adapter_model.safetensors")
        figures, _ = set_deciding_apart(prepared.federation, config)
        metrics = summarise(prepared._replace(federation=figures), adapter, folder, log, shared)
        metrics["seconds"] = round(event_log.spent_before(folder) + time.monotonic() - began, 1)
        log.event("finish", seconds=metrics["seconds"])
        metrics_file.write_metrics(folder, metrics)
        write_report(folder)
        if not math.isfinite(next(row["loss"] for row in metrics["table"] if row["method"] == "federated")):
            raise RunFailed(
                "the federated model gives no number on held-out rows: what clients sent was finite, and too large; "
                "the report says who took part, and robust methods are in docs/aggregation.md"
            )
    finally:
        log.close()
    return metrics


def personalise(folder: Path, overrides: Sequence[str] = (), observers: Sequence[Observer] = ()) -> dict[str, Any]:
    """Make the clients' own models of a finished simulation, and write its metrics and report again.

    Where the run set rows apart for that (`personal.enabled`) they choose; else half of each client's held-out rows
    does, and the figures of these models are on the other half.

    Args:
        folder: the run directory.
        overrides: `personal.KEY=VALUE` on top of the run's own settings, for all keys but those that say which rows
            were trained on.
        observers: receive every event.

    Returns:
        The metrics.

    Raises:
        UserError: no finished simulation, or a key that cannot be set any more, or a method whose clients take no
            gradients.
    """
    metrics = metrics_file.read_metrics(folder)
    if metrics.get("sites") is not None:
        raise UserError(
            f"{str(folder)!r} is a deployed run, whose rows are at its sites: each makes its own model there (apiary "
            "deploy personal)"
        )
    config = loading.load(folder / "config.toml", own_model.only_personal(overrides))
    _check_personal(config)
    with run_directory.claim(folder):
        files.sweep(folder)
        for observer in observers:
            observer({"event": "phase", "name": "loading"})
        prepared = plan(config)
        figures, _ = set_deciding_apart(prepared.federation, config)
        rows = personal.rows_of(prepared.federation, figures, config)
        adapter = adapter_files.read_adapter(prepared.lm, folder / "adapter" / "adapter_model.safetensors")
        with contextlib.closing(RunLog(folder, observers)) as log:
            found = personal_of_run(prepared._replace(federation=figures), adapter, rows, folder, log)
            clients = with_personal(metrics["clients"], found, beside=config.personal.enabled)
        metrics = {**metrics, "clients": clients, "personal": found.whole}
        metrics_file.write_metrics(folder, metrics)
        write_report(folder)
    return metrics


def _check_personal(config: RunConfig) -> None:
    """Check that the clients of a run can make models of their own, whether or not it was to make them.

    Raises:
        UserError: the method or another setting does not go with it.
    """
    values = config.model_dump(mode="json")
    strategies.from_config(loading.parse({**values, "personal": {**values["personal"], "enabled": True}}))


def _open_log(config: RunConfig, folder: Path, observers: Sequence[Observer], clients: Sequence[str]) -> RunLog:
    found = checkpoint.load(folder / "checkpoints", config)
    if (folder / "log.jsonl").exists():
        event_log.truncate_after(folder, found[0].round if found else 0)
    log = RunLog(folder, [*observers, *([trackers.tracker(config, folder)] if config.log.trackers else [])])
    fields, resumed = environment.start_fields(config), found[0].round if found else 0
    if hostile := adversaries.attackers(config, clients):
        fields["attack"] = {"name": config.simulate.attack.name, "clients": list(hostile)}
    fields["outline"] = summary.sentence(config)
    fields["method"] = strategies.traits(strategies.from_config(config))
    after = ["baselines"] if set(config.evaluate.baselines) - {"base"} else []
    after += ["own models"] if config.personal.enabled else []
    log.event("start", **fields, rounds=config.rounds, clients=len(clients), resumed=resumed, after=after)
    for line in remarks(config, clients):
        log.event("warning", message=line)
    return log


def _report_rows(log: RunLog, prepared: Plan) -> None:
    for report in prepared.federation.reports:
        for line in report.lines():
            log.event("warning", message=line)
    config, federation, lm, template, held_out = prepared
    lines = comparison.data_warnings(federation, held_out, template, lm, config)
    stages = [rows_by_stage(client.train, config) for client in federation.clients]
    lines += [*splits.remarks(federation, config), *unlimited_buffers(stages, config)]
    if config.privacy.unit == "record":
        lines += privacy_plan.remarks(config, stages)
    for line in [*lines, *continual.unmeasured(held_out, config)]:
        log.event("warning", message=line)
