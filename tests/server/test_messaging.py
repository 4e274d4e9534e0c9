"""Messages to nodes and their replies: each node costs one line at most, and each reply answers its own message."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import pytest
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from server import messaging
from simulation.in_process_grid import LocalGrid


def app(failing: Iterable[int] = ()) -> ClientApp:
    made = ClientApp()

    @made.train()
    def train(message: Message, context: Context) -> Message:
        if context.node_id in failing:
            raise OverflowError("a row of data")
        return Message(RecordDict(), reply_to=message)

    return made


def to(*nodes: int, number: int = 1) -> list[Message]:
    return [Message(RecordDict(), node, "train", group_id=str(number)) for node in nodes]


def exchange(grid: LocalGrid, messages: list[Message], deadline_s: float | None = 0.0) -> tuple[list[int], list[Any]]:
    """The nodes whose replies came, and who was refused."""
    refused: list[Any] = []
    replies = messaging.exchange(grid, messages, deadline_s, lambda node, reason: refused.append((node, reason)))
    return [reply.metadata.src_node_id for reply in replies], refused


def test_replies_come_one_by_one_and_a_failure_is_one_line() -> None:
    grid = LocalGrid(app(failing={1001}), 4)
    assert exchange(grid, to(1000, 1001, 1003)) == ([1000, 1003], [(1001, "OverflowError")])


def test_nothing_is_sent_before_the_first_reply_is_asked_for() -> None:
    grid = LocalGrid(app(), 1)
    replies = messaging.exchange(grid, to(1000), None, lambda node, reason: None)
    assert not grid._waiting
    assert next(replies).metadata.src_node_id == 1000


@pytest.mark.parametrize("empty_ids", [False, True])
def test_a_message_that_cannot_be_sent_is_told_at_once(empty_ids: bool) -> None:
    """Grids leave such messages out, or give them no id."""

    class Unreachable(LocalGrid):
        def push_messages(self, messages: Any) -> Any:
            messages = list(messages)
            sent = list(super().push_messages(m for m in messages if m.metadata.dst_node_id != 1001))
            return [sent[0], "", sent[1]] if empty_ids else sent

    grid = Unreachable(app(), 3)
    assert exchange(grid, to(1000, 1001, 1002)) == ([1000, 1002], [(1001, "it could not be reached")])


def test_who_is_late_is_named_with_the_limit() -> None:
    class Slow(LocalGrid):
        def pull_messages(self, message_ids: Any) -> Any:
            return super().pull_messages([i for i in message_ids if self._waiting[i].metadata.dst_node_id != 1001])

    began = time.monotonic()
    assert exchange(Slow(app(), 3), to(1000, 1001, 1002), 0.3) == ([1000, 1002], [(1001, "no answer within 0.3 s")])
    assert 0.3 <= time.monotonic() - began < 3


def test_a_reply_to_an_earlier_round_is_dropped() -> None:
    """Also where a grid hands it over unasked, and though its node is asked again."""

    class Late(LocalGrid):
        late: Message | None = None

        def pull_messages(self, message_ids: Any) -> Any:
            stale, self.late = self.late, None
            return [stale] if stale is not None else super().pull_messages(message_ids)

    grid = Late(app(), 2)
    first = to(1000)
    grid.push_messages(first)
    reply = Message(RecordDict(), reply_to=first[0])
    reply.metadata.__dict__["_message_id"] = "late"
    grid.late = reply
    waiting = messaging.push(grid, to(1000, 1001, number=2))
    assert messaging.pull(grid, waiting) == [] and sorted(waiting.values()) == [1000, 1001]
    found = messaging.pull(grid, waiting)
    assert [node for node, _ in found] == [1000] and found[0][1] is not reply


def test_an_error_without_a_reason_still_has_a_line() -> None:
    grid = LocalGrid(app(), 1)
    [message] = to(1000)
    grid.push_messages([message])
    assert messaging.failure(Message(Error(1, "OutOfMemoryError"), reply_to=message)) == "OutOfMemoryError"
    assert messaging.failure(Message(Error(1), reply_to=message)) == "it failed without a reason"
