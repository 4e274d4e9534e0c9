"""What is claimed about privacy, against other accountants and by hand; the ledger through kills; the secret noise."""

from __future__ import annotations

import math
import os
import re
import signal
import stat
import subprocess
import sys
from pathlib import Path

import dp_accounting
import numpy as np
import pytest
from command_line import apiary, assert_refused, with_overrides
from dp_accounting import NeighboringRelation
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp.rdp_privacy_accountant import DEFAULT_RDP_ORDERS
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from apiary.config.loading import parse
from apiary.config.schema import PrivacyConfig, RunConfig
from apiary.core.errors import BudgetSpent, UserError
from apiary.privacy import accounting, ledger, sampling
from apiary.privacy.accounting import Mechanism, epsilon
from apiary.privacy.ledger import Entry, Ledger, charge, charge_file, spent
from apiary.privacy.noise import KEY_FILE, SecretNoise, load_key, request_digest
from apiary.privacy.plan import plan

DELTA = 1e-5
KEY = bytes(range(32))
CASES = [Mechanism(1.0, 0.01, 1000), Mechanism(1.0, 0.05, 200), Mechanism(0.7, 0.1, 36), Mechanism(5.0, 1.0, 50)]


# -- accounting -------------------------------------------------------------------------------------


def opacus(kind: str, run: Mechanism) -> object:
    from opacus.accountants import create_accountant

    accountant = create_accountant(kind)
    accountant.history = [tuple(run)]
    return accountant


@pytest.mark.parametrize("run", CASES, ids=str)
def test_renyi_epsilon_is_that_of_opacus(run: Mechanism) -> None:
    theirs = opacus("rdp", run).get_epsilon(DELTA, alphas=DEFAULT_RDP_ORDERS)
    # Between whole orders dp_accounting bounds the moment from above, by up to half a percent; Opacus' is exact.
    assert theirs * (1 - 1e-9) <= epsilon([run], DELTA, "rdp") <= theirs * 1.003


@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.parametrize("run", CASES, ids=str)
def test_tight_epsilon_lies_within_the_bounds_of_opacus(run: Mechanism) -> None:
    """Gopi et al. 2021 bound the truth from both sides; ours must not be below the truth, nor far above."""
    account = opacus("prv", run)
    dprv = account._get_dprv(eps_error=0.01, delta_error=DELTA / 1000)
    low, _, high = dprv.compute_epsilon(DELTA, DELTA / 1000, 0.01)
    assert low <= epsilon([run], DELTA) <= high


@pytest.mark.parametrize(("noise", "steps"), [(5.0, 50), (1.0, 1), (20.0, 10)])
def test_epsilon_without_sampling_is_the_closed_form(noise: float, steps: int) -> None:
    """Balle and Wang 2018, theorem 8: T Gaussian steps are one with deviation sigma / sqrt(T)."""
    mu = math.sqrt(steps) / noise

    def delta(eps: float) -> float:
        return stats.norm.cdf(mu / 2 - eps / mu) - math.exp(eps) * stats.norm.cdf(-mu / 2 - eps / mu)

    exact = optimize.brentq(lambda eps: delta(eps) - DELTA, 0, 50)
    assert exact <= epsilon([Mechanism(noise, 1.0, steps)], DELTA) <= exact * 1.001 + 1e-4


@pytest.mark.parametrize(
    ("noise", "rate", "steps", "rdp", "tight"), [(1.0, 0.01, 1000, 2.10, 1.84), (1.0, 0.05, 200, 5.37, 4.78)]
)
def test_known_values(noise: float, rate: float, steps: int, rdp: float, tight: float) -> None:
    run = [Mechanism(noise, rate, steps)]
    assert epsilon(run, DELTA, "rdp") == pytest.approx(rdp, abs=0.01)
    assert epsilon(run, DELTA) == pytest.approx(tight, abs=0.02)  # the values were made with an error of 0.01


def directly(runs: list[Mechanism], interval: float = 1e-4) -> float:
    """The same history through dp_accounting's own accountant, event by event."""
    accountant = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=interval)
    for run in runs:
        step = dp_accounting.PoissonSampledDpEvent(run.sample_rate, dp_accounting.GaussianDpEvent(run.noise_multiplier))
        accountant.compose(dp_accounting.SelfComposedDpEvent(step, run.steps))
    return float(accountant.get_epsilon(DELTA))


@pytest.mark.slow
def test_a_mixed_history_is_composed_whatever_its_order_and_cut() -> None:
    runs = [Mechanism(1.1, 0.05, 40), Mechanism(0.9, 0.01, 100)]
    cut = [Mechanism(0.9, 0.01, 70), Mechanism(1.1, 0.05, 40), Mechanism(0.9, 0.01, 30)]
    assert epsilon(runs, DELTA) == epsilon(cut, DELTA)
    assert epsilon(runs, DELTA) == pytest.approx(directly(runs), rel=2e-3)
    assert max(epsilon([run], DELTA) for run in runs) < epsilon(runs, DELTA) < sum(epsilon([r], DELTA) for r in runs)


def test_the_ends_of_the_scale() -> None:
    assert epsilon([], DELTA) == 0
    assert epsilon([Mechanism(1.0, 0.0, 100), Mechanism(1.0, 0.5, 0)], DELTA) == 0
    assert epsilon([Mechanism(0.0, 0.1, 1)], DELTA) == math.inf
    assert 1000 < epsilon([Mechanism(0.05, 0.05, 36)], DELTA) < 1e5


@pytest.mark.parametrize(
    ("rate", "steps", "budget"),
    [
        (0.05, 36, 8.0),
        (0.05, 2000, 8.0),
        (0.22, 36, 1.0),
        (1.0, 10, 3.0),
        pytest.param(0.01, 5, 0.2, marks=pytest.mark.slow),
        pytest.param(0.001, 1, 0.005, marks=pytest.mark.slow),
    ],
)
def test_calibration_is_the_inverse_and_never_above_the_budget(rate: float, steps: int, budget: float) -> None:
    noise = accounting.calibrate(lambda z: [Mechanism(z, rate, steps)], budget, DELTA)
    assert epsilon([Mechanism(noise, rate, steps)], DELTA) <= budget
    assert epsilon([Mechanism(noise / 1.002, rate, steps)], DELTA) > budget


def test_no_noise_keeps_to_an_impossible_budget() -> None:
    with pytest.raises(UserError, match=r"privacy\.epsilon"):
        accounting.calibrate(lambda _: [Mechanism(1.0, 0.5, 100)], 0.1, DELTA)


def config(rounds: int = 4, steps: int = 3, **keys: object) -> RunConfig:
    return parse({"rounds": rounds, "train": {"steps": steps}, "privacy": {"unit": "record", **keys}})


@pytest.mark.slow
def test_a_run_as_planned_ends_within_its_budget() -> None:
    made = plan(config(batch_rows=50), 1000)
    assert [line.steps for line in made.lines] == [3, 6, 9, 12]
    for line in made.lines:
        assert line.pld == pytest.approx(directly([Mechanism(made.noise_multiplier, 0.05, line.steps)]), rel=2e-3)
    assert 7.9 < made.lines[-1].pld <= 8.0 < made.lines[-1].rdp
    assert plan(config(batch_rows=50, accountant="rdp"), 1000).lines[-1].rdp <= 8.0


@pytest.mark.slow
def test_a_plan_with_stages_is_that_of_the_worst_cohort() -> None:
    """Of 300 rows in the first of two stages about 60 stay in the buffer, each drawn with chance 15 / 60 later on."""
    run = parse(
        {
            "rounds": 2,
            "train": {"steps": 5},
            "privacy": {"unit": "record", "batch_rows": 30, "noise_multiplier": 1.0},
            "continual": {"stages": [["a"], ["b"]], "buffer": 0.2, "replay": 0.5, "policy": "poisson"},
        }
    )
    made = plan(run, 600)
    assert made.rows == (300, 300)
    first = [Mechanism(1.0, 0.1, 5), Mechanism(1.0, 0.25, 5)]  # new in round 1, kept in round 2
    assert made.lines[-1].pld == pytest.approx(directly(first), rel=2e-3)
    assert made.lines[-1].pld > directly([Mechanism(1.0, 0.05, 5)])  # the rows of the second stage


def test_settings_that_cannot_keep_the_promise_are_refused() -> None:
    with pytest.raises(UserError, match=r"privacy\.delta = 0\.01: must be below 1 / rows"):
        accounting.sample_rate(PrivacyConfig(delta=0.01, batch_rows=10), 100)
    with pytest.raises(UserError, match=r"privacy\.batch_rows = 101.*100 rows"):
        accounting.sample_rate(PrivacyConfig(batch_rows=101), 100)
    assert accounting.sample_rate(PrivacyConfig(batch_rows=100), 100) == 1


@pytest.mark.slow
def test_noise_that_breaks_the_budget_in_its_first_round_is_refused_with_what_would_do() -> None:
    run = config(rounds=8, batch_rows=50, noise_multiplier=0.3)
    with pytest.raises(UserError) as error:
        sampling.check(run, [[4000], [500], [1000]])
    said = re.fullmatch(
        r"privacy\.noise_multiplier = 0\.3: epsilon after round 1 would be (\S+), above privacy\.epsilon = 8; "
        r"at least (\S+) keeps it for all 8 rounds",
        str(error.value),
    )
    assert said, str(error.value)
    assert float(said[1]) == pytest.approx(directly([Mechanism(0.3, 0.1, 3)]), rel=5e-3)  # the client of 500 rows
    enough = float(said[2])
    assert directly([Mechanism(enough, 0.1, 24)]) <= 8.0 < directly([Mechanism(0.98 * enough, 0.1, 24)])
    sampling.check(config(rounds=8, batch_rows=50, noise_multiplier=enough), [[4000], [500], [1000]])
    sampling.check(config(rounds=8, batch_rows=50), [[500]])  # noise that is found is enough


@pytest.mark.slow
def test_the_round_that_is_named_is_the_first_that_a_client_has_rows_for() -> None:
    stages = {"stages": [["a"], ["b"]]}
    keys = {"unit": "record", "batch_rows": 50, "noise_multiplier": 0.2}
    run = parse({"rounds": 6, "train": {"steps": 3}, "privacy": keys, "continual": stages})
    with pytest.raises(UserError, match="epsilon after round 4 would be"):
        sampling.check(run, [[0, 100]])


@pytest.mark.slow
def test_noise_that_does_not_last_is_a_warning_that_says_how_long() -> None:
    run = config(rounds=8, batch_rows=50, noise_multiplier=0.6)
    clients = [[4000], [500]]
    sampling.check(run, clients)
    (line,) = sampling.short_budget(run, clients)
    said = re.search(r"lasts for (\d) of 8 rounds at a client of 500 rows, which then stops; at least (\S+) ", line)
    assert said, line
    spent_after = [directly([Mechanism(0.6, 0.1, 3 * rounds)]) for rounds in (int(said[1]), int(said[1]) + 1)]
    assert spent_after[0] <= 8.0 < spent_after[1]
    assert sampling.short_budget(config(rounds=8, batch_rows=50, noise_multiplier=float(said[2])), clients) == []
    assert sampling.short_budget(config(rounds=8, batch_rows=50), clients) == []


@pytest.mark.slow
def test_whose_rows_pay_most_is_found_among_many() -> None:
    """Over epochs fewer rows are not always dearer: 65 rows take two steps of 64, and 64 rows one."""
    run = parse({"rounds": 2, "train": {"epochs": 1.0}, "privacy": {"unit": "record", "batch_rows": 64}})
    clients = [[rows] for rows in (900, 64, 300, 65, 100, 500, 64)]
    costs = [directly([Mechanism(1.0, 64 / rows, 2 * math.ceil(rows / 64))]) for (rows,) in clients]
    assert sampling.worst(run, clients) == int(np.argmax(costs)) == 3


# -- the ledger -------------------------------------------------------------------------------------


def entry(number: int, request: str = "r", run: str = "run", partition: str = "", **rates: float) -> Entry:
    return Entry(run, number, request, 1.0, 30, rates or {"all": 0.05}, partition)


def filled(*entries: Entry) -> Ledger:
    ledger = Ledger()
    for each in entries:
        ledger = charge(ledger, each)
    return ledger


@pytest.mark.slow
def test_a_release_costs_once_and_another_one_again() -> None:
    once = filled(entry(1))
    assert charge(once, entry(1)) is once
    assert spent(once, DELTA).epsilon == pytest.approx(directly([Mechanism(1.0, 0.05, 30)]), rel=2e-3)
    for other in (entry(1, "other"), entry(2), entry(1, run="again")):
        twice = spent(charge(once, other), DELTA)
        assert twice.steps == 60
        assert twice.epsilon == pytest.approx(directly([Mechanism(1.0, 0.05, 60)]), rel=2e-3)
    with pytest.raises(RuntimeError, match="round 1"):
        charge(once, entry(1)._replace(noise_multiplier=0.5))


@pytest.mark.slow
def test_rows_pay_for_what_their_own_cohort_met() -> None:
    """A row of stage 1 is drawn often while new and seldom from the buffer; one of stage 2 is not drawn before."""
    ledger = filled(
        entry(1, partition="p", one=0.1), entry(2, partition="p", one=0.02, two=0.1), entry(3, all=0.1, run="before")
    )
    first = [Mechanism(1.0, 0.1, 30), Mechanism(1.0, 0.02, 30), Mechanism(1.0, 0.1, 30)]
    second = [Mechanism(1.0, 0.1, 60)]
    whole = spent(ledger, DELTA)
    assert whole.epsilon == pytest.approx(max(directly(first), directly(second)), rel=2e-3)
    assert whole.epsilon > directly(second)
    assert (whole.steps, whole.sample_rate, whole.noise_multiplier) == (90, 0.1, 1.0)


def test_cohorts_of_two_partings_do_not_hide_behind_each_other() -> None:
    """The row that was busy in both runs is in neither run's sum of quiet cohorts."""
    ledger = filled(
        entry(1, partition="by skill", a=0.1, b=0.01), entry(1, run="later", partition="by site", c=0.01, d=0.1)
    )
    assert spent(ledger, DELTA).epsilon == pytest.approx(directly([Mechanism(1.0, 0.1, 60)]), rel=2e-3)


def test_an_empty_ledger_has_spent_nothing() -> None:
    assert spent(Ledger(), DELTA)[:2] == (0.0, 0.0)


@pytest.mark.slow
def test_a_client_stops_before_its_budget_breaks(tmp_path: Path) -> None:
    path, settings_ = tmp_path / "ledger.json", PrivacyConfig(epsilon=3.5)
    paid = 0
    while spent(charge(ledger.load_ledger(path), entry(paid + 1)), DELTA).epsilon <= 3.5:
        bill = charge_file(path, entry(paid + 1), settings_)
        paid += 1
        assert bill.epsilon == pytest.approx(directly([Mechanism(1.0, 0.05, 30 * paid)]), rel=2e-3)
    assert paid > 1
    with pytest.raises(BudgetSpent, match=r"of 3\.5"):
        charge_file(path, entry(paid + 1), settings_)
    assert len(ledger.load_ledger(path).entries) == paid  # what was refused is not charged
    assert epsilon([Mechanism(1.0, 0.05, 30 * (paid + 1))], DELTA) > 3.5
    assert charge_file(path, entry(paid), settings_).epsilon == bill.epsilon  # the same release again is free


def test_the_looser_accountant_stops_sooner(tmp_path: Path) -> None:
    tight, loose = (epsilon([Mechanism(1.0, 0.05, 30)], DELTA, kind) for kind in ("pld", "rdp"))
    between = (tight + loose) / 2
    charge_file(tmp_path / "a.json", entry(1), PrivacyConfig(epsilon=between))
    with pytest.raises(BudgetSpent):
        charge_file(tmp_path / "b.json", entry(1), PrivacyConfig(epsilon=between, accountant="rdp"))


_VISIT = """
import sys, time
from pathlib import Path
from apiary.config.schema import PrivacyConfig
from apiary.privacy.ledger import Entry, charge_file
charge_file(Path(sys.argv[1]), Entry("run", int(sys.argv[2]), "r", 1.0, 30, {"all": 0.05}), PrivacyConfig(epsilon=50.0))
print("charged", flush=True)
time.sleep(600)  # training
"""


@pytest.mark.slow
def test_a_charge_outlives_a_kill_in_the_middle_of_training(tmp_path: Path) -> None:
    path = tmp_path / "ledger.json"
    for number in (1, 2):
        command = [sys.executable, "-c", _VISIT, path, str(number)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None and child.stdout.readline() == "charged\n"
            child.send_signal(signal.SIGKILL)
    kept = ledger.load_ledger(path)
    assert kept == filled(entry(1), entry(2))
    settings_ = PrivacyConfig(epsilon=50.0)
    assert charge_file(path, entry(2), settings_).steps == 60  # the run goes on: the same release
    assert charge_file(path, entry(2, "another adapter"), settings_).steps == 90


_VISITS = """
import sys
from pathlib import Path
from apiary.config.schema import PrivacyConfig
from apiary.privacy.ledger import Entry, charge_file
for number in range(5):
    entry = Entry(sys.argv[2], number, "r", 1.0, 30, {"all": 0.05})
    charge_file(Path(sys.argv[1]), entry, PrivacyConfig(epsilon=1e6, accountant="rdp"))
"""


@pytest.mark.slow
def test_two_processes_lose_no_charge(tmp_path: Path) -> None:
    path = tmp_path / "ledger.json"
    children = [subprocess.Popen([sys.executable, "-c", _VISITS, path, run]) for run in "ab"]
    assert [child.wait() for child in children] == [0, 0]
    assert len(ledger.load_ledger(path).entries) == 10


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}",
        '{"schema": 9, "entries": []}',
        '{"schema": 1, "entries": [{"run": "a"}]}',
        '{"schema": 1, "entries": [{"run": "a", "round": 1, "request": "r", "noise_multiplier": -1.0, "steps": 3, '
        '"rates": {"all": 0.5}, "partition": ""}]}',
        '{"schema": 1, "entries": [{"run": "a", "round": 1, "request": "r", "noise_multiplier": NaN, "steps": 3, '
        '"rates": {"all": 0.5}, "partition": ""}]}',
        "[1]",
    ],
)
def test_a_broken_ledger_is_never_an_empty_one(tmp_path: Path, content: str) -> None:
    path = tmp_path / "ledger.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"ledger\.json"):
        charge_file(path, entry(1), PrivacyConfig())
    assert path.read_text() == content


def test_a_ledger_that_went_missing_is_never_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "ledger.json"
    key = ledger.open_key(path)
    assert ledger.open_key(path) == key
    charge_file(path, entry(1), PrivacyConfig())
    path.unlink()
    for begin in (lambda: charge_file(path, entry(2), PrivacyConfig()), lambda: ledger.open_key(path)):
        with pytest.raises(UserError, match="is gone"):
            begin()
    assert not path.exists()


# -- secret noise -----------------------------------------------------------------------------------


def test_the_key_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "own" / KEY_FILE
    key = load_key(path)
    assert len(key) == 32
    assert load_key(path) == key
    assert load_key(tmp_path / KEY_FILE) != key
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert os.listdir(path.parent) == [KEY_FILE]
    path.write_bytes(key[:31])
    with pytest.raises(UserError, match="31 bytes"):
        load_key(path)


def test_a_request_is_known_by_all_that_makes_it() -> None:
    base = ("run", 1, "adapter", "corpus", "config")
    digests = {request_digest(KEY, *base), request_digest(bytes(32), *base)}
    digests |= {request_digest(KEY, *base[:i], new, *base[i + 1 :]) for i, new in enumerate(["x", 2, "x", "x", "x"])}
    digests |= {request_digest(KEY, "run", 1, "adaptercorpus", "", "config"), request_digest(KEY, "run1", 1, *base[2:])}
    assert len(digests) == 9
    assert request_digest(KEY, *base) == request_digest(KEY, *base)


def test_the_noise_is_standard_normal() -> None:
    draws = SecretNoise(KEY, "noise", "r").normal(400_000)
    assert stats.kstest(draws, "norm").pvalue > 1e-3
    assert abs(draws.mean()) < 4 / math.sqrt(len(draws))
    assert abs(draws.var() - 1) < 4 * math.sqrt(2 / len(draws))
    assert stats.kurtosistest(draws).pvalue > 1e-3
    for lag in (1, 2, 100_000):
        assert abs(np.corrcoef(draws[:-lag], draws[lag:])[0, 1]) < 4 / math.sqrt(len(draws) - lag)
    assert len(np.unique(draws)) == len(draws)


def test_a_stream_repeats_for_its_key_purpose_and_request_alone() -> None:
    def draw(*of: object) -> np.ndarray:
        stream = SecretNoise(*of)
        return np.stack([stream.normal(1000), stream.normal(1000)])

    one = draw(KEY, "noise", "r")
    assert np.array_equal(one, draw(KEY, "noise", "r"))
    others = [draw(bytes(32), "noise", "r"), draw(KEY, "rows", "r"), draw(KEY, "noise", "s"), one[::-1]]
    for other in others:
        assert not np.any(one == other)
        assert abs(np.corrcoef(one[0], other[0])[0, 1]) < 0.13  # 4 deviations


def test_the_stream_is_aes_in_counter_mode_under_a_derived_key() -> None:
    """Against AES-ECB of the counter itself."""
    import hashlib
    import hmac
    import json

    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    derived = hmac.new(KEY, json.dumps(["rows", "r"]).encode(), hashlib.sha256).digest()
    block = Cipher(algorithms.AES(derived), modes.ECB()).encryptor()
    words = b"".join(block.update(number.to_bytes(16, "big")) for number in range(3))
    expected = [(int.from_bytes(words[i : i + 8], "little") >> 11) / 2**53 for i in range(0, 48, 8)]
    stream = SecretNoise(KEY, "rows", "r")
    assert [*stream.uniform(1), *stream.uniform(5)] == expected


def test_each_normal_number_is_made_of_four() -> None:
    """Holohan and Braghin 2021: four by Box and Muller's transform, of eight uniform numbers, added and halved."""
    uniform = SecretNoise(KEY, "noise", "r").uniform(8 * 3).reshape(2, 4, 3)
    for i, draw in enumerate(SecretNoise(KEY, "noise", "r").normal(3)):
        four = [
            math.sqrt(-2 * math.log(1 - uniform[0, j, i])) * math.cos(2 * math.pi * uniform[1, j, i]) for j in range(4)
        ]
        assert draw == pytest.approx(sum(four) / 2, rel=1e-12)


def test_rows_are_drawn_by_themselves_each_at_its_own_rate() -> None:
    stream, rates = SecretNoise(KEY, "rows", "r"), np.repeat([0.05, 0.4], 50)
    drawn = np.zeros((4000, 100), bool)
    for step in drawn:
        step[stream.chosen(rates)] = True
    errors = (drawn.mean(0) - rates) / np.sqrt(rates * (1 - rates) / len(drawn))
    assert np.abs(errors).max() < 4.5
    assert stats.chi2.sf((errors**2).sum(), 100) > 1e-3
    # Sizes are as spread as a sum of independent draws; a shuffle into batches of one size has no spread at all.
    sizes, variance = drawn.sum(1), (rates * (1 - rates)).sum()
    assert abs(sizes.var() / variance - 1) < 5 * math.sqrt(2 / len(sizes))
    pairs = np.corrcoef(drawn.T)[np.triu_indices(100, 1)]
    assert abs(pairs.mean()) < 5 / math.sqrt(len(drawn) * len(pairs))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 50), st.integers(0, 5))
def test_certain_rows_are_always_drawn_and_impossible_ones_never(certain: int, never: int) -> None:
    rates = np.concatenate([np.ones(certain), np.zeros(never)])
    assert SecretNoise(KEY, "rows", str(certain)).chosen(rates).tolist() == list(range(certain))


# -- the command ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_plan_of_a_run_is_printed(small_run: list[str]) -> None:
    keys = with_overrides(small_run, "privacy.unit=record", "privacy.batch_rows=8", "evaluate.clients=false")
    done = apiary("privacy", "plan", *keys)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any("Poisson" in line for line in lines) and any("one row blanked" in line for line in lines)
    rows = int(next(line for line in lines if line.startswith("rows")).split()[1])
    noise = float(next(line for line in lines if line.startswith("noise")).split()[1])
    last = lines[-1].split()
    assert last[:2] == ["3", "6"]
    assert float(last[2]) == pytest.approx(directly([Mechanism(noise, 8 / rows, 6)]), rel=2e-3)
    assert 7.9 < float(last[2]) <= 8 < float(last[3])


def test_a_plan_that_cannot_be_kept_is_refused_in_one_line() -> None:
    assert_refused(apiary("privacy", "plan", "--rows", "1000000"), "privacy.delta", "1e-06")
    assert_refused(apiary("privacy", "plan", "--rows", "20"), "privacy.batch_rows", "20 rows")
    assert_refused(apiary("privacy", "plan", "-s", "data.source=nowhere.jsonl"), "nowhere.jsonl", "--rows")
