"""Rows that do not fit or cannot be written cost themselves, are told by file and number, and never end a run."""

from __future__ import annotations

import html
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import small_models
import torch
from chat_templates import THOUGHTLESS, talk
from conftest import instruction_rows
from rich.console import Console
from safetensors.torch import load_file

from apiary.config import loading
from apiary.core.errors import UserError
from apiary.data import tokenization
from apiary.data.examples import Example
from apiary.data.federation import is_held_out
from apiary.doctor import examine
from apiary.evaluation import comparison
from apiary.models import adapters
from simulation.run import simulate

LONG = "".join(chr(97 + i * i % 26) for i in range(400))  # more tokens than any limit here
THINKING = "<think>hm</think>bee"


def events_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    events = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [event for event in events if event["event"] == kind]


def doctor(overrides: list[str]) -> tuple[bool, str]:
    out = io.StringIO()
    good = examine(lambda: loading.load(None, overrides), Console(file=out, width=300, highlight=False))
    return good, out.getvalue()


def question(held_out: bool, number: int, tail: str = "") -> str:
    """The `number`-th question with this end that falls on this side of a fifth held out."""
    found: list[str] = []
    i = 0
    while len(found) <= number:
        text = f"Which bee is number {i}?{tail}"
        found += [text] if is_held_out(talk(text, "a"), 0.2) == held_out else []
        i += 1
    return found[number]


@pytest.fixture(scope="module")
def thoughtless(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model with a chat template that takes what stands before `</think>` out of an answer."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("models") / "thoughtless"
    shutil.copytree(tiny_model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = THOUGHTLESS
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def mixed(small_run: list[str], thoughtless: Path, tmp_path: Path) -> list[str]:
    """Three clients: one with bad rows among good ones, one that is all good, one of which nothing can be used."""

    def write(name: str, conversations: list[Example]) -> None:
        rows = ({"messages": [{"role": t.role, "content": t.text} for t in e.turns]} for e in conversations)
        (tmp_path / "rows" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def plain(start: int) -> list[Example]:
        return [talk(question(held_out, start + i), "Maja") for i in range(8) for held_out in (False, True)]

    (tmp_path / "rows").mkdir()
    bad = [
        talk(question(True, 40), "Maja", LONG, "Willy"),  # the first answer fits, the last question does not
        talk(question(True, 41), THINKING),
        talk(question(False, 40), THINKING),
        talk(question(False, 41), LONG),
        talk(question(False, 42, LONG), "Maja"),
    ]
    write("hive", [*plain(0), *bad])
    write("wax", plain(8))
    write("comb", [talk(question(held_out, 50 + i), THINKING) for i in range(5) for held_out in (False, True)])
    settings = [
        f"model.name={thoughtless}",
        "prompt.template=chat",
        "prompt.max_tokens=150",
        "evaluate.max_examples=99",
    ]
    data = [f"data.source={tmp_path / 'rows'}", "data.partition=natural", "data.test_fraction=0.2"]
    return [*small_run, *settings, *data, "rounds=1"]


def told(folder_or_text: str) -> None:
    """What both a run and the doctor say of the rows of `mixed`."""
    lines = re.sub(r"[ \n]+", " ", folder_or_text)
    assert "comb.jsonl: 10 of 10 rows left out: the chat template rewrites what the assistant said (rows 1," in lines
    (hive,) = re.findall(r"hive\.jsonl: \S.*?(?= (?:\w+\.jsonl|held-out set): )", lines)
    assert "1 of 21 rows cut at prompt.max_tokens = 150 after a whole answer (rows 17)" in hive
    assert "1 of 21 rows cut at prompt.max_tokens = 150 within an answer (rows 20)" in hive
    assert "2 of 21 rows left out: the chat template rewrites what the assistant said (rows 18, 19)" in hive
    assert "1 of 21 rows left out: too long for prompt.max_tokens = 150 (rows 21)" in hive
    assert "wax.jsonl:" not in lines
    assert "held-out set: 7 of 23 examples are not in the table" in lines


def test_a_run_with_such_rows_ends_with_its_results(mixed: list[str], tmp_path: Path) -> None:
    metrics = simulate(loading.load(None, mixed), tmp_path / "run")
    assert [row["n"] for row in metrics["table"]] == [16] * 5
    assert [e["client"] for e in events_of(tmp_path / "run", "refused")] == ["comb"]
    clients = {c["client"]: c for c in metrics["clients"]}
    # What is cut still has an answer whose loss counts, here and among the client's own held-out rows.
    assert {name: (c["examples"], c["cut"], c["dropped"]) for name, c in clients.items()} == {
        "hive": (9, 1, 2),
        "wax": (8, 0, 0),
        "comb": (0, 0, 5),
    }
    assert clients["comb"]["own"] == {} and len(clients["hive"]["own"]) == 5
    warnings = [event["message"] for event in events_of(tmp_path / "run", "warning")]
    (uneven,) = [line for line in warnings if line.startswith("data.test_fraction = 0.2: ")]  # half of these rows
    warnings.remove(uneven)
    assert len(warnings) == 3  # two files and the table
    told(" ".join(sorted(warnings, key=lambda line: (line.startswith("held-out"), line))))
    report = html.unescape((tmp_path / "run" / "report.html").read_text())
    assert all(warning in report for warning in warnings)
    log = (tmp_path / "run" / "log.jsonl").read_text()
    assert LONG not in log and "Which bee" not in log and str(tmp_path) not in log


def test_the_doctor_tells_the_same(mixed: list[str]) -> None:
    good, text = doctor(mixed)
    assert not good
    (problem,) = re.findall(r"^  - (.*)$", text, re.MULTILINE)
    assert problem.startswith("no example of comb can be used (the chat template rewrites")
    told(text.replace("warning: ", ""))


@pytest.mark.parametrize("apart", [False, True])
def test_a_template_that_can_write_no_row_is_an_error(mixed: list[str], tmp_path: Path, apart: bool) -> None:
    (tmp_path / "rows" / "wax.jsonl").rename(tmp_path / "good.jsonl")
    mixed += [f"data.test={tmp_path / 'good.jsonl'}"] if apart else []
    shutil.copy(tmp_path / "rows" / "comb.jsonl", tmp_path / "rows" / "hive.jsonl")
    with pytest.raises(UserError, match=r"rewrites what the assistant said.*alpaca"):
        simulate(loading.load(None, mixed), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    good, text = doctor(mixed)
    assert not good
    assert "rewrites what the assistant said" in text and 'use prompt.template = "alpaca"' in text


@pytest.fixture
def gpt2(tiny_model: Path, tmp_path: Path) -> Path:
    """A GPT-2 with 128 learned positions: the 129th is an IndexError."""
    return small_models.make_folder("gpt2", tiny_model, tmp_path / "gpt2")


def test_examples_longer_than_the_models_positions_are_refused_early(
    small_run: list[str], gpt2: Path, tmp_path: Path
) -> None:
    overrides = [*small_run, f"model.name={gpt2}", "prompt.max_tokens=129"]
    said = "prompt.max_tokens = 129: .* has 128 positions; lower it to 128 or less"
    with pytest.raises(UserError, match=said):
        simulate(loading.load(None, overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    good, text = doctor(overrides)
    assert not good and len(re.findall(said, text)) == 1


def test_answers_end_at_the_models_last_position(small_run: list[str], gpt2: Path) -> None:
    run = loading.load(None, [*small_run, f"model.name={gpt2}", "prompt.max_tokens=128", "evaluate.max_new_tokens=24"])
    lm = adapters.load(run.model, run.adapter)
    template = tokenization.make_template(run.prompt, lm.tokenizer)
    letters = iter(range(1, 400))
    near = next(
        example
        for example in (talk(LONG[:n], "bee") for n in letters)
        if len(tokenization.encode_prompt(example, template, lm.tokenizer, 128)) == 125
    )
    short = talk("Who?", "bee")
    held_out = comparison.prepare([near, short], template, lm, run)
    assert len(held_out.examples) == 2
    measured = comparison.measure(lm, adapters.fresh_adapter(lm, run.seed), held_out, run)

    def greedy(ids: list[int], steps: int) -> list[int]:
        made = list(ids)
        for _ in range(steps):
            with torch.no_grad():
                made.append(int(lm.model(input_ids=torch.tensor([made])).logits[0, -1].argmax()))
            if made[-1] == lm.tokenizer.eos_token_id:
                break
        return made[len(ids) :]

    expected = [greedy(held_out.questions[0], 3), greedy(held_out.questions[1], 24)]
    assert list(measured.texts) == [lm.tokenizer.decode(ids, skip_special_tokens=True) for ids in expected]


def test_a_question_too_long_to_ask_is_left_out_only_where_it_is_asked(small_run: list[str]) -> None:
    run = loading.load(None, small_run)
    lm = adapters.load(run.model, run.adapter)
    template = tokenization.make_template(run.prompt, lm.tokenizer)
    rows = [talk("Who?", "bee", LONG, "wax"), talk("Who?", "bee")]
    table = comparison.prepare(rows, template, lm, run)
    assert (table.examples, table.left_out) == ((rows[1],), 1)
    quiet = loading.load(None, [*small_run, "evaluate.generate=false"])
    scored = comparison.prepare(rows, template, lm, quiet)
    assert (scored.examples, scored.left_out, scored.questions) == (tuple(rows), 0, ())


def test_a_second_run_in_a_process_reads_changed_files(small_run: list[str], tmp_path: Path) -> None:
    def write(name: str, seed: int) -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in instruction_rows(40, seed)), encoding="utf-8")
        return f"data.source={path}"

    def adapter(folder: str, source: str) -> dict[str, torch.Tensor]:
        quiet = ["rounds=1", "evaluate.baselines=[]", "evaluate.generate=false"]
        simulate(loading.load(None, [*small_run, *quiet, source]), tmp_path / folder)
        return load_file(tmp_path / folder / "adapter" / "adapter_model.safetensors")

    old = adapter("old", write("rows.jsonl", 0))
    new = adapter("new", write("rows.jsonl", 1))
    elsewhere = adapter("elsewhere", write("others.jsonl", 1))
    assert all(torch.equal(new[name], elsewhere[name]) for name in new)
    assert not all(torch.equal(new[name], old[name]) for name in new)
