"""What the report says of a run whose tasks came in stages: what the model knew after each one, and what it lost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from apiary import units
from apiary.report.data import Continual, MethodName, StageScores

_JOINT: Mapping[MethodName, str] = {
    "central": "All stages at once, pooled",
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
        return Cell(units.loss_text(loss, 2), "", 0.0 if loss is None else max(0.0, 1 - loss / worst), state)
    right = scores.accuracies[stage]
    return Cell(units.share_text(right, 0), units.loss_text(loss, 2), right or 0.0, state)


def _sentence(continual: Continual) -> str:
    """What was forgotten, in one sentence: each stage just after its training against the end."""
    accuracy = continual.accuracy is not None
    matrix = continual.accuracy or continual.loss
    last = len(matrix) - 1
    pairs = [(matrix[i][i - 1], matrix[last][i - 1], i) for i in range(1, last)]
    known = [(then, now, i) for then, now, i in pairs if then is not None and now is not None]
    if not known:
        return "There was no earlier stage to forget."

    def lost(then: float, now: float) -> float:
        return then - now if accuracy else now - then

    def words(value: float) -> str:
        return units.share_text(value, 0) if accuracy else units.loss_text(value, 2)

    then, now, stage = max(known, key=lambda item: lost(*item[:2]))
    if lost(then, now) <= 0 or words(then) == words(now):
        return "Nothing was forgotten: no stage does worse at the end than just after its own training."
    mean = sum(lost(*item[:2]) for item in known) / len(known)
    change = f"{100 * abs(mean):.0f} points" if accuracy else f"{abs(mean):.2f} nats per token"
    verb, what = ("fell", "answers exactly right") if accuracy else ("rose", "held-out loss")
    mood = "worse" if mean > 0 else "better"
    return (
        f"Stage {stage} ({', '.join(continual.stages[stage - 1])}) was forgotten most: its {what} {verb} from "
        f"{words(then)} just after its training to {words(now)} at the end; on average, earlier stages ended {change} "
        f"{mood} than they began."
    )


def _figures(continual: Continual) -> list[tuple[str, str]]:
    """The usual measures, by name."""
    figures = []
    measures = (("accuracy", "exactly right", units.share_text), ("loss", "loss", units.loss_text))
    for measure, label, text in measures:
        overall = continual.overall.get(measure, ())
        found = (
            ("Overall at the end", overall[-1] if overall else None),
            ("Backward transfer", continual.backward_transfer.get(measure)),
            ("Forgetting", continual.forgetting.get(measure)),
        )
        figures += [(f"{name}, {label}", text(value)) for name, value in found if value is not None]
    return figures
