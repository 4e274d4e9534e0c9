"""What federated tuning is held against: each client training alone, and all data pooled.

All use the clients' own trainer with the rows, steps, learning rates, rank and factors that the clients had
(`simulation.visits`), without what ties a client to a server: penalties on its adapter, corrections of its gradients.
`local` is each client alone, in as many steps as it made in the federation. `central` is all rows pooled, in as many
steps as all clients made together. A federation cannot make so many steps one after the other, for its clients train at
the same time; `central_serial` pools the rows too, but makes as many steps as the client with the most in each round,
each of them on as many batches as all clients together.

Where no baseline can be alike, `unlike` says why.
"""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from safetensors.torch import load_file

from apiary.config.schema import RunConfig, TrainConfig
from apiary.core.files import write_atomic
from apiary.core.messages import ClientInfo, Payload
from apiary.core.tensors import StateDict, add
from apiary.data import injection, store
from apiary.data.batches import Corpus
from apiary.data.examples import Example
from apiary.data.tokenization import Template
from apiary.models import adapter_files, adapters
from apiary.models.adapters import LanguageModel
from apiary.models.start import starting_adapter
from apiary.tracking.event_log import RunLog
from apiary.tracking.run_directory import result_folders
from client.training import trainer, zeroth_order
from client.training.trainer import Cursor, FitResult, VisitPlan
from client.worker import open_received
from simulation import shared_baselines
from simulation.visits import ClientVisits
from strategies import ServerState
from strategies.from_config import method_from_config
from strategies.local import PLAIN, LocalAlgorithm, Opened

POOLED = ("central", "central_serial")  # methods that train on all clients' rows at once
_ACCOUNT = "fit.json"  # beside a baseline's adapter
_POOL = "central"  # the client of pooled training: all of it goes through the same batches in the same order


class Account(NamedTuple):
    """What the fits of a baseline told of themselves, added up."""

    steps: int  # optimizer steps
    rows: int  # training rows that its batches were drawn from; where these changed, the most at a time
    examples: int  # rows trained, each as often as it was
    tokens: int  # response tokens trained, likewise
    loss: float  # mean nats per trained token
    seconds: float


class Trained(NamedTuple):
    """A baseline."""

    adapter: StateDict
    account: Account


class Baselines(NamedTuple):
    """What the federated adapter is held against, all of its rank; what is not configured is not there."""

    alone: dict[str, Trained]  # by client
    pooled: dict[str, Trained]  # by method


class Part(NamedTuple):
    """Steps one after the other on the same rows and factors."""

    rows: Sequence[Example]
    factors: Literal["both", "b", "a"]
    steps: int


class Work(NamedTuple):
    """One baseline to be trained."""

    method: str
    client: str  # that its randomness follows from
    rank: int
    parts: tuple[Part, ...]
    width: int  # batches of a step, in those of a client's step
    folder: Path


def train_all(
    config: RunConfig,
    lm: LanguageModel,
    template: Template,
    clients: Sequence[ClientVisits],
    finished: int,
    folder: Path,
    log: RunLog,
    shared: Path | None = None,
) -> Baselines:
    """Train the configured baselines.

    Each finished one is kept as a PEFT folder with the account of its fits, and a resumed run takes it from there.
    Where runs share a folder, one that an alike run has trained is taken from that (`simulation.shared_baselines`).

    Args:
        config: the run.
        lm: the base with an adapter of the server's rank.
        template: how examples become tokens.
        clients: what the clients did in the federation.
        finished: rounds that it made; where it stopped early, so does the schedule of the learning rate.
        folder: the run directory.
        log: receives `baseline` events.
        shared: where runs share their baselines; None where they do not.
    """
    work = plan(config, clients, folder)
    made, batches = Baselines({}, {}), 0
    most = sum(map(_batches, work))
    for done, item in enumerate(work, 1):
        began = time.monotonic()
        own = adapters.load(config.model, what_it_reads(config).adapter.of_rank(item.rank))
        total = round(sum(part.steps for part in item.parts) * config.rounds / finished)
        known = _kept(item.folder)
        if known is None and shared is not None:
            train = functools.partial(_train, own, config, template, item, total)
            shared_baselines.fetch(shared, key(own, config, template, item, total), item.folder, train)
            known = _kept(item.folder)
        trained = known or _train(own, config, template, item, total)
        wide = trained._replace(adapter=adapter_files.widened(lm, trained.adapter))
        if item.method in POOLED:
            made.pooled[item.method] = wide
        else:
            made.alone[item.client] = wide
        seconds, batches = time.monotonic() - began, batches + _batches(item)
        fields = {"done": done, "total": len(work), "share": batches / most, "seconds": seconds}
        log.event("baseline", method=item.method, name=item.folder.name, **fields)
    return made


def plan(config: RunConfig, clients: Sequence[ClientVisits], folder: Path) -> list[Work]:
    """The baselines that a run is to train, in the order in which it does."""
    places, asked = result_folders(folder), config.evaluate.baselines
    work = []
    if "local" in asked:
        for one in clients:
            parts = _parts([one], config, sum)
            work.append(Work("local", one.client, one.rank, parts, 1, places.alone / one.client))
    if not clients:
        return work
    ranks = {client.rank for client in clients}
    rank = ranks.pop() if len(ranks) == 1 else config.adapter.rank
    if "central" in asked:
        work.append(Work("central", _POOL, rank, _parts(clients, config, sum), 1, places.central))
    if "central_serial" in asked:
        parts = _parts(clients, config, max)
        serial, total = sum(part.steps for part in parts), sum(client.total for client in clients)
        width = max(1, round(total / serial))
        work.append(Work("central_serial", _POOL, rank, parts, width, places.central_serial))
    return work


def _batches(item: Work) -> int:
    """How much work a baseline is; 1 at least."""
    return max(1, item.width * sum(part.steps for part in item.parts))


def unlike(config: RunConfig, clients: Sequence[ClientVisits]) -> dict[str, dict[str, str]]:
    """Why a baseline is no fair comparison, by method: of each reason a key and what the baseline did.

    What is not there is alike: the same rows, learning rates, ranks and factors as the clients had.
    """
    shared: dict[str, str] = {}
    if config.privacy.unit != "none":
        shared["noise"] = "went without the noise of differential privacy"
    if config.continual.stages:
        shared["stages"] = "saw the tasks of all stages at once"
    if lost := [client.client for client in clients if not client.known]:
        shared["rows"] = f"used rows that {lost[0]} did not choose: its choice is no longer on its disk"
    ranks = [client.rank for client in clients]
    prunes = method_from_config(config).prunes
    alone = {"rank": "kept its rank, where clients lower theirs as they train"} if prunes else {}
    pooled = dict(alone)
    if len(set(ranks)) > 1:
        pooled["rank"] = f"used rank {config.adapter.rank}, where clients have ranks from {min(ranks)} to {max(ranks)}"
    found = {"local": {**shared, **alone}, **{method: {**shared, **pooled} for method in POOLED}}
    return {method: reasons for method, reasons in found.items() if reasons}


def _parts(
    clients: Sequence[ClientVisits], config: RunConfig, count: Callable[[Sequence[int]], int]
) -> tuple[Part, ...]:
    """The steps of these clients together, cut where their rows or the factors that they train change.

    Args:
        clients: whose rows and rounds.
        config: the run.
        count: makes of the clients' steps in a round those of the baseline.
    """
    parts: list[Part] = []
    held: object = None
    for number in sorted({number for client in clients for number in client.steps}):
        choices = [client.choice(number) for client in clients]
        factors = config.adapter.trained(number)
        steps = count([client.steps[number] for client in clients if number in client.steps])
        if held == (choices, factors):
            parts[-1] = parts[-1]._replace(steps=parts[-1].steps + steps)
            continue
        held = (choices, factors)
        rows = store.joined([client.choices[made] for client, made in zip(clients, choices, strict=True)])
        parts.append(Part(rows, factors, steps))
    return tuple(parts)


def _kept(folder: Path) -> Trained | None:
    """The baseline that an interrupted run has finished before; None where it has not, or without its account."""
    weights, account = folder / "adapter_model.safetensors", folder / _ACCOUNT
    if not (weights.exists() and account.exists()):
        return None
    return Trained(load_file(weights), Account(**json.loads(account.read_text(encoding="utf-8"))))


def what_it_reads(config: RunConfig) -> RunConfig:
    """The configuration with all that the training of a baseline does not read at its default.

    Baselines are trained with this one, so that two runs whose narrowed configurations are equal cannot differ in it;
    whatever else that training is to read must be kept here. How many steps they make, on which rows and with which
    factors, stands in their `Work`.
    """
    if method_from_config(config).local.gradient_free:  # its steps are the method's own, which may read anything
        return config
    train = config.train.model_copy(update={"penalties": (), "steps": 1, "epochs": None})
    adapter = config.adapter.model_copy(update={"ranks": (), "train": "both", "share": "both"})
    return RunConfig(seed=config.seed, model=config.model, adapter=adapter, prompt=config.prompt, train=train)


def key(lm: LanguageModel, config: RunConfig, template: Template, work: Work, total: int) -> str:
    """Hex digits that are equal only where training a baseline anew would give the same adapter, bit for bit.

    They are of everything that `_train` reads: base, template, narrowed configuration, rows, steps and factors; and of
    what sums depend on, which are torch's version, its number of threads and the device.
    """
    read = hashlib.sha256()
    parts = [(part.factors, part.steps, len(part.rows)) for part in work.parts]
    settings = what_it_reads(config).to_json()
    machine = (torch.__version__, config.train.threads or torch.get_num_threads(), str(lm.device), str(lm.dtype))
    read.update(repr((lm.digest, template.digest, settings, machine)).encode())
    read.update(repr((work.client, work.rank, work.width, total, parts)).encode())
    for part in work.parts:
        for row in part.rows:
            read.update(repr(row).encode("utf-8", "surrogatepass"))
    return read.hexdigest()


def _train(lm: LanguageModel, config: RunConfig, template: Template, work: Work, total: int) -> Trained:
    """Train a baseline, part by part as a client goes on from visit to visit, and keep it in its folder.

    Args:
        lm: the base with an adapter of its rank.
        config: the run.
        template: how examples become tokens.
        work: what is trained.
        total: steps of the whole schedule of the learning rate.
    """
    config = what_it_reads(config)
    local, payload = _begin(lm, config, work)
    train = config.train.model_copy(update={"accumulate": config.train.accumulate * work.width})
    results, cursor, first = list[FitResult](), Cursor(), 0
    for number, part in enumerate(work.parts):
        if number and part.rows != work.parts[number - 1].rows:  # other rows: their epochs begin anew, as a client's do
            cursor = Cursor(cursor.epoch + 1)
        corpus = injection.encode_training(part.rows, template, lm.tokenizer, config.prompt)
        visit = VisitPlan(
            seed=config.seed,
            client=work.client,
            steps=part.steps,
            total_steps=total,
            first_step=first,
            cursor=cursor,
            factors=part.factors,
        )
        result = _fit(lm, open_received(lm, config, local, {}, payload), corpus, train, visit)
        results, cursor, first = [*results, result], result.cursor, first + part.steps
        payload = payload._replace(adapter=add(payload.adapter, result.delta))
    adapter = open_received(lm, config, local, {}, payload).adapter
    account = _account(results)
    adapter_files.save_adapter(lm, adapter, work.folder)
    write_atomic(work.folder / _ACCOUNT, json.dumps(account._asdict()) + "\n")
    return Trained(adapter, account)


def _begin(lm: LanguageModel, config: RunConfig, work: Work) -> tuple[LocalAlgorithm, Payload]:
    """What a baseline starts from, and the part of the run's method that makes its steps, if it is not the trainer."""
    method, start = method_from_config(config), starting_adapter(lm, config)
    if not method.local.gradient_free:
        return PLAIN, Payload(start, {})
    return method.local, method.payload(ServerState(0, start, {}, {}), ClientInfo(work.client, work.rank, 0))


def _fit(lm: LanguageModel, opened: Opened, corpus: Corpus, train: TrainConfig, visit: VisitPlan) -> FitResult:
    if opened.hooks.descend:
        return zeroth_order.fit(lm, opened.adapter, corpus, train, visit, opened.hooks.descend)
    return trainer.fit(lm, opened.adapter, corpus, train, visit)


def _account(results: Sequence[FitResult]) -> Account:
    reports = [result.report for result in results]
    tokens = sum(report.tokens for report in reports)
    return Account(
        steps=sum(report.steps for report in reports),
        rows=max(result.rows for result in results),
        examples=sum(report.examples for report in reports),
        tokens=tokens,
        loss=sum(report.loss * report.tokens for report in reports) / max(tokens, 1),
        seconds=sum(report.seconds for report in reports),
    )
