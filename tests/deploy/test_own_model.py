"""A site's own model after a run of real processes, made by the command line while the site still takes part."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from deployment import events_of, overrides, running


@pytest.mark.long
def test_a_site_makes_its_own_model_after_a_run_that_set_rows_apart(tmp_path: Path, tiny_model: Path) -> None:
    with running(tmp_path, tiny_model) as made:
        own = ("personal.enabled=true", "personal.validation=0.3", "data.test_fraction=0.2", "evaluate.max_examples=40")
        words = [word for text in (*overrides(tiny_model, tmp_path / "rows"), *own) for word in ("-s", text)]
        done = made.call("deploy", "submit", str(made.kits / "server"), "--out", "run", *words)
        assert done.returncode == 0, done.stderr
        at_ant = ("--data", str(tmp_path / "rows" / "ant.jsonl"), "--model", str(tiny_model))
        done = made.call("deploy", "personal", str(made.kits / "ant"), "run", *at_ant)
        assert done.returncode == 0, done.stderr
        folder = made.kits / "ant" / "personal" / "run"
        choice = json.loads((folder / "choice.json").read_text())
        assert choice["federation_steps"] == 3 * 2 and "6 optimizer steps in run-" in done.stderr
        # What it trains on is what the server was told of, by exact counts; the rest chooses or is reported.
        told = {event["client"]: event["examples"] for event in events_of(tmp_path / "run", "handshake")}
        rows = choice["rows"]
        assert rows["train"] == told["ant"] < 40 and 0 < rows["validation"] < 40 - rows["train"]
        assert "Nothing was sent" in done.stdout and f"kept: {choice['kept']}" in done.stdout
        done = made.call("export", str(folder), "--to", str(tmp_path / "exported"))
        assert done.returncode == 0, done.stderr
        assert made.running["ant"].poll() is None  # the site goes on
