"""What federated tuning is held against: each client training alone, and all data pooled.

Both use the same trainer, settings and schedule. A client alone gets as many steps as it had in the federation; pooled
training gets as many as all clients had together.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors.torch import load_file

from apiary import models, prompts
from apiary.config import RunConfig
from apiary.evaluate import CENTRAL
from apiary.examples import ClientData, Example
from apiary.models import LanguageModel
from apiary.prompts import Template
from apiary.runlog import RunLog
from apiary.tensors import StateDict, add
from client import trainer


def train_all(
    config: RunConfig,
    lm: LanguageModel,
    template: Template,
    clients: Iterable[ClientData],
    steps: Mapping[str, int],
    folder: Path,
    log: RunLog,
) -> dict[str, StateDict]:
    """The adapters of the configured baselines: one per client name, and `central`.

    Each finished one is kept as a PEFT folder under `folder`, and a resumed run takes it from there.

    Args:
        config: the run.
        lm: the base with its adapter.
        template: how examples become tokens.
        clients: their training data.
        steps: optimizer steps that each client had in the federation.
        folder: where finished baselines are kept.
        log: receives `baseline` events.
    """
    work: list[tuple[str, tuple[Example, ...], int]] = []
    clients = list(clients)
    if "local" in config.evaluate.baselines:
        work += [(c.name, c.train, steps[c.name]) for c in clients if steps.get(c.name)]
    if CENTRAL in config.evaluate.baselines:
        pooled = tuple(example for c in clients for example in c.train)
        work.append((CENTRAL, pooled, sum(steps.values())))
    adapters: dict[str, StateDict] = {}
    for done, (name, rows, count) in enumerate(work, 1):
        began = time.monotonic()
        adapters[name] = _adapter(config, lm, template, name, rows, count, folder)
        kind = CENTRAL if name == CENTRAL else "local"
        log.event("baseline", method=kind, name=name, done=done, total=len(work), seconds=time.monotonic() - began)
    return adapters


def _adapter(
    config: RunConfig,
    lm: LanguageModel,
    template: Template,
    name: str,
    rows: tuple[Example, ...],
    steps: int,
    folder: Path,
) -> StateDict:
    weights = folder / name / "adapter_model.safetensors"
    if weights.exists():
        return load_file(weights)
    start = models.fresh_adapter(lm, config.seed)
    corpus = prompts.encode_all(rows, template, lm.tokenizer, config.prompt)
    result = trainer.fit(
        lm,
        start,
        corpus,
        config.train,
        seed=config.seed,
        client=name,
        cursor=trainer.Cursor(),
        first_step=0,
        total_steps=steps,
        steps=steps,
    )
    adapter = add(start, result.delta)
    models.save_adapter(lm, adapter, folder / name)
    return adapter
