"""The server's own update for FLTrust: what it trains on, where it goes, and who may not bear its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import instruction_rows, overrides_for
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

import strategies
from apiary.config import loading
from apiary.config.schema import RunConfig
from apiary.core.errors import RunFailed, UserError
from apiary.core.messages import Fingerprint, FitReport, Hello, Payload, Update, Visit
from apiary.data import examples
from apiary.data.examples import Example
from apiary.data.turns import ToolCall, Turn
from apiary.models import adapters
from apiary.tracking.event_log import read_events
from apiary.transport import flower_records
from client.site import Site
from client.worker import Worker
from deploy import run_checks
from server import trusted_update
from server.rounds import Hooks, Rounds
from simulation.in_process_grid import LocalGrid
from simulation.run import simulate
from strategies import Aggregator, ServerState
from strategies.aggregator import AGGREGATORS, ROOT


def write(path: Path, n: int, seed: int = 9) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in instruction_rows(n, seed)), encoding="utf-8")
    return path


@pytest.fixture
def trusting(tiny_model: Path, rows_file: Path, tmp_path: Path) -> list[str]:
    """Overrides for a run by FLTrust on 40 rows of the server's own."""
    more = ["strategy.name=fltrust", f"strategy.root={write(tmp_path / 'root.jsonl', 40)}"]
    fast = ["evaluate.baselines=[]", "evaluate.generate=false", "data.clients=5"]
    return [*overrides_for(tiny_model, rows_file), *fast, *more]


def of(overrides: list[str], *more: str) -> RunConfig:
    return loading.load(None, [*overrides, *more])


# -- the configuration -------------------------------------------------------------------------------------------------


def test_rows_are_asked_for_exactly_where_they_are_used(trusting: list[str], tmp_path: Path) -> None:
    strategies.from_config(of(trusting))
    with pytest.raises(UserError, match=r"strategy\.root: .*'fltrust'.*name about 100 rows"):
        simulate(of([key for key in trusting if "root" not in key]), tmp_path / "run")
    with pytest.raises(UserError, match=r"strategy\.root: strategy\.name = 'fedavg' does not use"):
        simulate(of(trusting, "strategy.name=fedavg"), tmp_path / "run")
    with pytest.raises(UserError, match=r"strategy\.root = '.*nowhere\.jsonl': no such file"):
        simulate(of(trusting, "strategy.root=nowhere.jsonl"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_rows_beside_the_configuration_are_found(tmp_path: Path) -> None:
    write(tmp_path / "own.jsonl", 3)
    (tmp_path / "run.toml").write_text('[strategy]\nname = "fltrust"\nroot = "own.jsonl"\n')
    assert loading.load(tmp_path / "run.toml").strategy.root == str((tmp_path / "own.jsonl").resolve())


def test_a_deployment_looks_for_the_rows_before_it_starts(trusting: list[str]) -> None:
    run_checks.check(of(trusting))
    with pytest.raises(UserError, match=r"strategy\.root"):
        run_checks.check(of(trusting, "strategy.root=nowhere.jsonl"))


# -- the rows ----------------------------------------------------------------------------------------------------------


def test_what_is_measured_on_is_not_trained_on(trusting: list[str], tmp_path: Path) -> None:
    run = of(trusting)
    everything = trusted_update.rows(run)
    assert len(everything) == 40
    held_out = [everything[3], everything[7]._replace(tags={})]
    kept = trusted_update.rows(run, held_out)
    assert kept == tuple(e for i, e in enumerate(everything) if i not in (3, 7))
    with pytest.raises(UserError, match="all its questions are held out"):
        trusted_update.rows(run, everything)
    assert trusted_update.rows(of(trusting).model_copy(update={"strategy": RunConfig().strategy})) == ()


def test_rows_without_a_question_are_told_apart_by_all_that_they_say(
    trusting: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a question is the same whatever is trained of what was said before, and under whatever ids."""

    def talk(trained: bool, label: str, n: int) -> Example:
        call = ToolCall("count", json.dumps({"n": n}), label)
        calling = Turn("assistant", "", trained=trained, calls=(call,))
        return Example((Turn("user", "How many?"), calling, Turn("tool", "3"), Turn("assistant", "3")), {})

    texts = tuple(Example((Turn("assistant", f"A tale of bee {i}."),), {}) for i in range(3))
    read = (*texts, talk(True, "a", 1), talk(True, "a", 2))
    monkeypatch.setattr(examples, "read", lambda *args, **kwargs: examples.Source(read, (), None, ()))
    kept = trusted_update.rows(of(trusting), [texts[1], talk(False, "b", 1)])
    assert kept == (texts[0], texts[2], read[4])


def test_rows_that_all_come_out_empty_are_one_clear_line(trusting: list[str], tmp_path: Path) -> None:
    run = of(trusting, "prompt.max_tokens=8", "prompt.on_long=drop")
    with pytest.raises(UserError, match=r"strategy\.root = .*no row fits prompt\.max_tokens"):
        trusted_update.trainer(run, (), tmp_path / "root")


# -- the update --------------------------------------------------------------------------------------------------------


def test_rows_of_the_clients_own_are_remarked_on(trusting: list[str]) -> None:
    run = loading.load(None, trusting)
    assert trusted_update.remarks(run) == []
    (line,) = trusted_update.remarks(loading.load(None, [*trusting, f"strategy.root={run.data.source}"]))
    assert "are the clients' own rows" in line


def test_the_servers_update_comes_about_as_a_clients_does(trusting: list[str], tmp_path: Path) -> None:
    """Whatever is asked of clients beside training: their privacy, stages and curation are not the server's."""
    run = of(trusting)
    site = Site(ROOT, trusted_update.rows(run), (), tmp_path / "site", tmp_path / "ledger.json", run.adapter.rank)
    start = adapters.fresh_adapter(adapters.load(run.model, run.adapter), 0)
    wanted = [Worker(run).train(site, number, Payload(start, {})) for number in (1, 2)]
    stages = 'continual.stages=[["nothing"], ["of", "the"], ["kind"]]'
    private = ["privacy.unit=record", "privacy.batch_rows=8"]
    for name, more in (("plain", []), ("stages", [stages]), ("private", private), ("cut", ['curate.steps=["mask"]'])):
        train = trusted_update.trainer(of(trusting, *more), (), tmp_path / name)
        for number, visit in zip((1, 2), wanted, strict=True):
            assert isinstance(visit, Visit)
            made = train(number, Payload(start, {}))
            assert made.client == ROOT and made.rank == run.adapter.rank
            assert all(torch.equal(made.delta[n], visit.update.delta[n]) for n in start)


@pytest.mark.slow
def test_clients_that_point_elsewhere_than_the_server_are_cut(trusting: list[str], tmp_path: Path) -> None:
    attack = ["simulate.attackers=0.4", 'simulate.attack={name="sign_flip", scale=10.0}', "strategy.norm_guard=0"]
    run = of(trusting, *attack)
    metrics = simulate(run, tmp_path / "run")
    honest = simulate(of(trusting), tmp_path / "honest")
    losses = [row["loss"] for m in (metrics, honest) for row in m["table"]]
    assert losses[0] == pytest.approx(losses[1], abs=0.1)
    events = read_events(tmp_path / "run")
    (start,) = [e for e in events if e["event"] == "start"]
    rounds = [e for e in events if e["event"] == "round"]
    assert len(rounds) == run.rounds
    assert all(set(start["attack"]["clients"]) <= set(e["cut"]) != set(e["shares"]) for e in rounds)
    assert all("cosine" in reason for e in rounds for reason in e["cut"].values())
    assert (tmp_path / "run" / "root").is_dir()
    assert not (tmp_path / "run" / "clients" / "server").exists()
    # The server is no client: it is in no count, and the gauge of the round does not know of it.
    assert all(e["clients"] == 5 and set(e["shares"]) == {f"client-0{i}" for i in range(5)} for e in rounds)


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_servers_place_in_its_rows(trusting: list[str], tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def run(folder: Path, kill: tuple[str, int] | None = None) -> bytes:
        def observe(event: dict[str, Any]) -> None:
            if (event["event"], event.get("round")) == kill:
                raise Killed

        simulate(of(trusting), folder, resume=folder.exists(), observers=[observe])
        return (folder / "adapter" / "adapter_model.safetensors").read_bytes()

    whole = run(tmp_path / "whole")
    for at in (("round", 1), ("client", 2), ("round", 3)):  # a round's event comes before its checkpoint
        with pytest.raises(Killed):
            run(tmp_path / "broken", at)
    assert run(tmp_path / "broken") == whole


# -- the rounds --------------------------------------------------------------------------------------------------------

PRINT = Fingerprint("base", "tokenizer", "template", "adapter")
START = {"m.lora_A.weight": torch.eye(2, 3), "m.lora_B.weight": torch.ones(4, 2)}


class Log:
    """Keeps events."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def event(self, kind: str, **fields: Any) -> None:
        self.events.append({"event": kind, **fields})


def app(names: list[str]) -> ClientApp:
    """Clients of these names that add 1 to B."""
    made = ClientApp()

    def name(context: Context) -> str:
        return names[int(context.node_config["partition-id"])]

    @made.query("hello")
    def hello(message: Message, context: Context) -> Message:
        return Message(flower_records.hello_reply(Hello(name(context), PRINT, 2, 10, 100)), reply_to=message)

    @made.train()
    def train(message: Message, context: Context) -> Message:
        adapter = flower_records.read_request(message.content)[1].adapter
        delta = {n: torch.full_like(t, float("lora_B" in n)) for n, t in adapter.items()}
        report = FitReport(10, 5, 1, 2.0, 0.1)
        return Message(
            flower_records.train_reply(Visit(Update(name(context), delta, 10.0, 2), report)), reply_to=message
        )

    return made


def rounds(own: Any, log: Log) -> Rounds:
    values = ["rounds=2", "adapter.rank=2", "evaluate.every=0", "strategy.join_timeout_s=0.3", "strategy.min_clients=1"]
    values = [*values, "train.steps=1", "train.batch_tokens=500", "strategy.norm_guard=0"]  # changes by hand
    run = loading.load(None, values)
    made: Aggregator = AGGREGATORS.build("fltrust", scaling=lambda rank: 1.0)
    return Rounds(run, made, PRINT, ServerState(0, START, {}, {}), Hooks(log, own_update=own))


def test_each_fold_gets_one_update_of_the_servers_own() -> None:
    asked: list[int] = []

    def own(number: int, payload: Payload) -> Update:
        """Twice as long as the clients' changes, and along them."""
        asked.append(number)
        assert all(torch.equal(payload.adapter[n], t) for n, t in run.state.adapter.items())
        return Update(ROOT, {n: torch.full_like(t, 2.0 * ("lora_B" in n)) for n, t in START.items()}, 10.0, 2)

    log = Log()
    run = rounds(own, log)
    state = run.run(LocalGrid(app(["a", "b"]), 2), 2)
    assert asked == [1, 2]
    b, a = (state.adapter[f"m.lora_{part}.weight"] for part in "BA")
    torch.testing.assert_close(b @ a, (START["m.lora_B.weight"] + 2 * 2) @ START["m.lora_A.weight"])
    assert set(run.progress.last_round) == {"a", "b"}


def test_no_client_bears_the_servers_name() -> None:
    log = Log()
    run = rounds(lambda number, payload: None, log)
    with pytest.raises(RunFailed, match="0 clients passed the handshake"):
        run.run(LocalGrid(app([ROOT]), 1), 1)
    (refused,) = [e for e in log.events if e["event"] == "refused"]
    assert "calls itself as the server does" in refused["reason"] and "\n" not in refused["reason"]


def test_a_server_whose_own_training_diverges_says_so() -> None:
    def diverges(number: int, payload: Payload) -> Update:
        raise FloatingPointError("loss nan")

    with pytest.raises(RunFailed, match=r"round 1: the server's own training on strategy\.root diverged: loss nan"):
        rounds(diverges, Log()).run(LocalGrid(app(["a"]), 1), 1)


def test_no_file_of_rows_makes_a_client_of_the_servers_name(tmp_path: Path) -> None:
    """The names of clients come from names of files, which hold no slash."""
    (tmp_path / "server").mkdir()
    write(tmp_path / "server" / "train.jsonl", 4)
    write(tmp_path / "root.jsonl", 4)
    found = examples.read(str(tmp_path))
    assert ROOT not in found.origins and "/" in ROOT
