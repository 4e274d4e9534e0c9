"""What runs have cost a site in privacy: charges on its disk, never lost and never taken back."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from apiary.config.schema import PrivacyConfig
from apiary.core.errors import BudgetSpent, UserError
from apiary.core.files import for_owner, write_atomic
from apiary.core.messages import Spent
from apiary.privacy.accounting import Accountant, Mechanism, epsilon
from apiary.privacy.noise import KEY_FILE, load_key

SCHEMA = 1  # of ledger.json


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


def spent(ledger: Ledger, delta: float, accountant: Accountant = "pld") -> Spent:
    """What the worst-off rows have spent, by `accountant`; by Rényi divergences beside it.

    `noise_multiplier` is the least and `sample_rate` the greatest that these rows met, `steps` all they were drawn for.
    """
    from apiary.core.messages import Spent

    worst = max(histories(ledger), key=lambda history: epsilon(history, delta, accountant))
    met = [run for run in worst if run.sample_rate > 0]
    return Spent(
        epsilon=epsilon(met, delta, accountant),
        epsilon_rdp=max(epsilon(history, delta, "rdp") for history in histories(ledger)),
        delta=delta,
        noise_multiplier=min((run.noise_multiplier for run in met), default=0.0),
        sample_rate=max((run.sample_rate for run in met), default=0.0),
        steps=sum(run.steps for run in met),
    )


def charge_file(path: Path, entry: Entry, privacy: PrivacyConfig) -> Spent:
    """Charges a visit on disk, before any of it is trained: a visit that dies later has been paid for all the same.

    Args:
        path: the client's `ledger.json`, of all runs on its data. Two processes may share it.

    Returns:
        What is spent with this visit.

    Raises:
        BudgetSpent: the visit does not fit in what is left of `privacy.epsilon`.
        UserError: the ledger cannot be read or is gone.
        OSError: the ledger can't be written, such as on a full disk.
    """
    with _locked(path):
        ledger = load_ledger(path)
        charged = charge(ledger, entry)
        total = spent(charged, privacy.delta, privacy.accountant)
        if charged is not ledger:
            if total.epsilon > privacy.epsilon:
                raise BudgetSpent(
                    f"round {entry.round} would spend epsilon {total.epsilon:.3f} of {privacy.epsilon:g}: "
                    "nothing is trained"
                )
            save_ledger(path, charged)
    return total


def open_key(path: Path) -> bytes:
    """The client's secret key, beside its ledger at `path`; both are made for data that were never trained on.

    Raises:
        UserError: the ledger or the key cannot be read, or the ledger is gone.
        OSError: the ledger or its key can't be written.
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
