"""Whole sweeps with real runs in processes of their own."""

from __future__ import annotations

import json
import os
import shlex
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import LONGEST_S, apiary, assert_refused, finish, start, with_overrides
from conftest import instruction_rows, overrides_for
from report_pages import Page
from safetensors.torch import load_file

from apiary.config import loading
from apiary.core.errors import UserError
from apiary.data.federation import decides
from apiary.evaluation.row_losses import _digest, read_row_losses
from apiary.tracking.event_log import read_events
from client import handlers
from simulation.run import simulate
from simulation.sweep import definition
from simulation.sweep.definition import Budget
from simulation.sweep.run import sweep

QUIET = ["rounds=2", "evaluate.generate=false", "evaluate.max_examples=200", "data.test_fraction=0.5"]
VARIED = ["train.lr=5e-3,2e-2", "strategy.server_optimizer=none,{name='nesterov', lr=0.7}"]
LEAST = ["evaluate.baselines=['base']"]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> list[str]:
    """Overrides of all runs, on enough rows for intervals."""
    rows = tmp_path_factory.mktemp("sweep-rows") / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in instruction_rows(400)), encoding="utf-8")
    taken = ("rounds=", "evaluate.max_examples=", "train.lr=", "strategy.server_optimizer=")
    return [*(text for text in overrides_for(tiny_model, rows) if not text.startswith(taken)), *QUIET]


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, settings: list[str]) -> tuple[Path, dict[str, Any]]:
    """A grid of two rates and two server optimizers with two seeds, and a confirmation with two more."""
    folder = tmp_path_factory.mktemp("sweep") / "grid"
    asked = definition.make(None, [*settings, *VARIED], seeds=2)
    return folder, sweep(asked, folder, confirm=2)


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_each_run_is_the_run_of_its_configuration_bit_for_bit(
    swept: tuple[Path, dict[str, Any]], settings: list[str], tmp_path: Path
) -> None:
    """With a worker's base and another run's baselines as with a process of its own."""
    folder, found = swept
    assert [row["values"] for row in found["table"]] == [
        {"train.lr": lr, "strategy.server_optimizer": server}
        for lr in (5e-3, 2e-2)
        for server in ("none", {"name": "nesterov", "lr": 0.7})
    ]
    own = ["train.lr=2e-2", "strategy.server_optimizer={name='nesterov', lr=0.7}", "seed=1", "evaluate.set_apart=true"]
    metrics = simulate(loading.load(None, [*settings, *own]), tmp_path / "alone")
    run = folder / "runs" / "s0003-seed1"
    assert equal(adapter(run), adapter(tmp_path / "alone"))
    swept_metrics = json.loads((run / "metrics.json").read_text())
    assert swept_metrics["table"] == metrics["table"] and swept_metrics["deciding"] == metrics["deciding"]
    assert (run / "report.html").exists()


@pytest.mark.slow
def test_rows_that_choose_are_in_no_figure_and_their_loss_is_the_servers(
    swept: tuple[Path, dict[str, Any]],
) -> None:
    folder, found = swept
    run = folder / "runs" / "s0000-seed0"
    config = loading.load(run / "config.toml")
    held_out = handlers.federation(config.to_json()).test
    choosing, figures = ({_digest(row) for row in held_out if decides(row) == which} for which in (True, False))
    assert set(read_row_losses(run).rows) == figures and choosing and not choosing & figures
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["deciding"]["n"] == len(choosing) == found["rows"]["choosing"]
    last = [event for event in read_events(run) if event["event"] == "evaluate"][-1]
    assert metrics["deciding"]["loss"] == pytest.approx(last["deciding"]["loss"], rel=1e-6)


@pytest.mark.slow
def test_the_winner_is_the_least_mean_loss_on_the_rows_that_choose(swept: tuple[Path, dict[str, Any]]) -> None:
    folder, found = swept
    means = []
    for number in range(4):
        runs = [json.loads((folder / "runs" / f"s000{number}-seed{s}" / "metrics.json").read_text()) for s in (0, 1)]
        means.append(sum(run["deciding"]["loss"] for run in runs) / 2)
        row = found["table"][number]
        assert row["choosing"] == pytest.approx(means[-1], rel=1e-12)
        rounds = [done for run in runs for done in run["rounds"][1:]]  # without the untuned model
        assert row["bytes"] == sum(done["bytes_up"] + done["bytes_down"] for done in rounds) / 2
        assert row["seconds"] == pytest.approx(sum(done["seconds"] for done in rounds) / 2)
    assert found["winner"]["number"] == int(np.argmin(means)) != found["reference"]["number"]
    assert found["winner"]["choosing"] == pytest.approx(min(means))


@pytest.mark.slow
def test_paired_differences_are_those_of_the_rows(swept: tuple[Path, dict[str, Any]]) -> None:
    folder, found = swept

    def less(number: int, seeds: tuple[int, ...]) -> float:
        ratios = []
        for seed in seeds:
            ours, other = (read_row_losses(folder / "runs" / f"s000{n}-seed{seed}") for n in (number, 0))
            assert ours.rows == other.rows
            nats = sum(a - b for a, b in zip(ours.nats["federated"], other.nats["federated"], strict=True))
            ratios.append(nats / sum(ours.tokens))
        return float(sum(ratios) / len(ratios))

    assert found["reference"] == {"number": 0, "configured": False}
    for number in (1, 2, 3):
        assert found["table"][number]["paired"]["difference"] == pytest.approx(less(number, (0, 1)), rel=1e-9)
    # The confirmation is of other seeds, and of the winner and the reference alone.
    winner = found["winner"]["number"]
    assert found["confirmed"]["seeds"] == [2, 3]
    assert found["confirmed"]["difference"] == pytest.approx(less(winner, (2, 3)), rel=1e-9)
    fresh = {path.name for path in (folder / "runs").glob("*-seed[23]")}
    assert fresh == {f"s000{n}-seed{s}" for n in (0, winner) for s in (2, 3)}


@pytest.mark.slow
def test_baselines_are_trained_once_for_each_seed_and_rate(swept: tuple[Path, dict[str, Any]]) -> None:
    folder, found = swept
    rates = {found["table"][n]["values"]["train.lr"] for n in (0, found["winner"]["number"])}
    # Three clients alone and two that are pooled, by rate and seed; both server optimizers share them.
    assert found["baselines"] == 5 * (2 * 2 + 2 * len(rates))
    runs = [folder / "runs" / f"s000{n}-seed0" / "baselines" / "central" for n in (0, 1, 2)]
    first, alike, other = (load_file(run / "adapter_model.safetensors") for run in runs)
    assert equal(first, alike) and not equal(first, other)


@pytest.mark.slow
def test_what_is_left_in_the_folder(swept: tuple[Path, dict[str, Any]], settings: list[str]) -> None:
    folder, found = swept
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert found["command"] in page.text and all(line in page.text for line in found["verdict"])
    assert json.loads((folder / "results.json").read_text())["winner"] == found["winner"]
    words = shlex.split(found["command"])
    best = loading.load(folder / "best.toml")
    assert words[:2] == ["apiary", "simulate"] and set(words[2::2]) == {"-s"}
    assert best == loading.load(None, words[3::2]) and best.train.lr == found["winner"]["values"]["train.lr"]
    assert not best.evaluate.set_apart
    again = sweep(definition.make(None, [*settings, *VARIED], seeds=2), folder, confirm=2)  # nothing is left to do
    same = ("table", "winner", "confirmed", "command", "baselines", "runs", "verdict")
    assert {key: again[key] for key in same} == {key: found[key] for key in same}


@pytest.mark.slow
def test_a_killed_sweep_goes_on_with_what_it_has(tmp_path: Path, settings: list[str]) -> None:
    """SIGKILL while the second run is between two rounds: the first is kept, the second goes on, the third begins."""
    long = [text for text in settings if not text.startswith("rounds=")]
    varied = with_overrides([*long, *LEAST, "rounds=10", "train.lr=5e-3,1e-2,2e-2"])
    folder = tmp_path / "killed"
    words = ["sweep", *varied, "--out", folder, "--jobs", "1"]
    process = start(*words)
    half_done = folder / "runs" / "s0001-seed0"
    deadline = time.monotonic() + LONGEST_S
    while not any((half_done / "checkpoints" / f"round-{number:04d}").exists() for number in range(3, 9)):
        assert process.poll() is None and time.monotonic() < deadline, finish(process).stderr
        time.sleep(0.02)
    children = _children(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        assert stream is not None
        stream.close()
    assert children
    while any(map(_lives, children)):  # its processes see that it is gone, and end
        assert time.monotonic() < deadline
        time.sleep(0.05)
    first = folder / "runs" / "s0000-seed0" / "metrics.json"
    stamp = first.stat().st_mtime_ns
    assert not (half_done / "metrics.json").exists() and not (folder / "results.json").exists()

    assert_refused(apiary(*words), "holds a sweep already", "--resume")
    assert_refused(apiary(*words, "-s", "data.max_rows=100", "--resume"), "begun with data.max_rows = unset")
    found = json.loads(apiary("sweep", "--out", folder, "--resume", "--json").stdout)
    assert first.stat().st_mtime_ns == stamp
    assert [row["seeds"] for row in found["table"]] == [[0], [0], [0]]
    starts = [event for event in read_events(half_done) if event["event"] == "start"]
    assert len(starts) == 2 and starts[-1]["resumed"] >= 3
    config = loading.load(None, [*long, *LEAST, "rounds=10", "train.lr=1e-2", "evaluate.set_apart=true"])
    simulate(config, tmp_path / "whole")
    assert equal(adapter(half_done), adapter(tmp_path / "whole"))


def _children(pid: int) -> list[int]:
    """The processes that a process has started, and theirs."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found += [int(path.parent.name), *_children(int(path.parent.name))]
    return found


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_a_search_runs_its_settings_and_a_budget_ends_it(tmp_path: Path, settings: list[str]) -> None:
    pytest.importorskip("optuna")
    texts = [*settings, *LEAST, "train.lr=1e-3..5e-2:log", "adapter.rank=2,4"]
    rest = {"seeds": 1, "pruner": "median", "trials": 4}
    texts = [text for text in texts if text != "adapter.rank=4"]
    budget = Budget(runs=2)
    part = sweep(definition.make(None, texts, **rest), tmp_path / "search", budget=budget, jobs=1)  # type: ignore[arg-type]
    assert part["spent"] == "--runs 2" and part["runs"] == {"begun": 2, "finished": 2}
    assert any("go on with --resume" in line for line in part["warnings"])
    whole = sweep(definition.make(None, texts, **rest), tmp_path / "search", jobs=1)  # type: ignore[arg-type]
    assert whole["runs"]["finished"] == 4
    for key in ("values", "choosing", "loss", "seconds"):  # the two that were there are kept
        assert [row[key] for row in whole["table"][:2]] == [row[key] for row in part["table"]]
    for row in whole["table"]:
        assert 1e-3 <= row["values"]["train.lr"] <= 5e-2 and row["values"]["adapter.rank"] in (2, 4)
    assert whole["winner"]["choosing"] == min(row["choosing"] for row in whole["table"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.source=nowhere.jsonl", "train.lr=1e-3,2e-3"], "nowhere.jsonl"),
        (["evaluate.max_examples=20,200"], "would be measured on other held-out rows"),
        (["prompt.template=plain,alpaca", "prompt.max_tokens=138"], "would be measured on other held-out rows"),
        (["adapter.targets=all-linear,['no_such_layer']"], "no_such_layer"),
    ],
)
def test_what_only_data_and_model_tell_is_refused_before_the_first_run(
    overrides: list[str], words: str, tmp_path: Path, settings: list[str]
) -> None:
    replaced = {text.partition("=")[0] for text in overrides}
    kept = [text for text in settings if text.partition("=")[0] not in replaced]
    with pytest.raises(UserError, match=words):
        sweep(definition.make(None, [*kept, *LEAST, *overrides]), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
