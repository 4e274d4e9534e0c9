"""Exchange types survive the wire, through Flower's own serialisation."""

from __future__ import annotations

import pytest
import torch
from flwr.app import RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto

from apiary import records
from apiary.exchange import Fingerprint, FitReport, Hello, Score, Update

STATE = {"x.lora_A.weight": torch.randn(3, 5), "x.lora_B.weight": torch.zeros(5, 3)}


def wire(content: RecordDict) -> RecordDict:
    return recorddict_from_proto(recorddict_to_proto(content))


def test_request_round_trip() -> None:
    content = wire(records.request(7, records.to_arrays(STATE), records.to_arrays({})))
    number, payload = records.read_request(content)
    assert number == 7 and payload.base_delta == {}
    assert all(torch.equal(payload.adapter[k], v) for k, v in STATE.items()) and set(payload.adapter) == set(STATE)
    assert records.array_bytes(content) >= 2 * 15 * 4


def test_train_reply_round_trip() -> None:
    update, report = Update("site", STATE, 12.0, 3), FitReport(12, 4, 2, 0.5, 1.5)
    got, counts = records.read_train_reply(wire(records.train_reply(update, report)))
    assert counts == report and got._replace(delta={}) == update._replace(delta={})
    assert all(torch.equal(got.delta[k], v) for k, v in STATE.items())


def test_hello_and_score_round_trip() -> None:
    hello = Hello("site", Fingerprint("a", "b", "c", "d"), 8, 100, 2000)
    assert records.read_hello_reply(wire(records.hello_reply(hello))) == hello
    score = Score(3.5, 10, 2)
    assert records.read_score_reply(wire(records.score_reply("site", score))) == ("site", score)


@pytest.mark.parametrize(
    "read", [records.read_train_reply, records.read_hello_reply, records.read_score_reply, records.read_request]
)
def test_empty_message_is_a_wire_error(read: object) -> None:
    with pytest.raises(records.WireError, match="holds no"):
        read(RecordDict())  # type: ignore[operator]


def test_replies_carry_numbers_and_names_only() -> None:
    """What leaves a client: adapter tensors, counts, its name. No other strings."""
    content = records.train_reply(Update("site", STATE, 1.0, 4), FitReport(1, 1, 1, 1.0, 1.0))
    texts = [v for record in content.config_records.values() for v in record.values() if isinstance(v, str)]
    assert texts == ["site"]
    assert all(isinstance(v, int | float) for record in content.metric_records.values() for v in record.values())
