"""Tasks that come one after the other: which rows belong to which, and how much of each the model still knows.

Scores stand in a matrix R of shape (t + 1, T): R[s, i] is the shared adapter on the held-out rows of stage i + 1 after
s finished stages, so row 0 is the untuned base and R[i, i - 1] is stage i just after it was trained. Definitions are
those of TRACE (Wang et al. 2023) after Lopez-Paz and Ranzato 2017, and of Chaudhry et al. 2018 for forgetting.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from apiary.config.schema import RunConfig, UserError
from apiary.core.tensors import StateDict
from apiary.data.examples import Example, Federation, FileReport, answer
from apiary.evaluation import comparison
from apiary.evaluation.comparison import HeldOut, Measured
from apiary.models.adapters import LanguageModel

Floats = NDArray[np.float64]
Better = Literal["higher", "lower"]
_SHOWN = 8  # values named in an error line


# -- which row belongs where ------------------------------------------------------------------------


def task_of(example: Example, config: RunConfig) -> str:
    """The task of a row: its value in the column `continual.by`, which may be the answer; empty without one."""
    by = config.continual.by
    return answer(example) if by == config.data.columns.get("output") else example.tags.get(by, "")


def stage_numbers(examples: Iterable[Example], config: RunConfig) -> NDArray[np.int64]:
    """The stage (from 0) of each row, (n,); -1 where its task is in no stage."""
    stage = {task: number for number, tasks in enumerate(config.continual.stages) for task in tasks}
    return np.array([stage.get(task_of(example, config), -1) for example in examples], np.int64)


def rows_by_stage(rows: Sequence[Example], config: RunConfig) -> list[int]:
    """How many rows each stage has; one number where there are no stages."""
    if not config.continual.stages:
        return [len(rows)]
    of = stage_numbers(rows, config)
    return [int((of == stage).sum()) for stage in range(len(config.continual.stages))]


def within(federation: Federation, config: RunConfig, *, whole: bool = True) -> Federation:
    """The federation without the rows that are in no stage, with a report on them; as it was where there are no stages.

    Args:
        federation: the clients' rows and the held-out set.
        config: the run.
        whole: these are all clients, so every task that the stages name must be there; False for one site of several.

    Raises:
        UserError: the stages do not fit the data, or a client has no row in any of them.
    """
    if not config.continual.stages:
        return federation
    _check(federation, config, whole)
    clients = tuple(c._replace(train=inside(c.train, config), test=inside(c.test, config)) for c in federation.clients)
    if empty := next((client.name for client in clients if not client.train), None):
        raise UserError(f"continual.stages: client {empty!r} has no row of any stage; name its tasks too")
    before, after = (sum(len(c.train) + len(c.test) for c in cs) for cs in (federation.clients, clients))
    lost = {f"their {config.continual.by} is in no stage of continual.stages": (before - after, ())}
    report = FileReport("all clients", before, after, lost)
    reports = (*federation.reports, report) if after < before else federation.reports
    return Federation(clients, inside(federation.test, config), reports)


def inside(rows: Sequence[Example], config: RunConfig) -> tuple[Example, ...]:
    """The rows that are in a stage; all of them where there are no stages."""
    if not config.continual.stages:
        return tuple(rows)
    return tuple(row for row, n in zip(rows, stage_numbers(rows, config), strict=True) if n >= 0)


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


def _check(federation: Federation, config: RunConfig, whole: bool) -> None:
    stages, by = config.continual.stages, config.continual.by
    found = {task_of(example, config) for client in federation.clients for example in client.train} - {""}
    if not found:
        raise UserError(f"continual.by = {by!r}: no row has that column; name one that says what task a row is")
    if not whole:
        return
    if unknown := next((task for tasks in stages for task in tasks if task not in found), None):
        some = ", ".join(sorted(found)[:_SHOWN]) + (", ..." if len(found) > _SHOWN else "")
        raise UserError(f"continual.stages names {unknown!r}: no training row has that {by}; there are {some}")


# -- scores by stage --------------------------------------------------------------------------------


def scorer(lm: LanguageModel, held_out: HeldOut, config: RunConfig) -> Callable[[StateDict], dict[str, Any]]:
    """What a server measures when a stage has ended: an adapter's scores by stage, on the examples of the table."""

    def score(adapter: StateDict) -> dict[str, Any]:
        return by_stage(comparison.measure(lm, adapter, held_out, config), held_out, config)

    return score


def by_stage(run: Measured, held_out: HeldOut, config: RunConfig) -> dict[str, Any]:
    """A row of each matrix: `losses` in nats per response token, `accuracies` (None where not measured) and `n`."""
    number = stage_numbers(held_out.examples, config)
    parts = [number == stage for stage in range(len(config.continual.stages))]
    correct = run.correct
    return {
        "losses": [_ratio(run.nats[part].sum(), run.tokens[part].sum()) for part in parts],
        "accuracies": None if correct is None else [_ratio(correct[part].sum(), part.sum()) for part in parts],
        "n": [int(part.sum()) for part in parts],
    }


def unmeasured(held_out: HeldOut, config: RunConfig) -> list[str]:
    """A warning where stages have no example in the held-out set."""
    found = set(stage_numbers(held_out.examples, config).tolist())
    missing = [str(number) for number in range(1, len(config.continual.stages) + 1) if number - 1 not in found]
    if not missing:
        return []
    which = f"stage {missing[0]} has" if len(missing) == 1 else f"stages {' and '.join(missing)} have"
    return [f"{which} no held-out example, so what is remembered of it is not measured; raise evaluate.max_examples"]


def _ratio(over: float, under: float) -> float:
    return float(over / under) if under else math.nan


# -- what is remembered -----------------------------------------------------------------------------


def overall(scores: ArrayLike) -> list[float]:
    """Overall performance after each stage: OP_t = mean over i <= t of R[t, i]."""
    r = np.asarray(scores, np.float64)
    return [_mean(r[t, :t]) for t in range(1, len(r))]


def backward_transfer(scores: ArrayLike, better: Better = "higher") -> float:
    """BWT_t = mean over i <= t of (R[t, i] - R[i, i]) after the last stage t; below 0 where later stages did harm.

    Args:
        scores: R.
        better: "lower" for losses: the sign is turned, so that harm is below 0 there too.
    """
    r = _higher(scores, better)
    t = len(r) - 1
    return _mean(r[t, :t] - np.diagonal(r[1:])[:t])


def forgetting(scores: ArrayLike, better: Better = "higher") -> float:
    """F_t = mean over i < t of (max over 1 <= j < t of R[j, i] - R[t, i]) after the last stage t; above 0 = forgotten.

    Args:
        scores: R.
        better: "lower" for losses: the best is then the least, and forgetting is still above 0.
    """
    r = _higher(scores, better)
    t = len(r) - 1
    return _mean(r[1:t, : t - 1].max(axis=0) - r[t, : t - 1]) if t > 1 else math.nan


def _higher(scores: ArrayLike, better: Better) -> Floats:
    r = np.asarray(scores, np.float64)
    return r if better == "higher" else -r


def _mean(values: Floats) -> float:
    """The mean of what was measured; a stage without held-out examples has no score."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else math.nan


def results(
    events: Iterable[Mapping[str, Any]], runs: Mapping[str, Measured], held_out: HeldOut, config: RunConfig
) -> dict[str, Any]:
    """The `continual` part of metrics.json; empty without stages.

    Args:
        events: the run's log, in which a `stage` event stands for each row of R.
        runs: every method on the held-out examples; those but the federated one trained on all stages at once.
        held_out: these examples.
        config: the run.
    """
    rows = sorted((event for event in events if event["event"] == "stage"), key=lambda event: event["stage"])
    if not config.continual.stages or not rows:
        return {}
    found: dict[str, Any] = {
        "by": config.continual.by,
        "stages": [list(tasks) for tasks in config.continual.stages],
        "buffer": config.continual.buffer,
        "n": rows[-1]["n"],
        "joint": {name: by_stage(run, held_out, config) for name, run in runs.items() if name in ("local", "central")},
        "overall": {},
        "backward_transfer": {},
        "forgetting": {},
    }
    measures: tuple[tuple[str, str, Better], ...] = (("accuracy", "accuracies", "higher"), ("loss", "losses", "lower"))
    for name, key, better in measures:
        if any(row[key] is None for row in rows):
            found[name] = None
            continue
        r = np.array([row[key] for row in rows], np.float64)
        found[name] = r.tolist()
        found["overall"][name] = overall(r)
        found["backward_transfer"][name] = backward_transfer(r, better)
        found["forgetting"][name] = forgetting(r, better)
    return {"continual": found}
