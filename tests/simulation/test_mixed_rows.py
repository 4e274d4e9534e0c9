"""A federation of rows of every kind runs to its end: calls, results, thinking, context, text without a question."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import overrides_for

from apiary.config import loading
from apiary.data import federation
from apiary.data.examples import Example, FileReport, Place, Source
from apiary.data.turns import ToolCall, Turn
from simulation.run import simulate

CHAT = (
    "{% if tools %}Tools:{% for t in tools %} {{ t | tojson }}{% endfor %}\n{% endif %}"
    "{% for m in messages %}{{ m.role + ': ' }}"
    "{% if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}"
    "{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}{{ '<call>' + (c.function | tojson) + '</call>' }}{% endfor %}"
    "{{ '<eos>\n' if m.role == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
TOOLS = '[{"type": "function", "function": {"name": "count"}}]'


def example(i: int) -> Example:
    """The i-th row; of five kinds in turn."""
    asked, answered = Turn("user", f"How many bees has hive {i}?"), Turn("assistant", f"{i} bees.")
    calling = Turn("assistant", "", calls=(ToolCall("count", json.dumps({"hive": i}), "call_1"),))
    kinds: dict[str, tuple[Turn, ...]] = {
        "plain": (Turn("user", f"How many?\n\nIn hive {i}.", data=11), answered),
        "tools": (asked, calling, Turn("tool", str(i), name="count", call_id="call_1"), answered),
        "calls": (asked, calling),
        "context": (
            asked,
            answered._replace(trained=False),
            Turn("user", "And now?"),
            answered._replace(thinking="Hm."),
        ),
        "text": (Turn("assistant", f"A tale of hive {i} and of its {i} bees."),),
    }
    kind = list(kinds)[i % 5]
    return Example(kinds[kind], {"kind": kind}, TOOLS if kind in ("tools", "calls") else "")


@pytest.fixture
def mixed(
    tiny_model: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[str]]:
    """Overrides for a run on 100 rows, by a model with a chat template that writes everything."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": CHAT}))
    rows = tuple(map(example, range(100)))
    places = tuple(Place(0, i + 1) for i in range(100))
    source = Source(rows, ("rows",) * 100, None, (FileReport("rows.jsonl", 100, 100, {}),), places)
    monkeypatch.setattr(federation, "read", lambda *args, **kwargs: source)
    return lambda *more: [*overrides_for(model, rows_file), "evaluate.generate=true", "data.clients=2", *more]


STEPS = 'curate.steps=["mask","duplicates","near_duplicates","length","held_out",{name="ifd",threshold=100.0}]'
STAGES = ['continual.by="kind"', 'continual.stages=[["plain","text"],["tools","calls","context"]]', "rounds=2"]


@pytest.mark.parametrize(
    "more",
    [
        ["prompt.template=chat", STEPS],
        ["prompt.template=plain", *STAGES],
        ["prompt.template=chat", 'simulate.attack={name="trigger", share=1.0}', "simulate.attackers=0.5"],
    ],
    ids=["curated", "in stages", "attacked"],
)
def test_rows_of_every_kind_train_curate_replay_and_are_measured(
    more: list[str], mixed: Callable[..., list[str]], tmp_path: Path
) -> None:
    metrics: dict[str, Any] = simulate(loading.load(None, mixed(*more)), tmp_path / "run")
    assert all(np.isfinite(row["loss"]) for row in metrics["table"])
    assert all(row["accuracy"] is None or 0 <= row["accuracy"] <= 1 for row in metrics["table"])
    assert (tmp_path / "run" / "report.html").exists()
