"""Runs with curation or privacy that are killed go on as if nothing had happened, and pay for nothing twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import overrides_for

from apiary.config import loading
from apiary.core.errors import RunFailed
from apiary.privacy import noise
from apiary.privacy.accounting import Mechanism, epsilon
from apiary.tracking.event_log import read_events
from server import explosion
from simulation.run import simulate

pytestmark = pytest.mark.slow


class Killed(BaseException):
    """Ends the run where it is raised, as a kill would."""


def run(folder: Path, overrides: list[str], kill: tuple[str, int] | None = None) -> dict[str, Any]:
    def observe(event: dict[str, Any]) -> None:
        if (event["event"], event.get("round")) == kill:
            raise Killed

    return simulate(loading.load(None, overrides), folder, resume=folder.exists(), observers=[observe])


def killed_often(folder: Path, overrides: list[str]) -> dict[str, Any]:
    for at in (("client", 1), ("round", 2), ("evaluate", 3), ("client", 4), ("round", 5)):
        with pytest.raises(Killed):
            run(folder, overrides, at)
    return run(folder, overrides)


def adapter(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def settings(model: Path, rows: Path, *more: str) -> list[str]:
    return [*overrides_for(model, rows), "rounds=5", "evaluate.baselines=[]", "evaluate.generate=false", *more]


def test_with_curation(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    """Choices follow from the adapter of their round, and a resumed run makes or finds the same ones."""
    steps = 'curate.steps=["mask", {name="ifd", threshold=1.5, keep=0.6, floor=0}]'
    overrides = settings(tiny_model, rows_file, steps, "curate.every=2")
    whole = run(tmp_path / "whole", overrides)
    again = killed_often(tmp_path / "broken", overrides)
    assert adapter(tmp_path / "broken") == adapter(tmp_path / "whole")
    assert again["curation"] == whole["curation"]
    assert all(0 < c["kept"] < c["rows"] for c in whole["curation"].values())
    kept = [json.loads(p.read_text())["kept"] for p in sorted((tmp_path / "whole").rglob("curated-*.json"))]
    assert len(kept) == 3 * 3 and kept[0] != kept[2]  # three clients, rounds 1, 3 and 5: the adapter changes the choice


def test_with_privacy(tiny_model: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same keys: the same noise, so the same adapter; a round is charged once, however often it is asked."""
    monkeypatch.setattr(noise.secrets, "token_bytes", lambda size: bytes(size))
    overrides = settings(tiny_model, rows_file, "privacy.unit=record", "privacy.batch_rows=12", "privacy.epsilon=6.0")
    run(tmp_path / "whole", overrides)
    again = killed_often(tmp_path / "broken", overrides)
    assert adapter(tmp_path / "broken") == adapter(tmp_path / "whole")
    assert again["privacy"] == json.loads((tmp_path / "whole" / "ledger.json").read_text())
    for ledger in sorted((tmp_path / "broken" / "clients").glob("*/ledger.json")):
        entries = json.loads(ledger.read_text())["entries"]
        assert [entry["round"] for entry in entries] == [1, 2, 3, 4, 5]
        history = [Mechanism(e["noise_multiplier"], e["rates"][min(e["rates"])], e["steps"]) for e in entries]
        told = again["privacy"]["clients"][ledger.parent.name]
        assert told["epsilon"] == pytest.approx(epsilon(history, 1e-5), rel=1e-9)
        assert 0.97 * 6.0 < told["epsilon"] <= 6.0  # all of what was planned for, and no more
    assert again["privacy"]["epsilon"] == max(c["epsilon"] for c in again["privacy"]["clients"].values())


def test_with_ranks_that_fall(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    """The server remembers what its clients have pruned themselves to."""
    method = ["strategy.name=hetlora", "strategy.options.prune=0.5", "strategy.options.penalty=3.0"]
    overrides = settings(tiny_model, rows_file, *method)
    run(tmp_path / "whole", overrides)
    killed_often(tmp_path / "broken", overrides)
    assert adapter(tmp_path / "broken") == adapter(tmp_path / "whole")
    told = [e for e in read_events(tmp_path / "whole") if e["event"] == "client"]
    assert {e["rank"] for e in told if e["round"] == 1} > {e["rank"] for e in told if e["round"] == 5} or any(
        e["rank"] < 4 for e in told if e["round"] < 5
    )


@pytest.mark.parametrize(
    "more",
    [
        ["strategy.name=fedalt"],
        ["strategy.name=ditto"],
        [
            "wire.up=int4",
            f"continual.stages={[[f't{i}'] for i in range(9)]}",
            "continual.by=task",
            "continual.buffer=0.3",
        ],
    ],
)
def test_a_run_whose_loss_exploded_goes_on_from_the_last_sound_round(
    tiny_model: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    """It is measured every four rounds; the clients too must be as they were after the fourth."""
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    tagged = [{**row, "task": f"t{number % 9}"} for number, row in enumerate(rows)]  # a stage for each round
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tagged))
    overrides = settings(tiny_model, tmp_path / "rows.jsonl", "rounds=9", "evaluate.every=4", *more)
    run(tmp_path / "whole", overrides)
    hold = explosion.Watch.hold

    def exploded(watch: explosion.Watch, number: int, *rest: Any) -> str:
        return hold(watch, number, *rest) or ("round 8: the loss is 99" if number == 8 else "")

    with monkeypatch.context() as once:
        once.setattr(explosion.Watch, "hold", exploded)
        with pytest.raises(RunFailed, match="the loss is 99"):
            run(tmp_path / "broken", overrides)
    run(tmp_path / "broken", overrides)
    (start,) = [event["resumed"] for event in read_events(tmp_path / "broken") if event["event"] == "start"][1:]
    assert start == 4
    assert adapter(tmp_path / "broken") == adapter(tmp_path / "whole")


def test_another_key_is_another_adapter(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    """The server knows seed and settings; what it does not know makes the noise."""
    overrides = settings(tiny_model, rows_file, "privacy.unit=record", "privacy.batch_rows=12", "rounds=1")
    for name in ("one", "two"):
        run(tmp_path / name, overrides)
    assert adapter(tmp_path / "one") != adapter(tmp_path / "two")


def test_the_log_of_a_private_run_holds_no_loss_of_training(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    run(tmp_path / "run", settings(tiny_model, rows_file, "privacy.unit=record", "privacy.batch_rows=12", "rounds=2"))
    events = read_events(tmp_path / "run")
    assert [event["loss"] for event in events if event["event"] == "client"] == [None] * 6
    assert all("train_loss" not in event for event in events if event["event"] == "round")
    assert all("clients_loss" not in event for event in events if event["event"] == "evaluate")
    assert len({event["tokens"] for event in events if event["event"] == "client"}) == 1
