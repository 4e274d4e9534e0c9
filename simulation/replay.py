"""A client's visits of a simulated run, made again in a scratch folder for an audit: what a curious server would see.

The visits go through the client's own worker, so curation, training, the privacy mechanism and the codec are those of
the run. Only the other clients are left out: the server's half of the method folds this client's updates alone. Ledger,
key and releases are made in the scratch folder, so nothing is charged to the run's ledger and nothing is released.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import strategies
from apiary.config import schedule
from apiary.config.schema import RunConfig
from apiary.core import lora
from apiary.core.counts import EXACT, CountPolicy
from apiary.core.files import own_folder, write_atomic
from apiary.core.messages import ClientInfo, Decline, Payload, Spent, Update, Visit
from apiary.core.tensors import StateDict, add, generator, subtract
from apiary.data.examples import Example
from apiary.data.federation import ClientData
from apiary.data.turns import Turn
from apiary.models.adapters import LanguageModel
from apiary.models.start import starting_adapter
from apiary.privacy.ledger import Ledger, save_ledger
from apiary.privacy.noise import KEY_FILE
from client import compression
from client.site import Site
from client.worker import Worker
from strategies import Aggregator, ServerState


class Seen(NamedTuple):
    """What the server knows of one visit."""

    number: int  # the round, from 1
    start: StateDict  # the adapter it sent, with what it adds to the base
    change: StateDict  # of the adapter's tensors, CPU float32, as it arrives
    spent: Spent | None  # what the rows have spent with it; None without privacy

    @property
    def end(self) -> StateDict:
        """The adapter that the client ended with, as far as the server can tell."""
        adapter, base_delta = lora.parts(self.start)
        whole = {n: add({n: t}, self.change)[n] if n in self.change else t for n, t in adapter.items()}
        return lora.whole(whole, base_delta)


class Bench(NamedTuple):
    """One client of a run, ready to be audited."""

    config: RunConfig
    lm: LanguageModel
    worker: Worker
    client: ClientData
    rank: int
    counts: CountPolicy = EXACT  # by which it tells its counts, and plans its sampling rate


def site(bench: Bench, rows: Sequence[Example], folder: Path, seed: int) -> Site:
    """A copy of the client that trains on `rows`, with a ledger and a key of its own in `folder`, which must be new.

    The key follows from `seed`, so that an audit can be repeated: it protects nothing that leaves this machine.
    """
    own_folder(folder)
    ledger = folder / "ledger.json"
    save_ledger(ledger, Ledger())
    key = hashlib.sha256(f"audit {seed} {folder.name}".encode()).digest()
    write_atomic(ledger.with_name(KEY_FILE), key, private=True)
    return Site(bench.client.name, tuple(rows), (), folder / "run", ledger, bench.rank, bench.counts)


def blank(example: Example, config: RunConfig) -> Example:
    """The row that stands in a row's place where it is left out: too long, with nothing trained, so it adds nothing.

    How many rows a client has is thereby unchanged, as the privacy mechanism takes that number to be public.
    """
    asked = Turn("user", "x " * (2 * config.prompt.max_tokens))
    return example._replace(turns=(asked, Turn("assistant", "x", trained=False)), tools="")


def visits(bench: Bench, rows: Sequence[Example], rounds: int, folder: Path, seed: int) -> Iterator[Seen]:
    """The visits of rounds 1 to `rounds` of a copy of the client that holds `rows`.

    The first starts from the adapter that the run began with; each later one from what the server makes of the client's
    own updates so far. A round in which the client declines is left out.

    Args:
        bench: the client and its run.
        rows: what the copy trains on, in place of the client's own; as many of them.
        rounds: how many visits.
        folder: a new folder for what the copy keeps.
        seed: of the copy's secret key.

    Raises:
        UserError: the settings cannot keep the guarantee for so many rows.
    """
    config, lm = bench.config, bench.lm
    aggregator = strategies.from_config(config)
    copy = site(bench, rows, folder, seed)
    state = ServerState(0, starting_adapter(lm, config), {}, {})
    last = 0
    for number in range(1, rounds + 1):
        info = ClientInfo(copy.client, bench.rank, last)
        payload = aggregator.payload(state, info)._replace(last_round=last)
        answer = bench.worker.train(copy, number, payload)
        if isinstance(answer, Decline):
            state = state._replace(round=number)
            continue
        update = _arrived(bench, copy, number, payload, answer)
        after = _fold(aggregator, state, update, config, number)
        adapter = lora.parts(payload.model)[0]
        if all(name in adapter and adapter[name].shape == t.shape for name, t in update.delta.items()):
            change: StateDict = update.delta
        else:  # scalars of random directions travel, and what they stand for is what the server makes of them
            change = subtract(after.adapter, state.adapter)
        yield Seen(number, payload.model, change, answer.spent)
        state, last = after, number


def _arrived(bench: Bench, copy: Site, number: int, payload: Payload, answer: Visit) -> Update:
    """The update as the server reads it from the client's message."""
    message = bench.worker.send(copy, number, payload, answer)
    delta = answer.update.delta
    arrived = compression.arrives(compression.up(bench.config, bench.worker.local), message, delta)
    lr_sum = schedule.lr_sum(bench.config, number, answer.report.steps)
    return answer.update._replace(delta=arrived, extra=payload.extra, lr_sum=lr_sum)


def _fold(aggregator: Aggregator, state: ServerState, update: Update, config: RunConfig, number: int) -> ServerState:
    """The server's state after a round in which this client alone answered.

    A method that needs several answers, or one of the server's own, is left aside: the update itself is then added.
    """
    if aggregator.fewest > 1 or aggregator.root or aggregator.judges:
        moved = {n: t for n, t in update.delta.items() if n in state.adapter}
        adapter = {n: add({n: t}, moved)[n] if n in moved else t for n, t in state.adapter.items()}
        return state._replace(round=number, adapter=adapter)
    reduce = aggregator.reduce
    folded = reduce.add(reduce.start(state), update)
    gradient = reduce.finish(state, folded, generator(config.seed, number, "aggregate"))
    return aggregator.step(state, gradient)
