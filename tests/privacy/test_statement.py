"""What a private run says that it has spent: the figure of the accountant it names, wherever it is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import dp_accounting
import pytest
from command_line import apiary, with_overrides
from report_pages import Page

from apiary.config import loading
from apiary.core.errors import RunFailed
from apiary.core.messages import Score
from apiary.privacy import statement
from apiary.privacy.ledger import Entry, Ledger, spent
from apiary.report import table_plain
from apiary.tracking import run_directory
from server import evaluation, validation
from simulation.run import simulate

DELTA = 1e-5


def directly(accountant: Any, noise: float, rate: float, steps: int) -> float:
    """By dp_accounting's own accountant."""
    step = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise))
    accountant.compose(dp_accounting.SelfComposedDpEvent(step, steps))
    return float(accountant.get_epsilon(DELTA))


def renyi(noise: float, rate: float, steps: int) -> float:
    return directly(dp_accounting.rdp.RdpAccountant(), noise, rate, steps)


def tight(noise: float, rate: float, steps: int) -> float:
    return directly(dp_accounting.pld.PLDAccountant(), noise, rate, steps)


@pytest.mark.parametrize(("accountant", "reference"), [("pld", tight), ("rdp", renyi)])
def test_a_client_tells_the_figure_of_the_accountant_that_is_named(accountant: Any, reference: Any) -> None:
    ledger = Ledger((Entry("run", 1, "r", 1.0, 30, {"all": 0.05}),))
    assert spent(ledger, DELTA, accountant).epsilon == pytest.approx(reference(1.0, 0.05, 30), rel=2e-3)
    assert spent(ledger, DELTA, accountant).epsilon_rdp == pytest.approx(renyi(1.0, 0.05, 30), rel=1e-9)
    assert renyi(1.0, 0.05, 30) > 1.1 * tight(1.0, 0.05, 30)  # far apart, so that one is not taken for the other


def test_the_server_holds_the_named_figure_against_the_budget() -> None:
    """Between the two figures: a claim by Rényi is over the budget, one by loss distributions is not."""
    ledger = Ledger((Entry("run", 1, "r", 1.0, 30, {"all": 0.05}),))
    between = (renyi(1.0, 0.05, 30) + tight(1.0, 0.05, 30)) / 2
    for accountant, refused in (("pld", False), ("rdp", True)):
        keys = ["privacy.unit=record", f"privacy.epsilon={between}", f"privacy.accountant={accountant}"]
        config = loading.load(None, keys)
        told = spent(ledger, DELTA, config.privacy.accountant)
        if refused:
            with pytest.raises(validation.WireError, match="it has spent epsilon"):
                validation._check_spent(told, config, private=True)
        else:
            validation._check_spent(told, config, private=True)


@pytest.mark.slow
def test_what_was_spent_in_a_round_that_is_not_kept_is_stated(
    small_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss explodes after round 2: its checkpoint goes, its noised changes have left."""
    losses = [2.0, 1.9, 1e5]

    def measure(_: object) -> evaluation.Evaluation:
        return evaluation.Evaluation(Score(losses.pop(0) * 10, 10, 5), None)

    monkeypatch.setattr(evaluation, "on_held_out", lambda *_: measure)
    private = ["privacy.unit=record", "privacy.batch_rows=8", "privacy.noise_multiplier=1.0", "privacy.epsilon=50.0"]
    config = loading.load(None, [*small_run, *private, "evaluate.baselines=[]"])
    with pytest.raises(RunFailed, match="round 2: the loss is"):
        simulate(config, tmp_path)
    assert [path.name for path in run_directory.checkpoints(tmp_path / "checkpoints")] == ["round-0001"]
    stated = statement.read(tmp_path)["clients"]
    assert len(stated) == 3
    for name, told in stated.items():
        charged = json.loads((tmp_path / "clients" / name / "ledger.json").read_text())["entries"]
        assert [entry["round"] for entry in charged] == [1, 2]
        (rate,) = {rate for entry in charged for rate in entry["rates"].values()}
        assert told["epsilon_rdp"] == pytest.approx(
            renyi(1.0, rate, sum(entry["steps"] for entry in charged)), rel=1e-9
        )


@pytest.mark.slow
@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_a_run_its_report_and_its_plan_tell_the_figure_under_its_own_name(
    accountant: str, small_run: list[str], tmp_path: Path
) -> None:
    private = ["privacy.unit=record", "privacy.batch_rows=8", "privacy.noise_multiplier=1.0", "privacy.epsilon=50.0"]
    keys = [*private, f"privacy.accountant={accountant}", "evaluate.baselines=[]", "evaluate.generate=false"]
    config = loading.load(None, with_overrides(small_run, *keys)[1::2])
    metrics = simulate(config, tmp_path / "run")
    account = json.loads((tmp_path / "run" / "ledger.json").read_text())
    assert account == metrics["privacy"] == statement.read(tmp_path / "run")
    names = list(account["clients"])
    (federated,) = (row for row in metrics["table"] if row["method"] == "federated")
    assert federated["tokens"] is None and federated["steps"] > 0  # what is told of a visit is expected rows
    wanted = {}
    for name in names:
        charged = json.loads((tmp_path / "run" / "clients" / name / "ledger.json").read_text())["entries"]
        (rate,) = {rate for entry in charged for rate in entry["rates"].values()}
        wanted[name] = [how(1.0, rate, sum(entry["steps"] for entry in charged)) for how in (tight, renyi)]
        ours = account["clients"][name]
        assert ours["epsilon"] == pytest.approx(wanted[name][accountant == "rdp"], rel=2e-3)
        assert ours["epsilon_rdp"] == pytest.approx(wanted[name][1], rel=1e-9)
    by_pld, by_renyi = (max(figures[which] for figures in wanted.values()) for which in (0, 1))
    claim = statement.rounded_up(account["epsilon"])
    other = statement.rounded_up(by_pld if accountant == "rdp" else by_renyi)
    assert abs(float(claim) - (by_renyi if accountant == "rdp" else by_pld)) < 0.02 < abs(float(claim) - float(other))
    page = Page((tmp_path / "run" / "report.html").read_text()).text
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    ended = table_plain(metrics)
    for text in (statement.sentence(account), page, card, ended):
        assert f"epsilon = {claim} at delta = 1e-05 ({accountant.upper()}" in text
        assert (other in text) == (accountant == "pld")  # Rényi's figure stands beside, and says whose it is
    assert f"Epsilon ({accountant.upper()})" in page and ("By Rényi" in page) == (accountant == "pld")
    planned = apiary("privacy", "plan", *with_overrides(small_run, *keys)).stdout.splitlines()
    assert any(line.split() == ["accountant", f"{accountant},", "at", "delta", "1e-05"] for line in planned)
    assert [float(figure) for figure in planned[-1].split()[2:4]] == pytest.approx([by_pld, by_renyi], abs=2e-3)
