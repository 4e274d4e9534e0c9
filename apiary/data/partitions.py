"""How rows are spread over clients: builders of partitions, on the partitioners of flwr-datasets.

A partition takes the rows' columns, a number of clients and a seed, and gives one array of row
indices per client, ascending, with every row in exactly one of them. Where a partitioner of
flwr-datasets would lose rows, write to the terminal or fail with a bare message, that is put right
here.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from pydantic import Field

from apiary.config.registry import Registry
from apiary.core.errors import UserError
from apiary.core.seeds import derive_seed
from apiary.data import partitioning
from apiary.data.partitioning import Question

Indices: TypeAlias = npt.NDArray[np.int64]


class Table(NamedTuple):
    """What a partition sees of n rows: the file of each, and their columns (None: no value)."""

    origins: Sequence[str]
    columns: Mapping[str, Sequence[str | None]]


Partition: TypeAlias = Callable[[Table, int, int], list[Indices]]
PARTITIONS: Registry[Partition] = Registry("data.partition")

_DRAWS = 5  # seeds tried before a partition that depends on luck is given up
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Count = Annotated[int, Field(ge=1)]


@PARTITIONS.register("iid")
def iid() -> Partition:
    """Equal shares of the shuffled rows: sizes differ by at most one."""

    def spread(table: Table, clients: int, seed: int) -> list[Indices]:
        _enough(table, clients)
        return [np.sort(share) for share in np.array_split(_order(table, seed), clients)]

    return spread


@PARTITIONS.register("dirichlet")
def dirichlet(alpha: _Positive, by: str, min_rows: _Count = 10) -> Partition:
    """Each value of column `by` is split over the clients in proportions from Dirichlet(alpha).

    Small alpha: few clients hold most of a value; large alpha: nearly iid. Draws that leave a
    client with fewer than `min_rows` rows are repeated. Hsu, Qi and Brown (2019), arXiv:1909.06335.
    """

    def spread(table: Table, clients: int, seed: int) -> list[Indices]:
        order, codes = _order(table, seed), _codes(table, by)[0]
        _enough(table, clients)
        if clients * min_rows > len(order):
            raise UserError(
                f"data.partition.min_rows = {min_rows}: {clients} clients would need "
                f"{clients * min_rows} rows, the data has {len(order)}; lower min_rows or "
                "data.clients"
            )
        seeds = (derive_seed(seed, "dirichlet", draw) for draw in range(_DRAWS))
        attempts = [("DirichletPartitioner", (clients, "code", alpha, min_rows, False, False, s)) for s in seeds]
        shares = partitioning.shares(Question(attempts, order, codes))
        if shares is not None:
            return shares
        raise UserError(
            f"data.partition: no dirichlet draw with alpha = {alpha:g} gave each of {clients} "
            f"clients min_rows = {min_rows} of the {len(order)} rows; raise alpha, or lower "
            "min_rows or data.clients"
        )

    return spread


@PARTITIONS.register("by_value")
def by_value(by: str) -> Partition:
    """Rows with the same value of column `by` stay together.

    One value per client where there are as many values as clients; where there are more, the
    values are dealt out, largest first, each to the client with the fewest rows so far.
    """

    def spread(table: Table, clients: int, seed: int) -> list[Indices]:
        codes, values = _codes(table, by)
        _enough(table, clients)
        if clients > len(values):
            raise UserError(
                f"data.clients = {clients}: column {by!r} has only {len(values)} values; "
                f"set data.clients = {len(values)}, or partition by dirichlet"
            )
        return _grouped(_deal(np.bincount(codes), clients)[codes])

    return spread


@PARTITIONS.register("pathological")
def pathological(by: str, classes: _Count = 2) -> Partition:
    """Each client holds exactly `classes` values of column `by`.

    The holders of a value share its rows equally. McMahan et al. (2017), arXiv:1602.05629, section
    3; values drawn as in Li et al. (2022), arXiv:2102.02079.
    """

    def spread(table: Table, clients: int, seed: int) -> list[Indices]:
        order, (codes, values) = _order(table, seed), _codes(table, by)
        _enough(table, clients)
        _check_classes(clients, classes, by, values)
        # With enough clients each value has its own first holder, so none can be left over.
        mode = "first-deterministic" if clients >= len(values) else "random"
        seeds = (derive_seed(seed, "pathological", draw) for draw in range(_DRAWS))
        attempts = [("PathologicalPartitioner", (clients, "code", classes, mode, False, s)) for s in seeds]
        shares = partitioning.shares(Question(attempts, order, codes))
        if shares is not None:
            return _adopt(shares, codes)
        raise UserError(
            f"data.partition: some value of {by!r} has fewer rows than clients that should share "
            f"it ({clients} clients, {classes} values each); lower data.clients or classes"
        )

    return spread


@PARTITIONS.register("size")
def size(skew: Literal["linear", "square", "exponential"] = "linear") -> Partition:
    """Shuffled rows in shares that grow as i, i squared or e to the i for client i = 1, 2, ..."""

    def spread(table: Table, clients: int, seed: int) -> list[Indices]:
        kind = f"{skew.capitalize()}Partitioner"
        _enough(table, clients)
        shares = partitioning.shares(Question([(kind, (clients,))], _order(table, seed)))
        if shares is None:
            raise UserError(
                f"data.partition.skew = {skew!r}: the smallest of {clients} clients would get "
                f"none of the {len(table.origins)} rows; lower data.clients or take a milder skew"
            )
        return shares

    return spread


@PARTITIONS.register("natural")
def natural() -> Partition:
    """One client per file, in the order of the files; `clients` is not looked at."""

    def spread(table: Table, clients: int, seed: int) -> list[Indices]:
        numbers = {origin: i for i, origin in enumerate(dict.fromkeys(table.origins))}
        return _grouped(np.array([numbers[origin] for origin in table.origins], dtype=np.int64))

    return spread


def _grouped(groups: Indices) -> list[Indices]:
    """One share per group number, in ascending order of the numbers."""
    order = np.argsort(groups, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(groups[order])) + 1)


def _order(table: Table, seed: int) -> Indices:
    """All row numbers, shuffled: the partitioners cut contiguous pieces out of their input."""
    rng = np.random.default_rng(derive_seed(seed, "partition"))
    return rng.permutation(len(table.origins)).astype(np.int64)


def _codes(table: Table, by: str) -> tuple[Indices, list[str]]:
    """Each row's value of column `by` as an index into the sorted distinct values."""
    if by not in table.columns:
        known = sorted(table.columns)
        close = difflib.get_close_matches(by, known, n=1)
        hint = (
            f"did you mean {close[0]!r}?"
            if close
            else 'data.partition = "iid" spreads the rows evenly, "natural" makes each file a client'
        )
        raise UserError(
            f"data.partition.by = {by!r}: the data has no such column; it has {', '.join(known) or 'none'}; {hint}"
        )
    column = table.columns[by]
    present = [value for value in column if value is not None]
    if len(present) < len(column):
        raise UserError(
            f"data.partition.by = {by!r}: {len(column) - len(present)} of {len(column)} rows "
            "have no value there; "
            "fill them in or partition by another column"
        )
    values = sorted(set(present))
    numbers = {value: i for i, value in enumerate(values)}
    return np.array([numbers[value] for value in present], dtype=np.int64), values


def _enough(table: Table, clients: int) -> None:
    if clients > len(table.origins):
        raise UserError(
            f"data.clients = {clients}: more clients than rows (the data has "
            f"{len(table.origins)} usable rows); "
            "lower data.clients or add data"
        )


def _check_classes(clients: int, classes: int, by: str, values: Sequence[str]) -> None:
    if classes > len(values):
        raise UserError(f"data.partition.classes = {classes}: column {by!r} has only {len(values)} values")
    if clients * classes < len(values):
        raise UserError(
            f"data.partition.classes = {classes}: {clients} clients cannot hold all "
            f"{len(values)} values of {by!r}; "
            f"set classes to at least {-(-len(values) // clients)}"
        )


def _deal(sizes: Indices, hands: int) -> Indices:
    """For each value the hand it goes to: largest first, each to the hand with the fewest rows."""
    held, given = np.zeros(hands), np.zeros(len(sizes), dtype=np.int64)
    for value in np.argsort(-sizes, kind="stable"):
        hand = int(held.argmin())
        given[value] = hand
        held[hand] += sizes[value]
    return given


def _adopt(shares: list[Indices], codes: Indices) -> list[Indices]:
    """`shares` with every row in one of them and as many values per client as before.

    PathologicalPartitioner draws each client's values on its own and loses the rows of a value that
    nobody drew (8 clients with 2 of 10 values: four times in five). Such a value takes the place of
    the most widely held value at one of its holders; the rows given up go to another holder.
    """
    rows = [{v: share[codes[share] == v] for v in np.unique(codes[share])} for share in shares]
    for lost in np.setdiff1d(codes, np.concatenate([list(held) for held in rows])):
        holders: dict[int, list[int]] = {}
        for client, held in enumerate(rows):
            for value in held:
                holders.setdefault(int(value), []).append(client)
        value = max(holders, key=lambda v: (len(holders[v]), -v))
        giver, taker = holders[value][:2]
        rows[taker][value] = np.concatenate([rows[taker][value], rows[giver].pop(value)])
        rows[giver][lost] = np.flatnonzero(codes == lost)
    return [np.sort(np.concatenate(list(held.values()))) for held in rows]
