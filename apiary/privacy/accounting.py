"""Record-level differential privacy: what a run costs each row, and the ledger of it.

The unit is one row of one client's data, the adjacency add or remove one, the sampler Poisson, the accountant a
privacy loss distribution. The clients' data are disjoint, so the claim of a federation is its worst client's
(parallel composition). docs/privacy.md says it in full.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from apiary.config.schema import PrivacyConfig, UserError
from apiary.privacy.noise import KEY_FILE, load_key
from apiary.tracking.event_log import for_owner, write_atomic

if TYPE_CHECKING:
    from apiary.core.messages import Spent

Accountant: TypeAlias = Literal["pld", "rdp"]
History: TypeAlias = Sequence["Mechanism"]

SCHEMA = 1  # of ledger.json
_FINE, _COARSE = 1e-4, 1e-3  # widths of the grid of privacy losses; both round up
_HOPELESS = 200.0  # an epsilon that promises nothing, and whose distribution would need a huge grid
_TIGHT = 1e-3  # relative; how near the least noise a calibration comes


class BudgetSpent(RuntimeError):
    """The next visit would take a row above its budget; nothing was trained and nothing is charged."""


class Mechanism(NamedTuple):
    """A run of Poisson-subsampled Gaussian steps with the same settings, as one row meets them."""

    noise_multiplier: float  # deviation of the noise over the clipping norm
    sample_rate: float  # the chance that the row is in a step
    steps: int


def epsilon(history: History, delta: float, accountant: Accountant = "pld") -> float:
    """The least epsilon that the accountant can claim for all of `history` together; never below the truth.

    Add/remove adjacency. "pld" composes privacy loss distributions (Koskela et al. 2020; discretised by connecting the
    dots, Doroshenko et al. 2022, which rounds up), "rdp" Rényi divergences (Mironov et al. 2019). Beyond 200 both are
    the latter.

    Args:
        history: in any order; 0 noise costs infinity.
        delta: the chance that the promise fails.
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
        UserError: no noise keeps to the budget.
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


class Entry(NamedTuple):
    """One visit's charge. Rows are told apart by when they came, for they are drawn at different rates.

    run, round and request name the release: the same three are the same bits and cost once. `rates` holds each
    cohort's chance to be in a step (a cohort that it lacks was not drawn from). `partition` names the way in which
    the rows were parted into cohorts; "" is no parting: every row has the one rate there is.
    """

    run: str
    round: int
    request: str
    noise_multiplier: float
    steps: int
    rates: Mapping[str, float]
    partition: str = ""


class Ledger(NamedTuple):
    """All that was ever charged for a client's rows; everything else follows from it."""

    entries: tuple[Entry, ...] = ()


def charge(ledger: Ledger, entry: Entry) -> Ledger:
    """The ledger with `entry`; the same ledger if that very release is in it.

    Raises:
        RuntimeError: it is in there with other numbers.
    """
    for known in ledger.entries:
        if known[:3] == entry[:3]:
            if known != entry:
                raise RuntimeError(
                    f"the privacy ledger holds round {entry.round} of this run with other noise, rates or steps"
                )
            return ledger
    return Ledger((*ledger.entries, entry))


def histories(ledger: Ledger) -> list[list[Mechanism]]:
    """What the rows of each cohort met, a history each.

    Cohorts of one partition are disjoint. Those of two are not comparable: a row in the quiet cohort of one may be in
    the busy one of the other. Every visit then counts at its highest rate for every row, which can only claim more.
    """
    partitions = {entry.partition for entry in ledger.entries} - {""}
    if len(partitions) != 1:
        return [[_met(entry, max(entry.rates.values(), default=0.0)) for entry in ledger.entries]]
    cohorts = sorted({name for entry in ledger.entries if entry.partition for name in entry.rates})
    return [[_met(entry, _rate(entry, cohort)) for entry in ledger.entries] for cohort in cohorts]


def _rate(entry: Entry, cohort: str) -> float:
    return entry.rates.get(cohort, 0.0) if entry.partition else max(entry.rates.values(), default=0.0)


def _met(entry: Entry, rate: float) -> Mechanism:
    return Mechanism(entry.noise_multiplier, rate, entry.steps)


def spent(ledger: Ledger, delta: float) -> Spent:
    """What the worst-off rows have spent, by both accountants.

    `noise_multiplier` is the least and `sample_rate` the greatest that these rows met, `steps` all they were drawn for.
    """
    from apiary.core.messages import Spent

    worst = max(histories(ledger), key=lambda history: epsilon(history, delta))
    met = [run for run in worst if run.sample_rate > 0]
    return Spent(
        epsilon=epsilon(met, delta),
        epsilon_rdp=max(epsilon(history, delta, "rdp") for history in histories(ledger)),
        delta=delta,
        noise_multiplier=min((run.noise_multiplier for run in met), default=0.0),
        sample_rate=max((run.sample_rate for run in met), default=0.0),
        steps=sum(run.steps for run in met),
    )


def pay(path: Path, entry: Entry, privacy: PrivacyConfig) -> Spent:
    """Charges a visit on disk, before any of it is trained: a visit that dies later has been paid for all the same.

    Args:
        path: the client's `ledger.json`, of all runs on its data. Two processes may share it.

    Returns:
        What is spent with this visit.

    Raises:
        BudgetSpent: the visit does not fit in what is left of `privacy.epsilon`.
        UserError: the ledger cannot be read or is gone.
        OSError: it cannot be written.
    """
    with _locked(path):
        ledger = load_ledger(path)
        charged = charge(ledger, entry)
        bill = spent(charged, privacy.delta)
        cost = bill.epsilon if privacy.accountant == "pld" else bill.epsilon_rdp
        if charged is not ledger:
            if cost > privacy.epsilon:
                raise BudgetSpent(
                    f"round {entry.round} would spend epsilon {cost:.3f} of {privacy.epsilon:g}: nothing is trained"
                )
            save_ledger(path, charged)
    return bill


def open_key(path: Path) -> bytes:
    """The client's secret key, beside its ledger at `path`; both are made for data that were never trained on.

    Raises:
        UserError: the ledger or the key cannot be read, or the ledger is gone.
        OSError: they cannot be written.
    """
    with _locked(path):
        ledger = load_ledger(path)
        if not path.exists():
            save_ledger(path, ledger)  # first, for a key without a ledger means that one was lost
        return load_key(path.with_name(KEY_FILE))


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "w", opener=for_owner) as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # ends with the file, or the process
        yield


def load_ledger(path: Path) -> Ledger:
    """The ledger at `path`; an empty one where neither it nor the key beside it was ever made.

    Raises:
        UserError: it is broken, or gone: a budget is never begun anew by accident.
    """
    if not path.exists():
        if path.with_name(KEY_FILE).exists():
            raise UserError(
                f"the privacy ledger {str(path)!r} is gone, but its key is there, so something was spent; put it back "
                f"(only for data that were never trained on, remove {KEY_FILE})"
            )
        return Ledger()
    try:
        values = json.loads(path.read_bytes())
        if values["schema"] != SCHEMA:
            raise ValueError(f"schema {values['schema']}")
        return Ledger(tuple(_read_entry(item) for item in values["entries"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"the privacy ledger {str(path)!r} cannot be read ({error}): put a sound copy in its place; "
            "without it nobody knows what is spent"
        ) from None


def _read_entry(item: Mapping[str, Any]) -> Entry:
    if set(item) != set(Entry._fields):
        raise ValueError("an entry has other fields than this version knows")
    rates = {str(name): float(rate) for name, rate in item["rates"].items()}
    noise, steps = float(item["noise_multiplier"]), int(item["steps"])
    if not (math.isfinite(noise) and noise >= 0 and steps >= 0 and all(0 <= rate <= 1 for rate in rates.values())):
        raise ValueError("an entry has impossible numbers")
    release = str(item["run"]), int(item["round"]), str(item["request"])
    return Entry(*release, noise, steps, rates, str(item["partition"]))


def save_ledger(path: Path, ledger: Ledger) -> None:
    """Writes the ledger whole or not at all, and to the disk itself.

    Raises:
        OSError: the disk is full or the folder read-only; the older ledger stays.
    """
    entries = [{**entry._asdict(), "rates": dict(entry.rates)} for entry in ledger.entries]
    write_atomic(path, json.dumps({"schema": SCHEMA, "entries": entries}, indent=1) + "\n", private=True)
