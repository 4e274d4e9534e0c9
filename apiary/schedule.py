"""The learning rate over a run. Both sides work it out from the configuration alone."""

from __future__ import annotations

import math

from apiary.config import RunConfig, TrainConfig
from apiary.stages import rounds_of, stage_of


def learning_rate(step: int, total: int, config: TrainConfig) -> float:
    """The learning rate of a step (from 0) of a whole federated run of `total` steps.

    It rises linearly over the first `warmup` share, then stays, or falls along half a cosine to
    (nearly) 0.
    """
    warm = math.ceil(config.warmup * total)
    if step < warm:
        return config.lr * (step + 1) / warm
    if config.schedule == "constant":
        return config.lr
    progress = min(1.0, (step - warm) / max(1, total - warm))
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


def walked(config: RunConfig, number: int, steps: int) -> float:
    """The sum of the learning rates of a visit of so many steps in round `number` (from 1)."""
    planned = range(1, config.rounds + 1)
    if stages := len(config.continual.stages):
        planned = rounds_of(stage_of(number, config.rounds, stages), config.rounds, stages)
    first, total = (number - planned.start) * steps, len(planned) * steps
    return math.fsum(learning_rate(first + step, total, config.train) for step in range(steps))
