"""What the benchmark of honest clients measures is what the limits go by; and by its results nobody was refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))

from apiary.config import loading
from apiary.core.messages import FitReport, Payload, Update, Visit
from apiary.transport import from_config
from benchmarks import honest
from server import validation
from server.replies import Terms
from server.screen import Screen
from strategies import AGGREGATORS
from strategies.guard import Reach, Reference


def visit(client: str, length: float, weight: float) -> Visit:
    delta = {"m.lora_A.weight": torch.full((2, 3), length), "m.lora_B.weight": torch.full((3, 2), 1.0)}
    return Visit(Update(client, delta, weight, 2), FitReport(int(weight), 1, 1, 2.0, 0.1))


@pytest.mark.parametrize(("before", "length", "weight"), [(0.0, 3.5, 2.0), (4.0, 1.75, 0.5)])
def test_ratios_are_over_the_median_of_the_round_or_the_past(before: float, length: float, weight: float) -> None:
    """Of lengths 1, 2 and 7 and weights 10, 20 and 40; one past round had the median 4 and the weight 80."""
    config = loading.load(None, ["adapter.rank=2", "train.schedule=constant", "train.warmup=0", "train.lr=1"])
    method, codec = AGGREGATORS.build("fedavg", {}, weighting="tokens"), from_config.configured_codec(config, "up")
    past = Reference({"a": (before / 3,), "b": (1 / 3,)}, (20 * before,)) if before else Reference()  # of three steps
    nearest = honest.Nearest()
    with honest.watched(nearest):
        screen = Screen(Terms(config, method, codec, 1, lambda client: Payload({}, {}), past))
        for client, (own, tokens) in enumerate([(7.0, 20.0), (1.0, 10.0), (2.0, 40.0)]):
            screen.take(f"c{client}", visit(f"c{client}", own, tokens), 1)
        screen.after()
        validation.check_reach(visit("c0", 3.0, 1.0), Reach({"a": 4.0, "b": 4.0}))
    assert nearest.length == pytest.approx(length) and nearest.weight == pytest.approx(weight)
    assert nearest.reach == 0.75
    assert Screen.after.__qualname__ == "Screen.after"  # as it was


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "more"),
    [
        ("LoRA+", []),
        ("gradient descent, `train.clip_norm = 0`", ["train.lr=0.03"]),  # a tenth, by which few steps do not diverge
        ("factors in turns", []),
    ],
)
def test_no_honest_client_is_refused_where_changes_differ_most(way: str, more: list[str]) -> None:
    made = honest.one(way, 0, ["rounds=2", "data.clients=4", "train.steps=4", *more])
    assert made["failed"] == "" and made["visits"] == 8 and made["refused"] == made["shortened"] == 0, made


def test_no_honest_client_was_refused() -> None:
    runs = json.loads(honest.RESULTS.read_text(encoding="utf-8"))["runs"]
    assert len(runs) >= 9 and {run["way"] for run in runs} <= set(honest.WAYS)
    assert [run["way"] for run in runs if run["refused"] or run["failed"] or not run["visits"]] == []
    assert max(run["loss"] for run in runs) < 1
