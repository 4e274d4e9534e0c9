"""Messages to nodes and their replies, over any Flower grid."""

from __future__ import annotations

import time
from collections.abc import Sequence

from flwr.app import Message
from flwr.serverapp import Grid

AT_ONCE = 8  # replies asked for at a time
_POLL_S, _POLL_MOST_S = 0.05, 1.0  # between looks for something new: first, and while nothing comes


def push(grid: Grid, messages: Sequence[Message]) -> dict[str, int]:
    """The ids of the messages that got under way, with their nodes; grids leave the others out, or without id."""
    ids = list(grid.push_messages(messages))
    if len(ids) == len(messages):
        return {i: m.metadata.dst_node_id for i, m in zip(ids, messages, strict=True) if i}
    return {m.metadata.message_id: m.metadata.dst_node_id for m in messages if m.metadata.message_id in set(ids)}


def pull(grid: Grid, waiting: dict[str, int]) -> list[tuple[int, Message]]:
    """A few replies with their nodes, taken out of `waiting`; asking for few keeps few in memory."""
    asked = list(waiting)[:AT_ONCE]
    found = []
    for reply in grid.pull_messages(asked):
        node = waiting.pop(reply.metadata.reply_to_message_id, None)
        if node is not None:
            found.append((node, reply))
    for message_id in asked:  # the next call asks for others
        if message_id in waiting:
            waiting[message_id] = waiting.pop(message_id)
    return found


class Pause:
    """Sleeps between looks, longer each time: a look at a distant grid is a call over the network."""

    def __init__(self) -> None:
        self._seconds = _POLL_S

    def sleep(self, waiting: int = 1) -> None:
        """Sleep; a part of the pause where a look asks for that part of the `waiting` replies."""
        time.sleep(self._seconds * AT_ONCE / max(AT_ONCE, waiting))
        self._seconds = min(_POLL_MOST_S, self._seconds * 1.3)
