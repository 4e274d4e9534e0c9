"""A private visit: how its rows are drawn, what that costs, and the training once it is paid for.

The order is what makes the account true after any crash: the ledger is charged on disk first, then rows are drawn, and
the release is on disk before it leaves. A request that comes again gets the same release and costs nothing more.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from apiary.config.schema import RunConfig
from apiary.core.messages import Payload, Spent
from apiary.core.tensors import digest
from apiary.data.batches import Corpus
from apiary.models.adapters import LanguageModel
from apiary.privacy import sampling
from apiary.privacy.ledger import Entry, open_key, pay
from apiary.privacy.noise import SecretNoise, request_digest
from client.releases import released, unanswered
from client.training.dp_sgd import fit_private
from client.training.trainer import FitResult, Observer
from strategies.local import Penalty

_NOT_THE_RUNS = {"simulate", "log", "evaluate", "strategy", "wire"}  # they change nothing of what a client releases


class Work(NamedTuple):
    """What a private visit trains on."""

    corpus: Corpus  # new rows, then kept ones
    new: int  # how many of its rows are new
    rows: Sequence[int]  # the client's rows in each stage, before curation: public
    rounds_before: int  # of this stage
    rounds: int  # of this stage, all told


def visit(
    lm: LanguageModel,
    config: RunConfig,
    work: Work,
    payload: Payload,
    number: int,
    *,
    folder: Path,
    ledger: Path,
    penalties: Sequence[Penalty] = (),
    observers: Sequence[Observer] = (),
) -> tuple[FitResult, Spent] | None:
    """The private change of the received adapter, and what the client's rows have spent with it.

    Args:
        lm: the model.
        config: the run.
        work: the rows.
        payload: what the server sent.
        number: the round, from 1.
        folder: the client's own folder of this run, which keeps the release.
        ledger: the client's `ledger.json`; its secret key stands beside it.
        penalties: on the adapter, which cost nothing.
        observers: told of each step; what they are told must stay with the client.

    Returns:
        None where the client has no rows for this stage.

    Raises:
        apiary.core.errors.BudgetSpent: the visit does not fit in the budget; nothing was drawn or charged.
        UserError: the settings cannot keep the promise, or the ledger cannot be read.
    """
    plan = sampling.draw(config, work.rows, number)
    if plan is None:
        return None
    noise_multiplier = sampling.noise_multiplier(config, work.rows)
    rates = np.full(len(work.corpus), plan.old)
    rates[: work.new] = plan.new
    key = open_key(ledger)
    inputs = (
        digest(payload.model, digits=64),
        _corpus_digest(work.corpus, rates),
        _config_digest(config),
        _machine(lm, config),
        json.dumps([noise_multiplier, *plan]),
    )
    request = unanswered(folder, number, lambda again: request_digest(key, folder.name, number, *inputs, *again))
    entry = Entry(
        folder.name, number, request, noise_multiplier, plan.steps, sampling.rates(plan), sampling.partition(config)
    )
    spent = pay(ledger, entry, config.privacy)
    make = functools.partial(
        fit_private,
        lm,
        payload.model,
        work.corpus,
        config,
        rates=rates,
        noise_multiplier=noise_multiplier,
        noise=SecretNoise(key, "noise", request),
        sampling=SecretNoise(key, "rows", request),
        steps=plan.steps,
        first_step=work.rounds_before * plan.steps,
        total_steps=work.rounds * plan.steps,
        penalties=penalties,
        observers=observers,
        factors=config.adapter.trained(number),
    )
    result = released(folder, number, request, make)
    # Expected numbers, and so public; only new rows give an update its weight.
    expected = plan.steps * config.privacy.batch_rows
    new = max(1, round(plan.steps * plan.new * work.rows[plan.stage]))
    return result._replace(report=result.report._replace(tokens=new, replayed=expected - new)), spent


def _corpus_digest(corpus: Corpus, rates: np.ndarray) -> str:
    hasher = hashlib.sha256()
    for part in (corpus.ids, corpus.trained, corpus.offsets, rates):
        hasher.update(np.ascontiguousarray(part).tobytes())
    return hasher.hexdigest()


def _machine(lm: LanguageModel, config: RunConfig) -> str:
    """What decides the last bits of the same sum: another answer to the same request needs noise of its own."""
    threads = config.train.threads or torch.get_num_threads()
    gpu = torch.cuda.get_device_name(lm.device) if lm.device.type == "cuda" else ""
    versions = [importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "opacus")]
    return json.dumps([lm.digest, str(lm.device), gpu, str(lm.dtype), threads, *versions])


def _config_digest(config: RunConfig) -> str:
    values = {name: part for name, part in json.loads(config.to_json()).items() if name not in _NOT_THE_RUNS}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
