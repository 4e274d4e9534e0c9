# ruff: noqa: RUF001 (a minus as it is shown)
"""The report's section on planted instructions, from a document whose figures are given."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from fake_run import fake_metrics, fake_run
from report_pages import Page

from apiary.core.errors import UserError
from apiary.evaluation import injection as measured
from apiary.report import injection, write_report

KINDS = ("naive", "combined")


def _row(method: str, intruder: str, attack: str, followed: float, right: float, rise: float | None) -> dict[str, Any]:
    ends = [max(followed - 0.1, 0.0), followed + 0.1]
    return {
        "method": method,
        "intruder": intruder,
        "attack": attack,
        "intruder_followed": followed,
        "original_followed": right,
        "loss_rise": rise,
        "ci95": {"intruder_followed": ends, "loss_rise": None if rise is None else [rise - 0.25, rise + 0.25]},
    }


def probe(tuned: float, untuned: float, boundary: str = "structured") -> dict[str, Any]:
    """An intruder with another question succeeds in these shares of all attacks; one with a demand never does."""
    rows = []
    for method, share in (("base", untuned), ("federated", tuned)):
        rows += [_row(method, "demand", attack, 0.0, 0.0, -0.5) for attack in ("none", *KINDS, "all")]
        rows += [
            _row(method, "question", "none", 0.0, 0.4, 0.0),
            _row(method, "question", "naive", share - 0.05, 0.25, 1.0),
            _row(method, "question", "combined", share + 0.05, 0.05, 2.0),
            _row(method, "question", "all", share, 0.15, 1.5),
        ]
    return {"schema": 1, "boundary": boundary, "questions": 60, "rows": rows}


def report(folder: Path, found: dict[str, Any]) -> str:
    fake_run(folder, fake_metrics())
    (folder / "injection.json").write_text(json.dumps(found), encoding="utf-8")
    return Page(write_report(folder).read_text(encoding="utf-8")).text


def test_the_report_has_what_the_probe_found(tmp_path: Path) -> None:
    text = report(tmp_path / "run", probe(tuned=0.2, untuned=0.6))
    section = text.partition("Instructions planted in data")[2]
    assert "60 questions with an instruction planted in the data, in 2 kinds of attack" in section
    assert "prompt.boundary = structured" in section
    assert (
        "An intruder who asks another question is followed by the tuned model less often than by the untuned one "
        "(20.0% against 60.0%)."
    ) in section
    assert (
        "asks another question tuned 20.0% [10.0%, 30.0%] combined: 25.0% [15.0%, 35.0%] "
        "40.0% without, 15.0% under attack +1.500 [+1.250, +1.750]"
    ) in section
    assert "demands a certain word untuned 0.0% [0.0%, 10.0%] none succeeds 0.0% without" in section
    assert "−0.500 [−0.750, −0.250]" in section


def test_a_run_without_a_probe_has_no_such_section(tmp_path: Path) -> None:
    assert "planted in data" not in write_report(fake_run(tmp_path / "run")).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("tuned", "untuned", "said"),
    [
        (0.30, 0.60, "less often than"),
        (0.45, 0.60, "about as often as"),  # the intervals overlap
        (0.60, 0.30, "more often than"),
    ],
)
def test_the_sentence_claims_no_difference_that_the_intervals_do_not_show(
    tuned: float, untuned: float, said: str
) -> None:
    assert f"by the tuned model {said} by the untuned one" in injection.verdict(probe(tuned, untuned))


def test_no_success_and_a_loss_that_is_no_number(tmp_path: Path) -> None:
    found = probe(0.05, 0.05, "plain")
    for row in found["rows"]:
        row["intruder_followed"] = 0.0
        row["loss_rise"] = row["ci95"]["loss_rise"] = None
    text = report(tmp_path / "run", copy.deepcopy(found))
    assert "Neither the tuned nor the untuned model followed an intruder once." in text
    assert "Nothing sets data apart from the question" in text


@pytest.mark.parametrize(("text", "reason"), [("{", "not valid JSON"), ('{"schema": 99}', "no probe")])
def test_a_file_that_is_no_probe_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    folder = fake_run(tmp_path / "run")
    (folder / injection.PROBE_FILE).write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=reason):
        write_report(folder)


def test_the_probe_that_is_measured_is_the_one_that_is_read() -> None:
    ours = (injection._SCHEMA, injection._CLEAN)
    assert ours == (measured._SCHEMA, measured.NO_ATTACK)
