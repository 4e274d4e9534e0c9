"""The learning rate over a run. Both sides work it out from the configuration alone."""

from __future__ import annotations

import math

from apiary.config.schema import RunConfig, TrainConfig
from apiary.core.stages import rounds_of, stage_of


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


def lr_sum(config: RunConfig, number: int, steps: int) -> float:
    """The sum of the learning rates of a visit of so many steps in round `number` (from 1)."""
    planned = range(1, config.rounds + 1)
    if stages := len(config.continual.stages):
        planned = rounds_of(stage_of(number, config.rounds, stages), config.rounds, stages)
    first, total = (number - planned.start) * steps, len(planned) * steps
    return _sum(config.train, first, first + steps, total)


def _sum(config: TrainConfig, first: int, end: int, total: int) -> float:
    """The learning rates of the steps from `first` to before `end`, added up.

    In closed form: the number of steps is a client's word, and must not become the server's work.
    """
    warm = math.ceil(config.warmup * total)
    rising = range(first, min(end, warm))
    full = config.lr * (rising.start + rising.stop + 1) * len(rising) / (2 * warm) if rising else 0.0
    later = range(max(first, warm), end)
    if not later:
        return full
    if config.schedule == "constant":
        return full + config.lr * len(later)
    # cos(a) + cos(a + h) + ... of n terms is sin(n h / 2) / sin(h / 2) cos(a + (n - 1) h / 2).
    half = math.pi / max(1, total - warm) / 2
    middle = 2 * half * (later.start - warm) + (len(later) - 1) * half
    return full + config.lr / 2 * (len(later) + math.sin(len(later) * half) / math.sin(half) * math.cos(middle))
