"""Tasks that come one after the other: which rows belong to which, and how much of each the model still knows.

Scores stand in a matrix R of shape (t + 1, T): R[s, i] is the shared adapter on the held-out rows of stage i + 1 after
s finished stages, so row 0 is the untuned base and R[i, i - 1] is stage i just after it was trained. Definitions are
those of TRACE (Wang et al. 2023) after Lopez-Paz and Ranzato 2017, and of Chaudhry et al. 2018 for forgetting.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from apiary.config.schema import RunConfig
from apiary.core.tensors import StateDict
from apiary.data.stages import stage_numbers
from apiary.evaluation import comparison
from apiary.evaluation.comparison import HeldOut, Measured
from apiary.models.adapters import LanguageModel

Floats = NDArray[np.float64]
Better = Literal["higher", "lower"]


# -- which row belongs where ------------------------------------------------------------------------


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
        "accuracies": None if correct is None else [_mean(correct[part]) for part in parts],
        "n": [int(part.sum()) for part in parts],
    }


def unmeasured(held_out: HeldOut, config: RunConfig) -> list[str]:
    """A warning where stages have no example in the held-out set."""
    present = set(stage_numbers(held_out.examples, config).tolist())
    missing = [str(number) for number in range(1, len(config.continual.stages) + 1) if number - 1 not in present]
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
        runs: every method on the held-out examples; the baselines among them trained on all stages at once.
        held_out: these examples.
        config: the run.
    """
    rows = sorted((event for event in events if event["event"] == "stage"), key=lambda event: event["stage"])
    if not config.continual.stages or not rows:
        return {}
    summary: dict[str, Any] = {
        "by": config.continual.by,
        "stages": [list(tasks) for tasks in config.continual.stages],
        "buffer": config.continual.buffer,
        "n": rows[-1]["n"],
        "joint": {
            name: by_stage(run, held_out, config)
            for name, run in runs.items()
            if name not in ("base", "start", "federated")
        },
        "overall": {},
        "backward_transfer": {},
        "forgetting": {},
    }
    measures: tuple[tuple[str, str, Better], ...] = (("accuracy", "accuracies", "higher"), ("loss", "losses", "lower"))
    for name, key, better in measures:
        if any(row[key] is None for row in rows):
            summary[name] = None
            continue
        r = np.array([row[key] for row in rows], np.float64)
        summary[name] = r.tolist()
        summary["overall"][name] = overall(r)
        summary["backward_transfer"][name] = backward_transfer(r, better)
        summary["forgetting"][name] = forgetting(r, better)
    return {"continual": summary}
