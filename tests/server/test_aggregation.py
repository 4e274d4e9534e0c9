"""From checked replies to the next state, without messages: sums, quorum and step against numbers by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from apiary.config import loading
from apiary.core.errors import RunFailed, TooFewAnswers
from apiary.core.messages import ClientInfo, Decline, FitReport, Payload, Spent, Update, Visit
from apiary.core.tensors import StateDict
from apiary.transport import from_config
from server import aggregation
from server.aggregation import Folded
from server.replies import Refusal, Terms
from strategies import AGGREGATORS, Aggregator, ServerState
from strategies.aggregator import ROOT

START = {"a": torch.zeros(2, 3), "b": torch.ones(4)}
STATE = ServerState(0, START, {}, {})


def terms(*overrides: str, method: Aggregator | None = None) -> Terms:
    run = loading.load(None, ["adapter.rank=4", *overrides])
    chosen = method or AGGREGATORS.build("fedavg", {}, weighting="tokens")
    sent = Payload(START, {})
    return Terms(run, chosen, from_config.configured_codec(run, "up"), 1, lambda client: sent)


def visit(client: str, value: float, tokens: int, loss: float = 2.0) -> Visit:
    delta = {name: torch.full_like(tensor, value) for name, tensor in START.items()}
    return Visit(Update(client, delta, float(tokens), 4), FitReport(tokens, 5, 1, loss, 0.1))


def folded(replies: list[tuple[str, Any]], held_against: Terms) -> Folded:
    sums = aggregation.start(STATE, held_against)
    for client, reply in replies:
        sums = aggregation.fold(sums, reply, client, 100, held_against)
    return sums


REPLIES: list[tuple[str, Any]] = [
    ("c0", visit("c0", 1.0, 10, loss=1.0)),
    ("c1", Refusal("its message holds no ArrayRecord 'adapter'")),
    ("c2", Decline("c2", "idle")),
    ("c3", visit("c3", 4.0, 30, loss=3.0)),
]


def test_valid_visits_alone_count() -> None:
    held_against = terms()
    sums = folded(REPLIES, held_against)
    assert [report.tokens for report in sums.reports] == [10, 30]
    assert (sums.declined, sums.bytes_up, sums.float32_up, sums.poisoned) == (1, 200, 0, {})
    fields = aggregation.training_fields(sums, held_against.config)
    assert fields == {"clients": 2, "tokens": 40, "train_loss": (1.0 * 10 + 3.0 * 30) / 40, "bytes_up": 200}
    state, _ = aggregation.step(sums, STATE, held_against)
    torch.testing.assert_close(state.adapter["a"], torch.full((2, 3), (1 * 10 + 4 * 30) / 40))
    assert state.round == 1 and STATE.round == 0 and not START["a"].any()


def test_with_a_codec_the_bytes_without_it_are_counted_too() -> None:
    held_against = terms("wire.up=int8")
    sums = folded(REPLIES, held_against)
    assert sums.float32_up == 2 * 4 * (2 * 3 + 4)
    assert list(aggregation.training_fields(sums, held_against.config))[-2:] == ["bytes_up", "float32_up"]


def test_only_a_poisoned_reply_is_told_to_the_method() -> None:
    """An honest client may be of another version; a robust method must not lower its guard for that."""
    told: list[Any] = []
    method = AGGREGATORS.build("fedavg", {}, weighting="tokens")

    def refused(acc: Any) -> Any:
        told.append(acc)
        return acc

    method = method._replace(reduce=method.reduce._replace(refused=refused))
    bad = ("c4", Refusal("its update holds NaN or infinity", poisoned=True, spent=Spent(1, 1, 1e-5, 1, 0.1, 3)))
    sums = folded([*REPLIES, bad], terms(method=method))
    assert len(told) == 1 and sums.poisoned == {"c4": "refused: its update holds NaN or infinity"}
    assert len(sums.reports) == 2 and sums.bytes_up == 200


def test_an_update_that_the_method_cannot_take_ends_the_run_in_one_line() -> None:
    method = AGGREGATORS.build("fedavg", {}, weighting="tokens")

    def add(acc: Any, update: Update) -> Any:
        raise ValueError(f"cannot take {update.client}")

    with pytest.raises(RunFailed, match=r"^round 1: cannot take c0$"):
        folded(REPLIES, terms(method=method._replace(reduce=method.reduce._replace(add=add))))


@pytest.mark.parametrize(
    ("quorum", "asked", "needed"), [(0.5, 2, 1), (0.5, 3, 2), (1.0, 2, 2), (0.3, 10, 3), (0.01, 5, 1), (0.7, 10, 7)]
)
def test_the_quorum_is_a_share_of_who_was_asked(quorum: float, asked: int, needed: int) -> None:
    held_against = terms(f"strategy.quorum={quorum}")
    for valid in range(asked + 1):
        sums = folded([(f"c{i}", visit(f"c{i}", 1.0, 10)) for i in range(valid)], held_against)
        if valid >= needed:
            aggregation.check_quorum(sums, asked, held_against)
        else:
            with pytest.raises(RunFailed, match=rf"round 1: {valid} of {asked} clients .* asks for {needed};"):
                aggregation.check_quorum(sums, asked, held_against)


@pytest.mark.parametrize("part", ["adapter", "base_delta", "memory"])
def test_a_step_that_leads_to_nan_is_refused(part: str) -> None:
    method = AGGREGATORS.build("fedavg", {}, weighting="tokens")

    def overflow(state: ServerState, gradient: Any) -> ServerState:
        return method.step(state, gradient)._replace(**{part: {"x": torch.tensor([1.0, math.inf])}})

    held_against = terms(method=method._replace(step=overflow))
    with pytest.raises(RunFailed, match=r"round 1: strategy.name = 'fedavg' made NaN or infinity of finite updates"):
        aggregation.step(folded(REPLIES, held_against), STATE, held_against)


def test_too_few_updates_for_a_promise_are_no_step() -> None:
    state = ServerState(0, {"m.lora_A.weight": torch.zeros(4, 2), "m.lora_B.weight": torch.zeros(3, 4)}, {}, {})
    held_against = terms(method=AGGREGATORS.build("median", {"byzantine": 1}, weighting="tokens"))
    with pytest.raises(TooFewAnswers):
        aggregation.step(aggregation.start(state, held_against), state, held_against)


# -- the server's own update -------------------------------------------------------------------------------------------


def test_the_servers_own_update_is_folded_in_beside_the_clients() -> None:
    asked: list[ClientInfo] = []
    sent = Payload({"a": torch.full((2, 3), 7.0), "b": torch.zeros(4)}, {})

    def payload_of(client: ClientInfo) -> Payload:
        asked.append(client)
        return sent

    def train(number: int, payload: Payload) -> Update:
        assert number == 3 and payload is sent
        delta: StateDict = {name: torch.full_like(tensor, 10.0) for name, tensor in START.items()}
        return Update(ROOT, delta, 40.0, 4)

    held_against = terms()._replace(number=3, payload_of=payload_of)
    sums = aggregation.fold_own(folded(REPLIES, held_against), train, held_against)
    assert asked == [ClientInfo(ROOT, 4, 2)]
    assert len(sums.reports) == 2 and sums.bytes_up == 200  # it is no client
    state, _ = aggregation.step(sums, STATE, held_against)
    torch.testing.assert_close(state.adapter["a"], torch.full((2, 3), (1 * 10 + 4 * 30 + 10 * 40) / 80))


def test_own_training_that_diverges_ends_the_run_in_one_line() -> None:
    def train(number: int, payload: Payload) -> Update:
        raise FloatingPointError("loss nan")

    with pytest.raises(RunFailed, match=r"^round 1: the server's own training on strategy\.root diverged: loss nan$"):
        aggregation.fold_own(folded(REPLIES, terms()), train, terms())
