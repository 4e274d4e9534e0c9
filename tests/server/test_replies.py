"""One reply at a time, without a run around it: what is taken, and each way in which a reply can be refused."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, RecordDict

from apiary.config import loading, schedule
from apiary.core.messages import ClientInfo, Decline, FitReport, Payload, Score, Spent, Update, Visit
from apiary.core.tensors import StateDict
from apiary.transport import codec, flower_records, from_config
from server.membership import Member
from server.replies import Refusal, Terms, read_score, read_train
from strategies import AGGREGATORS

RANK = 4
MEMBER = Member(1000, ClientInfo("c0", RANK, 0), examples=100)
SPENT = Spent(3.0, 3.5, 1e-5, 0.9, 0.05, 6)
PRIVATE = ["privacy.unit=record", "privacy.batch_rows=8", "privacy.epsilon=4.0"]
A, B = "m.lora_A.weight", "m.lora_B.weight"


def adapter(rank: int = RANK) -> dict[str, torch.Tensor]:
    return {A: torch.full((rank, 3), 0.5), B: torch.full((2, rank), 0.25)}


def delta(rank: int = RANK) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(rank)
    return {name: torch.randn(t.shape, generator=rng) for name, t in adapter(rank).items()}


def visit(change: StateDict | None = None, rank: int = RANK, client: str = "c0", **report: Any) -> Visit:
    told = FitReport(**{"tokens": 24, "examples": 12, "steps": 3, "loss": 1.0, "seconds": 0.1, **report})
    return Visit(Update(client, delta(rank) if change is None else change, float(told.tokens), rank), told)


def terms(*overrides: str, number: int = 1, control: StateDict | None = None, **traits: Any) -> Terms:
    run = loading.load(None, [f"adapter.rank={RANK}", "strategy.norm_guard=0", *overrides])  # changes by hand
    method = AGGREGATORS.build("fedavg", {}, weighting="tokens")._replace(**traits)

    def payload_of(client: ClientInfo) -> Payload:
        return Payload(adapter(client.rank), {}, control or {})

    return Terms(run, method, from_config.configured_codec(run, "up"), number, payload_of)


def read(reply: Visit | Decline, held_against: Terms, message: bytes = b"") -> Visit | Decline | Refusal:
    return read_train(flower_records.train_reply(reply, message), MEMBER, held_against)


def refusal(reply: Visit | Decline, held_against: Terms, message: bytes = b"") -> Refusal:
    found = read(reply, held_against, message)
    assert isinstance(found, Refusal) and "\n" not in found.reason
    return found


def test_a_visit_comes_back_as_it_was_sent() -> None:
    sent = visit()
    found = read(sent, terms())
    assert isinstance(found, Visit)
    assert found._replace(update=found.update._replace(delta={})) == sent._replace(
        update=sent.update._replace(delta={})
    )
    assert set(found.update.delta) == {A, B}
    assert all(torch.equal(found.update.delta[name], tensor) for name, tensor in delta().items())


def _without_b(change: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {A: change[A]}


def _with_c(change: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**change, "m.c": torch.ones(1)}


def _entry(value: float) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    def spoil(change: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        change[A][1, 2] = value
        return change

    return spoil


@pytest.mark.parametrize(
    ("spoil", "poisoned", "why"),
    [
        (_without_b, False, "other tensors than the adapter (1 differ, first m.lora_B.weight)"),
        (_with_c, False, "other tensors than the adapter (1 differ, first m.c)"),
        (lambda d: {**d, A: d[A].T.contiguous()}, False, "is (3, 4), the adapter's (4, 3)"),
        (lambda d: {**d, A: d[A].double()}, False, "is torch.float64, the adapter's torch.float32"),
        (_entry(math.nan), True, "NaN or infinity"),
        (_entry(-math.inf), True, "NaN or infinity"),
        (_entry(1e20), True, "too large to add"),
    ],
)
def test_a_change_that_does_not_fit_is_refused(spoil: Any, poisoned: bool, why: str) -> None:
    found = refusal(visit(spoil(delta())), terms())
    assert why in found.reason and found.poisoned == poisoned and found.spent is None


@pytest.mark.parametrize("rank", [1, 3, 5, 0, -1])
def test_another_rank_than_was_sent_is_refused(rank: int) -> None:
    """Whatever it sends: factors of the rank that it names, or of the one that it was sent."""
    found = refusal(visit(delta(RANK), rank), terms())
    assert found == Refusal(f"its update has rank {rank}, and it was sent rank {RANK}")
    if rank > 0:
        found = refusal(visit(delta(rank), rank), terms())
        assert "the adapter's" in found.reason and not found.poisoned


def test_where_clients_prune_a_lower_rank_is_held_against_the_payload_of_that_rank() -> None:
    found = read(visit(rank=2), terms(prunes=True))
    assert isinstance(found, Visit) and found.update.rank == 2 and found.update.delta[A].shape == (2, 3)
    assert "the adapter's (2, 3)" in refusal(visit(delta(RANK), 2), terms(prunes=True)).reason
    for rank in (0, 5):
        assert f"rank {rank}" in refusal(visit(delta(RANK), rank), terms(prunes=True)).reason


@pytest.mark.parametrize("name", ["c1", "c0 ", ""])
def test_a_client_that_answers_for_another_is_refused_before_all_else(name: str) -> None:
    """Nothing that it says in another's name may count: not its change, nor its account, nor its decline."""
    spent = visit(client=name, loss=math.nan)._replace(spent=SPENT)
    assert refusal(spent, terms(*PRIVATE)) == Refusal(f"it answers as {name!r}, which is not who was asked")
    assert refusal(Decline(name, "budget"), terms(*PRIVATE)).reason.startswith("it answers as")
    found = read_score(flower_records.score_reply(name, Score(1.0, 2, 1)), MEMBER, terms().config)
    assert found == Refusal(f"it answers as {name!r}, which is not who was asked")


def test_a_node_that_is_no_member_is_refused() -> None:
    found = read_train(flower_records.train_reply(visit()), None, terms())
    assert found == Refusal("it answers as 'c0', which is not who was asked")
    found = read_score(flower_records.score_reply("c0", Score(1.0, 2, 1)), None, terms().config)
    assert found == Refusal("it answers as 'c0', which is not who was asked")


def test_an_update_of_an_earlier_round_is_refused_where_it_shows() -> None:
    """Of a round that trained B, in one that trains A; elsewhere replies are matched to messages, by `messaging`."""
    stale = visit({**delta(), A: torch.zeros(RANK, 3)})
    assert isinstance(read(stale, terms("adapter.train=alternate", number=1)), Visit)
    found = refusal(stale, terms("adapter.train=alternate", number=2))
    assert found.poisoned and "A alone is trained" in found.reason


def _drop(part: str) -> Callable[[RecordDict], None]:
    return lambda content: content.pop(part)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (_drop("adapter"), "no ArrayRecord 'adapter'"),
        (_drop("counts"), "no MetricRecord 'counts'"),
        (_drop("who"), "no ConfigRecord 'who'"),
        (lambda content: content["counts"].pop("rank"), "cannot be read (KeyError)"),
        (lambda content: content["counts"].__setitem__("tokens", math.nan), "cannot be read (ValueError)"),
        (lambda content: content.__setitem__("adapter", content["counts"]), "no ArrayRecord 'adapter'"),
        (lambda content: content["counts"].__setitem__("weight", 25.0), "its weight is 25"),
        (lambda content: content["counts"].__setitem__("steps", 4), "in 4 steps"),
    ],
)
def test_a_message_that_holds_something_else_is_refused(spoil: Any, why: str) -> None:
    content = flower_records.train_reply(visit())
    spoil(content)
    found = read_train(content, MEMBER, terms())
    assert isinstance(found, Refusal) and why in found.reason and not found.poisoned


def test_an_unreadable_score_is_refused() -> None:
    run = terms().config
    assert read_score(flower_records.score_reply("c0", Score(1.0, 2, 1)), MEMBER, run) == Score(1.0, 2, 1)
    found = read_score(flower_records.train_reply(Decline("c0", "idle")), MEMBER, run)
    assert found == Refusal("its message holds no MetricRecord 'counts'")
    found = read_score(flower_records.score_reply("c0", Score(math.nan, 2, 1)), MEMBER, run)
    assert isinstance(found, Refusal) and "nan nats" in found.reason


@pytest.mark.parametrize("reason", ["idle", "budget"])
def test_a_decline_is_taken_where_it_is_possible(reason: Any) -> None:
    possible = {"idle": ['continual.stages=[["a"], ["b"]]'], "budget": PRIVATE}
    assert read(Decline("c0", reason), terms(*possible[reason])) == Decline("c0", reason)
    assert not refusal(Decline("c0", reason), terms()).poisoned


# -- the account of privacy --------------------------------------------------------------------------------------------


def private_visit(**changes: Any) -> Visit:
    return visit(loss=math.nan)._replace(spent=SPENT._replace(**changes))


def test_what_a_refused_visit_spent_is_kept() -> None:
    """Its update came over the wire, whether it is used or not."""
    bad = private_visit()._replace(update=visit(_entry(math.nan)(delta())).update)
    found = refusal(bad, terms(*PRIVATE))
    assert found.poisoned and found.spent == SPENT
    over = refusal(private_visit(epsilon=9.0), terms(*PRIVATE))
    assert "privacy.epsilon = 4" in over.reason and over.spent == SPENT._replace(epsilon=9.0)


def test_an_account_that_cannot_be_is_not_kept() -> None:
    assert refusal(private_visit(epsilon=math.nan), terms(*PRIVATE)).spent is None
    assert refusal(visit()._replace(spent=SPENT), terms()).spent is None  # a run without privacy


# -- coded changes -----------------------------------------------------------------------------------------------------


def coded(change: StateDict, held_against: Terms) -> bytes:
    return codec.encode(change, held_against.codec, {}, torch.Generator().manual_seed(0))[0]


def test_a_coded_change_is_decoded_before_it_is_checked() -> None:
    held_against = terms("wire.up=bf16")
    found = read(visit(), held_against, coded(delta(), held_against))
    assert isinstance(found, Visit)
    for name, tensor in delta().items():
        assert torch.equal(found.update.delta[name], tensor.bfloat16().float())


def test_a_damaged_message_is_refused_and_one_that_holds_nan_is_poisoned() -> None:
    held_against = terms("wire.up=bf16")
    message = bytearray(coded(delta(), held_against))
    message[-9] ^= 1
    found = refusal(visit(), held_against, bytes(message))
    assert found.reason.startswith("its update cannot be decoded: ") and not found.poisoned
    good = coded(delta(), held_against)
    infinite = bytearray(good[:-4])
    infinite[-2:] = (0x80, 0x7F)  # the last number as infinity in bfloat16, with the checksum of an encoder's
    found = refusal(visit(), held_against, bytes(infinite) + zlib.crc32(infinite).to_bytes(4, "little"))
    assert found.reason.startswith("its update cannot be decoded: ") and found.poisoned


def test_a_coded_change_of_another_base_is_refused() -> None:
    """Names and shapes do not travel; a digest of them does."""
    held_against = terms("wire.up=bf16")
    other = {name.replace("m.", "n."): tensor for name, tensor in delta().items()}
    for change in (other, delta(RANK - 1)):
        found = refusal(visit(), held_against, coded(change, held_against))
        assert found.reason.startswith("its update cannot be decoded: ") and not found.poisoned


def test_an_empty_record_is_no_change() -> None:
    content = flower_records.train_reply(visit())
    content["adapter"] = ArrayRecord()
    found = read_train(content, MEMBER, terms())
    assert isinstance(found, Refusal) and "other tensors than the adapter (2 differ" in found.reason


# -- control variates --------------------------------------------------------------------------------------------------


def test_the_server_adds_what_it_knows_of_corrected_steps() -> None:
    control = {name: torch.ones_like(t) for name, t in adapter().items()}
    held_against = terms("train.steps=3", "train.schedule=cosine", "rounds=5", number=4, control=control)
    found = read(visit(), held_against)
    assert isinstance(found, Visit)
    assert all(torch.equal(found.update.extra[name], tensor) for name, tensor in control.items())
    train = held_against.config.train
    wanted = sum(schedule.learning_rate(step, 15, train) for step in (9, 10, 11))
    assert found.update.lr_sum == pytest.approx(wanted)
    assert "a visit has train.steps = 3" in refusal(visit(steps=2), held_against).reason
    plain = read(visit(steps=2), terms("train.steps=3"))
    assert isinstance(plain, Visit) and not plain.update.extra and plain.update.lr_sum == 0.0
