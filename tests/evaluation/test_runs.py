"""Runs of several seeds put together: what `apiary compare` reads, refuses, works out and prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from apiary.config import loading
from apiary.core.errors import UserError
from apiary.data.examples import Example
from apiary.data.turns import Turn
from apiary.evaluation.row_losses import read_row_losses, write_row_losses
from apiary.evaluation.runs import compare_runs, lines

TOKENS = np.arange(1.0, 81.0)


def row(number: int) -> Example:
    return Example((Turn("user", f"question {number}"), Turn("assistant", "answer")), {"skill": "x"})


def run(folder: Path, seed: int, better: float, *settings: str, rows: int = 80, first: int = 0) -> Path:
    """A run of 80 rows whose federated loss is `better` below its local one, but for noise of each row."""
    folder.mkdir()
    (folder / "config.toml").write_text(loading.load(None, [f"seed={seed}", *settings]).to_toml())
    tokens, noise = TOKENS[:rows], np.random.default_rng(seed).normal(0, 0.1, rows)
    nats = {"base": 3.0 * tokens, "local": 2.0 * tokens, "federated": (2.0 - better + noise) * tokens}
    write_row_losses(folder, [row(first + number) for number in range(rows)], tokens, nats)
    return folder


def test_seeds_with_rows_of_their_own_are_compared_as_student_would(tmp_path: Path) -> None:
    better = (0.3, 0.1, 0.25)
    folders = [run(tmp_path / str(n), n, value, first=100 * n) for n, value in enumerate(better)]
    found = compare_runs(folders)
    losses = [read_row_losses(folder) for folder in folders]
    each = [float((run.nats["federated"] - run.nats["local"]).sum() / run.tokens.sum()) for run in losses]
    pair = found["paired"]["local"]
    assert pair["difference"] == pytest.approx(np.mean(each)) and pair["sd"] == pytest.approx(np.std(each, ddof=1))
    assert pair["ci95"] == pytest.approx(stats.t.interval(0.95, 2, np.mean(each), stats.sem(each)))
    assert pair["over"] == "seeds and rows" and list(found["paired"]) == ["base", "local"]
    assert (found["seeds"], found["rows"]) == ([0, 1, 2], [80, 80, 80])
    table = {row["method"]: row for row in found["table"]}
    assert table["base"] == pytest.approx({"method": "base", "loss": 3.0, "lowest": 3.0, "highest": 3.0})
    federated = [float(run.nats["federated"].sum() / run.tokens.sum()) for run in losses]
    assert (table["federated"]["lowest"], table["federated"]["highest"]) == (min(federated), max(federated))


def test_rows_are_known_again_by_their_text_alone(tmp_path: Path) -> None:
    """Runs that measure the same rows have another interval than runs of the same numbers on rows of their own."""
    same = [run(tmp_path / f"same {n}", n, 0.2) for n in range(3)]
    apart = [run(tmp_path / f"apart {n}", n, 0.2, first=100 * n) for n in range(3)]
    one, other = (compare_runs(folders)["paired"]["local"] for folders in (same, apart))
    assert one["difference"] == other["difference"] and one["ci95"] != pytest.approx(other["ci95"])
    assert read_row_losses(same[0]).rows == read_row_losses(same[1]).rows
    assert "question" not in (same[0] / "row_losses.json").read_text()


def test_what_is_printed_has_the_numbers_and_what_they_are_over(tmp_path: Path) -> None:
    found = compare_runs([run(tmp_path / str(n), n, 0.2, first=100 * n) for n in range(2)])
    text = "\n".join(lines(found))
    pair = found["paired"]["local"]
    for number in (pair["difference"], *pair["ci95"]):
        assert f"{number:+.3f}".replace("-", "−") in text  # noqa: RUF001
    assert "means over 2 seeds, nats per response token; intervals are over seeds and rows" in text
    assert "of 2 seeds the spread between seeds is hardly known" in text
    few = compare_runs([run(tmp_path / f"few {n}", n, 0.2, rows=59) for n in range(2)])
    assert few["paired"]["local"]["ci95"] is None
    assert "no intervals: a run has 59 held-out rows, fewer than 60" in "\n".join(lines(few))


def test_a_loss_that_is_no_number_stays_one(tmp_path: Path) -> None:
    folder = run(tmp_path / "a", 0, 0.1)
    values: dict[str, Any] = json.loads((folder / "row_losses.json").read_text())
    values["nats"]["federated"][3] = None
    (folder / "row_losses.json").write_text(json.dumps(values))
    assert np.isnan(read_row_losses(folder).nats["federated"][3])
    found = compare_runs([folder, run(tmp_path / "b", 1, 0.1)])
    assert found["paired"]["local"]["ci95"] is None and "–" in "\n".join(lines(found))  # noqa: RUF001


def test_what_cannot_be_compared_is_refused_in_one_line(tmp_path: Path) -> None:
    one, same = run(tmp_path / "one", 0, 0.2), run(tmp_path / "same", 0, 0.2)
    other = run(tmp_path / "other", 1, 0.2, "train.lr=1e-4", "rounds=3")
    logged = run(tmp_path / "logged", 2, 0.2, "simulate.engine=ray")
    assert compare_runs([one, logged])["seeds"] == [0, 2]  # the engine changes no result
    with pytest.raises(UserError, match="at least two runs"):
        compare_runs([one])
    with pytest.raises(UserError, match=r"both have seed = 0: .* \(-s seed=N\)"):
        compare_runs([one, same])
    with pytest.raises(UserError, match=r"differ in rounds, train\.lr; compare runs that differ in the seed alone"):
        compare_runs([one, other])
    with pytest.raises(UserError, match=r"holds no run \(no config\.toml\)"):
        compare_runs([one, tmp_path])
    (logged / "row_losses.json").unlink()
    with pytest.raises(UserError, match=r"has no row_losses\.json: .*--resume, and a deployment keeps no losses"):
        compare_runs([one, logged])
    for broken in ("no", "[]", '{"schema": 1, "rows": ["a"], "tokens": [], "nats": {}}', '{"schema": 2}'):
        (logged / "row_losses.json").write_text(broken)
        with pytest.raises(UserError, match=r"row_losses\.json'? (cannot be read|has another shape)"):
            compare_runs([one, logged])
