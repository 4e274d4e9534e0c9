"""What federated tuning is held against: each client training alone, and all data pooled.

Both use the same trainer, settings and schedule, without the penalties, which tie a client to a server's adapter. A
client alone gets as many steps as it had in the federation; pooled training gets as many as all clients had together.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from safetensors.torch import load_file

from apiary.config.schema import RunConfig
from apiary.core.tensors import StateDict, add
from apiary.data import tokenization
from apiary.data.examples import Example
from apiary.data.federation import ClientData
from apiary.data.tokenization import Template
from apiary.models import adapter_files, adapters
from apiary.models.adapters import LanguageModel
from apiary.tracking.event_log import RunLog
from apiary.tracking.run_directory import result_folders
from client.training import trainer
from client.training.trainer import VisitPlan


class Baselines(NamedTuple):
    """The adapters that the federated one is held against; what is not configured is not there."""

    alone: dict[str, StateDict]  # by client
    central: StateDict | None


def train_all(
    config: RunConfig,
    lm: LanguageModel,
    template: Template,
    clients: Sequence[ClientData],
    steps: Mapping[str, int],
    folder: Path,
    log: RunLog,
) -> Baselines:
    """Train the configured baselines.

    Each finished one is kept as a PEFT folder, and a resumed run takes it from there.

    Args:
        config: the run.
        lm: the base with its adapter.
        template: how examples become tokens.
        clients: their training data.
        steps: optimizer steps that each client had in the federation.
        folder: the run directory.
        log: receives `baseline` events.
    """
    places = result_folders(folder)
    work: list[tuple[str, str, Path, tuple[Example, ...], int]] = []
    if "local" in config.evaluate.baselines:
        taught = [client for client in clients if steps.get(client.name)]
        work += [("local", c.name, places.alone / c.name, c.train, steps[c.name]) for c in taught]
    if "central" in config.evaluate.baselines:
        pooled = tuple(example for c in clients for example in c.train)
        work.append(("central", "central", places.central, pooled, sum(steps.values())))
    made = Baselines({}, None)
    for done, (kind, name, place, rows, count) in enumerate(work, 1):
        began = time.monotonic()
        adapter = _adapter(config, lm, template, name, rows, count, place)
        if kind == "local":
            made.alone[name] = adapter
        else:
            made = made._replace(central=adapter)
        log.event("baseline", method=kind, name=name, done=done, total=len(work), seconds=time.monotonic() - began)
    return made


def _adapter(
    config: RunConfig,
    lm: LanguageModel,
    template: Template,
    name: str,
    rows: tuple[Example, ...],
    steps: int,
    folder: Path,
) -> StateDict:
    weights = folder / "adapter_model.safetensors"
    if weights.exists():
        return load_file(weights)
    start = adapters.fresh_adapter(lm, config.seed)
    corpus = tokenization.encode_all(rows, template, lm.tokenizer, config.prompt)
    result = trainer.fit(
        lm,
        start,
        corpus,
        config.train,
        VisitPlan(
            seed=config.seed,
            client=name,
            steps=steps,
            total_steps=steps,
            factors="both" if config.adapter.train == "alternate" else config.adapter.trained(1),
        ),
    )
    adapter = add(start, result.delta)
    adapter_files.save_adapter(lm, adapter, folder)
    return adapter
