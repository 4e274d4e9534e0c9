"""Inputs that went wrong once, by the commands that they went wrong with; skipped where they are not at hand."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import apiary, assert_refused

pytestmark = pytest.mark.slow


@pytest.fixture
def cases(shared: Path) -> Path:
    folder = shared / "cases"
    if not folder.is_dir():
        pytest.skip("the cases are not here")
    return folder


def _curated(rows: Path, out: Path, *steps: str) -> list[dict[str, str]]:
    done = apiary("curate", rows, "--out", out, "-s", f"curate.steps={json.dumps(steps)}")
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def _warned(*args: str | Path) -> str:
    done = apiary("doctor", *(word for arg in args for word in ("-s", arg)))
    assert done.returncode == 0, done.stderr
    return " ".join(re.findall(r"warning: (.*?)(?=\n  \S|\n\n)", done.stdout, re.DOTALL))


def test_an_address_is_masked_alone_beside_letters_of_any_script(cases: Path, tmp_path: Path) -> None:
    rows = cases / "01-mask-unspaced-scripts" / "rows.jsonl"
    for line, masked in zip(
        rows.read_text(encoding="utf-8").splitlines(), _curated(rows, tmp_path / "o.jsonl", "mask"), strict=True
    ):
        address = r"[\w.]+@[\w.]+(?<=example)|[\uff41-\uff5a]+\uff20[\uff0e\uff41-\uff5a]+"
        said = re.sub(address, "<EMAIL_1>", json.loads(line)["output"], flags=re.ASCII)
        assert masked["output"] == said


@pytest.mark.parametrize("name", ["rows", "control"])
def test_rows_that_differ_in_a_vowel_sign_are_not_the_same(cases: Path, tmp_path: Path, name: str) -> None:
    rows = cases / "02-indic-words" / f"{name}.jsonl"
    kept = _curated(rows, tmp_path / "o.jsonl", "duplicates", "near_duplicates")
    assert len(kept) == len(rows.read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize("buffer", ["1.0", "1.5"])
def test_a_buffer_of_one_row_is_a_slip(cases: Path, tmp_path: Path, buffer: str) -> None:
    done = apiary("simulate", "configs/continual.toml", "--out", tmp_path / "b", "-s", f"continual.buffer={buffer}")
    assert_refused(done, "must be a fraction below 1, such as 0.1, or a whole number of rows from 2")


def test_a_limit_that_leaves_a_site_without_rows_is_warned_of(cases: Path) -> None:
    sites = cases / "08-max-rows-lost-client" / "sites"
    held = ("data.test_fraction=0.1",)
    said = _warned(f"data.source={sites}", "data.partition=natural", *held, "data.max_rows=60", "rounds=2")
    (least,) = re.findall(r"leaves rural_clinic.jsonl 1 of 9 rows, too few to train on; from (\d+) on it keeps 5", said)
    followed = _warned(f"data.source={sites}", "data.partition=natural", *held, f"data.max_rows={least}", "rounds=2")
    assert "too few" not in followed


def test_chats_that_open_alike_are_warned_of(cases: Path) -> None:
    folder = cases / "09-same-opening"
    said = _warned(f"data.source={folder / 'sites'}", "data.partition=natural")
    assert "2 of 360 rows are held out" in said and "leave the turns that they share out of the rows" in said


def test_a_file_name_that_is_not_utf_8_is_one_line(cases: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, cases / "11-file-name-not-utf8" / "make.py", tmp_path / "sites"], check=True)
    source = f"data.source={tmp_path / 'sites'}"
    done = apiary("doctor", "-s", source, "-s", "data.partition=natural")
    assert done.returncode == 2 and r"the name 'H\xf4pital.jsonl' in it is not UTF-8; rename it" in done.stdout
    assert_refused(apiary("simulate", "--out", tmp_path / "n", "-s", source), "is not UTF-8; rename it")
