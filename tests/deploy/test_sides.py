"""Deployment: what answers at a site, and what surrounds the rounds on the server."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import torch
from chat_templates import CHATML
from conftest import instruction_rows
from deployment import SITES, overrides, write_rows
from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.clientapp.typing import ClientAppCallable, Mod
from flwr.common.serde import recorddict_to_proto
from grpc_health.v1 import health_pb2, health_pb2_grpc
from typer.testing import CliRunner

from apiary.cli import main
from apiary.config import loading, schema
from apiary.core.counts import EXACT
from apiary.core.errors import RunFailed, UserError
from apiary.core.messages import Decline, Visit
from apiary.core.tensors import StateDict
from apiary.data import federation, split, stages, tokenization
from apiary.evaluation.comparison import HeldOut
from apiary.evaluation.row_losses import ROW_LOSSES_FILE
from apiary.models import adapter_files, adapters, start
from apiary.tracking.event_log import RunLog, read_events
from apiary.tracking.metrics_file import read_metrics
from apiary.transport import flower_records
from client import app as client_app
from client import handlers, site_worker, worker_rpc
from client.site import Facts, at_home
from client.worker import Worker
from deploy import run_checks
from server import deployment_run
from simulation import engines
from simulation.in_process_grid import LocalGrid

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows")


# -- the thin app and the worker -----------------------------------------------------------------


def test_the_process_of_a_message_loads_neither_torch_nor_a_model() -> None:
    code = (
        "import sys; import client.app, client.worker_rpc;"
        "print([m for m in ('torch', 'transformers', 'peft', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


class Site:
    """A worker behind a real socket, and a Flower node that reaches it."""

    def __init__(self, folder: Path, overrides: list[str], rows: Path) -> None:
        self.state, self.socket = folder / "state", folder / "w.sock"
        self.run = loading.load(None, overrides)
        self.facts = Facts("ant", rows / "ant.jsonl", self.state, self.run.model.name)
        self.server = self.serve(self.facts)
        adapter = flower_records.to_arrays(adapters.fresh_adapter(adapters.load(self.run.model, self.run.adapter), 0))
        self.content = flower_records.request(1, adapter, ArrayRecord())

    def serve(self, facts: Facts) -> grpc.Server:
        server = site_worker.make_server(site_worker.Service(facts), self.address)
        server.start()
        return server

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
    """Where nothing is held out, which each site does by a key of its own, and counts are told exactly."""
    site.server.stop(None)
    site.server = site.serve(site.facts._replace(counts=EXACT))
    site.run = site.run.model_copy(update={"data": site.run.data.model_copy(update={"test_fraction": 0.0})})
    own = site.ask("train")
    handlers.forget()
    grid = LocalGrid(client_app.make_app(engines.site_facts(site.run.to_json(), tmp_path / "simulated")), len(SITES))
    (virtual,) = grid.send_and_receive([Message(site.content, 1000, "train", group_id="1")])
    ours, theirs = (flower_records.read_train_reply(reply.content) for reply in (own, virtual))
    assert ours.update.client == theirs.update.client == "ant"  # type: ignore[union-attr]
    assert flower_records.read_message(own.content) == flower_records.read_message(virtual.content) != b""
    assert (site.state / "runs" / "first" / "round-0001.json").exists()


def test_a_site_needs_no_copy_of_the_adapter_that_a_run_begins_from(site: Site, tmp_path: Path) -> None:
    """Its rank, scale and targets travel in the configuration, and the adapter itself as the first that is received."""
    lm = adapters.load(site.run.model, site.run.adapter.of_rank(3).model_copy(update={"targets": ("q_proj",)}))
    begin = {name: torch.ones_like(tensor) for name, tensor in adapters.get_adapter(lm).items()}
    adapter_files.save_adapter(lm, begin, tmp_path / "begin")
    given = site.run.model_dump() | {"adapter": {"start": str(tmp_path / "begin")}}
    site.run = run_checks.begun(loading.parse(given))
    assert (site.run.adapter.rank, site.run.adapter.targets) == (3, ("q_proj",))
    shutil.rmtree(tmp_path / "begin")
    start.forget()
    reply = site.ask("train", flower_records.request(1, flower_records.to_arrays(begin), ArrayRecord()))
    assert not reply.has_error()
    sent = flower_records.read_train_reply(reply.content)
    assert sent.update.rank == 3  # type: ignore[union-attr]
    assert site.ask(flower_records.HELLO).content


def test_the_worker_is_healthy_and_reads_its_base_once(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    with grpc.insecure_channel(site.address) as channel:
        asked = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=""), timeout=5)
        assert asked.status == health_pb2.HealthCheckResponse.SERVING
    caplog.set_level("INFO", logger="client.site_worker")
    site.ask(flower_records.HELLO)
    loads = adapters.base_loads()
    for name in ("first", "second", "first"):
        assert not site.ask("train", name=name).has_error()
    assert adapters.base_loads() == loads
    pinned, hello, *lines = [r.getMessage() for r in caplog.records if r.name == "client.site_worker"]
    assert "held-out rows pinned" in pinned and "query.hello" in hello
    assert all("round 1 train" in line and "0 base loads" in line for line in lines)


def test_what_goes_wrong_at_a_site_stays_there(site: Site, rows: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    site.state.mkdir()
    (site.state / "errors.log").touch(0o644)
    (rows / "ant.jsonl").write_text('{"instruction": "the queen is in hive 9"}\n')
    reply = site.ask("train")
    assert reply.has_error() and "UserError" in reply.error.reason and "errors.log" in reply.error.reason
    assert "hive" not in reply.error.reason and "jsonl" not in reply.error.reason
    log = site.state / "errors.log"
    assert "ant.jsonl" in log.read_text() and stat.S_IMODE(log.stat().st_mode) == 0o600
    # Nor is it on the site's terminal, where its service tells of what goes on.
    assert not [r for r in caplog.records if r.exc_info and r.levelno >= logging.INFO]


@pytest.mark.parametrize("name", ["../out", "a/b", "..", ".x", "a\nb", ""])
def test_a_run_cannot_lead_out_of_the_sites_folder(site: Site, name: str) -> None:
    assert "name is not allowed" in site.ask("train", name=name).error.reason
    assert not site.state.exists() or not list(site.state.rglob("round-*"))


def test_a_run_cannot_name_code_for_the_site_to_load(site: Site, tmp_path: Path) -> None:
    run = site.run.model_copy(update={"train": site.run.train.model_copy(update={"objective": "os:system"})})
    assert "module:function" in site.ask("train", config=run.to_json()).error.reason


def test_a_run_cannot_make_the_site_open_a_file_of_its_choice(site: Site, tmp_path: Path) -> None:
    pipe, file = tmp_path / "pipe", tmp_path / "honest.txt"
    os.mkfifo(pipe)  # a site that opens it waits without end
    file.write_text("{instruction}\n{response}")
    told = set()
    for template in (pipe, file, tmp_path / "nothing.txt"):
        prompt = site.run.prompt.model_copy(update={"template": str(template)})
        reply = site.ask("train", config=site.run.model_copy(update={"prompt": prompt}).to_json())
        told.add(reply.error.reason)
    assert len(told) == 1 and "built-in templates alone" in told.pop()


@pytest.mark.parametrize("name", ["some-org/some-model", "../elsewhere", "here"])
def test_without_a_model_of_its_own_a_site_takes_none_but_the_built_in(site: Site, name: str) -> None:
    site.server.stop(None)
    site.server = site.serve(site.facts._replace(model=None))
    loads = adapters.base_loads()
    run = site.run.model_copy(update={"model": site.run.model.model_copy(update={"name": name})})
    assert "without --model" in site.ask(flower_records.HELLO, config=run.to_json()).error.reason
    assert adapters.base_loads() == loads
    built_in = run.model_copy(update={"model": run.model.model_copy(update={"name": "builtin:tiny"})})
    assert not site.ask(flower_records.HELLO, config=built_in.to_json()).has_error()


@pytest.mark.parametrize(
    ("limits", "option"),
    [
        *(({"max_epsilon": value}, "--max-epsilon") for value in (math.nan, math.inf, 0.0, -1.0)),
        *(({"max_delta": value}, "--max-delta") for value in (math.nan, 0.0, 1.0)),
    ],
)
def test_limits_that_limit_nothing_are_refused(
    limits: dict[str, float], option: str, tmp_path: Path, rows: Path
) -> None:
    facts = Facts("ant", rows / "ant.jsonl", tmp_path, max_epsilon=8.0)._replace(**limits)
    with pytest.raises(UserError, match=option):
        site_worker.check(facts)
    words = ["deploy", "client", str(tmp_path), "--data", str(rows), option, str(next(iter(limits.values())))]
    done = CliRunner().invoke(main.app, words)
    assert isinstance(done.exception, UserError) and option in str(done.exception)


GOOD = '{"instruction": "a", "output": "b"}\n'


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "is empty"),
        ("not json\n", "row 1: bad JSON"),
        ("[1, 2]\n", "not an object"),
        ('{"instruction": "a"}\n', "both a question and an answer"),
        ('{"instruction": "a", "output": " "}\n', "both a question and an answer"),
    ],
)
def test_rows_that_no_run_could_use_are_told_at_once(text: str, line: str, tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "good.jsonl").write_text(GOOD)
    (folder / "odd.jsonl").write_text(text)
    for place in (folder, folder / "odd.jsonl"):
        with pytest.raises(UserError, match=f"--data.*odd.jsonl.*{line}") as caught:
            site_worker.check(Facts("ant", place, tmp_path))
        assert "\n" not in str(caught.value)
    assert site_worker.check(Facts("ant", folder / "good.jsonl", tmp_path)) == (1, ())


def test_rows_whose_columns_nobody_names_are_told_at_once(tmp_path: Path) -> None:
    odd, partly = tmp_path / "odd.jsonl", tmp_path / "partly.jsonl"
    odd.write_text('{"text": "a", "label": "b"}\n{"text": "c", "label": "d"}\n')
    partly.write_text(GOOD + '{"instruction": "a"}\n')
    with pytest.raises(UserError, match=r"odd.jsonl.*text, label.*no run does \(--column instruction=NAME\)"):
        site_worker.check(Facts("ant", odd, tmp_path))
    assert site_worker.check(Facts("ant", odd, tmp_path, columns={"instruction": "text", "output": "label"}))[0] == 2
    assert site_worker.check(Facts("ant", partly, tmp_path)).warnings == (
        "partly.jsonl: 1 of 2 rows left out: missing field 'output' (rows 2)",
    )


def test_rows_of_text_alone_and_what_is_read_otherwise_are_told(tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "Once upon a time."}\n')
    assert site_worker.check(Facts("ant", tmp_path / "text.jsonl", tmp_path)) == (
        1,
        ("text.jsonl: 1 of 1 rows: read as text to continue: all of it is trained (rows 1)",),
    )


def test_a_sites_log_says_what_a_split_leaves_as_a_run_does(
    tmp_path: Path, tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chat = [{"role": role, "content": "Hello"} for role in ("user", "assistant", "user")]
    alike = {"messages": chat}
    few = [{"instruction": f"Case {i}?", "output": "amber"} for i in range(40)]
    path = tmp_path / "ant.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*[alike] * 320, *few]))
    run = loading.load(None, [*overrides(tiny_model, tmp_path), "data.test_fraction=0.5", "strategy.min_clients=1"])
    facts = Facts("ant", path, tmp_path / "state")
    site_worker._read_site(at_home(run, facts), facts, "first")
    said = caplog.text
    assert "ant.jsonl: 320 of 360 rows: what follows the last trained answer is left out" in said
    assert "320 of 360 rows open with the same question" in said


@pytest.mark.parametrize(
    ("missing", "line"),
    [
        (["config.json"], "has no configuration"),
        (["tokenizer.json", "tokenizer_config.json"], "has no tokenizer"),
        (["model.safetensors"], None),  # no weight is read
    ],
)
def test_a_model_is_looked_at_before_the_site_connects(
    missing: list[str], line: str | None, tmp_path: Path, tiny_model: Path, rows: Path
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns(*missing))
    facts = Facts("ant", rows / "ant.jsonl", tmp_path, str(folder))
    if line is None:
        site_worker.check(facts)
        return
    with pytest.raises(UserError, match=rf"--model .*{line}") as caught:
        site_worker.check(facts)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"model": "./nowhere"}, "--model './nowhere': no such folder"),
        ({"model": "builtin:large"}, "--model 'builtin:large'"),
        ({"model": "x" * 300}, "--model 'x+': no such folder here"),
        ({"device": "gpu0"}, "--device 'gpu0': allowed are"),
        ({"device": "cuda:99"}, "--device 'cuda:99'"),
    ],
)
def test_a_model_or_device_that_is_not_here_is_told_at_once(
    given: dict[str, str], line: str, tmp_path: Path, rows: Path
) -> None:
    with pytest.raises(UserError, match=line):
        site_worker.check(Facts("ant", rows / "ant.jsonl", tmp_path)._replace(**given))  # type: ignore[arg-type]


def test_a_site_leaves_out_the_rows_of_no_stage_as_a_simulation_does(tmp_path: Path, tiny_model: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    for site, skills in (("ant", ("first", "other")), ("bee", ("second", "other", "first"))):
        rows = [{**row, "skill": skills[i % len(skills)]} for i, row in enumerate(instruction_rows(60))]
        (folder / f"{site}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = [*overrides(tiny_model, folder), "rounds=2", 'continual.stages=[["first"], ["second"]]']
    run = loading.load(None, [*given, "strategy.min_clients=2"])
    own = split.repin(tmp_path / "state", run.data.test_fraction, new_key=True, agreed=run)
    simulated = stages.within(federation.federate(run.data, run.seed, own.key), run)
    for client in simulated.clients:
        facts = Facts(client.name, folder / f"{client.name}.jsonl", tmp_path / "state")
        site = site_worker._read_site(at_home(run, facts), facts, "first")
        assert (site.train, site.test) == (client.train, client.test)
        assert 0 < len(site.train) + len(site.test) < 60


def _private(run: schema.RunConfig, **privacy: object) -> schema.RunConfig:
    changed = {"unit": "record", "batch_rows": 8, "noise_multiplier": 1.0, "epsilon": 8.0, **privacy}
    return loading.parse({**run.model_dump(mode="json"), "privacy": {**run.privacy.model_dump(), **changed}})


@pytest.mark.slow
def test_a_site_may_insist_on_privacy(site: Site) -> None:
    facts = site.facts._replace(max_epsilon=8.0)
    site.server.stop(None)
    site.server = site.serve(facts)
    private = _private(site.run)
    stages = loading.parse({**private.model_dump(mode="json"), "rounds": 3, "continual": {"stages": [["first"]]}})
    for run, why in (
        (site.run, "the run promises nothing"),
        (_private(site.run, epsilon=8.5), "epsilon <= 8"),
        (_private(site.run, delta=1e-3), "delta <= 1e-05"),
        (stages, "continual.by, continual.stages: this site's operator has agreed to no such choice"),
    ):
        assert why in site.ask("train", config=run.to_json()).error.reason
    assert not (site.state / "ledger.json").exists()
    assert not site.ask("train", config=private.to_json()).has_error()
    # And no loss of its held-out rows, though the server asks.
    _, score = flower_records.read_score_reply(site.ask("evaluate", config=private.to_json()).content)
    assert score == (0.0, 0, 0)


@pytest.mark.slow
def test_what_one_run_spent_the_next_run_finds_spent(site: Site) -> None:
    """The ledger is of the site's rows, not of a run: a server cannot start anew by starting a new run."""
    run = _private(site.run, epsilon=5.0)
    spent = []
    for name in ("first", "second", "third"):
        answer = flower_records.read_train_reply(site.ask("train", config=run.to_json(), name=name).content)
        spent.append(answer.spent.epsilon if isinstance(answer, Visit) and answer.spent else None)
    assert spent[0] is not None and spent[1] is not None and spent[0] < spent[1] <= 5.0
    for name in map(str, range(20)):
        answer = flower_records.read_train_reply(site.ask("train", config=run.to_json(), name=name).content)
    assert answer == Decline("ant", "budget")


def test_a_site_settles_auto_by_its_own_tokenizer(tmp_path: Path, rows: Path, tiny_model: Path) -> None:
    """The run names no template: server and site agree where their tokenizers do, and the handshake tells where not."""
    with_chat = shutil.copytree(tiny_model, tmp_path / "with-chat")
    (with_chat / "chat_template.jinja").write_text(CHATML)
    sent = loading.load(None, [*overrides(tiny_model, rows), "prompt.template=auto"])
    assert loading.from_json(sent.to_json()) == sent
    prints, names = {}, {}
    for base in (tiny_model, with_chat):
        facts = Facts("ant", rows / "ant.jsonl", tmp_path / "state", str(base))
        site_worker._refuse_foreign_places(sent, facts)
        config = at_home(sent, facts)
        worker = Worker(config)
        names[base] = worker.template.name
        prints[base] = worker.hello(site_worker._read_site(config, facts, "first")).fingerprint
    assert names == {tiny_model: "alpaca", with_chat: "chat"}
    lm = adapters.load(sent.model, sent.adapter)
    here = adapters.fingerprint(lm, tokenization.make_template(sent.prompt, lm.tokenizer))
    assert prints[tiny_model] == here
    assert prints[with_chat] == here._replace(template=prints[with_chat].template) != here


def test_a_worker_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(worker_rpc.Unanswered, match="did not come up"):
        worker_rpc.ask(f"unix:{tmp_path / 'nobody.sock'}", worker_rpc.Envelope({}), ready_s=0.3)


def test_a_worker_is_let_go_once_nobody_waits_for_what_it_is_doing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, let_go = threading.Event(), threading.Event()
    monkeypatch.setattr(site_worker, "_WATCH_S", 0.01)
    monkeypatch.setattr(site_worker, "_LET_GO_S", 0.2)
    monkeypatch.setattr(handlers, "answer", lambda *args, **kwargs: (go_on.wait(60), RecordDict())[1])
    service = site_worker.Service(Facts("ant", tmp_path, tmp_path))
    call = worker_rpc.Envelope({"kind": "train", "config": "{}", "name": "first"})
    threading.Thread(target=service.watch, args=(let_go.set,), daemon=True).start()
    waits = threading.Event()
    waits.set()
    working = threading.Thread(target=service.answer, args=(call, waits.is_set))
    working.start()
    try:
        assert not let_go.wait(1.0)  # however long it takes, while somebody waits
        waits.clear()
        assert let_go.wait(30)
    finally:
        go_on.set()
        working.join()


@pytest.mark.slow
def test_the_process_of_a_worker_ends_within_seconds_when_its_call_is_let_go(
    tmp_path: Path, tiny_model: Path, rows: Path
) -> None:
    """In the middle of a visit that would take hours."""
    run = loading.load(None, [*overrides(tiny_model, rows), "train.steps=10000000"])
    address, state = f"unix:{tmp_path}/w.sock", tmp_path / "state"
    command = [sys.executable, "-P", "-m", "client.site_worker", "--address", address, "--site", "ant"]
    command += ["--data", str(rows / "ant.jsonl"), "--state", str(state), "--model", str(tiny_model)]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        adapter = adapters.fresh_adapter(adapters.load(run.model, run.adapter), 0)
        body = recorddict_to_proto(flower_records.request(1, flower_records.to_arrays(adapter), ArrayRecord()))
        call = worker_rpc.Envelope({"kind": "train", "round": "1", "config": run.to_json(), "name": "first"})
        call = call._replace(body=body.SerializeToString())

        def ask() -> None:
            with pytest.raises(worker_rpc.Unanswered):
                worker_rpc.ask(address, call)

        asking = threading.Thread(target=ask)
        asking.start()
        deadline = time.monotonic() + 120
        while not list(state.rglob("steps.jsonl")):
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.1)
        worker_rpc.cancel()
        assert process.wait(60) == site_worker.LET_GO
        asking.join()
        assert "nobody waits any more" in (tmp_path / "log").read_text()
    finally:
        process.kill()
        process.wait()


def test_a_site_goes_by_its_own_places(tmp_path: Path, rows: Path) -> None:
    given = ["model.name=org/base", "data.test=builtin:skills", "data.partition=natural", f"data.source={rows}"]
    sent = loading.load(None, [*given, "data.test_fraction=0.3"])
    own = at_home(sent, Facts("bee", rows / "bee.jsonl", tmp_path, "here/base", "cuda:1"))
    assert (own.model.name, own.model.device) == ("here/base", "cuda:1")
    assert own.data.test is None  # a place on the server's disk
    alone = sent.data.model_copy(update={"test": None})
    simulated = {client.name: client for client in federation.federate(alone, sent.seed).clients}["bee"]
    (client,) = federation.federate(own.data, own.seed).clients
    assert (client.train, client.test) == (simulated.train, simulated.test)
    assert len(client.test) > 3 and len(client.train) + len(client.test) == 40


def test_an_envelope_comes_out_as_it_went_in() -> None:
    packed = worker_rpc.Envelope({"kind": "träin", "n": 1}, b"\x00\xff" * 9).pack()
    assert worker_rpc.unpack(packed) == ({"kind": "träin", "n": 1}, b"\x00\xff" * 9)
    with pytest.raises(ValueError, match="envelope"):
        worker_rpc.unpack(packed[:6])


# -- the server's side of a run ------------------------------------------------------------------


def test_the_server_app_keeps_the_run_directory(tmp_path: Path, tiny_model: Path, rows: Path) -> None:
    run = loading.load(None, [*overrides(tiny_model, rows), f"data.test={rows / 'bee.jsonl'}"])
    lm = adapters.load(run.model, run.adapter)
    tuned = {name: tensor + 0.1 for name, tensor in adapters.fresh_adapter(lm, run.seed).items()}
    measured: list[int] = []

    def federate(log: RunLog, held_out: HeldOut | None) -> StateDict:
        assert held_out is not None
        measured.append(len(held_out.examples))
        log.event("handshake", client="ant", examples=3, tokens=9)
        return tuned

    deployment_run.run(run, tmp_path / "run", 1, federate)
    assert measured == [8]
    metrics = read_metrics(tmp_path / "run")
    assert [row["method"] for row in metrics["table"]] == ["base", "federated"]
    assert metrics["table"][0]["loss"] != pytest.approx(metrics["table"][1]["loss"])
    assert [client["client"] for client in metrics["clients"]] == ["ant"]
    assert loading.load(tmp_path / "run" / "config.toml") == run
    assert "<html" in (tmp_path / "run" / "report.html").read_text()
    assert not (tmp_path / "run" / ROW_LOSSES_FILE).exists()
    start, *others = read_events(tmp_path / "run")
    assert [event["event"] for event in (start, *others)] == ["start", "handshake", "finish"]
    assert start["method"] == {
        "averages": "always",
        "recovers": "",
        "takes_one": False,
        "threshold": None,
        "scalars": 0,
    }


def test_without_held_out_rows_the_server_measures_nothing(tmp_path: Path, tiny_model: Path, rows: Path) -> None:
    run = loading.load(None, overrides(tiny_model, rows))

    def federate(log: RunLog, held_out: HeldOut | None) -> StateDict:
        assert held_out is None
        return adapters.fresh_adapter(adapters.load(run.model, run.adapter), 0)

    deployment_run.run(run, tmp_path / "run", 1, federate)
    assert read_metrics(tmp_path / "run")["table"] == []
    assert (tmp_path / "run" / "report.html").exists()


def test_a_failed_run_says_so_and_fails_in_flower_too(tmp_path: Path, tiny_model: Path, rows: Path) -> None:
    def federate(log: RunLog, held_out: HeldOut | None) -> StateDict:
        raise RunFailed("round 1: too few")

    with pytest.raises(RunFailed):
        deployment_run.run(loading.load(None, overrides(tiny_model, rows)), tmp_path / "run", 1, federate)
    assert read_events(tmp_path / "run")[-1]["message"] == "round 1: too few"
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_a_second_process_leaves_a_run_directory_alone(tmp_path: Path, tiny_model: Path, rows: Path) -> None:
    run = loading.load(None, overrides(tiny_model, rows))

    def federate(log: RunLog, held_out: HeldOut | None) -> StateDict:
        before = _files(tmp_path / "run")
        with pytest.raises(UserError, match="a run still goes on in it"):
            deployment_run.run(run, tmp_path / "run", 1, federate)
        assert _files(tmp_path / "run") == before
        raise RunFailed("enough")

    for _ in range(2):  # what has ended holds nothing
        with pytest.raises(RunFailed):
            deployment_run.run(run, tmp_path / "run", 1, federate)


def _files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_resumed_run_sweeps_and_counts_all_its_seconds(tmp_path: Path, tiny_model: Path, rows: Path) -> None:
    run = loading.load(None, overrides(tiny_model, rows))
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.toml").write_text(run.to_toml())
    earlier = [{"event": "start", "time": 1000.0}, {"event": "phase", "time": 1600.0}]
    (folder / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in earlier))
    drafts = [folder / ".metrics.json.tmp", folder / "checkpoints" / ".round-0001.tmp", folder / ".adapter-1" / "part"]
    for draft in drafts:
        draft.parent.mkdir(exist_ok=True)
        draft.touch()
    (folder / ".mine").touch()

    def federate(log: RunLog, held_out: HeldOut | None) -> StateDict:
        assert not [draft for draft in drafts if draft.exists()] and (folder / ".mine").exists()
        return adapters.fresh_adapter(adapters.load(run.model, run.adapter), 0)

    deployment_run.run(run, folder, 1, federate)
    assert 600 <= read_metrics(folder)["seconds"] < 700


def test_the_server_measures_on_rows_of_a_stage_and_tells_what_is_not_measured(
    tmp_path: Path, tiny_model: Path, rows: Path
) -> None:
    tests = [{**row, "skill": "first" if i < 6 else "other"} for i, row in enumerate(instruction_rows(10))]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*tests, {"instruction": "no"}]))
    more = [f"data.test={tmp_path / 'test.jsonl'}", "rounds=2", 'continual.stages=[["first"], ["second"]]']
    run = loading.load(None, [*overrides(tiny_model, rows), *more])
    measured: list[int] = []

    def federate(log: RunLog, held_out: HeldOut | None) -> StateDict:
        assert held_out is not None
        measured.append(len(held_out.examples))
        raise RunFailed("enough")

    with pytest.raises(RunFailed):
        deployment_run.run(run, tmp_path / "run", 1, federate)
    assert measured == [6]
    told = [event["message"] for event in read_events(tmp_path / "run") if event["event"] == "warning"]
    assert any("stage 2 has no held-out example" in line for line in told)
    assert any("test.jsonl" in line for line in told)  # its row without an answer


def test_neither_the_split_nor_the_query_of_a_site_is_the_servers(tmp_path: Path, rows: Path) -> None:
    """Either would choose which of its rows a site uses, and the second could ask a database for anything."""
    sent = loading.load(None, ["data.split=test", "data.query=select 1", "data.source=sqlite:///elsewhere.db"])
    data = at_home(sent, Facts("bee", rows / "bee.jsonl", tmp_path)).data
    assert (data.source, data.split, data.query, data.test) == (str(rows / "bee.jsonl"), "train", None, None)
