"""`apiary privacy audit`: what a curious server could learn from one client's updates, measured by attacking them.

One replay of the client's visits serves all attacks. Some of its rows are in the copy or not by a fair coin, so rows
that were trained on and rows that were not differ in nothing else; some are replaced by canaries, likewise by a coin;
some by secrets that are planted a stated number of times. The number of rows stays what it was, and with it the
sampling rate, the noise and the claim.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from apiary.config import loading
from apiary.config.schema import Method, RunConfig
from apiary.core.counts import EXACT, ROUNDED, CountPolicy
from apiary.core.errors import RunFailed, UserError
from apiary.core.seeds import derive_seed
from apiary.core.tensors import StateDict
from apiary.data import injection, split, stages
from apiary.data.batches import Corpus, collate
from apiary.data.examples import Example
from apiary.data.federation import ClientData
from apiary.data.split import PUBLIC_KEY
from apiary.data.turns import Turn
from apiary.evaluation import intervals
from apiary.models import adapters
from apiary.models.adapters import pad_id
from apiary.models.inference import ModelProbe
from apiary.models.loss import row_losses, to_device
from apiary.privacy.audit import decoding, exposure, membership, one_run
from apiary.tracking import environment, metrics_file
from client import device_rank
from client.training.dp_sgd import row_gradient
from client.worker import Worker
from simulation import inversion, replay
from simulation.replay import Bench, Seen
from simulation.run import check_names
from strategies.from_config import local_from_config

SCHEMA = 2  # since medians have intervals of their own, and the rate at 1% says of which threshold it is
FILLS = 256  # that a secret is ranked among: 8 bits at most
COPIES = ((1, 4, 32), (1, 4, 16))  # how often secrets are planted; the second where a client has too few rows
BATCHES = ((1, 9), (2, 9), (8, 9))  # rows and trials of the inversion drill
_FEWEST_ROWS = 16  # of a client; with fewer nothing could be told
_SECRETS = 6  # for each number of copies, where there are rows enough: with fewer their median has no interval
_ROOM = 1 << 27  # numbers in the gradients that are held: 512 MiB in float32
_LETTERS = "bcdfghjklmnpqrstvwxz"


class Options(NamedTuple):
    """What a user may choose."""

    client: str | None = None  # None: the one with most rows, whose figures are the surest
    canaries: int = 200  # and as many of the client's own rows, where it has enough
    rounds: int | None = None  # visits that are replayed; None: all of the run
    seed: int = 0


class Plan(NamedTuple):
    """What the audited copy of a client trains on."""

    rows: tuple[Example, ...]  # as many as the client has
    canaries: tuple[Example, ...]
    own: tuple[Example, ...]  # rows of the client's: some by a coin, then held-out ones, which no client trains on
    inside: np.ndarray  # (canaries + own,) bool, whether the copy trains on it
    secrets: tuple[tuple[int, int, tuple[Example, ...]], ...]  # copies, which fill was planted, all fills


class AtSite(NamedTuple):
    """What decides, at a site, which rows it trains on and how they are drawn."""

    data: str  # its rows, a file or a folder
    state: Path | None = None  # its state folder, with the pinned split; None: a site that has pinned none
    counts: CountPolicy = ROUNDED  # as it was told to tell its counts


def open_bench(folder: Path, options: Options, at: AtSite | None = None) -> Bench:
    """A client of a finished simulated run, or a site with the configuration of a deployed run.

    Args:
        folder: of the run.
        options: which client, and how it is audited.
        at: the site; it holds the same rows out as in its runs, and plans its sampling rate with the same number.

    Raises:
        UserError: no such run or client, a deployed run without a site, another pinned split, or too few rows.
    """
    if not (folder / "config.toml").exists():
        raise UserError(f"{str(folder)!r} holds no run (no config.toml); give a run directory")
    config = loading.load(folder / "config.toml")
    if local_from_config(config).mixes:
        raise UserError(
            f"strategy.name = {config.strategy.name!r}: its clients train models that nobody else has, gates and all, "
            "and an audit sees their updates but not these models; audit a run whose clients share what they train"
        )
    key = PUBLIC_KEY
    if at is None:
        if metrics_file.read_metrics(folder).get("sites") is not None:
            raise UserError(
                f"{str(folder)!r} is a deployed run, whose rows are at its sites: run the audit at a site, on a copy "
                "of this folder, with `apiary privacy audit RUN --data ROWS --state STATE`"
            )
    else:
        key = _pinned_key(at, config)
        alone = {"source": at.data, "test": None, "clients": 1, "partition": Method(name="iid")}
        config = config.model_copy(update={"data": config.data.model_copy(update=alone)})
    check_names(config)
    clients = stages.rows_of_run(config, key, whole=at is None).clients
    index = _chosen(clients, options.client)
    if len(clients[index].train) < _FEWEST_ROWS:
        raise UserError(
            f"client {clients[index].name!r} has {len(clients[index].train)} training rows; an audit needs "
            f"{_FEWEST_ROWS} at least"
        )
    if options.rounds is not None and options.rounds > config.rounds:
        raise UserError(f"--rounds = {options.rounds}: the run has {config.rounds}")
    given = config.adapter.ranks
    if given == "memory":
        with tempfile.TemporaryDirectory() as scratch:
            rank = device_rank.of_device(config, Path(scratch))
    else:
        rank = given[index % len(given)] if given else config.adapter.rank
    lm = adapters.load(config.model, config.adapter.of_rank(rank))
    return Bench(config, lm, Worker(config), clients[index], rank, at.counts if at else EXACT)


def _pinned_key(at: AtSite, config: RunConfig) -> bytes:
    """The key by which the site holds rows out; without its state folder the one that anybody knows.

    Raises:
        UserError: the folder holds no split, or one of another fraction.
    """
    if at.state is None:
        return PUBLIC_KEY
    pinned = split.load(at.state)
    if pinned is None:
        raise UserError(
            f"--state {str(at.state)!r} holds no {split.FILE}: give the site's state folder (KIT/state), or leave it "
            "out for rows that have been in no run"
        )
    if pinned.fraction != config.data.test_fraction:
        raise UserError(
            f"data.test_fraction = {config.data.test_fraction:g}: the site has pinned {pinned.fraction:g} since this "
            f"run; give a {split.FILE} of that time, or leave --state out for rows that have been in no run"
        )
    return pinned.key


def _chosen(clients: Sequence[ClientData], name: str | None) -> int:
    if name is None:
        return max(range(len(clients)), key=lambda index: len(clients[index].train))
    names = [client.name for client in clients]
    if name not in names:
        shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        raise UserError(f"--client = {name!r}: the run has no such client; there are {shown}")
    return names.index(name)


def plant(bench: Bench, options: Options) -> Plan:
    """What the audited copy trains on: of the client's rows it keeps a quarter at least.

    At most a quarter each is replaced by canaries, left to a coin, and replaced by secrets.
    """
    train, quarter = bench.client.train, len(bench.client.train) // 4
    rng = np.random.default_rng(derive_seed(options.seed, "audit", bench.client.name))
    places = rng.permutation(len(train)).tolist()
    count = min(options.canaries, quarter)
    rows = list(train)
    canaries = tuple(train[i]._replace(turns=_canary(rng), tools="") for i in places[:count])
    own = tuple(train[i] for i in places[count : 2 * count])
    inside = rng.random(2 * count) < 0.5
    for place, row, stays in zip(places, [*canaries, *own], inside, strict=False):
        rows[place] = row if stays else replay.blank(train[place], bench.config)
    secrets, left = [], places[2 * count :][:quarter]
    enough = [each for each in COPIES if _SECRETS * sum(each) <= quarter]
    times = (*enough, *(each for each in reversed(COPIES) if sum(each) <= quarter), ())[0]
    for copies in times:
        for _ in range(min(_SECRETS, quarter // sum(times))):
            fills, planted = _fills(rng, train[left[0]]), int(rng.integers(FILLS))
            for _ in range(copies):
                place = left.pop()
                rows[place] = fills[planted]._replace(tags=train[place].tags)
            secrets.append((copies, planted, fills))
    held_out = bench.client.test[: options.canaries]
    inside = np.concatenate([inside, np.zeros(len(held_out), bool)])
    return Plan(tuple(rows), canaries, (*own, *held_out), inside, tuple(secrets))


def _word(rng: np.random.Generator) -> str:
    return "".join(rng.choice(list(_LETTERS), 4))


def _canary(rng: np.random.Generator) -> tuple[Turn, Turn]:
    """A row of random letters, whose gradient is like no other row's."""
    asked, answered = (" ".join(_word(rng) for _ in range(4)) for _ in range(2))
    return Turn("user", asked), Turn("assistant", answered)


def _fills(rng: np.random.Generator, like: Example) -> tuple[Example, ...]:
    """All that one secret could have been: a code of six digits for a name, (FILLS,) of the million."""
    name = f"{_word(rng)} {_word(rng)}"
    codes = rng.choice(10**6, FILLS, replace=False)
    asked = Turn("user", f"What is the code of {name}?")
    answers = (Turn("assistant", " ".join(f"{code:06d}")) for code in codes)
    return tuple(like._replace(turns=(asked, answer), tools="") for answer in answers)


def audit(bench: Bench, options: Options = Options(), say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Replay the client's visits, attack them, and return what was found, as `audit.json` holds it.

    Nothing of the run is written, and nothing is charged to its ledger: all that the copy keeps is in a temporary
    folder that goes with the call.

    Raises:
        RunFailed: the client declined every visit, or its training diverged.
        UserError: the settings cannot keep the guarantee for the client's rows.
    """
    began, plan = time.monotonic(), plant(bench, options)
    rounds = options.rounds or bench.config.rounds
    plan = _fitting(bench, plan)
    corpus = _corpus(bench, [*plan.canaries, *plan.own])
    scores: list[np.ndarray] = []
    with tempfile.TemporaryDirectory(prefix="apiary-audit-") as scratch:
        first: Seen | None = None
        last: Seen | None = None
        try:
            for seen in replay.visits(bench, plan.rows, rounds, Path(scratch) / "copy", options.seed):
                say(f"round {seen.number} of {rounds}")
                first, last = first or seen, seen
                scores.append(_decoded(bench, corpus, seen))
        except FloatingPointError as error:
            raise RunFailed(f"the replay diverged: {error}") from None
        if first is None or last is None:
            raise RunFailed(f"client {bench.client.name!r} declined every visit: it has no rows for these rounds")
        say("gradient inversion")
        found = {
            "membership": _membership(bench, plan, (first, last), scores, options.seed),
            "lower_bound": _bound(bench, plan, scores),
            "exposure": _exposure(bench, plan, (first, last)),
            "inversion": _inversion(bench, last, Path(scratch), options.seed),
        }
    return {
        "schema": SCHEMA,
        "client": bench.client.name,
        "rows": len(plan.rows),
        "rounds": len(scores),
        "unit": bench.config.privacy.unit,
        "claim": last.spent and {"first": first.spent and first.spent.epsilon, **last.spent._asdict()},
        **found,
        "seed": options.seed,
        "seconds": round(time.monotonic() - began, 1),
        "machine": environment.machine(gpu=bench.lm.device.type == "cuda"),
    }


def _fitting(bench: Bench, plan: Plan) -> Plan:
    """The plan without targets that are too long to be trained on, which tell nothing."""
    dropped = _corpus(bench, [*plan.canaries, *plan.own]).dropped
    kept = np.array([i not in dropped for i in range(len(plan.inside))], bool)
    count = len(plan.canaries)
    return plan._replace(
        canaries=tuple(row for row, stays in zip(plan.canaries, kept[:count], strict=True) if stays),
        own=tuple(row for row, stays in zip(plan.own, kept[count:], strict=True) if stays),
        inside=plan.inside[kept],
    )


def _corpus(bench: Bench, rows: Sequence[Example]) -> Corpus:
    return injection.encode_training(rows, bench.worker.template, bench.lm.tokenizer, bench.config.prompt)


def _losses(bench: Bench, adapter: StateDict, corpus: Corpus) -> np.ndarray:
    """Nats per response token of each row, (n,)."""
    adapters.set_adapter(bench.lm, adapter)
    nats, tokens = ModelProbe(bench.lm).losses(corpus)
    return np.asarray(nats / np.maximum(tokens, 1))


def _decoded(bench: Bench, corpus: Corpus, seen: Seen) -> np.ndarray:
    """How much of each target's gradient a visit's change holds, (targets,)."""
    gradients, names = _gradients(bench, corpus, seen)
    change = torch.cat([seen.change[name].flatten() for name in names])
    return decoding.weights(gradients, change).numpy()


def _gradients(bench: Bench, corpus: Corpus, seen: Seen) -> tuple[Tensor, list[str]]:
    """Each row's gradient where the visit began, (n, p), and the tensors it is of: as many as there is room for."""
    lm = bench.lm
    adapters.set_adapter(lm, seen.start)
    with adapters.training(lm, bench.config.adapter.trained(seen.number)) as moving:
        names: list[str] = []
        numbers = 0
        for name, parameter in moving.adapter.items():
            if name in seen.change and (not names or numbers + parameter.numel() <= _ROOM // len(corpus)):
                names, numbers = [*names, name], numbers + parameter.numel()
        made = torch.zeros(len(corpus), numbers)
        for row in range(len(corpus)):
            batch = to_device(collate(corpus, np.array([row]), pad_id(lm.tokenizer)), lm.device)
            gradient, _ = row_gradient(moving, row_losses, batch)
            if all(name in gradient for name in names):
                made[row] = torch.cat([gradient[name].float().flatten() for name in names]).cpu()
    return made, names


def _membership(
    bench: Bench, plan: Plan, ends: tuple[Seen, Seen], scores: Sequence[np.ndarray], seed: int
) -> list[dict[str, Any]]:
    """Both attacks on the client's own rows, after the first update and after all of them."""
    corpus, skipped = _corpus(bench, plan.own), len(plan.canaries)
    inside, before = plan.inside[skipped:], _losses(bench, ends[0].start, corpus)
    found = []
    for visits, seen in {1: ends[0], len(scores): ends[1]}.items():
        by_update = np.sum(scores[:visits], axis=0)[skipped:]
        for attack, score in (("loss", before - _losses(bench, seen.end, corpus)), ("update", by_update)):
            made = membership.membership(score[inside], score[~inside], seed)
            figures = {"auc": made.auc and made.auc._asdict(), **_at_one_per_cent(made)}
            found.append(
                {"attack": attack, "updates": visits, "members": made.members, "others": made.others, **figures}
            )
    return found


def _at_one_per_cent(made: membership.Membership) -> dict[str, Any]:
    """The share of members above the threshold, and the share of all rows like the others that it would let through.

    The first interval is of this threshold. The threshold itself comes from few rows, and what it lets through is
    known no better than the second says.
    """
    if made.found is None:
        return {"true_positives": None, "false_positives": None}
    passed = membership.allowed(made.others)
    return {
        "true_positives": _value(made.found / made.members, intervals.of_rate(made.found, made.members)),
        "false_positives": _value(passed / made.others, intervals.of_exceedance(passed + 1, made.others)),
    }


def _value(value: float, ends: intervals.Ends | None) -> dict[str, float | None]:
    """A figure with its 95% interval, if there is one."""
    low, high = ends or (None, None)
    return {"value": value, "low": low, "high": high}


def _bound(bench: Bench, plan: Plan, scores: Sequence[np.ndarray]) -> dict[str, Any]:
    count = len(plan.canaries)
    canaries = np.sum(scores, axis=0)[:count]
    return one_run.lower_bound(canaries, plan.inside[:count], bench.config.privacy.delta)._asdict()


def _exposure(bench: Bench, plan: Plan, ends: tuple[Seen, Seen]) -> list[dict[str, Any]]:
    """The exposure of the secrets by how often they were planted; empty where the client has too few rows for any."""
    bits: dict[int, list[float]] = {}
    for copies, planted, fills in plan.secrets:
        corpus = _corpus(bench, fills)
        fell = _losses(bench, ends[1].end, corpus) - _losses(bench, ends[0].start, corpus)
        bits.setdefault(copies, []).append(exposure.exposure(fell, planted))
    made = [exposure.summed_up(copies, each, FILLS) for copies, each in bits.items()]
    return [{**each._asdict(), "median": _value(each.median, intervals.of_median(each.bits))} for each in made]


def _inversion(bench: Bench, last: Seen, scratch: Path, seed: int) -> list[dict[str, Any]]:
    """Token recovery by batch size; empty where the attack has nothing to go by."""
    noise = last.spent.noise_multiplier if last.spent else None
    found = []
    for rows, pairs in inversion.drill(bench, last.end, noise, BATCHES, scratch / "drill", seed).items():
        recovered, chance = np.array(pairs).T
        value = _value(float(np.median(recovered)), intervals.of_median(recovered))
        found.append({"rows": rows, "trials": len(pairs), "recovered": value, "chance": float(np.median(chance))})
    return found
