"""Our launcher of Flower's SuperLink: its state, who it hears, and what it is asked in one call."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import io
import ipaddress
import logging
import os
import resource
import socket
import sqlite3
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from fastapi import FastAPI, HTTPException
from flwr.app import Array, ArrayRecord, Metadata, RecordDict
from flwr.common.serde import message_to_proto
from flwr.proto import fleet_pb2, message_pb2
from flwr.proto.fab_pb2 import GetFabRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_id, get_object_tree
from sqlalchemy import Column, MetaData, Table, text
from starlette.testclient import TestClient

from deploy import certificates, fleet, flower_cli, kits, objects, peers, processes, superlink, superlink_state
from deploy import server as deployed_server

# Of Flower, whose migrations are written for an older Alembic.
pytestmark = pytest.mark.filterwarnings("ignore:No path_separator found:DeprecationWarning")
NOBODY = 65534
_MADE_UP = get_object_id(b"made up")  # an object of nobody else


# -- the state ---------------------------------------------------------------------------------------


class _Link(NamedTuple):
    state: Any
    run: int
    node: int

    def announce(self, number: int) -> tuple[str, dict[str, bytes], str]:
        """A message to the node that is announced, with none of its objects; its id, these, and the session."""
        return self._announced(_message(number, self.run, 1, self.node))

    def answer(self, message_id: str) -> tuple[str, dict[str, bytes], str]:
        """An answer of the node to a message, announced alone."""
        return self._announced(_message(1000, self.run, self.node, 1, message_id))

    def _announced(self, message: Any) -> tuple[str, dict[str, bytes], str]:
        name = message.object_id
        message.metadata.__dict__["_message_id"] = name
        objects = {key: value.deflate() for key, value in get_all_nested_objects(message).items()}
        tree = get_object_tree(message)
        session = self.state.start_session(self.run)
        bare = superlink.private("flwr.app.message", "remove_content_from_message")(message)
        stored, missing = self.state.store_message_and_object_tree(bare, tree, session)
        assert stored and set(missing) <= set(objects)
        return name, {key: objects[key] for key in missing}, session

    def store(self, objects: dict[str, bytes], session: str) -> None:
        for key, value in objects.items():
            assert self.state.store_object(self.run, session, key, value)

    def handed_over(self) -> list[str]:
        return [message.metadata.message_id for message in self.state.get_message_ins(self.node, 1)]


def _message(number: int, run: int, source: int, target: int, reply_to: str = "") -> Any:
    arrays = ArrayRecord({f"a{i}": Array(np.full(4, float(10 * number + i), dtype=np.float32)) for i in range(3)})
    metadata = Metadata(
        run_id=run,
        message_id="",
        src_node_id=source,
        dst_node_id=target,
        reply_to_message_id=reply_to,
        group_id="",
        created_at=time.time(),
        ttl=100.0 if reply_to else 200.0,
        message_type="train",
    )
    make = superlink.private("flwr.app.message", "make_message")
    return make(metadata=metadata, content=RecordDict({"arrays": arrays}))


@pytest.fixture
def link(tmp_path: Path) -> _Link:
    return _open(tmp_path / "superlink.db")


def _open(path: Path) -> _Link:
    """A state as the launcher makes it, on a file, with a run and a node that is online."""
    pragmas = superlink.private("flwr.supercore.sql_mixin", "SQLITE_PRAGMAS")
    module = sys.modules["flwr.supercore.sql_mixin"]
    short = tuple((name, "200" if name == "busy_timeout" else value) for name, value in superlink_state.PRAGMAS)
    module.SQLITE_PRAGMAS = short  # type: ignore[attr-defined]
    try:
        theirs = superlink.private("flwr.supercore.object_store.sql_object_store", "SqlObjectStore")
        store = superlink_state.store_class(theirs)(str(path))
        store.initialize()
        base = superlink.private("flwr.server.superlink.linkstate.sql_linkstate", "SqlLinkState")
        manager = superlink.private("flwr.superlink.federation", "NoOpFederationManager")(simulation=False)
        state = superlink_state.state_class(base, superlink.lost_answer)(str(path), manager, store)
        state.initialize()
        with state.session():  # connects
            pass
    finally:
        module.SQLITE_PRAGMAS = pragmas  # type: ignore[attr-defined]
    account = superlink.private("flwr.common.constant", "NOOP_FLWR_AID")
    manager.ensure_default_federations_exist(flwr_aid=account)
    federation = superlink.private("flwr.superlink.federation.noop_federation_manager", "NOOP_FEDERATION_ID")
    run = state.create_run("a/b", "1", "", {}, federation, None, account, "flwr-serverapp")
    task = state.get_run_info(run_ids=[run])[0].primary_task_id
    assert state.claim_task(task) and state.activate_task(task)
    node = state.create_node(account, "none", b"key", 30)
    assert state.activate_node(node, 30)
    return _Link(state, run, node)


def test_a_message_is_handed_over_once_it_is_whole(link: _Link) -> None:
    first, objects, session = link.announce(1)
    *some, last = objects.items()
    assert link.handed_over() == []
    link.store(dict(some), session)
    assert link.handed_over() == []
    second, others, other = link.announce(2)
    link.store(others, other)
    assert link.handed_over() == [second]  # it does not wait for the one before it
    link.state.object_store.delete(second)  # it has been fetched
    link.store(dict([last]), session)
    assert link.handed_over() == [first]
    link.state.object_store.delete(first)
    assert link.handed_over() == []


def test_an_object_whose_answer_was_lost_on_its_way_may_be_sent_again(link: _Link) -> None:
    """Also the last one, whose session is over; what nobody announced is no more wanted than before."""
    first, objects, session = link.announce(1)
    for key, value in objects.items():
        for _ in range(2):
            assert link.state.store_object(link.run, session, key, value)
    assert link.handed_over() == [first]
    assert not link.state.store_object(link.run, session, "0" * 64, b"unknown")


def test_an_object_may_be_sent_again_when_its_message_has_been_fetched_meanwhile(link: _Link) -> None:
    """Else the server, whose call was carried out without an answer, gives its run up."""
    first, objects, session = link.announce(1)
    link.store(objects, session)
    assert link.handed_over() == [first]
    link.state.object_store.delete(first)
    assert {link.state.object_store.get(name) for name in objects} == {None}
    link.store(objects, session)
    assert {link.state.object_store.get(name) for name in objects} == {None}
    assert not link.state.store_object(link.run, "another", first, objects[first])
    assert not link.state.store_object(link.run, session, first, b"something else")


def test_what_was_stored_is_remembered_as_long_as_a_sender_may_ask(link: _Link) -> None:
    _, objects, session = link.announce(1)
    link.store(objects, session)
    with link.state.session() as database:
        database.execute(text("UPDATE apiary_stored SET at = at - 1.0"))
    _, more, session = link.announce(2)
    link.store(more, session)
    assert link.state.query("SELECT count(*) AS n FROM apiary_stored") == [{"n": len(more)}]


def test_an_answer_that_is_only_announced_is_none(link: _Link) -> None:
    message, objects, session = link.announce(1)
    link.store(objects, session)
    assert link.handed_over() == [message]
    answer, parts, session = link.answer(message)
    assert link.state.get_message_res({message}, link.run) == []
    link.store(parts, session)
    (got,) = link.state.get_message_res({message}, link.run)
    assert got.metadata.message_id == answer and not got.has_error()


def test_a_node_that_is_gone_after_it_announced_an_answer_is_told_as_gone(
    link: _Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    message, objects, session = link.announce(1)
    link.store(objects, session)
    link.handed_over()
    link.answer(message)
    assert link.state.deactivate_node(link.node)
    (got,) = link.state.get_message_res({message}, link.run)
    assert got.has_error() and "Node Unavailable" in got.error.reason


def test_what_did_not_arrive_at_a_node_is_handed_out_again_and_told_in_the_end(link: _Link) -> None:
    """The line broke over the answer to its look, or the node ended over it."""
    message, parts, session = link.announce(1)
    link.store(parts, session)
    for _ in range(4):
        assert link.handed_over() == [message]
        assert link.state.get_message_res({message}, link.run) == []
    assert link.handed_over() == []
    (got,) = link.state.get_message_res({message}, link.run)
    assert got.has_error() and got.error.code == 5 and got.error.reason == "its node began anew and lost the message"
    assert link.state.object_store.get(got.metadata.message_id)  # the server's grid fetches it as any other
    link.state.delete_messages({message})  # as Flower does with what was answered
    assert link.state.query("SELECT count(*) AS n FROM apiary_handed_again") == [{"n": 0}]


def test_a_message_of_a_run_that_is_over_is_not_handed_out_again(link: _Link) -> None:
    message, parts, session = link.announce(1)
    link.store(parts, session)
    assert link.handed_over() == [message]
    task = link.state.get_run_info(run_ids=[link.run])[0].primary_task_id
    assert link.state.finish_task(task, "failed", "")
    assert link.handed_over() == []


def test_what_a_node_lost_is_told_at_its_next_look_however_seldom_the_server_looks(link: _Link) -> None:
    message, parts, session = link.announce(1)
    link.store(parts, session)
    assert link.handed_over() == [message]
    link.state.object_store.delete(message)  # it has been fetched
    assert link.handed_over() == []  # a look that was delayed on its way, while the node works
    assert link.state.get_message_res({message}, link.run) == []
    assert link.state.deactivate_node(link.node) and link.state.activate_node(link.node, 30)
    assert link.state.get_message_res({message}, link.run) == []  # the server never saw it away
    assert link.handed_over() == []
    (got,) = link.state.get_message_res({message}, link.run)
    assert got.has_error() and got.error.code == 5
    assert link.handed_over() == []


def test_callers_of_one_process_never_find_the_database_locked(link: _Link) -> None:
    """Each reads before it writes, for which SQLite alone sends all but one away."""

    def write(number: int) -> int:
        with link.state.session() as session:
            session.connection().exec_driver_sql("BEGIN")
            before = link.state.query("SELECT count(*) AS n FROM node")[0]["n"]
            time.sleep(0.01)
            link.state.create_node("", "", f"key {number}".encode(), 30)
            return int(before)

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(write, range(40))) == list(range(1, 41))


def test_what_the_disk_does_not_take_is_answered_as_something_to_try_again(link: _Link, tmp_path: Path) -> None:
    _, objects, session = link.announce(1)
    other = sqlite3.connect(tmp_path / "superlink.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(HTTPException) as caught:
        link.store(objects, session)
    assert caught.value.status_code == 503
    other.execute("ROLLBACK")
    link.store(objects, session)  # nothing of the first attempt stayed
    pages = link.state.query("PRAGMA page_count")[0]["page_count"]
    _, objects, session = link.announce(2)
    big = superlink_state.in_one_transaction(lambda request, state: state.store_fab(request))
    link.state.query(f"PRAGMA max_page_count = {pages + 1}")
    content = os.urandom(1_000_000)
    fab = superlink.private("flwr.supercore.fab", "Fab")(hashlib.sha256(content).hexdigest(), content, {})
    with pytest.raises(HTTPException) as caught:
        big(fab, link.state)
    assert caught.value.status_code == 503
    assert link.state.get_fab(fab.hash_str) is None


def test_a_database_of_ours_has_large_pages_and_a_log(link: _Link, tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "superlink.db")) as database:
        assert database.execute("PRAGMA page_size").fetchone() == (16384,)
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_another_flower_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(superlink, "_STORE", "flwr.supercore.another_place")
    assert "flwr.supercore.another_place.SqlObjectStore" in _refused(capsys)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("store_message_and_object_tree", None),
        ("store_message_and_object_tree", lambda self, message, object_tree, session_id, verify: (True, [])),
        ("get_message_res", None),
        ("store_message_res", None),
    ],
)
def test_a_flower_with_another_method_is_refused_at_the_start(
    name: str, method: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else what takes its place would never be asked."""
    theirs = superlink.private(superlink._LINK, "SqlLinkState")
    for each in theirs.__mro__:
        if name in vars(each):
            monkeypatch.delattr(each, name)
    if method is not None:
        monkeypatch.setattr(theirs, name, method, raising=False)
    assert f"SqlLinkState.{name}(self, message" in _refused(capsys)


def test_a_flower_whose_handlers_take_something_else_is_refused_at_the_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(f"{superlink._RUNTIME}.push_object", lambda request, task, state: None)
    assert "runtime_handlers.push_object(request, state)" in _refused(capsys)


@pytest.mark.parametrize(
    ("kind", "table", "column"),
    [
        ("linkstate", "message_res", None),
        ("linkstate", "message_ins", "delivered_at"),
        ("linkstate", "node", "last_activated_at"),
        ("corestate", "object_push_session_roots", "root_object_id"),
        ("corestate", "task", "finished_at"),
        ("objectstore", "objects", "ref_count"),
        ("objectstore", "object_children", "child_id"),
    ],
)
def test_a_flower_with_other_tables_is_refused_at_the_start(
    kind: str, table: str, column: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = f"flwr.supercore.state.schema.{kind}_tables.create_{kind}_metadata"
    theirs = superlink.private(*place.rsplit(".", 1))()
    other = MetaData()
    for each in theirs.tables.values():
        if each.name != table or column:
            Table(each.name, other, *(Column(c.name, c.type) for c in each.columns if c.name != column))
    monkeypatch.setattr(place, lambda: other)
    assert (column or table) in _refused(capsys)


def _refused(capsys: pytest.CaptureFixture[str]) -> str:
    """What the launcher says when it refuses to start: one line that names Flower's version."""
    with pytest.raises(SystemExit) as ended:
        superlink.main()
    assert ended.value.code == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"apiary: flwr {importlib.metadata.version('flwr')} has no ") and "needs flwr 1.41" in line
    return line


def test_what_the_superlink_says_of_another_flower_is_said_by_the_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kits.init(tmp_path / "f", "127.0.0.1:8443", ["a"])
    kit = kits.read(tmp_path / "f" / "server", "server")
    command = [sys.executable, "-c", "print('noise'); print('apiary: flwr 2.0 has no such thing'); raise SystemExit(3)"]
    kept = processes.SupervisedProcess(command, {**os.environ}, tmp_path, tmp_path / "superlink.log")
    assert not deployed_server._wait_until_up(kit, [kept], processes.free_port(), threading.Event())
    assert capsys.readouterr().out.endswith("apiary: flwr 2.0 has no such thing\n")


# -- whose objects -----------------------------------------------------------------------------------


class _Site(NamedTuple):
    """A site that calls Flower's own routes for sites, with the node id that the front door has found to be its own."""

    link: _Link
    client: TestClient

    def call(self, name: str, **fields: Any) -> Any:
        kind = "".join(word.title() for word in name.split("-"))
        proto = message_pb2 if hasattr(message_pb2, f"{kind}Request") else fleet_pb2
        request = getattr(proto, f"{kind}Request")(node=Node(node_id=self.link.node), **fields)
        kinds = {"content-type": "application/protobuf"}
        answer = self.client.post(f"/v1/fleet/{name}", content=request.SerializeToString(), headers=kinds)
        assert answer.status_code == 200, answer.text
        return getattr(proto, f"{kind}Response").FromString(answer.content)

    def pull(self, name: str) -> bytes | None:
        answer = self.call("pull-object", run_id=self.link.run, object_id=name)
        return answer.object_content if answer.object_found else None

    def confirm(self, name: str) -> None:
        self.call("confirm-message-received", run_id=self.link.run, message_object_id=name)

    def push(self, session: str, name: str, content: bytes) -> bool:
        fields = {"run_id": self.link.run, "session_id": session, "object_id": name, "object_content": content}
        return bool(self.call("push-object", **fields).stored)

    def answer(self, to: str, number: int = 1000) -> _Answer:
        """An answer as an honest site announces it, before it is announced."""
        message = _message(number, self.link.run, self.link.node, 1, to)
        message.metadata.__dict__["_message_id"] = message.object_id
        contents = {key: value.deflate() for key, value in get_all_nested_objects(message).items()}
        bare = superlink.private("flwr.app.message", "remove_content_from_message")(message)
        return _Answer(message_to_proto(bare), get_object_tree(message), contents)

    def announce(self, answer: _Answer) -> Any:
        trees = [answer.tree]
        return self.call("push-messages", messages_list=[answer.head], message_object_trees=trees)

    def send(self, answer: _Answer) -> None:
        told = self.announce(answer)
        assert told.objects_to_push
        assert all(self.push(told.session_id, name, answer.contents[name]) for name in told.objects_to_push)


class _Answer(NamedTuple):
    head: Any
    tree: Any
    contents: dict[str, bytes]

    @property
    def root(self) -> str:
        return str(self.tree.object_id)

    def part(self, *, leaf: bool) -> str:
        tree = self.tree
        while leaf and tree.children:
            tree = tree.children[0]
        return str(tree.object_id)

    def claiming(self, root: str, *below: message_pb2.ObjectTree, name: str = "") -> _Answer:
        """This answer, said to be the object `root` with these parts; its head may say that it is another (`name`)."""
        head = type(self.head)()
        head.CopyFrom(self.head)
        head.metadata.message_id = name or root
        return self._replace(head=head, tree=message_pb2.ObjectTree(object_id=root, children=below))


class _Two(NamedTuple):
    a: _Site
    b: _Site


@pytest.fixture
def two(link: _Link, monkeypatch: pytest.MonkeyPatch) -> Iterator[_Two]:
    """Two sites at the SuperLink as the launcher prepares it."""
    names = [("flwr.supercore.sql_mixin", "SQLITE_PRAGMAS")]
    names += [(superlink._STORE, "SqlObjectStore"), (superlink._LINK, "SqlLinkState")]
    names += [(place, name) for place in (superlink._FLEET, superlink._RUNTIME) for name in superlink._CARRY]
    for place, name in names:  # put back afterwards
        monkeypatch.setattr(f"{place}.{name}", superlink.private(place, name))
    superlink.prepare()
    app = FastAPI()
    app.add_middleware(superlink.private("flwr.supercore.protobuf.translation", "ProtobufTranslationMiddleware"))
    app.include_router(superlink.private("flwr.superlink.routers.fleet.router", "router"))
    app.state.linkstate_factory = SimpleNamespace(state=lambda: link.state)
    account = superlink.private("flwr.common.constant", "NOOP_FLWR_AID")
    other = link.state.create_node(account, "none", b"another key", 30)
    assert link.state.activate_node(other, 30)
    with TestClient(app) as client:
        yield _Two(_Site(link, client), _Site(link._replace(node=other), client))


def _sent(site: _Site, number: int = 1) -> tuple[str, dict[str, bytes]]:
    """A message to a site that is there and handed over, and its objects."""
    name, parts, session = site.link.announce(number)
    site.link.store(parts, session)
    (told,) = site.call("pull-messages").messages_list
    assert told.metadata.message_id == name
    return name, parts


def _has_come(site: _Site, to: str, answer: _Answer) -> None:
    """The server gets the whole answer of a site."""
    (got,) = site.link.state.get_message_res({to}, site.link.run)
    assert not got.has_error() and got.metadata.message_id == answer.root
    store = site.link.state.object_store
    assert {name: store.get(name) for name in answer.contents} == answer.contents


def test_an_honest_exchange_is_as_flower_has_it(two: _Two) -> None:
    message, parts = _sent(two.a)
    assert {name: two.a.pull(name) for name in parts} == parts
    two.a.confirm(message)
    assert {two.a.pull(name) for name in parts} == {None}
    answer = two.a.answer(message)
    first = two.a.announce(answer)
    again = two.a.announce(answer)  # as when the line broke over the first
    assert set(again.objects_to_push) == set(first.objects_to_push) == set(answer.contents)
    two.a.send(answer)
    _has_come(two.a, message, answer)


def test_an_answer_that_stopped_arriving_is_told(two: _Two) -> None:
    message, _ = _sent(two.a)
    answer = two.a.answer(message)
    told = two.a.announce(answer)
    first, *rest = told.objects_to_push
    assert two.a.push(told.session_id, first, answer.contents[first])
    state, run = two.a.link.state, two.a.link.run
    assert state.get_message_res({message}, run) == []
    with state.session() as session:
        session.execute(text("UPDATE object_push_sessions SET expires_at = datetime(expires_at, '-1 day')"))
    (got,) = state.get_message_res({message}, run)
    assert got.metadata.message_id == answer.root
    assert state.get_object(run, rest[0]) is None  # which the server's grid takes for a failure
    assert not two.a.push(told.session_id, rest[0], answer.contents[rest[0]])


def _in_mid_push(site: _Site) -> tuple[str, _Answer, Any]:
    """A message that is being answered, the answer, and what the SuperLink said to its announcement."""
    message, _ = _sent(site)
    site.confirm(message)
    answer = site.answer(message)
    told = site.announce(answer)
    first = told.objects_to_push[0]
    assert site.push(told.session_id, first, answer.contents[first])
    return message, answer, told


def test_the_answer_of_a_node_that_was_started_again_in_mid_push_takes_the_place_of_the_unfinished_one(
    two: _Two,
) -> None:
    message, first, told = _in_mid_push(two.a)
    again = two.a.answer(message, 1001)
    two.a.send(again)
    _has_come(two.a, message, again)
    late = told.objects_to_push[-1]
    assert not two.a.push(told.session_id, late, first.contents[late])
    assert two.a.link.state.object_store.get(first.root) is None


def test_a_whole_answer_stays_and_another_site_has_no_say_in_it(two: _Two) -> None:
    message, _, _ = _in_mid_push(two.a)
    assert not two.b.announce(two.b.answer(message, 1001)).objects_to_push
    whole = two.a.answer(message, 1002)
    two.a.send(whole)
    assert not two.a.announce(two.a.answer(message, 1003)).objects_to_push
    _has_come(two.a, message, whole)


def test_what_is_left_of_an_answer_is_told_when_its_node_looks_for_work_in_another_session(two: _Two) -> None:
    message, answer, told = _in_mid_push(two.a)
    state, run, node = two.a.link
    assert not two.a.call("pull-messages").messages_list  # delayed on its way
    late = told.objects_to_push[1]
    assert two.a.push(told.session_id, late, answer.contents[late])
    assert state.deactivate_node(node) and state.activate_node(node, 30)
    assert not two.a.call("pull-messages").messages_list
    (got,) = state.get_message_res({message}, run)
    assert got.has_error() and got.error.code == 5
    assert state.object_store.get(answer.root) is None


def _stored(site: _Site) -> int:
    """The bytes of all objects that the SuperLink keeps."""
    return int(site.link.state.query("SELECT coalesce(sum(length(content)), 0) AS n FROM objects")[0]["n"])


def test_of_the_answers_that_a_node_begins_one_is_kept(two: _Two) -> None:
    """And so is one of those that it ends when nobody waits any more."""
    names = []
    for number in range(1, 9):
        names.append(_sent(two.a, number)[0])
        two.a.confirm(names[-1])
    empty = _stored(two.a)
    sizes = []
    for number, name in enumerate(names):
        answer = two.a.answer(name, 100 + number)
        told = two.a.announce(answer)
        first, *most = told.objects_to_push
        assert all(two.a.push(told.session_id, each, answer.contents[each]) for each in most)
        if number % 2:
            assert two.a.push(told.session_id, first, answer.contents[first])
        sizes.append(_stored(two.a))
    one = sum(map(len, answer.contents.values()))
    assert empty == 0 and max(sizes) <= one + 100
    _has_come(two.a, names[-1], answer)
    assert two.a.link.state.get_message_res(set(names[:-1]), two.a.link.run) == []


def test_what_a_node_has_not_answered_in_time_goes_with_the_next_message_to_it(two: _Two) -> None:
    """Of no other node, and not for a look that finds nothing new."""
    to_b, _ = _sent(two.b)
    theirs = two.b.answer(to_b, 7)
    two.b.send(theirs)
    _, answer, told = _in_mid_push(two.a)
    late = told.objects_to_push[1]
    assert not two.a.call("pull-messages").messages_list
    assert two.a.push(told.session_id, late, answer.contents[late])
    name, parts, session = two.a.link.announce(2)
    two.a.link.store(parts, session)
    assert two.a.link.state.object_store.get(answer.root) is not None  # which the node has not been told yet
    (given,) = two.a.call("pull-messages").messages_list
    assert given.metadata.message_id == name
    late = told.objects_to_push[2]
    assert not two.a.push(told.session_id, late, answer.contents[late])
    assert {two.a.link.state.object_store.get(each) for each in set(answer.contents) - set(parts)} == {None}
    two.a.confirm(name)
    two.a.send(two.a.answer(name, 8))
    _has_come(two.b, to_b, theirs)


def test_an_answer_comes_to_no_more_than_its_run_has_told(two: _Two) -> None:
    message, _ = _sent(two.a)
    two.a.confirm(message)
    answer = two.a.answer(message)
    sizes = {name: len(content) for name, content in answer.contents.items()}
    whole, count = sum(sizes.values()), len(sizes)
    state, run = two.a.link.state, two.a.link.run
    superlink_state.set_limit(state, run, whole, count - 1)
    with pytest.raises(AssertionError, match="more objects than this run allows"):
        two.a.announce(answer)
    superlink_state.set_limit(state, run, whole - 1, count)
    told = two.a.announce(answer)
    *most, last = told.objects_to_push
    for _ in range(2):  # one that is sent again counts once
        assert all(two.a.push(told.session_id, each, answer.contents[each]) for each in most)
    with pytest.raises(AssertionError, match="more bytes than this run allows"):
        two.a.push(told.session_id, last, answer.contents[last])
    assert _stored(two.a) <= whole - 1 and state.get_message_res({message}, run) == []
    superlink_state.set_limit(state, run, whole, count)
    assert two.a.push(told.session_id, last, answer.contents[last])
    _has_come(two.a, message, answer)
    superlink_state.set_limit(state, run, 1, 1)
    _sent(two.a, 5)  # what the server sends is not bounded


def test_the_limit_of_another_run_is_not_looked_at(two: _Two) -> None:
    message, _ = _sent(two.a)
    superlink_state.set_limit(two.a.link.state, two.a.link.run + 1, 1, 1)
    answer = two.a.answer(message)
    two.a.send(answer)
    _has_come(two.a, message, answer)


def test_an_answer_that_nobody_asked_for_takes_no_place(two: _Two) -> None:
    """As one that comes after the server has taken another to the same message."""
    to_b, _ = _sent(two.b)
    message, _ = _sent(two.a, 2)
    answer = two.a.answer(message, 7)
    two.a.send(answer)
    assert not two.a.announce(two.a.answer(to_b, 8)).objects_to_push
    _has_come(two.a, message, answer)


def test_an_answer_to_another_run_is_not_passed_over(link: _Link) -> None:
    message, objects, session = link.announce(1)
    link.store(objects, session)
    assert link.handed_over() == [message]
    answer, parts, session = link.answer(message)
    link.store(parts, session)
    link.state._pass_over(link.run + 1, link.node, "")
    link.state._pass_over(link.run, link.node + 1, "")
    link.state._pass_over(link.run, link.node, message)
    (got,) = link.state.get_message_res({message}, link.run)
    assert got.metadata.message_id == answer


def test_what_was_sent_to_another_site_is_as_if_it_were_not_there(two: _Two) -> None:
    message, parts = _sent(two.b)
    _sent(two.a, 2)
    assert {two.a.pull(name) for name in parts} == {None} == {two.a.pull("0" * 64)}
    two.a.confirm(message)
    assert {name: two.b.pull(name) for name in parts} == parts
    two.b.confirm(message)
    assert two.b.pull(message) is None


def test_what_another_site_answers_can_neither_be_read_nor_spoilt(two: _Two) -> None:
    message, _ = _sent(two.b)
    to_a, _ = _sent(two.a, 2)
    two.a.announce(two.a.answer(to_a, 7))
    answer = two.b.answer(message)
    told = two.b.announce(answer)
    name, content = next(iter(answer.contents.items()))
    for session in (told.session_id, ""):
        assert not two.a.push(session, name, b"junk")
        assert not two.a.push(session, name, content)
    assert all(two.b.push(told.session_id, name, answer.contents[name]) for name in told.objects_to_push)
    assert {two.a.pull(name) for name in answer.contents} == {None}
    for name in answer.contents:
        two.a.confirm(name)
        assert not two.a.push(told.session_id, name, b"junk")
    _has_come(two.b, message, answer)


def test_equal_content_serves_both_and_stays_for_the_other(two: _Two) -> None:
    to_a, to_both = _sent(two.a)
    to_b, more = _sent(two.b)  # the same arrays, of which only the head is new
    assert set(more) == {to_b}
    shared = {name: content for name, content in to_both.items() if name != to_a}
    assert {name: two.a.pull(name) for name in shared} == {name: two.b.pull(name) for name in shared} == shared
    two.a.confirm(to_a)
    assert {name: two.b.pull(name) for name in shared} == shared
    answer_a, answer_b = two.a.answer(to_a), two.b.answer(to_b)
    told_a, told_b = two.a.announce(answer_a), two.b.announce(answer_b)
    both = set(told_a.objects_to_push) & set(told_b.objects_to_push)
    assert len(both) == len(answer_a.contents) - 1  # all but the head
    for site, told, answer in ((two.a, told_a, answer_a), (two.b, told_b, answer_b)):
        assert all(site.push(told.session_id, name, answer.contents[name]) for name in told.objects_to_push)
    _has_come(two.a, to_a, answer_a)
    two.a.link.state.object_store.delete(answer_a.root)
    _has_come(two.b, to_b, answer_b)


def test_no_answer_takes_hold_of_another_message(two: _Two) -> None:
    """It would be deleted with that answer, or its sender could send no more of it, or its receiver could read it."""
    to_a, _ = _sent(two.a)
    to_b, parts_b = _sent(two.b, 2)
    theirs = two.b.answer(to_b)
    told = two.b.announce(theirs)
    first, *others = told.objects_to_push
    assert two.b.push(told.session_id, first, theirs.contents[first])
    two.a.confirm(to_a)
    own = two.a.answer(to_a, 7)
    arrays = two.b.link.state.object_store.get_object_tree(to_b).children[0]
    whole = two.b.link.state.object_store.get_object_tree(to_b)
    for answer in (
        own.claiming(_MADE_UP, whole),  # another's message
        own.claiming(_MADE_UP, theirs.tree),  # another's answer
        own.claiming(theirs.root, *theirs.tree.children),  # the same, as its own
        own.claiming(_MADE_UP, name=to_b),  # which the server would then read, and delete
        own.claiming(to_b, *whole.children),
        own.claiming(to_a, arrays),  # what it got itself, with other parts
        own.claiming(_MADE_UP, message_pb2.ObjectTree(object_id=to_a, children=[arrays])),
    ):
        refused = two.a.announce(answer)
        assert not refused.objects_to_push
        assert {two.a.pull(name) for name in parts_b} == {None}
    assert all(two.b.push(told.session_id, name, theirs.contents[name]) for name in others)
    assert {name: two.b.pull(name) for name in parts_b} == parts_b
    two.a.send(own)
    _has_come(two.a, to_a, own)
    _has_come(two.b, to_b, theirs)


def test_no_answer_takes_hold_of_one_that_the_server_is_about_to_fetch(two: _Two) -> None:
    """Flower strikes it off the messages before."""
    to_a, _ = _sent(two.a)
    to_b, _ = _sent(two.b, 2)
    theirs = two.b.answer(to_b)
    two.b.send(theirs)
    _has_come(two.b, to_b, theirs)
    two.b.link.state.delete_messages({to_b})
    own = two.a.answer(to_a, 7)
    for answer in (own.claiming(_MADE_UP, theirs.tree), own.claiming(theirs.root, *theirs.tree.children)):
        assert not two.a.announce(answer).objects_to_push


@pytest.mark.parametrize("gone", [False, True])
def test_what_a_site_foretells_of_a_message_does_not_keep_the_server_from_sending_it(two: _Two, gone: bool) -> None:
    to_a, parts = _sent(two.a)
    to_b, _ = _sent(two.b)
    for site, name in ((two.a, to_a), (two.b, to_b)):
        site.confirm(name)
    foretold = sorted(set(parts) - {to_a})
    own = two.a.answer(to_a, 7)
    lies = [message_pb2.ObjectTree(object_id=name, children=[_leaf(b"lie")]) for name in foretold]
    told = two.a.announce(own.claiming(_MADE_UP, *lies))
    assert set(told.objects_to_push) == {_MADE_UP, get_object_id(b"lie"), *foretold}
    for name in foretold:
        assert not two.a.push(told.session_id, name, parts[name])
    if gone:
        two.a.link.state.delete_messages({to_a})
    _, more = _sent(two.b)
    assert set(foretold) < set(more) and {name: two.b.pull(name) for name in more} == more
    assert not two.a.push(told.session_id, _MADE_UP, b"made up")
    assert not two.a.link.state.query("SELECT 1 FROM object_push_session_roots")
    if not gone:  # and may answer in earnest
        honest = two.a.answer(to_a, 8)
        two.a.send(honest)
        _has_come(two.a, to_a, honest)


def test_what_a_site_sends_is_not_struck_off_at_anothers_word(two: _Two) -> None:
    to_a, _ = _sent(two.a)
    to_b, _ = _sent(two.b, 2)
    answer = two.b.answer(to_b)
    told = two.b.announce(answer)
    own = two.a.answer(to_a, 7)
    lie = message_pb2.ObjectTree(object_id=answer.tree.children[0].object_id, children=[_leaf(b"lie")])
    with pytest.raises(AssertionError, match="announced with other parts"):
        two.a.announce(own.claiming(_MADE_UP, lie))
    assert all(two.b.push(told.session_id, name, answer.contents[name]) for name in told.objects_to_push)
    _has_come(two.b, to_b, answer)


@pytest.mark.parametrize("over", [False, True])
def test_an_object_has_the_id_of_one_or_is_neither_logged_nor_echoed(two: _Two, over: bool) -> None:
    """Of this call the front door reads no body."""
    link = two.a.link
    _, objects_, session = link.announce(1)
    if over:  # then Flower says the id back
        link.state.finish_task(link.state.get_run_info(run_ids=[link.run])[0].primary_task_id, "stopped", "")
    kinds = {"content-type": "application/protobuf"}
    for name in ("x" * 2**20, "\n\x1b[2JINFO : all is well", next(iter(objects_)).upper()):
        request = message_pb2.PushObjectRequest(
            node=Node(node_id=link.node), run_id=link.run, session_id=session, object_id=name, object_content=b"c"
        )
        answer = two.a.client.post("/v1/fleet/push-object", content=request.SerializeToString(), headers=kinds)
        assert answer.status_code == 400 and name not in answer.text and len(answer.text) < 100
    assert request.ByteSize() < 1000
    request.object_id, request.session_id = next(iter(objects_)), "\n" + session
    answer = two.a.client.post("/v1/fleet/push-object", content=request.SerializeToString(), headers=kinds)
    assert answer.status_code == 400


def _leaf(content: bytes) -> message_pb2.ObjectTree:
    return message_pb2.ObjectTree(object_id=get_object_id(content))


def test_what_is_refused_is_said_in_a_line_every_ten_seconds_at_most(
    two: _Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    now = [100.0]
    monkeypatch.setattr(objects, "_refusals", objects.Refusals(lines.append, lambda: now[0]))
    message, parts = _sent(two.b)
    for name in parts:
        two.a.pull(name)
    two.a.confirm(message)
    two.a.pull("0" * 64)  # nobody's
    two.b.pull(message)
    assert len(lines) == 1 and "1 pull_object" in lines[0] and str(two.a.link.node) in lines[0]
    now[0] += 11.0
    two.a.confirm(message)
    assert len(lines) == 2 and f"2 confirm_message_received, {len(parts) - 1} pull_object" in lines[1]


def test_the_way_up_from_an_object_goes_by_an_index(two: _Two) -> None:
    values = {"object": "x", "node": 1}
    with two.a.link.state.session() as session:
        rows = session.execute(objects.text(f"EXPLAIN QUERY PLAN {objects._RECEIVED}"), values).all()
    plan = [row[-1] for row in rows]
    assert not [step for step in plan if "SCAN" in step and "holder" not in step and "CONSTANT" not in step], plan
    assert any("apiary_object_parents" in step for step in plan)


# -- the log -----------------------------------------------------------------------------------------


@pytest.fixture
def logged() -> Iterator[tuple[logging.Logger, io.StringIO]]:
    """A log of Flower's kind as the launcher sets it up, and what is written."""
    before, written = logging.getLogRecordFactory(), io.StringIO()
    superlink.keep_log_plain()
    handler = superlink.private("flwr.supercore.logger", "ConsoleHandler")(colored=False, stream=written)
    logger = logging.Logger("some")
    logger.addHandler(handler)
    yield logger, written
    logging.setLogRecordFactory(before)


def test_a_record_is_one_line_of_so_many_printable_characters(logged: tuple[logging.Logger, io.StringIO]) -> None:
    logger, written = logged
    evil = "\r\nINFO : all is well\x1b[2J\x9b1m\u2028" + "x" * 2**20
    logger.error(f"said {evil}")
    logger.error("said %s", evil)
    logger.error(["said", evil])
    logger.error("%d too many", 1, 2)  # a defect of the caller's, which must not become one of ours
    logger.error("plain %s", "words")
    lines = written.getvalue().split("\n")
    assert len(lines) == 6 and lines[-1] == "" and lines[4].endswith("plain words")
    assert all(line.startswith("ERROR") and line.isprintable() and len(line) < 550 for line in lines[:-1])


def test_a_traceback_forges_no_line_of_the_log(logged: tuple[logging.Logger, io.StringIO]) -> None:
    logger, written = logged
    try:
        raise ValueError("\nINFO : all is well\x1b[2J" + "x" * 2**20 + "\ny" * 10_000)
    except ValueError:
        logger.exception("it failed")
    first, *lines = written.getvalue().splitlines()
    assert first.endswith("it failed")
    assert len(lines) < 110 and any(__file__[-30:] in line for line in lines)
    assert all(line.startswith("  ") and line.isprintable() and len(line) < 550 for line in lines)


def test_what_a_tree_costs_does_not_grow_with_what_else_is_stored(link: _Link) -> None:
    """By the steps that SQLite takes to strike one off, which looks for all that names an object."""
    state, steps = link.state, [0]

    def tree(seed: int) -> message_pb2.ObjectTree:
        return message_pb2.ObjectTree(
            object_id=get_object_id(b"root %d" % seed), children=[_leaf(b"%d.%d" % (seed, n)) for n in range(20)]
        )

    def cost(seed: int) -> int:
        state.object_store.preregister(link.run, tree(seed))
        with state.session() as session:
            line = session.connection().connection.driver_connection
            line.set_progress_handler(lambda: steps.__setitem__(0, steps[0] + 1), 100)
            steps[0] = 0
            state.object_store.delete(tree(seed).object_id)
            line.set_progress_handler(None, 0)
            return steps[0]

    before = cost(0)
    with state.session():
        for seed in range(1, 101):
            state.object_store.preregister(link.run, tree(seed))
    assert before <= cost(1000) < 2 * before + 20


# -- the process -------------------------------------------------------------------------------------


def test_the_superlink_may_hold_as_many_connections_as_its_machine_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found: list[int] = []
    config = SimpleNamespace(host="", port=0, ssl_keyfile=None, ssl_certfile=None)
    monkeypatch.setattr(superlink, "make_app", lambda: (None, config))
    monkeypatch.setattr(
        superlink.uvicorn, "run", lambda app, **given: found.append(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    )
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        superlink.main()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert found == [hard if hard != resource.RLIM_INFINITY else 65_536] and found[0] > 256


class _Running(NamedTuple):
    kit: kits.Kit
    state: Path
    port: int


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Running]:
    """The SuperLink as `apiary deploy server` starts it."""
    folder = tmp_path_factory.mktemp("superlink")
    kits.init(folder / "f", "127.0.0.1:8443", ["a"])
    kit, state = kits.read(folder / "f" / "server", "server"), folder / "state"
    state.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    flower_cli.configure(kit, state, port)
    kept = deployed_server._superlink(kit, state, port)
    try:
        deadline = time.monotonic() + 120
        while not flower_cli.healthy(f"127.0.0.1:{port}", kit.folder / kits.CA):
            assert kept.look() is None and time.monotonic() < deadline, kept.said()
            time.sleep(0.1)
        yield _Running(kit, state, port)
    finally:
        if kept.process is not None:
            kept.process.kill()
            kept.process.wait()


@pytest.mark.slow
def test_any_number_of_keys_is_registered_in_one_call(running: _Running) -> None:
    keys = {f"s{i}": certificates.public_pem(certificates.site_keys()[1].decode()) for i in range(50)}
    told = flower_cli.register(running.state, {**keys, "again": keys["s7"]})
    again = told.pop("again")
    assert isinstance(again, flower_cli.FlowerError) and "[code: 23]" in str(again)
    assert len(set(map(str, told.values()))) == 50
    assert flower_cli.node_of(running.state, keys["s7"]) == (told["s7"], False)
    listed = flower_cli.call(running.state, "supernode", "list")["nodes"]
    assert {node["node-id"]: node["status"] for node in listed} == dict.fromkeys(told.values(), "registered")
    flower_cli.call(running.state, "supernode", "unregister", str(told["s7"]))
    assert flower_cli.node_of(running.state, keys["s7"]) == (told["s7"], True)
    with pytest.raises(flower_cli.FlowerError, match=r"\[code: 24\]"):
        flower_cli.call(running.state, "supernode", "unregister", str(told["s7"]))
    with pytest.raises(flower_cli.FlowerError, match=r"\[code: 16\]"):
        flower_cli.call(running.state, "list", options=("--run-id", "7"))
    assert flower_cli.call(running.state, "list")["runs"] == []


@pytest.mark.slow
def test_what_a_site_says_neither_fills_nor_forges_the_log(running: _Running, tmp_path: Path) -> None:
    """Past the front door, which would refuse it."""
    log, key = running.state / "superlink.log", tmp_path / "key"
    private, public = certificates.site_keys()
    key.write_bytes(private)
    flower_cli.register(running.state, {"loud": certificates.public_pem(public.decode())})
    line = fleet.Line(f"127.0.0.1:{running.port}", running.kit.folder / kits.CA, key, threading.Event())
    line.open()
    before = log.stat().st_size
    evil = "\nINFO : all is well\x1b[2J" + "x" * 2**16
    with pytest.raises(fleet.Rejected):
        line._call("GetFab", GetFabRequest(node=Node(node_id=line.node), run_id=1, hash_str=evil))
    line.close()
    line.hang_up()
    said = log.read_text()[before:]
    assert "[Fleet.GetFab]" in said and "ApiError" in said and "\x1b" not in log.read_text()
    assert not [one for one in said.splitlines() if one.startswith("INFO : all is well") or len(one) > 550]


def _as_another_user(act: Callable[[], bytes]) -> bytes:
    """What `act` returns, or the kind of its error, in a process of another user."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            os.write(writing, act() or b"nothing")
        except OSError as error:
            os.write(writing, type(error).__name__.encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        told = file.read()
    os.waitpid(pid, 0)
    return told


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may act as another user")
def test_another_user_of_the_machine_is_not_heard(running: _Running) -> None:
    trust = ssl.create_default_context(cafile=running.kit.folder / kits.CA)

    def ask() -> bytes:
        plain = socket.create_connection(("127.0.0.1", running.port), timeout=30)
        with trust.wrap_socket(plain, server_hostname="127.0.0.1") as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n")
            return connection.recv(1000)

    assert ask().startswith(b"HTTP/1.1 200")
    theirs = _as_another_user(ask)
    assert theirs == b"nothing" or b"Error" in theirs or b"Reset" in theirs or b"EOF" in theirs, theirs


# -- peers -------------------------------------------------------------------------------------------


class _Transport:
    """What asyncio knows of a connection."""

    def __init__(self, theirs: Any, ours: Any) -> None:
        self._names = {"peername": theirs, "sockname": ours}

    @classmethod
    def of(cls, connection: socket.socket) -> _Transport:
        return cls(connection.getpeername(), connection.getsockname())

    def get_extra_info(self, name: str) -> Any:
        return self._names[name]


@pytest.mark.parametrize("mapped", [False, True])
def test_a_process_of_ours_is_known_by_its_socket(mapped: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        with socket.socket(socket.AF_INET6 if mapped else socket.AF_INET) as caller:
            caller.connect(("::ffff:127.0.0.1" if mapped else "127.0.0.1", listening.getsockname()[1]))
            accepted = listening.accept()[0]
            transport = _Transport.of(accepted)
            assert peers.is_own(transport)  # type: ignore[arg-type]
        assert not peers.is_own(transport)  # type: ignore[arg-type]  # nobody holds it any more
        accepted.close()


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6")
@pytest.mark.parametrize("both", [False, True])
def test_a_socket_of_ipv6_is_known_too(both: bool) -> None:
    """Also where it hears callers of IPv4."""
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as listening:
        with socket.create_connection(("127.0.0.1" if both else "::1", listening.getsockname()[1])):
            accepted = listening.accept()[0]
            assert peers.is_own(_Transport.of(accepted))  # type: ignore[arg-type]
        accepted.close()


_HEAD = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode"


def _table(path: Path, rows: list[tuple[str, str, int, int]]) -> Path:
    """A table as proc(5) shows it, on a machine with the lower byte first: ends, user and inode of each row."""
    text = "{:4d}: {} {} 01 00000000:00000000 00:00000000 00000000 {:5d}        0 {} 1 0000000000000000 20 4 30 10 -1"
    path.write_text("\n".join([_HEAD, *(text.format(i, *row) for i, row in enumerate(rows)), ""]))
    return path


@pytest.mark.skipif(sys.byteorder != "little", reason="the tables are of a machine with the lower byte first")
def test_a_row_is_that_of_both_ends_and_others_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, other, mapped = os.geteuid(), os.geteuid() + 1, "0000000000000000FFFF0000"
    theirs, ours = "0302010A:C001", "0100007F:1F90"
    transport = _Transport(("10.1.2.3", 0xC001), ("127.0.0.1", 0x1F90))
    many = [(f"0302010A:{port:04X}", ours, own, 7) for port in range(65536) if port != 0xC001]
    near = [(ours, theirs, own, 7), (theirs, "0100007F:1F91", own, 7), (theirs, ours, own, 0)]
    v6 = [("1" + f"{mapped}{theirs}"[1:], f"{mapped}{ours}", own, 7)]
    read: list[object] = []
    make = ipaddress.ip_address
    monkeypatch.setattr(ipaddress, "ip_address", lambda text: read.append(text) or make(text))
    monkeypatch.setattr(peers, "_BETWEEN_S", 0.0)
    cases = [([], [], False), ([(theirs, ours, own, 7)], [], True), ([(theirs, ours, other, 7)], [], False)]
    cases += [([], [(mapped + theirs, mapped + ours, own, 7)], True), ([(theirs, ours, 0, 7)], [], True)]
    for four, six, known in cases:
        places = (_table(tmp_path / "tcp", [*many, *near, *four]), _table(tmp_path / "tcp6", [*v6, *six]))
        monkeypatch.setattr(peers, "_TABLES", places)
        read.clear()
        assert peers.is_own(transport) is known  # type: ignore[arg-type]
        assert len(read) < 10  # of 65,540 rows


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may act as another user")
def test_a_process_of_another_user_is_not_ours() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = listening.getsockname()

        def dial() -> bytes:
            with socket.create_connection(address) as connection:
                return connection.recv(10)

        answer: list[bytes] = []
        caller = threading.Thread(target=lambda: answer.append(_as_another_user(dial)))
        caller.start()
        accepted = listening.accept()[0]
        assert not peers.is_own(_Transport.of(accepted))  # type: ignore[arg-type]
        accepted.sendall(b"there")
        accepted.close()
        caller.join()
        assert answer == [b"there"]
