"""The ServerApp: prepares the state of a run, does its rounds, and writes the adapter."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

import strategies
from apiary.config import defaults, loading
from apiary.config.schema import RunConfig
from apiary.core import files
from apiary.core.messages import Spent
from apiary.core.tensors import StateDict
from apiary.data import tokenization
from apiary.data.examples import Example
from apiary.evaluation import continual
from apiary.evaluation.comparison import HeldOut
from apiary.export import adapter_folder
from apiary.models import adapters, gates, start
from apiary.models.fused_layers import give_memory_back
from apiary.privacy import statement
from apiary.tracking.delivery import BEST, EVENT
from apiary.tracking.event_log import RunLog
from apiary.tracking.run_directory import GROUPS
from apiary.transport import from_config
from server import checkpoint, delivery, deployment_run, evaluation, site_grid, trusted_update
from server.rounds import Hooks, Progress, Rounds
from strategies import ServerState
from strategies.from_config import method_remarks


def prepare(
    config: RunConfig,
    folder: Path,
    log: RunLog,
    held_out: HeldOut | None,
    name_of: Callable[[int], str | None] = lambda node: None,
    away: Callable[[int], frozenset[str]] = lambda number: frozenset(),
    stay: Collection[int] = (),
) -> Rounds:
    """The rounds of a run, from its newest checkpoint in `folder` or from the start.

    Args:
        config: the run.
        folder: the run directory.
        log: receives the events.
        held_out: the server's own held-out examples; None when it has none.
        name_of: the name that a node's key is registered under; see `Roster`.
        away: the clients that a simulation has away in a round.
        stay: rounds whose checkpoints stay when newer ones are there.
    """
    lm = adapters.load(config.model, config.adapter)
    template = tokenization.make_template(config.prompt, lm.tokenizer)
    if config.prompt.template == "auto":
        log.event("template", template=template.words)
    aggregator = strategies.from_config(config)
    if aggregator.local.mixes:
        gates.check(lm, f"strategy.name = {config.strategy.name!r}")
    saved = checkpoint.load(folder / "checkpoints", config)
    if saved is None:
        begun = start.starting_adapter(lm, config)
        state = ServerState(0, {n: t for n, t in begun.items() if aggregator.local.shares(n)}, {}, {})
        progress = Progress()
    else:
        state, progress = saved[0], Progress(**saved[1])
    for line in [*from_config.remarks(config), *start.remarks(config), *method_remarks(config, aggregator)]:
        log.event("warning", message=line)
    measured = None if aggregator.local.personal else held_out  # there is no one model whose loss would say anything
    hooks = Hooks(
        log,
        on_round=lambda state, progress: save(folder, config, state, progress, stay),
        forget=lambda number, progress: _forget(folder, config, number, progress),
        evaluate=evaluation.on_held_out(lm, measured, config.seed) if measured else None,
        score_stages=continual.scorer(lm, measured, config) if measured else None,
        name_of=name_of,
        away=away,
        own_update=trusted_update.trainer(config, _examples(held_out), folder / "root") if aggregator.root else None,
    )
    return Rounds(config, aggregator, adapters.fingerprint(lm, template), state, hooks, progress)


def _parameters(config: RunConfig, state: ServerState) -> int:
    """The numbers in a change of this run, at most: those of its whole adapter, or of what a method sends instead."""
    lm = adapters.load(config.model, config.adapter)
    return max(sum(tensor.numel() for tensor in tensors.values()) for tensors in (lm.adapter, state.adapter))


def _examples(held_out: HeldOut | None) -> tuple[Example, ...]:
    """The server's held-out examples, those that decide among them."""
    if held_out is None:
        return ()
    return (*held_out.examples, *(held_out.deciding.examples if held_out.deciding else ()))


def save(folder: Path, config: RunConfig, state: ServerState, progress: Progress, stay: Collection[int] = ()) -> None:
    """Write the checkpoint of a round, and the statement of the privacy that clients have spent so far."""
    files.flush(folder)  # what virtual clients keep of the round, which the checkpoint counts on
    plain = {name: dict(value) for name, value in progress._asdict().items() if isinstance(value, Mapping)}
    also = {*stay, progress.sound_round} | ({progress.best_round} if progress.best_round is not None else set())
    checkpoint.save(folder / "checkpoints", state, {**progress._asdict(), **plain}, config, also=also)
    _state_privacy(folder, config, progress)
    give_memory_back()


def _forget(folder: Path, config: RunConfig, number: int, progress: Progress) -> None:
    """Remove the checkpoints after a round; what was spent in later rounds was spent all the same."""
    _state_privacy(folder, config, progress)
    checkpoint.forget(folder / "checkpoints", number)


def _state_privacy(folder: Path, config: RunConfig, progress: Progress) -> None:
    """State what was spent, also in rounds that a run which goes on from an earlier one has not done again."""
    spent = {client: Spent._make(values) for client, values in progress.spent.items()}
    stated = statement.read(folder).get("clients", {}) if config.privacy.unit != "none" else {}
    for client, values in stated.items():
        before = Spent(**values)
        if client not in spent or spent[client].epsilon < before.epsilon:
            spent[client] = before
    statement.write(folder, config, spent)


def deliver(config: RunConfig, rounds: Rounds, folder: Path, log: RunLog) -> StateDict:
    """Write the adapter that the run delivers, and beside it the best one where that is another; returns the former.

    Raises:
        RunFailed: the round that is to be delivered is lost.
    """
    chosen = delivery.choose(config, rounds.state, rounds.progress, folder)
    lm = adapters.load(config.model, config.adapter)
    # Factors that stay with the clients are those of a new adapter here: B is zero.
    fresh = adapters.fresh_adapter(lm, config.seed)
    adapter, about = {**fresh, **chosen.delivered.model}, ""
    aggregator = rounds.aggregator
    if aggregator.local.personal and not aggregator.local.halves(fresh):
        about = f"\n{aggregator.local.personal}. This one is for clients that have no other yet.\n"
        for name, model in aggregator.models(chosen.delivered).items():
            place, told = folder / GROUPS / name, f"\n{aggregator.local.personal}. This one is of {name}.\n"
            adapter_folder.save_adapter_folder(lm, model, place, config, folder, about=told)
    if chosen.best is not None:
        best = {**fresh, **chosen.best.model}
        adapter_folder.save_adapter_folder(lm, best, folder / BEST, config, rounds=chosen.best.round)
    adapter_folder.save_adapter_folder(lm, adapter, folder / "adapter", config, rounds=chosen.told.round, about=about)
    for line in delivery.remarks(config, rounds.progress):
        log.event("warning", message=line)
    log.event(EVENT, **chosen.told._asdict())
    return adapter


def make_app(
    log: RunLog | None = None,
    held_out: HeldOut | None = None,
    away: Callable[[int], frozenset[str]] = lambda number: frozenset(),
    stay: Collection[int] = (),
) -> ServerApp:
    """A ServerApp for one run.

    The run config holds `config` (the whole configuration as JSON), `out` (the run directory, on the server's disk) and
    `expected` (clients to wait for; the configured minimum when absent).

    Args:
        log: the run's, from a simulation, which then also writes the table and the report; without it the app keeps
            the whole run directory by itself, as in a deployment.
        held_out: the server's own held-out examples, from a simulation; a deployment reads its own.
        away: the clients that a simulation has away in a round.
        stay: rounds whose checkpoints stay when newer ones are there.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        values: dict[str, Any] = dict(context.run_config)
        config = defaults.resolved(loading.from_json(str(values["config"])))
        folder = Path(str(values["out"]))
        expected = int(values.get("expected", config.strategy.min_clients))

        def federate(log: RunLog, held_out: HeldOut | None) -> StateDict:
            rounds = prepare(config, folder, log, held_out, deployment_run.site_name, away, stay)
            seals = functools.partial(deployment_run.seals, str(values.get("name", "")), folder)
            waits = functools.partial(deployment_run.log_waits, log)
            rounds.run(site_grid.guarded(grid, lambda: _parameters(config, rounds.state), seals, waits), expected)
            return deliver(config, rounds, folder, log)

        if log is not None:
            federate(log, held_out)
        else:
            deployment_run.run(config, folder, expected, federate, number=context.run_id)

    return app


app = make_app()
