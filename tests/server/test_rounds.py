"""The rounds, driven by scripted clients on the in-process grid: real Flower messages, no language model."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, Error, Message
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from scripted_clients import PRINT, START, Act, add_one, clients, rounds

from apiary.core.errors import RunFailed
from apiary.core.messages import Fingerprint
from apiary.core.tensors import is_finite
from apiary.transport import flower_records
from server import checkpoint, membership
from server.app import save
from server.rounds import Progress
from simulation.in_process_grid import LocalGrid
from strategies import AGGREGATORS, ServerState


def test_weighted_mean_by_hand() -> None:
    made, log = rounds(["rounds=1"])
    state = made.run(LocalGrid(clients(), 3), 3)
    expected = (1 * 10 + 2 * 20 + 3 * 30) / 60
    torch.testing.assert_close(state.adapter["a"], torch.full((2, 3), expected))
    torch.testing.assert_close(state.adapter["b"], torch.full((4,), 1 + expected))
    done = log.of("round")[0]
    assert (done["clients"], done["asked"], done["tokens"]) == (3, 3, 60)
    assert done["bytes_up"] >= 3 * 4 * 10 and done["bytes_down"] >= 3 * 4 * 10


@pytest.mark.parametrize("every", [0, 1, 2])
def test_every_adapter_that_is_sent_is_counted(every: int) -> None:
    sent: list[int] = []

    class Meter(LocalGrid):
        def push_messages(self, messages: Any) -> Any:
            messages = list(messages)
            arrays = [a for m in messages for r in m.content.array_records.values() for a in r.values()]
            sent.append(sum(len(array.data) for array in arrays))
            return super().push_messages(messages)

    made, log = rounds(["rounds=3", "strategy.fraction=0.5", f"evaluate.every={every}"])
    made.run(Meter(clients(), 4), 4)
    told = [e["bytes_down"] for e in log.of("round")] + [e["bytes_evaluate"] for e in log.of("evaluate")]
    assert sum(told) == sum(sent) == (3 + {0: 0, 1: 4, 2: 3}[every]) * told[0]


def test_an_answer_is_waited_for_as_long_as_the_run_says_and_not_as_flower_does() -> None:
    """By default Flower drops a message after twelve hours, and all of them when the clock is put on by a day."""
    lasts: dict[str, float] = {}

    class Noting(LocalGrid):
        def push_messages(self, messages: Any) -> Any:
            messages = list(messages)
            lasts.update({m.metadata.message_type: m.metadata.ttl for m in messages})
            return super().push_messages(messages)

    made, _ = rounds(["rounds=1", "evaluate.every=1"])
    made.run(Noting(clients(), 3), 3)
    assert set(lasts) == {"query.hello", "train", "evaluate"} and min(lasts.values()) >= 300 * 86400


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


@pytest.mark.parametrize(("bad", "hostile"), [(BAD[0][0], 1), (_with("a", 1e20), 1), (BAD[2][0], 0), (BAD[5][0], 0)])
def test_only_what_no_training_makes_counts_as_one_hostile_client_less(bad: Any, hostile: int) -> None:
    """An honest client may well be of another version, or fail; a robust method must not lower its guard for that."""
    made, _ = rounds(["rounds=1"])
    told: list[None] = []

    def refused(acc: Any) -> Any:
        told.append(None)
        return acc

    made.aggregator = made.aggregator._replace(reduce=made.aggregator.reduce._replace(refused=refused))
    made.run(LocalGrid(clients({1: bad}), 3), 3)
    assert len(told) == hostile


def test_a_decomposition_that_does_not_converge_fails_the_run_in_one_line() -> None:
    made, _ = rounds(["rounds=1"])

    def step(state: ServerState, gradient: Any) -> ServerState:
        torch.linalg.svd(torch.full((2, 2), math.nan))
        raise AssertionError

    made.aggregator = made.aggregator._replace(step=step)
    with pytest.raises(RunFailed, match=r"^round 1: "):
        made.run(LocalGrid(clients(), 3), 3)


def test_too_few_good_replies_fail_the_run() -> None:
    made, _ = rounds(["strategy.quorum=0.5"])
    broken = ValueError("x")
    with pytest.raises(RunFailed, match=r"round 1: 1 of 3 clients answered well.*2"):
        made.run(LocalGrid(clients({0: broken, 1: broken}), 3), 3)


DECLINING = {
    "idle": ['continual.stages=[["a"], ["b"]]', "rounds=2"],
    "budget": ["privacy.unit=record"],
}


@pytest.mark.parametrize("reason", ["idle", "budget"])
def test_who_declines_rightly_does_not_count_against_the_quorum(reason: str) -> None:
    made, log = rounds(["rounds=1", "strategy.quorum=1.0", *DECLINING[reason]])
    state = made.run(LocalGrid(clients({0: reason, 2: reason}, private=reason == "budget"), 3), 3)
    torch.testing.assert_close(state.adapter["a"], torch.full((2, 3), 2.0 * made.config.rounds))
    assert [(e["client"], e["reason"]) for e in log.of("declined")][:2] == [("c0", reason), ("c2", reason)]
    assert log.of("refused") == []


def test_a_round_without_work_for_anybody_keeps_the_state() -> None:
    acts: dict[int, Any] = dict.fromkeys(range(3), "idle")
    kept: list[torch.Tensor] = []

    def on_round(state: ServerState, progress: Progress) -> None:
        kept.append(state.adapter["a"])
        acts.update(dict.fromkeys(range(3), add_one))

    made, log = rounds(DECLINING["idle"], on_round=on_round)
    state = made.run(LocalGrid(clients(acts), 3), 3)
    assert torch.equal(kept[0], START["a"]) and state.round == 2 and not torch.equal(state.adapter["a"], START["a"])
    assert [e["clients"] for e in log.of("round")] == [0, 3] and log.of("stop") == []


@pytest.mark.parametrize("reason", ["idle", "budget"])
def test_a_run_in_which_nobody_ever_trains_fails(reason: str) -> None:
    made, log = rounds(DECLINING[reason])
    with pytest.raises(RunFailed, match="no client trained in any of"):
        made.run(LocalGrid(clients(dict.fromkeys(range(3), reason), private=reason == "budget"), 3), 3)
    assert log.of("refused") == []


def test_spent_budgets_end_the_run_and_keep_what_was_learnt() -> None:
    kept: list[tuple[ServerState, Progress]] = []
    acts: dict[int, Any] = {}

    def on_round(state: ServerState, progress: Progress) -> None:
        kept.append((state, progress))
        acts.update(dict.fromkeys(range(3), "budget"))

    made, log = rounds(["rounds=5", *DECLINING["budget"]], on_round=on_round)
    acts[0] = add_one
    state = made.run(LocalGrid(clients(acts, private=True), 3), 3)
    torch.testing.assert_close(state.adapter["a"], torch.full((2, 3), (10 + 40 + 90) / 60))
    assert [e["round"] for e in log.of("round")] == [1, 2]
    assert "privacy.epsilon" in log.of("stop")[0]["reason"]
    assert kept[-1][1].stopped and kept[-1][0].round == 2
    assert kept[-1][1].spent == {f"c{i}": [1.0 + i, 2.0 + i, 1e-5, 1.0, 0.1, 3] for i in range(3)}


def test_who_has_spent_its_budget_is_left_in_peace_and_the_others_go_on() -> None:
    """A cohort that is spent does not end a run in which others still have something to give."""
    made, log = rounds(["rounds=12", "strategy.fraction=0.25", "strategy.min_clients=2", *DECLINING["budget"]])
    made.run(LocalGrid(clients({0: "budget", 1: "budget", 2: "budget"}, private=True), 8), 8)
    assert len(log.of("round")) == 12 and log.of("stop") == []
    declined = [e["client"] for e in log.of("declined")]
    assert sorted(declined) == sorted(set(declined)) == ["c0", "c1", "c2"]


def test_a_resumed_run_draws_from_those_who_have_budget_left(tmp_path: Path) -> None:
    """Its cohorts are those of a run that was not interrupted."""
    more = ["rounds=12", "strategy.fraction=0.25", "strategy.min_clients=2", *DECLINING["budget"]]
    sites = clients({0: "budget", 1: "budget", 2: "budget"}, private=True)

    def keep(state: ServerState, progress: Progress) -> None:
        (tmp_path / str(state.round)).mkdir()
        save(tmp_path / str(state.round), whole.config, state, progress)

    whole, told = rounds(more, on_round=keep)
    whole.run(LocalGrid(sites, 8), 8)
    last = max(event["round"] for event in told.of("declined"))
    assert last < 12
    found = checkpoint.load(tmp_path / str(last) / "checkpoints")
    assert found is not None and found[1]["budget_spent"] == ["c0", "c1", "c2"]
    again, log = rounds(more, progress=Progress(**found[1]))
    again.state = found[0]
    again.run(LocalGrid(sites, 8), 8)
    assert [e["clients"] for e in log.of("asked")] == [e["clients"] for e in told.of("asked")][last:]


def test_a_decline_that_cannot_be_is_a_refusal() -> None:
    made, log = rounds(["rounds=1"])
    made.run(LocalGrid(clients({1: "budget"}), 3), 3)
    assert "privacy.unit is none" in log.of("refused")[0]["reason"] and log.of("declined") == []


def test_what_a_refused_client_spent_is_in_the_account_all_the_same() -> None:
    """Its update came over the wire, whether it was used or not."""
    made, log = rounds(["rounds=1", *DECLINING["budget"]])
    made.run(LocalGrid(clients({1: _with("a", math.nan)}, private=True), 3), 3)
    assert [r["client"] for r in log.of("refused")] == ["c1"]
    assert made.progress.spent["c1"][0] == 2.0


@pytest.mark.parametrize("part", Fingerprint._fields)
def test_another_base_tokenizer_or_template_is_refused(part: str) -> None:
    made, log = rounds(["rounds=1"])
    made.run(LocalGrid(clients(prints={2: PRINT._replace(**{part: "other"})}), 3), 3)
    refused = log.of("refused")
    assert [r["client"] for r in refused] == ["c2"] and part in refused[0]["reason"]
    assert "round" not in refused[0]
    assert log.of("asked")[0]["clients"] == ["c0", "c1"]


def test_all_refused_fails_before_the_first_round() -> None:
    other = {i: PRINT._replace(base="other") for i in range(3)}
    made, log = rounds([])
    with pytest.raises(RunFailed, match="0 clients passed the handshake"):
        made.run(LocalGrid(clients(prints=other), 3), 3)
    assert len(log.of("refused")) == 3


def test_too_few_nodes_time_out() -> None:
    made, _ = rounds(["strategy.join_timeout_s=0.2", "strategy.min_clients=3"])
    with pytest.raises(RunFailed, match=r"2 of 3 clients joined within .* 3 are needed"):
        made.run(LocalGrid(clients(), 2), 3)


def test_a_run_that_waits_for_clients_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "_TELL_S", 0.05)
    made, log = rounds(["strategy.join_timeout_s=0.4", "strategy.min_clients=3"])
    with pytest.raises(RunFailed):
        made.run(LocalGrid(clients(), 2), 3)
    wait = "the run waits for strategy.join_timeout_s = 0.4 s at most"
    assert [event["message"] for event in log.of("warning")] == [f"2 of 3 clients are here; {wait}"]
    made, log = rounds(["strategy.join_timeout_s=0.4", "strategy.min_clients=3"])
    with pytest.raises(RunFailed, match="2 clients are left"):
        made._roster.gather(LocalGrid(clients(), 2), 2)
    assert [event["message"] for event in log.of("warning")] == [f"2 clients are left, of 3 that are needed; {wait}"]


def test_a_client_that_left_while_the_run_began_is_not_waited_for_for_ever() -> None:
    """One more was counted a moment ago; those that a run needs are there."""
    made, log = rounds(["rounds=1", "strategy.join_timeout_s=0.2", "strategy.min_clients=2"])
    made.run(LocalGrid(clients(), 2), 3)
    assert log.of("asked")[0]["clients"] == ["c0", "c1"]
    assert [event["message"] for event in log.of("warning")] == ["the run goes on with 2 of 3 clients"]


def test_a_run_that_has_all_its_rounds_needs_nobody() -> None:
    made, _ = rounds(["rounds=1"])
    done = made.run(LocalGrid(clients(), 3), 3)
    again, _ = rounds(["rounds=1", "strategy.join_timeout_s=0.2"], progress=made.progress)
    again.state = done
    assert again.run(LocalGrid(clients(), 0), 3) == done


class Spoiler(LocalGrid):
    """What c1 answers to messages of one kind has been through `spoil`."""

    def __init__(self, app: ClientApp, nodes: int, kind: str, spoil: Callable[[Any], Any]) -> None:
        super().__init__(app, nodes)
        self._kind, self._spoil = kind, spoil

    def _execute(self, message: Message) -> Message:
        reply = super()._execute(message)
        if message.metadata.message_type == self._kind and message.metadata.dst_node_id == 1001:
            self._spoil(reply.content)
        return reply


@pytest.mark.parametrize("name", ["c0", "c7", "c2 "])
def test_a_client_cannot_answer_in_anothers_name(name: str) -> None:
    made, log = rounds(["rounds=1"])
    made.run(Spoiler(clients(), 3, "train", lambda content: content["who"].update(who=name)), 3)
    assert [r["client"] for r in log.of("refused")] == ["c1"]
    assert log.of("round")[0]["clients"] == 2


def _set(**counts: Any) -> Callable[[Any], None]:
    return lambda content: content["counts"].update(counts)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda content: content["who"].update(who="c0"), "'c0', which is not who was asked"),
        (lambda content: content["who"].update(who="c9"), "'c9', which is not who was asked"),
        (_set(nats=-50.0), "-50 nats"),
        (_set(nats=math.nan), "nan nats"),
        (_set(nats=math.inf), "inf nats"),
        (_set(tokens=-20), "-20 tokens"),
        (_set(tokens=1e300), "1e+300 tokens of 3 examples"),
        (_set(tokens=1e300, examples=1e300), "1e+300 tokens"),
        (_set(tokens=math.nan), "cannot be read"),
    ],
)
def test_a_score_that_cannot_be_costs_one_client(spoil: Any, why: str) -> None:
    made, log = rounds(["rounds=1"])
    made.run(Spoiler(clients(loss=lambda i, number: i + 1.0), 3, "evaluate", spoil), 3)
    assert [(r["client"], r["round"], why in r["reason"]) for r in log.of("refused")] == [
        ("c1", n, True) for n in (0, 1)
    ]
    for event in log.of("evaluate"):
        assert event["clients"] == {"c0": 1.0, "c2": 3.0}
        assert event["clients_loss"] == (1.0 * 10 + 3.0 * 30) / 40


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
    "huge weight": _set(weight=1e308),
    "another weight": _set(weight=21.0),
    "nan weight": _set(weight=math.nan),
    "huge tokens": _set(weight=1e308, tokens=1e308),
    "more tokens than fit": _set(weight=3 * 2048 + 1, tokens=3 * 2048 + 1),
    "no tokens": _set(weight=0.0, tokens=0),
    "negative tokens": _set(weight=-20.0, tokens=-20),
    "more steps than asked": _set(steps=4),
    "infinite loss": _set(loss=math.inf),
}


@pytest.mark.parametrize("what", GARBAGE)
def test_garbage_costs_one_client(what: str) -> None:
    made, log = rounds(["rounds=1"])
    state = made.run(Spoiler(clients(), 3, "train", GARBAGE[what]), 3)
    assert [r["client"] for r in log.of("refused")] == ["c1"]
    assert (log.of("round")[0]["clients"], log.of("round")[0]["train_loss"]) == (2, 2.0)
    torch.testing.assert_close(state.adapter["a"], torch.full((2, 3), (1 * 10 + 3 * 30) / 40))


@pytest.mark.parametrize(("steps", "taken"), [(9, True), (10, False)])
def test_as_many_steps_as_epochs_of_single_examples_are_believed(steps: int, taken: bool) -> None:
    made, log = rounds(["rounds=1", "train={ epochs = 1.7, accumulate = 2 }"])
    made.run(Spoiler(clients(), 3, "train", _set(steps=steps)), 3)  # ceil(1.7 * 10 / 2) = 9
    assert log.of("round")[0]["clients"] == (3 if taken else 2)


def test_an_update_that_would_overflow_the_adapter_costs_one_client() -> None:
    made, log = rounds(["rounds=1"])
    made.state = made.state._replace(adapter={"a": torch.full((2, 3), 3e38), "b": torch.ones(4)})
    state = made.run(LocalGrid(clients({1: _with("a", 1e38)}), 3), 3)
    assert [(r["client"], "too large" in r["reason"]) for r in log.of("refused")] == [("c1", True)]
    assert is_finite(state.adapter)


def test_a_method_that_makes_nan_fails_the_run_and_is_not_kept() -> None:
    kept: list[ServerState] = []
    made, _ = rounds([], on_round=lambda state, progress: kept.append(state))
    step = made.aggregator.step

    def overflow(state: ServerState, gradient: Any) -> ServerState:
        after = step(state, gradient)
        return after if after.round < 2 else after._replace(memory={"velocity": torch.tensor([math.nan])})

    made.aggregator = made.aggregator._replace(step=overflow)
    with pytest.raises(RunFailed, match=r"round 2: strategy.name = 'fedavg' made NaN or infinity"):
        made.run(LocalGrid(clients(), 3), 3)
    assert [state.round for state in kept] == [1] and made.state is kept[0]


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


def test_who_was_refused_and_comes_back_mended_takes_part() -> None:
    prints = {2: PRINT._replace(base="other")}
    grid = Leaving(clients(prints=prints), 3)

    def mend(state: ServerState, progress: Progress) -> None:
        grid.gone = state.round == 1
        prints.clear()

    made, log = rounds(["rounds=3", "strategy.min_clients=1"], on_round=mend)
    made.run(grid, 3)
    assert [len(e["clients"]) for e in log.of("asked")] == [2, 1, 3]
    assert len(log.of("refused")) == 1


class Hiccup(LocalGrid):
    """The first `failures` handshakes of node 1002 fail."""

    def __init__(self, failures: float) -> None:
        super().__init__(clients(), 3)
        self.failures, self.hellos, self.gone = failures, 0, False

    def _execute(self, message: Message) -> Message:
        if (message.metadata.message_type, message.metadata.dst_node_id) == (flower_records.HELLO, 1002):
            self.hellos += 1
            if self.hellos <= self.failures:
                return self._failed(message)
        return super()._execute(message)

    def _failed(self, message: Message) -> Message:
        reply = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "OutOfMemoryError"), reply_to=message)
        self._stamp(reply)
        return reply

    def get_node_ids(self) -> Any:
        return [n for n in super().get_node_ids() if n != 1001 or not self.gone]


def test_who_only_had_a_hiccup_at_the_handshake_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "_AGAIN_S", 0.0)
    made, log = rounds(["rounds=4"])
    made.run(Hiccup(failures=3), 3)
    assert [len(e["clients"]) for e in log.of("asked")] == [2, 2, 3, 3]
    told = [(r["client"], r["reason"]) for r in log.of("refused")]
    assert told == [("a site that did not tell its name (node 1002)", "OutOfMemoryError")]


def test_a_site_that_fails_at_the_handshake_is_named_where_the_server_knows_it() -> None:
    made, log = rounds(["rounds=1"], name_of={1002: "bee"}.get)
    made.run(Hiccup(failures=math.inf), 3)
    assert [(r["client"], r["reason"]) for r in log.of("refused")] == [("bee", "OutOfMemoryError")]


@pytest.mark.parametrize("registered", ["bee", ""])
def test_no_site_joins_under_another_name_than_its_keys(registered: str) -> None:
    """Not even one that nobody else bears: what the server says of a site, it says by its key."""
    made, log = rounds(["rounds=2"], name_of={1000: "c0", 1001: "c1", 1002: registered}.get)
    made.run(LocalGrid(clients(), 3), 3)
    assert all(e["clients"] == ["c0", "c1"] for e in log.of("asked"))
    [told] = log.of("refused")
    assert told["client"] == (registered or "a site that did not tell its name (node 1002)")
    assert "calls itself 'c2'" in told["reason"] and "its key is registered under" in told["reason"]


def test_a_node_that_keeps_failing_is_not_asked_all_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even while the server waits for clients and looks every few hundredths of a second."""
    monkeypatch.setattr(membership, "_AGAIN_S", 0.25)
    grid = Hiccup(failures=math.inf)

    def leave(state: ServerState, progress: Progress) -> None:
        grid.gone = True

    made, log = rounds(["strategy.min_clients=2", "strategy.join_timeout_s=0.6"], on_round=leave)
    with pytest.raises(RunFailed, match="round 2: 1 clients are left"):
        made.run(grid, 3)
    assert 2 <= grid.hellos <= 4
    assert len(log.of("refused")) == 1


def test_two_clients_of_one_name_cost_one_line() -> None:
    class Twins(LocalGrid):
        def _execute(self, message: Message) -> Message:
            reply = super()._execute(message)
            if (message.metadata.message_type, message.metadata.dst_node_id) == (flower_records.HELLO, 1002):
                reply.content["who"]["who"] = "c0"
            return reply

    made, log = rounds(["rounds=5"])
    made.run(Twins(clients(), 3), 3)
    assert [r["client"] for r in log.of("refused")] == ["c0"]
    assert all(e["clients"] == ["c0", "c1"] for e in log.of("asked"))


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
    result = made.start(LocalGrid(clients(), 3), ArrayRecord(dict(START)))
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
    state = made.run(LocalGrid(clients(), 3), 3)
    assert state.round == 3  # round 0 sets the best loss; three evaluations bring nothing better
    assert log.of("stop")[0]["round"] == 3
    assert saved[-1].stopped
    again, _ = rounds(["rounds=20", "evaluate.patience=3"], progress=saved[-1])
    assert again.run(LocalGrid(clients(), 3), 3).round == 0


def test_a_resumed_run_knows_the_best_loss(tmp_path: Path) -> None:
    overrides = ["rounds=5", "evaluate.patience=2"]
    worse = clients(loss=lambda i, number: 1.0 + abs(number - 1))  # the best is after round 1
    made, _ = rounds(
        ["rounds=2", *overrides[1:]], on_round=lambda state, progress: save(tmp_path, made.config, state, progress)
    )
    made.run(LocalGrid(worse, 3), 3)
    found = checkpoint.load(tmp_path / "checkpoints")
    assert found is not None
    again, log = rounds(overrides, progress=Progress(**found[1]))
    again.state = found[0]
    assert again.run(LocalGrid(worse, 3), 3).round == 3
    assert log.of("stop")[0]["round"] == 3


def steadily(i: int, number: int) -> float:
    """Half the clients are ten times as hard as the others; all learn the same share in every round."""
    return (0.5 if i % 2 else 5.0) * 0.95**number


@pytest.mark.parametrize("seed", range(6))
def test_a_share_of_easy_and_hard_clients_does_not_stop_a_run_that_learns(seed: int) -> None:
    overrides = ["rounds=12", "strategy.fraction=0.25", "strategy.min_clients=1", "evaluate.patience=1", f"seed={seed}"]
    made, log = rounds(overrides)
    assert made.run(LocalGrid(clients(loss=steadily), 8), 8).round == 12
    measured = {tuple(e["clients"]) for e in log.of("evaluate")}
    assert len(measured) == 1 and len(*measured) == 2
    losses = [e["clients_loss"] for e in log.of("evaluate")]
    assert losses == pytest.approx([losses[0] * 0.95**n for n in range(13)])


@pytest.mark.parametrize(("lie", "until"), [(1e6, 6), (-1.0, 2)])
def test_one_client_that_lies_about_its_loss_neither_ends_a_run_nor_keeps_it_going(lie: float, until: int) -> None:
    """Four of five get better and one claims to get far worse; or four stay, and one claims to get far better."""

    def loss(i: int, number: int) -> float:
        if i == 4:
            return 9000.0 + lie * number / 1e3 if lie > 0 else 9000.0 * 0.5**number
        return 2.0 * 0.9**number if lie > 0 else 2.0

    made, _ = rounds(["rounds=6", "evaluate.patience=2"])
    assert made.run(LocalGrid(clients(loss=loss), 5), 5).round == until


def test_who_answers_badly_costs_a_robust_round_and_not_the_run() -> None:
    """The one that is left out may be the hostile one or not: nothing is learnt in a round without its promise."""
    bad = {"now": True}

    def act(i: int, adapter: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {} if bad["now"] else add_one(i, adapter)

    def done(state: ServerState, progress: Progress) -> None:
        bad["now"] = False

    made, log = rounds(["rounds=2", "strategy.min_clients=3"], on_round=done)
    made.aggregator = AGGREGATORS.build("median", {"byzantine": 1}, weighting="tokens")
    made.state = ServerState(0, {"m.lora_A.weight": torch.zeros(4, 2), "m.lora_B.weight": torch.zeros(3, 4)}, {}, {})
    state = made.run(LocalGrid(clients({1: act}), 3), 3)
    (warning,) = log.of("warning")
    assert warning["round"] == 1 and "needs 3 good answers, this round has 2" in warning["message"]
    assert [event["clients"] for event in log.of("round")] == [2, 3]
    assert [event.get("unchanged", False) for event in log.of("round")] == [True, False]
    assert state.round == 2
    assert {v for t in state.adapter.values() for v in t.unique().tolist()} == {2.0}  # the median of 1, 2, 3, once


def test_a_run_whose_rounds_all_change_nothing_fails() -> None:
    made, _ = rounds(["rounds=2", "strategy.min_clients=3"])
    made.aggregator = AGGREGATORS.build("median", {"byzantine": 1}, weighting="tokens")
    made.state = ServerState(0, {"m.lora_A.weight": torch.zeros(4, 2), "m.lora_B.weight": torch.zeros(3, 4)}, {}, {})
    with pytest.raises(RunFailed, match=r"^none of 2 rounds changed the model"):
        made.run(LocalGrid(clients({1: lambda i, adapter: {}}), 3), 3)


def test_hard_clients_that_miss_an_evaluation_set_no_record() -> None:
    def loss(i: int, number: int) -> float:
        if number == 2 and i % 2 == 0:
            raise RuntimeError
        return steadily(i, number)

    made, log = rounds(["rounds=6", "evaluate.patience=1"])
    assert made.run(LocalGrid(clients(loss=loss), 4), 4).round == 6
    assert [len(e["clients"]) for e in log.of("evaluate")] == [4, 4, 2, 4, 4, 4, 4]


def test_the_panel_outlasts_clients_that_come_and_leave() -> None:
    class Moving(LocalGrid):
        away: frozenset[int] = frozenset()

        def get_node_ids(self) -> Any:
            return [n for n in super().get_node_ids() if n not in self.away]

    grid = Moving(clients(loss=steadily), 10)
    grid.away = frozenset({1008, 1009})

    def move(state: ServerState, progress: Progress) -> None:
        first = [1000 + int(name[1:]) for name in log.of("evaluate")[0]["clients"]]
        grid.away = {1: frozenset(), 3: frozenset(first[:2]), 5: frozenset(range(1000, 1009))}.get(
            state.round, grid.away
        )

    overrides = ["rounds=8", "strategy.fraction=0.5", "strategy.min_clients=1", "evaluate.patience=1"]
    made, log = rounds(overrides, on_round=move)
    assert made.run(grid, 8).round == 8
    panels = [set(e["clients"]) for e in log.of("evaluate")]
    assert [len(panel) for panel in panels] == [4, 4, 5, 5, 4, 4, 1, 1, 1]
    assert all(len(after - before) <= 2 for before, after in itertools.pairwise(panels[:6]))


def test_client_losses_add_up_by_tokens() -> None:
    made, log = rounds(["rounds=1"])
    made.run(LocalGrid(clients(loss=lambda i, number: [0.1, 0.7, 2.5][i]), 3), 3)
    last = log.of("evaluate")[-1]
    assert last["clients"] == {"c0": 0.1, "c1": 0.7, "c2": 2.5}
    assert last["clients_loss"] == pytest.approx((0.1 * 10 + 0.7 * 20 + 2.5 * 30) / 60)
    assert last["clients_rows"] == {"c0": [3, 10], "c1": [3, 20], "c2": [3, 30]} and last["clients_few"] == []


def test_clients_with_too_few_rows_to_tell_a_loss_are_named() -> None:
    made, log = rounds(["rounds=1"])
    made.run(Spoiler(clients(loss=lambda i, number: 1.0), 3, "evaluate", _set(nats=0.0, tokens=0, examples=0)), 3)
    for event in log.of("evaluate"):
        assert (event["clients"], event["clients_few"]) == ({"c0": 1.0, "c2": 1.0}, ["c1"])
    assert log.of("refused") == []


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
    gc.freeze()  # what other tests have left is not gone through again for every reply
    try:
        made.run(Counting(clients(), 50), 50)
    finally:
        gc.unfreeze()
    assert len(alive) == 50 and max(alive) <= 2
