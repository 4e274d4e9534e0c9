"""What a client may report: each number that cannot be is refused, and what can be is taken."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import pytest
import torch

from apiary.config import loading
from apiary.core import errors
from apiary.core.errors import WireError
from apiary.core.messages import CurationCounts, Decline, FitReport, Payload, Score, Spent, Update, Visit
from server import validation

ADAPTER = {"a": torch.zeros(2, 3), "b": torch.ones(4)}
SPENT = Spent(3.0, 3.5, 1e-5, 0.9, 0.05, 6)
PRIVATE = ["privacy.unit=record", "privacy.batch_rows=8", "privacy.epsilon=4.0", "train.steps=3"]


def visit(**changes: Any) -> Visit:
    report = FitReport(tokens=24, examples=24, steps=3, loss=1.0, seconds=0.1)._replace(
        **{k: v for k, v in changes.items() if k in FitReport._fields}
    )
    update = Update("c", {name: torch.ones_like(t) for name, t in ADAPTER.items()}, float(report.tokens), 4)
    return Visit(update, report, **{k: v for k, v in changes.items() if k in ("curated", "spent")})


def check(answer: Visit, *overrides: str, examples: int | None = 100) -> None:
    validation.check_visit(answer, loading.load(None, list(overrides)), examples, Payload(ADAPTER, {}), 1)


CURATING = ['curate.steps=["duplicates", "length"]']
REPLAYING = ['continual.stages=[["a"], ["b"]]', "continual.buffer=0.1"]


@pytest.mark.parametrize(
    ("changes", "overrides"),
    [
        ({}, []),
        ({"replayed": 20}, REPLAYING),
        ({"curated": CurationCounts(100, 70, {"duplicates": 10, "length": 20})}, CURATING),
        ({"loss": math.nan, "spent": SPENT}, PRIVATE),
    ],
)
def test_an_honest_answer_is_taken(changes: dict[str, Any], overrides: list[str]) -> None:
    check(visit(**changes), *overrides)


@pytest.mark.parametrize(
    ("train", "number", "moved", "taken"),
    [
        ("b", 1, "B", True),
        ("b", 4, "A", False),
        ("alternate", 1, "B", True),
        ("alternate", 1, "A", False),
        ("alternate", 2, "A", True),
        ("alternate", 2, "B", False),
        ("both", 2, "B", True),
    ],
)
def test_a_factor_that_rests_is_moved_by_nobody(train: str, number: int, moved: str, taken: bool) -> None:
    """Averaging is exact because it is the same everywhere; the smallest change would end that."""
    adapter = {f"m.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}
    delta = {name: torch.full_like(t, 1e-9 if f"_{moved}." in name else 0.0) for name, t in adapter.items()}
    answer, run = visit(), loading.load(None, [f"adapter.train={train}"])
    answer = answer._replace(update=answer.update._replace(delta=delta))
    if taken:
        validation.check_visit(answer, run, 100, Payload(adapter, {}), number)
    else:
        with pytest.raises(errors.Poisoned, match=r"rests in this round: [AB] alone is trained"):
            validation.check_visit(answer, run, 100, Payload(adapter, {}), number)


@pytest.mark.parametrize(
    ("changes", "overrides", "why"),
    [
        ({"steps": 4}, [], "in 4 steps"),
        ({"tokens": 10**6}, [], "1e+06 tokens"),
        ({"loss": math.inf}, [], "its loss is inf"),
        ({"replayed": 20}, [], "20 replayed tokens"),
        ({"replayed": -1}, REPLAYING, "-1 replayed"),
        ({"replayed": 6 * 1024}, REPLAYING, "tokens in 3 steps"),  # with the new ones more than a step holds
        ({"curated": CurationCounts(100, 70, {"duplicates": 10})}, CURATING, "that cannot be"),
        ({"curated": CurationCounts(100, 130, {"duplicates": -30})}, CURATING, "that cannot be"),
        (
            {"curated": CurationCounts(100, 70, {"the text of a row": 30})},
            CURATING,
            "1 steps that curate.steps does not",
        ),
        ({"spent": SPENT}, [], "privacy.unit is none"),
        ({"loss": math.nan}, PRIVATE, "without an account"),
        ({"loss": 1.0, "spent": SPENT}, PRIVATE, "withholds"),
        ({"loss": math.nan, "spent": SPENT._replace(epsilon=4.1)}, PRIVATE, "privacy.epsilon = 4"),
        ({"loss": math.nan, "spent": SPENT._replace(epsilon=math.nan)}, PRIVATE, "account of privacy"),
        ({"loss": math.nan, "spent": SPENT._replace(delta=1e-3)}, PRIVATE, "privacy.delta = 1e-05"),
        ({"loss": math.nan, "spent": SPENT, "tokens": 25}, PRIVATE, "1 to 24 tokens"),
        (
            {"loss": math.nan, "spent": SPENT, "curated": CurationCounts(9, 8, {"length": 1})},
            [*PRIVATE, 'curate.steps=["length"]'],
            "what its curation dropped",
        ),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], overrides: list[str], why: str) -> None:
    with pytest.raises(WireError) as told:
        check(visit(**changes), *overrides)
    assert why in str(told.value)
    assert "the text of a row" not in str(told.value)


@pytest.mark.parametrize(
    ("reason", "good", "bad", "why"),
    [("budget", PRIVATE, [], "privacy.unit is none"), ("idle", REPLAYING, [], "there are no stages")],
)
def test_a_decline_must_be_possible_in_this_run(reason: Any, good: list[str], bad: list[str], why: str) -> None:
    validation.check_decline(Decline("c", reason), loading.load(None, good))
    with pytest.raises(WireError, match=why):
        validation.check_decline(Decline("c", reason), loading.load(None, bad))


def test_as_many_private_steps_as_the_epochs_ask_for_are_believed() -> None:
    """How many these are follows from rows that the client does not tell; what a step can hold is still checked."""
    epochs = [*PRIVATE[:1], "privacy.batch_rows=4", "train.epochs=1", *REPLAYING, "continual.policy=poisson"]
    told = {"loss": math.nan, "spent": SPENT, "tokens": 100, "replayed": 100}
    check(visit(**told, steps=50), *epochs, examples=None)
    check(visit(**told, steps=5_000), *epochs, examples=None)
    with pytest.raises(WireError, match="200 tokens in 49 steps"):
        check(visit(**told, steps=49), *epochs, examples=None)


@pytest.mark.parametrize(("steps", "taken"), [(3, True), (2, False)])
def test_who_is_corrected_makes_the_steps_that_everybody_makes(steps: int, taken: bool) -> None:
    """The server divides by how far a client walked: one that lies about it must cost the round itself alone."""
    report = visit(steps=steps).report
    with contextlib.nullcontext() if taken else pytest.raises(WireError, match=r"2 steps; a visit has train.steps = 3"):
        validation.check_walk(report, loading.load(None, ["train.steps=3"]))


def test_a_weight_that_is_not_the_tokens_is_refused() -> None:
    answer = visit()
    with pytest.raises(WireError, match="its weight is 25"):
        check(answer._replace(update=answer.update._replace(weight=25.0)))


def test_a_score_needs_room_for_its_tokens() -> None:
    run = loading.load(None, ["prompt.max_tokens=16"])
    validation.check_score(Score(10.0, 32, 2), run)
    with pytest.raises(WireError, match="33 tokens of 2 examples"):
        validation.check_score(Score(10.0, 33, 2), run)
