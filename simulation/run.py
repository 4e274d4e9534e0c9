"""A whole simulated run: check, federate, compare with the baselines, write the results."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file

import strategies
from apiary import config as configs
from apiary import evaluate, examples, models, prompts, runlog
from apiary.config import RunConfig, UserError
from apiary.evaluate import HeldOut, Measured
from apiary.examples import Federation
from apiary.models import LanguageModel
from apiary.prompts import Template
from apiary.report import write_report
from apiary.runlog import RunLog
from apiary.tensors import StateDict
from client import objectives
from server.app import make_app
from simulation import baselines
from simulation.engines import ENGINES

Observer = Callable[[dict[str, Any]], None]


class Plan(NamedTuple):
    """Everything a run needs, loaded and checked before a folder is made."""

    config: RunConfig
    federation: Federation
    lm: LanguageModel
    template: Template
    held_out: HeldOut


def plan(config: RunConfig) -> Plan:
    """Load the data and the model, and check that the configuration fits them.

    Raises:
        UserError: the first thing that cannot work.
    """
    strategies.AGGREGATORS.build(config.strategy.name, config.strategy.options, weighting=config.strategy.weighting)
    ENGINES.builder(config.simulate.engine)
    objectives.OBJECTIVES.build(config.train.objective)
    objectives.build_penalties(config.train.penalties, {})
    federation = examples.federate(config.data, config.seed)
    if config.strategy.min_clients > len(federation.clients):
        raise UserError(
            f"strategy.min_clients = {config.strategy.min_clients}: there are {len(federation.clients)} clients; "
            "lower it or raise data.clients"
        )
    if not federation.test:
        raise UserError("no held-out examples: set data.test_fraction above 0, or data.test to a held-out source")
    lm = models.load(config.model, config.adapter)
    template = prompts.make_template(config.prompt, lm.tokenizer)
    held_out = evaluate.prepare(federation.test, template, lm, config)
    if not held_out.examples:
        raise UserError(f"prompt.max_tokens = {config.prompt.max_tokens}: no held-out example fits; raise it")
    return Plan(config, federation, lm, template, held_out)


def simulate(config: RunConfig, folder: Path, *, resume: bool = False, observers: Sequence[Observer] = ()) -> dict[str, Any]:
    """Run to the end and return the metrics, which also stand in `folder` with the adapter and the report.

    Args:
        config: the run.
        folder: the run directory; must be new or empty unless `resume`.
        resume: go on after the last finished round of `folder`.
        observers: receive every event, for progress and trackers.

    Raises:
        UserError: wrong input; nothing was written.
        server.rounds.RunFailed: too few clients answered well.
    """
    began = time.monotonic()
    _check_folder(config, folder, resume)
    for observer in observers:
        observer({"event": "phase", "name": "loading"})
    prepared = plan(config)
    folder.mkdir(parents=True, exist_ok=True)
    runlog.write_atomic(folder / "config.toml", config.to_toml())
    log = _open_log(config, folder, observers, len(prepared.federation.clients))
    try:
        _report_rows(log, prepared)
        app = make_app(log, prepared.held_out.corpus)
        ENGINES.build(config.simulate.engine)(app, config, len(prepared.federation.clients), folder)
        adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
        metrics = _results(prepared, adapter, folder, log)
        metrics["seconds"] = round(_spent_before(folder) + time.monotonic() - began, 1)
        log.event("finish", seconds=metrics["seconds"])
        runlog.write_metrics(folder, metrics)
        write_report(folder)
    finally:
        log.close()
    return metrics


def _check_folder(config: RunConfig, folder: Path, resume: bool) -> None:
    used = folder.exists() and any(folder.iterdir())
    if not resume and used:
        raise UserError(f"{str(folder)!r} is not empty: add --resume to go on with that run, or choose another --out")
    if resume:
        if not (folder / "config.toml").exists():
            raise UserError(f"--resume: {str(folder)!r} holds no run (no config.toml)")
        stored = configs.load(folder / "config.toml")
        if stored != config:
            raise UserError(f"--resume: the configuration differs from the run's own in {', '.join(_differences(stored, config))}")


def _differences(a: RunConfig, b: RunConfig) -> list[str]:
    left, right = a.model_dump(), b.model_dump()
    found = []
    for section, value in left.items():
        if isinstance(value, dict):
            found += [f"{section}.{key}" for key in value if value[key] != right[section][key]]
        elif value != right[section]:
            found.append(section)
    return found


def _open_log(config: RunConfig, folder: Path, observers: Sequence[Observer], clients: int) -> RunLog:
    from server import checkpoint

    found = checkpoint.load(folder / "checkpoints")
    if (folder / "log.jsonl").exists():
        runlog.truncate_after(folder, found[0].round if found else 0)
    log = RunLog(folder, [*observers, *([runlog.tracker(config, folder)] if config.log.trackers else [])])
    fields = runlog.start_fields(config)
    log.event("start", **fields, rounds=config.rounds, clients=clients, resumed=found[0].round if found else 0)
    return log


def _report_rows(log: RunLog, prepared: Plan) -> None:
    for report in prepared.federation.reports:
        for problem, (count, rows) in report.problems.items():
            where = f" (rows {', '.join(map(str, rows))}{', ...' if count > len(rows) else ''})" if rows else ""
            log.event("warning", message=f"{report.name}: {count} of {report.rows} rows left out: {problem}{where}")


def _spent_before(folder: Path) -> float:
    """Seconds between starts and last events of the earlier parts of a resumed run."""
    events = runlog.read_events(folder)
    starts = [i for i, event in enumerate(events) if event["event"] == "start"]
    return sum(events[b - 1]["time"] - events[a]["time"] for a, b in zip(starts, starts[1:], strict=False))


def _results(prepared: Plan, adapter: StateDict, folder: Path, log: RunLog) -> dict[str, Any]:
    config, federation, lm, template, held_out = prepared
    events = runlog.read_events(folder)
    steps = Counter[str]()
    for event in events:
        if event["event"] == "client":
            steps[event["client"]] += event["steps"]
    log.event("phase", name="baselines")
    trained = baselines.train_all(config, lm, template, federation.clients, steps, folder / "baselines", log)
    log.event("phase", name="evaluating")
    runs = _measure_all(prepared, adapter, trained)
    clients = _per_client(prepared, adapter, trained)
    tag = mix_tag(config, federation)
    return {
        "schema": 1,
        "run": folder.name,
        "task": f"{len(federation.clients)} clients, {_short(config.data.source)}, {_short(config.model.name)}",
        "table": [evaluate.table_row(method, run, config.seed) for method, run in runs.items()],
        "clients": clients,
        "gain": _gain(clients),
        "skills": evaluate.by_tag(tag, runs, held_out) if tag and config.evaluate.generate else {},
        "rounds": rounds_table(events),
        "samples": _samples(prepared, runs, tag),
        "privacy": {"unit": "none"},
        **{key: value for key, value in runlog.start_fields(config).items() if key in ("machine", "versions")},
    }


def _measure_all(prepared: Plan, adapter: StateDict, trained: Mapping[str, StateDict]) -> dict[str, Measured]:
    """One `Measured` per table row, on the held-out mix."""
    config, lm, held_out = prepared.config, prepared.lm, prepared.held_out
    runs: dict[str, Measured] = {}
    if "base" in config.evaluate.baselines:
        runs["base"] = evaluate.measure(lm, models.fresh_adapter(lm, config.seed), held_out, config)
    alone = [evaluate.measure(lm, state, held_out, config) for name, state in trained.items() if name != baselines.CENTRAL]
    if alone:
        runs["local"] = evaluate.mean(alone)
    runs["federated"] = evaluate.measure(lm, adapter, held_out, config)
    if baselines.CENTRAL in trained:
        runs["central"] = evaluate.measure(lm, trained[baselines.CENTRAL], held_out, config)
    return runs


def _per_client(prepared: Plan, adapter: StateDict, trained: Mapping[str, StateDict]) -> list[dict[str, Any]]:
    """What each client holds, and the losses on its own held-out rows."""
    config, federation, lm, template, _ = prepared
    tag = mix_tag(config, federation)
    fresh = models.fresh_adapter(lm, config.seed)
    loss_only = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"generate": False})})
    rows = []
    for client in federation.clients:
        own = evaluate.prepare(client.test, template, lm, loss_only)
        candidates = {"base": fresh, "local": trained.get(client.name), "federated": adapter, "central": trained.get(baselines.CENTRAL)}
        losses = {
            method: evaluate.measure(lm, state, own, loss_only).loss
            for method, state in candidates.items()
            if state is not None and own.examples
        }
        stats = prompts.encode_all(client.train, template, lm.tokenizer, config.prompt).stats
        rows.append(
            {
                "client": client.name,
                "examples": stats.examples,
                "tokens": stats.response_tokens,
                "cut": stats.cut,
                "dropped": stats.dropped,
                "mix": dict(Counter(e.tags.get(tag, "") for e in client.train).most_common()) if tag else {},
                "own": losses,
            }
        )
    return rows


def _gain(clients: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """By how many nats per token each client's own loss falls by joining, against training alone."""
    gains = {c["client"]: c["own"]["local"] - c["own"]["federated"] for c in clients if {"local", "federated"} <= set(c["own"])}
    if not gains:
        return {}
    worst = min(gains, key=lambda name: gains[name])
    return {
        "clients": len(gains),
        "improved": sum(gain > 0 for gain in gains.values()),
        "mean": sum(gains.values()) / len(gains),
        "worst": {"client": worst, "gain": gains[worst]},
    }


def rounds_table(events: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rounds of metrics.json: training and held-out figures by round, from the log."""
    rounds: dict[int, dict[str, Any]] = {}
    for event in events:
        if event["event"] in ("round", "evaluate"):
            kept = {k: v for k, v in event.items() if k not in ("event", "time", "clients") or event["event"] == "round" and k == "clients"}
            rounds.setdefault(event["round"], {}).update(kept)
    return [rounds[number] for number in sorted(rounds)]


def mix_tag(config: RunConfig, federation: Federation) -> str | None:
    """The tag by which data is described: the partition's own, else a usual one that the rows carry."""
    by = config.data.partition.options.get("by")
    present = federation.clients[0].train[0].tags
    return next((tag for tag in (by, "skill", "category", "task", "label") if tag and tag in present), None)


def _samples(prepared: Plan, runs: Mapping[str, Measured], tag: str | None) -> list[dict[str, str]]:
    """A few held-out prompts with every method's answer, spread over the tag's values."""
    held_out = prepared.held_out
    answered = {method: run for method, run in runs.items() if run.texts}
    if not answered:
        return []
    first: dict[str, int] = {}
    for index, example in enumerate(held_out.examples):
        first.setdefault(example.tags.get(tag or "", str(index)), index)
    chosen = list(first.values())[: prepared.config.evaluate.samples]
    return [
        {
            "prompt": prepared.template.prompt(held_out.examples[i].turns),
            "question": held_out.examples[i].turns[-2].text,
            "reference": held_out.answers[i],
            "skill": held_out.examples[i].tags.get(tag or "", ""),
            **{method: run.texts[i] for method, run in answered.items()},
        }
        for i in chosen
    ]


def _short(name: str) -> str:
    """The last part of a path, so that no folder of this machine stands in a result that is passed on."""
    return Path(name).name if Path(name).is_absolute() else name
