"""FedSA-LoRA: A is shared and averaged, B stays with its client, on its own disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from killing import killed_before_checkpoint
from safetensors.torch import load_file

import strategies
from apiary.config import loading
from apiary.core.errors import UserError
from apiary.core.lora import is_b
from apiary.data.turns import Turn
from apiary.export import export, tuned
from apiary.models import adapters
from apiary.report import table_plain
from apiary.tracking.event_log import read_events
from client import compression, handlers, round_files
from client.training import trainer
from server import checkpoint, deployment_run
from simulation.run import simulate
from strategies import fedsa, scaffold

SHARE = ["adapter.share=a", "evaluate.generate=false", "evaluate.baselines=[]"]


def run(folder: Path, overrides: list[str], **keys: Any) -> dict[str, Any]:
    return simulate(loading.load(None, overrides), folder, **keys)


class Visits:
    """What clients start from and change, as they train."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.starts: dict[str, list[dict[str, torch.Tensor]]] = {}
        self.deltas: dict[str, list[dict[str, torch.Tensor]]] = {}
        self.tokens: dict[str, list[int]] = {}
        fit = trainer.fit

        def noted(lm: Any, start: Any, corpus: Any, config: Any, plan: trainer.VisitPlan) -> trainer.FitResult:
            result = fit(lm, start, corpus, config, plan)
            if plan.client != "central":
                self.starts.setdefault(plan.client, []).append({n: t.clone() for n, t in start.items()})
                self.deltas.setdefault(plan.client, []).append(result.delta)
                self.tokens.setdefault(plan.client, []).append(result.report.tokens)
            return result

        monkeypatch.setattr(trainer, "fit", noted)


def numpy_of(state: dict[str, torch.Tensor], b: bool) -> dict[str, np.ndarray]:
    return {name: t.double().numpy() for name, t in state.items() if is_b(name) == b}


@pytest.mark.slow
def test_a_is_averaged_and_each_b_goes_on_where_its_client_left_it(
    small_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the equations of the paper, in numpy: A of all, B of each, over rounds that some clients skip."""
    visits = Visits(monkeypatch)
    settings = [*small_run, *SHARE, "rounds=4", "strategy.fraction=0.5", "strategy.weighting=uniform"]
    run(tmp_path / "run", settings)
    asked = [event["clients"] for event in read_events(tmp_path / "run") if event["event"] == "asked"]
    assert len({tuple(clients) for clients in asked}) > 1 and {c for clients in asked for c in clients} == set(
        visits.starts
    )
    first = next(iter(visits.starts.values()))[0]
    shared = numpy_of(first, b=False)
    own = {client: {n: 0 * b for n, b in numpy_of(first, b=True).items()} for client in visits.starts}
    done = dict.fromkeys(visits.starts, 0)
    for clients in asked:
        moved = []
        for client in clients:
            start, delta = visits.starts[client][done[client]], visits.deltas[client][done[client]]
            for name, a in shared.items():
                np.testing.assert_allclose(start[name], a, atol=1e-6)
            for name, b in own[client].items():
                np.testing.assert_allclose(start[name], b, atol=1e-6)
            own[client] = {n: b + delta[n].double().numpy() for n, b in own[client].items()}
            moved.append(numpy_of(delta, b=False))
            done[client] += 1
        shared = {n: a + np.mean([m[n] for m in moved], axis=0) for n, a in shared.items()}
    exported = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    for name, a in shared.items():
        np.testing.assert_allclose(exported[name], a, atol=1e-6)
    assert not any(t.any() for name, t in exported.items() if is_b(name))
    for client, factors in own.items():
        personal = load_file(tmp_path / "run" / "personal" / client / "adapter_model.safetensors")
        for name, b in factors.items():
            np.testing.assert_allclose(personal[name], b, atol=1e-6)
            assert personal[name].any()


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, rows_file: Path
) -> tuple[Path, dict[str, Any]]:
    """A run whose clients hold different skills, with all baselines."""
    from conftest import overrides_for

    folder = tmp_path_factory.mktemp("personal") / "run"
    more = ['data.partition={ name = "by_value", by = "skill" }', "data.clients=2"]
    more += ["data.test_fraction=0.3", "evaluate.max_examples=100"]
    settings = [*overrides_for(tiny_model, rows_file), *more, "adapter.share=a", "rounds=4", "train.steps=6"]
    return folder, run(folder, settings)


def test_no_b_travels_and_the_bytes_are_those_of_a(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = finished
    state, _ = checkpoint.load(folder / "checkpoints") or (None, None)
    assert state is not None and not any(map(is_b, state.adapter))
    size = 4 * sum(tensor.numel() for tensor in state.adapter.values())
    for event in read_events(folder):
        if event["event"] == "round":
            assert size <= event["bytes_up"] / event["clients"] < 1.3 * size
            assert size <= event["bytes_down"] / event["asked"] < 1.3 * size


def test_the_table_is_of_the_personal_models_and_says_so(finished: tuple[Path, dict[str, Any]]) -> None:
    """The federated row by hand: the mean over clients, each with its own factors, on all held-out rows."""
    folder, metrics = finished
    settings = loading.load(folder / "config.toml")
    lm = adapters.load(settings.model, settings.adapter)
    from apiary.data import tokenization
    from apiary.evaluation import comparison

    template = tokenization.make_template(settings.prompt, lm.tokenizer)
    held_out = comparison.prepare(handlers.federation(settings.to_json()).test, template, lm, settings)
    nats, tokens = [], 0.0
    for place in sorted((folder / "personal").iterdir()):
        scored = comparison.measure(lm, load_file(place / "adapter_model.safetensors"), held_out, settings)
        nats.append(float(scored.nats.sum()))
        tokens = float(scored.tokens.sum())
    rows = {row["method"]: row["loss"] for row in metrics["table"]}
    assert len(nats) == 2 and rows["federated"] == pytest.approx(np.mean(nats) / tokens, rel=1e-6)
    assert rows["federated"] != pytest.approx(rows["base"], rel=1e-3)
    for client in metrics["clients"]:
        assert client["own"]["federated"] < client["own"]["base"]
    assert "each keeps a B of its own" in table_plain(metrics)
    assert "each keeps a B of its own" in (folder / "report.html").read_text()


def test_a_run_of_an_earlier_version_says_it_too(finished: tuple[Path, dict[str, Any]]) -> None:
    """Its metrics name what is shared, and have no sentence of the method's."""
    _, metrics = finished
    assert metrics["each_has"] and metrics["share"] == "a"
    before = {key: value for key, value in metrics.items() if key != "each_has"}
    assert table_plain(before) == table_plain(metrics)


def test_in_each_round_clients_score_their_own_model_and_the_server_none(
    finished: tuple[Path, dict[str, Any]],
) -> None:
    folder, metrics = finished
    told = [event for event in read_events(folder) if event["event"] == "evaluate"]
    assert [event["round"] for event in told] == [0, 1, 2, 3, 4] and not any("loss" in event for event in told)
    for client in metrics["clients"]:
        name = client["client"]
        assert told[-1]["clients"][name] == pytest.approx(client["own"]["federated"], rel=1e-4)
        assert told[0]["clients"][name] == pytest.approx(client["own"]["base"], rel=1e-4)


def test_a_personal_model_can_be_talked_to_and_the_shared_half_cannot(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = finished
    (one, other) = sorted((folder / "personal").iterdir())
    question = [Turn("user", "Say the last word: bee hive wax 1")]
    said = {tuned.reply(tuned.open_tuned(place), question, 6) for place in (one, other)}
    assert all(answer.written for answer in said)
    at_site = load_file(folder / "clients" / one.name / "adapter" / "adapter_model.safetensors")
    ours = load_file(one / "adapter_model.safetensors")
    assert all(torch.equal(at_site[name], ours[name]) for name in ours)
    for half in (folder, folder / "adapter"):
        with pytest.raises(UserError, match=r"no model by themselves.*personal"):
            tuned.open_tuned(half)
    assert "B is zero" in (folder / "adapter" / "README.md").read_text()
    assert "B is zero" not in (one / "README.md").read_text()
    export.export_run(one, folder.parent / "exported", merge=False)


@pytest.mark.slow
def test_who_is_never_asked_to_measure_has_its_model_all_the_same(
    small_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A site's model is put together at the site alone: without it, all of its training would be lost to it."""
    visits = Visits(monkeypatch)
    run(tmp_path / "run", [*small_run, *SHARE, "rounds=3", "strategy.fraction=0.5", "evaluate.every=0"])
    assert visits.starts
    for client, starts in visits.starts.items():
        found = load_file(tmp_path / "run" / "clients" / client / "adapter" / "adapter_model.safetensors")
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, starts[-1][name] + visits.deltas[client][-1][name], rtol=0, atol=0)


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(small_run: list[str], tmp_path: Path) -> None:
    settings = [*small_run, *SHARE, "rounds=4"]
    run(tmp_path / "whole", settings)
    with killed_before_checkpoint(3):
        run(tmp_path / "cut", settings)
    drafts = [tmp_path / "cut" / place for place in ("clients/client-00/.adapter-x1", "personal/.client-00-x1")]
    for draft in drafts:  # what a harder kill leaves
        draft.mkdir(parents=True)
        (draft / "adapter_model.safetensors").touch()
    run(tmp_path / "cut", settings, resume=True)
    assert not any(draft.exists() for draft in drafts)
    for name in ("client-00", "client-01", "client-02"):
        whole, cut = (
            load_file(tmp_path / f / "personal" / name / "adapter_model.safetensors") for f in ("whole", "cut")
        )
        assert all(torch.equal(whole[n], cut[n]) for n in whole)
    ends = [
        [e["clients_loss"] for e in read_events(tmp_path / f) if e["event"] == "evaluate"] for f in ("whole", "cut")
    ]
    assert ends[0] == ends[1]


def test_what_is_kept_is_for_its_owner_and_old_files_go(tmp_path: Path) -> None:
    for number in (1, 2, 5, 6, 8):
        round_files.save(tmp_path, "personal", number, {"b": torch.tensor([float(number)])}, back={1})
    round_files.save(tmp_path, "personal", 7, {"b": torch.tensor([0.0])})  # a straggler
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"personal-000{n}.safetensors" for n in (1, 5, 6, 8)]
    assert all(path.stat().st_mode & 0o077 == 0 for path in tmp_path.iterdir())
    assert (
        round_files.newest(tmp_path, "personal", before=8)["b"] == 6
        and round_files.newest(tmp_path, "other", before=8) == {}
    )
    round_files.begin(tmp_path, 6)
    assert (
        round_files.newest(tmp_path, "personal", before=9)["b"] == 5 and round_files.load(tmp_path, "personal", 6) == {}
    )


@pytest.mark.slow
def test_it_goes_with_privacy_and_a_server_optimiser(small_run: list[str], tmp_path: Path) -> None:
    private = ["privacy.unit=record", "privacy.batch_rows=8", "rounds=2", "strategy.server_optimizer=momentum"]
    metrics = run(tmp_path / "run", [*small_run, *SHARE, *private])
    assert metrics["privacy"]["epsilon"] > 0 and len(list((tmp_path / "run" / "personal").iterdir())) == 3


@pytest.mark.parametrize(
    ("settings", "why", "way_out"),
    [
        (["adapter.train=b"], "trains both factors", "leave it out"),
        (["strategy.name=flexlora"], "one factor alone", "fedavg"),
        (['continual.stages=[["first"], ["last"]]'], "measured on one model for all", "one a client"),
        (["simulate.attackers=0.2"], "one model for all", "has none"),
        (["evaluate.clients=false"], "clients alone can score", "leave the key out"),
    ],
)
def test_what_does_not_go_with_it_is_refused(settings: list[str], why: str, way_out: str) -> None:
    with pytest.raises(UserError) as told:
        loading.load(None, ["adapter.share=a", *settings])
    (line,) = told.value.problems
    assert why in line and way_out in line


def test_other_ranks_are_refused() -> None:
    with pytest.raises(UserError, match="takes the rank 16 alone"):
        strategies.from_config(loading.load(None, ["adapter.share=a", "adapter.ranks=[4, 16]"]))


def test_a_server_of_sites_says_that_it_measures_nothing(rows_file: Path) -> None:
    said: list[dict[str, Any]] = []

    class Log:
        def event(self, kind: str, **fields: Any) -> None:
            said.append({"event": kind, **fields})

    log: Any = Log()
    assert deployment_run._held_out(loading.load(None, ["adapter.share=a", f"data.test={rows_file}"]), log) is None
    assert "data.test is not measured" in said[0]["message"] and said[0]["event"] == "warning"


@pytest.mark.parametrize("kind", [fedsa.LOCAL.keeps, scaffold.LOCAL.keeps, compression.KIND])
def test_a_straggler_changes_nothing_of_what_a_later_round_left(kind: str, tmp_path: Path) -> None:
    round_files.save(tmp_path, kind, 6, {"x": torch.tensor([6.0])})
    round_files.save(tmp_path, kind, 5, {"x": torch.tensor([5.0])})
    assert round_files.newest(tmp_path, kind, before=7)["x"].item() == 6.0


def test_a_visit_that_ends_late_does_not_undo_a_later_one(tmp_path: Path) -> None:
    start, delta = {"m.lora_B.weight": torch.zeros(2, 1)}, {"m.lora_B.weight": torch.ones(2, 1)}
    for number, size in ((6, 1), (5, 5)):
        _, kept = fedsa.LOCAL.finish(start, {name: size * t for name, t in delta.items()})
        round_files.save(tmp_path, fedsa.LOCAL.keeps, number, kept)
    assert round_files.newest(tmp_path, fedsa.LOCAL.keeps, before=7)["m.lora_B.weight"].tolist() == [[1.0], [1.0]]
