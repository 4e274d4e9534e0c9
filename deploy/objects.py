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

from fastapi import HTTPException
from sqlalchemy import text

_SERVER = 1  # Flower's id of the server among the nodes
_SAY_S = 10.0  # between lines of the log
# Flower's own keys of these tables begin with the parent, and with the run. SQLite looks for children and objects as
# well, whenever it deletes one.
INDEXES = (
    "CREATE INDEX IF NOT EXISTS apiary_object_parents ON object_children (child_id)",
    "CREATE INDEX IF NOT EXISTS apiary_object_runs ON run_objects (object_id)",
)

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
# Of a tree: what was announced before with other parts. A tree is made of pairs.
_OTHERWISE = """
SELECT json_extract(part.value, '$[0]') AS id FROM json_each(:tree) AS part
WHERE EXISTS (SELECT 1 FROM objects WHERE object_id = json_extract(part.value, '$[0]'))
AND json_extract(part.value, '$[1]') <> (SELECT coalesce(group_concat(child_id), '') FROM (
    SELECT child_id FROM object_children WHERE parent_id = json_extract(part.value, '$[0]') ORDER BY child_id
))
"""
# What holds such an object: the answers of those who announced it so, with what is between.
_HOLDERS = """
WITH RECURSIVE holder(id) AS (
    SELECT :object UNION SELECT parent_id FROM holder CROSS JOIN object_children ON child_id = holder.id
)
SELECT id FROM holder
"""
# Of messages, selected as `waiting(root)`: those of which an object is still to come.
INCOMPLETE = """
WITH RECURSIVE waiting(root) AS ({waiting}), tree(root, object_id) AS (
    SELECT root, root FROM waiting
    UNION SELECT tree.root, child_id FROM tree JOIN object_children ON parent_id = tree.object_id
)
SELECT DISTINCT tree.root FROM tree JOIN objects ON objects.object_id = tree.object_id WHERE is_available = 0
"""
# Of a node: the answers that it does not finish any more, for it works on one message after the other; and those that
# nobody waits for, for a run asks a site one thing at a time.
_UNFINISHED = INCOMPLETE.format(
    waiting="SELECT message_id FROM message_res WHERE src_node_id = :node AND message_id <> :root AND delivered_at = ''"
)
_PASSED_OVER = """
SELECT message_id FROM message_res
WHERE src_node_id = :node AND run_id = :run AND reply_to_message_id <> :asked AND delivered_at = ''
"""
_STRIKE_OFF = (
    "DELETE FROM object_push_sessions WHERE session_id IN "
    "(SELECT session_id FROM object_push_session_roots WHERE root_object_id = :root)",
    "DELETE FROM message_res WHERE message_id = :root",
)
# What one answer to a run may come to, as the run has told; where it has not, the front door's bounds are all.
LIMITS = "CREATE TABLE IF NOT EXISTS apiary_limits (run_id INTEGER PRIMARY KEY, size INTEGER, objects INTEGER)"
SET_LIMIT = "INSERT OR REPLACE INTO apiary_limits VALUES (:run, :size, :objects)"
_LIMIT = "SELECT size, objects FROM apiary_limits WHERE run_id = :run"
# Of an answer, by the session in which it is sent: the bytes that are there, but for one object.
_ARRIVED = """
WITH RECURSIVE part(id) AS (
    SELECT message_id FROM object_push_session_roots CROSS JOIN message_res ON message_id = root_object_id
    WHERE session_id = :session
    UNION SELECT child_id FROM part CROSS JOIN object_children ON parent_id = part.id
)
SELECT sum(length(content)) FROM part CROSS JOIN objects ON object_id = part.id WHERE object_id <> :object
"""
_PARTS = "SELECT child_id FROM object_children WHERE parent_id = :object"


def signed(node: int) -> int:
    """A node's id as SQLite holds it."""
    return node - 2**64 if node >= 2**63 else node


def unsigned(node: int) -> int:
    """A node's id as Flower knows it, from what SQLite holds."""
    return node % 2**64


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
    """Goes before Flower's SQL LinkState: an answer is announced with a tree of its own.

    It takes the place of what its node has not finished, for it may have ended while it sent, and of what it answered
    to earlier messages of the run and nobody fetched. So one answer of a node is kept, however many it begins.
    """

    def store_message_and_object_tree(self, message: Any, object_tree: Any, session_id: str) -> tuple[bool, list[str]]:
        """Store the head of a message and note which objects belong to it.

        Returns:
            Whether it is taken, and the ids of the objects that are still to be sent.

        Raises:
            HTTPException: 409; a site announces other parts of an object than somebody before. 413; it has more objects
                than its run allows.
        """
        if message.metadata.src_node_id == _SERVER:
            with self.session():  # type: ignore[attr-defined]
                self._strike_off_lies(object_tree)
                return self._stored(message, object_tree, session_id)
        root = object_tree.object_id
        values = {
            "asked": message.metadata.reply_to_message_id,
            "node": signed(message.metadata.src_node_id),
            "root": root,
            "parts": json.dumps([node.object_id for node in _nodes(object_tree)][1:]),
        }
        with self.session() as session:  # type: ignore[attr-defined]
            asked, takes_hold = session.execute(text(_TAKES_HOLD), values).one()
            # One that was not asked, or is not any more, is none of ours to count: Flower takes nothing of it.
            if asked and (takes_hold or root != message.metadata.message_id):
                _refusals.count("push_messages", message.metadata.src_node_id)
                return False, []
            if asked and self._told_otherwise(object_tree):
                raise HTTPException(409, "announced with other parts")
            if asked:
                limit = session.execute(text(_LIMIT), {"run": signed(message.metadata.run_id)}).first()
                if limit is not None and sum(1 for _ in _nodes(object_tree)) > limit.objects:
                    raise HTTPException(413, "more objects than this run allows")
                for earlier in session.execute(text(_UNFINISHED), values).scalars().all():
                    self._strike_off(earlier)
                self._pass_over(message.metadata.run_id, message.metadata.src_node_id, values["asked"])
            return self._stored(message, object_tree, session_id)

    def _keep_to_limit(self, run: int, session_id: str, object_id: str, size: int) -> None:
        """Look whether an object of so many bytes may be added to what has come in a session.

        Raises:
            HTTPException: 413; the answer would come to more bytes than its run allows.
        """
        values = {"run": signed(run), "session": session_id, "object": object_id}
        with self.session() as session:  # type: ignore[attr-defined]
            limit = session.execute(text(_LIMIT), values).first()
            if limit is None:
                return
            arrived = session.execute(text(_ARRIVED), values).scalar()  # None: no answer, but a message of the server's
            if arrived is not None and arrived + size > limit.size:
                raise HTTPException(413, "more bytes than this run allows")

    def _pass_over(self, run: int, node: int, asked: str) -> None:
        """Strike off the answers of a node that the server has not fetched, but for that to the message `asked`."""
        values = {"run": signed(run), "node": signed(node), "asked": asked}
        with self.session() as session:  # type: ignore[attr-defined]
            for answer in session.execute(text(_PASSED_OVER), values).scalars().all():
                self._strike_off(answer)

    def _strike_off(self, answer: str) -> None:
        """Strike off an answer, by the id of its root: nothing of it can come any more."""
        with self.session() as session:  # type: ignore[attr-defined]
            for statement in _STRIKE_OFF:
                session.execute(text(statement), {"root": answer})
            self.object_store.delete(answer)  # type: ignore[attr-defined]

    def _told_otherwise(self, tree: Any) -> list[str]:
        """The objects of a tree that were announced with other parts."""
        pairs = [(node.object_id, ",".join(sorted(c.object_id for c in node.children))) for node in _nodes(tree)]
        with self.session() as session:  # type: ignore[attr-defined]
            return list(session.execute(text(_OTHERWISE), {"tree": json.dumps(pairs)}).scalars())

    def _strike_off_lies(self, tree: Any) -> None:
        """Strike off the answers of sites that tell other parts of what the server sends.

        Flower refuses who comes second, so a site that foretells an object of the next round could end the run.
        """
        with self.session() as session:  # type: ignore[attr-defined]
            for name in self._told_otherwise(tree):
                for holder in list(session.execute(text(_HOLDERS), {"object": name}).scalars()):
                    self._strike_off(holder)

    def _stored(self, *args: Any) -> tuple[bool, list[str]]:
        stored: tuple[bool, list[str]] = super().store_message_and_object_tree(*args)  # type: ignore[misc]
        return stored


def _nodes(tree: Any) -> Iterator[Any]:
    yield tree
    for child in tree.children:
        yield from _nodes(child)


class Parents:
    """Goes before Flower's SQL object store: an object has the parts that it names itself, found by an index."""

    def initialize(self, *args: Any, **kwargs: Any) -> Any:
        """Open the database, and make it where there is none."""
        tables = super().initialize(*args, **kwargs)  # type: ignore[misc]
        with self.session() as session:  # type: ignore[attr-defined]
            for index in INDEXES:
                session.execute(text(index))
        return tables

    def put(self, object_id: str, object_content: bytes) -> None:
        """Store an object that was announced.

        Raises:
            ValueError: it names other parts than were announced, or is not the one of that id.
        """
        head = object_content.partition(b"\0")[0].decode(errors="replace").split(" ")  # kind, parts and length
        named = set(head[1].split(",")) - {""} if len(head) == 3 else set()
        with self.session() as session:  # type: ignore[attr-defined]
            if named != set(session.execute(text(_PARTS), {"object": object_id}).scalars()):
                raise ValueError("it names other parts than were announced")
            super().put(object_id, object_content)  # type: ignore[misc]
