"""Ditto: a shared model as in federated averaging, and one of each client's own that is tied to it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deployment import overrides, write_rows
from flwr.app import ArrayRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto
from killing import killed_before_checkpoint
from reference import ditto as reference
from safetensors.torch import load_file
from torch import Tensor

import strategies
from apiary.config import loading
from apiary.core import counts
from apiary.core.errors import UserError
from apiary.core.lora import Factors, join, scaling, split
from apiary.core.messages import ClientInfo, Payload, Update, Visit
from apiary.data.turns import Turn
from apiary.export import tuned
from apiary.models import adapters
from apiary.report import table_plain
from apiary.tracking.event_log import read_events
from apiary.transport import codec as codecs
from apiary.transport import flower_records
from apiary.transport.from_config import configured_codec
from client.site_worker import Facts, Service
from client.training import trainer
from client.worker import Worker
from client.worker_rpc import Envelope
from server import checkpoint, deployment_run, validation
from simulation.run import simulate
from strategies import AGGREGATORS, ServerState
from strategies.ditto import pull
from strategies.from_config import local_from_config
from strategies.local import Client

DITTO = ["strategy.name=ditto", "evaluate.generate=false", "evaluate.baselines=[]"]
Floats = reference.Floats


def run(folder: Path, overrides: list[str], **keys: Any) -> dict[str, Any]:
    return simulate(loading.load(None, overrides), folder, **keys)


def one(b: Floats, a: Floats) -> dict[str, Tensor]:
    return join({"m": Factors(torch.tensor(b, dtype=torch.float64), torch.tensor(a, dtype=torch.float64))})


# -- the pull ------------------------------------------------------------------------------------


def test_the_pull_by_hand() -> None:
    """W_w = 2 * 1 * 1 = 2 and W = 2 * 2 * 3 = 12: 0.5 / 2 * 10^2 = 25, and the slopes 0.5 * 10 * 2 times A and B."""
    shared = one(np.array([[1.0]]), np.array([[1.0]]))
    live = {name: t.requires_grad_() for name, t in one(np.array([[2.0]]), np.array([[3.0]])).items()}
    term = pull(shared, shared, 0.5, 2.0)(live)
    term.backward()  # type: ignore[no-untyped-call]
    assert float(term.detach()) == 25.0
    assert [float(live[name].grad) for name in ("m.lora_B.weight", "m.lora_A.weight")] == [30.0, 20.0]


def test_the_pull_is_lambda_times_the_difference_of_the_weights() -> None:
    """Equation 1 of the paper on the dense matrices of two modules."""
    rng = np.random.default_rng(0)
    shapes, rank, penalty, scale = {"x": (5, 4), "y": (3, 6)}, 2, 0.3, 1.7
    drawn = [
        {m: (rng.standard_normal((o, rank)), rng.standard_normal((rank, i))) for m, (o, i) in shapes.items()}
        for _ in range(2)
    ]
    shared, live = (join({m: Factors(*map(torch.tensor, f)) for m, f in pair.items()}) for pair in drawn)
    live = {name: tensor.requires_grad_() for name, tensor in live.items()}
    term = pull(shared, shared, penalty, scale)(live)
    term.backward()  # type: ignore[no-untyped-call]
    apart = {m: scale * (drawn[1][m][0] @ drawn[1][m][1] - drawn[0][m][0] @ drawn[0][m][1]) for m in shapes}
    assert float(term.detach()) == pytest.approx(penalty / 2 * sum(np.sum(d**2) for d in apart.values()), rel=1e-12)
    for module, d in apart.items():
        b, a = drawn[1][module]
        np.testing.assert_allclose(live[module + ".lora_B.weight"].grad, penalty * scale * d @ a.T, rtol=1e-10)
        np.testing.assert_allclose(live[module + ".lora_A.weight"].grad, penalty * scale * b.T @ d, rtol=1e-10)


def test_the_shared_model_pulls_at_nothing_that_is_the_same_model() -> None:
    """Exactly nothing at its own factors, and nothing but rounding at others of the same product."""
    rng = np.random.default_rng(1)
    b, a = rng.standard_normal((6, 3)), rng.standard_normal((3, 5))
    live = {name: tensor.float().requires_grad_() for name, tensor in one(b, a).items()}
    shared = {name: tensor.detach().clone() for name, tensor in live.items()}
    term = pull(shared, shared, 1.0, 4.0)(live)
    term.backward()  # type: ignore[no-untyped-call]
    assert float(term.detach()) == 0.0 and not any(t.grad.any() for t in live.values() if t.grad is not None)
    gauge = rng.standard_normal((3, 3)) + 3 * np.eye(3)
    assert float(pull(one(b, a), one(b, a), 1.0, 4.0)(one(b @ gauge, np.linalg.solve(gauge, a)))) == pytest.approx(
        0.0, abs=1e-10
    )


def test_in_rounds_of_one_factor_the_own_models_other_one_counts() -> None:
    """With W_w = 2 * 1 * 1 and the own A = 3 at rest: B = 2 makes 12, and the slope in B is 0.5 * 10 * 2 * 3."""
    shared, start = one(np.array([[1.0]]), np.array([[1.0]])), one(np.array([[1.0]]), np.array([[3.0]]))
    b = torch.tensor([[2.0]], dtype=torch.float64, requires_grad=True)
    term = pull(start, shared, 0.5, 2.0)({"m.lora_B.weight": b})
    term.backward()  # type: ignore[no-untyped-call]
    assert (float(term.detach()), float(b.grad)) == (25.0, 30.0)  # type: ignore[arg-type]


# -- the algorithm -------------------------------------------------------------------------------

CENTRES = [np.random.default_rng(k).standard_normal((4, 3)) for k in range(3)]
SCALE, RATE, STEPS, PENALTY = scaling(2.0, "rslora")(2), 0.02, (3, 4), 0.4


def slope(k: int, weights: Floats) -> Floats:
    """Of F_k(W) = ||W - M_k||^2 / 2."""
    return weights - CENTRES[k]


def descended(start: Any, k: int, steps: int, penalties: tuple[Any, ...]) -> dict[str, Tensor]:
    """Gradient descent by torch on F_k and the penalties that the method asks for, as the trainer adds them."""
    live = {name: tensor.double().clone().requires_grad_() for name, tensor in start.items()}
    centre = torch.tensor(CENTRES[k])
    for _ in range(steps):
        (factors,) = split(live).values()
        loss = (SCALE * factors.b @ factors.a - centre).square().sum() / 2
        total = loss + sum(penalty(live) for penalty in penalties)
        grads = torch.autograd.grad(total, list(live.values()))
        stepped = zip(live.items(), grads, strict=True)
        live = {name: (t - RATE * g).detach().requires_grad_() for (name, t), g in stepped}
    return {name: tensor.detach() for name, tensor in live.items()}


def test_it_is_the_papers_algorithm_with_clients_that_skip_rounds() -> None:
    cohorts = [(0, 1), (1, 2), (0, 2), (2,), (0, 1, 2), (1,), (0, 1)]
    rng = np.random.default_rng(7)
    start = (rng.standard_normal((4, 2)), rng.standard_normal((2, 3)))
    gradients = [functools.partial(slope, k) for k in range(3)]
    shared, own = reference.ditto(gradients, start, cohorts, SCALE, RATE, STEPS, PENALTY)

    method = AGGREGATORS.build("ditto", {"penalty": PENALTY}, scaling=scaling(2.0, "rslora"), weighting="uniform")
    assert method.local.own is not None
    state = ServerState(0, {n: t.float() for n, t in one(*start).items()}, {}, {})
    kept: dict[int, dict[str, Tensor]] = {}
    for cohort in cohorts:
        acc = method.reduce.start(state)
        for k in cohort:
            payload = method.payload(state, ClientInfo(f"c{k}", 2, 0))
            client = Client(2, {n: t.shape for n, t in state.adapter.items()}, dict)
            opened = method.local.open(kept.get(k, {}), payload, client)
            mine = method.local.own(kept.get(k, {}), payload, client)
            end = descended(opened.adapter, k, STEPS[0], opened.hooks.penalties)
            kept[k] = descended(mine.adapter, k, STEPS[1], mine.hooks.penalties)
            delta = {name: (end[name] - t).float() for name, t in payload.adapter.items()}
            sent, state_kept = method.local.finish(opened.adapter, delta)
            assert not state_kept
            acc = method.reduce.add(acc, Update(f"c{k}", sent, 1.0 + k, 2))
        state = method.step(state, method.reduce.finish(state, acc, torch.Generator()))
    (ours,) = split(state.adapter).values()
    np.testing.assert_allclose(ours.b, shared[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ours.a, shared[1], rtol=1e-4, atol=1e-5)
    for k, (b, a) in own.items():
        (factors,) = split(kept[k]).values()
        np.testing.assert_allclose(factors.b, b, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(factors.a, a, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("steps", "share", "own"),
    [(6, 0.5, 3), (7, 0.5, 4), (6, 0.25, 2), (6, 0.05, 1), (6, 0.95, 5), (2, 0.5, 1), (1, 0.5, 0)],
)
def test_a_visits_steps_are_shared_out_and_none_is_added(steps: int, share: float, own: int) -> None:
    local = AGGREGATORS.build("ditto", {"own": share}, scaling=scaling(2.0, "rslora")).local
    assert local.own_steps(steps) == own
    assert AGGREGATORS.build("fedavg").local.own_steps(steps) == 0


# -- whole runs ----------------------------------------------------------------------------------


class Fits:
    """The trainings of all visits, in order: where each began, its plan and what it came to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.of: dict[str, list[tuple[dict[str, Tensor], trainer.VisitPlan, trainer.FitResult]]] = {}
        fit = trainer.fit

        def noted(lm: Any, start: Any, corpus: Any, config: Any, plan: trainer.VisitPlan) -> trainer.FitResult:
            result = fit(lm, start, corpus, config, plan)
            self.of.setdefault(plan.client, []).append(({n: t.clone() for n, t in start.items()}, plan, result))
            return result

        monkeypatch.setattr(trainer, "fit", noted)


@pytest.mark.slow
def test_a_whole_run_by_hand(small_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is sent begins at the shared model, what is kept where the client left it, over rounds that some skip."""
    fits = Fits(monkeypatch)
    more = ["rounds=4", "strategy.fraction=0.5", "train.steps=5", "strategy.options.own=0.4", "train.accumulate=1"]
    metrics = run(tmp_path / "run", [*small_run, *DITTO, *more, "strategy.options.penalty=0.5"])
    events = read_events(tmp_path / "run")
    asked = [event["clients"] for event in events if event["event"] == "asked"]
    assert len({tuple(clients) for clients in asked}) > 1
    shared = next(iter(fits.of.values()))[0][0]
    own: dict[str, dict[str, Tensor]] = {}
    for number, clients in enumerate(asked, 1):
        moved, weights = [], []
        for client in clients:
            (start, plan, sent), (own_start, own_plan, mine) = fits.of[client][:2]
            fits.of[client] = fits.of[client][2:]
            assert (plan.steps, own_plan.steps) == (3, 2)
            assert (plan.total_steps, own_plan.total_steps) == (4 * 3, 4 * 2)
            assert (plan.first_step, own_plan.first_step) == ((number - 1) * 3, (number - 1) * 2)
            assert own_plan.cursor == sent.cursor != plan.cursor  # on the rows that come next
            assert not plan.hooks.penalties
            expected = own.get(client, shared)
            for name, tensor in shared.items():
                torch.testing.assert_close(start[name], tensor, rtol=0, atol=1e-6)
                torch.testing.assert_close(own_start[name], expected[name], rtol=0, atol=1e-6)
            other = {name: t + 0.01 for name, t in shared.items()}
            s = scaling(16.0, "rslora")(4)
            squares = [
                float((s * (x.b @ x.a - w.b @ w.a)).double().square().sum())
                for x, w in zip(split(other).values(), split(start).values(), strict=True)
            ]
            assert float(own_plan.hooks.penalties[0](other)) == pytest.approx(0.25 * sum(squares), rel=1e-4)
            own[client] = {name: t + mine.delta[name] for name, t in own_start.items()}
            moved.append(sent.delta)
            weights.append(sent.report.tokens + mine.report.tokens)
        shared = {
            name: t + sum(w * d[name] for w, d in zip(weights, moved, strict=True)) / sum(weights)
            for name, t in shared.items()
        }
    found = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    for name, tensor in shared.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)
    for client, adapter in own.items():
        for place in (f"personal/{client}", f"clients/{client}/adapter"):
            found = load_file(tmp_path / "run" / place / "adapter_model.safetensors")
            for name, tensor in adapter.items():
                torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)
    told = [event for event in events if event["event"] == "client"]
    assert {(event["steps"], event["own_steps"]) for event in told} == {(5, 2)}
    steps = {client["client"]: client["steps"] for client in metrics["clients"]}
    assert steps == {client: 5 * sum(client in clients for clients in asked) for client in own}


@pytest.mark.slow
def test_what_is_sent_is_what_it_would_be_without_the_own_model(
    small_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, in the round in which both begin at the same rows."""
    first = []
    for name, more in (("ditto", [*DITTO, "train.steps=4"]), ("plain", [*DITTO[1:], "train.steps=2"])):
        with monkeypatch.context() as patched:
            fits = Fits(patched)
            run(tmp_path / name, [*small_run, *more, "rounds=1"])
        first.append({client: made[0][2].delta for client, made in fits.of.items()})
    assert first[0].keys() == first[1].keys() and len(first[0]) == 3
    for client, delta in first[0].items():
        assert all(torch.equal(first[1][client][name], tensor) for name, tensor in delta.items())


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, rows_file: Path
) -> tuple[Path, dict[str, Any]]:
    """A run whose clients hold different skills."""
    from conftest import overrides_for

    folder = tmp_path_factory.mktemp("ditto") / "run"
    more = ['data.partition={ name = "by_value", by = "skill" }', "data.clients=2", "data.test_fraction=0.3"]
    settings = [
        *overrides_for(tiny_model, rows_file),
        *more,
        *DITTO[:2],
        "rounds=3",
        "train.steps=8",
        "evaluate.max_examples=100",
    ]
    return folder, run(folder, settings)


def test_clients_score_their_own_models_and_the_server_none(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, metrics = finished
    told = [event for event in read_events(folder) if event["event"] == "evaluate"]
    assert len(told) == 4 and not any("loss" in event for event in told)
    for client in metrics["clients"]:
        assert told[-1]["clients"][client["client"]] == pytest.approx(client["own"]["federated"], rel=1e-4)
        assert told[0]["clients"][client["client"]] == pytest.approx(client["own"]["base"], rel=1e-4)
        assert client["own"]["federated"] < client["own"]["base"]
        assert client["steps"] == client["alone"]["steps"] == 24  # alone gets as many as both models together
    assert "keeps one of its own beside it" in table_plain(metrics)
    assert metrics["delivered"]["best"] is None and not (folder / "adapter-best").exists()  # own models are of the last
    assert "for clients that have no other yet" in (folder / "adapter" / "README.md").read_text()


def test_own_and_shared_models_can_be_talked_to(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = finished
    places = [folder, *sorted((folder / "personal").iterdir())]
    opened = [tuned.open_tuned(place) for place in places]
    assert len({float(sum(t.double().sum() for t in model.adapter.values())) for model in opened}) == 3
    assert tuned.reply(opened[1], [Turn("user", "Say the last word: bee hive wax 1")], 6).turn.role == "assistant"


def test_the_own_model_never_travels(finished: tuple[Path, dict[str, Any]]) -> None:
    """What goes up and down is one adapter, and what the server keeps is the shared one alone."""
    folder, _ = finished
    state, _ = checkpoint.load(folder / "checkpoints") or (None, None)
    assert state is not None and not state.memory
    size = 4 * sum(tensor.numel() for tensor in state.adapter.values())
    for event in read_events(folder):
        if event["event"] == "round":
            assert size <= event["bytes_up"] / event["clients"] < 1.3 * size
            assert size <= event["bytes_down"] / event["asked"] < 1.3 * size


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(small_run: list[str], tmp_path: Path) -> None:
    settings = [*small_run, *DITTO, "rounds=4"]
    run(tmp_path / "whole", settings)
    with killed_before_checkpoint(3):
        run(tmp_path / "cut", settings)
    run(tmp_path / "cut", settings, resume=True)
    for place in ("adapter", *(f"personal/client-0{k}" for k in range(3))):
        whole, cut = (load_file(tmp_path / f / place / "adapter_model.safetensors") for f in ("whole", "cut"))
        assert all(torch.equal(whole[name], cut[name]) for name in whole)


@pytest.mark.slow
def test_visits_of_one_step_train_the_shared_model_alone(small_run: list[str], tmp_path: Path) -> None:
    """As `train.epochs` may make them: the own model then is the shared one, and no adapter of the first round."""
    settings = [s for s in small_run if not s.startswith("train.steps")]
    run(tmp_path / "run", [*settings, *DITTO, "train.epochs=0.01", "rounds=2"])
    events = [event for event in read_events(tmp_path / "run") if event["event"] == "client"]
    assert {(event["steps"], event["own_steps"]) for event in events} == {(1, 0)}
    own = load_file(tmp_path / "run" / "personal" / "client-00" / "adapter_model.safetensors")
    shared = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert any(t.any() for n, t in shared.items() if "lora_B" in n)
    assert own.keys() == shared.keys() and all(torch.equal(own[name], shared[name]) for name in own)


@pytest.mark.parametrize("name", ["ditto", "clustered"])
def test_a_server_of_sites_says_that_it_measures_nothing(name: str, rows_file: Path) -> None:
    said: list[str] = []

    class Log:
        def event(self, kind: str, **fields: Any) -> None:
            said.append(f"{kind}: {fields['message']}")

    log: Any = Log()
    config = loading.load(None, [f"strategy.name={name}", f"data.test={rows_file}"])
    assert deployment_run._held_out(config, log) is None
    (line,) = said
    assert line.startswith("warning: data.test is not measured") and local_from_config(config).personal[1:] in line


class AtSite:
    """A site of a deployment that is asked in Flower's own bytes, as its server would."""

    def __init__(self, folder: Path, model: Path) -> None:
        rows = write_rows(folder / "rows")
        settings = ["strategy.name=ditto", "train.steps=4", "evaluate.clients=true"]
        self.run = loading.load(None, [*overrides(model, rows), *settings])
        self.state = folder / "state"
        self.service = Service(Facts("ant", rows / "ant.jsonl", self.state, self.run.model.name))

    def ask(self, kind: str, number: int, adapter: dict[str, Tensor]) -> RecordDict:
        content = flower_records.request(
            number, flower_records.to_arrays(adapter), ArrayRecord(), last_round=number - 1
        )
        body = recorddict_to_proto(RecordDict() if kind == flower_records.HELLO else content).SerializeToString()
        header = {"kind": kind, "round": str(number), "config": self.run.to_json(), "name": "run"}
        answer = self.service.answer(Envelope(header, body))
        assert "error" not in answer.header, answer.header
        return recorddict_from_proto(RecordDictProto.FromString(answer.body))

    def adapter(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = load_file(self.state / "runs" / "run" / "adapter" / "adapter_model.safetensors")
        return found


def test_a_site_keeps_its_own_model_and_tells_what_its_server_takes(tmp_path: Path, tiny_model: Path) -> None:
    site = AtSite(tmp_path, tiny_model)
    shared = adapters.fresh_adapter(adapters.load(site.run.model, site.run.adapter), 0)
    hello = flower_records.read_hello_reply(site.ask(flower_records.HELLO, 0, shared))
    own: dict[str, Tensor] = {}
    codec, rows = configured_codec(site.run, "up"), counts.most(hello.counts, hello.examples or 0)
    for number in (1, 2):
        reply = site.ask("train", number, shared)
        visit = flower_records.read_train_reply(reply)
        assert isinstance(visit, Visit) and visit.report.steps == 4
        sent = codecs.decode(flower_records.read_message(reply), codec, codecs.shapes_of(shared))
        visit = visit._replace(update=visit.update._replace(delta=sent))
        validation.check_visit(visit, site.run, rows, Payload(shared, {}), number)
        before, own = own or shared, site.adapter()
        moved = {name: (own[name] - before[name], own[name] - shared[name]) for name in shared}
        assert not any(torch.equal(change, other) for n, change in sent.items() for other in moved[n])
        kept = site.state / "runs" / "run" / f"own-{number:04d}.safetensors"
        assert kept.stat().st_mode & 0o077 == 0
        assert all(torch.equal(tensor, own[name]) for name, tensor in load_file(kept).items())
        shared = {name: t + sent[name] for name, t in shared.items()}
        flower_records.read_score_reply(site.ask("evaluate", number, shared))
        assert all(torch.equal(tensor, own[name]) for name, tensor in site.adapter().items())  # not what was sent


@pytest.mark.parametrize(
    ("settings", "why", "way_out"),
    [
        (["privacy.unit=record"], "without noise", "use fedavg"),
        (['continual.stages=[["first"], ["last"]]'], "measured on one model for all", "one a client"),
        (["simulate.attackers=0.2"], "one model for all", "set 0"),
        (["evaluate.patience=2"], "a model of the last round", "set 0"),
        (["evaluate.clients=false"], "clients score themselves", "leave the key out"),
        (["adapter.share=a"], "one factor alone", "fedavg"),
        (["adapter.ranks=[4, 16]"], "takes the rank 16 alone", "methods for several ranks"),
        (["strategy.options.own=1.0"], "strategy.options.own", "above 0 and below 1"),
        (["strategy.options.penalty=-1.0"], "strategy.options.penalty", "at least 0"),
    ],
)
def test_what_does_not_go_with_it_is_refused(settings: list[str], why: str, way_out: str) -> None:
    with pytest.raises(UserError) as told:
        strategies.from_config(loading.load(None, ["strategy.name=ditto", *settings]))
    (line,) = told.value.problems
    assert why in line and way_out in line


def test_a_private_visit_refuses_an_own_model_whatever_the_server_says(tmp_path: Path, tiny_model: Path) -> None:
    """A client does not rely on the server's check: its rows would be trained on without noise."""
    import private_visits

    config = private_visits.settings(tiny_model)
    local = AGGREGATORS.build("ditto", scaling=scaling(16.0, "rslora")).local
    worker = Worker(config, local)
    site = private_visits.site(tmp_path, private_visits.rows(40))
    sent: Payload = private_visits.payload(worker)
    with pytest.raises(ValueError, match="does not go with record-level privacy"):
        worker.train(site, 1, sent)
    assert not site.ledger.exists()
