"""What our SuperLink does otherwise than Flower's with its database.

One caller at a time, in transactions that hold or leave no trace; a message is handed over once all of it is there, and
its objects belong to who sent it and who gets it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any

from fastapi import HTTPException
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from deploy import objects

# Of each connection. The first holds for a database that is made anew: rows of megabytes take fewer pages. What is
# mapped into memory would end the whole process where the disk fails, and counts as its own.
PRAGMAS = (
    ("page_size", "16384"),
    ("busy_timeout", "30000"),  # ms; only who looks at the file from outside is waited for
    ("journal_mode", "WAL"),
    ("synchronous", "NORMAL"),
    ("foreign_keys", "ON"),
    ("cache_size", "-16000"),  # KiB, with a minus
    ("temp_store", "MEMORY"),
    ("mmap_size", "0"),
    ("journal_size_limit", "67108864"),  # bytes that the log keeps once it is written back
)
# What SQLite says of what passes by itself.
_PASSES = ("locked", "busy", "disk is full", "disk i/o")
PUSH_S = 600.0  # a message lasts so long without a further object; one of 5 MiB takes 213 s at 24 KiB a second
_HELD_BACK = "not whole yet"  # in place of the time of delivery, and never after the end of a transaction
_TIMES = 3  # that a message is handed out again
_TABLES = (
    # How often a message was handed out again; it goes with the message.
    """
    CREATE TABLE IF NOT EXISTS apiary_handed_again (
        message_id TEXT PRIMARY KEY REFERENCES message_ins (message_id) ON DELETE CASCADE,
        times INTEGER NOT NULL
    ) WITHOUT ROWID
    """,
    # Which objects were stored for a sender, and when (days).
    """
    CREATE TABLE IF NOT EXISTS apiary_stored (
        session_id TEXT, object_id TEXT, at REAL NOT NULL, PRIMARY KEY (session_id, object_id)
    ) WITHOUT ROWID
    """,
    "CREATE INDEX IF NOT EXISTS apiary_stored_at ON apiary_stored (at)",
    objects.LIMITS,
)
_REMEMBER = (
    "INSERT OR REPLACE INTO apiary_stored VALUES (:session, :object, julianday('now'))",
    f"DELETE FROM apiary_stored WHERE at < julianday('now') - {PUSH_S / 86_400}",
)
_REMEMBERED = "SELECT 1 FROM apiary_stored WHERE session_id = :session AND object_id = :object"
# What was handed to a node and has no whole answer, of runs that go on. Who fetched a message has had it deleted.
_UNANSWERED = """
SELECT asked.*, answer.message_id AS answer, coalesce(times, 0) AS times,
    EXISTS (SELECT 1 FROM objects WHERE object_id = asked.message_id) AS there,
    asked.delivered_at < coalesce(last_activated_at, '') AS earlier
FROM message_ins AS asked
JOIN node ON node_id = asked.dst_node_id JOIN run ON run.run_id = asked.run_id JOIN task ON task_id = primary_task_id
LEFT JOIN message_res AS answer ON answer.reply_to_message_id = asked.message_id
LEFT JOIN apiary_handed_again AS again ON again.message_id = asked.message_id
WHERE asked.dst_node_id = :node AND asked.delivered_at <> '' AND finished_at IS NULL
AND coalesce(answer.delivered_at, '') = ''
"""
_HAND_OUT = (
    "UPDATE message_ins SET delivered_at = '' WHERE message_id = :id",
    "INSERT INTO apiary_handed_again VALUES (:id, 1) ON CONFLICT DO UPDATE SET times = times + 1",
)
_ONE = objects.INCOMPLETE.format(waiting="SELECT :root")
_NOT_WHOLE_FOR = objects.INCOMPLETE.format(
    waiting="SELECT message_id FROM message_ins WHERE dst_node_id = :node AND delivered_at = ''"
)
_NOT_WHOLE_TO = objects.INCOMPLETE.format(
    waiting="""
    SELECT message_id FROM message_res WHERE reply_to_message_id IN (SELECT value FROM json_each(:asked))
    AND delivered_at = '' AND message_id NOT IN (
        SELECT root_object_id FROM object_push_session_roots NATURAL JOIN object_push_sessions
        WHERE julianday(expires_at) <= julianday('now')
    )"""
)
_MARK_INS, _MARK_RES = (
    f"UPDATE {table} SET delivered_at = :after WHERE message_id = :id AND delivered_at = :before"
    for table in ("message_ins", "message_res")
)


class _Turn:
    """The transaction of the present caller."""

    def __init__(self) -> None:
        self.error: OperationalError | None = None


_ONE_AT_A_TIME = threading.Lock()
_turn: ContextVar[_Turn | None] = ContextVar("turn", default=None)


class _Turns:
    """Goes before one of Flower's SQL states: its transactions come one after the other.

    SQLite has one writer at a time, and a caller that has read before it writes is sent away at once where another
    has written meanwhile, however long it would wait. Callers of one process queue here instead.
    """

    @contextlib.contextmanager
    def session(self) -> Iterator[Any]:
        """A transaction; the one that is open already where there is one.

        Raises:
            HTTPException: 503, which Flower's callers try again after; nothing of the transaction is kept.
        """
        turn = _turn.get()
        if turn is not None:
            try:
                with super().session() as session:  # type: ignore[misc]
                    yield session
            except OperationalError as error:
                turn.error = error
                raise
            return
        with _ONE_AT_A_TIME:
            turn = _Turn()
            token = _turn.set(turn)
            try:
                with super().session() as session:  # type: ignore[misc]
                    yield session
                    if turn.error is not None:  # which somebody took for an answer
                        raise turn.error
            except OperationalError as error:
                if not any(words in str(error).lower() for words in _PASSES):
                    raise
                raise HTTPException(503, "the database takes nothing now") from error
            finally:
                _turn.reset(token)


class _WholeMessages:
    """Goes before Flower's SQL LinkState: a message, and a reply, is handed over once all its objects are stored.

    Flower's own hands it over as soon as it is announced. Who gets it then waits for what its sender still sends, or
    never sends: a reply that was announced alone would keep a round beyond its deadline.

    A node that asks for work is in the middle of none. What was handed to it and did not arrive is therefore handed out
    again, and what it lost is answered in its place, however seldom the server looks.
    """

    lost_answer: Callable[[dict[str, Any]], Any]  # see `state_class`

    def initialize(self, *args: Any, **kwargs: Any) -> Any:
        """Open the database, and make it where there is none."""
        tables = super().initialize(*args, **kwargs)  # type: ignore[misc]
        with self.session() as session:  # type: ignore[attr-defined]
            for statement in _TABLES:
                session.execute(text(statement))
        return tables

    def get_message_ins(self, node_id: int, limit: int | None, *, run_id: int | None = None) -> list[Any]:
        """The messages for a node that are there whole, at most `limit`; they count as delivered."""
        with self.session():  # type: ignore[attr-defined]
            self._see_to_unanswered(node_id)
            found = self._whole(node_id, limit, run_id)
            for asked in (message.metadata for message in found):
                self._pass_over(asked.run_id, node_id, asked.message_id)  # type: ignore[attr-defined]
            return found

    def _whole(self, node_id: int, limit: int | None, run_id: int | None) -> list[Any]:
        with self._held_back(_MARK_INS, _NOT_WHOLE_FOR, {"node": objects.signed(node_id)}):
            found: list[Any] = super().get_message_ins(node_id, limit, run_id=run_id)  # type: ignore[misc]
            return found

    def _see_to_unanswered(self, node_id: int) -> None:
        """Hand out again what did not arrive at a node, and answer what it lost.

        What it has fetched is lost once it has begun another session: a look that was delayed on its way may come while
        it works.
        """
        with self.session() as session:  # type: ignore[attr-defined]
            for row in session.execute(text(_UNANSWERED), {"node": objects.signed(node_id)}).mappings().all():
                asked = dict(row)
                answer, times, there, earlier = (asked.pop(key) for key in ("answer", "times", "there", "earlier"))
                if answer is not None:
                    if not earlier or not session.execute(text(_ONE), {"root": answer}).first():
                        continue
                    self._strike_off(answer)  # type: ignore[attr-defined]
                if answer is None and there and times < _TIMES:
                    for statement in _HAND_OUT:
                        session.execute(text(statement), {"id": asked["message_id"]})
                elif earlier or there:
                    lost = self.lost_answer(asked)
                    self.store_message_res(lost)  # type: ignore[attr-defined]
                    self._store_generated_message(lost)  # type: ignore[attr-defined]

    def get_message_res(self, message_ids: set[str], run_id: int) -> list[Any]:
        """The replies to messages that are there whole, and an error for each that cannot come any more.

        One that stopped arriving is listed as it is: Flower drops it when the first object that it lacks is asked for,
        and the server's grid refuses its sender.
        """
        with self._held_back(_MARK_RES, _NOT_WHOLE_TO, {"asked": json.dumps(sorted(message_ids))}):
            found: list[Any] = super().get_message_res(message_ids, run_id)  # type: ignore[misc]
            return found

    def store_object(self, run_id: int, session_id: str, object_id: str, object_content: bytes) -> bool:
        """Store an object that a sender announced; whether it is there.

        It is also where an earlier call has stored it whose answer was lost on its way, be it that who got the message
        has had it deleted since: a sender that is then told no gives its message up, and the server its run.

        Raises:
            HTTPException: 503; Flower's own would say that the object is not wanted. 413; an answer comes to more than
                its run allows.
        """
        values = {"session": session_id, "object": object_id}
        with self.session() as session:  # type: ignore[attr-defined]
            self._keep_to_limit(run_id, session_id, object_id, len(object_content))  # type: ignore[attr-defined]
            if super().store_object(run_id, session_id, object_id, object_content):  # type: ignore[misc]
                for statement in _REMEMBER:
                    session.execute(text(statement), values)
                return True
            if self.object_store.get(object_id) == object_content:  # type: ignore[attr-defined]
                return True
            if hashlib.sha256(object_content).hexdigest() != object_id:
                return False
            return session.execute(text(_REMEMBERED), values).first() is not None

    @contextlib.contextmanager
    def _held_back(self, mark: str, not_whole: str, values: dict[str, Any]) -> Iterator[None]:
        """Within, the messages that `not_whole` selects look as if they were delivered."""
        with self.session() as session:  # type: ignore[attr-defined]
            found = session.execute(text(not_whole), values).scalars().all()
            self._mark(session, mark, found, "", _HELD_BACK)
            yield
            self._mark(session, mark, found, _HELD_BACK, "")

    @staticmethod
    def _mark(session: Any, mark: str, messages: Iterable[str], before: str, after: str) -> None:
        for message in messages:
            session.execute(text(mark), {"id": message, "before": before, "after": after})


# What goes before Flower's SQL object store and LinkState: whatever they do that has a public name takes the place of
# Flower's own.
STORE = (objects.Parents, _Turns)
STATE = (objects.OwnTrees, _WholeMessages, _Turns)


def store_class(base: type) -> type:
    """Flower's SQL object store, as ours."""
    return type("ObjectStore", (*STORE, base), {})


def state_class(base: type, lost_answer: Callable[[dict[str, Any]], Any]) -> type:
    """Flower's SQL LinkState, as ours.

    Args:
        base: Flower's.
        lost_answer: what answers a message that its node lost, from the row of the message.
    """
    own = {"lost_answer": staticmethod(lost_answer)}
    return type("LinkState", (*STATE, base), own)


def set_limit(state: Any, run: int, size: int, objects_: int) -> None:
    """Bound each answer to a run.

    Args:
        state: ours.
        run: Flower's number.
        size: bytes.
        objects_: that Flower cuts it into.
    """
    with state.session() as session:
        values = {"run": objects.signed(run), "size": size, "objects": objects_}
        session.execute(text(objects.SET_LIMIT), values)


def statements() -> list[str]:
    """All that is asked of Flower's tables, the making of our own first."""
    found: list[str] = [*_TABLES, *objects.INDEXES]
    for module in (objects, sys.modules[__name__]):
        for value in vars(module).values():
            found += [each for each in (value if isinstance(value, tuple) else (value,)) if _is_statement(each)]
    return found


def _is_statement(value: object) -> bool:
    words = value.split() if isinstance(value, str) and "{" not in value else []
    return bool(words) and words[0] in ("SELECT", "WITH", "INSERT", "UPDATE", "DELETE")


def in_one_transaction(handler: Callable[..., Any]) -> Callable[..., Any]:
    """A handler of a call, which takes the state by that name or second, with all that it does in one transaction."""

    @functools.wraps(handler)
    def handle(*args: Any, **kwargs: Any) -> Any:
        state = kwargs["state"] if "state" in kwargs else args[1]
        with state.session():
            return handler(*args, **kwargs)

    return handle
