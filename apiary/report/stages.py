"""What the report says of a run whose tasks came in stages: what the model knew after each one, and what it lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from apiary.core import formatting
from apiary.report.data import Continual, Matrix, MethodName, StageScores

_JOINT: Mapping[MethodName, str] = {
    "central": "All stages at once, pooled",
    "central_serial": "All stages at once, pooled, serial steps",
    "local": "All stages at once, each client alone",
}


class Cell(NamedTuple):
    """A score; share: how dark its cell is, 0 to 1; state: "ahead" of its training, "now" just trained, or neither."""

    text: str
    small: str
    share: float
    state: str


def stages_content(continual: Continual | None) -> dict[str, Any] | None:
    """The heat map by its rows, the sentence above it, and the figures below; None for a run without stages."""
    if continual is None:
        return None
    accuracy, loss = continual.accuracy, continual.loss
    worst = max((value for row in loss for value in row if value is not None), default=0.0) or 1.0

    def cells(scores: StageScores, finished: int) -> list[Cell]:
        return [
            _cell(scores, stage, worst, "ahead" if stage >= finished else "now" if stage == finished - 1 else "")
            for stage in range(len(continual.stages))
        ]

    after = [StageScores(losses=row, accuracies=accuracy[t] if accuracy else None) for t, row in enumerate(loss)]
    rows = [("Untuned" if t == 0 else f"After stage {t}", cells(scores, t)) for t, scores in enumerate(after)]
    everything = len(continual.stages) + 1
    rows += [(name, cells(continual.joint[m], everything)) for m, name in _JOINT.items() if m in continual.joint]
    return {
        "columns": [(f"Stage {i}", ", ".join(tasks)) for i, tasks in enumerate(continual.stages, 1)],
        "rows": rows,
        "is_accuracy": accuracy is not None,
        "sentence": _sentence(continual),
        "joint": bool(continual.joint),
        "figures": _figures(continual),
    }


def _cell(scores: StageScores, stage: int, worst: float, state: str) -> Cell:
    loss = scores.losses[stage]
    if scores.accuracies is None:
        return Cell(formatting.loss_text(loss, 2), "", 0.0 if loss is None else max(0.0, 1 - loss / worst), state)
    right = scores.accuracies[stage]
    return Cell(formatting.share_text(right, 0), formatting.loss_text(loss, 2), right or 0.0, state)


class _Fall(NamedTuple):
    """How far a stage ended from its best after any stage before the last: `apiary.evaluation.continual.forgetting`."""

    stage: int  # from 1
    after: int  # the stage after which it was at its best
    best: float
    now: float
    lost: float  # above 0 where it is worse now


def _falls(matrix: Matrix, *, higher: bool) -> list[_Fall]:
    """The fall of each stage but the last finished one; a stage that was not measured every time has none."""
    last = len(matrix) - 1
    found = []
    for stage in range(1, last):
        scores = [score for after in range(1, last) if (score := matrix[after][stage - 1]) is not None]
        now = matrix[last][stage - 1]
        if now is None or len(scores) < last - 1:
            continue
        best = max(scores) if higher else min(scores)
        after = stage if scores[stage - 1] == best else 1 + scores.index(best)
        found.append(_Fall(stage, after, best, now, best - now if higher else now - best))
    return found


def _sentence(continual: Continual) -> str:
    """What was forgotten, in one sentence. Nothing was only if none of the figures below it says otherwise."""
    right = _falls(continual.accuracy or (), higher=True)
    loss = _falls(continual.loss, higher=False)
    if not right and not loss:
        return "There was no earlier stage to forget."
    if _forgotten(right):
        return f"{_most(continual, right, accuracy=True)}."
    if not _forgotten(loss):
        return "Nothing was forgotten: no stage does worse at the end than at its best before."
    but = "No stage has fewer answers exactly right at the end than at its best before, but by loss, " if right else ""
    told = _most(continual, loss, accuracy=False)
    return f"{but}{told[0].lower() + told[1:] if but else told}."


def _forgotten(falls: Sequence[_Fall]) -> bool:
    """Whether a stage fell by as much as the figures show: a tenth of a point, or 0.001 nats."""
    return any(round(fall.lost, 3) > 0 for fall in falls)


def _most(continual: Continual, falls: Sequence[_Fall], *, accuracy: bool) -> str:
    worst = max(falls, key=lambda fall: fall.lost)
    text = formatting.share_text if accuracy else formatting.loss_text
    fewest = 0 if accuracy else 2
    digits = next((n for n in range(fewest, 6) if text(worst.best, n) != text(worst.now, n)), fewest)
    began = "just after its training" if worst.after == worst.stage else f"after stage {worst.after}"
    what = "answers exactly right fell" if accuracy else "held-out loss rose"
    mean = sum(fall.lost for fall in falls) / len(falls)
    change = f"{100 * abs(mean):.0f} points" if accuracy else f"{abs(mean):.2f} nats per token"
    return (
        f"Stage {worst.stage} ({', '.join(continual.stages[worst.stage - 1])}) was forgotten most: its {what} from "
        f"{text(worst.best, digits)} {began} to {text(worst.now, digits)} at the end; on average, earlier stages "
        f"ended {change} {'worse' if mean > 0 else 'better'} than at their best before"
    )


def _figures(continual: Continual) -> list[tuple[str, str]]:
    """The usual measures, by name."""
    figures = []
    measures = (("accuracy", "exactly right", formatting.share_text), ("loss", "loss", formatting.loss_text))
    for measure, label, text in measures:
        overall = continual.overall.get(measure, ())
        found = (
            ("Overall at the end", overall[-1] if overall else None),
            ("Backward transfer", continual.backward_transfer.get(measure)),
            ("Forgetting", continual.forgetting.get(measure)),
        )
        figures += [(f"{name}, {label}", text(value)) for name, value in found if value is not None]
    return figures
