"""Which objects a site may name to the SuperLink: those of its own messages.

Flower 1.41 keeps the objects of all messages in one store and goes by an object's id alone. Here the node of a call,
which the front door has bound to the key that signed it, must have been sent the object, or have announced it. What is
another's is answered as Flower answers an id that it does not know. The server's own calls are not asked.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from sqlalchemy import text

_SERVER = 1  # Flower's id of the server among the nodes
_SAY_S = 10.0  # between lines of the log
# Flower's own key of this table begins with the parent. SQLite looks for children as well, whenever it deletes one.
_INDEX = "CREATE INDEX IF NOT EXISTS apiary_object_parents ON object_children (child_id)"

# Each is one row: whether it is the node's, and whether there is such a thing at all.
_RECEIVED = """
WITH RECURSIVE holder(id) AS (
    SELECT :object UNION SELECT parent_id FROM holder CROSS JOIN object_children ON child_id = holder.id
)
SELECT EXISTS (
    SELECT 1 FROM holder CROSS JOIN message_ins ON message_id = holder.id WHERE dst_node_id = :node
), EXISTS (SELECT 1 FROM objects WHERE object_id = :object)
"""
_ADDRESSED = """
SELECT EXISTS (SELECT 1 FROM message_ins WHERE message_id = :object AND dst_node_id = :node),
    EXISTS (SELECT 1 FROM objects WHERE object_id = :object)
"""
# A call without a session is Flower's for old nodes, and means anybody's.
_ANNOUNCED = """
SELECT EXISTS (
    SELECT 1 FROM object_push_session_roots CROSS JOIN message_res ON message_id = root_object_id
    WHERE session_id = :session AND src_node_id = :node
), EXISTS (
    SELECT 1 FROM object_push_session_pending WHERE object_id = :object AND :session IN ('', session_id)
)
"""
# Of an answer: whether its node was asked, and whether its tree takes hold of another message. Were a message a part of
# another, it would be deleted with that one; were it announced anew, its sender could send no more of it; and were it
# made anew of other parts once it is confirmed, its receiver could fetch these. Objects of no other are messages.
_TAKES_HOLD = """
SELECT EXISTS (SELECT 1 FROM message_ins WHERE message_id = :asked AND dst_node_id = :node), EXISTS (
    SELECT 1 FROM json_each(:parts) AS part WHERE
        EXISTS (SELECT 1 FROM message_ins WHERE message_id = part.value)
        OR EXISTS (SELECT 1 FROM objects WHERE object_id = part.value AND ref_count = 0)
) OR EXISTS (SELECT 1 FROM message_ins WHERE message_id = :root) OR (
    EXISTS (SELECT 1 FROM objects WHERE object_id = :root)
    AND NOT EXISTS (SELECT 1 FROM message_res WHERE message_id = :root AND src_node_id = :node)
)
"""


def signed(node: int) -> int:
    """A node's id as SQLite holds it."""
    return node - 2**64 if node >= 2**63 else node


class Refusals:
    """Counts what is refused, and says so in a line every ten seconds at most.

    Args:
        say: receives a line.
        clock: seconds.
    """

    def __init__(
        self,
        say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._say, self._clock = say, clock
        self._counts: Counter[str] = Counter()
        self._said = -_SAY_S + clock()

    def count(self, call: str, node: int) -> None:
        """One call of a node; its id is said of the last one alone."""
        self._counts[call] += 1
        now = self._clock()
        if now - self._said >= _SAY_S:
            told = ", ".join(f"{count} {name}" for name, count in sorted(self._counts.items()))
            self._say(f"apiary: objects of no message of the caller: {told} refused, the last of node {node}")
            self._counts.clear()
            self._said = now


_refusals = Refusals()


def _only_own(field: str, query: str, handler: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(handler)
    def handle(request: Any, state: Any, *args: Any, **kwargs: Any) -> Any:
        values = {"object": getattr(request, field), "node": signed(request.node.node_id)}
        if query is _ANNOUNCED:
            values["session"] = request.session_id
        with state.session() as session:
            own, there = session.execute(text(query), values).one()
            if there and not own:
                _refusals.count(handler.__name__, request.node.node_id)
                setattr(request, field, "")  # which is the id of nothing: Flower answers in its own way
            return handler(request, state, *args, **kwargs)

    return handle


# By the name of Flower's handler for sites: what makes one that goes by the caller's node.
GUARDS: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "pull_object": functools.partial(_only_own, "object_id", _RECEIVED),
    "push_object": functools.partial(_only_own, "object_id", _ANNOUNCED),
    "confirm_message_received": functools.partial(_only_own, "message_object_id", _ADDRESSED),
}


class OwnTrees:
    """Goes before Flower's SQL LinkState: an answer is announced with a tree of its own."""

    def store_message_and_object_tree(self, message: Any, object_tree: Any, session_id: str) -> tuple[bool, list[str]]:
        """Store the head of a message and note which objects belong to it.

        Returns:
            Whether it is taken, and the ids of the objects that are still to be sent.
        """
        if message.metadata.src_node_id == _SERVER:
            return self._stored(message, object_tree, session_id)
        root = object_tree.object_id
        values = {
            "asked": message.metadata.reply_to_message_id,
            "node": signed(message.metadata.src_node_id),
            "root": root,
            "parts": json.dumps(list(_below(object_tree))),
        }
        with self.session() as session:  # type: ignore[attr-defined]
            asked, takes_hold = session.execute(text(_TAKES_HOLD), values).one()
            # One that was not asked, or is not any more, is none of ours to count: Flower takes nothing of it.
            if asked and (takes_hold or root != message.metadata.message_id):
                _refusals.count("push_messages", message.metadata.src_node_id)
                return False, []
            return self._stored(message, object_tree, session_id)

    def _stored(self, *args: Any) -> tuple[bool, list[str]]:
        stored: tuple[bool, list[str]] = super().store_message_and_object_tree(*args)  # type: ignore[misc]
        return stored


def _below(tree: Any) -> Iterator[str]:
    for child in tree.children:
        yield child.object_id
        yield from _below(child)


class Parents:
    """Goes before Flower's SQL object store: what an object is a part of is found by an index."""

    def initialize(self, *args: Any, **kwargs: Any) -> Any:
        """Open the database, and make it where there is none."""
        tables = super().initialize(*args, **kwargs)  # type: ignore[misc]
        with self.session() as session:  # type: ignore[attr-defined]
            session.execute(text(_INDEX))
        return tables
