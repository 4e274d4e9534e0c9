"""The server's own update, for methods that hold clients against it: training on a few rows that the server trusts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

from apiary.config.schema import ContinualConfig, CurateConfig, PrivacyConfig, RunConfig
from apiary.config.summary import public_name
from apiary.core.errors import UserError
from apiary.core.messages import Decline, Payload, Update
from apiary.data import examples
from apiary.data.examples import Example
from client.worker import Site, Worker
from strategies.aggregator import ROOT

Train: TypeAlias = Callable[[int, Payload], Update]  # of the round's number and of what clients of full rank receive


def rows(config: RunConfig, held_out: Sequence[Example] = ()) -> tuple[Example, ...]:
    """The rows of `strategy.root`, but for questions that are measured on; none where the key is unset.

    Args:
        config: the run.
        held_out: what the server measures on.

    Raises:
        UserError: the source cannot be read, or nothing of it is left.
    """
    source = config.strategy.root
    if source is None:
        return ()
    asked = {example.turns[:-1] for example in held_out}
    read = examples.read(source, columns=config.data.columns, key="strategy.root").examples
    if kept := tuple(example for example in read if example.turns[:-1] not in asked):
        return kept
    raise UserError(f"strategy.root = {source!r}: all its questions are held out to measure on; name other rows")


def remarks(config: RunConfig) -> list[str]:
    """What is to be known of the root set of a simulation, a line each."""
    if config.strategy.root is None or config.strategy.root != config.data.source:
        return []
    return [
        f"strategy.root = {public_name(config.strategy.root)!r} are the clients' own rows, which a real "
        "server has not: this run does not tell how well a root set of the server's own would serve"
    ]


def trainer(config: RunConfig, held_out: Sequence[Example], folder: Path) -> Train:
    """What makes the server's own update of each round, as a client makes one; its memory is in `folder`.

    The rows are taken as they are, all of them in every round: they are chosen by hand, so nothing is curated and there
    are no stages. Privacy is promised to the rows of clients, and these are the server's.

    Raises:
        UserError: the rows cannot be read, or none of them can be trained on.
    """
    plain = {"curate": CurateConfig(), "continual": ContinualConfig(), "privacy": PrivacyConfig()}
    worker = Worker(config.model_copy(update=plain))
    site = Site(ROOT, rows(config, held_out), (), folder, folder / "ledger.json", config.adapter.rank)
    if not worker.hello(site).tokens:
        raise UserError(f"strategy.root = {config.strategy.root!r}: no row fits prompt.max_tokens and prompt.template")

    def train(number: int, payload: Payload) -> Update:
        visit = worker.train(site, number, payload)
        if isinstance(visit, Decline):
            raise ValueError(f"the server's own rows gave no update in round {number}")
        return visit.update

    return train
