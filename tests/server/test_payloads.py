"""What clients are sent: made once for a rank and round, counted to the byte, and coded where the run says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flwr.app import Message

from apiary.config import loading
from apiary.core.messages import ClientInfo, Payload
from apiary.transport import flower_records
from server.membership import Member
from server.payloads import Payloads, Source
from simulation.in_process_grid import LocalGrid
from strategies import AGGREGATORS, ServerState

STATE = ServerState(0, {"m.lora_A.weight": torch.ones(4, 30), "m.lora_B.weight": torch.zeros(20, 4)}, {}, {})


@pytest.fixture(autouse=True)
def _identity() -> None:
    """Flower's messages ask for the process's identity, which a grid sets."""
    LocalGrid(None, 0)  # type: ignore[arg-type]


def member(name: str, rank: int = 4, last_round: int = 0) -> Member:
    return Member(1000 + int(name[1:]), ClientInfo(name, rank, last_round), 10)


def counting(made: list[ClientInfo], control: bool = False) -> Source:
    """A method that says whom it makes payloads for; each rank's adapter has as many rows of A."""

    def payload(state: ServerState, client: ClientInfo) -> Payload:
        made.append(client)
        adapter = {
            "m.lora_A.weight": state.adapter["m.lora_A.weight"][: client.rank].clone(),
            "m.lora_B.weight": state.adapter["m.lora_B.weight"][:, : client.rank].clone(),
        }
        return Payload(adapter, {}, {"c": torch.ones(7)} if control else {})

    method = AGGREGATORS.build("fedavg", {}, weighting="tokens")
    return Source(method._replace(payload=payload), STATE, clients=12)


def payloads(*overrides: str) -> Payloads:
    return Payloads(loading.load(None, ["adapter.rank=4", *overrides]), {})


def bytes_of(messages: list[Message]) -> int:
    return sum(len(r[a].data) for m in messages for r in m.content.array_records.values() for a in r)


def test_a_payload_is_made_once_for_all_clients_of_a_rank_in_a_round() -> None:
    made: list[ClientInfo] = []
    source, one = counting(made), payloads()
    members = [member("c0"), member("c1", rank=2), member("c2"), member("c3", rank=2)]
    messages = one.messages("train", members, 1, source)
    assert [(client.rank, client.clients) for client in made] == [(4, 12), (2, 12)]
    assert messages[0].content["adapter"] is messages[2].content["adapter"]
    assert messages[0].content["adapter"] is not messages[1].content["adapter"]
    assert one.payload(source, member("c9").info) is one.payload(source, member("c8").info)
    assert len(made) == 2
    one.messages("train", members, 2, source._replace(state=STATE._replace(round=1)))
    assert len(made) == 4
    one.messages("train", members[:1], 1, source)  # only the newest state's are kept
    assert len(made) == 5


def test_a_client_that_joins_between_evaluation_and_round_is_counted() -> None:
    """What was made for fewer clients is not sent to more; methods tell them how many there are, or divide by it."""
    made: list[ClientInfo] = []
    source, one = counting(made), payloads()
    one.messages("evaluate", [member("c0")], 1, source)
    one.messages("train", [member("c0"), member("c1")], 2, source._replace(clients=13))
    assert [client.clients for client in made] == [12, 13]


def test_groups_of_clients_are_sent_payloads_of_their_own() -> None:
    """One for each group, whoever asks first; None is a group too."""
    made: list[ClientInfo] = []
    source, one = counting(made), payloads()
    groups = {"c0": 0, "c1": 1, "c2": 0}
    grouped = source.aggregator._replace(group=lambda state, client: groups.get(client))
    messages = one.messages(
        "train", list(map(member, ("c0", "c1", "c2", "c3", "c4"))), 1, source._replace(aggregator=grouped)
    )
    assert [client.client for client in made] == ["c0", "c1", "c3"]
    assert [[x.content["adapter"] is y.content["adapter"] for x in messages] for y in messages[:4]] == [
        [True, False, True, False, False],
        [False, True, False, False, False],
        [True, False, True, False, False],
        [False, False, False, True, True],
    ]


def test_a_message_says_whom_it_is_for_and_when_that_client_last_counted() -> None:
    [message] = payloads().messages("train", [member("c7", last_round=3)], 5, counting([]))
    about = message.metadata
    assert (about.dst_node_id, about.message_type, about.group_id) == (1007, "train", "5")
    number, payload = flower_records.read_request(message.content)
    assert (number, payload.last_round) == (5, 3)
    assert torch.equal(payload.adapter["m.lora_A.weight"], torch.ones(4, 30))


@pytest.mark.parametrize(("kind", "sent"), [("train", True), ("evaluate", False)])
def test_a_control_variate_goes_to_clients_that_train(kind: Any, sent: bool) -> None:
    [message] = payloads().messages(kind, [member("c0")], 1, counting([], control=True))
    control = flower_records.read_request(message.content)[1].extra
    assert set(control) == ({"c"} if sent else set())


def test_all_arrays_are_counted_once_for_each_message() -> None:
    one = payloads()
    messages = one.messages("train", [member("c0"), member("c1", rank=2), member("c2")], 1, counting([]))
    counted = one.count_bytes(messages, "down")
    assert counted == {"bytes_down": bytes_of(messages)}
    assert counted["bytes_down"] > 4 * (30 + 20) * (4 + 2 + 4)


# -- where changes alone travel ----------------------------------------------------------------------------------------


def test_the_bytes_that_parcels_save_are_counted_once() -> None:
    one, whole, source = payloads("wire.down=int8"), payloads(), counting([])
    one.set_version("c1", "")  # as it says at the handshake
    cohort = [member("c0"), member("c1")]
    first = one.messages("train", cohort, 1, source)
    plain = whole.count_bytes(whole.messages("train", cohort, 1, source), "down")["bytes_down"]
    assert one.count_bytes(first, "down") == {"bytes_down": bytes_of(first), "float32_down": plain}
    one.confirm("c0")  # c1 sends no valid reply
    again = one.messages("evaluate", cohort, 1, source)
    told = one.count_bytes(again, "evaluate")
    assert told == {"bytes_evaluate": bytes_of(again), "float32_evaluate": plain}
    sizes = [bytes_of([message]) for message in again]
    assert sizes[0] == 0 < 4 * 4 * 30 < sizes[1]  # who holds the newest copy gets nothing; B is all zero


def test_after_a_step_a_confirmed_client_gets_the_change_alone() -> None:
    one, source = payloads("wire.down=int8"), counting([])
    assert payloads().advance(1, source) is source.state  # nothing is kept where nothing is coded
    for client in ("c0", "c1"):
        one.messages("train", [member(client)], 1, source)
    one.confirm("c0")
    moved = {name: t + torch.linspace(0, 1, t.numel()).view_as(t) for name, t in STATE.adapter.items()}
    after = one.advance(1, source._replace(state=STATE._replace(round=1, adapter=moved)))
    assert after.round == 1 and after.adapter is moved and {key.split("/")[0] for key in after.copies} == {"4"}
    messages = one.messages("train", [member("c0"), member("c1")], 2, source._replace(state=after))
    held, fresh = (bytes_of([message]) for message in messages)
    assert 200 < held < 300 < 800 < fresh  # a byte for each entry, or four
    resumed = Payloads(loading.load(None, ["adapter.rank=4", "wire.down=int8"]), after.copies)
    [message] = resumed.messages("train", [member("c1")], 2, source._replace(state=after))
    assert message.content["adapter"].keys() == messages[1].content["adapter"].keys()  # the version is in the name
