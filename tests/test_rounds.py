"""The rounds, driven by scripted clients on the in-process grid: real Flower messages, no language model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from apiary import config, records
from apiary.exchange import Fingerprint, FitReport, Hello, Score, Update
from server.rounds import Progress, Rounds, RunFailed
from simulation.local import LocalGrid
from strategies import AGGREGATORS, ServerState

PRINT = Fingerprint("base", "tokenizer", "template", "adapter")
START = {"a": torch.zeros(2, 3), "b": torch.ones(4)}
Act = Callable[[int, dict[str, torch.Tensor]], Any]


class Log:
    """Keeps events."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def event(self, kind: str, **fields: Any) -> None:
        self.events.append({"event": kind, **fields})

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [e for e in self.events if e["event"] == kind]


def add_one(index: int, adapter: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The delta of client i: all entries i + 1, with weight 10 (i + 1)."""
    return {name: torch.full_like(t, index + 1.0) for name, t in adapter.items()}


def clients(
    deltas: dict[int, Any] | None = None, prints: dict[int, Fingerprint] | None = None, loss: float = 1.0
) -> ClientApp:
    """An app whose node i returns `deltas[i](i, adapter)`, or raises it, or is well-behaved."""
    deltas, prints = deltas or {}, prints or {}
    app = ClientApp()

    @app.query("hello")
    def hello(message: Message, context: Context) -> Message:
        i = int(context.node_config["partition-id"])
        return Message(records.hello_reply(Hello(f"c{i}", prints.get(i, PRINT), 4, 10, 100)), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        i = int(context.node_config["partition-id"])
        _, payload = records.read_request(message.content)
        act = deltas.get(i, add_one)
        if isinstance(act, Exception):
            raise act
        update = Update(f"c{i}", act(i, dict(payload.adapter)), 10.0 * (i + 1), 4)
        return Message(records.train_reply(update, FitReport(10 * (i + 1), 5, 1, 2.0, 0.1)), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        i = int(context.node_config["partition-id"])
        return Message(records.score_reply(f"c{i}", Score(loss * 10 * (i + 1), 10 * (i + 1), 3)), reply_to=message)

    return app


def rounds(overrides: list[str], **kwargs: Any) -> tuple[Rounds, Log]:
    log = Log()
    run = config.load(None, ["rounds=2", *overrides])
    made = Rounds(
        run,
        AGGREGATORS.build("fedavg", {}, weighting=run.strategy.weighting),
        PRINT,
        ServerState(0, START, {}, {}),
        log=log,
        **kwargs,
    )
    return made, log


def test_weighted_mean_by_hand() -> None:
    made, log = rounds(["rounds=1"])
    state = made.run(LocalGrid(clients(), 3), 3)
    expected = (1 * 10 + 2 * 20 + 3 * 30) / 60
    torch.testing.assert_close(state.adapter["a"], torch.full((2, 3), expected))
    torch.testing.assert_close(state.adapter["b"], torch.full((4,), 1 + expected))
    done = log.of("round")[0]
    assert (done["clients"], done["asked"], done["tokens"]) == (3, 3, 60)
    assert done["bytes_up"] >= 3 * 4 * 10 and done["bytes_down"] >= 3 * 4 * 10


def test_uniform_weights_ignore_tokens() -> None:
    made, _ = rounds(["rounds=1", "strategy.weighting=uniform"])
    state = made.run(LocalGrid(clients(), 3), 3)
    torch.testing.assert_close(state.adapter["a"], torch.full((2, 3), 2.0))


def _with(name: str, value: float) -> Act:
    def act(i: int, adapter: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        delta = add_one(i, adapter)
        delta[name].view(-1)[0] = value
        return delta

    return act


BAD: list[tuple[Any, str]] = [
    (_with("a", math.nan), "NaN"),
    (_with("b", math.inf), "NaN or infinity"),
    (lambda i, a: {"a": torch.ones(3, 3), "b": torch.ones(4)}, "(3, 3)"),
    (lambda i, a: {"a": torch.ones(2, 3)}, "other tensors"),
    (lambda i, a: {name: t.to(torch.complex64) for name, t in a.items()}, "complex64"),
    (ValueError("row 17 says: secret"), "ValueError"),
]


@pytest.mark.parametrize(("bad", "why"), BAD)
def test_bad_client_costs_one_client_and_one_line(bad: Any, why: str) -> None:
    made, log = rounds(["rounds=1"])
    state = made.run(LocalGrid(clients({1: bad}), 3), 3)
    expected = (1 * 10 + 3 * 30) / 40
    torch.testing.assert_close(state.adapter["a"], torch.full((2, 3), expected))
    refused = log.of("refused")
    assert [r["client"] for r in refused] == ["c1"]
    assert why in refused[0]["reason"] and "\n" not in refused[0]["reason"]
    assert "secret" not in refused[0]["reason"]


def test_too_few_good_replies_fail_the_run() -> None:
    made, _ = rounds(["strategy.quorum=0.5"])
    broken = ValueError("x")
    with pytest.raises(RunFailed, match=r"round 1: 1 of 3 clients answered well.*2"):
        made.run(LocalGrid(clients({0: broken, 1: broken}), 3), 3)


@pytest.mark.parametrize("part", Fingerprint._fields)
def test_another_base_tokenizer_or_template_is_refused(part: str) -> None:
    made, log = rounds(["rounds=1"])
    made.run(LocalGrid(clients(prints={2: PRINT._replace(**{part: "other"})}), 3), 3)
    refused = log.of("refused")
    assert [r["client"] for r in refused] == ["c2"] and part in refused[0]["reason"]
    assert log.of("asked")[0]["clients"] == ["c0", "c1"]


def test_all_refused_fails_before_the_first_round() -> None:
    other = {i: PRINT._replace(base="other") for i in range(3)}
    made, log = rounds([])
    with pytest.raises(RunFailed, match="0 clients passed the handshake"):
        made.run(LocalGrid(clients(prints=other), 3), 3)
    assert len(log.of("refused")) == 3


def test_too_few_nodes_time_out() -> None:
    made, _ = rounds(["strategy.join_timeout_s=0.2"])
    with pytest.raises(RunFailed, match="2 of 3 clients joined"):
        made.run(LocalGrid(clients(), 2), 3)


def test_a_client_cannot_answer_in_anothers_name() -> None:
    app = clients()

    @app.train("as")
    def unused(message: Message, context: Context) -> Message:
        return message

    class Liar(LocalGrid):
        def _execute(self, message: Message) -> Message:
            reply = super()._execute(message)
            if message.metadata.message_type == "train" and message.metadata.dst_node_id == 1001:
                reply.content["who"]["who"] = "c0"
            return reply

    made, log = rounds(["rounds=1"])
    made.run(Liar(app, 3), 3)
    assert [r["client"] for r in log.of("refused")] == ["c1"]
    assert log.of("round")[0]["clients"] == 2


def test_deadline_names_who_was_late() -> None:
    class Slow(LocalGrid):
        def pull_messages(self, message_ids: Any) -> Any:
            ids = [
                i
                for i in message_ids
                if self._waiting[i].metadata.message_type != "train" or self._waiting[i].metadata.dst_node_id != 1002
            ]
            return super().pull_messages(ids)

    made, log = rounds(["rounds=1", "strategy.deadline_s=0.3"])
    made.run(Slow(clients(), 3), 3)
    assert [(r["client"], "no answer within 0.3 s" in r["reason"]) for r in log.of("refused")] == [("c2", True)]


GARBAGE: dict[str, Callable[[Any], None]] = {
    "no name": lambda content: content["who"].pop("who"),
    "junk bytes": lambda content: setattr(next(iter(content["adapter"].values())), "data", b"junk"),
    "list counts": lambda content: content["counts"].__setitem__("tokens", [1, 2]),
    "nan counts": lambda content: content["counts"].__setitem__("tokens", math.nan),
    "no arrays": lambda content: content.pop("adapter"),
}


@pytest.mark.parametrize("what", GARBAGE)
def test_garbage_costs_one_client(what: str) -> None:
    class Spoiler(LocalGrid):
        def _execute(self, message: Message) -> Message:
            reply = super()._execute(message)
            if message.metadata.message_type == "train" and message.metadata.dst_node_id == 1001:
                GARBAGE[what](reply.content)
            return reply

    made, log = rounds(["rounds=1"])
    made.run(Spoiler(clients(), 3), 3)
    assert [r["client"] for r in log.of("refused")] == ["c1"]
    assert log.of("round")[0]["clients"] == 2


class Leaving(LocalGrid):
    """Nodes 1001 and 1002 are gone once `gone` says so."""

    gone = False

    def get_node_ids(self) -> Any:
        return [n for n in super().get_node_ids() if n == 1000 or not self.gone]


def test_a_round_never_runs_with_fewer_than_min_clients() -> None:
    grid = Leaving(clients(), 3)

    def leave(state: ServerState, progress: Progress) -> None:
        grid.gone = state.round == 2

    overrides = ["rounds=4", "strategy.min_clients=2", "strategy.join_timeout_s=0.2"]
    made, log = rounds(overrides, on_round=leave)
    with pytest.raises(RunFailed, match=r"round 3: 1 clients are left, strategy.min_clients = 2"):
        made.run(grid, 3)
    assert [len(e["clients"]) for e in log.of("asked")] == [3, 3]


def test_who_comes_back_takes_part_again() -> None:
    grid = Leaving(clients(), 3)

    def come_and_go(state: ServerState, progress: Progress) -> None:
        grid.gone = state.round == 1

    made, log = rounds(["rounds=3", "strategy.min_clients=1"], on_round=come_and_go)
    made.run(grid, 3)
    assert [len(e["clients"]) for e in log.of("asked")] == [3, 1, 3]


def test_a_silent_node_holds_up_nobody() -> None:
    """A node that is listed but never answers costs its patience once, not in every round."""

    class Silent(LocalGrid):
        def pull_messages(self, message_ids: Any) -> Any:
            ids = [i for i in message_ids if i in self._waiting and self._waiting[i].metadata.dst_node_id != 1002]
            return super().pull_messages(ids)

        def push_messages(self, messages: Any) -> Any:
            kept = dict(self._waiting)
            ids = super().push_messages(messages)
            self._waiting = {**kept, **self._waiting}
            return ids

    made, log = rounds(["rounds=5", "strategy.join_timeout_s=0.2"])
    began = time.monotonic()
    made.run(Silent(clients(), 3), 3)
    assert time.monotonic() - began < 5 * 0.2
    assert all(e["clients"] == ["c0", "c1"] for e in log.of("asked"))


def test_a_message_that_cannot_be_sent_costs_its_client() -> None:
    class Unreachable(LocalGrid):
        def push_messages(self, messages: Any) -> Any:
            messages = list(messages)
            sent = super().push_messages(
                [m for m in messages if m.metadata.message_type != "train" or m.metadata.dst_node_id != 1000]
            )
            return sent

    made, log = rounds(["rounds=1"])
    made.run(Unreachable(clients(), 3), 3)
    assert [(r["client"], r["reason"]) for r in log.of("refused")] == [("c0", "it could not be reached")]
    assert log.of("round")[0]["clients"] == 2


def test_flowers_own_entry_point() -> None:
    made, _ = rounds(["rounds=1"])
    result = made.start(LocalGrid(clients(), 3), records.to_arrays(START))
    torch.testing.assert_close(result.arrays.to_torch_state_dict()["a"], torch.full((2, 3), 140 / 60))


def test_sampling_asks_a_share_and_everyone_in_the_long_run() -> None:
    made, log = rounds(["rounds=40", "strategy.fraction=0.25", "strategy.min_clients=2"])
    made.run(LocalGrid(clients(), 8), 8)
    asked = [e["clients"] for e in log.of("asked")]
    assert {len(a) for a in asked} == {2}
    assert {name for a in asked for name in a} == {f"c{i}" for i in range(8)}


def test_patience_stops_and_is_kept_by_the_checkpoint() -> None:
    saved: list[Progress] = []
    made, log = rounds(["rounds=20", "evaluate.patience=3"], on_round=lambda state, progress: saved.append(progress))
    state = made.run(LocalGrid(clients(loss=1.0), 3), 3)
    assert state.round == 3  # round 0 sets the best loss; three evaluations bring nothing better
    assert log.of("stop")[0]["round"] == 3
    assert saved[-1].stopped
    again, _ = rounds(["rounds=20", "evaluate.patience=3"], progress=saved[-1])
    assert again.run(LocalGrid(clients(), 3), 3).round == 0


def test_client_losses_add_up_by_tokens() -> None:
    made, log = rounds(["rounds=1"])
    made.run(LocalGrid(clients(loss=2.5), 3), 3)
    last = log.of("evaluate")[-1]
    assert last["clients"] == {"c0": 2.5, "c1": 2.5, "c2": 2.5} and last["clients_loss"] == 2.5


def test_one_reply_alive_at_a_time() -> None:
    """The server holds one update at a time, however many clients there are."""
    import gc
    import weakref

    alive: list[int] = []
    refs: list[Any] = []

    class Counting(LocalGrid):
        def _execute(self, message: Message) -> Message:
            reply = super()._execute(message)
            if message.metadata.message_type == "train":
                gc.collect()
                alive.append(sum(r() is not None for r in refs))
                refs.append(weakref.ref(reply))
            return reply

    made, _ = rounds(["rounds=1"])
    made.run(Counting(clients(), 50), 50)
    assert len(alive) == 50 and max(alive) <= 2
