"""Which rows are trained in which stage of a continual run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from apiary.config.schema import RunConfig
from apiary.core.errors import UserError
from apiary.data import store
from apiary.data.examples import Example, FileReport, answer
from apiary.data.federation import Federation, federate, set_validation_apart
from apiary.data.split import PUBLIC_KEY

_SHOWN = 8  # values named in an error line


def task_of(example: Example, config: RunConfig) -> str:
    """The task of a row: its value in the column `continual.by`, which may be the answer; empty without one."""
    by = config.continual.by
    return answer(example) if by == config.data.columns.get("output") else example.tags.get(by, "")


def stage_numbers(examples: Iterable[Example], config: RunConfig) -> NDArray[np.int64]:
    """The stage (from 0) of each row, (n,); -1 where its task is in no stage."""
    stage = {task: number for number, tasks in enumerate(config.continual.stages) for task in tasks}
    return np.fromiter((stage.get(task_of(example, config), -1) for example in examples), np.int64)


def rows_by_stage(rows: Sequence[Example], config: RunConfig) -> list[int]:
    """How many rows each stage has; one number where there are no stages."""
    if not config.continual.stages:
        return [len(rows)]
    of = stage_numbers(rows, config)
    return [int((of == stage).sum()) for stage in range(len(config.continual.stages))]


def rows_of_run(config: RunConfig, key: bytes = PUBLIC_KEY, *, whole: bool = True) -> Federation:
    """All rows as a run uses them: spread over clients, within its stages, those that choose own models set apart.

    Args:
        config: the run.
        key: of the hashes that set rows apart: that of a simulation, where anybody may know it, or a site's own.
        whole: these are all clients; False for one site of several.

    Raises:
        UserError: unreadable source, impossible partition, a client left without a row, or stages that do not fit.
    """
    read = federate(config.data, config.seed, key, guess=config.privacy.unit == "none")
    return set_validation_apart(within(read, config, whole=whole), config, key, whole=whole)


def within(federation: Federation, config: RunConfig, *, whole: bool = True) -> Federation:
    """The federation without the rows that are in no stage, with a report on them; as it was where there are no stages.

    Args:
        federation: the clients' rows and the held-out set.
        config: the run.
        whole: these are all clients, so every task that the stages name must be there; False for one site of several.

    Raises:
        UserError: the stages do not fit the data, or a client has no row in any of them; not of one site of several,
            where an error would tell the server that no row matches.
    """
    if not config.continual.stages:
        return federation
    if whole:
        _check(federation, config)
    clients = tuple(c._replace(train=inside(c.train, config), test=inside(c.test, config)) for c in federation.clients)
    if whole and (empty := next((client.name for client in clients if not client.train), None)):
        raise UserError(f"continual.stages: client {empty!r} has no row of any stage; name its tasks too")
    before, after = (sum(len(c.train) + len(c.test) for c in cs) for cs in (federation.clients, clients))
    lost = {f"their {config.continual.by} is in no stage of continual.stages": (before - after, ())}
    report = FileReport("all clients", before, after, lost)
    reports = (*federation.reports, report) if after < before else federation.reports
    return federation._replace(clients=clients, test=inside(federation.test, config), reports=reports)


def inside(rows: Sequence[Example], config: RunConfig) -> Sequence[Example]:
    """The rows that are in a stage; all of them where there are no stages."""
    if not config.continual.stages:
        return rows
    return store.pick(rows, np.flatnonzero(stage_numbers(rows, config) >= 0))


def unlimited_buffers(clients: Iterable[Sequence[int]], config: RunConfig) -> list[str]:
    """A warning where `continual.buffer` is a number of rows that most clients do not have: it then limits nothing.

    Args:
        clients: the rows of each client in each stage.
        config: the run.
    """
    buffer = config.continual.buffer
    if buffer < 1:
        return []
    # Under "poisson" the chance is that number over all rows; a reservoir only ever holds those of earlier stages.
    last = None if config.continual.policy == "poisson" else -1
    rows = [sum(counts[:last]) for counts in clients]
    free = [n for n in rows if n <= int(buffer)]
    if len(free) <= len(rows) / 2:  # a limit for the larger ones
        return []
    who = "every client" if len(free) == len(rows) else f"{len(free)} of {len(rows)} clients"
    return [
        f"continual.buffer = {buffer:g}: {who} would keep all rows of earlier stages, {max(free):,} at most, so it "
        "is no limit; lower it, or give a share below 1, such as 0.1"
    ]


def _check(federation: Federation, config: RunConfig) -> None:
    stages, by = config.continual.stages, config.continual.by
    tasks_present = {task_of(example, config) for client in federation.clients for example in client.train} - {""}
    if not tasks_present:
        raise UserError(f"continual.by = {by!r}: no row has that column; name one that says what task a row is")
    if unknown := next((task for tasks in stages for task in tasks if task not in tasks_present), None):
        some = ", ".join(sorted(tasks_present)[:_SHOWN]) + (", ..." if len(tasks_present) > _SHOWN else "")
        raise UserError(f"continual.stages names {unknown!r}: no training row has that {by}; there are {some}")
