"""Whose a run directory is, and which run it takes: the same in a simulation and in a deployment."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from apiary.config import loading, resuming
from apiary.config.schema import RunConfig
from apiary.core import files
from apiary.core.errors import UserError
from apiary.tracking import run_directory
from apiary.tracking.run_directory import check_folder, claim


def test_a_directory_made_for_nothing_goes_again_and_any_other_stays(tmp_path: Path) -> None:
    with claim(tmp_path / "runs" / "one"):
        assert (tmp_path / "runs" / "one").is_dir()
    assert not (tmp_path / "runs").exists()
    (tmp_path / "mine").mkdir()
    with claim(tmp_path / "mine"):
        pass
    with claim(tmp_path / "two"):
        (tmp_path / "two" / "log.jsonl").touch()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["log.jsonl", "mine", "two"]


def test_a_second_claim_is_refused_in_one_line_and_does_not_end_the_first(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with claim(folder):
        for _ in range(2):
            with pytest.raises(run_directory.StillGoing, match="a run still goes on in it") as told, claim(folder):
                pass
            assert "\n" not in str(told.value) and "choose another --out" in str(told.value)


def test_where_there_are_no_locks_the_run_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_flock", lambda handle: False)
    with claim(tmp_path / "run") as warnings:
        assert len(warnings) == 1 and "has no locks" in warnings[0]


def begun(folder: Path, config: RunConfig) -> Path:
    folder.mkdir()
    (folder / "config.toml").write_text(config.to_toml())
    return folder


def checkpoint(folder: Path, number: int, index: str) -> None:
    place = folder / "checkpoints" / f"round-{number:04d}"
    place.mkdir(parents=True)
    (place / "state.json").write_text(index)


def made_by(*overrides: str) -> str:
    return json.dumps({"made_by": loading.load(None, overrides).to_json()})


@pytest.mark.parametrize(
    ("key", "line"),
    [
        ("train.lr=0.01", r"train\.lr \(0\.006 then, 0\.01 now\)"),
        ("rounds=20", r"rounds \(12 then, 20 now\)"),
        ("evaluate.patience=2", r"evaluate\.patience \(0 then, 2 now\)"),
        ("data.test=other.jsonl", r'data\.test \(unset then, "other\.jsonl" now\)'),
    ],
)
def test_a_run_and_its_checkpoint_are_taken_by_no_other_configuration(tmp_path: Path, key: str, line: str) -> None:
    folder, other = begun(tmp_path / "run", RunConfig()), loading.load(None, [key])
    with pytest.raises(UserError, match=f"differs from the run's own in {line}"):
        check_folder(other, folder, resume=True)
    # Its config.toml edited, which `--resume` reads: the checkpoint knows better.
    checkpoint(folder, 3, made_by())
    (folder / "config.toml").write_text(other.to_toml())
    with pytest.raises(UserError, match=f"checkpoint round-0003 was made with another {line}; was config.toml edited"):
        check_folder(other, folder, resume=True)
    (folder / "config.toml").write_text(RunConfig().to_toml())
    check_folder(RunConfig(), folder, resume=True)


def test_the_newest_checkpoint_that_can_be_read_counts(tmp_path: Path) -> None:
    folder = begun(tmp_path / "run", RunConfig())
    checkpoint(folder, 2, made_by())
    checkpoint(folder, 3, '{"made_by": "{')  # torn
    check_folder(RunConfig(), folder, resume=True)
    checkpoint(folder, 10, made_by("seed=1"))
    with pytest.raises(UserError, match="round-0010"):
        check_folder(RunConfig(), folder, resume=True)
    checkpoint(folder, 11, "{}")  # of an earlier version, which did not tell
    check_folder(RunConfig(), folder, resume=True)
    checkpoint(folder, 12, json.dumps({"made_by": '{"key": "of a later version"}'}))
    with pytest.raises(UserError, match="another version"):
        check_folder(RunConfig(), folder, resume=True)


CHANGED = {
    "train.threads": "2",
    "strategy.deadline_s": "60.0",
    "strategy.join_timeout_s": "5.0",
    "evaluate.baselines": "[]",
    "evaluate.samples": "0",
    "simulate.engine": "ray",
    "simulate.cpus_per_client": "2",
    "simulate.gpus_per_client": "0.5",
    "log.trackers": '["tensorboard"]',
    "log.project": "other",
}


def test_what_does_not_decide_the_result_may_change(tmp_path: Path) -> None:
    assert set(CHANGED) == resuming.MAY_CHANGE <= {key for key, _, _ in loading.describe()}
    other = loading.load(None, [f"{key}={value}" for key, value in CHANGED.items()])
    assert other != RunConfig()
    folder = begun(tmp_path / "run", RunConfig())
    checkpoint(folder, 1, made_by())
    check_folder(other, folder, resume=True)
