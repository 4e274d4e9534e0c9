"""Exchange types survive the wire, through Flower's own serialisation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from flwr.app import Array, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from apiary.core import errors
from apiary.core.messages import CurationCounts, Decline, Fingerprint, FitReport, Hello, Score, Spent, Update, Visit
from apiary.transport import flower_records
from apiary.transport.downlink import Change, Parcel

STATE = {"x.lora_A.weight": torch.randn(3, 5), "x.lora_B.weight": torch.zeros(5, 3)}


def wire(content: RecordDict) -> RecordDict:
    return recorddict_from_proto(recorddict_to_proto(content))


def test_request_round_trip() -> None:
    content = wire(flower_records.request(7, flower_records.to_arrays(STATE), flower_records.to_arrays({})))
    number, payload = flower_records.read_request(content)
    assert number == 7 and payload.base_delta == {}
    assert all(torch.equal(payload.adapter[k], v) for k, v in STATE.items()) and set(payload.adapter) == set(STATE)
    assert flower_records.array_bytes(content) >= 2 * 15 * 4


def test_a_request_is_few_objects_whatever_the_adapter() -> None:
    """Flower signs a call, and makes a transaction, for each of them."""
    state = {f"layers.{n}.lora_{side}.weight": torch.randn(2, 3) for n in range(50) for side in "BA"}
    record = flower_records.to_arrays(state)
    content = wire(flower_records.request(1, record, flower_records.to_arrays(STATE), record))
    assert len(get_all_nested_objects(content)) < 20
    adapter = flower_records.read_request(content)[1].adapter
    assert list(adapter) == list(state)  # what draws for tensor after tensor does so in this order
    assert all(torch.equal(adapter[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("tensor", [torch.randn(2, 3).T, torch.zeros(0, 3), torch.tensor(1.5), torch.ones(2).double()])
def test_tensors_of_any_form_arrive_and_may_be_changed(tensor: torch.Tensor) -> None:
    record = flower_records.to_arrays({"x/y": tensor, **STATE})
    arrived = flower_records.from_arrays(record)["x/y"]
    torch.testing.assert_close(arrived, tensor, rtol=0, atol=0)
    arrived += 1


@pytest.mark.parametrize("spoil", [lambda data: data[:-1], lambda data: b"\xff" * 8 + data[8:], lambda data: b""])
def test_packed_bytes_that_cannot_be_are_a_wire_error(spoil: Callable[[bytes], bytes]) -> None:
    content = flower_records.train_reply(Visit(Update("site", STATE, 12.0, 3), FitReport(12, 4, 2, 0.5, 1.5)))
    record = content.array_records["adapter"]
    ((name, array),) = record.items()
    record[name] = Array(array.dtype, array.shape, array.stype, spoil(array.data))
    with pytest.raises(errors.WireError, match="cannot be read"):
        flower_records.read_train_reply(wire(content))


def test_a_parcel_round_trips() -> None:
    changes = tuple(Change(f"since{n}", f"to{n}", bytes([n]) * 5) for n in range(12))
    for sent in (Parcel("v", b"whole"), Parcel("v"), Parcel("v", changes=changes)):
        content = wire(flower_records.request(7, flower_records.parcel_arrays(sent), flower_records.to_arrays({})))
        seen: list[Parcel] = []
        number, payload = flower_records.read_request(content, lambda parcel, seen=seen: seen.append(parcel) or STATE)  # type: ignore[misc]
        assert number == 7 and payload.adapter is STATE and seen == [sent]
        assert flower_records.array_bytes(content) == len(sent.whole) + 5 * len(sent.changes)
    with pytest.raises(errors.WireError, match="not expected"):
        flower_records.read_request(content)


def test_an_encoded_change_round_trips() -> None:
    update, report = Update("site", STATE, 12.0, 3), FitReport(12, 4, 2, 0.5, 1.5)
    content = wire(flower_records.train_reply(Visit(update, report), b"some bytes"))
    visit = flower_records.read_train_reply(content)
    assert isinstance(visit, Visit) and visit == Visit(update._replace(delta={}), report)
    assert flower_records.read_message(content) == b"some bytes" and flower_records.array_bytes(content) == 10
    assert flower_records.read_message(wire(flower_records.train_reply(Visit(update, report)))) == b""
    assert flower_records.read_message(wire(flower_records.train_reply(Decline("site", "idle")))) == b""


def test_train_reply_round_trip() -> None:
    update, report = Update("site", STATE, 12.0, 3), FitReport(12, 4, 2, 0.5, 1.5)
    visit = flower_records.read_train_reply(wire(flower_records.train_reply(Visit(update, report))))
    assert isinstance(visit, Visit)
    assert visit.report == report and visit.update._replace(delta={}) == update._replace(delta={})
    assert all(torch.equal(visit.update.delta[k], v) for k, v in STATE.items())
    assert visit.curated is None and visit.spent is None


def test_what_curation_and_privacy_add_round_trips() -> None:
    curated = CurationCounts(100, 60, {"duplicates": 30, "mine:step": 10})
    spent = Spent(3.5, 4.0, 1e-5, 0.8, 0.05, 36)
    report = FitReport(12, 4, 2, 0.5, 1.5, replayed=7)
    visit = flower_records.read_train_reply(
        wire(flower_records.train_reply(Visit(Update("site", STATE, 12.0, 3), report, curated, spent)))
    )
    assert isinstance(visit, Visit) and visit[1:] == (report, curated, spent)


@pytest.mark.parametrize("reason", ["idle", "budget"])
def test_a_decline_round_trips(reason: str) -> None:
    decline = Decline("site", reason)  # type: ignore[arg-type]
    assert flower_records.read_train_reply(wire(flower_records.train_reply(decline))) == decline


def test_a_decline_for_an_unknown_reason_is_a_wire_error() -> None:
    with pytest.raises(errors.WireError, match="does not know"):
        flower_records.read_train_reply(flower_records.train_reply(Decline("site", "the text of a row")))  # type: ignore[arg-type]


def test_hello_and_score_round_trip() -> None:
    hello = Hello("site", Fingerprint("a", "b", "c", "d"), 8, 100, 2000)
    for told in (hello, hello._replace(holds="version")):
        assert flower_records.read_hello_reply(wire(flower_records.hello_reply(told))) == told
    score = Score(3.5, 10, 2)
    assert flower_records.read_score_reply(wire(flower_records.score_reply("site", score))) == ("site", score)


@pytest.mark.parametrize(
    "read",
    [
        flower_records.read_train_reply,
        flower_records.read_hello_reply,
        flower_records.read_score_reply,
        flower_records.read_request,
    ],
)
def test_empty_message_is_a_wire_error(read: object) -> None:
    with pytest.raises(errors.WireError, match="holds no"):
        read(RecordDict())  # type: ignore[operator]


def test_replies_carry_numbers_and_names_only() -> None:
    """What leaves a client: adapter tensors, counts, its name. No other strings."""
    whole = Visit(Update("site", STATE, 1.0, 4), FitReport(1, 1, 1, 1.0, 1.0), CurationCounts(2, 1, {"ifd": 1}))
    content = flower_records.train_reply(whole)
    texts = [v for record in content.config_records.values() for v in record.values() if isinstance(v, str)]
    assert texts == ["site"]
    assert all(isinstance(v, int | float) for record in content.metric_records.values() for v in record.values())


def test_a_record_is_decoded_once_while_it_holds_the_same_bytes() -> None:
    record = flower_records.to_arrays(STATE)
    one, two = flower_records.from_arrays(record), flower_records.from_arrays(record)
    assert one is not two and all(one[name] is two[name] for name in STATE)
    other = flower_records.to_arrays({name: tensor + 1 for name, tensor in STATE.items()})
    (name,) = record
    record[name] = other[name]  # as a mod may do with a message on its way
    changed = flower_records.from_arrays(record)
    assert all(torch.equal(changed[name], STATE[name] + 1) and torch.equal(one[name], STATE[name]) for name in STATE)
    held = len(flower_records._decoded)
    del record
    assert len(flower_records._decoded) == held - 1
