"""Whole runs that begin from an adapter of plain peft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import small_models
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import strategies
from apiary.config import loading
from apiary.core.errors import UserError
from apiary.export import export, tuned
from apiary.tracking import event_log
from simulation import baselines
from simulation.run import simulate
from strategies import AGGREGATORS

WEIGHTS = "adapter_model.safetensors"
# The rank is the start's.
QUICK = ["evaluate.generate=false", "evaluate.baselines=[]", "evaluate.clients=false", "rounds=1", "train.steps=1"]


@pytest.fixture(scope="module")
def begin(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A start that changes what the model says by much."""
    torch.manual_seed(4)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    settings = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj"])
    model = get_peft_model(plain, settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.add_(0.8 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("begin") / "theirs"
    model.save_pretrained(folder)
    return folder


def keys(small_run: list[str], begin: Path, *more: str) -> list[str]:
    return [*(key for key in small_run if not key.startswith("adapter.rank")), f"adapter.start={begin}", *more]


def config(small_run: list[str], begin: Path, *more: str) -> Any:
    return loading.load(None, keys(small_run, begin, *more))


@pytest.fixture(scope="module")
def loss_of_start(tiny_model: Path, begin: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> float:
    """What the table should say of the start: the merged model of plain peft as a base of its own, in the same run."""
    from conftest import overrides_for

    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    folder = tmp_path_factory.mktemp("merged") / "base"
    merged = PeftModel.from_pretrained(plain, begin).merge_and_unload()
    merged.save_pretrained(folder)
    for file in tiny_model.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    made = [*overrides_for(folder, rows_file), *QUICK, "evaluate.baselines=['base']", "train.lr=1e-12"]
    table = simulate(loading.load(None, made), tmp_path_factory.mktemp("of-merged") / "run")["table"]
    return float(next(row["loss"] for row in table if row["method"] == "base"))


def row(metrics: dict[str, Any], method: str) -> dict[str, Any]:
    return next(row for row in metrics["table"] if row["method"] == method)


def test_a_run_begins_from_it_and_says_so(
    small_run: list[str], begin: Path, loss_of_start: float, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    made = config(small_run, begin, *QUICK, "evaluate.baselines=['base','local','central']", "rounds=2")
    metrics = simulate(made, folder)
    assert [line["method"] for line in metrics["table"]] == ["base", "start", "local", "federated", "central"]
    assert metrics["rounds"][0]["loss"] == pytest.approx(loss_of_start, abs=1e-4)
    assert row(metrics, "start")["loss"] == pytest.approx(loss_of_start, abs=1e-4)
    assert (row(metrics, "start")["steps"], row(metrics, "start")["tokens"]) == (0, 0)
    assert abs(row(metrics, "base")["loss"] - loss_of_start) > 0.05
    # Two rounds of two steps are not far from where they began, in the federation as in its baselines.
    for method in ("local", "federated", "central"):
        assert abs(row(metrics, method)["loss"] - loss_of_start) < abs(
            row(metrics, method)["loss"] - row(metrics, "base")["loss"]
        )
        assert row(metrics, method)["loss"] != row(metrics, "start")["loss"]
    assert {"base", "start"} <= metrics["paired"].keys()
    stored = loading.load(folder / "config.toml").adapter
    assert (stored.rank, stored.alpha, stored.scaling, stored.targets) == (
        4,
        8.0,
        "lora",
        ("q_proj", "up_proj", "v_proj"),
    )
    outline = next(event["outline"] for event in event_log.read_events(folder) if event["event"] == "start")
    said = f"begun from theirs ({stored.start_digest})"
    assert said in outline
    assert said in (folder / "adapter" / "README.md").read_text()
    assert "the adapter that training began from" in (folder / "report.html").read_text()
    export.export_run(folder, tmp_path / "out", merge=False)
    handed = (tmp_path / "out" / "apiary.toml").read_text()
    assert str(begin.parent) not in handed and 'start = "theirs"' in handed
    rows, remarks = tuned.score(tuned.open_tuned(folder), made.data.source)
    assert {"base", "start", "federated"} <= rows.keys()
    assert not [line for line in remarks if "start" in line]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in AGGREGATORS if name not in ("fedkseed", "fedalt")])
def test_no_method_loses_the_start(
    name: str, small_run: list[str], begin: Path, loss_of_start: float, tmp_path: Path
) -> None:
    """With steps of next to nothing the federated model is the start, whatever a method makes of factors."""
    more = [*QUICK, f"strategy.name={name}", "train.lr=1e-12", "rounds=2", "strategy.min_clients=3"]
    if name in ("krum", "multi_krum", "bulyan", "trimmed_mean"):
        more.append(f"strategy.options={{byzantine={int(name == 'trimmed_mean')}}}")
    if name == "scaffold":
        more.append("train.optimizer=sgd")
    if name == "fltrust":
        more.append(f"strategy.root={small_run[5].partition('=')[2]}")
    if own := name in ("ditto", "clustered"):  # whose clients measure their own models
        more = [*(text for text in more if not text.startswith("evaluate.clients")), "train.steps=2"]
    made = config(small_run, begin, *more)
    strategies.from_config(made)
    metrics = simulate(made, tmp_path / "run")
    assert own or metrics["rounds"][0]["loss"] == pytest.approx(loss_of_start, abs=1e-4)
    assert row(metrics, "federated")["loss"] == pytest.approx(loss_of_start, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ["wire.down=int8", "wire.up=int8"],
        ["adapter.train=b"],
        ["adapter.train=alternate"],
        ["adapter.rank=8"],
        ["privacy.unit=record", "privacy.batch_rows=8", "privacy.noise_multiplier=0.01", "privacy.epsilon=1e6"],
        ["strategy.server_optimizer=adam"],
    ],
)
def test_what_else_goes_with_it(
    more: list[str], small_run: list[str], begin: Path, loss_of_start: float, tmp_path: Path
) -> None:
    made = [key for key in QUICK if not (key.startswith("evaluate.clients") and "privacy.unit=record" in more)]
    metrics = simulate(config(small_run, begin, *made, "train.lr=1e-7", *more), tmp_path / "run")
    assert metrics["rounds"][0]["loss"] == pytest.approx(loss_of_start, abs=1e-4)
    if "strategy.server_optimizer=adam" not in more:  # whose first step has a length of its own
        assert row(metrics, "federated")["loss"] == pytest.approx(loss_of_start, abs=0.02)
    warned = [event["message"] for event in event_log.read_events(tmp_path / "run") if event["event"] == "warning"]
    assert any("rows that the start was tuned on" in line for line in warned) == ("privacy.unit=record" in more)


@pytest.mark.slow
def test_a_run_that_began_from_it_goes_on_to_the_bit(
    small_run: list[str], begin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = config(small_run, begin, *QUICK, "rounds=2", "evaluate.baselines=['local']")
    straight = simulate(made, tmp_path / "straight")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(baselines, "train_all", killed)
        with pytest.raises(KeyboardInterrupt):
            simulate(made, tmp_path / "run")
    moved = tmp_path / "moved"
    begin_copy = {file.name: file.read_bytes() for file in begin.iterdir()}
    moved.mkdir()
    for name, content in begin_copy.items():
        (moved / name).write_bytes(content)
    again = simulate(loading.load(tmp_path / "run" / "config.toml"), tmp_path / "run", resume=True)
    assert again["table"] == straight["table"]
    assert small_models.same(
        load_file(tmp_path / "run" / "adapter" / WEIGHTS), load_file(tmp_path / "straight" / "adapter" / WEIGHTS)
    )
    # Another adapter under the same name, or under another one, is not what the run began from.
    save_file({name: 2 * t for name, t in load_file(moved / WEIGHTS).items()}, moved / WEIGHTS)
    with pytest.raises(UserError, match=r"differs from the run's own in .*adapter\.start_digest"):
        simulate(
            config(small_run, moved, *QUICK, "rounds=2", "evaluate.baselines=['local']"), tmp_path / "run", resume=True
        )


@pytest.mark.slow
def test_a_checkpoint_of_another_start_is_refused(small_run: list[str], begin: Path, tmp_path: Path) -> None:
    made = config(small_run, begin, *QUICK)
    simulate(made, tmp_path / "run")
    path = tmp_path / "run" / "config.toml"
    digest = loading.load(path).adapter.start_digest
    state = next((tmp_path / "run" / "checkpoints").glob("round-*/state.json"))
    assert json.loads(json.loads(state.read_text())["made_by"])["adapter"]["start_digest"] == digest
    path.write_text(path.read_text().replace(str(digest), "0" * 16))
    with pytest.raises(UserError, match="holds another adapter than the one that the run began from"):
        simulate(loading.load(path), tmp_path / "run", resume=True)
