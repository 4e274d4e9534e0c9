"""Messages to nodes and their replies, over any Flower grid."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

AT_ONCE = 8  # replies asked for at a time
_READ, _REASON = 10_000, 300  # characters of a reason that are looked at, and that are told
_LASTS_S = 365 * 86400.0  # of a message; Flower would drop it after twelve hours, or when the clock is put on a day
_POLL_S, _POLL_MOST_S = 0.05, 1.0  # between looks for something new: first, and while nothing comes


def message(content: RecordDict, node: int, kind: str, number: int) -> Message:
    """A message of a round to a node. How long its answer is waited for is the run's to say, not Flower's."""
    return Message(content, node, kind, ttl=_LASTS_S, group_id=str(number))


def push(grid: Grid, messages: Sequence[Message]) -> dict[str, int]:
    """Send messages.

    Returns:
        The node of each message that could be sent, by message id. Grids leave out the others, or give them no id.
    """
    ids = list(grid.push_messages(messages))
    if len(ids) == len(messages):
        return {i: m.metadata.dst_node_id for i, m in zip(ids, messages, strict=True) if i}
    known = set(ids)
    return {m.metadata.message_id: m.metadata.dst_node_id for m in messages if m.metadata.message_id in known}


def pull(grid: Grid, waiting: dict[str, int]) -> list[tuple[int, Message]]:
    """Take in a few replies; asking for few at a time keeps few in memory.

    Args:
        grid: how to reach the nodes.
        waiting: the node of each message without a reply yet, by message id. Messages with a reply are taken out; a
            reply to any other message, such as one of an earlier round, is dropped.

    Returns:
        The replies, each with the node that it comes from.
    """
    asked = list(itertools.islice(waiting, AT_ONCE))
    replies = []
    for reply in grid.pull_messages(asked):
        node = waiting.pop(reply.metadata.reply_to_message_id, None)
        if node is not None:
            replies.append((node, reply))
    for message_id in asked:  # the next call asks for others
        if message_id in waiting:
            waiting[message_id] = waiting.pop(message_id)
    return replies


def exchange(
    grid: Grid, messages: Sequence[Message], deadline_s: float | None, refuse: Callable[[int, str], None]
) -> Iterator[Message]:
    """Send messages and yield the replies one by one as they arrive.

    Args:
        grid: how to reach the nodes.
        messages: one for each node that is asked.
        deadline_s: seconds to wait for replies; None for no limit.
        refuse: called with a node and the reason, in one line, when the node could not be reached, failed, or did not
            reply in time.
    """
    limit = deadline_s or math.inf
    deadline = time.monotonic() + limit
    waiting, pause = push(grid, messages), Pause()
    reached = set(waiting.values())
    for message in messages:
        if message.metadata.dst_node_id not in reached:
            refuse(message.metadata.dst_node_id, "it could not be reached")
    while waiting and time.monotonic() < deadline:
        arrived = pull(grid, waiting)
        for node, reply in arrived:
            if reply.has_error():
                refuse(node, failure(reply))
            else:
                yield reply
        if arrived:
            pause = Pause()
        else:
            pause.sleep(len(waiting))
    for node in waiting.values():
        refuse(node, f"no answer within {limit:g} s")


def failure(reply: Message) -> str:
    """The reason that an error reply gives, in one line: a site may write it."""
    words = "".join(c if c.isprintable() else " " for c in (reply.error.reason or "")[:_READ]).split()
    return " ".join(words)[:_REASON] or "it failed without a reason"


class Pause:
    """Sleeps between looks at a grid, longer each time: a look at a distant grid is a call over the network.

    It owns the length of the next sleep.
    """

    def __init__(self) -> None:
        self._seconds = _POLL_S

    def sleep(self, waiting: int = 1) -> None:
        """Sleep once.

        Args:
            waiting: replies that are still to come. A look asks for `AT_ONCE` of them, so with more of them the sleep
                is shorter in proportion, and all are asked for in one whole pause.
        """
        time.sleep(self._seconds * AT_ONCE / max(AT_ONCE, waiting))
        self._seconds = min(_POLL_MOST_S, self._seconds * 1.3)
