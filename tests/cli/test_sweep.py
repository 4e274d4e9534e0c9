"""`apiary sweep`: what is refused before anything runs, each in its line."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import apiary, assert_refused


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "nothing is varied"),
        (["-s", "train.lr=1e-3"], "nothing is varied"),
        (["-s", "train.lr=1e-3,fast"], "train.lr = 'fast'"),
        (["-s", "train.lrr=1,2"], "did you mean 'train.lr'"),
        (["-s", "train.lr=1e-3,1e-3"], "stands there twice"),
        (["-s", "train.lr=1e-3,3e-3", "-s", "train.lr=6e-3"], "given 2 times"),
        (["-s", "seed=1,2"], "--seeds 5"),
        (["-s", "strategy.name=fedavg,fedavvg"], "strategy.name = 'fedavvg'"),
        (["-s", "train.lr=1e-4..1e-2:log"], "--trials, --runs or --minutes"),
        (["-s", "train.lr=1e-4..1e-2:log", "--search", "grid"], "train.lr is a range"),
        (["-s", "train.lr=1e-3,3e-3", "--search", "best"], "--search best: allowed are grid, tpe"),
        (["-s", "train.lr=1e-3,3e-3", "--minutes", "0"], "--minutes 0"),
        (["-s", "train.lr=1e-3,3e-3", "--resume"], "--resume needs --out"),
        (["nowhere.toml", "-s", "train.lr=1e-3,3e-3"], "'nowhere.toml' does not exist"),
    ],
)
def test_wrong_input_is_one_line_and_nothing_is_written(words: list[str], said: str, tmp_path: Path) -> None:
    out = [] if "--resume" in words else ["--out", tmp_path / "sweep"]
    assert_refused(apiary("sweep", *words, *out), said)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert_refused(apiary("sweep", "-s", "train.lr=1e-3,3e-3", "--out", tmp_path), "is not empty and holds no sweep")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_deployment_runs_no_sweep(tmp_path: Path) -> None:
    """Neither several values nor the rows that a sweep sets apart: its sites agree to one run."""
    kits = ["deploy", "init", tmp_path / "fed", "--server", "localhost:18443", "--site", "north"]
    assert apiary(*kits).returncode == 0
    server = tmp_path / "fed" / "server"
    for text in ("train.lr=1e-3,3e-3", "train.lr=1e-4..1e-2:log", "strategy.name=fedavg,median"):
        assert_refused(apiary("deploy", "submit", server, "-s", text), "sweep", "simulation")
    assert_refused(apiary("deploy", "submit", server, "-s", "evaluate.set_apart=true"), "evaluate.set_apart", "sweep")
    assert_refused(apiary("sweep", server, "-s", "train.lr=1e-3,3e-3"), "is a folder")
