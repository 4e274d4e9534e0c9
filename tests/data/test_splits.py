"""What a split or a limit leaves far from what was asked is warned of, and the advice, followed, helps."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from apiary.config import loading
from apiary.config.schema import RunConfig
from apiary.core.errors import UserError
from apiary.data import splits
from apiary.data.federation import federate


def run(source: Path, *settings: str) -> RunConfig:
    return loading.load(None, [f"data.source={source}", "data.partition=natural", *settings])


def remarks(config: RunConfig) -> list[str]:
    return splits.remarks(federate(config.data, 0), config)


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def chat(number: int, *, greeting: bool = True) -> dict[str, Any]:
    """A chat that opens as nearly all others of the hotline do, or the same without its greeting."""
    texts = ["Hello" if number % 40 else f"Good day {number}", "What is your question?", f"Case {number}?", "amber"]
    kept = texts if greeting else texts[2:]
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(kept)]}


def pair(number: int) -> dict[str, str]:
    return {"instruction": f"Case {number}?", "output": "amber"}


@pytest.fixture
def sites(tmp_path: Path) -> Path:
    for site in range(3):
        write(tmp_path / "sites" / f"site{site}.jsonl", [chat(120 * site + i) for i in range(120)])
    return tmp_path / "sites"


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.3])
def test_chats_that_open_alike_are_told_and_the_advice_helps(sites: Path, fraction: float) -> None:
    setting = f"data.test_fraction={fraction}"
    (line,) = remarks(run(sites, setting))
    assert re.match(
        rf"data.test_fraction = {fraction}: \d+ of 360 rows are held out \(.*%\): 351 of 360 rows open", line
    )
    assert "leave the turns that they share out of the rows" in line
    for site in range(3):
        write(sites / f"site{site}.jsonl", [chat(120 * site + i, greeting=False) for i in range(120)])
    assert remarks(run(sites, setting)) == []
    federation = federate(run(sites, setting).data, 0)
    assert abs(sum(len(client.test) for client in federation.clients) - 360 * fraction) < 4 * (360 * fraction) ** 0.5


def test_no_fraction_is_advised_where_none_helps(tmp_path: Path) -> None:
    write(tmp_path / "all.jsonl", [chat(1)] * 60)
    for fraction in (0.1, 0.3, 0.5, 0.9, 0.99):
        config = run(tmp_path / "all.jsonl", f"data.test_fraction={fraction}")
        try:
            federation = federate(config.data, 0)
            (line,) = splits.no_test(federation, config) or splits.remarks(federation, config)
        except UserError as error:
            line = str(error)
        assert "60 of 60 rows open with the same question" in line
        assert "leave the turns" in line
        assert "raise" not in line and "lower" not in line


def test_one_question_asked_in_all_rows_needs_other_held_out_rows(tmp_path: Path) -> None:
    write(tmp_path / "all.jsonl", [{"instruction": "Tell a joke.", "output": f"joke {i}"} for i in range(60)])
    write(tmp_path / "held.jsonl", [pair(i) for i in range(9)])
    with pytest.raises(UserError) as error:  # the hash of that question is below a tenth
        federate(run(tmp_path / "all.jsonl").data, 0)
    line = str(error.value)
    assert "set data.test to rows with other questions, and data.test_fraction = 0" in line
    better = run(tmp_path / "all.jsonl", f"data.test={tmp_path / 'held.jsonl'}", "data.test_fraction=0")
    assert remarks(better) == []
    federation = federate(better.data, 0)
    assert (len(federation.clients[0].train), len(federation.test)) == (60, 9)


@pytest.mark.parametrize("rows", [3, 12, 40, 1000])
@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.1, 0.5])
def test_rows_of_their_own_questions_are_never_remarked_on(tmp_path: Path, rows: int, fraction: float) -> None:
    """Four standard deviations: chance errs once in 15,000, and the hash of these rows is fixed."""
    write(tmp_path / "all.jsonl", [pair(i) for i in range(rows)])
    assert remarks(run(tmp_path / "all.jsonl", f"data.test_fraction={fraction}")) == []


def test_the_demo_has_nothing_remarkable() -> None:
    config = RunConfig()
    assert splits.remarks(federate(config.data, config.seed), config) == []


def test_a_site_that_a_limit_leaves_nearly_empty_is_told_and_the_advice_helps(tmp_path: Path) -> None:
    for name, start, rows in (("big_a", 0, 600), ("rural_clinic", 1000, 9), ("zone_b", 2000, 600)):
        write(tmp_path / "sites" / f"{name}.jsonl", [pair(start + i) for i in range(rows)])
    (line,) = remarks(run(tmp_path / "sites", "data.max_rows=60", "data.test_fraction=0"))
    assert line.startswith("data.max_rows = 60: leaves rural_clinic.jsonl 1 of 9 rows, too few to train on; from ")
    (advised,) = re.findall(r"from ([\d,]+) on it keeps 5", line)
    better = run(tmp_path / "sites", f"data.max_rows={advised.replace(',', '')}", "data.test_fraction=0")
    assert remarks(better) == []
    assert len(federate(better.data, 0).clients[1].train) >= 5
    (gone,) = remarks(run(tmp_path / "sites", "data.max_rows=3", "data.test_fraction=0"))[1:2]
    assert "leaves rural_clinic.jsonl 0 of 9 rows" in gone
