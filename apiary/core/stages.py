"""Which rounds belong to which stage of a continual run. Both sides work it out from the configuration alone."""

from __future__ import annotations


def stage_of(number: int, rounds: int, stages: int) -> int:
    """The stage (from 0) of round `number` (from 1), with `rounds` spread evenly over `stages` in order."""
    return min((number - 1) * stages // rounds, stages - 1)


def rounds_of(stage: int, rounds: int, stages: int) -> range:
    """The round numbers of a stage; the inverse of `stage_of`."""
    first, last = (-(-at * rounds // stages) for at in (stage, stage + 1))
    return range(first + 1, last + 1)
