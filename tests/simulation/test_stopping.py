"""Runs that stop early deliver their best round, by rows that no figure is on; in a simulation and in a deployment."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import LONGEST_S, finish, start, with_overrides
from conftest import instruction_rows, overrides_for
from deployment import SITES, write_rows
from deployment import overrides as deployed
from report_pages import Page
from safetensors.torch import load_file

from apiary.config import loading
from apiary.core.errors import UserError
from apiary.core.messages import Score
from apiary.evaluation import comparison
from apiary.export import export, tuned
from apiary.report import table_plain
from apiary.tracking.console import Lines
from apiary.tracking.event_log import read_events
from apiary.tracking.metrics_file import read_metrics
from client.worker import Worker
from deploy import run_checks
from server.app import make_app
from simulation import engines
from simulation.run import plan, simulate

# A rate at which the loss jumps, so that the best round is none of the last two, whose checkpoints are always there.
JUMPY = ["train.lr=0.05", "train.schedule=constant", "train.steps=4", "data.test_fraction=0.3", "evaluate.samples=0"]
ALONE = ["data.clients=1", "strategy.min_clients=1"]  # one client is the median client, so its loss is what decides
QUIET = ["evaluate.generate=false", "evaluate.max_examples=100"]
STOPS = [*JUMPY, *QUIET, "rounds=20", "evaluate.patience=3", "evaluate.baselines=['base', 'local']"]


def run(folder: Path, overrides: list[str], **more: Any) -> dict[str, Any]:
    return simulate(loading.load(None, overrides), folder, **more)


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def losses_that_decide(folder: Path) -> dict[int, float]:
    """By round, the loss that decides where there is one client or the server does."""
    return {
        event["round"]: event["deciding"]["loss"] if "deciding" in event else event["clients_loss"]
        for event in read_events(folder)
        if event["event"] == "evaluate" and event["round"] > 0
    }


@pytest.mark.parametrize("by", ["clients", "server"])
def test_a_run_that_stops_delivers_and_measures_its_best_round(
    by: str, tmp_path: Path, small_run: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [*small_run, *STOPS, f"evaluate.clients={str(by == 'clients').lower()}", *ALONE]
    folder, stated = tmp_path / "run", Lines(open(tmp_path / "lines", "w", encoding="utf-8"))  # noqa: SIM115
    metrics = run(folder, settings, observers=[stated])
    stated._stream.close()
    losses = losses_that_decide(folder)
    best, last = min(losses, key=lambda number: losses[number]), max(losses)
    assert best == last - 3 < 17  # it stopped, three rounds later
    rows = f"{by}_half"
    assert metrics["delivered"] == {"round": best, "last": last, "best": best, "rows": rows, "kept": ""}

    checkpoint = load_file(folder / "checkpoints" / f"round-{best:04d}" / "adapter.safetensors")
    delivered = adapter_of(folder / "adapter")
    assert len(delivered) == len(checkpoint)
    config = loading.load(folder / "config.toml")
    prepared = plan(config)
    row = {row["method"]: row for row in metrics["table"]}["federated"]
    measured = comparison.measure(prepared.lm, checkpoint, prepared.held_out, config)
    assert row["loss"] == pytest.approx(measured.loss, rel=1e-6)
    in_the_log = [event["loss"] for event in read_events(folder) if event["event"] == "evaluate"]
    assert row["loss"] == pytest.approx(in_the_log[best], rel=1e-6)
    assert row["loss"] != pytest.approx(in_the_log[last], rel=1e-4)
    assert row["steps"] == 4 * best == metrics["table"][1]["steps"]  # as many as made it, alone as well

    whose = "the median client's loss" if by == "clients" else "the loss"
    said = f"Delivered: round {best} of the {last} that were done, the best by {whose} on the half of "
    shown = (tmp_path / "lines").read_text(encoding="utf-8")
    for text in (shown, table_plain(metrics), Page((folder / "report.html").read_text(encoding="utf-8")).text):
        assert said in text and "set apart" in text
    assert f"in {best} rounds" in (folder / "adapter" / "README.md").read_text(encoding="utf-8")
    export.export_run(folder, tmp_path / "handed-on", merge=False)
    assert f"in {best} rounds" in (tmp_path / "handed-on" / "README.md").read_text(encoding="utf-8")


def test_what_a_client_scores_on_is_in_no_figure(
    tmp_path: Path, small_run: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen where it happens: the rows that workers tell a loss of, and those of the table and of the clients' gains."""
    asked: set[str] = set()
    figures: set[str] = set()
    real_corpus, real_prepare = Worker.evaluate, comparison.prepare

    def evaluate(self: Worker, site: Any, payload: Any, number: int = 0) -> Score:
        real = self._rows.corpus

        def corpus(site: Any, part: str, examples: Any) -> Any:
            asked.update(example.turns[0].text for example in examples)
            return real(site, part, examples)

        monkeypatch.setattr(self._rows, "corpus", corpus)
        try:
            return real_corpus(self, site, payload, number)
        finally:
            monkeypatch.setattr(self._rows, "corpus", real)

    def prepare(examples: Any, *more: Any) -> Any:
        figures.update(example.turns[0].text for example in examples)
        return real_prepare(examples, *more)

    monkeypatch.setattr(Worker, "evaluate", evaluate)
    monkeypatch.setattr(comparison, "prepare", prepare)
    run(tmp_path / "run", [*small_run, *STOPS, "rounds=2", "evaluate.baselines=[]"])
    assert len(asked) >= 12 and len(figures) >= 12 and asked.isdisjoint(figures)


def test_without_patience_the_last_round_is_delivered_and_the_best_is_kept(
    tmp_path: Path, small_run: list[str]
) -> None:
    folder = tmp_path / "run"
    metrics = run(folder, [*small_run, *JUMPY, *QUIET, *ALONE, "rounds=9", "evaluate.baselines=[]"])
    losses = losses_that_decide(folder)
    best = min(losses, key=lambda number: losses[number])
    assert best < 9
    told = {"round": 9, "last": 9, "best": best, "rows": "clients", "kept": "adapter-best"}
    assert metrics["delivered"] == told
    assert metrics["table"][0]["loss"] == pytest.approx(metrics["rounds"][9]["loss"], rel=1e-6)
    assert not equal(adapter_of(folder / "adapter"), adapter_of(folder / "adapter-best"))
    opened = tuned.open_tuned(folder / "adapter-best")
    held_out = plan(loading.load(folder / "config.toml")).held_out
    loss = comparison.measure(opened.lm, opened.adapter, held_out, opened.config).loss
    assert loss == pytest.approx(metrics["rounds"][best]["loss"], rel=1e-6)
    text = Page((folder / "report.html").read_text(encoding="utf-8")).text
    by = "the median client's loss on the clients' own held-out rows"
    assert f"Delivered: the last round, 9. Round {best} is the best by {by}" in text
    assert "its adapter is in adapter-best" in text


def test_a_run_that_nothing_could_stop_is_refused(tmp_path: Path, small_run: list[str]) -> None:
    with pytest.raises(UserError, match=r"evaluate\.patience = 2: .* no client has 5 to decide by"):
        run(tmp_path / "run", [*small_run, "evaluate.patience=2"])
    assert not (tmp_path / "run").exists()
    silent = loading.load(None, ["evaluate.patience=2", "evaluate.clients=false"])
    with pytest.raises(UserError, match=r"evaluate\.patience = 2: no rows decide when to stop.*set data\.test, or 0"):
        run_checks.check(silent)
    run_checks.check(loading.load(None, ["evaluate.patience=2"]))  # there the sites tell a loss


@pytest.mark.parametrize("by", ["sites", "server"])
def test_a_deployment_delivers_its_best_round_too(by: str, tmp_path: Path, tiny_model: Path) -> None:
    """The server's own app against three sites in this process."""
    own = tmp_path / "servers.jsonl"
    own.write_text("".join(json.dumps(row) + "\n" for row in instruction_rows(120, seed=9)), encoding="utf-8")
    more = ["evaluate.clients=true"] if by == "sites" else [f"data.test={own}"]
    settings = [*deployed(tiny_model, write_rows(tmp_path / "rows")), *STOPS, *more, "data.test_fraction=0.5"]
    config = loading.load(None, [*settings, "evaluate.baselines=['base']"])
    folder = tmp_path / "run"
    engines.local()(make_app(), config, len(SITES), folder)
    metrics, told = read_metrics(folder), read_metrics(folder)["delivered"]
    assert told["round"] == told["best"] == told["last"] - 3
    assert told["rows"] == ("clients_half" if by == "sites" else "server_half")
    checkpoint = load_file(folder / "checkpoints" / f"round-{told['best']:04d}" / "adapter.safetensors")
    assert len(checkpoint) == len(adapter_of(folder / "adapter"))
    text = Page((folder / "report.html").read_text(encoding="utf-8")).text
    assert f"Delivered: round {told['round']} of the {told['last']} that were done" in text
    if by == "sites":
        assert f"after round {told['round']};" in text and "on these same rows" in text
    else:
        row = {row["method"]: row for row in metrics["table"]}["federated"]
        assert row["loss"] == pytest.approx(metrics["rounds"][told["round"]]["loss"], rel=1e-6)
        deciding = metrics["rounds"][0]["deciding"]["n"]
        assert deciding + row["n"] <= 120 and min(deciding, row["n"]) > 30
        assert row["steps"] == 3 * 4 * told["round"]


@pytest.mark.slow
def test_kill_9_loses_no_best_round(tmp_path: Path, tiny_model: Path, rows_file: Path) -> None:
    settings = [*overrides_for(tiny_model, rows_file), *STOPS, *ALONE, "evaluate.baselines=[]"]
    whole = run(tmp_path / "whole", settings)
    told, folder = whole["delivered"], tmp_path / "broken"
    assert told["best"] < told["last"] - 2
    for number in (told["best"], told["last"] - 1):  # the best is just done; its checkpoint is none of the newest two
        words = ["--resume"] if folder.exists() else with_overrides(settings)
        process = start("simulate", "--quiet", "--out", folder, *words)
        _wait_for(lambda number=number: (folder / "checkpoints" / f"round-{number:04d}").exists(), process)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    done = finish(start("simulate", "--quiet", "--out", folder, "--resume"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((folder / "metrics.json").read_text())["delivered"] == told
    assert equal(adapter_of(folder / "adapter"), adapter_of(tmp_path / "whole" / "adapter"))


def _wait_for(there: Callable[[], bool], process: Any) -> None:
    deadline = time.monotonic() + LONGEST_S
    while not there():
        assert process.poll() is None, process.communicate()[1][-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.005)
