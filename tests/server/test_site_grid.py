"""What one site pushes as its answer costs that site a line, and nobody else anything."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.app.message.arraychunk import ArrayChunk
from flwr.supercore.inflatable.inflatable_object import get_object_id
from kept_events import Log
from scripted_clients import clients, rounds
from superlink import Answer, Link, LinkedGrid, answer_of, of_objects

from server import messaging, site_grid
from server.site_grid import UNREADABLE, Limit, SiteGrid, guarded, limit_of
from simulation.in_process_grid import LocalGrid

LIMIT = limit_of(10)
BAD, GOOD = 1001, 1000


def raw(kind: str, body: bytes, children: str = "") -> bytes:
    """An object as it lies at the SuperLink, of any kind and with any body."""
    return f"{kind} {children} {len(body)}".encode() + b"\x00" + body


def record_as_root(reply: Message) -> Answer:
    content = reply.content
    content["more"] = ConfigRecord({"x": 1})
    inner = [record.deflate() for record in content.values()]
    arrays = [array for record in content.array_records.values() for array in record.values()]
    parts = [chunk.deflate() for array in arrays for chunk in array.children.values()]
    return of_objects(reply, *parts, *(array.deflate() for array in arrays), *inner, content.deflate())


def missing(reply: Message) -> Answer:
    answer = answer_of(reply)
    del answer.contents[next(iter(answer.contents))]
    return answer


def root_elsewhere(reply: Message) -> Answer:
    answer = answer_of(reply)
    answer.head.metadata.__dict__["_message_id"] = "0" * 64
    return answer


def cycle(reply: Message) -> Answer:
    """No hash is in its own content, but nothing of ours rests on that."""
    answer = answer_of(reply)
    one, other = "a" * 64, "b" * 64
    bodies = {one: raw("RecordDict", b"{}", other), other: raw("RecordDict", b"{}", one)}
    head = raw("Message", b"", one)
    made = of_objects(reply, *bodies.values(), head)
    for place, each in enumerate(bodies):
        made.tree.children[place].object_id = each
    return Answer(answer.head, made.tree, {**bodies, made.tree.object_id: head})


def bomb(reply: Message) -> Answer:
    """A part of an array that is named ten thousand times."""
    part = ArrayChunk(memoryview(bytes(1 << 16))).deflate()
    of_part = of_objects(reply, part).tree.object_id
    body = json.dumps({"dtype": "uint8", "shape": [1], "stype": "apiary", "arraychunk_ids": [0] * 10_000}).encode()
    return with_array(reply, raw("Array", body, of_part), part)


def with_array(reply: Message, array: bytes, *parts: bytes) -> Answer:
    """A whole message with this array, as it lies at the SuperLink."""
    record = raw("ArrayRecord", json.dumps({"message": get_object_id(array)}).encode(), get_object_id(array))
    content = raw("RecordDict", json.dumps({"adapter": get_object_id(record)}).encode(), get_object_id(record))
    body = reply.deflate().partition(b"\x00")[2]
    return of_objects(reply, *parts, array, record, content, raw("Message", body, get_object_id(content)))


def absurd(**changes: Any) -> Callable[[Message], Answer]:
    def push(reply: Message) -> Answer:
        body = {"dtype": "float32", "shape": [2], "stype": "numpy.ndarray", "arraychunk_ids": [], **changes}
        return with_array(reply, raw("Array", json.dumps(body).encode()))

    return push


def many(reply: Message) -> Answer:
    return of_objects(reply, *(raw("ArrayChunk", str(i).encode()) for i in range(LIMIT.objects + 1)))


def huge(reply: Message) -> Answer:
    reply.content["x"] = ArrayRecord({"x": Array(np.zeros(LIMIT.size // 4, np.float32))})
    return answer_of(reply)


def names(reply: Message) -> Answer:
    """A list of numbers of a byte each, which Python holds in thirty."""
    reply.content["x"] = ConfigRecord({"x": [1] * 100_000})
    return answer_of(reply)


HOSTILE: dict[str, tuple[Callable[[Message], Answer], str]] = {
    "a record as the root": (record_as_root, UNREADABLE),
    "an object that is not there": (missing, UNREADABLE),
    "a root that is not among its objects": (root_elsewhere, UNREADABLE),
    "a cycle": (cycle, UNREADABLE),
    "another class": (lambda reply: of_objects(reply, raw("ArrayChunk", b"x")), UNREADABLE),
    "a class that there is not": (lambda reply: of_objects(reply, raw("Thread", b"x")), UNREADABLE),
    "a message cut off": (lambda reply: of_objects(reply, raw("Message", b"\x0a\xff\xff")), UNREADABLE),
    "a message without content": (lambda reply: of_objects(reply, raw("Message", b"")), UNREADABLE),
    "no object at all": (lambda reply: of_objects(reply, b"\xff\xfe"), UNREADABLE),
    "a shape of words": (absurd(shape=["x"]), UNREADABLE),
    "a shape that is no list": (absurd(shape=3), UNREADABLE),
    "a part that is not there": (absurd(arraychunk_ids=[7]), UNREADABLE),
    "a type that is none": (absurd(dtype=None), UNREADABLE),
    "a part named over and over": (bomb, LIMIT.reason),
    "too many objects": (many, LIMIT.reason),
    "too many bytes": (huge, LIMIT.reason),
    "a long list": (names, LIMIT.reason),
}


def test_the_hostile_arrays_are_so_by_what_is_changed_alone() -> None:
    link = Link(clients(), 2, {BAD: absurd()})
    grid = SiteGrid(LinkedGrid(link), LIMIT)
    ids = list(grid.push_messages([Message(RecordDict(), BAD, "query.hello", group_id="0")]))
    (reply,) = grid.pull_messages(ids)
    assert reply.content["adapter"]["message"].shape == (2,)


def refused(log: Log) -> list[tuple[str, str]]:
    return [(e["client"], e["reason"]) for e in log.of("refused")]


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_answer_costs_its_site_a_line_and_the_round_goes_on(what: str) -> None:
    push, reason = HOSTILE[what]

    def in_training(reply: Message) -> Answer:
        return push(reply) if reply.metadata.message_type == "train" else answer_of(reply)

    made, log = rounds(["rounds=2", "strategy.min_clients=2"])
    made.run(SiteGrid(LinkedGrid(Link(clients(), 3, {BAD: in_training})), LIMIT), 3)
    assert refused(log) == [("c1", reason)] * 2
    assert [event["clients"] for event in log.of("round")] == [2, 2]


def test_a_hostile_handshake_costs_its_site_alone() -> None:
    made, log = rounds(["rounds=1", "strategy.min_clients=2"])
    made.run(SiteGrid(LinkedGrid(Link(clients(), 3, {BAD: record_as_root})), LIMIT), 3)
    assert refused(log)[0][1] == UNREADABLE
    assert log.of("round")[0]["clients"] == 2


def test_without_it_one_site_ends_the_run() -> None:
    """So that the day is seen on which Flower's own grid needs no guard any more."""
    made, _ = rounds(["rounds=1", "strategy.min_clients=2"])
    with pytest.raises(AttributeError):
        made.run(LinkedGrid(Link(clients(), 3, {BAD: record_as_root})), 3)


def test_too_many_objects_are_refused_before_one_is_pulled() -> None:
    link = Link(clients(), 2, {BAD: many})
    grid = SiteGrid(LinkedGrid(link), LIMIT)
    ids = list(grid.push_messages([Message(RecordDict(), BAD, "query.hello", group_id="0")]))
    (reply,) = grid.pull_messages(ids)
    assert reply.error.reason == LIMIT.reason and link.pulled == []
    assert link.listed == {}  # it is let go at the SuperLink as well


def test_too_many_bytes_are_refused_without_pulling_the_rest() -> None:
    parts = [raw("ArrayChunk", bytes([i]) * (LIMIT.size // 4)) for i in range(12)]
    link = Link(clients(), 2, {BAD: lambda reply: of_objects(reply, *parts)})
    grid = SiteGrid(LinkedGrid(link), LIMIT)
    ids = list(grid.push_messages([Message(RecordDict(), BAD, "query.hello", group_id="0")]))
    (reply,) = grid.pull_messages(ids)
    assert reply.error.reason == LIMIT.reason and len(link.pulled) == 4


def test_the_head_is_the_servers_and_not_the_sites() -> None:
    """A site's answer counts as that of the node that was asked, whatever it writes."""

    def as_another(reply: Message) -> Answer:
        answer = answer_of(reply)
        false = Message(reply.content, reply_to=reply)
        for name, value in {"src_node_id": GOOD, "reply_to_message_id": "", "group_id": "9", "run_id": 7}.items():
            false.metadata.__dict__[f"_{name}"] = value
        false.metadata.__dict__["_message_type"] = "evaluate"
        return Answer(answer.head, answer_of(false).tree, answer_of(false).contents)._replace(
            head=_with_root(answer.head, false)
        )

    grid = SiteGrid(LinkedGrid(Link(clients(), 2, {BAD: as_another})), LIMIT)
    ids = list(grid.push_messages([Message(RecordDict(), BAD, "query.hello", group_id="0")]))
    (reply,) = grid.pull_messages(ids)
    head = reply.metadata
    assert (head.src_node_id, head.reply_to_message_id, head.group_id) == (BAD, ids[0], "0")
    assert (head.message_type, head.run_id) == ("query.hello", 1)


def _with_root(head: Message, message: Message) -> Message:
    head.metadata.__dict__["_message_id"] = message.object_id
    return head


def test_what_nobody_asked_for_is_passed_over() -> None:
    link = Link(clients(), 2)
    grid = SiteGrid(LinkedGrid(link), LIMIT)
    ids = list(grid.push_messages([Message(RecordDict(), n, "query.hello", group_id="0") for n in (GOOD, BAD)]))
    assert list(grid.pull_messages(["f" * 64])) == []
    assert {reply.metadata.src_node_id for reply in grid.pull_messages(ids)} == {GOOD, BAD}
    assert list(grid.pull_messages(ids)) == []  # each once


def test_an_answer_that_is_half_there_holds_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: list[tuple[Answer, str, bytes]] = []

    def half(reply: Message) -> Answer:
        answer = answer_of(reply)
        last = answer.tree.object_id
        pushed.append((answer, last, answer.contents[last]))
        answer.contents[last] = b""  # registered, and not yet there
        return answer

    grid = SiteGrid(LinkedGrid(Link(clients(), 3, {BAD: half})), LIMIT)
    to = [Message(RecordDict(), node, "query.hello", group_id="0") for node in (BAD, GOOD, 1002)]
    ids = list(grid.push_messages(to))
    assert [reply.metadata.src_node_id for reply in grid.pull_messages(ids)] == [GOOD, 1002]
    assert list(grid.pull_messages(ids)) == []
    answer, last, content = pushed[0]
    answer.contents[last] = content
    (reply,) = grid.pull_messages(ids)
    assert reply.metadata.src_node_id == BAD and reply.has_content()
    ids = list(grid.push_messages(to[:1]))
    assert list(grid.pull_messages(ids)) == []
    monkeypatch.setattr(site_grid, "_PATIENCE_S", -1.0)
    (reply,) = grid.pull_messages(ids)
    assert reply.error.reason == "its answer stopped arriving before it was whole"


def test_an_answer_that_makes_the_superlink_fail_costs_its_site_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site_grid, "_FAULTS_S", 0.0)
    link = Link(clients(), 3)
    grid = SiteGrid(LinkedGrid(link), LIMIT)
    to = [Message(RecordDict(), node, "query.hello", group_id="0") for node in (GOOD, BAD, 1002)]
    ids = list(grid.push_messages(to))
    link.broken = {ids[1]}
    assert {reply.metadata.src_node_id for reply in grid.pull_messages(ids)} == {GOOD, 1002}
    link.broken = set()
    (reply,) = grid.pull_messages(ids)  # it was in passing
    assert reply.has_content()
    link.broken = {*(ids := list(grid.push_messages(to[1:2])))}
    replies = [reply for _ in range(3) for reply in grid.pull_messages(ids)]
    assert [reply.error.reason for reply in replies] == [
        "the SuperLink cannot hand over its answer (superlink.log says why)"
    ]


@pytest.mark.parametrize("call", ["PullMessages", "PullObject"])
def test_a_failure_of_the_transport_is_raised_and_the_answer_is_not_lost(call: str) -> None:
    """Flower's client has given up trying again by then; whoever catches it can ask once more."""
    link = Link(clients(), 2)
    grid = SiteGrid(LinkedGrid(link), LIMIT)
    ids = list(grid.push_messages([Message(RecordDict(), GOOD, "query.hello", group_id="0")]))
    works = getattr(link, call)

    def fail(request: Any) -> Any:
        setattr(link, call, works)
        raise httpx.ConnectError("gone")

    setattr(link, call, fail)
    with pytest.raises(httpx.ConnectError):
        grid.pull_messages(ids)
    assert [reply.has_content() for reply in grid.pull_messages(ids)] == [True]


def test_honest_answers_come_as_they_are() -> None:
    made, log = rounds(["rounds=2"])
    state = made.run(SiteGrid(LinkedGrid(Link(clients(), 3)), LIMIT), 3)
    by_hand, other = rounds(["rounds=2"])
    assert state.adapter["a"].tolist() == by_hand.run(LocalGrid(clients(), 3), 3).adapter["a"].tolist()
    assert [e["bytes_up"] for e in log.of("round")] == [e["bytes_up"] for e in other.of("round")]


def test_who_has_not_answered_is_told_at_a_low_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a while, then whenever that has doubled; who has answered, or was asked before, is not named."""
    now, told = [0.0], []
    monkeypatch.setattr(site_grid.time, "monotonic", lambda: now[0])
    link = Link(clients(), 3, {BAD: lambda reply: None})
    grid = SiteGrid(LinkedGrid(link), LIMIT, None, told.append)

    def ask(kind: str, number: str) -> list[str]:
        return list(grid.push_messages([Message(RecordDict(), n, kind, group_id=number) for n in (GOOD, BAD)]))

    ids = ask("query.hello", "0")
    for second in range(0, 100, 5):
        now[0] = float(second)
        list(grid.pull_messages(ids))
    assert [(w.round, w.kind, w.nodes, w.seconds) for w in told] == [
        (None, "query.hello", (BAD,), 20.0),
        (None, "query.hello", (BAD,), 40.0),
        (None, "query.hello", (BAD,), 80.0),
    ]
    told.clear()
    ids = ask("train", "3")
    for second in (1, 19, 21, 30):
        now[0] = 100.0 + second
        list(grid.pull_messages(ids))
    assert [(w.round, w.kind, w.nodes) for w in told] == [(3, "train", (BAD,))]


def test_the_limit_holds_for_a_whole_adapter_and_follows_its_size() -> None:
    assert limit_of(1_000_000) == Limit(8_000_000 + 2**20, 24)
    assert limit_of(0).size == 2**20


def test_a_simulation_keeps_its_own_grid() -> None:
    own = LocalGrid(clients(), 1)
    assert guarded(own, lambda: 1 // 0, lambda: None, print) is own
    assert isinstance(guarded(LinkedGrid(Link(clients(), 1)), lambda: 10, lambda: None, print), SiteGrid)


@pytest.mark.parametrize("status", [200, 404])
def test_the_superlink_is_told_the_limit_before_anybody_is_asked(status: int) -> None:
    """Flower's own, which has no such call, answers 404."""
    link = Link(clients(), 1)
    link.says = status
    guarded(LinkedGrid(link), lambda: 1_000_000, lambda: None, print)
    assert link.told == [("/apiary/limit", {"run": "1", "size": 8_000_000 + 2**20, "objects": 24})]


def test_a_superlink_that_takes_no_limit_ends_the_run() -> None:
    link = Link(clients(), 1)
    link.says = 422
    with pytest.raises(httpx.HTTPStatusError):
        guarded(LinkedGrid(link), lambda: 10, lambda: None, print)


@pytest.mark.parametrize(
    ("reason", "told"),
    [("x" * 400_000, "x" * 300), ("a\nb\x1b[2J\u2028c", "a b [2J c"), ("", "it failed without a reason")],
)
def test_the_reason_of_a_failure_is_one_short_line(reason: str, told: str) -> None:
    from flwr.app import Error

    message = Message(RecordDict(), 1, "train")
    message.metadata.__dict__["_message_id"] = "m"
    assert messaging.failure(Message(Error(2, reason), reply_to=message)) == told
