"""Metrics against scipy, and hand-worked tables."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import overrides_for
from scipy import stats
from tokenizers import AddedToken

from apiary.config import loading
from apiary.config.schema import RunConfig
from apiary.data.examples import Example
from apiary.data.templates import Segment, Template
from apiary.data.turns import ToolCall, Turn
from apiary.evaluation import comparison, intervals
from apiary.evaluation.comparison import Measured
from apiary.models import adapters, inference
from apiary.models.adapters import LanguageModel


def test_a_difference_is_found_where_two_intervals_overlap() -> None:
    """Examples differ more from each other than the models do on any of them; scipy draws pairs in its own way."""
    rng = np.random.default_rng(5)
    tokens = rng.integers(1, 30, 200).astype(float)
    theirs = tokens * rng.gamma(2.0, 0.5, 200)
    ours = theirs + tokens * rng.normal(0.05, 0.1, 200)
    runs = {"local": Measured(theirs, tokens, None), "federated": Measured(ours, tokens, None)}
    found = comparison.differences(runs, seed=1)
    assert list(found) == ["local"] and found["local"]["n"] == 200
    assert found["local"]["difference"] == pytest.approx((ours - theirs).sum() / tokens.sum())
    low, high = found["local"]["ci95"]
    reference = stats.bootstrap(
        (ours, theirs, tokens),
        lambda a, b, t, axis: (a.sum(axis) - b.sum(axis)) / t.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=8000,
        method="BCa",
        rng=rng,
    ).confidence_interval
    assert low == pytest.approx(reference.low, rel=0.1) and high == pytest.approx(reference.high, rel=0.1)
    assert low > 0
    one, two = (intervals.over_rows(values, tokens, seed=1) for values in (ours, theirs))
    assert one is not None and two is not None and one[0] < two[1]  # each by itself they overlap
    assert comparison.differences(runs, seed=1) == found


def test_no_interval_of_a_difference_where_it_would_mean_nothing_and_what_it_is_of() -> None:
    def pair(theirs: list[float]) -> dict[str, object]:
        ones = np.ones(len(theirs))
        runs = {"federated": Measured(ones, ones, None), "base": Measured(np.array(theirs), ones, None)}
        return comparison.differences(runs, seed=0)["base"]

    scope = "of these two models on these rows"
    assert pair([2.0] * 59) == {"difference": -1.0, "ci95": None, "n": 59, "of": scope}
    assert pair([2.0] * 60) == {"difference": -1.0, "ci95": [-1.0, -1.0], "n": 60, "of": scope}
    assert pair([2.0] * 69 + [float("nan")])["ci95"] is None


def test_a_row_of_the_table_has_no_interval_of_few_rows_and_says_what_it_is_over() -> None:
    rng = np.random.default_rng(0)
    for n in (59, 60):
        run = Measured(rng.gamma(2.0, 0.5, n), np.ones(n), np.zeros(n))
        row = comparison.table_row("base", run, seed=0)
        assert row["ci95"]["over"] == "rows" and (row["ci95"]["loss"] is None) == (n == 59)
        low, high = row["ci95"]["accuracy"]
        assert low == 0.0 and 0.0 < high < 0.1  # no hit in 60 rows does not mean none at all


def test_loss_is_per_token_not_per_example() -> None:
    run = Measured(np.array([2.0, 30.0]), np.array([1.0, 10.0]), np.array([1.0, 0.0]))
    assert run.loss == pytest.approx(32 / 11) and run.accuracy == 0.5
    assert comparison.table_row("base", run, seed=0)["n"] == 2


def test_mean_over_clients() -> None:
    one = Measured(np.array([1.0, 2.0]), np.array([1.0, 1.0]), np.array([0.0, 1.0]))
    two = Measured(np.array([3.0, 4.0]), np.array([1.0, 1.0]), np.array([1.0, 1.0]))
    both = comparison.mean([one, two])
    assert both.loss == pytest.approx((1.5 + 3.5) / 2) and both.accuracy == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("given", "reference", "same"),
    [("a b", " a  b\n", True), ("A b", "a b", False), ("a", "a.", False), ("", "", True), ("a\nb", "a b", True)],
)
def test_exact_match(given: str, reference: str, same: bool) -> None:
    assert comparison.exact_match(given, reference) is same


def test_accuracy_by_kind() -> None:
    examples = tuple(Example((Turn("user", "q"), Turn("assistant", "a")), {"skill": s}) for s in ("x", "y", "x"))
    held_out = comparison.HeldOut(examples, None, (), ())  # type: ignore[arg-type]
    run = Measured(np.ones(3), np.ones(3), np.array([1.0, 0.0, 0.0]))
    assert comparison.by_kind(lambda e: e.tags["skill"], {"base": run}, held_out) == {
        "x": {"base": 0.5},
        "y": {"base": 0.0},
    }


# -- answers that call and think, and text that asks nothing


@pytest.fixture(scope="module")
def small(tiny_model: Path, rows_file: Path) -> tuple[LanguageModel, RunConfig]:
    run = loading.load(None, [*overrides_for(tiny_model, rows_file), "evaluate.generate=true"])
    return adapters.load(run.model, run.adapter), run


def written(turns: Sequence[Turn], *more: Any, **named: Any) -> list[Segment]:
    """As a template that writes calls and thinking would have it."""
    made = []
    for turn in turns:
        thought = f"<think>\n{turn.thinking}\n</think>\n\n" if turn.thinking else ""
        calls = "".join(f"<call>\n{call.name} {call.arguments}\n</call>" for call in turn.calls)
        trained = turn.role == "assistant"
        end = "<eos>" if trained else "\nIt:"
        made.append(Segment(f"{thought}{turn.text}{calls}{end}", trained))
    return made


ASK, CALL = Turn("user", "q"), ToolCall("send", '{"to": "her"}')


@pytest.mark.parametrize(
    ("answer", "given", "correct"),
    [
        (Turn("assistant", "a b"), "a  b", 1.0),
        (Turn("assistant", "", calls=(CALL,)), '<call>\nsend {"to": "her"}\n</call>', 1.0),
        (Turn("assistant", "", calls=(CALL,)), '<call>\nsend {"to": "him"}\n</call>', 0.0),
        (Turn("assistant", "", calls=(CALL,)), "", 0.0),
        (Turn("assistant", "So.", calls=(CALL,)), 'So.<call>\nsend {"to": "her"}\n</call>', 1.0),
        (Turn("assistant", "42", thinking="6 x 7"), "<think>\nforty\nand 2\n</think>\n\n42", 1.0),
        (Turn("assistant", "42", thinking="6 x 7"), "<think>\n42\n</think>\n\n41", 0.0),
        (Turn("assistant", "42", thinking="6 x 7"), "<think>\n42", 0.0),
        (Turn("assistant", "42", thinking="6 x 7"), "42", 1.0),
        (Turn("assistant", "42"), "<think>\nforty\nand 2\n</think>\n\n42", 1.0),  # the model thinks of itself
        (Turn("assistant", "42"), "<think>\n42\n</think>\n\n41", 0.0),
        (Turn("assistant", "42"), "<think>\n42", 0.0),
        (Turn("assistant", "<think>6 x 7</think>42"), "<think>\nforty and 2</think>42", 1.0),  # a reference in one text
        (Turn("assistant", "<think>"), "<think>", 1.0),
        (Turn("assistant", "<think>"), "<think> more", 0.0),
        (
            Turn("assistant", "", thinking="Her.", calls=(CALL,)),
            '<think>\nHm.\n</think>\n\n<call>\nsend {"to": "her"}\n</call>',
            1.0,
        ),
        (Turn("assistant", "", thinking="Her.", calls=(CALL,)), "<think>\nHer.\n</think>\n\n", 0.0),
    ],
)
def test_an_answer_counts_as_right_with_its_calls_and_after_its_thinking(
    answer: Turn,
    given: str,
    correct: float,
    small: tuple[LanguageModel, RunConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lm, run = small
    row = Example((ASK, Turn("assistant", "x", thinking="y"), ASK, answer), {})
    held_out = comparison.prepare([row], Template("own", "", None, written), lm, run)
    monkeypatch.setattr(comparison, "answer_all", lambda *asked: (given,))
    made = comparison.measure(lm, adapters.fresh_adapter(lm, 0), held_out, run)
    assert made.correct is not None and made.correct.tolist() == [correct] and made.texts == (given,)


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("reference", [Turn("assistant", "42"), Turn("assistant", "42", thinking="6 x 7")])
@pytest.mark.parametrize(("says", "correct"), [("42", 1.0), ("41", 0.0)])
def test_marks_of_thinking_that_are_special_tokens_are_marks_as_well(
    special: bool,
    reference: Turn,
    says: str,
    correct: float,
    small: tuple[LanguageModel, RunConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Decoding drops special tokens: the thinking would then be a part of the answer."""
    base, run = small
    lm = dataclasses.replace(base, tokenizer=copy.deepcopy(base.tokenizer))
    lm.tokenizer.add_tokens([AddedToken(mark, special=special) for mark in ("<think>", "</think>")])
    lm.tokenizer.add_tokens([AddedToken("<note>", special=True)])  # is no mark, and is dropped
    written_ids = lm.tokenizer(f"<think>\nforty and 2 <note>\n</think>\n\n{says} <note><eos> more")["input_ids"]
    monkeypatch.setattr(inference.ModelProbe, "_answer", lambda self, prompts, new: [written_ids] * len(prompts))
    held_out = comparison.prepare([Example((ASK, reference), {})], Template("own", "", None, written), lm, run)
    assert held_out.answers == ("42",)
    monkeypatch.setattr(inference.ModelProbe, "losses", lambda self, corpus: (np.ones(1), np.ones(1)))
    made = comparison.measure(lm, adapters.fresh_adapter(base, 0), held_out, run)
    assert made.texts == (f"<think>\nforty and 2 \n</think>\n\n{says} ",)
    assert made.correct is not None and made.correct.tolist() == [correct]
    answer = Template("own", "", None, written).answer(made.texts[0])
    assert (answer.thinking, answer.text) == ("forty and 2", says)


def test_text_that_asks_nothing_is_scored_and_not_asked(small: tuple[LanguageModel, RunConfig]) -> None:
    lm, run = small
    template = Template("own", "", None, written)
    text = Example((Turn("assistant", "A tale of bees."),), {"kind": "text"})
    rows = [text, Example((ASK, Turn("assistant", "no")), {"kind": "talk"}), text]
    held_out = comparison.prepare(rows, template, lm, run)
    made = comparison.measure(lm, adapters.fresh_adapter(lm, 0), held_out, run)
    assert len(made.nats) == 3 and np.isfinite(made.loss)
    assert made.correct is not None and np.isnan(made.correct).tolist() == [True, False, True]
    assert made.accuracy == 0.0 and made.texts[0] == ""
    assert comparison.table_row("base", made, 0)["ci95"]["accuracy"] == list(intervals.of_share(np.zeros(1)))
    assert comparison.by_kind(lambda e: e.tags["kind"], {"base": made}, held_out) == {"talk": {"base": 0.0}}
    alone = comparison.measure(lm, adapters.fresh_adapter(lm, 0), comparison.prepare([text], template, lm, run), run)
    assert alone.accuracy is None and comparison.table_row("base", alone, 0)["ci95"]["accuracy"] is None
