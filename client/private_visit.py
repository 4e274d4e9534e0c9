"""A private visit: how its rows are drawn, what that costs, and the training once it is paid for.

The order is what makes the account true after any crash: the ledger is charged on disk first, then rows are drawn, and
the release is on disk before it leaves. A request that comes again gets the same release and costs nothing more.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from apiary.config.schema import RunConfig
from apiary.core.messages import Payload, Spent
from apiary.core.tensors import digest
from apiary.data import store
from apiary.data.batches import Corpus
from apiary.models.adapters import LanguageModel
from apiary.privacy.ledger import charge_file, open_key
from apiary.privacy.mechanism import mechanism
from apiary.privacy.noise import SecretNoise, request_digest
from client.releases import released, unanswered
from client.site import Site
from client.training.dp_sgd import PrivateVisit, fit_private
from client.training.trainer import FitResult, Observer
from strategies.local import Penalty

_NOT_THE_RUNS = {"simulate", "log", "evaluate", "strategy", "wire"}  # they change nothing of what a client releases


class Work(NamedTuple):
    """What a private visit trains on."""

    corpus: Corpus  # new rows, then kept ones
    new: int  # how many of its rows are new
    rows: Sequence[int]  # in each stage, before curation, as the client's policy for counts has them: public
    rounds_before: int  # of this stage
    rounds: int  # of this stage, all told
    penalties: tuple[Penalty, ...] = ()  # on the adapter, which cost nothing
    observers: tuple[Observer, ...] = ()  # told of each step; what they are told must stay with the client


def visit(
    lm: LanguageModel, config: RunConfig, site: Site, work: Work, payload: Payload, number: int
) -> tuple[FitResult, Spent] | None:
    """The private change of the received adapter, and what the client's rows have spent with it.

    Args:
        lm: the model.
        config: the run.
        site: the client; its folder of this run keeps the release, and its secret key stands beside its ledger.
        work: the rows, and what training takes beside them.
        payload: what the server sent.
        number: the round, from 1.

    Returns:
        None where the client has no rows for this stage.

    Raises:
        apiary.core.errors.BudgetSpent: the visit does not fit in the budget; nothing was drawn or charged.
        UserError: the settings cannot keep the guarantee, or the ledger cannot be read.
    """
    runs = mechanism(config, work.rows, number)
    if runs is None:
        return None
    key, run = open_key(site.ledger), site.folder.name
    inputs = (
        digest(payload.model, digits=64),
        _corpus_digest(work.corpus, runs.rates(len(work.corpus), work.new)),
        _config_digest(config),
        _machine(lm, config),
        json.dumps([runs.noise_multiplier, *runs.sampler]),
    )
    request = unanswered(site.folder, number, lambda again: request_digest(key, run, number, *inputs, *again))
    spent = charge_file(site.ledger, runs.event(run, number, request), config.privacy)
    steps = runs.sampler.steps
    plan = PrivateVisit(
        runs,
        work.new,
        SecretNoise(key, "noise", request),
        SecretNoise(key, "rows", request),
        first_step=work.rounds_before * steps,
        total_steps=work.rounds * steps,
        penalties=work.penalties,
        observers=work.observers,
        factors=config.adapter.trained(number),
    )
    make = functools.partial(fit_private, lm, payload.model, work.corpus, config, plan)
    result = released(site.folder, number, request, make)
    # Expected numbers, and so public; only new rows give an update its weight.
    expected = steps * runs.batch_rows
    new = max(1, round(steps * runs.sampler.new * work.rows[runs.sampler.stage]))
    public = result.report._replace(tokens=new, replayed=expected - new, seconds=math.nan)
    return result._replace(report=public), spent


def _corpus_digest(corpus: Corpus, rates: np.ndarray) -> str:
    hasher = hashlib.sha256()
    for part in (corpus.ids, corpus.trained, corpus.offsets, rates):
        for piece in store.pieces(part):
            hasher.update(np.ascontiguousarray(piece).data)
    return hasher.hexdigest()


def _machine(lm: LanguageModel, config: RunConfig) -> str:
    """What decides the last bits of the same sum: another answer to the same request needs noise of its own."""
    threads = config.train.threads or torch.get_num_threads()
    gpu = torch.cuda.get_device_name(lm.device) if lm.device.type == "cuda" else ""
    versions = [importlib.metadata.version(name) for name in ("torch", "transformers", "peft")]
    return json.dumps([lm.digest, str(lm.device), gpu, str(lm.dtype), threads, *versions])


def _config_digest(config: RunConfig) -> str:
    values = {name: part for name, part in json.loads(config.to_json()).items() if name not in _NOT_THE_RUNS}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
