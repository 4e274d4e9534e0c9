"""The whole run, end to end: both engines, resume after a kill, what stands in the run directory."""

from __future__ import annotations

import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chat_templates import CHATML
from command_line import LONGEST_S, apiary, assert_refused, finish, in_a_process, start, with_overrides
from safetensors.torch import load_file
from small_models import same

from apiary.config import loading
from apiary.core.errors import UserError
from apiary.evaluation.row_losses import read_row_losses
from apiary.export import export, model_card, tuned
from apiary.models import adapters
from apiary.report import table_plain
from apiary.tracking.console import make_progress
from server import checkpoint
from simulation.run import simulate

ROOT = Path(__file__).resolve().parents[2]


def run(folder: Path, overrides: list[str], **kwargs: Any) -> dict[str, Any]:
    return simulate(loading.load(None, overrides), folder, **kwargs)


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def events_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [e for e in map(json.loads, lines) if e["event"] == kind]


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, rows_file: Path
) -> tuple[Path, dict[str, Any]]:
    """One finished run that several tests look at."""
    from conftest import overrides_for

    folder = tmp_path_factory.mktemp("runs") / "one"
    return folder, run(folder, overrides_for(tiny_model, rows_file))


def test_run_directory(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, metrics = finished
    for name in (
        "config.toml",
        "log.jsonl",
        "metrics.json",
        "report.html",
        "adapter/adapter_config.json",
        "checkpoints/round-0003/state.json",
    ):
        assert (folder / name).exists(), name
    assert [row["method"] for row in metrics["table"]] == ["base", "local", "federated", "central", "central_serial"]
    assert [r["round"] for r in metrics["rounds"]] == [0, 1, 2, 3]
    assert metrics["schema"] == 1 and metrics["privacy"] == {"unit": "none"}
    assert json.loads((folder / "metrics.json").read_text())["table"][2]["loss"] == pytest.approx(
        metrics["table"][2]["loss"]
    )
    assert len(metrics["clients"]) == 3 and metrics["gain"]["clients"] == 3


def test_last_round_in_log_is_the_federated_row(finished: tuple[Path, dict[str, Any]]) -> None:
    _, metrics = finished
    assert metrics["rounds"][-1]["loss"] == pytest.approx(metrics["table"][2]["loss"], rel=1e-6)
    assert metrics["rounds"][0]["loss"] == pytest.approx(metrics["table"][0]["loss"], rel=1e-6)


def test_methods_are_compared_row_by_row(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, metrics = finished
    losses = {row["method"]: row["loss"] for row in metrics["table"]}
    paired = json.loads((folder / "metrics.json").read_text())["paired"]
    assert set(paired) == {"base", "local", "central", "central_serial"}
    for method, pair in paired.items():
        assert pair["difference"] == pytest.approx(losses["federated"] - losses[method])
        assert pair["n"] == 8 and pair["ci95"] is None  # too few rows for one


def test_a_simulation_keeps_what_each_model_made_of_each_held_out_row(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, metrics = finished
    found = read_row_losses(folder)
    assert list(found.nats) == [row["method"] for row in metrics["table"]] and len(set(found.rows)) == 8
    for row in metrics["table"]:
        assert found.nats[row["method"]].sum() / found.tokens.sum() == pytest.approx(row["loss"], rel=1e-12)


def test_each_client_gains_loses_or_cannot_tell_by_rows_that_are_counted(
    finished: tuple[Path, dict[str, Any]], tiny_model: Path, rows_file: Path
) -> None:
    from conftest import overrides_for

    from apiary.data.federation import federate

    folder, metrics = finished
    config = loading.load(None, overrides_for(tiny_model, rows_file))
    held = {client.name: len(client.test) for client in federate(config.data, config.seed).clients}
    clients = json.loads((folder / "metrics.json").read_text())["clients"]
    for client in clients:
        own, mix = (client[key]["local"] for key in ("own_paired", "mix_paired"))
        assert (own["n"], mix["n"]) == (min(held[client["client"]], 8), 8)
        assert own["difference"] == pytest.approx(client["own"]["federated"] - client["own"]["local"])
        assert own["ci95"] is None and own["of"] == "of these two models on these rows"
        federated = next(row["loss"] for row in metrics["table"] if row["method"] == "federated")
        assert mix["difference"] == pytest.approx(federated - client["mix_loss"]["local"])
    gain = metrics["gain"]
    counts = [min(n, 8) for n in held.values()]
    assert (gain["gain"], gain["lose"], gain["cannot_tell"]) == (0, 0, 3)
    assert tuple(gain["rows"]) == (min(counts), max(counts)) and gain["over"] == "clients"
    assert gain["mean_ci95"][0] < gain["mean"] < gain["mean_ci95"][1]


@pytest.mark.slow
def test_runs_of_two_seeds_are_compared_on_the_command_line(tmp_path: Path, tiny_model: Path, rows_file: Path) -> None:
    """Twice the same rows and a random model: the interval is over seeds and rows, and of one run there is none."""
    from conftest import overrides_for

    more = ["evaluate.max_examples=60", "data.test_fraction=0.6", "evaluate.generate=false", "rounds=1"]
    for seed in (0, 1):
        run(tmp_path / str(seed), [*overrides_for(tiny_model, rows_file), *more, f"seed={seed}"])
    done = apiary("compare", tmp_path / "0", tmp_path / "1")
    assert done.returncode == 0, done.stderr
    assert "intervals are over seeds and rows" in done.stdout
    found = json.loads(apiary("compare", tmp_path / "0", tmp_path / "1", "--json").stdout)
    assert found["seeds"] == [0, 1] and set(found["paired"]) == {"base", "local", "central", "central_serial"}
    low, high = found["paired"]["local"]["ci95"]
    assert low < found["paired"]["local"]["difference"] < high
    assert f"{found['paired']['local']['difference']:+.3f}".replace("-", "−") in done.stdout  # noqa: RUF001
    assert_refused(apiary("compare", tmp_path / "0"), "at least two runs")
    assert_refused(apiary("compare", tmp_path / "0", tmp_path / "0"), "seed = 0", "-s seed=N")


@pytest.mark.slow
def test_a_private_run_says_that_its_baselines_had_no_noise(tmp_path: Path, tiny_model: Path, rows_file: Path) -> None:
    from conftest import overrides_for

    private = ["privacy.unit=record", "privacy.batch_rows=8", "rounds=1", "evaluate.baselines=['base', 'local']"]
    more = ["evaluate.max_examples=60", "evaluate.generate=false", "data.test_fraction=0.6"]
    metrics = run(tmp_path / "run", [*overrides_for(tiny_model, rows_file), *private, *more])
    low, high = metrics["paired"]["base"]["ci95"]
    assert low <= metrics["paired"]["base"]["difference"] <= high
    note = "training alone (local) went without noise, federated training with it"
    assert note in (tmp_path / "run" / "report.html").read_text() and note in table_plain(metrics)
    _, remarks = tuned.score(tuned.open_tuned(tmp_path / "run"), str(rows_file))
    assert any("local is not like with like: it went without the noise" in line for line in remarks)
    assert note in model_card.card(loading.load(tmp_path / "run" / "config.toml"), 4, metrics, {})


def test_a_base_without_a_chat_template_is_tuned_on_alpaca_and_says_so_everywhere(
    tmp_path: Path, tiny_model: Path, rows_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `auto` came to stays with the run, though its tokenizer gets a chat template later."""
    from conftest import overrides_for

    base = shutil.copytree(tiny_model, tmp_path / "base")
    given = [*overrides_for(base, rows_file), "rounds=1", "prompt.max_tokens=256", "evaluate.generate=false"]
    one, other = tmp_path / "one", tmp_path / "other"
    lines = io.StringIO()
    with make_progress(quiet=False, stream=lines) as observer:
        run(one, [*given, "prompt.template=auto", "evaluate.baselines=[]"], observers=[observer])
    run(other, [*given, "prompt.template=alpaca", "evaluate.baselines=[]"])
    assert same(adapter_of(one), adapter_of(other))
    words = "alpaca (the tokenizer has no chat template)"
    assert [event["template"] for event in events_of(one, "template")] == [words]
    assert events_of(other, "template") == []  # there was nothing to settle
    assert f"prompt template: {words}\n" in lines.getvalue()
    assert re.search(rf"Prompt template.*{re.escape(words)}", (one / "report.html").read_text(), re.DOTALL)
    card = "prompt template `alpaca` (the tokenizer has no chat template)"
    assert card in (one / "adapter" / "README.md").read_text()
    assert loading.load(one / "config.toml").prompt.template == "auto"
    assert loading.load(one / "adapter" / "apiary.toml").prompt.template == "alpaca"

    (base / "chat_template.jinja").write_text(CHATML)
    monkeypatch.setattr(adapters, "_bases", {})
    monkeypatch.setattr(adapters, "_models", {})
    assert adapters.load_base(loading.load(one / "config.toml").model)[1].chat_template
    digest = tuned.open_tuned(other).template.digest
    for place in (one, one / "adapter"):
        opened = tuned.open_tuned(place)
        assert (opened.template.name, opened.template.digest) == ("alpaca", digest)
        assert opened.config.prompt.template == "alpaca"
    assert tuned.open_tuned(one, ["prompt.template=plain"]).template.name == "plain"
    export.export_run(one, tmp_path / "export", merge=False)
    assert loading.load(tmp_path / "export" / "apiary.toml").prompt.template == "alpaca"
    assert "prompt template `alpaca`" in (tmp_path / "export" / "README.md").read_text()


def test_training_lowers_the_loss(finished: tuple[Path, dict[str, Any]]) -> None:
    _, metrics = finished
    losses = {row["method"]: row["loss"] for row in metrics["table"]}
    assert losses["federated"] < losses["base"] and losses["central"] < losses["base"]


def test_central_gets_the_steps_of_all_clients(finished: tuple[Path, dict[str, Any]]) -> None:
    """AdamW moves some weight by about the learning rate in each step, so the way that central went tells its steps."""
    folder, metrics = finished
    federated = sum(e["steps"] for e in events_of(folder, "client"))
    assert federated == 3 * 3 * 2
    steps = {row["method"]: row["steps"] for row in metrics["table"]}
    assert steps == {"base": 0, "local": 6, "federated": federated, "central": federated, "central_serial": 6}
    settings = loading.load(folder / "config.toml")
    start = adapters.fresh_adapter(adapters.load(settings.model, settings.adapter), 0)

    def furthest(place: Path) -> float:
        state = load_file(place / "adapter_model.safetensors")
        return max(float((state[name] - start[name]).abs().max()) for name in state)

    alone = furthest(folder / "baselines" / "local" / "client-00")
    assert 1.5 * alone < furthest(folder / "baselines" / "central") < 3 * federated * 5e-3


def test_each_client_keeps_its_own_steps(finished: tuple[Path, dict[str, Any]]) -> None:
    """What a client tells of a round is the sum, or the mean over tokens, of what it wrote down for itself."""
    folder, _ = finished
    told = events_of(folder, "client")
    assert len(told) == 9
    for event in told:
        lines = (folder / "clients" / event["client"] / "steps.jsonl").read_text().splitlines()
        steps = [step for step in map(json.loads, lines) if step["round"] == event["round"]]
        tokens = [step["tokens"] for step in steps]
        assert [step["step"] for step in steps] == list(range(event["steps"]))
        assert sum(tokens) == event["tokens"]
        assert np.average([step["loss"] for step in steps], weights=tokens) == pytest.approx(event["loss"])


def test_one_base_load_for_all_clients(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path, tiny_model: Path, rows_file: Path
) -> None:
    from conftest import overrides_for

    before = adapters.base_loads()
    run(tmp_path / "again", [*overrides_for(tiny_model, rows_file), "evaluate.baselines=[]"])
    assert adapters.base_loads() == before


def test_adapter_loads_in_plain_peft(finished: tuple[Path, dict[str, Any]], tiny_model: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder, _ = finished
    settings = loading.load(folder / "config.toml")
    lm = adapters.load(settings.model, settings.adapter)
    adapters.set_adapter(lm, adapter_of(folder))
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        ours = lm.model(ids).logits
        base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        plain = PeftModel.from_pretrained(base, str(folder / "adapter"))(ids).logits
    torch.testing.assert_close(plain, ours, rtol=0, atol=1e-5)
    assert not torch.allclose(AutoModelForCausalLM.from_pretrained(tiny_model)(ids).logits, ours, atol=1e-4)


@pytest.mark.slow
def test_same_seed_same_adapter_other_seed_another(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path, tiny_model: Path, rows_file: Path
) -> None:
    from conftest import overrides_for

    folder, _ = finished
    overrides = [*overrides_for(tiny_model, rows_file), "evaluate.baselines=[]", "evaluate.generate=false"]
    run(tmp_path / "same", overrides)
    run(tmp_path / "other", [*overrides, "seed=1"])
    first, same, other = adapter_of(folder), adapter_of(tmp_path / "same"), adapter_of(tmp_path / "other")
    assert all(torch.equal(first[k], same[k]) for k in first)
    assert not all(torch.equal(first[k], other[k]) for k in first)


def test_nothing_private_is_on_the_wire_or_in_the_log(finished: tuple[Path, dict[str, Any]], rows_file: Path) -> None:
    folder, _ = finished
    log = (folder / "log.jsonl").read_text()
    answers = {json.loads(line)["instruction"] for line in rows_file.read_text().splitlines()}
    assert not any(text in log for text in answers)
    assert str(rows_file.parent) not in log


def test_fedprox_pulls_the_clients_together(tmp_path: Path, small_run: list[str]) -> None:
    quiet = ["evaluate.baselines=[]", "evaluate.generate=false", "rounds=1", "train.steps=8"]
    run(tmp_path / "plain", [*small_run, *quiet])
    run(tmp_path / "prox", [*small_run, *quiet, 'train.penalties=[{name="fedprox", mu=100.0}]'])
    start = adapters.fresh_adapter(adapters.load(*_model(small_run)), 0)

    def moved(folder: Path) -> float:
        return float(np.sqrt(sum(float((v - start[k]).square().sum()) for k, v in adapter_of(folder).items())))

    assert moved(tmp_path / "prox") < 0.7 * moved(tmp_path / "plain")


def _model(overrides: list[str]) -> tuple[Any, Any]:
    settings = loading.load(None, overrides)
    return settings.model, settings.adapter


@pytest.mark.slow
@pytest.mark.ray
def test_ray_gives_the_same_adapter(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path, tiny_model: Path, rows_file: Path
) -> None:
    from conftest import overrides_for

    folder, _ = finished
    extra = ["simulate.engine=ray", "evaluate.baselines=[]", "evaluate.generate=false"]
    # In a process of its own: Ray leaves files and processes open in its driver's.
    settings = with_overrides(overrides_for(tiny_model, rows_file), *extra)
    done = in_a_process("simulate", "--quiet", "--out", tmp_path / "ray", *settings)
    assert done.returncode == 0, done.stderr[-3000:]
    local, ray = adapter_of(folder), adapter_of(tmp_path / "ray")
    assert set(local) == set(ray)
    for name in local:
        torch.testing.assert_close(ray[name], local[name], rtol=0, atol=1e-6)


def start_run(folder: Path, overrides: list[str]) -> subprocess.Popen[str]:
    return start("simulate", "--out", folder, *with_overrides(overrides))


def resumed(folder: Path) -> subprocess.Popen[str]:
    return start("simulate", "--out", folder, "--resume")


@pytest.mark.slow
def test_kill_9_then_resume_is_bit_identical(tmp_path: Path, tiny_model: Path, rows_file: Path) -> None:
    from conftest import overrides_for

    overrides = [*overrides_for(tiny_model, rows_file), "rounds=12", "evaluate.baselines=[]", "evaluate.generate=false"]
    run(tmp_path / "unbroken", overrides)
    rng = random.Random(time.time_ns())
    folder = tmp_path / "broken"
    for attempt in range(3):
        process = resumed(folder) if attempt else start_run(folder, overrides)
        target = 2 + 3 * attempt
        _wait_for_round(folder, target, process)
        time.sleep(rng.uniform(0, 0.15))
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    done = finish(resumed(folder))
    assert done.returncode == 0, done.stderr[-2000:]
    unbroken, broken = adapter_of(tmp_path / "unbroken"), adapter_of(folder)
    assert all(torch.equal(unbroken[k], broken[k]) for k in unbroken)
    rounds = [e["round"] for e in events_of(folder, "round")]
    assert rounds == list(range(1, 13))  # the log tells one story: each round once


@pytest.mark.slow
def test_kill_9_while_baselines_are_trained_changes_no_figure(
    tmp_path: Path, tiny_model: Path, rows_file: Path
) -> None:
    from conftest import overrides_for

    overrides = [*overrides_for(tiny_model, rows_file), "rounds=2", "train.steps=20"]
    whole = run(tmp_path / "unbroken", overrides)
    folder = tmp_path / "broken"
    process = start_run(folder, overrides)
    _wait_for(folder / "baselines" / "local" / "client-00", process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (folder / "metrics.json").exists()
    done = finish(resumed(folder))
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((folder / "metrics.json").read_text())["table"] == json.loads(json.dumps(whole["table"]))


@pytest.mark.slow
def test_a_directory_that_a_living_run_writes_is_closed_to_others_and_open_once_it_is_killed(
    tmp_path: Path, small_run: list[str]
) -> None:
    settings = [*small_run, "rounds=2000", "evaluate.baselines=[]", "evaluate.generate=false"]
    folder = tmp_path / "run"
    first = start_run(folder, settings)
    try:
        _wait_for_round(folder, 1, first)
        lines = (folder / "log.jsonl").read_text()
        for again in (lambda: start_run(folder, settings), lambda: resumed(folder)):
            assert_refused(finish(again()), "a run still goes on in it", f"process {first.pid}", "choose another --out")
        assert first.poll() is None and (folder / "log.jsonl").read_text().startswith(lines)
        _wait_for_round(folder, len(events_of(folder, "round")) + 3, first)  # and what it writes still arrives
    finally:
        first.kill()
        first.communicate()
    second = resumed(folder)
    try:
        _wait_for_round(folder, len(events_of(folder, "round")) + 3, second)
    finally:
        second.kill()
        second.communicate()
    rounds = [event["round"] for event in events_of(folder, "round")]
    assert rounds == list(range(1, len(rounds) + 1))
    assert [event["resumed"] > 0 for event in events_of(folder, "start")] == [False, True]


def test_a_checkpoint_is_not_taken_on_by_a_configuration_that_was_edited(tmp_path: Path, small_run: list[str]) -> None:
    folder = tmp_path / "run"
    run(folder, [*small_run, "rounds=1", "evaluate.baselines=[]", "evaluate.generate=false"])
    (folder / "metrics.json").unlink()
    text = (folder / "config.toml").read_text()
    (folder / "config.toml").write_text(text.replace("lr = 0.005", "lr = 0.05"))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    done = apiary("simulate", "--out", folder, "--resume")
    assert_refused(done, "round-0001", "train.lr (0.005 then, 0.05 now)", "config.toml")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    with pytest.raises(UserError, match=r"train\.lr"):  # and by the rounds themselves, should nobody have looked
        checkpoint.load(folder / "checkpoints", loading.load(folder / "config.toml"))


def test_what_is_wrong_with_a_run_leaves_no_directory(tmp_path: Path, small_run: list[str]) -> None:
    with pytest.raises(UserError):
        run(tmp_path / "runs" / "one", [*small_run, "data.source=nowhere.jsonl"])
    assert list(tmp_path.iterdir()) == []


def _wait_for_round(folder: Path, number: int, process: subprocess.Popen[str]) -> None:
    """Until that round is done, or a later one: a run keeps its newest checkpoints alone."""
    name = f"round-{number:04d}"
    _wait_until(lambda: any(p.name >= name for p in (folder / "checkpoints").glob("round-????")), name, process)


def _wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    _wait_until(path.exists, path.name, process)


def _wait_until(there: Callable[[], bool], name: str, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + LONGEST_S
    while not there():
        assert process.poll() is None, process.communicate()[1][-2000:]
        if time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"no {name} in {LONGEST_S:g} s: {process.communicate()[1][-2000:]}")
        time.sleep(0.01)


def test_files_of_the_user_are_not_taken_for_drafts(tmp_path: Path, small_run: list[str]) -> None:
    ours, theirs = tmp_path / ".config.toml.tmp", tmp_path / ".env"
    ours.write_text("half")
    theirs.write_text("TOKEN=1")
    with pytest.raises(UserError, match="not empty"):
        run(tmp_path, small_run)
    theirs.unlink()
    run(tmp_path, [*small_run, "rounds=1", "evaluate.baselines=[]", "evaluate.generate=false"])
    assert not ours.exists()
    theirs.write_text("TOKEN=1")
    simulate(loading.load(tmp_path / "config.toml"), tmp_path, resume=True)
    assert theirs.read_text() == "TOKEN=1"


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", pytest.param("ray", marks=pytest.mark.ray)])
def test_ctrl_c_ends_cleanly_and_says_how_to_go_on(tmp_path: Path, small_run: list[str], engine: str) -> None:
    folder = tmp_path / "run"
    settings = [*small_run, "rounds=2000", "evaluate.baselines=[]", f"simulate.engine={engine}"]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as where a shell has started the tests in the background
    try:
        process = start_run(folder, settings)
    finally:
        signal.signal(signal.SIGINT, before)
    _wait_for_round(folder, 1, process)
    process.send_signal(signal.SIGINT)
    done = finish(process)
    assert done.returncode == 130
    assert "--resume" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_dolly_recipe(shared: Path, tmp_path: Path) -> None:
    settings = loading.load(
        ROOT / "configs" / "dolly.toml",
        ["rounds=1", "train.steps=1", "evaluate.max_examples=8", "prompt.max_tokens=128", "data.max_rows=200"],
    )
    metrics = simulate(settings, tmp_path / "dolly")
    assert len(metrics["clients"]) == 10
    assert {row["method"] for row in metrics["table"]} >= {"base", "federated"}
    assert (tmp_path / "dolly" / "report.html").stat().st_size > 10_000


def test_answers_are_shown_also_where_none_are_measured(tmp_path: Path, small_run: list[str]) -> None:
    quick = [*small_run, "rounds=1", 'evaluate.baselines=["base"]']
    run(tmp_path / "measured", quick)
    run(tmp_path / "shown", [*quick, "evaluate.generate=false"])
    run(tmp_path / "neither", [*quick, "evaluate.generate=false", "evaluate.samples=0"])
    measured, shown, neither = (
        json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("measured", "shown", "neither")
    )
    assert len(shown["samples"]) == 6 and shown["samples"] == measured["samples"]
    assert all(row["accuracy"] is None for row in shown["table"]) and not neither["samples"]
