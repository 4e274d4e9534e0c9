"""Record-level differential privacy: what a run costs each row, and the ledger of it.

The unit is one row of one client's data, the sampler Poisson, the accountant a privacy loss distribution. Neighbouring
data differ in one row that is blanked, and have the same number of rows ("zero-out": Ponomareva et al. 2023). The
distributions that are composed are those of adding or removing a row, which are the ones of blanking as well: drawn or
not, a blanked row adds zero to a step's sum, as a row that is not there does. In units of the clip both set N(0, z^2)
against (1 - q) N(0, z^2) + q N(1, z^2), either way round. What removing a row would change besides, the number of rows
and with it q, stays as it is. The clients' data are disjoint, so the claim of a federation is its worst client's
(parallel composition). docs/privacy.md says it in full.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from apiary.config.schema import PrivacyConfig
from apiary.core.errors import UserError

if TYPE_CHECKING:
    pass

Accountant: TypeAlias = Literal["pld", "rdp"]
History: TypeAlias = Sequence["Mechanism"]


_FINE, _COARSE = 1e-4, 1e-3  # widths of the grid of privacy losses; both round up
_HOPELESS = 200.0  # an epsilon that promises nothing, and whose distribution would need a huge grid
_TIGHT = 1e-3  # relative; how near the least noise a calibration comes


class Mechanism(NamedTuple):
    """A run of Poisson-subsampled Gaussian steps with the same settings, as one row meets them."""

    noise_multiplier: float  # deviation of the noise over the clipping norm
    sample_rate: float  # the chance that the row is in a step
    steps: int


def epsilon(history: History, delta: float, accountant: Accountant = "pld") -> float:
    """The least epsilon that the accountant can claim for all of `history` together; never below the truth.

    For a row that is blanked, whose distributions are those of one that is added or removed. "pld" composes privacy
    loss distributions (Koskela et al. 2020; discretised by connecting the dots, Doroshenko et al. 2022, which rounds
    up), "rdp" Rényi divergences (Mironov et al. 2019). Beyond 200 both are the latter.

    Args:
        history: in any order; 0 noise costs infinity.
        delta: of the (epsilon, delta) guarantee.
    """
    counts: Counter[tuple[float, float]] = Counter()
    for noise, rate, steps in history:
        counts[noise, rate] += steps if rate > 0 else 0
    merged = tuple(sorted(Mechanism(*key, steps) for key, steps in counts.items() if steps > 0))
    return _epsilon(merged, delta, accountant)


@functools.lru_cache(maxsize=1024)
def _epsilon(history: tuple[Mechanism, ...], delta: float, accountant: Accountant) -> float:
    if not history:
        return 0.0
    if any(run.noise_multiplier <= 0 for run in history):
        return math.inf
    bound = _rdp_epsilon(history, delta)
    if accountant == "rdp" or bound > _HOPELESS:
        return bound
    # A grid of 1e-3 errs by less than a thousandth above an epsilon of 1, and is ten times as fast.
    return _pld_epsilon(history, delta, _COARSE if bound > 2 else _FINE)


def _rdp_epsilon(history: tuple[Mechanism, ...], delta: float) -> float:
    import dp_accounting

    accountant = dp_accounting.rdp.RdpAccountant()
    with _quiet_absl():
        for noise, rate, steps in history:
            step = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise))
            accountant.compose(dp_accounting.SelfComposedDpEvent(step, steps))
        return float(accountant.get_epsilon(delta))


def _pld_epsilon(history: tuple[Mechanism, ...], delta: float, interval: float) -> float:
    composed = [_step_loss(run.noise_multiplier, run.sample_rate, interval).self_compose(run.steps) for run in history]
    return float(functools.reduce(lambda a, b: a.compose(b), composed).get_epsilon_for_delta(delta))


@functools.lru_cache(maxsize=64)
def _step_loss(noise: float, rate: float, interval: float) -> Any:
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(
        noise, value_discretization_interval=interval, sampling_prob=rate
    )


@contextlib.contextmanager
def _quiet_absl() -> Iterator[None]:
    """Without the remarks on Rényi orders that are left out where they do not converge; the others still bound."""
    import logging

    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def calibrate(
    history_of: Callable[[float], History], target: float, delta: float, accountant: Accountant = "pld"
) -> float:
    """The least noise multiplier whose `history_of(noise)` costs at most `target`, to a thousandth from above.

    Args:
        history_of: the whole history for a noise multiplier; it must get cheaper as the noise grows.
        target: the budget, an epsilon.

    Raises:
        UserError: no noise multiplier keeps within the budget.
    """

    def cost(noise: float) -> float:
        return max(epsilon(history_of(noise), delta, accountant), 1e-12)  # its logarithm is taken

    low, high = _bracket(cost, target, delta)
    side = _TIGHT / 3
    while high[0] > low[0] * (1 + _TIGHT):
        # log epsilon is nearly a line in log noise; alternately just above and below where it meets the target
        slope = math.log(high[1] / low[1]) / math.log(high[0] / low[0])
        noise = low[0] * (target / low[1]) ** (1 / slope) * (1 + side)
        side = -side
        if not low[0] * (1 + _TIGHT / 3) < noise < high[0] / (1 + _TIGHT / 3):
            noise = math.sqrt(low[0] * high[0])
        made = noise, cost(noise)
        low, high = (low, made) if made[1] <= target else (made, high)
    return high[0]


def _bracket(
    cost: Callable[[float], float], target: float, delta: float
) -> tuple[tuple[float, float], tuple[float, float]]:
    """A noise that costs more than the target and one that does not, each with its cost; within a factor of 2."""
    high = 1.0, cost(1.0)
    low = high
    while high[1] > target:
        if high[0] >= 2**14:
            raise UserError(f"privacy.epsilon = {target}: no noise keeps to it at delta = {delta}; raise either")
        low, high = high, (2 * high[0], cost(2 * high[0]))
    while low[1] <= target and low[0] > 2**-7:
        low, high = (low[0] / 2, cost(low[0] / 2)), low
    return low, high


def sample_rate(privacy: PrivacyConfig, rows: int) -> float:
    """The chance of a row to be in a step, with `rows` of them: `batch_rows / rows`.

    Raises:
        UserError: fewer rows than `batch_rows`, or so many that delta would allow to give one away.
    """
    if privacy.batch_rows > rows:
        raise UserError(
            f"privacy.batch_rows = {privacy.batch_rows}: at most the {rows} rows of a client; "
            f"lower it (an eighth of the rows, {max(1, rows // 8)}, is a good start)"
        )
    if privacy.delta >= 1 / rows:
        raise UserError(
            f"privacy.delta = {privacy.delta}: must be below 1 / rows = {1 / rows:.2g}, or publishing a row picked at "
            f"random would count as private; {0.1 / rows:.0e} is a usual choice"
        )
    return privacy.batch_rows / rows
