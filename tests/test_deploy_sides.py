"""Deployment: what answers at a site, and what surrounds the rounds on the server."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import torch
from deployment import SITES, overrides, write_rows
from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.clientapp.typing import ClientAppCallable, Mod
from grpc_health.v1 import health_pb2, health_pb2_grpc

from apiary import config, examples, models, records
from apiary.evaluate import HeldOut
from apiary.exchange import Decline, Visit
from apiary.runlog import RunLog, read_events, read_metrics
from apiary.tensors import StateDict
from client import answers, remote, service
from client import app as client_app
from client.service import Facts
from server import deployed
from server.rounds import RunFailed
from simulation import engines
from simulation.local import LocalGrid

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows")


# -- the thin app and the worker -----------------------------------------------------------------


def test_the_process_of_a_message_loads_neither_torch_nor_a_model() -> None:
    code = (
        "import sys; import client.app, client.remote;"
        "print([m for m in ('torch', 'transformers', 'peft', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


class Site:
    """A worker behind a real socket, and a Flower node that reaches it."""

    def __init__(self, folder: Path, overrides: list[str], rows: Path) -> None:
        self.state, self.socket = folder / "state", folder / "w.sock"
        self.run = config.load(None, overrides)
        self.facts = Facts("ant", rows / "ant.jsonl", self.state)
        self.server = service.make_server(service.Service(self.facts), self.address)
        self.server.start()
        adapter = records.to_arrays(models.fresh_adapter(models.load(self.run.model, self.run.adapter), 0))
        self.content = records.request(1, adapter, ArrayRecord())

    @property
    def address(self) -> str:
        return f"unix:{self.socket}"

    def ask(self, kind: str, content: RecordDict | None = None, **values: str) -> Message:
        given = {"config": self.run.to_json(), "name": "first", **values}
        grid = LocalGrid(client_app.make_app(_at(self.address, given)), 1)
        message = Message(self.content if content is None else content, 1000, kind, group_id="1")
        (reply,) = grid.send_and_receive([message])
        return reply


def _at(address: str, values: dict[str, str]) -> Mod:
    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        facts = {"worker-address": address, "site": "ant"}
        return call_next(message, Context(context.run_id, context.node_id, facts, context.state, dict(values)))

    return mod


@pytest.fixture
def site(tmp_path: Path, tiny_model: Path, rows: Path) -> Iterator[Site]:
    made = Site(tmp_path, overrides(tiny_model, rows), rows)
    yield made
    made.server.stop(None)


def test_the_worker_answers_what_a_virtual_client_would(site: Site, rows: Path, tmp_path: Path) -> None:
    own = site.ask("train")
    answers.forget()
    grid = LocalGrid(client_app.make_app(engines.site_facts(site.run.to_json(), tmp_path / "simulated")), len(SITES))
    (virtual,) = grid.send_and_receive([Message(site.content, 1000, "train", group_id="1")])
    ours, theirs = (records.read_train_reply(reply.content) for reply in (own, virtual))
    assert ours.update.client == theirs.update.client == "ant"  # type: ignore[union-attr]
    for name, tensor in theirs.update.delta.items():  # type: ignore[union-attr]
        torch.testing.assert_close(ours.update.delta[name], tensor, rtol=0, atol=0)  # type: ignore[union-attr]
    assert (site.state / "runs" / "first" / "round-0001.json").exists()


def test_the_worker_is_healthy_and_reads_its_base_once(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    with grpc.insecure_channel(site.address) as channel:
        asked = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=""), timeout=5)
        assert asked.status == health_pb2.HealthCheckResponse.SERVING
    caplog.set_level("INFO", logger="client.service")
    site.ask(records.HELLO)
    loads = models.base_loads()
    for name in ("first", "second", "first"):
        assert not site.ask("train", name=name).has_error()
    assert models.base_loads() == loads
    lines = [r.getMessage() for r in caplog.records if r.name == "client.service"]
    assert "query.hello" in lines[0]
    assert all("round 1 train" in line and "0 base loads" in line for line in lines[1:])


def test_what_goes_wrong_at_a_site_stays_there(site: Site, rows: Path) -> None:
    (rows / "ant.jsonl").write_text('{"instruction": "the queen is in hive 9"}\n')
    reply = site.ask("train")
    assert reply.has_error() and "UserError" in reply.error.reason and "errors.log" in reply.error.reason
    assert "hive" not in reply.error.reason and "jsonl" not in reply.error.reason
    assert "ant.jsonl" in (site.state / "errors.log").read_text()


@pytest.mark.parametrize("name", ["../out", "a/b", "..", ".x", "a\nb", ""])
def test_a_run_cannot_lead_out_of_the_sites_folder(site: Site, name: str) -> None:
    assert "name is not allowed" in site.ask("train", name=name).error.reason
    assert not site.state.exists() or not list(site.state.rglob("round-*"))


def test_a_run_cannot_name_code_for_the_site_to_load(site: Site, tmp_path: Path) -> None:
    run = site.run.model_copy(update={"train": site.run.train.model_copy(update={"objective": "os:system"})})
    assert "module:function" in site.ask("train", config=run.to_json()).error.reason


def _private(run: config.RunConfig, **privacy: object) -> config.RunConfig:
    changed = {"unit": "record", "batch_rows": 8, "noise_multiplier": 1.0, "epsilon": 8.0, **privacy}
    return config.parse({**run.model_dump(mode="json"), "privacy": {**run.privacy.model_dump(), **changed}})


def test_a_site_may_insist_on_privacy(site: Site) -> None:
    facts = site.facts._replace(max_epsilon=8.0)
    site.server.stop(None)
    site.server = service.make_server(service.Service(facts), site.address)
    site.server.start()
    private = _private(site.run)
    stages = config.parse({**private.model_dump(mode="json"), "rounds": 3, "continual": {"stages": [["first"]]}})
    columns = private.model_copy(update={"data": private.data.model_copy(update={"columns": {"output": "skill"}})})
    for run, why in (
        (site.run, "the run promises nothing"),
        (_private(site.run, epsilon=8.5), "epsilon <= 8"),
        (_private(site.run, delta=1e-3), "delta <= 1e-05"),
        (stages, "takes no continual.stages"),
        (columns, "data.columns"),
    ):
        assert why in site.ask("train", config=run.to_json()).error.reason
    assert not (site.state / "ledger.json").exists()
    assert not site.ask("train", config=private.to_json()).has_error()
    # And no loss of its held-out rows, though the server asks.
    _, score = records.read_score_reply(site.ask("evaluate", config=private.to_json()).content)
    assert score == (0.0, 0, 0)


def test_what_one_run_spent_the_next_run_finds_spent(site: Site) -> None:
    """The ledger is of the site's rows, not of a run: a server cannot start anew by starting a new run."""
    run = _private(site.run, epsilon=5.0)
    spent = []
    for name in ("first", "second", "third"):
        answer = records.read_train_reply(site.ask("train", config=run.to_json(), name=name).content)
        spent.append(answer.spent.epsilon if isinstance(answer, Visit) and answer.spent else None)
    assert spent[0] is not None and spent[1] is not None and spent[0] < spent[1] <= 5.0
    for name in map(str, range(20)):
        answer = records.read_train_reply(site.ask("train", config=run.to_json(), name=name).content)
    assert answer == Decline("ant", "budget")


def test_a_worker_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(remote.Unanswered, match="did not come up"):
        remote.ask(f"unix:{tmp_path / 'nobody.sock'}", remote.Envelope({}), ready_s=0.3)


def test_a_site_goes_by_its_own_places(tmp_path: Path, rows: Path) -> None:
    given = ["model.name=org/base", "data.test=builtin:skills", "data.partition=natural", f"data.source={rows}"]
    sent = config.load(None, [*given, "data.test_fraction=0.3"])
    own = service.at_home(sent, Facts("bee", rows / "bee.jsonl", tmp_path, "here/base", "cuda:1"))
    assert (own.model.name, own.model.device) == ("here/base", "cuda:1")
    assert own.data.test is None  # a place on the server's disk
    alone = sent.data.model_copy(update={"test": None})
    simulated = {client.name: client for client in examples.federate(alone, sent.seed).clients}["bee"]
    (client,) = examples.federate(own.data, own.seed).clients
    assert (client.train, client.test) == (simulated.train, simulated.test)
    assert len(client.test) > 3 and len(client.train) + len(client.test) == 40


def test_an_envelope_comes_out_as_it_went_in() -> None:
    packed = remote.Envelope({"kind": "träin", "n": 1}, b"\x00\xff" * 9).pack()
    assert remote.unpack(packed) == ({"kind": "träin", "n": 1}, b"\x00\xff" * 9)
    with pytest.raises(ValueError, match="envelope"):
        remote.unpack(packed[:6])


# -- the server's side of a run ------------------------------------------------------------------


def test_the_server_app_keeps_the_run_directory(tmp_path: Path, tiny_model: Path, rows: Path) -> None:
    run = config.load(None, [*overrides(tiny_model, rows), f"data.test={rows / 'bee.jsonl'}"])
    lm = models.load(run.model, run.adapter)
    tuned = {name: tensor + 0.1 for name, tensor in models.fresh_adapter(lm, run.seed).items()}
    measured: list[int] = []

    def federate(log: RunLog, held_out: HeldOut | None) -> StateDict:
        assert held_out is not None
        measured.append(len(held_out.examples))
        log.event("handshake", client="ant", examples=3, tokens=9)
        return tuned

    deployed.run(run, tmp_path / "run", 1, federate)
    assert measured == [8]
    metrics = read_metrics(tmp_path / "run")
    assert [row["method"] for row in metrics["table"]] == ["base", "federated"]
    assert metrics["table"][0]["loss"] != pytest.approx(metrics["table"][1]["loss"])
    assert [client["client"] for client in metrics["clients"]] == ["ant"]
    assert config.load(tmp_path / "run" / "config.toml") == run
    assert "<html" in (tmp_path / "run" / "report.html").read_text()
    assert [event["event"] for event in read_events(tmp_path / "run")] == ["start", "handshake", "finish"]


def test_without_held_out_rows_the_server_measures_nothing(tmp_path: Path, tiny_model: Path, rows: Path) -> None:
    run = config.load(None, overrides(tiny_model, rows))

    def federate(log: RunLog, held_out: HeldOut | None) -> StateDict:
        assert held_out is None
        return models.fresh_adapter(models.load(run.model, run.adapter), 0)

    deployed.run(run, tmp_path / "run", 1, federate)
    assert read_metrics(tmp_path / "run")["table"] == []
    assert (tmp_path / "run" / "report.html").exists()


def test_a_failed_run_says_so_and_fails_in_flower_too(tmp_path: Path, tiny_model: Path, rows: Path) -> None:
    def federate(log: RunLog, held_out: HeldOut | None) -> StateDict:
        raise RunFailed("round 1: too few")

    with pytest.raises(RunFailed):
        deployed.run(config.load(None, overrides(tiny_model, rows)), tmp_path / "run", 1, federate)
    assert read_events(tmp_path / "run")[-1]["message"] == "round 1: too few"
    assert not (tmp_path / "run" / "metrics.json").exists()
