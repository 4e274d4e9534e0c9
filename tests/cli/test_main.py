"""The command line as a person meets it: exit codes, one clear line, nothing half-written."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import ROOT, apiary, assert_refused, with_overrides


def test_a_table_is_shown_with_its_methods_and_their_options() -> None:
    shown = apiary("config", "strategy").stdout
    assert "multi_krum: The mean of the clients" in shown and "byzantine = needed" in shown
    assert "base_rank = 0" in shown and "scaling" not in shown and "train.lr" not in shown
    every = apiary("config").stdout
    assert "train.lr = 0.006" in every and "multi_krum:" not in every and "apiary config strategy" in every
    assert_refused(apiary("config", "strateg"), "'strateg'", "did you mean 'strategy'?")
    assert_refused(apiary("config", "flora"), "'flora' is no key", "apiary config strategy.name")


def test_all_problems_have_a_line_each() -> None:
    done = apiary("simulate", "-s", "rounds=0", "-s", "train.lr=fast")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "apiary: rounds = 0: must be a whole number, at least 1",
        "apiary: train.lr = 'fast': must be a number, above 0",
    ]


def test_unknown_key_offers_the_nearest(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert_refused(apiary("simulate", "-s", "train.lrr=1", "--out", out), "train.lrr", "train.lr")
    assert not out.exists()


BAD = [
    (["rounds=zero"], ["rounds", "zero"]),
    (["rounds=0"], ["rounds = 0", "1"]),
    (["data.source=nowhere.jsonl"], ["nowhere.jsonl"]),
    (["model.name=no/such-model"], ["no/such-model"]),
    (["model.device=cuda"], ["cuda"]),
    (["data.clients=5000"], ["5000"]),
    (["prompt.template=chat"], ["chat", "template"]),
    (["strategy.name=fedavvg"], ["fedavg"]),
    (['train.penalties=[{name="fedprox"}]'], ["mu"]),
    (["simulate.engine=rayy"], ["ray"]),
    (["strategy.min_clients=9"], ["min_clients", "3 clients"]),
    (["prompt.max_tokens=8"], ["max_tokens"]),
]


@pytest.mark.parametrize(("extra", "words"), BAD, ids=[b[0][0] for b in BAD])
def test_bad_setting(tmp_path: Path, small_run: list[str], extra: list[str], words: list[str]) -> None:
    out = tmp_path / "run"
    done = apiary("simulate", "--quiet", *with_overrides(small_run, *extra), "--out", out)
    assert_refused(done, *words)
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["rows.jsonl"]),
        ('{"a": 1}\n', ["rows.jsonl"]),
        ("not json\n", ["rows.jsonl", "1"]),
        ('{"instruction": "x", "output": ""}\n', ["rows.jsonl"]),
    ],
)
def test_malformed_data(tmp_path: Path, small_run: list[str], text: str, words: list[str]) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text(text)
    assert_refused(
        apiary("simulate", "--quiet", *with_overrides(small_run, f"data.source={data}"), "--out", tmp_path / "run"),
        *words,
    )


def test_template_without_a_response_slot(tmp_path: Path, small_run: list[str]) -> None:
    template = tmp_path / "template.txt"
    template.write_text("Question: {instruction}\n")
    done = apiary(
        "simulate", "--quiet", *with_overrides(small_run, f"prompt.template={template}"), "--out", tmp_path / "run"
    )
    assert_refused(done, "{response}")


def test_used_folder_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert_refused(apiary("simulate", "--quiet", "--out", tmp_path), "--resume")
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_nothing_but_a_run_is_gone_on_with(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert_refused(apiary("simulate", "--resume", "--out", tmp_path), "holds no run", "other files")
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    assert_refused(apiary("simulate", "--resume"), "--out")


def test_resume_begins_a_run_where_there_is_none(tmp_path: Path, small_run: list[str]) -> None:
    """And goes on with it when the same command comes again."""
    settings = with_overrides(small_run, "rounds=1", "evaluate.generate=false", "evaluate.baselines=[]")
    command = ("simulate", "--quiet", *settings, "--resume", "--out", tmp_path / "new")
    done = apiary(*command)
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in (tmp_path / "new" / "log.jsonl").read_text().splitlines()]
    assert [event["resumed"] for event in events if event["event"] == "start"] == [0]
    assert [event["round"] for event in events if event["event"] == "round"] == [1]
    assert apiary(*command).returncode == 0
    events = [json.loads(line) for line in (tmp_path / "new" / "log.jsonl").read_text().splitlines()]
    assert [event["round"] for event in events if event["event"] == "round"] == [1]
    other = apiary(*command, "-s", "seed=9")
    assert_refused(other, "--resume", "differs", "seed")


@pytest.mark.slow
def test_file_size_limit_stands_in_for_a_full_disk(tmp_path: Path, small_run: list[str]) -> None:
    """Past RLIMIT_FSIZE writes fail with EFBIG, as with ENOSPC on a full disk: one line, exit code 1, no torn files."""
    out = tmp_path / "run"
    script = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000));"
        "from apiary.cli.main import main; sys.argv = ['apiary', *sys.argv[1:]]; main()"
    )
    args = ["simulate", "--quiet", *with_overrides(small_run), "--out", str(out)]
    # Without what tells a child to be measured: coverage would write its own file past the limit, too.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    done = subprocess.run(
        [sys.executable, "-c", script, *args], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert_refused(done, code=1)
    assert not list(out.glob("checkpoints/round-*")) and not (out / "adapter").exists()


@pytest.mark.slow
def test_results_can_be_used(tmp_path: Path, small_run: list[str], rows_file: Path, tiny_model: Path) -> None:
    """simulate, then evaluate, chat, export and report on what it left."""
    from transformers import AutoModelForCausalLM

    out = tmp_path / "run"
    done = apiary("simulate", *with_overrides(small_run), "--out", out)
    assert done.returncode == 0, done.stderr
    assert "federated" in done.stdout and "report.html" in done.stdout
    assert len(done.stderr.splitlines()) >= 3  # plain progress lines in a pipe

    table = apiary("evaluate", out, "--data", rows_file)
    assert table.returncode == 0, table.stderr
    assert all(word in table.stdout for word in ("base", "local", "federated", "central"))
    assert "federated minus training alone is" in table.stdout or "too few to tell" in table.stdout
    told = apiary("evaluate", out, "--data", rows_file, "--json")
    rows = {row["method"]: row for row in json.loads(told.stdout)["table"]}
    assert set(rows) == {"base", "local", "federated", "central", "central_serial"}
    assert all(f"{row['loss']:.3f}" in table.stdout for row in rows.values())
    assert set(json.loads(told.stdout)["paired"]) <= set(rows)
    assert [f"warning: {line}" for line in json.loads(told.stdout)["warnings"]] == [
        line for line in told.stderr.splitlines() if line.startswith("warning: ")
    ]
    assert apiary("evaluate", out / "adapter", "--data", rows_file).returncode == 0

    said = apiary("chat", out, "--prompt", "Say the last word: bee hive wax", "--max-new-tokens", "4")
    assert said.returncode == 0, said.stderr
    assert apiary("chat", out, "--max-new-tokens", "2", stdin="hello\nagain\n\n").returncode == 0

    for merge in ([], ["--merge"]):
        to = tmp_path / ("merged" if merge else "plain")
        exported = apiary("export", out, "--to", to, *merge)
        assert exported.returncode == 0, exported.stderr
        assert "base" in (to / "README.md").read_text()
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    (out / "report.html").unlink()
    assert apiary("report", out).returncode == 0 and (out / "report.html").exists()
    assert json.loads((out / "metrics.json").read_text())["schema"] == 1


def test_evaluate_says_what_is_missing(tmp_path: Path, rows_file: Path) -> None:
    assert_refused(apiary("evaluate", tmp_path, "--data", rows_file), "holds no adapter")


def test_the_version_names_what_all_machines_of_a_deployment_need_alike() -> None:
    done = apiary("--version")
    names = ("apiary", "flwr", "torch")
    assert done.returncode == 0
    assert re.findall(r"\w+ (\d[^ ,)\n]*)", done.stdout) == [importlib.metadata.version(name) for name in names]
