"""FedALT: the server's mean and the clients' parts against numpy, and through whole runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from deployment import overrides, write_rows
from flwr.app import RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto
from killing import killed_before_checkpoint
from safetensors.torch import load_file

import strategies
from apiary.config import loading
from apiary.core import lora
from apiary.core.errors import StateLost, UserError
from apiary.core.lora import scaling
from apiary.core.messages import ClientInfo, Payload, Update
from apiary.export import export, tuned
from apiary.models import adapters
from apiary.tracking.event_log import read_events
from apiary.transport import codec as codecs
from apiary.transport import flower_records
from apiary.transport.from_config import configured_codec
from client import compression, handlers, round_files
from client.site_worker import Facts, Service
from client.training import trainer
from client.worker import Worker
from client.worker_rpc import Envelope
from server import checkpoint
from server.rounds import Rounds
from simulation import audit, client_models
from simulation.run import plan, simulate
from strategies import AGGREGATORS, ServerState
from strategies.local import Client, Opened

FEDALT = ["strategy.name=fedalt", "evaluate.generate=false", "evaluate.baselines=[]"]
Floats = npt.NDArray[np.float64]
SHAPES = {"m.lora_A.weight": (2, 3), "m.lora_B.weight": (4, 2)}
GATE = "m.lora_gate.weight"
SCALE = 2.0 / np.sqrt(2)


def drawn(seed: int, size: float = 1.0) -> dict[str, Floats]:
    rng = np.random.default_rng(seed)
    return {name: size * rng.standard_normal(shape) for name, shape in SHAPES.items()}


FIRST = {name: 0 * t if "lora_B" in name else t for name, t in drawn(99).items()}


def tensors(state: Mapping[str, Floats]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(t, dtype=torch.float32) for name, t in state.items()}


class Ours:
    """Our server and what its clients keep, as the worker has it, around changes that are given."""

    def __init__(self, folder: Path, clients: int) -> None:
        self.method = AGGREGATORS.build("fedalt", scaling=scaling(2.0, "rslora"))
        self.local, self.folder, self.clients = self.method.local, folder, clients
        self.state = ServerState(0, tensors(FIRST), {}, {})
        self.last = [0] * clients

    def payload(self, i: int) -> Payload:
        made = self.method.payload(self.state, ClientInfo(f"c{i}", 2, self.last[i], self.clients))
        return made._replace(last_round=self.last[i])

    def opened(self, i: int) -> Opened:
        kept = round_files.of_method(self.folder / f"c{i}", self.local, self.state.round + 1, self.last[i])
        shapes = {name: torch.Size(shape) for name, shape in SHAPES.items()}
        return self.local.open(kept, self.payload(i), Client(2, shapes, fresh=lambda: tensors(FIRST)))

    def visit(self, i: int, change: Mapping[str, Floats]) -> Update:
        """A visit that moves the factors by `change` and the gate by its round, whose message loses a tenth."""
        payload, opened, number = self.payload(i), self.opened(i), self.state.round + 1
        folder = self.folder / f"c{i}"
        made = {**tensors(change), GATE: torch.full((1, 3), float(number))}
        sent, kept = self.local.finish(opened.adapter, made)
        round_files.save(folder, self.local.keeps, number, kept, back={payload.last_round})
        arrived = {name: 0.9 * tensor for name, tensor in sent.items()}
        before = round_files.of_method(folder, self.local, number, payload.last_round)
        assert self.local.settle is not None
        settled = {**kept, **self.local.settle(before, payload, arrived, 0.1)}
        round_files.save(folder, self.local.keeps, number, settled, back={payload.last_round})
        return Update(f"c{i}", arrived, 1.0 + i, 2, payload.extra, 0.1)

    def round(self, changes: Mapping[int, Mapping[str, Floats]], lost: Sequence[int] = ()) -> None:
        acc, number = self.method.reduce.start(self.state), self.state.round + 1
        for i, change in changes.items():
            update = self.visit(i, change)
            if i not in lost:
                acc, self.last[i] = self.method.reduce.add(acc, update), number
        self.state = self.method.step(self.state, self.method.reduce.finish(self.state, acc, torch.Generator()))


class Paper:
    """All individual factors in one place, in numpy."""

    def __init__(self, clients: int) -> None:
        self.own = [dict(FIRST) for _ in range(clients)]
        self.gates = [np.zeros((1, 3)) for _ in range(clients)]

    def round(self, changes: Mapping[int, Mapping[str, Floats]], number: int, lost: Sequence[int] = ()) -> None:
        for i, change in changes.items():
            if i not in lost:
                self.own[i] = {name: t + 0.9 * change[name] for name, t in self.own[i].items()}
                self.gates[i] = self.gates[i] + number

    def rest(self, i: int) -> dict[str, Floats]:
        others = [own for j, own in enumerate(self.own) if j != i]
        return {name: np.mean([own[name] for own in others], axis=0) for name in FIRST}

    def mean(self) -> dict[str, Floats]:
        return {name: np.mean([own[name] for own in self.own], axis=0) for name in FIRST}


def agree(ours: Ours, paper: Paper) -> None:
    expected = {i: (paper.own[i], paper.rest(i), paper.gates[i]) for i in range(len(paper.own))}
    for i, (own, rest, gate) in expected.items():
        opened = ours.opened(i)
        assert opened.base_delta is not None and not opened.hooks.penalties and not opened.hooks.correction
        for name in FIRST:
            factor = SCALE if "lora_B" in name else 1.0
            np.testing.assert_allclose(opened.adapter[name], own[name], rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(opened.base_delta[name], factor * rest[name], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(opened.adapter[GATE], gate, rtol=1e-6)
        assert opened.adapter.keys() == {*FIRST, GATE} and opened.base_delta.keys() == FIRST.keys()
    payload = ours.payload(0)
    for name, mean in paper.mean().items():
        np.testing.assert_allclose(payload.adapter[name], mean, rtol=1e-4, atol=1e-5)
    assert {name: tensor.tolist() for name, tensor in payload.extra.items()} == {"clients": float(ours.clients)}


def test_each_client_gets_the_mean_of_the_others_whoever_takes_part(tmp_path: Path) -> None:
    cohorts = [(0, 1, 2), (1, 2), (0, 3), (3,), (0, 1, 2, 3), (2,)]
    ours, paper = Ours(tmp_path, 4), Paper(4)
    agree(ours, paper)
    for number, cohort in enumerate(cohorts, 1):
        changes = {i: drawn(10 * number + i) for i in cohort}
        ours.round(changes)
        paper.round(changes, number)
        agree(ours, paper)


def test_a_lost_answer_counts_on_neither_side_however_often_it_is_lost(tmp_path: Path) -> None:
    ours, paper = Ours(tmp_path, 3), Paper(3)
    lost_in = [(), (1,), (0,), (0,), (0,), (0,), (), (2,)]  # more often one after the other than files are kept
    for number, lost in enumerate(lost_in, 1):
        changes = {i: drawn(10 * number + i) for i in range(3)}
        ours.round(changes, lost)
        paper.round(changes, number, lost)
        agree(ours, paper)


def test_the_mean_stays_the_mean_when_clients_join(tmp_path: Path) -> None:
    """One that joins has the first adapter, also before it has trained, and what counted before stays counted."""
    ours, paper = Ours(tmp_path, 2), Paper(2)
    for number, cohort in enumerate([(0, 1), (0, 1), (), (0,), (0, 1, 2, 3), (1, 3)], 1):
        if number in (3, 5):
            ours.clients, ours.last = ours.clients + 1, [*ours.last, 0]
            paper.own, paper.gates = [*paper.own, dict(FIRST)], [*paper.gates, np.zeros((1, 3))]
            agree(ours, paper)
        changes = {i: drawn(10 * number + i) for i in cohort}
        if changes:
            ours.round(changes)
        paper.round(changes, number if number < 3 else number - 1)
        agree(ours, paper)


def test_one_client_alone_has_no_rest_of_the_world(tmp_path: Path) -> None:
    ours = Ours(tmp_path, 1)
    ours.round({0: drawn(1)})
    opened = ours.opened(0)
    assert opened.base_delta is not None and not opened.base_delta["m.lora_B.weight"].any()
    moved = FIRST["m.lora_B.weight"] + 0.9 * drawn(1)["m.lora_B.weight"]
    np.testing.assert_allclose(opened.adapter["m.lora_B.weight"], moved, rtol=1e-5)


def test_by_hand() -> None:
    """Three clients at B = 0, of which one goes to 3 and one to 6: M = 3, and the others' means are 3, 1.5 and 4.5."""
    method = AGGREGATORS.build("fedalt", scaling=lambda rank: 10.0)
    names = ("m.lora_A.weight", "m.lora_B.weight")

    def one(a: float, b: float) -> dict[str, torch.Tensor]:
        return {name: torch.tensor([[value]]) for name, value in zip(names, (a, b), strict=True)}

    state = ServerState(0, one(1.0, 0.0), {}, {})
    told = method.payload(state, ClientInfo("", 1, 0, 3)).extra
    acc = method.reduce.start(state)
    for client, b in (("x", 3.0), ("y", 6.0)):
        acc = method.reduce.add(acc, Update(client, one(0.0, b), 7.0, 1, told))
    state = method.step(state, method.reduce.finish(state, acc, torch.Generator()))
    payload = method.payload(state, ClientInfo("", 1, 1, 3))
    assert payload.adapter["m.lora_B.weight"].item() == 3.0
    shapes = {name: torch.Size((1, 1)) for name in names}
    found = []
    for moved in (3.0, 6.0, 0.0):
        opened = method.local.open(one(0.0, moved), payload, Client(1, shapes, fresh=lambda: one(1.0, 0.0)))
        assert opened.base_delta is not None and opened.base_delta["m.lora_A.weight"].item() == 1.0
        assert opened.adapter["m.lora_B.weight"].item() == moved
        found.append(opened.base_delta["m.lora_B.weight"].item())
    assert found == [30.0, 15.0, 45.0]  # with the scale of 10 in B


def test_a_client_that_lost_its_adapter_says_so(tmp_path: Path) -> None:
    ours = Ours(tmp_path, 2)
    ours.round({0: drawn(1), 1: drawn(2)})
    (tmp_path / "c0" / "individual-0001.safetensors").unlink()
    with pytest.raises(StateLost, match="of round 1 is gone"):
        ours.opened(0)


# -- whole runs ----------------------------------------------------------------------------------


def run(folder: Path, overrides: Sequence[str], **keys: Any) -> dict[str, Any]:
    return simulate(loading.load(None, overrides), folder, **keys)


class Told:
    """All that is sent, in both directions, and all that is measured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.up: list[RecordDict] = []
        self.down: list[tuple[str, RecordDict]] = []
        self.visits: dict[str, list[tuple[dict[str, torch.Tensor], trainer.FitResult]]] = {}
        self.arrived: dict[str, list[dict[str, torch.Tensor]]] = {}  # changes, as they are read of messages
        ask, fit, arrives, last = handlers._ask, trainer.fit, compression.arrives, [""]

        def asked(worker: Worker, site: Any, kind: str, content: RecordDict) -> RecordDict:
            answer = ask(worker, site, kind, content)
            self.down.append((kind, content))
            self.up.append(answer)
            return answer

        def fitted(lm: Any, start: Any, corpus: Any, config: Any, plan: trainer.VisitPlan) -> trainer.FitResult:
            result = fit(lm, start, corpus, config, plan)
            self.visits.setdefault(plan.client, []).append(({n: t.clone() for n, t in start.items()}, result))
            last[0] = plan.client
            return result

        def arrived(codec: Any, message: bytes, delta: Any) -> Any:
            found = arrives(codec, message, delta)
            self.arrived.setdefault(last[0], []).append(dict(found))
            return found

        monkeypatch.setattr(handlers, "_ask", asked)
        monkeypatch.setattr(trainer, "fit", fitted)
        monkeypatch.setattr(compression, "arrives", arrived)


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["wire.up=int4"]])
def test_a_whole_run_by_hand(
    small_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    """Every visit begins at the client's own factors and gates beside the mean of the others', and no gate travels."""
    told = Told(monkeypatch)
    settings = [*small_run, *FEDALT, "rounds=5", "strategy.fraction=0.5", "train.lr=0.02", *more]
    metrics = run(tmp_path / "run", settings)
    events = read_events(tmp_path / "run")
    asked = [event["clients"] for event in events if event["event"] == "asked"]
    assert len({tuple(clients) for clients in asked}) > 1
    lm = adapters.load(loading.load(None, settings).model, loading.load(None, settings).adapter)
    first = {name: t.double().numpy() for name, t in adapters.fresh_adapter(lm, 0).items()}
    folders = tmp_path / "run" / "clients"
    names = sorted(client["client"] for client in metrics["clients"])
    own = {client: dict(first) for client in names}
    gates: dict[str, dict[str, torch.Tensor]] = {client: {} for client in names}
    for number, clients in enumerate(asked, 1):
        moved = {}
        for client in clients:
            start, result = told.visits[client].pop(0)
            rest = {n: np.mean([own[c][n] for c in names if c != client], axis=0) for n in first}
            for name in first:
                factor = lm.scale if lora.is_b(name) else 1.0
                np.testing.assert_allclose(start[name], own[client][name], rtol=0, atol=1e-5)
                np.testing.assert_allclose(start[f"base_delta.{name}"], factor * rest[name], rtol=0, atol=1e-5)
            begun = {n: t for n, t in start.items() if lora.is_gate(n)}
            assert len(begun) == len(first) // 2
            assert all(torch.equal(t, gates[client].get(n, torch.zeros_like(t))) for n, t in begun.items())
            gates[client] = {n: t + result.delta[n] for n, t in begun.items()}
            assert all(float(result.delta[n].abs().max()) > 0 for n in begun)
            arrived = told.arrived[client].pop(0)
            assert arrived.keys() == first.keys()
            moved[client] = {n: own[client][n] + arrived[n].double().numpy() for n in first}
            kept = folders / client / f"individual-{number:04d}.safetensors"
            if kept.exists():  # the newest three are kept
                state = load_file(kept)
                assert state.keys() == {*first, *begun}
                assert all(torch.equal(state[n], t) for n, t in gates[client].items())
                for n in first:
                    np.testing.assert_allclose(state[n], moved[client][n] - first[n], rtol=0, atol=1e-5)
        own |= moved
    found = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    for name in first:
        np.testing.assert_allclose(found[name], np.mean([own[c][name] for c in names], axis=0), rtol=0, atol=1e-5)
    entries, gate_entries = (sum(t.numel() for t in part.values()) for part in (lm.adapter, gates[names[0]]))
    check_messages(told, entries, gate_entries, coded=bool(more))
    check_measured(tmp_path / "run", metrics, events)


def check_messages(told: Told, entries: int, gates: int, *, coded: bool) -> None:
    """No tensor of a message is a gate, and a change in float32 is as long as its factors are.

    Of a coded one the server knows the names and refuses others, so that a run with gates in it would not have ended.

    Args:
        told: the messages.
        entries: of the factors.
        gates: entries of the gates.
        coded: whether changes are coded.
    """
    kinds = [kind for kind, _ in told.down]
    assert kinds.count("train") == 10 and kinds.count("evaluate") > 0
    for (kind, request), answer in zip(told.down, told.up, strict=True):
        for content in (request, answer):
            for record in content.array_records.values():
                assert not any("lora_gate" in name for name in record)
                assert not any(b"lora_gate" in array.data for array in record.values())
        if kind == "train":
            (record,) = answer.array_records.values()
            (message,) = record.values()
            assert list(record) == ["message"]
            assert coded or len(message.data) - entries * 4 < 500 < 4 * gates
        if kind in ("train", "evaluate"):
            assert set(flower_records.from_arrays(request.array_records["control"])) == {"clients"}


def check_measured(folder: Path, metrics: Mapping[str, Any], events: Sequence[Mapping[str, Any]]) -> None:
    """Clients measure the models with gates; the folders hold fixed ones, and say so."""
    last = [event for event in events if event["event"] == "evaluate"][-1]
    assert "loss" not in last and not any("gauge" in event for event in events if event["event"] == "round")
    assert last["clients"]
    for client in metrics["clients"]:
        if client["client"] in last["clients"]:
            assert last["clients"][client["client"]] == pytest.approx(client["own"]["federated"], rel=1e-4)
    for place in (folder / "personal", folder / "clients"):
        for one in (path for path in sorted(place.iterdir()) if path.is_dir()):
            kept = one if place.name == "personal" else one / "adapter"
            weights = load_file(kept / "adapter_model.safetensors")
            assert {t.shape[0] for n, t in weights.items() if "lora_A" in n} == {8}  # twice the rank
            assert "weighs two products in each layer" in (kept / "README.md").read_text(encoding="utf-8")
    opened = tuned.open_tuned(folder / "personal" / metrics["clients"][0]["client"])
    assert lora.parts(opened.adapter)[1]
    export.export_run(folder / "personal" / metrics["clients"][0]["client"], folder / "handed", merge=False)
    assert "weighs two products in each layer" in (folder / "handed" / "README.md").read_text(encoding="utf-8")
    assert "for clients that have no other yet" in (folder / "adapter" / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(small_run: list[str], tmp_path: Path) -> None:
    settings = [*small_run, *FEDALT, "rounds=4", "strategy.fraction=0.7"]
    whole_metrics = run(tmp_path / "whole", settings)
    with killed_before_checkpoint(3):
        run(tmp_path / "cut", settings)
    cut_metrics = run(tmp_path / "cut", settings, resume=True)
    for place in ("adapter", *(f"personal/{c['client']}" for c in whole_metrics["clients"])):
        whole, cut = (load_file(tmp_path / f / place / "adapter_model.safetensors") for f in ("whole", "cut"))
        assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert [c["own"] for c in whole_metrics["clients"]] == [c["own"] for c in cut_metrics["clients"]]


@pytest.mark.slow
def test_lost_answers_leave_the_mean_that_of_what_clients_keep(
    small_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Client-01's answers of rounds 2 to 5 are lost on their way, more often than its files are kept."""
    read = Rounds._read

    def losing(self: Rounds, replies: Any, check: Any) -> Any:
        for client, reply, size in read(self, replies, check):
            if not (client == "client-01" and hasattr(reply, "update") and 2 <= self.state.round + 1 <= 5):
                yield client, reply, size

    monkeypatch.setattr(Rounds, "_read", losing)
    config = loading.load(None, [*small_run, *FEDALT, "rounds=6", "strategy.quorum=0.5", "wire.up=int8"])
    simulate(config, tmp_path / "run")
    state, progress = checkpoint.load(tmp_path / "run" / "checkpoints") or (None, {})
    assert state is not None
    last, prepared = progress["last_round"], plan(config)
    assert set(last.values()) == {6}
    kept = [round_files.load(tmp_path / "run" / "clients" / c, "individual", n) for c, n in last.items()]
    first = adapters.fresh_adapter(prepared.lm, config.seed)
    for name, tensor in state.adapter.items():
        mean = first[name] + torch.stack([one[name] for one in kept]).mean(0)
        torch.testing.assert_close(tensor, mean, rtol=1e-4, atol=1e-6)
    made = client_models.of_clients(prepared.lm, config, strategies.from_config(config), sorted(last), tmp_path / "run")
    for i, client in enumerate(last):
        others = [one for j, one in enumerate(kept) if j != i]
        for name in state.adapter:
            rest = first[name] + torch.stack([one[name] for one in others]).mean(0)
            factor = prepared.lm.scale if lora.is_b(name) else 1.0
            torch.testing.assert_close(made[client][f"base_delta.{name}"], factor * rest, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_own_models_after_it_begin_with_the_fixed_form(small_run: list[str], tmp_path: Path) -> None:
    """What a client may keep of the federation is what a folder can hold, and is measured as that."""
    more = ["personal.enabled=true", "personal.margin=1e6", "data.test_fraction=0.3", "train.lr=0.02"]
    metrics = run(tmp_path / "run", [*small_run, *FEDALT, *more])
    for client in metrics["clients"]:
        fixed, gated = client["personal"]["own"]["federated"], client["own"]["federated"]
        assert fixed == pytest.approx(gated, rel=0.05) and fixed != gated


@pytest.mark.parametrize(
    ("settings", "why", "way_out"),
    [
        (["privacy.unit=record"], "no noise covers", "fedavg"),
        (['continual.stages=[["first"], ["last"]]'], "measured on one model for all", "one a client"),
        (["simulate.attackers=0.2"], "one model for all", "set 0"),
        (["evaluate.patience=2"], "a model of the last round", "set 0"),
        (["evaluate.clients=false"], "clients score themselves", "leave the key out"),
        (["adapter.share=a"], "one factor alone", "fedavg"),
        (["adapter.ranks=[4, 16]"], "takes the rank 16 alone", "methods for several ranks"),
        (["adapter.train=b"], "clients hold fixed", "'both'"),
        (["adapter.train=alternate"], "clients hold fixed", "'both'"),
        (["wire.down=int8"], "take itself out of the mean", "use fp32"),
        (["adapter.dropout=0.1"], "a layer's product twice", "set 0"),
        (["strategy.server_optimizer=nesterov"], "counts what clients hold", "use none"),
        (['strategy.server_optimizer={ name = "plain", lr = 1.4 }'], "counts what clients hold", "use none"),
        (["strategy.weighting=uniform"], "its own weights", "leave it out"),
    ],
)
def test_what_does_not_go_with_it_is_refused(settings: list[str], why: str, way_out: str) -> None:
    with pytest.raises(UserError) as told:
        strategies.from_config(loading.load(None, ["strategy.name=fedalt", *settings]))
    (line,) = told.value.problems
    assert why in line and way_out in line


def test_a_start_of_its_own_is_refused(tmp_path: Path) -> None:
    config = loading.load(None, ["strategy.name=fedalt"])
    begun = config.model_copy(update={"adapter": config.adapter.model_copy(update={"start": str(tmp_path)})})
    with pytest.raises(UserError, match="they have no copy of another"):
        strategies.from_config(begun)


def test_experts_of_one_weight_are_refused_before_a_folder_is_made(small_run: list[str], tmp_path: Path) -> None:
    import model_families

    folder = model_families.make_folder("Mixtral", tmp_path / "moe")
    settings = [*small_run, *FEDALT, f"model.name={folder}"]
    with pytest.raises(UserError, match="cannot be weighed by their input"):
        run(tmp_path / "run", settings)
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_an_audit_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('[strategy]\nname = "fedalt"\n', encoding="utf-8")
    with pytest.raises(UserError, match="models that nobody else has"):
        audit.open_bench(tmp_path, audit.Options())


def test_a_site_that_rounds_its_counts_joins_with_epochs(tmp_path: Path, tiny_model: Path) -> None:
    """Unlike with a method that reads something off the number of steps."""
    rows = write_rows(tmp_path / "rows")
    for name, more, refused in (("fedalt", (), False), ("scaffold", ("train.optimizer=sgd",), True)):
        config = loading.load(None, [*overrides(tiny_model, rows), f"strategy.name={name}", "train.epochs=1", *more])
        facts = Facts("ant", rows / "ant.jsonl", tmp_path / name, config.model.name)
        header = {"kind": flower_records.HELLO, "round": "0", "config": config.to_json(), "name": "run"}
        body = recorddict_to_proto(RecordDict()).SerializeToString()
        answer = Service(facts).answer(Envelope(header, body))
        assert ("error" in answer.header) == refused, answer.header


def test_a_private_visit_refuses_gates_whatever_the_server_says(tmp_path: Path, tiny_model: Path) -> None:
    """A client does not rely on the server's check: its gates would be made of its rows without noise."""
    import private_visits

    worker = Worker(private_visits.settings(tiny_model), Ours(tmp_path, 2).local)
    site = private_visits.site(tmp_path, private_visits.rows(40))
    sent = private_visits.payload(worker)._replace(extra={"clients": torch.tensor(3.0)})
    with pytest.raises(ValueError, match="does not go with record-level privacy"):
        worker.train(site, 1, sent)
    assert not site.ledger.exists()


def test_a_site_keeps_its_adapter_and_gates_to_itself(tmp_path: Path, tiny_model: Path) -> None:
    """In Flower's own bytes, as a server of sites asks: round by round, a first answer that was lost, and a score."""
    rows = write_rows(tmp_path / "rows")
    config = loading.load(
        None, [*overrides(tiny_model, rows), "strategy.name=fedalt", "train.steps=2", "evaluate.clients=true"]
    )
    method = strategies.from_config(config)
    lm = adapters.load(config.model, config.adapter)
    state = ServerState(0, adapters.fresh_adapter(lm, config.seed), {}, {})
    service = Service(Facts("ant", rows / "ant.jsonl", tmp_path / "state", config.model.name))
    folder = tmp_path / "state" / "runs" / "run"

    def ask(kind: str, number: int, last: int) -> RecordDict:
        payload = method.payload(state, ClientInfo("ant", config.adapter.rank, last, 3))
        parts = [flower_records.to_arrays(part) for part in payload[:3]]
        content = flower_records.request(number, *parts, last_round=last)
        header = {"kind": kind, "round": str(number), "config": config.to_json(), "name": "run"}
        answer = service.answer(Envelope(header, recorddict_to_proto(content).SerializeToString()))
        assert "error" not in answer.header, answer.header
        return recorddict_from_proto(RecordDictProto.FromString(answer.body))

    ask("train", 1, 0)  # lost on its way
    sent = {n: torch.zeros_like(t) for n, t in state.adapter.items()}
    for number, last in ((2, 0), (3, 2)):
        reply = ask("train", number, last)
        change = codecs.decode(
            flower_records.read_message(reply), configured_codec(config, "up"), codecs.shapes_of(state.adapter)
        )
        sent = {n: t + change[n] for n, t in sent.items()}
        told = method.payload(state, ClientInfo("ant", config.adapter.rank, last, 3)).extra
        acc = method.reduce.add(method.reduce.start(state), Update("ant", change, 1.0, config.adapter.rank, told))
        state = method.step(state, method.reduce.finish(state, acc, torch.Generator()))
        ask("evaluate", number, number)
    kept = load_file(folder / "individual-0003.safetensors")
    assert all(float(t.abs().max()) > 0 for n, t in kept.items() if lora.is_gate(n))
    for name, tensor in sent.items():
        torch.testing.assert_close(kept[name], tensor, rtol=0, atol=1e-6)
        mean = adapters.fresh_adapter(lm, config.seed)[name] + tensor / 3
        torch.testing.assert_close(state.adapter[name], mean, rtol=0, atol=1e-6)
    assert {(folder / f"individual-000{n}.safetensors").stat().st_mode & 0o077 for n in (2, 3)} == {0}
    fixed = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert {t.shape[0] for n, t in fixed.items() if "lora_A" in n} == {2 * config.adapter.rank}
