"""The server's own update, for methods that compare clients with it: training on a few rows that the server trusts."""

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
from client.site import Site
from client.worker import Worker
from strategies.aggregator import ROOT

Train: TypeAlias = Callable[[int, Payload], Update]  # of the round's number and of what clients of full rank receive


def rows(config: RunConfig, held_out: Sequence[Example] = ()) -> tuple[Example, ...]:
    """The rows of `strategy.root`, without those whose questions are in the evaluation; none where the key is unset.

    Args:
        config: the run.
        held_out: the server's held-out examples.

    Raises:
        UserError: the source cannot be read, or all its questions are held out.
    """
    source = config.strategy.root
    if source is None:
        return ()
    asked = set(map(_asked, held_out))
    read = examples.read(source, columns=config.data.columns, key="strategy.root").examples
    if kept := tuple(example for example in read if _asked(example) not in asked):
        return kept
    raise UserError(f"strategy.root = {source!r}: all its questions are held out to measure on; name other rows")


def _asked(example: Example) -> tuple[tuple[str, str, object], ...]:
    """What is said before the last answer; of a row without a question all of it, or each would ask the same."""
    before = example.turns[:-1]
    turns = before if any(turn.role != "system" for turn in before) else example.turns
    return tuple((turn.role, turn.text, tuple(call[:2] for call in turn.calls)) for turn in turns)


def remarks(config: RunConfig) -> list[str]:
    """What a user of a simulation should know of its root set, a line each."""
    if config.strategy.root is None or config.strategy.root != config.data.source:
        return []
    return [
        f"strategy.root = {public_name(config.strategy.root)!r} are the clients' own rows, which a real "
        "server has not: this run does not tell how well a root set of the server's own would serve"
    ]


def trainer(config: RunConfig, held_out: Sequence[Example], folder: Path) -> Train:
    """The function that trains the server's own update of each round, just as a client trains its update.

    The rows are taken as they are, all of them in every round: they are chosen by hand, so nothing is curated and there
    are no stages. Privacy is promised to the rows of clients, and these are the server's.

    Args:
        config: the run.
        held_out: the server's held-out examples, whose questions are not trained on.
        folder: where the state is kept that a client keeps between rounds.

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
