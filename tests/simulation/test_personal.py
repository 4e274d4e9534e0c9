"""Clients' own models after a simulated run: what they train on, what chooses, and what is reported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import instruction_rows, overrides_for
from safetensors.torch import load_file
from small_models import same
from typer.testing import CliRunner

from apiary.cli.main import app
from apiary.config import loading
from apiary.config.schema import RunConfig
from apiary.core.errors import UserError
from apiary.data import tokenization
from apiary.data.batches import Corpus
from apiary.data.examples import Example
from apiary.data.federation import decides, is_held_out, validates
from apiary.data.turns import Turn
from apiary.evaluation import comparison
from apiary.export import export, tuned
from apiary.models import adapter_files, adapters, mixtures
from apiary.report import personal_lines
from apiary.tracking.event_log import read_events
from client import handlers
from client.personal import candidates
from client.personal.candidates import Rows
from client.personal.choice import FEWEST, choose
from client.personal.own_model import OwnRows, Task
from client.training import trainer
from client.training.trainer import VisitPlan
from simulation.run import personalise, simulate

WEIGHTS = "adapter_model.safetensors"
CLIENTS = ("client-00", "client-01")
MORE = (
    *('data.partition={ name = "by_value", by = "skill" }', "data.clients=2", "data.test_fraction=0.25"),
    *("evaluate.max_examples=100", "evaluate.generate=false", "evaluate.every=0", "evaluate.clients=false"),
    *("train.steps=2", "rounds=4", 'evaluate.baselines=["local"]'),
)
OWN = ("personal.enabled=true", "personal.validation=0.3", "personal.budget=2")


def rows_in(folder: Path, held_out: str = "") -> Path:
    """200 rows of two skills in a file; held-out ones with other answers where `held_out` says which."""
    rows = instruction_rows(200, seed=3)
    for row in rows:
        if held_out and is_held_out(Example((Turn("user", row["instruction"]),), {}), 0.25):
            row["output"] = held_out
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(folder: Path, model: Path, rows: Path, *more: str) -> dict[str, Any]:
    return simulate(loading.load(None, [*overrides_for(model, rows), *MORE, *more]), folder)


def chosen(folder: Path, client: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "personal" / client / "choice.json").read_text())
    return found


def weights(place: Path) -> dict[str, torch.Tensor]:
    return load_file(place / WEIGHTS)


@pytest.fixture(scope="module")
def seen() -> list[Corpus]:
    """All that anything was trained on while `finished` was made."""
    return []


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, seen: list[Corpus]
) -> tuple[Path, dict[str, Any]]:
    folder, fit = tmp_path_factory.mktemp("own") / "run", trainer.fit

    def noted(lm: Any, start: Any, corpus: Corpus, config: Any, plan: VisitPlan) -> Any:
        seen.append(corpus)
        return fit(lm, start, corpus, config, plan)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "fit", noted)
        metrics = run(folder, tiny_model, rows_in(folder.parent), *OWN)
    return folder, metrics


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A run that set nothing apart."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    run(folder, tiny_model, rows_in(folder.parent))
    return folder


class Bench:
    """A run's model and rows, for fits and losses by hand."""

    def __init__(self, folder: Path) -> None:
        self.config: RunConfig = loading.load(folder / "config.toml")
        self.clients = {client.name: client for client in handlers.federation(self.config.to_json()).clients}
        self.lm = adapters.load(self.config.model, self.config.adapter)
        self.template = tokenization.make_template(self.config.prompt, self.lm.tokenizer)

    def corpus(self, rows: Sequence[Example]) -> Corpus:
        return tokenization.encode_all(rows, self.template, self.lm.tokenizer, self.config.prompt)

    def loss(self, state: Any, rows: Sequence[Example]) -> float:
        prepared = comparison.prepare(rows, self.template, self.lm, self.config)
        return comparison.measure(self.lm, state, prepared, self.config).loss

    def read(self, place: Path) -> dict[str, torch.Tensor]:
        return adapter_files.read_adapter(self.lm, place / WEIGHTS)

    def after(self, steps: int, rows: Sequence[Example], start: Any, lr: float, plan: VisitPlan) -> Any:
        """The adapter after so many steps of one fit."""
        found: list[Any] = []

        def look(record: Any) -> None:
            if record.step + 1 == steps:
                found.append(adapters.get_adapter(self.lm))

        train = self.config.train.model_copy(update={"lr": lr})
        trainer.fit(self.lm, start, self.corpus(rows), train, plan._replace(observers=(look,)))
        return found[0]


def texts(corpus: Corpus) -> set[tuple[int, ...]]:
    return {tuple(corpus.ids[a:b].tolist()) for a, b in zip(corpus.offsets, corpus.offsets[1:], strict=False)}


# -- whose rows ------------------------------------------------------------------------------------------------------


def test_nothing_is_ever_trained_on_a_row_that_chooses_or_is_reported(
    finished: tuple[Path, dict[str, Any]], seen: list[Corpus]
) -> None:
    """Neither in the rounds nor by a baseline nor by a candidate; all other rows are."""
    bench = Bench(finished[0])
    trained = set().union(*map(texts, seen))
    for client in bench.clients.values():
        assert all(validates(row, 0.3, 0) for row in client.validation) and len(client.validation) >= FEWEST
        assert not any(validates(row, 0.3, 0) for row in client.train)
        for rows in (client.validation, client.test):
            assert texts(bench.corpus(rows)).isdisjoint(trained)
        assert texts(bench.corpus(client.train)) <= trained
    assert len(seen) == 4 * 2 + 2 + 2 * 2  # visits, training alone as a baseline, and two trainings more of each client


def test_the_rows_that_are_reported_have_no_say(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path, tiny_model: Path
) -> None:
    """Other answers in all held-out rows: other figures, and the same choice and the same models, bit for bit."""
    folder, metrics = finished
    other = run(tmp_path / "run", tiny_model, rows_in(tmp_path, held_out="entirely another answer"), *OWN)
    for client, before in zip(other["clients"], metrics["clients"], strict=True):
        name = client["client"]
        assert chosen(tmp_path / "run", name) == chosen(folder, name)
        for place in ("personal", "baselines/local_best"):
            assert same(weights(tmp_path / "run" / place / name), weights(folder / place / name))
        assert client["own"]["personal"] != pytest.approx(before["own"]["personal"], rel=0.01)


def test_no_training_row_shares_its_words_with_one_that_chooses(tmp_path: Path, tiny_model: Path) -> None:
    """Curation's step against what is held out knows these rows too: in the run, for baselines, and for candidates."""
    rows = rows_in(tmp_path)
    config = loading.load(None, [*overrides_for(tiny_model, rows), *MORE, *OWN])
    first = handlers.federation(config.to_json()).clients[0].validation[0]
    phrase = "nine ponds below the mill hold the same old green water still"
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    for line in lines:
        if line["instruction"] == first.turns[0].text:
            line["output"] = phrase
    tags = {"skill": next(line["skill"] for line in lines if line["output"] == phrase)}
    asked = [(f"Say it, {number}.", Example((Turn("user", f"Say it, {number}."),), {})) for number in range(40)]
    trained = [text for text, row in asked if not is_held_out(row, 0.25) and not validates(row, 0.3, 0)]
    copies = [{**tags, "instruction": text, "output": phrase} for text in trained]
    rows.write_text("".join(json.dumps(row) + "\n" for row in (*lines, *copies)), encoding="utf-8")
    curated = ('curate.steps=[{ name = "held_out", boilerplate = 100 }]',)
    run(tmp_path / "run", tiny_model, rows, *OWN, *curated)
    bench = Bench(tmp_path / "run")
    client = bench.clients["client-00"]
    assert any(phrase in row.turns[-1].text for row in client.validation)
    copied = sum(phrase in row.turns[-1].text for row in client.train)
    assert copied >= 3 and chosen(tmp_path / "run", "client-00")["rows"]["train"] == len(client.train) - copied


# -- what is made ----------------------------------------------------------------------------------------------------


def test_training_alone_is_a_direct_fit_taken_where_the_validation_rows_say(
    finished: tuple[Path, dict[str, Any]],
) -> None:
    folder, _ = finished
    bench = Bench(folder)
    start = adapters.fresh_adapter(bench.lm, 0)
    for name in CLIENTS:
        told, rows = chosen(folder, name), bench.clients[name]
        made = {}
        for curve, length in (("alone, 8 steps", 8), ("alone", 16)):  # 4 rounds of 2 steps, and twice as many
            plan = VisitPlan(0, name, length, length)
            for steps, loss in told["curves"][curve]:
                state = bench.after(steps, rows.train, start, 5e-3, plan)
                assert bench.loss(state, rows.validation) == pytest.approx(loss, rel=1e-6)
                made[curve, steps] = (loss, state)
            looks = range(1, 9) if length == 16 else (8,)  # the shorter one is the baseline, taken at its end
            assert [steps for steps, _ in told["curves"][curve]] == [length // 8 * k for k in looks]
        (_, steps), (lowest, state) = min(made.items(), key=lambda item: (item[1][0], item[0][1]))
        assert told["alone_steps"] == steps
        assert same(weights(folder / "baselines" / "local_best" / name), state)
        alone = next(c for c in told["candidates"] if c["kind"] == "alone")
        assert alone["loss"] == lowest and alone["steps"] == steps
        # The schedule of the federation's own steps is the baseline `local`, which is kept as start and change.
        for tensor, kept in weights(folder / "baselines" / "local" / name).items():
            torch.testing.assert_close(made["alone, 8 steps", 8][1][tensor], kept, atol=1e-7, rtol=0)


def test_each_candidate_is_what_it_is_called(finished: tuple[Path, dict[str, Any]]) -> None:
    """Mixtures by hand from dense products; the tuned one by a fit at a third of the rate from the federated model."""
    folder, _ = finished
    bench = Bench(folder)
    joint, fresh = bench.read(folder / "adapter"), adapters.fresh_adapter(bench.lm, 0)
    for name in CLIENTS:
        told, rows = chosen(folder, name), bench.clients[name]
        found = {(c["kind"], c["weight"]): c for c in told["candidates"]}
        weights = [("mixed", 0.25), ("mixed", 0.5), ("mixed", 0.75)]
        assert list(found) == [("federated", 0), ("earlier", 0), *weights, ("tuned", 0), ("alone", 1)]
        assert found["federated", 0]["loss"] == pytest.approx(bench.loss(joint, rows.validation), rel=1e-6)
        assert found["federated", 0]["distance"] == 0 and found["federated", 0]["steps"] == 8
        part = bench.after(8, rows.train, fresh, 5e-3, VisitPlan(0, name, 8, 8))
        for weight in (0.25, 0.5, 0.75):
            entry = found["mixed", weight]
            assert entry["loss"] == pytest.approx(_loss_of_dense(bench, joint, part, weight, rows.validation), rel=1e-5)
            assert entry["steps"] == 16
            assert entry["distance"] == pytest.approx(weight * mixtures.distance(bench.lm, joint, part), rel=1e-4)
        steps = found["tuned", 0]["steps"] - 8
        tuned = bench.after(steps, rows.train, joint, 5e-3 * 0.333, VisitPlan(0, f"{name} tuned", 8, 8))
        assert found["tuned", 0]["loss"] == pytest.approx(bench.loss(tuned, rows.validation), rel=1e-5)
        curve = told["curves"]["tuned"]
        assert [at for at, _ in curve] == [8, 10, 12, 14, 16]
        assert found["tuned", 0]["loss"] == min(loss for at, loss in curve if at > 8)


def test_the_shared_model_is_looked_at_on_its_way(finished: tuple[Path, dict[str, Any]]) -> None:
    """After a quarter, a half and three quarters of the rounds, whose checkpoints stay; the best is a candidate."""
    folder, _ = finished
    bench = Bench(folder)
    assert [place.name for place in sorted((folder / "checkpoints").iterdir())] == [
        f"round-{number:04d}" for number in (1, 2, 3, 4)
    ]
    for name in CLIENTS:
        told, rows = chosen(folder, name), bench.clients[name].validation
        expected = [
            (2 * number, bench.loss(load_file(folder / f"checkpoints/round-{number:04d}/adapter.safetensors"), rows))
            for number in (1, 2, 3, 4)
        ]
        assert [steps for steps, _ in told["curves"]["federated"]] == [steps for steps, _ in expected]
        assert [loss for _, loss in told["curves"]["federated"]] == pytest.approx([loss for _, loss in expected])
        earlier = next(candidate for candidate in told["candidates"] if candidate["kind"] == "earlier")
        steps, loss = min(expected[:3], key=lambda look: look[1])
        assert (earlier["steps"], earlier["loss"]) == (steps, pytest.approx(loss))


def test_a_client_may_keep_the_shared_model_of_an_earlier_round(finished: tuple[Path, dict[str, Any]]) -> None:
    """Where what came after it made it much worse on that client's rows."""
    bench = Bench(finished[0])
    client, joint = bench.clients["client-00"], bench.read(finished[0] / "adapter")
    rows = Rows(bench.corpus(client.train), bench.corpus(client.validation))
    ruined = {n: t + 3 * torch.randn(t.shape, generator=torch.Generator().manual_seed(1)) for n, t in joint.items()}
    config = bench.config.model_copy(
        update={"personal": bench.config.personal.model_copy(update={"weights": (), "lr_factor": 1e-9, "margin": 0.0})}
    )
    before = [(2, adapters.fresh_adapter(bench.lm, 0)), (4, joint)]
    found = candidates.contest(bench.lm, config, "client-00", 8, ruined, rows, None, before)
    kinds = {candidate.kind: candidate for candidate in found.candidates}
    assert kinds["earlier"].steps == 4 and kinds["earlier"].nats.sum() < kinds["federated"].nats.sum()
    # without the training alone, which is better still, that is what is kept
    left = tuple(candidate for candidate in found.candidates if candidate.kind != "alone")
    assert left[choose(left, found.tokens, 1.0).chosen].kind == "earlier"


def _loss_of_dense(bench: Bench, one: Any, other: Any, weight: float, rows: Sequence[Example]) -> float:
    """The loss of the base with dense matrices added to its weights, without any adapter."""
    scale = bench.config.adapter.alpha / bench.config.adapter.rank**0.5
    adapters.set_adapter(bench.lm, adapters.fresh_adapter(bench.lm, 0))
    layers = {name.removesuffix(".lora_A.weight") for name in one if "lora_A" in name}
    before = {}
    for module in layers:
        layer = bench.lm.model.get_submodule(module).get_base_layer()
        before[module] = layer.weight.detach().clone()
        parts = [s[f"{module}.lora_B.weight"].numpy() @ s[f"{module}.lora_A.weight"].numpy() for s in (one, other)]
        change = scale * ((1 - weight) * parts[0] + weight * parts[1])
        with torch.no_grad():
            layer.weight += torch.from_numpy(change)
    try:
        corpus = bench.corpus(rows)
        from apiary.models.inference import ModelProbe

        nats, tokens = ModelProbe(bench.lm).losses(corpus)
        return float(nats.sum() / tokens.sum())
    finally:
        with torch.no_grad():
            for module, kept in before.items():
                bench.lm.model.get_submodule(module).get_base_layer().weight.copy_(kept)


def test_what_was_chosen_is_what_is_kept_measured_and_told(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, metrics = finished
    bench = Bench(folder)
    joint = bench.read(folder / "adapter")
    assert [event["client"] for event in read_events(folder) if event["event"] == "personal"] == list(CLIENTS)
    for client in metrics["clients"]:
        name = client["client"]
        told, rows, own = chosen(folder, name), bench.clients[name], bench.read(folder / "personal" / name)
        found = next(c for c in told["candidates"] if (c["kind"], c["weight"]) == (told["kept"], told["weight"]))
        assert bench.loss(own, rows.validation) == pytest.approx(found["loss"], rel=1e-5)
        best = min(c["loss"] for c in told["candidates"])
        assert found["loss"] - best <= 1.0 * (found["error"] or 0) or found["loss"] == best
        expected = {
            "federated": bench.loss(joint, rows.test),
            "personal": bench.loss(own, rows.test),
            "local_best": bench.loss(bench.read(folder / "baselines" / "local_best" / name), rows.test),
            "local": bench.loss(bench.read(folder / "baselines" / "local" / name), rows.test),
        }
        for method, loss in expected.items():
            assert client["own"][method] == pytest.approx(loss, rel=1e-5)
            assert client["personal"]["own"][method] == pytest.approx(loss, rel=1e-5)
        pair = client["personal"]["own_paired"]["local_best"]
        assert pair["difference"] == pytest.approx(expected["personal"] - expected["local_best"], abs=1e-6)
        assert pair["n"] == len(rows.test)
        everyone = handlers.federation(bench.config.to_json()).test
        assert client["personal"]["mix_loss"]["personal"] == pytest.approx(bench.loss(own, everyone), rel=1e-5)
    table = {row["method"]: row for row in metrics["personal"]["table"]}
    mean = np.mean([client["own"]["personal"] for client in metrics["clients"]])
    assert table["personal"]["own"] == pytest.approx(mean) and table["local"]["steps"] == 8
    assert table["local_best"]["steps"] <= 16 and metrics["personal"]["set_apart"] is True


def test_a_client_with_nothing_to_train_on_makes_no_model_and_ends_no_run(tmp_path: Path, tiny_model: Path) -> None:
    rows = tmp_path / "rows"
    rows.mkdir()
    known = instruction_rows(120, seed=3)
    longer = [{**row, "instruction": f"{n} " + "and so on " * 200} for n, row in enumerate(known)]
    for name, given in (("full", known), ("long", longer)):
        (rows / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given), encoding="utf-8")
    more = ("data.partition=natural", "prompt.on_long=drop", "strategy.min_clients=1")
    metrics = run(tmp_path / "run", tiny_model, rows, *OWN, *more)
    by_name = {client["client"]: client for client in metrics["clients"]}
    assert by_name["full"]["personal"]["kept"] and "personal" not in by_name["long"]
    warned = [event["message"] for event in read_events(tmp_path / "run") if event["event"] == "warning"]
    assert "long makes no model of its own: none of its rows can be trained on" in warned


def test_a_client_with_few_rows_keeps_the_federated_model(finished: tuple[Path, dict[str, Any]]) -> None:
    bench = Bench(finished[0])
    client, joint = bench.clients["client-00"], bench.read(finished[0] / "adapter")
    for count in (0, FEWEST - 1):
        rows = Rows(bench.corpus(client.train), bench.corpus(client.validation[:count]))
        found = candidates.contest(bench.lm, bench.config, "client-00", 4, joint, rows)
        assert found.candidates[found.choice.chosen].kind == "federated" and same(found.adapter, joint)
        # ... and training alone is taken after as many steps as in the federation, for nothing says where it is best
        alone = next(candidate for candidate in found.candidates if candidate.kind == "alone")
        assert alone.steps == 4


def test_a_training_that_diverges_costs_no_more_than_itself(
    finished: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(finished[0])
    client, joint, fit = bench.clients["client-00"], bench.read(finished[0] / "adapter"), trainer.fit

    def fragile(lm: Any, start: Any, corpus: Any, config: Any, plan: VisitPlan) -> Any:
        if plan.client.endswith("tuned"):
            fit(lm, start, corpus, config, plan._replace(steps=3))
            raise FloatingPointError("loss nan at step 4")
        return fit(lm, start, corpus, config, plan)

    monkeypatch.setattr(trainer, "fit", fragile)
    rows = Rows(bench.corpus(client.train), bench.corpus(client.validation))
    found = candidates.contest(bench.lm, bench.config, "client-00", 8, joint, rows)
    assert [steps for steps, _ in found.curves["tuned"]] == [8, 10]


# -- kept, resumed, handed on ----------------------------------------------------------------------------------------


def test_a_killed_run_takes_what_is_there_already(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(finished[0], tmp_path / "run")
    for name in ("metrics.json", "report.html"):
        (folder / name).unlink()
    (folder / "personal" / "client-01" / "choice.json").unlink()  # killed between the models and the choice
    made: list[str] = []
    contest = candidates.contest

    def noted(lm: Any, config: Any, client: str, *rest: Any) -> Any:
        made.append(client)
        return contest(lm, config, client, *rest)

    monkeypatch.setattr(candidates, "contest", noted)
    again = simulate(loading.load(folder / "config.toml"), folder, resume=True)
    assert made == ["client-01"]
    for client, before in zip(again["clients"], finished[1]["clients"], strict=True):
        assert client["own"] == before["own"] and client["personal"] == before["personal"]


def test_an_own_model_is_a_plain_peft_folder_and_says_what_it_is(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder, _ = finished
    bench = Bench(folder)
    one, other = bench.read(folder / "adapter"), bench.read(folder / "baselines" / "local_best" / "client-00")
    place = tmp_path / "client-00"
    made = mixtures.mixed(bench.lm, one, other, 0.5)
    adapter_files.save_adapter(bench.lm, made, place, "card")
    for name in ("apiary.toml",):
        shutil.copy(folder / "personal" / "client-00" / name, place / name)
    (place / "choice.json").write_text(json.dumps({**chosen(folder, "client-00"), "kept": "mixed", "weight": 0.5}))
    to = export.export_run(place, tmp_path / "out", merge=False).folder
    assert json.loads((to / "adapter_config.json").read_text())["r"] == 8  # 4 of each
    base = AutoModelForCausalLM.from_pretrained(bench.lm.name)
    plain = PeftModel.from_pretrained(base, to).eval()
    ids = torch.arange(2, 34).reshape(2, 16)
    adapters.set_adapter(bench.lm, made)
    with torch.no_grad():
        expected = bench.lm.model(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(plain(input_ids=ids, use_cache=False).logits, expected, atol=2e-5, rtol=1e-4)
    card = (to / "README.md").read_text()
    assert "the own model of one client" in card and "0.5 of a training alone" in card
    assert "whatever the run promises to rows does not cover it" in card
    assert tuned.open_tuned(folder / "personal" / "client-01").config.adapter.rank == 4


# -- after the run ---------------------------------------------------------------------------------------------------


def test_a_run_that_set_nothing_apart_chooses_by_half_of_the_held_out_rows(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shared adapter has seen all training rows, so none of them may choose; the other half is reported."""
    folder = shutil.copytree(plain, tmp_path / "run")
    before = json.loads((folder / "metrics.json").read_text())
    metrics = personalise(folder, ["personal.weights=[0.5]"])
    bench = Bench(folder)
    assert not bench.config.personal.enabled
    for client, was in zip(metrics["clients"], before["clients"], strict=True):
        name = client["client"]
        rows = bench.clients[name]
        deciding, other = ([row for row in rows.test if decides(row) == half] for half in (True, False))
        told, own = chosen(folder, name), bench.read(folder / "personal" / name)
        assert told["rows"] == {
            "train": len(rows.train),
            "validation": len(deciding),
            "chosen_by": "half of the client's held-out rows; figures are on the other half",
        }
        joint = bench.loss(bench.read(folder / "adapter"), deciding)
        assert told["curves"]["tuned"][0][1] == pytest.approx(joint, rel=1e-6)
        assert client["personal"]["own"]["personal"] == pytest.approx(bench.loss(own, other), rel=1e-5)
        assert client["own"] == was["own"]  # on all held-out rows: nothing on half of them stands beside these
    assert metrics["personal"]["set_apart"] is False and len(metrics["personal"]["table"]) == 4
    assert json.loads((folder / "metrics.json").read_text())["table"] == before["table"]
    lines = personal_lines(metrics)
    assert "half of each client's held-out rows chose" in "\n".join(lines) and "Own model" in "\n".join(lines)
    assert "Each client's own model" in (folder / "report.html").read_text()
    # The command says the same, and takes what is there already.
    monkeypatch.setattr(candidates, "contest", lambda *_: pytest.fail("made anew"))
    done = CliRunner().invoke(app, ["personal", str(folder), "--quiet", "-s", "personal.weights=[0.5]"])
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[: len(lines)] == lines


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("train.lr=1", r"-s train.lr: the run is over; only keys of personal"),
        ("personal.enabled=true", r"-s personal.enabled: it says which rows the run trained on"),
        ("personal.validation=0.5", r"-s personal.validation: it says which rows"),
        ("personal.budget=1", r"personal.budget"),
        ("personal.weights=[1.0]", r"personal.weights names 1: give weights between 0 and 1"),
    ],
)
def test_after_a_run_only_how_models_are_made_can_be_said(plain: Path, setting: str, line: str) -> None:
    with pytest.raises(UserError, match=line):
        personalise(plain, [setting])


def test_a_run_that_is_none_or_not_over_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        personalise(tmp_path / "nothing")
    (tmp_path / "metrics.json").write_text('{"schema": 1, "sites": []}')
    with pytest.raises(
        UserError, match=r"a deployed run, .* each makes its own model there \(apiary deploy personal\)"
    ):
        personalise(tmp_path)


def test_what_does_not_go_with_own_models_is_refused(tmp_path: Path) -> None:
    from strategies.from_config import from_config

    with pytest.raises(UserError, match="trains without gradients"):
        from_config(loading.load(None, ["personal.enabled=true", "strategy.name=fedkseed", "train.lr=1e-3"]))
    with pytest.raises(UserError, match=r"continual\.stages"):
        loading.load(None, ["personal.enabled=true", 'continual.stages=[["sort"], ["count"]]'])


# -- with other methods ----------------------------------------------------------------------------------------------


def test_with_a_b_of_each_clients_own_the_federated_candidate_is_its_own(tmp_path: Path, tiny_model: Path) -> None:
    more = ("adapter.share=a", "evaluate.clients=true", "evaluate.every=1")
    metrics = run(tmp_path / "run", tiny_model, rows_in(tmp_path), *OWN, *more)
    bench = Bench(tmp_path / "run")
    for client in metrics["clients"]:
        name = client["client"]
        at_site = bench.read(tmp_path / "run" / "clients" / name / "adapter")
        found = chosen(tmp_path / "run", name)["candidates"][0]
        assert found["loss"] == pytest.approx(bench.loss(at_site, bench.clients[name].validation), rel=1e-5)
        assert client["own"]["federated"] == pytest.approx(client["personal"]["own"]["federated"], rel=1e-5)


@pytest.mark.slow
def test_under_record_level_privacy_the_promise_is_not_made_of_own_models(tmp_path: Path, tiny_model: Path) -> None:
    more = ("privacy.unit=record", "privacy.batch_rows=8", "privacy.epsilon=20", "evaluate.clients=false")
    metrics = run(tmp_path / "run", tiny_model, rows_in(tmp_path), *OWN, *more)
    said = "\n".join(personal_lines(metrics))
    assert "made without noise" in said and "nothing of them is released" in said
    for name in CLIENTS:
        card = (tmp_path / "run" / "personal" / name / "README.md").read_text()
        if chosen(tmp_path / "run", name)["kept"] != "federated":
            assert "does not cover it" in card
        assert "epsilon =" not in card


@pytest.mark.slow
def test_attackers_get_no_own_model_and_base_deltas_are_mixed(tmp_path: Path, tiny_model: Path) -> None:
    more = ("data.clients=4", "data.partition=iid", "simulate.attackers=0.25", "strategy.name=flora")
    metrics = run(tmp_path / "run", tiny_model, rows_in(tmp_path), *OWN, *more)
    hostile = metrics["attack"]["clients"]
    assert [c["client"] for c in metrics["clients"] if "personal" not in c] == hostile
    bench = Bench(tmp_path / "run")
    joint = bench.read(tmp_path / "run" / "adapter")
    name = next(c["client"] for c in metrics["clients"] if "personal" in c)
    found = chosen(tmp_path / "run", name)["candidates"][0]
    rows = bench.clients[name].validation
    assert found["loss"] == pytest.approx(bench.loss(joint, rows), rel=1e-5)


def test_a_model_is_made_anew_where_anything_that_it_follows_from_differs() -> None:
    base, rows = loading.load(None, []), OwnRows((1, 2), (3,), (4,))  # type: ignore[arg-type]
    task = Task("c", 4, {"w": torch.ones(2)}, rows, Path("own"), Path("alone"))
    others = {
        task._replace(steps=5).seal(base),
        task._replace(federated={"w": torch.zeros(2)}).seal(base),
        task._replace(rows=rows._replace(validation=())).seal(base),
        *(
            task.seal(loading.load(None, [s]))
            for s in ("personal.budget=4", "train.lr=1e-3", "seed=1", "adapter.rank=8")
        ),
    }
    assert len(others | {task.seal(base)}) == 8
    alike = task._replace(rows=rows._replace(reported=())).seal(loading.load(None, ["train.threads=1"]))
    assert alike == task.seal(base)
