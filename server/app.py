"""The ServerApp: prepares a run's state, lets `Rounds` do the work, and writes the adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

import strategies
from apiary.config import loading
from apiary.config.schema import RunConfig
from apiary.core import lora
from apiary.core.messages import Score, Spent
from apiary.core.tensors import StateDict
from apiary.data import tokenization
from apiary.data.batches import Corpus
from apiary.evaluation import comparison, continual
from apiary.evaluation.comparison import HeldOut
from apiary.export import adapter_folder
from apiary.models import adapters
from apiary.models.adapters import LanguageModel
from apiary.models.inference import ModelProbe
from apiary.privacy import statement
from apiary.tracking.event_log import RunLog
from apiary.transport import from_config
from server import checkpoint, deployment_run, trusted_update
from server.rounds import Evaluation, Progress, Rounds
from strategies import ServerState


def prepare(
    config: RunConfig,
    folder: Path,
    log: RunLog,
    held_out: HeldOut | None,
    name_of: Callable[[int], str | None] = lambda node: None,
) -> Rounds:
    """The rounds of a run, from its newest checkpoint in `folder` or from the start.

    Args:
        config: the run.
        folder: the run directory.
        log: receives the events.
        held_out: the server's own held-out examples; None when it has none.
        name_of: the name under which the server knows a node, where it knows one.
    """
    lm = adapters.load(config.model, config.adapter)
    template = tokenization.make_template(config.prompt, lm.tokenizer)
    if config.prompt.template == "auto":
        log.event("template", template=template.words)
    found = checkpoint.load(folder / "checkpoints")
    if found is None:
        fresh = adapters.fresh_adapter(lm, config.seed)
        state = ServerState(0, fresh if config.adapter.share == "both" else lora.only_a(fresh), {}, {})
        progress = Progress()
    else:
        state, progress = found[0], Progress(**found[1])
    aggregator = strategies.from_config(config)
    for line in from_config.remarks(config):
        log.event("warning", message=line)
    measured = held_out if config.adapter.share == "both" else None  # half an adapter has no loss
    return Rounds(
        config,
        aggregator,
        adapters.fingerprint(lm, template),
        state,
        log=log,
        progress=progress,
        on_round=lambda state, progress: save(folder, config, state, progress),
        evaluate=_measure(lm, measured.corpus, config.seed) if measured else None,
        score_stages=continual.scorer(lm, measured, config) if measured else None,
        name_of=name_of,
        root=trusted_update.trainer(config, held_out.examples if held_out else (), folder / "root")
        if aggregator.root
        else None,
    )


def _measure(lm: LanguageModel, held_out: Corpus, seed: int) -> Callable[[StateDict], Evaluation]:
    def measure(adapter: StateDict) -> Evaluation:
        adapters.set_adapter(lm, adapter)
        nats, tokens = ModelProbe(lm).losses(held_out)
        score = Score(float(nats.sum()), int(tokens.sum()), len(nats))
        return Evaluation(score, comparison.interval(nats, tokens, seed=seed))

    return measure


def save(folder: Path, config: RunConfig, state: ServerState, progress: Progress) -> None:
    """Write a round's checkpoint, and the account of the privacy spent."""
    plain = {name: dict(value) for name, value in progress._asdict().items() if isinstance(value, Mapping)}
    checkpoint.save(folder / "checkpoints", state, {**progress._asdict(), **plain})
    statement.write(folder, config, {client: Spent._make(values) for client, values in progress.spent.items()})


def make_app(log: RunLog | None = None, held_out: HeldOut | None = None) -> ServerApp:
    """A ServerApp for one run; without a simulation around it, it keeps the whole run directory by itself.

    The run config holds `config` (the whole configuration as JSON), `out` (the run directory, on the server's disk) and
    `expected` (clients to wait for; the configured minimum when absent).
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        values: dict[str, Any] = dict(context.run_config)
        config = loading.from_json(str(values["config"]))
        folder = Path(str(values["out"]))
        expected = int(values.get("expected", config.strategy.min_clients))

        def federate(log: RunLog, held_out: HeldOut | None) -> StateDict:
            rounds = prepare(config, folder, log, held_out, deployment_run.site_name)
            lm = adapters.load(config.model, config.adapter)
            # Factors that stay with the clients are those of a new adapter here: B is zero.
            adapter = {**adapters.fresh_adapter(lm, config.seed), **rounds.run(grid, expected).model}
            adapter_folder.save_adapter_folder(lm, adapter, folder / "adapter", config)
            return adapter

        if log is not None:
            federate(log, held_out)
        else:
            deployment_run.run(config, folder, expected, federate, number=context.run_id)

    return app


app = make_app()
