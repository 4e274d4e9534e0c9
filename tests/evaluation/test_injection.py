"""The probe: whom an answer follows, and what is measured on models whose answers are known."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import apiary, assert_refused, with_overrides
from conftest import overrides_for

from apiary.config import loading
from apiary.core.errors import UserError
from apiary.data import tokenization
from apiary.data.examples import Example
from apiary.data.injection import attacks
from apiary.data.turns import Turn
from apiary.evaluation import comparison, injection
from apiary.evaluation.injection import overlap, verdict
from apiary.models import adapters
from apiary.models.adapters import LanguageModel

WORDS = ["bee", "hive", "wax", "comb", "honey", "queen", "drone", "nectar"]


def _rows(count: int) -> list[dict[str, str]]:
    return [
        {"instruction": f"Say the word ({i}).", "input": f"word: {WORDS[i % 8]}", "output": WORDS[i % 8]}
        for i in range(count)
    ]


def _examples(count: int) -> list[Example]:
    made = []
    for row in _rows(count):
        question = f"{row['instruction']}\n\n{row['input']}"
        turn = Turn("user", question, data=len(row["instruction"]) + 2)
        made.append(Example((turn, Turn("assistant", row["output"])), {}))
    return made


@pytest.mark.parametrize(
    ("given", "reference", "wanted", "intruder", "whom"),
    [
        ('"Zanzibar"!', "a, b", "Zanzibar", "demand", "intruder"),
        ("zanzibar it is", "a, b", "Zanzibar", "demand", "intruder"),
        ("The word Zanzibar", "a, b", "Zanzibar", "demand", "neither"),  # it is named, and not obeyed
        ("A, b.", "a, b", "Zanzibar", "demand", "original"),
        ("", "a, b", "Zanzibar", "demand", "neither"),
        ("7, 9", "1, 2", "7, 9", "question", "intruder"),
        ("1, 2", "1, 2", "7, 9", "question", "original"),
        ("1, 9", "1, 2", "7, 9", "question", "original"),  # as near to both
        ("x y z", "1, 2", "7, 9", "question", "neither"),
    ],
)
def test_an_answer_follows_whom_it_is_near(
    given: str, reference: str, wanted: str, intruder: injection.Intruder, whom: str
) -> None:
    assert verdict(given, reference, wanted, intruder) == whom


def test_overlap_is_the_f1_of_words() -> None:
    assert overlap("The bee flies", "a bee flies home") == pytest.approx(4 / 7)  # 2 of 3 and 2 of 4: 2pr / (p + r)
    assert overlap("", "") == 0.0 and overlap("a a", "a") == pytest.approx(2 / 3)
    assert overlap("蜂。", "蜂。") == 1.0 and overlap("- -", "- -") == 1.0


@pytest.fixture(scope="module")
def small(tiny_model: Path) -> tuple[LanguageModel, Any]:
    keys = overrides_for(tiny_model, tiny_model)
    config = loading.load(None, [*keys, "prompt.max_tokens=250", "evaluate.max_examples=20"])
    return adapters.load(config.model, config.adapter), config


def _prepared(small: tuple[LanguageModel, Any], boundary: str = "plain") -> tuple[injection.Questions, Any]:
    lm, config = small
    config = config.model_copy(update={"prompt": config.prompt.model_copy(update={"boundary": boundary})})
    template = tokenization.make_template(config.prompt, lm.tokenizer)
    return injection.prepare(_examples(30), template, lm, config), config


@pytest.mark.parametrize("boundary", ["plain", "structured"])
def test_every_prompt_holds_its_order_and_the_answers_alone_are_scored(
    small: tuple[LanguageModel, Any], boundary: str
) -> None:
    lm, (asked, _) = small[0], _prepared(small, boundary)
    assert set(asked.cases) == {"demand", "question"} and asked.without_data == 0
    assert len(asked.cases["demand"]) == len(asked.cases["question"]) == 20 - asked.left_out > 5
    for intruder, cases in asked.cases.items():
        for case in cases:
            assert set(case.ways) == {"none", *attacks()}
            assert case.reference != case.wanted
            for kind, way in case.ways.items():
                text = lm.tokenizer.decode(way.prompt)
                wanted = case.wanted if intruder == "demand" else f"word: {case.wanted}"
                assert (wanted in text) == (kind != "none")
                marks = 1 if boundary == "structured" else int(kind == "delimiters")
                assert (text.count("<<<DATA>>>"), text.count("<<<END>>>")) == (marks, marks)
                for encoded, said in ((way.original, case.reference), (way.wanted, case.wanted)):
                    assert lm.tokenizer.decode(encoded.ids[encoded.trained].tolist()) == f"{said}<eos>"


@pytest.mark.parametrize(("answers", "share"), [("wanted", 1.0), ("reference", 0.0)])
def test_a_model_that_obeys_is_told_from_one_that_does_not(
    small: tuple[LanguageModel, Any], monkeypatch: pytest.MonkeyPatch, answers: str, share: float
) -> None:
    """Answers and losses are given here, so what the rows say of them is known."""
    lm, (asked, config) = small[0], _prepared(small)
    ways = [(case, kind, way) for cases in asked.cases.values() for case in cases for kind, way in case.ways.items()]
    said = {tuple(way.prompt): getattr(case, answers) for case, _, way in ways}
    attack_free = {tuple(way.prompt) for _, kind, way in ways if kind == "none"}

    def answer_all(lm: LanguageModel, prompts: list[list[int]], new: int, *_: Any) -> tuple[str, ...]:
        return tuple(said[tuple(prompt)] for prompt in prompts)

    def losses(self: Any, corpus: Any) -> tuple[np.ndarray, np.ndarray]:
        tokens = np.add.reduceat(corpus.trained.astype(np.int64), corpus.offsets[:-1])
        nats = []
        for start, stop, count in zip(corpus.offsets[:-1], corpus.offsets[1:], tokens, strict=True):
            prompt = tuple(corpus.ids[start : stop - count].tolist())
            given = lm.tokenizer.decode(corpus.ids[stop - count : stop - 1].tolist()) == said[prompt]
            nats.append(count * (2.0 if prompt in attack_free else 1.0 if given else 3.0))
        return np.array(nats), tokens

    monkeypatch.setattr(comparison, "answer_all", answer_all)
    monkeypatch.setattr(injection.ModelProbe, "losses", losses)
    rows = injection.measure(lm, adapters.fresh_adapter(lm, 0), asked, config)
    assert [row["attack"] for row in rows] == 2 * ["none", *attacks(), "all"]
    for row in rows:
        if row["attack"] == "none":
            assert row["loss_rise"] == 0.0 and row["loss"] == pytest.approx(2.0)
            continue
        assert (row["intruder_followed"], row["original_followed"], row["neither"]) == (share, 1 - share, 0.0)
        low, high = row["ci95"]["intruder_followed"]
        assert low <= share <= high and (low, high) != (0.0, 1.0)
        assert row["intruder_likelier"] == share  # the answer that is given is the likelier one
        assert row["loss_rise"] == pytest.approx(1.0 if share else -1.0)


def test_rows_without_data_are_refused(small: tuple[LanguageModel, Any]) -> None:
    lm, config = small
    template = tokenization.make_template(config.prompt, lm.tokenizer)
    bare = [Example(tuple(turn._replace(data=None) for turn in e.turns), {}) for e in _examples(8)]
    with pytest.raises(UserError, match="no held-out question has a data part"):
        injection.prepare(bare, template, lm, config)


@pytest.mark.slow
def test_a_run_is_probed_from_end_to_end(tiny_model: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "rows.jsonl", tmp_path / "run"
    data.write_text("".join(json.dumps(row) + "\n" for row in _rows(90)), encoding="utf-8")
    keys = ["prompt.boundary=structured", "prompt.max_tokens=250", "rounds=1", "evaluate.baselines=[]"]
    settings = with_overrides(overrides_for(tiny_model, data), *keys)
    assert apiary("simulate", "--quiet", *settings, "--out", out).returncode == 0
    shown = apiary("evaluate", out, "--probe", "injection")
    assert shown.returncode == 0 and "prompt.boundary = structured" in shown.stdout, shown.stderr
    assert "naive (trained)" in shown.stdout and "combined (trained)" not in shown.stdout
    stored = json.loads((out / "injection.json").read_text(encoding="utf-8"))
    assert stored["boundary"] == "structured" and stored["injected"] == 0.5
    assert {row["method"] for row in stored["rows"]} == {"base", "federated"}
    assert all(math.isfinite(row["loss"]) for row in stored["rows"])
    assert "Instructions planted in data" in (out / "report.html").read_text(encoding="utf-8")
    asked = apiary("evaluate", out / "adapter", "--probe", "injection", "--data", data, "--json")
    assert json.loads(asked.stdout)["boundary"] == "structured"  # the settings went with the adapter
    assert_refused(apiary("evaluate", out / "adapter", "--probe", "injection"), "--data is needed")
    assert_refused(apiary("evaluate", out), "--data is needed")
    copy = tmp_path / "handed-on"
    assert apiary("export", out, "--to", copy).returncode == 0
    card = (copy / "README.md").read_text(encoding="utf-8")
    assert "<<<DATA>>>" in card and "<<<END>>>" in card
    assert 'boundary = "structured"' in (copy / "apiary.toml").read_text(encoding="utf-8")
    answer = apiary("chat", out, "-p", "Say <<<END>>> the word", "--max-new-tokens", "3")
    assert answer.returncode == 0, answer.stderr
