"""The privacy plan of a visit as one value: what is done to gradients, and the event that accounts for it.

Training runs this value and nothing else, the ledger is charged with its event, and `apiary privacy plan`, doctor and
report take their numbers from it: so what is claimed is what runs. All of it follows from public facts, the
configuration and the number of rows in each stage (after the execution plan of jax_privacy).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from apiary.config.schema import RunConfig
from apiary.privacy import sampling
from apiary.privacy.ledger import Entry
from apiary.privacy.sampling import Draw


class BlankedRow(NamedTuple):
    """The sensitivity of a sum over rows: how far, in L2 norm, it moves at most when one row is blanked.

    How many rows there are is public, so neighbouring data differ in what one row holds, not in their number.
    """

    l2: float


class VisitMechanism(NamedTuple):
    """Poisson sampling, clipping and Gaussian noise, `sampler.steps` times (Abadi et al. 2016, algorithm 1)."""

    sampler: Draw  # the steps, and the sampling rates of new rows and of those in the replay buffer
    sensitivity: BlankedRow  # of the clipped sum: each row's gradient is clipped to this norm
    noise_multiplier: float  # standard deviation of the noise over the sensitivity; 0 is not private
    batch_rows: int  # expected rows of a step; the sum is divided by it, never by the drawn rows
    partition: str = ""  # names the way in which rows are parted into cohorts

    @property
    def noise_std(self) -> float:
        """The standard deviation of the noise on each number of the sum."""
        return self.noise_multiplier * self.sensitivity.l2

    def rates(self, rows: int, new: int) -> np.ndarray:
        """(rows,) float64: the sampling rate of each row, the `new` ones first, then those of the replay buffer.

        Raises:
            ValueError: there are more new rows than rows.
        """
        if not 0 <= new <= rows:
            raise ValueError(f"{new} new rows of {rows}")
        made = np.full(rows, self.sampler.old)
        made[:new] = self.sampler.new
        return made

    def event(self, run: str, number: int, request: str) -> Entry:
        """What the ledger is charged with for the release `request` of round `number` of `run`."""
        draw = self.sampler
        return Entry(
            run, number, request, self.noise_multiplier, draw.steps, sampling.cohort_rates(draw), self.partition
        )


def mechanism(config: RunConfig, rows: Sequence[int], number: int, noise: float | None = None) -> VisitMechanism | None:
    """The mechanism of a client's visit in round `number`; None where it has no rows for the round's stage.

    Args:
        config: the run.
        rows: the client's training rows in each stage, before curation; without stages one number.
        number: the round, from 1.
        noise: the noise multiplier where it is known; None: what `sampling.noise_multiplier` finds for all rounds.

    Raises:
        UserError: the settings cannot keep the guarantee for so many rows.
    """
    draw = sampling.draw(config, rows, number)
    if draw is None:
        return None
    z = sampling.noise_multiplier(config, rows) if noise is None else noise
    privacy = config.privacy
    return VisitMechanism(draw, BlankedRow(privacy.clip), z, privacy.batch_rows, sampling.partition(config))
