"""The clients of a run with their rows, and what of them is held out."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from apiary.config.schema import DataConfig, RunConfig
from apiary.core.errors import UserError
from apiary.data import splits, store
from apiary.data.examples import (
    Example,
    FileReport,
    Source,
    answer,
    read,
    take_out,
)
from apiary.data.partitions import PARTITIONS, Table
from apiary.data.split import PUBLIC_KEY
from apiary.data.turns import opening_text

IN_HELD_OUT = "also in the held-out set"
FEWEST = 5  # held-out rows; of fewer a client tells no loss, for the sum would say too much of each


class ClientData(NamedTuple):
    """One client's rows: to train on, and its own held-out ones."""

    name: str
    train: Sequence[Example]
    test: Sequence[Example]
    validation: Sequence[Example] = ()  # neither trained nor reported: by them it chooses its own model


class Federation(NamedTuple):
    """All clients' rows, and the held-out set that the server measures on; what was read to make them."""

    clients: tuple[ClientData, ...]
    test: Sequence[Example]
    reports: tuple[FileReport, ...]
    sources: tuple[Source, ...] = ()


def untrained(test: Sequence[Example], validation: Sequence[Example]) -> Sequence[Example]:
    """The rows of a client that nothing is trained on; held-out ones stay where they lie if there are no others."""
    return (*test, *validation) if validation else test


def is_held_out(example: Example, fraction: float, key: bytes = PUBLIC_KEY) -> bool:
    """Whether a row belongs to the held-out `fraction`, decided by its first question alone.

    The turns up to the first user turn (case, white space and Unicode form aside) are hashed with blake2b under
    `key`, so equal questions, and longer and shorter conversations that begin alike, fall on the same side. Under
    one key that is the same side at every client; who does not have the key cannot tell which.
    """
    return int.from_bytes(_question_digest(example, key)[:8], "big") < fraction * 2.0**64


def decides(example: Example) -> bool:
    """Whether a held-out row is in the half that decides which round or run is best, and not in that of the figures.

    By a hash of the question that needs no key, so equal questions are in the same half at every site.
    """
    return _question_digest(example)[-1] < 128


def deciding_of(rows: Sequence[Example]) -> Sequence[Example]:
    """Those of held-out rows that decide which round is best."""
    return store.pick(rows, _where(map(decides, rows)))


def set_deciding_apart(federation: Federation, config: RunConfig) -> tuple[Federation, Sequence[Example]]:
    """Set the held-out rows that decide apart from those of the figures.

    They decide when a run stops (`evaluate.patience`), or which of several runs is best (`evaluate.set_apart`). Without
    both there are none: figures are on all held-out rows.

    Returns:
        The federation with only the held-out rows of the figures, those of the clients and those of the table; and the
        rows by which the server decides, empty where only its clients do, each by its own (`decides`).
    """
    by_clients = bool(config.evaluate.patience) and config.scores_from_clients
    by_server = config.evaluate.set_apart or (bool(config.evaluate.patience) and not by_clients)
    if not (by_clients or by_server):
        return federation, ()
    deciding = deciding_of(federation.test) if by_server else ()
    own = (row for client in federation.clients for row in client.test if decides(row)) if by_clients else ()
    known = {_question_digest(row) for row in itertools.chain(deciding, own)}

    def apart(rows: Sequence[Example]) -> Sequence[Example]:
        return store.pick(rows, _where(_question_digest(row) not in known for row in rows))

    clients = tuple(client._replace(test=apart(client.test)) for client in federation.clients)
    figures = federation._replace(clients=clients, test=apart(federation.test))
    return figures, deciding


def validates(example: Example, fraction: float, seed: int, key: bytes = PUBLIC_KEY) -> bool:
    """Whether a training row belongs to the `fraction` by which its client chooses its own model.

    By a hash of the first question under `key`, independent of those that hold rows out: no row's part depends on
    another row, and equal questions are in the same part. In a simulation, whose key everybody knows, the hash is
    seeded. Under a site's own key the seed has no say: it is the server's, and which rows count is the site's choice.
    """
    salt = seed if key == PUBLIC_KEY else 0
    digest = hashlib.blake2b(
        opening_text(example.turns).encode("utf-8"),
        digest_size=8,
        key=key,
        salt=salt.to_bytes(16, "little"),
        person=b"validation",
    ).digest()
    return int.from_bytes(digest, "big") < fraction * 2.0**64


def set_validation_apart(
    federation: Federation, config: RunConfig, key: bytes = PUBLIC_KEY, *, whole: bool = True
) -> Federation:
    """Take the rows by which clients choose their own models out of their training rows, for the whole run.

    Nothing changes where the run makes no such models.

    Args:
        federation: all rows.
        config: the run.
        key: of the hash; a site's own.
        whole: these are all clients; False for one site of several.

    Raises:
        UserError: a client is left without a training row; not of one site of several, where an error would tell the
            server how few questions it has.
    """
    personal = config.personal
    if not personal.enabled:
        return federation
    clients = []
    for client in federation.clients:
        apart = np.fromiter((validates(row, personal.validation, config.seed, key) for row in client.train), bool)
        if whole and len(apart) and apart.all():
            raise UserError(
                f"personal.validation = {personal.validation:g}: client {client.name!r} has no training row left of "
                f"{len(apart)}; lower it, or give the client more rows with different questions"
            )
        train, validation = (store.pick(client.train, np.flatnonzero(part)) for part in (~apart, apart))
        clients.append(client._replace(train=train, validation=validation))
    return federation._replace(clients=tuple(clients))


def undecided(federation: Federation, config: RunConfig) -> list[str]:
    """A line that says so where a simulation sets rows apart, but has too few to decide by or to measure on."""
    patience, set_apart = config.evaluate.patience, config.evaluate.set_apart
    if not (patience or set_apart) or not federation.test:
        return []
    figures, deciding = set_deciding_apart(federation, config)
    key, none = (f"evaluate.patience = {patience}", "0") if patience else ("evaluate.set_apart = true", "false")
    start = f"{key}: half of the held-out rows decide, the others are for the figures, and"
    fix = f"raise data.test_fraction, or set {none}"
    if patience and config.scores_from_clients:
        most = max(sum(map(decides, client.test)) for client in federation.clients)
        if most < FEWEST:
            return [f"{start} no client has {FEWEST} to decide by (the most is {most}); {fix}"]
    if not deciding and (set_apart or not config.scores_from_clients):
        return [f"{start} none is left to decide by; {fix}"]
    return [] if figures.test else [f"{start} none is left for the figures; {fix}"]


def _where(wanted: Iterable[bool]) -> store.Indices:
    """The places of what is wanted."""
    return np.flatnonzero(np.fromiter(wanted, bool))


def _question_digest(example: Example, key: bytes = PUBLIC_KEY) -> bytes:
    return hashlib.blake2b(opening_text(example.turns).encode("utf-8"), digest_size=16, key=key).digest()


def federate(config: DataConfig, seed: int, key: bytes = PUBLIC_KEY, *, guess: bool = True) -> Federation:
    """The clients' rows and the shared held-out set.

    The held-out set is `data.test`, or the source's own test part, or else all clients' held-out
    rows. No prompt of it stands in any client's training rows: where a separate set overlaps the
    source, those rows are taken out and counted.

    Args:
        config: where the rows are, and how they are spread and held out.
        seed: of the partition.
        key: of the hash that holds rows out: that of a simulation, where anybody may know it, or a site's own.
        guess: read text that is not UTF-8 by a guess, which all rows of a file decide together: not under record-level
            privacy, where no row may decide about another.

    Raises:
        UserError: unreadable source, impossible partition, or a client left without a row.
    """
    source = read(
        config.source,
        split=config.split,
        columns=config.columns,
        max_rows=config.max_rows,
        query=config.query,
        guess=guess,
    )
    sources = [source]
    apart, reports = source.test, source.reports
    if config.test is not None:
        extra = read(config.test, split="test", columns=config.columns, key="data.test")
        apart = extra.examples if extra.test is None else extra.test
        reports = (*reports, *extra.reports)
        sources.append(extra)
    known = {_question_digest(example) for example in apart or ()}
    # Of each row: 0 where it is trained, 1 where it is held out, 2 where it leaks from the held-out set.
    parts = np.fromiter((_part_of(example, config, key, known) for example in source.examples), np.int8)
    reports = take_out(reports, store.pick(source.places, np.flatnonzero(parts == 2)), IN_HELD_OUT)
    if apart is None:
        apart = store.pick(source.examples, np.flatnonzero(parts == 1))
    return Federation(_clients(source, config, seed, parts), apart, reports, tuple(sources))


def _part_of(example: Example, config: DataConfig, key: bytes, known: Set[bytes]) -> int:
    if is_held_out(example, config.test_fraction, key):
        return 1
    return 2 if known and _question_digest(example) in known else 0


def _clients(source: Source, config: DataConfig, seed: int, parts: NDArray[np.int8]) -> tuple[ClientData, ...]:
    spread: Callable[..., Sequence[store.Indices]] = PARTITIONS.build(config.partition.name, config.partition.options)
    shares = [np.asarray(share, np.int64) for share in spread(_table(source, config), config.clients, seed)]
    width = max(2, len(str(len(shares) - 1)))
    clients = []
    for number, share in enumerate(shares):
        natural = config.partition.name == "natural"
        client = ClientData(
            source.origins[share[0]] if natural else f"client-{number:0{width}d}",
            store.pick(source.examples, share[parts[share] == 0]),
            store.pick(source.examples, share[parts[share] == 1]),
        )
        if not client.train:
            fix = splits.same_opening(store.pick(source.examples, share)) or (
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
    return Table(source.origins, _Columns(source.examples, config.columns.get("output")))


class _Columns(Mapping[str, list[str | None]]):
    """The columns of rows, each made when it is asked for, its equal values once.

    Args:
        examples: the rows.
        label: the column that is the answer, which may be a class label; None for none.
    """

    def __init__(self, examples: Sequence[Example], label: str | None) -> None:
        self._examples, self._label = examples, label

    def __getitem__(self, name: str) -> list[str | None]:
        values: dict[str, str] = {}
        if name == self._label:
            return [values.setdefault(value, value) for value in map(answer, self._examples)]
        if name not in self._names:
            raise KeyError(name)
        found = (example.tags.get(name) for example in self._examples)
        return [None if value is None else values.setdefault(value, value) for value in found]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    @cached_property
    def _names(self) -> dict[str, None]:
        names = dict.fromkeys(name for example in self._examples for name in example.tags)
        return names | ({self._label: None} if self._label else {})
