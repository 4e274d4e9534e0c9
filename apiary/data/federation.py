"""The clients of a run with their rows, and what of them is held out."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from apiary.config.schema import DataConfig, RunConfig
from apiary.core.errors import UserError
from apiary.data import splits
from apiary.data.examples import (
    Example,
    FileReport,
    Source,
    answer,
    read,
    take_out,
)
from apiary.data.partitions import PARTITIONS, Table

IN_HELD_OUT = "also in the held-out set"


class ClientData(NamedTuple):
    """One client's rows: to train on, and its own held-out ones."""

    name: str
    train: tuple[Example, ...]
    test: tuple[Example, ...]


class Federation(NamedTuple):
    """All clients' rows, and the held-out set that the server measures on."""

    clients: tuple[ClientData, ...]
    test: tuple[Example, ...]
    reports: tuple[FileReport, ...]


def is_held_out(example: Example, fraction: float) -> bool:
    """Whether a row belongs to the held-out `fraction`, decided by its first question alone.

    The turns up to the first user turn (case, white space and Unicode form aside) are hashed with blake2b, so equal
    questions, and longer and shorter conversations that begin alike, fall on the same side at every site without a word
    between the sites.
    """
    return int.from_bytes(_question_digest(example)[:8], "big") < fraction * 2.0**64


def _question_digest(example: Example) -> bytes:
    first = next(i for i, turn in enumerate(example.turns) if turn.role == "user") + 1
    parts = (f"{role}\x1f{' '.join(text.split())}" for role, text in example.turns[:first])
    text = unicodedata.normalize("NFC", "\x1e".join(parts)).casefold()
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()


def federate(config: DataConfig, seed: int) -> Federation:
    """The clients' rows and the shared held-out set.

    The held-out set is `data.test`, or the source's own test part, or else all clients' held-out
    rows. No prompt of it stands in any client's training rows: where a separate set overlaps the
    source, those rows are taken out and counted.

    Raises:
        UserError: unreadable source, impossible partition, or a client left without a row.
    """
    source = read(config.source, split=config.split, columns=config.columns, max_rows=config.max_rows)
    apart, reports = source.test, source.reports
    if config.test is not None:
        extra = read(config.test, split="test", columns=config.columns, key="data.test")
        apart = extra.examples if extra.test is None else extra.test
        reports = (*reports, *extra.reports)
    held_out = [is_held_out(example, config.test_fraction) for example in source.examples]
    known = {_question_digest(example) for example in apart or ()}
    leaked = [
        not held and bool(known) and _question_digest(example) in known
        for held, example in zip(held_out, source.examples, strict=True)
    ]
    reports = take_out(
        reports,
        (place for place, leaks in zip(source.places, leaked, strict=True) if leaks),
        IN_HELD_OUT,
    )
    if apart is None:
        apart = tuple(example for held, example in zip(held_out, source.examples, strict=True) if held)
    trained = [not held and not leaks for held, leaks in zip(held_out, leaked, strict=True)]
    return Federation(_clients(source, config, seed, held_out, trained), apart, reports)


def _clients(
    source: Source, config: DataConfig, seed: int, held_out: Sequence[bool], trained: Sequence[bool]
) -> tuple[ClientData, ...]:
    spread: Callable[..., Sequence[Iterable[int]]] = PARTITIONS.build(config.partition.name, config.partition.options)
    shares = [[int(i) for i in share] for share in spread(_table(source, config), config.clients, seed)]
    width = max(2, len(str(len(shares) - 1)))
    clients = []
    for number, share in enumerate(shares):
        natural = config.partition.name == "natural"
        client = ClientData(
            source.origins[share[0]] if natural else f"client-{number:0{width}d}",
            tuple(source.examples[i] for i in share if trained[i]),
            tuple(source.examples[i] for i in share if held_out[i]),
        )
        if not client.train:
            fix = splits.same_opening([source.examples[i] for i in share]) or (
                "lower data.test_fraction, or put more rows in its file"
                if natural
                else "lower data.clients or data.test_fraction, or give it more rows (dirichlet: min_rows)"
            )
            raise UserError(
                f"client {client.name!r} has no training row left of {len(share)} (the others are held out); {fix}"
            )
        clients.append(client)
    return tuple(clients)


def too_few_clients(config: RunConfig, clients: int) -> list[str]:
    """A line that says so where a round needs more clients than there are, and what helps."""
    minimum = config.strategy.min_clients
    if minimum <= clients:
        return []
    there = "there is 1 client" if clients == 1 else f"there are {clients} clients"
    if config.data.partition.name != "natural":
        return [f"strategy.min_clients = {minimum}: {there}; lower it or raise data.clients"]
    fix = (
        "lower it, or put more files into data.source"
        if clients > 1
        else 'let data.source be a folder with a file for each client, or set data.partition = "iid"'
    )
    return [f'strategy.min_clients = {minimum}: {there}, for data.partition = "natural" makes one of each file; {fix}']


def _table(source: Source, config: DataConfig) -> Table:
    names = dict.fromkeys(name for example in source.examples for name in example.tags)
    columns: dict[str, list[str | None]] = {
        name: [example.tags.get(name) for example in source.examples] for name in names
    }
    if label := config.columns.get("output"):  # a class label is both the answer and a column to partition by
        columns[label] = [answer(example) for example in source.examples]
    return Table(source.origins, columns)
