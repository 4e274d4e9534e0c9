"""The front door: whose calls it passes on, how much of them it takes, and how long it waits for whom."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import datetime
import hashlib
import itertools
import json
import resource
import socket
import sqlite3
import ssl
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from deployment import Deployment, descendants, write_rows
from flwr.app import Array, ArrayRecord, Error, RecordDict
from flwr.app import Message as FlowerMessage
from flwr.common.serde import message_to_proto
from flwr.proto.fab_pb2 import GetFabRequest
from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest, PullMessagesRequest, PushMessagesRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    Message,
    Metadata,
    ObjectTree,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.task_identity import TaskIdentity
from starlette.testclient import TestClient

from apiary.transport import sealed
from deploy import kits, processes, session
from deploy.admission import OBJECT_BYTES, OBJECTS, Admission, Registry
from deploy.connections import Limits, Places
from deploy.proxy import Bounds, Refusals, config, make_door

# -- sites, and what they sign -------------------------------------------------------------------

_ORDER = int(  # of the curve P-384: SEC 2, section 2.5.1
    "ffffffffffffffffffffffffffffffffffffffffffffffffc7634d81f4372ddf581a0db248b0a77aecec196accc52973", 16
)


class _Site:
    """A site that signs as Flower's SuperNode does, written from its protocol and without its code or the door's."""

    def __init__(self, name: str, node: int) -> None:
        self.name, self.node = name, node
        self.key = ec.generate_private_key(ec.SECP384R1())
        public = self.key.public_key()
        self.pem = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        self.line = public.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()

    def stamp(self, off_s: float = 0.0) -> str:
        return (datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=off_s)).isoformat()

    def signed(self, off_s: float = 0.0, stamp: str | None = None) -> dict[str, str]:
        stamp = self.stamp(off_s) if stamp is None else stamp
        signature = self.key.sign(stamp.encode(), ec.ECDSA(hashes.SHA256()))
        return {
            "flwr-public-key": base64.b64encode(self.pem).decode(),
            "flwr-timestamp": stamp,
            "flwr-signature": base64.b64encode(signature).decode(),
        }

    def beat(self) -> bytes:
        return SendNodeHeartbeatRequest(node=Node(node_id=self.node), heartbeat_interval=30).SerializeToString()


class _Kit:
    """The folder of keys and the file of nodes that the server keeps."""

    def __init__(self, folder: Path) -> None:
        self.sites, self.nodes = folder / "sites", folder / "nodes.json"
        self.sites.mkdir()
        self.north, self.south = _Site("north", 2**64 - 7), _Site("south", 11)
        for site in (self.north, self.south):
            self.write(site)
        self.register(self.north, self.south)

    def write(self, site: _Site) -> None:
        (self.sites / f"{site.name}.pub").write_text(f"{site.line} {site.name}\n")

    def register(self, *sites: _Site) -> None:
        self.nodes.write_text(json.dumps({site.name: {"node": str(site.node), "key": site.line} for site in sites}))

    def checks(self, **more: Any) -> Admission:
        return Admission(Registry(self.sites, self.nodes), **{"began": 0.0, **more})


@pytest.fixture
def kit(tmp_path: Path) -> _Kit:
    return _Kit(tmp_path)


# -- a SuperLink that is none --------------------------------------------------------------------


class _Behind(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, str]] = []
        self.lines: set[int] = set()  # the ports that calls came from
        self.status = 200
        self.more = b""
        self.go_on = threading.Event()
        self.go_on.set()
        self.waits = {"push-object"}  # the calls that are answered once it may go on
        super().__init__(("127.0.0.1", 0), _Echo)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Echo(BaseHTTPRequestHandler):
    server: _Behind
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.seen.append((self.path, hashlib.sha256(body).hexdigest(), self.headers["flwr-timestamp"] or ""))
        self.server.lines.add(self.client_address[1])
        if self.path.rpartition("/")[2] in self.server.waits:
            assert self.server.go_on.wait(60)
        self.send_response(self.server.status)
        self.send_header("content-length", str(len(body) + len(self.server.more)))
        self.end_headers()
        self.wfile.write(body + self.server.more)

    def do_GET(self) -> None:
        self.server.seen.append((self.path, "", ""))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(OSError):
            super().handle()


@pytest.fixture
def behind() -> Iterator[_Behind]:
    with _Behind() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()  # looks so often for its end
        yield server
        server.go_on.set()
        server.shutdown()


def _post(outside: TestClient, call: str, body: bytes, headers: dict[str, str]) -> httpx.Response:
    return outside.post(f"/v1/fleet/{call}", content=body, headers=headers)


# -- whose calls ---------------------------------------------------------------------------------


def test_the_door_passes_a_sites_call_on_as_it_is(behind: _Behind, kit: _Kit) -> None:
    body = np.arange(5 * 2**17, dtype=np.int64).tobytes()  # 5 MiB
    with TestClient(make_door(behind.url, kit.checks())) as outside:
        headers = kit.north.signed()
        reply = _post(outside, "push-object", body, headers)
        assert reply.status_code == 200 and reply.content == body
        assert behind.seen == [
            ("/v1/fleet/push-object", hashlib.sha256(body).hexdigest(), headers["flwr-timestamp"]),
        ]
        behind.status = 412
        assert _post(outside, "send-node-heartbeat", kit.south.beat(), kit.south.signed()).status_code == 412
        assert outside.get("/health").status_code == 200


def test_health_is_asked_once_for_many(behind: _Behind, kit: _Kit) -> None:
    with TestClient(make_door(behind.url, kit.checks())) as outside:
        began = time.monotonic()
        assert {outside.get("/health").status_code for _ in range(50)} == {200}
        assert len(behind.seen) <= 1 + (time.monotonic() - began)


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE"])
@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/list-runs",
        "/v1/control/start-run",
        "/v1/runtime/acquire-task",
        "/v1/fleet/../control/start-run",
        "/v1/fleet/%2e%2e/control/start-run",
        "/v1/fleet/%2e%2e%2fcontrol%2fstart-run",
        "/v1/fleet//v1/control/start-run",
        "/v1/fleet/register-node",
        "/v1/fleet/unregister-node",
        "/v1/fleet/",
        "/openapi.json",
        "/docs",
        "/",
        "//v1/control/start-run",
        "/health/../v1/control/start-run",
    ],
)
def test_the_door_lets_nothing_else_through(behind: _Behind, kit: _Kit, method: str, path: str) -> None:
    with TestClient(make_door(behind.url, kit.checks())) as outside:
        url = httpx.URL("http://testserver").copy_with(raw_path=path.encode())
        answer = outside.request(method, url, content=b"x", headers=kit.north.signed())
        assert answer.status_code in (404, 405) and answer.headers["connection"] == "close"
    assert behind.seen == []


def test_a_server_that_starts_again_is_told_as_such(kit: _Kit) -> None:
    """SuperNodes try again after 502; other errors end them."""
    with TestClient(make_door(f"http://127.0.0.1:{processes.free_port()}", kit.checks())) as outside:
        assert _post(outside, "send-node-heartbeat", kit.north.beat(), kit.north.signed()).status_code == 502
        assert outside.get("/health").status_code == 502


def test_a_call_is_only_tried_again_for_so_long(behind: _Behind, kit: _Kit) -> None:
    """A locked database is a 500 that passes; Flower's client gives up at a 500 and tries again after a 503."""
    behind.status = 500
    with TestClient(make_door(behind.url, kit.checks())) as outside:

        def beat() -> httpx.Response:
            return _post(outside, "send-node-heartbeat", kit.north.beat(), kit.north.signed())

        first = beat()
        assert first.status_code == 503 and int(first.headers["retry-after"]) > 0
        assert [beat().status_code for _ in range(14)][-1] == 500
        behind.status = 200
        assert beat().status_code == 200
        behind.status = 500
        assert beat().status_code == 503


def _without(headers: dict[str, str], name: str) -> dict[str, str]:
    return {key: value for key, value in headers.items() if key != name}


def _unsigned(kit: _Kit) -> dict[str, dict[str, str]]:
    north, stranger = kit.north, _Site("north", 5)
    here = datetime.datetime.now()
    signed = north.signed()
    return {
        "nothing": {},
        "no signature": _without(signed, "flwr-signature"),
        "no key": _without(signed, "flwr-public-key"),
        "a stranger's key": stranger.signed(),
        "a stranger's signature": {**stranger.signed(), "flwr-public-key": signed["flwr-public-key"]},
        "another site's signature": {**kit.south.signed(), "flwr-public-key": signed["flwr-public-key"]},
        "another time": {**signed, "flwr-timestamp": north.stamp(1)},
        "no time": north.signed(stamp="now"),
        "no time zone": north.signed(stamp=here.isoformat()),
        "a time that is none": north.signed(stamp="0001-01-01T00:00:00+23:59"),
        "no base64": {**signed, "flwr-signature": "%%%"},
        "no signature's form": {**signed, "flwr-signature": base64.b64encode(b"x" * 96).decode()},
        "old": north.signed(-61),
        "very old": north.signed(-86_400),
        "to come": north.signed(6),
    }


def test_who_does_not_prove_a_registered_key_is_answered_before_anything_is_read(behind: _Behind, kit: _Kit) -> None:
    async def talk(port: int) -> dict[str, tuple[int, str, bytes]]:
        answers = {}
        for what in _unsigned(kit):
            headers = _unsigned(kit)[what]  # signed just now: seconds decide of some
            head = "".join(f"{name}: {value}\r\n" for name, value in headers.items()) + "content-length: 5000000"
            async with _sent(port, b"x", head) as reply:  # the door does not wait for the rest
                whole = await asyncio.wait_for(reply.read(), 60)
            head_back, _, text = whole.partition(b"\r\n\r\n")
            answers[what] = int(head_back.split()[1]), head_back.decode().lower(), text
        return answers

    answers = asyncio.run(_served(make_door(behind.url, kit.checks()), talk))
    assert {what: status for what, (status, _, _) in answers.items()} == dict.fromkeys(answers, 401)
    assert all("connection: close" in head for _, head, _ in answers.values())
    assert behind.seen == []
    # Who asks with a wrong clock sees the right time, once.
    assert answers["very old"][1].count("\r\ndate: ") == 1
    assert b"86400 s behind" in answers["very old"][2] and b"6 s ahead" in answers["to come"][2]


def test_an_unknown_key_hears_from_the_door_what_flower_says(behind: _Behind, kit: _Kit) -> None:
    """When it begins a session: its SuperNode tells of nothing else."""
    stranger = _Site("north", 5)
    request = ActivateNodeRequest(public_key=stranger.pem, heartbeat_interval=30).SerializeToString()
    with TestClient(make_door(behind.url, kit.checks())) as outside:
        answer = _post(outside, "activate-node", request, stranger.signed())
        assert answer.status_code == 412 and answer.headers["connection"] == "close"
        told = FlowerError.from_json(answer.text)
        assert told is not None and told.code == ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED
        assert _post(outside, "activate-node", request, {}).status_code == 401
    assert behind.seen == []


def test_a_clock_that_is_a_little_off_passes(behind: _Behind, kit: _Kit) -> None:
    with TestClient(make_door(behind.url, kit.checks())) as outside:
        for off_s in (-50.0, 0.0, 4.0):
            assert _post(outside, "send-node-heartbeat", kit.north.beat(), kit.north.signed(off_s)).status_code == 200


def _flipped(headers: dict[str, str]) -> dict[str, str]:
    r, s = decode_dss_signature(base64.b64decode(headers["flwr-signature"]))
    return {**headers, "flwr-signature": base64.b64encode(encode_dss_signature(r, _ORDER - s)).decode()}


def test_a_signature_is_taken_once(behind: _Behind, kit: _Kit) -> None:
    """For any call; and so is its twin, which anybody can make of it without the key."""
    headers, pull = kit.north.signed(), PullMessagesRequest(node=Node(node_id=kit.north.node)).SerializeToString()
    kit.north.key.public_key().verify(  # the twin is valid
        base64.b64decode(_flipped(headers)["flwr-signature"]),
        headers["flwr-timestamp"].encode(),
        ec.ECDSA(hashes.SHA256()),
    )
    with TestClient(make_door(behind.url, kit.checks())) as outside:
        assert _post(outside, "send-node-heartbeat", kit.north.beat(), headers).status_code == 200
        for again in (headers, _flipped(headers)):
            assert _post(outside, "send-node-heartbeat", kit.north.beat(), again).status_code == 401
            assert _post(outside, "pull-messages", pull, again).status_code == 401
        # Two honest calls at one time have two signatures.
        twin = kit.north.signed(stamp=headers["flwr-timestamp"])
        assert _post(outside, "send-node-heartbeat", kit.north.beat(), twin).status_code == 200
    assert len(behind.seen) == 2


def test_a_signature_is_remembered_until_its_time_is_over(kit: _Kit) -> None:
    now = [1_000_000.0]
    checks = kit.checks(clock=lambda: now[0])

    def raw(at: float) -> list[tuple[bytes, bytes]]:
        stamp = datetime.datetime.fromtimestamp(at, datetime.UTC).isoformat()
        return [(name.encode(), value.encode()) for name, value in kit.north.signed(stamp=stamp).items()]

    for off_s in (-59.0, 0.0, 4.9):
        at = now[0] + off_s
        head = raw(at)
        checks.admit(head)
        while now[0] <= at + 75:
            for _ in range(2):  # other calls do not push it out
                checks.admit(raw(now[0]))
            with pytest.raises(Exception, match=r"used signature|clock off"):
                checks.admit(head)
            now[0] += 3


def test_a_clock_of_the_server_that_is_set_back_shuts_nobody_out(kit: _Kit) -> None:
    now = [1_000_000.0]
    checks = kit.checks(clock=lambda: now[0], began=now[0])

    def admit() -> None:
        stamp = datetime.datetime.fromtimestamp(now[0], datetime.UTC).isoformat()
        checks.admit([(name.encode(), value.encode()) for name, value in kit.north.signed(stamp=stamp).items()])

    now[0] -= 7200
    with pytest.raises(Exception, match="just started"):
        admit()
    now[0] += 6
    admit()


def test_a_site_that_signs_without_end_fills_no_memory(kit: _Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.admission._SIGNATURES", 20)
    checks = kit.checks()

    def admit(site: _Site) -> None:
        checks.admit([(name.encode(), value.encode()) for name, value in site.signed().items()])

    for _ in range(20):
        admit(kit.north)
    with pytest.raises(Exception, match="too many calls"):
        admit(kit.north)
    admit(kit.south)


def test_a_door_that_has_just_started_takes_no_call_from_before(behind: _Behind, kit: _Kit) -> None:
    """It remembers no signature of then. The site is not refused: it comes again."""
    checks = kit.checks(began=time.time())
    with TestClient(make_door(behind.url, checks)) as outside:
        for off_s in (-30.0, -0.1, 0.0):
            assert _post(outside, "send-node-heartbeat", kit.north.beat(), kit.north.signed(off_s)).status_code == 503
    with TestClient(make_door(behind.url, kit.checks(began=time.time() - 60))) as outside:
        assert _post(outside, "send-node-heartbeat", kit.north.beat(), kit.north.signed()).status_code == 200


# -- the list of keys ----------------------------------------------------------------------------


def test_the_list_of_keys_is_the_folder(behind: _Behind, kit: _Kit) -> None:
    with TestClient(make_door(behind.url, kit.checks())) as outside:

        def status(site: _Site) -> int:
            return _post(outside, "send-node-heartbeat", site.beat(), site.signed()).status_code

        assert (status(kit.north), status(kit.south)) == (200, 200)
        (kit.sites / "south.pub").unlink()  # though the server has not struck it off yet
        assert (status(kit.north), status(kit.south)) == (200, 401)
        east = _Site("east", 99)
        assert status(east) == 401
        kit.write(east)
        assert status(east) == 503  # the server takes it up within seconds
        late = _post(outside, "send-node-heartbeat", east.beat(), east.signed())
        assert late.text == session.NOT_REGISTERED  # by which the site knows it from a busy server
        kit.register(kit.north, east)
        assert (status(kit.north), status(east)) == (200, 200)
        new = _Site("east", 100)
        kit.write(new)  # the same folder entry, another key
        deadline = time.monotonic() + 30
        while status(east) != 401:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert status(new) == 503
        kit.register(kit.north, new)
        assert status(new) == 200


def test_a_file_that_is_being_copied_strikes_nobody_off(behind: _Behind, kit: _Kit) -> None:
    with TestClient(make_door(behind.url, kit.checks())) as outside:

        def status(site: _Site) -> int:
            return _post(outside, "send-node-heartbeat", site.beat(), site.signed()).status_code

        assert status(kit.north) == 200
        (kit.sites / "north.pub").write_text("ecdsa-sha2-nistp384 AAAA")
        kit.nodes.write_text('{"north": {"no')
        (kit.sites / "other.pub").write_text("")  # the folder has changed
        assert (status(kit.north), status(kit.south)) == (200, 200)


# -- in whose name -------------------------------------------------------------------------------


_ID = hashlib.sha256(b"").hexdigest()


def _bodies(node: int, key: bytes, source: int) -> dict[str, Any]:
    who = Node(node_id=node)
    ids = {"message_id": _ID, "reply_to_message_id": _ID, "group_id": "1", "message_type": "train"}
    reply = Message(metadata=Metadata(run_id=1, src_node_id=source, dst_node_id=1, **ids))
    return {
        "activate-node": ActivateNodeRequest(public_key=key, heartbeat_interval=30),
        "deactivate-node": DeactivateNodeRequest(node_id=node),
        "send-node-heartbeat": SendNodeHeartbeatRequest(node=who, heartbeat_interval=30),
        "pull-messages": PullMessagesRequest(node=who),
        "push-messages": PushMessagesRequest(
            node=who, messages_list=[reply], message_object_trees=[ObjectTree(object_id=_ID)]
        ),
        "get-run": GetRunRequest(node=who, run_id=1),
        "get-fab": GetFabRequest(node=who, hash_str=_ID, run_id=1),
        "pull-object": PullObjectRequest(node=who, run_id=1, object_id=_ID),
        "confirm-message-received": ConfirmMessageReceivedRequest(node=who, run_id=1, message_object_id=_ID),
    }


def test_a_site_speaks_in_its_own_name_alone(behind: _Behind, kit: _Kit) -> None:
    north, south = kit.north, kit.south
    with TestClient(make_door(behind.url, kit.checks())) as outside:
        for call, own in _bodies(north.node, north.pem, north.node).items():
            assert _post(outside, call, own.SerializeToString(), north.signed()).status_code == 200, call
        passed = len(behind.seen)
        for call, foreign in _bodies(south.node, south.pem, south.node).items():
            assert _post(outside, call, foreign.SerializeToString(), north.signed()).status_code == 401, call
            assert _post(outside, call, b"\xff" * 40, north.signed()).status_code == 400, call
            if call != "activate-node":
                assert _post(outside, call, b"", north.signed()).status_code == 401, call
    assert len(behind.seen) == passed == 9


def test_a_site_answers_for_itself_alone(behind: _Behind, kit: _Kit) -> None:
    """Flower compares the caller with `node`, and the message's source only with whom the question went to."""
    north, south = kit.north, kit.south
    as_south = _bodies(north.node, north.pem, south.node)["push-messages"]
    two = _bodies(north.node, north.pem, north.node)["push-messages"]
    two.messages_list.append(as_south.messages_list[0])
    with TestClient(make_door(behind.url, kit.checks())) as outside:
        for request in (as_south, two):
            assert _post(outside, "push-messages", request.SerializeToString(), north.signed()).status_code == 401
    assert behind.seen == []


def _with(request: Any, *path: str, text: str) -> Any:
    """The request with this text in the field at the end of the path; of a repeated field, in its first item."""
    held = type(request).FromString(request.SerializeToString())
    place = held
    for name in path[:-1]:
        place = getattr(place, name)
        place = place[0] if hasattr(place, "append") else place
    if hasattr(getattr(place, path[-1]), "append"):
        getattr(place, path[-1]).append(text)
    else:
        setattr(place, path[-1], text)
    return held


def test_what_flower_writes_into_its_log_is_an_id_or_goes_no_further(behind: _Behind, kit: _Kit) -> None:
    """Flower logs, and partly echoes, the texts of a call as they come, which may be 64 KiB of anything."""
    metadata = ("messages_list", "metadata")
    places = [
        ("get-fab", "hash_str"),
        ("pull-object", "object_id"),
        ("confirm-message-received", "message_object_id"),
        ("pull-messages", "message_ids"),
        *(("push-messages", *metadata, name) for name in ("message_id", "reply_to_message_id")),
        ("push-messages", "message_object_trees", "object_id"),
    ]
    words = [("push-messages", *metadata, name) for name in ("group_id", "message_type")]
    odd = ["x", _ID.upper(), _ID[1:], _ID + "\n", f"\n{_ID}", _ID + "0", "\x1b[2J" + _ID[4:], "e" * 60_000, "é" * 64]
    site = kit.north
    bodies = _bodies(site.node, site.pem, site.node)
    with TestClient(make_door(behind.url, kit.checks())) as outside:

        def status(call: str, request: Any) -> int:
            answer = _post(outside, call, request.SerializeToString(), site.signed())
            assert len(answer.content) < 100 or answer.status_code == 200
            return answer.status_code

        for call, *path in [*places, *words]:
            for text in odd[odd.index(_ID + "\n") :] if (call, *path) in words else odd:
                assert status(call, _with(bodies[call], *path, text=text)) == 400, (call, path, text)
        below = _bodies(site.node, site.pem, site.node)["push-messages"]
        below.message_object_trees[0].children.add(object_id=_ID).children.add(object_id="x")
        assert status("push-messages", below) == 400
        assert behind.seen == []
        for call, *path in places:
            assert status(call, _with(bodies[call], *path, text="")) == 200, (call, path)


def test_what_flower_says_itself_passes(behind: _Behind, kit: _Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer as Flower makes it, with a failure's text as well, which it does not log."""
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    asked = FlowerMessage(RecordDict({"a": ArrayRecord([np.zeros(3)])}), kit.north.node, "query.hello", group_id="12")
    asked.metadata.__dict__["_message_id"] = asked.object_id
    failed = FlowerMessage(Error(2, "x" * 3000 + "\n\x1b"), reply_to=asked)
    for reply in (FlowerMessage(asked.content, reply_to=asked), failed):
        reply.metadata.__dict__ |= {"_message_id": reply.object_id, "_src_node_id": kit.north.node}
        head = message_to_proto(reply)
        trees = [get_object_tree(reply)]
        who = Node(node_id=kit.north.node)
        request = PushMessagesRequest(
            node=who, messages_list=[head], message_object_trees=trees, clientapp_runtime_list=[0.5]
        )
        with TestClient(make_door(behind.url, kit.checks())) as outside:
            assert _post(outside, "push-messages", request.SerializeToString(), kit.north.signed()).status_code == 200


# -- how much ------------------------------------------------------------------------------------


def test_every_object_of_a_big_adapter_passes() -> None:
    """The bound follows from how Flower cuts arrays; a packed adapter is one array."""
    array = Array("uint8", (12_000_000,), "apiary", np.random.default_rng(0).bytes(12_000_000))
    objects = get_all_nested_objects(RecordDict({"adapter": ArrayRecord({"packed": array})}))
    sizes = [
        PushObjectRequest(
            node=Node(node_id=2**64 - 1),
            run_id=2**64 - 1,
            object_id=name,
            object_content=one.deflate(),
            session_id="s" * 64,
        ).ByteSize()
        for name, one in objects.items()
    ]
    assert 5 * 2**20 < max(sizes) <= OBJECT_BYTES < 2 * max(sizes)


def test_a_call_that_is_too_large_or_hides_its_size_is_refused(behind: _Behind, kit: _Kit) -> None:
    cases = {
        ("push-object", "content-length: 5308417"): 413,
        ("push-object", "content-length: 1073741824"): 413,
        ("pull-messages", "content-length: 65537"): 413,
        ("push-messages", "content-length: 65537"): 413,
        ("push-object", "transfer-encoding: chunked"): 411,
        ("push-object", "x: y"): 411,
        ("push-object", "content-length: 5\r\ntransfer-encoding: chunked"): 411,
    }

    async def talk(port: int) -> list[int]:
        found = []
        for call, size in cases:
            head = "".join(f"{name}: {value}\r\n" for name, value in kit.north.signed().items()) + size
            async with _sent(port, b"", head, call) as reply:
                found.append(int((await asyncio.wait_for(reply.readline(), 60)).split()[1]))
                await asyncio.wait_for(reply.read(), 60)  # and it hangs up
        return found

    found = asyncio.run(_served(make_door(behind.url, kit.checks()), talk))
    assert dict(zip(cases, found, strict=True)) == cases
    assert behind.seen == []


def test_objects_on_their_way_are_bounded_and_nothing_else_waits_for_them(behind: _Behind, kit: _Kit) -> None:
    bounds = Bounds(site_flight=2500, flight=4000, patience_s=0.3)
    behind.go_on.clear()

    async def talk(port: int) -> tuple[list[int], list[int], list[int]]:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}/v1/fleet", trust_env=False, timeout=90) as out:

            async def push(site: _Site) -> int:
                return (await out.post("/push-object", content=b"x" * 1000, headers=site.signed())).status_code

            held = [asyncio.create_task(push(kit.north)) for _ in range(2)]
            while len(behind.seen) < 2:
                await asyncio.sleep(0.01)
            first = [await push(kit.north)]  # 3,000 bytes of one site
            held += [asyncio.create_task(push(kit.south)) for _ in range(2)]
            while len(behind.seen) < 4:
                await asyncio.sleep(0.01)
            first += [await push(kit.south)]
            beat = await out.post("/send-node-heartbeat", content=kit.north.beat(), headers=kit.north.signed())
            behind.go_on.set()
            passed = [await task for task in held]
            return first, [beat.status_code], [*passed, await push(kit.north)]

    first, beat, after = asyncio.run(_served(make_door(behind.url, kit.checks(), bounds=bounds), talk))
    assert (first, beat, after) == ([503, 503], [200], [200] * 5)


def test_objects_of_all_sites_together_are_bounded(behind: _Behind, kit: _Kit) -> None:
    behind.go_on.clear()

    async def talk(port: int) -> list[int]:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}/v1/fleet", trust_env=False, timeout=90) as out:

            async def push(site: _Site) -> int:
                return (await out.post("/push-object", content=b"x" * 1000, headers=site.signed())).status_code

            held = asyncio.create_task(push(kit.north))
            while not behind.seen:
                await asyncio.sleep(0.01)
            refused = await push(kit.south)
            waiting = asyncio.create_task(push(kit.south))  # has its turn when the first is through
            await asyncio.sleep(0.05)
            behind.go_on.set()
            return [refused, await held, await waiting]

    bounds = Bounds(flight=1500, patience_s=0.5)
    assert asyncio.run(_served(make_door(behind.url, kit.checks(), bounds=bounds), talk)) == [503, 200, 200]


def _tree(width: int, depth: int = 1) -> ObjectTree:
    """A root with so many chains of so many objects."""

    def name(place: int, step: int) -> str:
        return hashlib.sha256(b"%d.%d" % (place, step)).hexdigest()

    tree = ObjectTree(object_id=name(width, depth))
    for place in range(width):
        at = tree
        for step in range(depth):
            at = at.children.add(object_id=name(place, step))
    return tree


def test_an_answer_has_so_many_objects_at_most(behind: _Behind, kit: _Kit) -> None:
    """Each costs the SuperLink some queries, in which all others wait."""
    request = _bodies(kit.north.node, kit.north.pem, kit.north.node)["push-messages"]
    with TestClient(make_door(behind.url, kit.checks())) as outside:

        def status(tree: ObjectTree) -> int:
            request.message_object_trees[0].CopyFrom(tree)
            return _post(outside, "push-messages", request.SerializeToString(), kit.north.signed()).status_code

        assert [status(_tree(899)), status(_tree(29, 31))] == [200, 200]
        passed = len(behind.seen)
        assert {status(_tree(900)), status(_tree(930)), status(_tree(30, 30))} == {413}
    assert len(behind.seen) == passed == 2


def test_every_answer_to_a_run_with_a_big_adapter_has_few_enough() -> None:
    """A signed answer is one array, which Flower cuts into parts of 5 MiB."""
    size = 60_000_000
    content = sealed.seal({"x": "y"}, np.random.default_rng(0).bytes(size))
    count = len(get_all_nested_objects(content)) + 1  # the message itself
    parts = -(-size // (5 * 2**20))
    assert count - parts < 10 and (OBJECTS - (count - parts)) * 5 * 2**20 > 1.2 * 2**30


class _Working:
    """Calls of sites to a door whose SuperLink answers nothing yet."""

    def __init__(self, port: int, behind: _Behind, kit: _Kit) -> None:
        self.port, self.behind = port, behind
        self.bodies = {
            site.name: {
                **{call: body.SerializeToString() for call, body in _bodies(site.node, site.pem, site.node).items()},
                "push-object": b"x" * 1000,
            }
            for site in (kit.north, kit.south)
        }

    async def hang_up(self, site: _Site, call: str) -> None:
        """Send a call and hang up once the SuperLink has it, or the door has answered."""
        body, before = self.bodies[site.name][call], len(self.behind.seen)
        async with _sent(self.port, body, _head(site, len(body)), call) as reply:
            answer = asyncio.create_task(reply.readline())
            while len(self.behind.seen) == before and not answer.done():
                await asyncio.sleep(0.005)
            answer.cancel()

    async def ask(self, site: _Site, call: str) -> httpx.Response:
        async with httpx.AsyncClient(trust_env=False, timeout=90) as out:
            url = f"http://127.0.0.1:{self.port}/v1/fleet/{call}"
            return await out.post(url, content=self.bodies[site.name][call], headers=site.signed())

    async def seen(self, count: int) -> None:
        deadline = time.monotonic() + 60
        while len(self.behind.seen) < count:
            assert time.monotonic() < deadline, self.behind.seen
            await asyncio.sleep(0.005)


def test_a_site_that_hangs_up_again_and_again_keeps_the_superlink_from_nobody(behind: _Behind, kit: _Kit) -> None:
    """The SuperLink works on what it has heard, whether somebody still waits for it or not."""
    behind.waits = {"push-messages", "get-run", "send-node-heartbeat"}
    behind.go_on.clear()

    async def talk(port: int) -> None:
        work = _Working(port, behind, kit)
        for _ in range(20):
            for call in behind.waits:
                await work.hang_up(kit.north, call)
        calls = [path.rpartition("/")[2] for path, _, _ in behind.seen]
        assert {call: calls.count(call) for call in calls} == {
            "push-messages": 2,
            "get-run": 6,
            "send-node-heartbeat": 2,
        }
        refused = await work.ask(kit.north, "push-messages")
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
        assert (await work.ask(kit.south, "pull-messages")).status_code == 200
        told = asyncio.create_task(work.ask(kit.south, "push-messages"))
        await work.seen(12)
        behind.go_on.set()
        assert (await told).status_code == 200
        deadline = time.monotonic() + 60
        while (await work.ask(kit.north, "push-messages")).status_code != 200:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)
        for _ in range(10):  # each call has given its place back
            assert (await work.ask(kit.north, "get-run")).status_code == 200

    asyncio.run(_served(make_door(behind.url, kit.checks()), talk))


def test_what_an_honest_site_does_at_a_time_is_never_refused(behind: _Behind, kit: _Kit) -> None:
    """Two objects at a time, and two more where it began anew; one other call; signs of life; an announcement again."""
    calls = ["push-object"] * 4 + ["pull-messages"] + ["push-messages"] * 2 + ["send-node-heartbeat"] * 2
    behind.waits = set(calls)
    behind.go_on.clear()

    async def talk(port: int) -> list[int]:
        work = _Working(port, behind, kit)
        asked = [asyncio.create_task(work.ask(kit.north, call)) for call in calls]
        await work.seen(len(calls))
        behind.go_on.set()
        return [(await each).status_code for each in asked]

    assert asyncio.run(_served(make_door(behind.url, kit.checks()), talk)) == [200] * len(calls)


def test_an_answer_keeps_its_place_until_it_is_read_or_its_reader_gone(behind: _Behind, kit: _Kit) -> None:
    """The SuperLink holds it so long."""
    behind.more = b"y" * 30_000_000

    async def talk(port: int) -> None:
        work = _Working(port, behind, kit)
        body = work.bodies["north"]["pull-object"]
        async with contextlib.AsyncExitStack() as readers:
            for _ in range(2):
                sent = _sent(port, body, _head(kit.north, len(body)), "pull-object")
                assert b" 200 " in await (await readers.enter_async_context(sent)).readline()
            assert (await work.ask(kit.north, "get-run")).status_code == 503
        behind.more = b""
        deadline = time.monotonic() + 60
        while (await work.ask(kit.north, "get-run")).status_code != 200:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)

    asyncio.run(_served(make_door(behind.url, kit.checks(), bounds=Bounds(site_calls=2)), talk))


@pytest.mark.parametrize("status", [200, 500])
def test_a_call_gives_its_place_back_however_it_ends(
    behind: _Behind, kit: _Kit, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deploy.proxy._FAULTS", 5)  # of 500, some are passed on
    behind.status, bounds = status, Bounds(site_calls=1, site_announcements=1, site_beats=1)
    with TestClient(make_door(behind.url, kit.checks(), bounds=bounds)) as outside:
        for call in ("get-run", "push-messages", "send-node-heartbeat"):
            body = _bodies(kit.north.node, kit.north.pem, kit.north.node)[call].SerializeToString()
            found = [_post(outside, call, body, kit.north.signed()) for _ in range(9)]
            expected = [200] * 9 if status == 200 else [503] * 5 + [500] * 4
            assert [answer.status_code for answer in found] == expected
            assert not any("at a time" in answer.text for answer in found)


# -- how long ------------------------------------------------------------------------------------


async def _served(
    app: Any,
    talk: Callable[[int], Any],
    limits: Limits | None = None,
    refusals: Refusals | None = None,
    tls: Any = None,
) -> Any:
    """What `talk(port)` returns while the door is served as it is by its own program."""
    served = config(app, refusals or Refusals(), limits or Limits(), tls)
    served.host, served.port = "127.0.0.1", processes.free_port()
    server = uvicorn.Server(served)
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        return await talk(served.port)
    finally:
        server.should_exit = server.force_exit = True
        await serving


@contextlib.asynccontextmanager
async def _sent(port: int, body: bytes, header: str, call: str = "push-object") -> AsyncIterator[asyncio.StreamReader]:
    """What comes back to a request of which more may follow."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(f"POST /v1/fleet/{call} HTTP/1.1\r\nhost: x\r\n{header}\r\n\r\n".encode() + body)
        await writer.drain()
        yield reader
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def _head(site: _Site, size: int) -> str:
    return "".join(f"{name}: {value}\r\n" for name, value in site.signed().items()) + f"content-length: {size}"


def test_who_stops_in_a_body_is_sent_away(behind: _Behind, kit: _Kit) -> None:
    async def talk(port: int) -> list[bytes]:
        answers = []
        for call in ("push-object", "pull-messages"):
            async with _sent(port, b"x", _head(kit.north, 100), call) as reply:
                answers.append(await asyncio.wait_for(reply.readline(), 120))
        return answers

    door = make_door(behind.url, kit.checks(), bounds=Bounds(grace_s=0.2))
    assert all(b" 408 " in line for line in asyncio.run(_served(door, talk)))


def test_who_drips_a_body_is_sent_away(behind: _Behind, kit: _Kit) -> None:
    """A byte now and then resets nothing: the rate of the whole counts."""

    async def talk(port: int) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"POST /v1/fleet/push-object HTTP/1.1\r\nhost: x\r\n{_head(kit.north, 5000)}\r\n\r\n".encode())
        answer = asyncio.create_task(reader.readline())
        while not answer.done():
            writer.write(b"x")
            await asyncio.sleep(0.02)
        writer.close()
        return await answer

    door = make_door(behind.url, kit.checks(), bounds=Bounds(grace_s=0.5))
    assert b" 408 " in asyncio.run(asyncio.wait_for(_served(door, talk), 60))


async def _end_of(reader: asyncio.StreamReader) -> bytes:
    with contextlib.suppress(OSError):
        return await asyncio.wait_for(reader.read(), 60)
    return b""


@pytest.mark.parametrize("first", [b"", b"GET /health HTTP/1.1\r\nx: "])
def test_a_head_has_a_deadline_however_it_is_dripped(behind: _Behind, kit: _Kit, first: bytes) -> None:
    async def talk(port: int) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        ended = asyncio.create_task(_end_of(reader))
        while not ended.done():
            if first:
                writer.write(first)
            first_now = b"x"
            await asyncio.sleep(0.02)
            if first:
                writer.write(first_now)
        writer.close()
        return await ended

    door = make_door(behind.url, kit.checks())
    assert asyncio.run(asyncio.wait_for(_served(door, talk, Limits(head_s=0.4)), 60)) == b""


def test_a_second_head_has_a_deadline_too(behind: _Behind, kit: _Kit) -> None:
    async def talk(port: int) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"GET /hea")
        rest = await _end_of(reader)
        writer.close()
        return rest

    door = make_door(behind.url, kit.checks())
    assert b"200" not in asyncio.run(asyncio.wait_for(_served(door, talk, Limits(head_s=0.3, idle_s=3600)), 60))


def test_a_head_has_a_bound(behind: _Behind, kit: _Kit) -> None:
    async def talk(port: int) -> bytes:
        async with _sent(port, b"", "x: " + "y" * 200_000) as reply:
            return await _end_of(reply)

    assert b" 200 " not in asyncio.run(_served(make_door(behind.url, kit.checks()), talk))
    assert behind.seen == []


def test_slow_callers_make_way_for_others(behind: _Behind, kit: _Kit) -> None:
    """And the connection on which a site has proved its key makes way for no stranger."""
    limits = Limits(strangers=20, each=20, head_s=600.0, idle_s=600)
    lines: list[str] = []

    async def talk(port: int) -> list[Any]:
        base = f"http://127.0.0.1:{port}"
        async with (
            httpx.AsyncClient(base_url=base, trust_env=False, timeout=90) as site,
            contextlib.AsyncExitStack() as all_,
        ):
            slow = []

            async def beat() -> int:
                answer = await site.post(
                    "/v1/fleet/send-node-heartbeat", content=kit.north.beat(), headers=kit.north.signed()
                )
                return answer.status_code

            statuses = [await beat()]
            body = kit.north.beat()
            kept = await all_.enter_async_context(_sent(port, body, _head(kit.north, len(body)), "send-node-heartbeat"))
            assert b" 200 " in await kept.readline()
            for _ in range(100):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                all_.callback(writer.close)
                writer.write(b"GET /hea")
                slow.append(asyncio.create_task(_end_of(reader)))
            statuses.append(await beat())
            async with httpx.AsyncClient(base_url=base, trust_env=False, timeout=90) as other:
                statuses.append((await other.get("/health")).status_code)
            await asyncio.sleep(0.1)
            gone = sum(task.done() for task in slow)
            await asyncio.wait_for(kept.readexactly(1), 60)
            assert not kept.at_eof()
            kept_open = asyncio.create_task(_end_of(kept))
            await asyncio.sleep(0.2)
            assert not kept_open.done()
            slow.append(kept_open)
            for task in slow:
                task.cancel()
            await asyncio.gather(*slow, return_exceptions=True)
            return [statuses, gone]

    refusals = Refusals(lines.append, every_s=0.05)
    statuses, gone = asyncio.run(
        _served(make_door(behind.url, kit.checks(), refusals=refusals), talk, limits, refusals)
    )
    assert statuses == [200, 200, 200]
    assert 80 <= gone < 100
    assert any("too many connections" in line for line in lines)


class _Held:
    def __init__(self) -> None:
        self.dropped = False

    def drop(self) -> None:
        self.dropped = True


def test_places_are_kept_for_registered_keys() -> None:
    notes: list[str] = []
    places = Places(Limits(strangers=10, each=4, site=3), notes.append)

    def enter(address: str) -> _Held:
        held = _Held()
        places.enter(held, address)
        return held

    site = enter("10.0.0.1")
    places.prove(site, "north")
    again = enter("10.0.0.1")  # of the site's own address: strangers from elsewhere do not move it
    # From one address four at most, and of IPv6 a network counts as one.
    one = [enter(f"2001:db8::{n:x}") for n in range(9)]
    assert [held.dropped for held in one] == [True] * 5 + [False] * 4
    single = enter("198.51.100.7")  # of an address with one: those with more make way
    crowd = [enter(f"192.0.2.{n % 4}") for n in range(400)]
    assert not site.dropped and not again.dropped and not single.dropped
    assert sum(not held.dropped for held in (*crowd, *one)) == 9
    assert not any(held.dropped for held in crowd[-4:])
    # A site has its own bound, which is nobody else's.
    own = []
    for _ in range(5):
        own.append(enter("10.0.0.1"))
        places.prove(own[-1], "north")
    assert site.dropped and [held.dropped for held in own] == [True, True, False, False, False]
    for held in (*own, *crowd, *one, again, site, single):
        places.leave(held)
        places.leave(held)
    assert len(places) == 0 and set(notes) == {"too many connections", "too many connections of a site"}


@pytest.fixture(scope="module")
def certificates_of(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """TLS of a server, and of who trusts it."""
    folder = tmp_path_factory.mktemp("tls") / "federation"
    kits.init(folder, "127.0.0.1:8443", ["north"])
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(folder / "server" / kits.CERTIFICATE, folder / "server" / kits.SERVER_KEY)
    return server, ssl.create_default_context(cafile=folder / "north" / kits.CA)


def test_a_handshake_has_a_deadline_and_takes_a_place(
    behind: _Behind, kit: _Kit, certificates_of: tuple[ssl.SSLContext, ssl.SSLContext]
) -> None:
    server, trust = certificates_of

    async def talk(port: int) -> tuple[list[int], int]:
        silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(30)]
        ends = [asyncio.create_task(_end_of(reader)) for reader, _ in silent]
        async with httpx.AsyncClient(base_url=f"https://127.0.0.1:{port}", verify=trust, trust_env=False) as out:
            found = [(await out.get("/health", timeout=60)).status_code]
            body = b"x" * 300_000
            answer = await out.post("/v1/fleet/push-object", content=body, headers=kit.north.signed(), timeout=60)
            found.append(answer.status_code if answer.content == body else 0)
        await asyncio.wait(ends, timeout=60)
        for _, writer in silent:
            writer.close()
        return found, sum(end.done() for end in ends)

    limits = Limits(each=10, head_s=1.0)
    found, ended = asyncio.run(_served(make_door(behind.url, kit.checks()), talk, limits, tls=server))
    assert found == [200, 200] and ended == 30


def test_what_comes_with_the_end_of_the_handshake_is_not_lost(
    behind: _Behind, kit: _Kit, certificates_of: tuple[ssl.SSLContext, ssl.SSLContext]
) -> None:
    """A client that sends its last handshake message and its call in one packet."""
    server, trust = certificates_of
    request = b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"

    def call(port: int) -> bytes:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        with socket.create_connection(("127.0.0.1", port), timeout=60) as line:
            tls = trust.wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
            while True:
                try:
                    tls.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    line.sendall(outgoing.read())
                    incoming.write(line.recv(65536))
            tls.write(request)
            line.sendall(outgoing.read())
            answer = b""
            while b"\r\n\r\n" not in answer and (data := line.recv(65536)):
                incoming.write(data)
                with contextlib.suppress(ssl.SSLWantReadError):
                    answer += tls.read(65536)
            return answer

    async def talk(port: int) -> list[bytes]:
        return [await asyncio.to_thread(call, port) for _ in range(5)]

    answers = asyncio.run(_served(make_door(behind.url, kit.checks()), talk, tls=server))
    assert all(b" 200 " in answer for answer in answers)


def test_who_does_not_read_its_answer_is_sent_away(behind: _Behind, kit: _Kit) -> None:
    behind.more = b"y" * 50_000_000
    lines: list[str] = []

    async def talk(port: int) -> None:
        async with _sent(port, kit.north.beat(), _head(kit.north, len(kit.north.beat())), "send-node-heartbeat"):
            deadline = time.monotonic() + 60
            while not any("too slow a reader" in line for line in lines):
                assert time.monotonic() < deadline
                await asyncio.sleep(0.05)

    refusals = Refusals(lines.append, every_s=0.05)
    asyncio.run(_served(make_door(behind.url, kit.checks()), talk, Limits(stall_s=0.3), refusals))


def test_an_idle_line_to_the_superlink_is_not_used_again(behind: _Behind, kit: _Kit) -> None:
    """Its uvicorn hangs up after 5 s: a call that is sent at that moment would be lost."""
    with TestClient(make_door(behind.url, kit.checks())) as outside:
        for pause_s in (0.0, 3.0):
            time.sleep(pause_s)
            for _ in range(2):
                assert _post(outside, "send-node-heartbeat", kit.north.beat(), kit.north.signed()).status_code == 200
    assert len(behind.lines) == 2
    assert Limits().idle_s > 5  # a site's client hangs up after 5 s: likewise


# -- what is said --------------------------------------------------------------------------------


def test_refusals_are_counted_and_said_now_and_then(behind: _Behind, kit: _Kit) -> None:
    lines: list[str] = []
    refusals = Refusals(lines.append, every_s=0.3)
    with TestClient(make_door(behind.url, kit.checks(), refusals=refusals)) as outside:
        headers = kit.north.signed()
        began = time.monotonic()
        for _, call in zip(range(60), itertools.cycle(["push-object", "secret-call", "pull-messages"]), strict=False):
            _post(outside, call, b"secret", {"x-secret": "secret"})
        _post(outside, "send-node-heartbeat", kit.north.beat(), headers)
        _post(outside, "send-node-heartbeat", kit.north.beat(), headers)
        deadline = began + 60
        while not any("used signature" in line for line in lines):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        took = time.monotonic() - began
    assert len(lines) <= 1 + took / 0.3
    counted = sum(int(part.split()[0]) for line in lines for part in line.removeprefix("refused: ").split(", "))
    assert counted == 61
    text = "\n".join(lines)
    assert "used signature (site north)" in text and "unsigned" in text and "no such call" in text
    assert "secret" not in text and not any(value in text for value in headers.values())


# -- attacks on real processes -------------------------------------------------------------------


class _Real:
    """A server with a site that is connected and one whose key the test has, and what outsiders see of it."""

    def __init__(self, made: Deployment) -> None:
        self.made, self.state = made, made.kits / "server" / "state"
        self.trust = ssl.create_default_context(cafile=made.kits / "ant" / kits.CA)
        nodes = json.loads((self.state / "nodes.json").read_text())
        self.ant = int(nodes["ant"]["node"])
        self.bee = _Site("bee", int(nodes["bee"]["node"]))
        key = serialization.load_ssh_private_key((made.kits / "bee" / kits.SITE_KEY).read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        self.bee.key = key
        self.bee.pem = key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )

    def calls(self, port: int) -> httpx.Client:
        return httpx.Client(
            base_url=f"https://127.0.0.1:{port}",
            verify=self.trust,
            trust_env=False,
            timeout=60,
            headers={"content-type": "application/protobuf", "accept": "application/protobuf"},
        )

    def superlink(self) -> int:
        (pid,) = [
            pid
            for pid in descendants(self.made.running["server"].pid)
            if b"\0deploy.superlink\0" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        return pid

    def online_until(self) -> float:
        """Until when Flower takes the connected site to be there, in seconds since 1970."""
        with contextlib.closing(sqlite3.connect((self.state / "superlink.db").as_uri() + "?mode=ro", uri=True)) as base:
            signed = self.ant - 2**64 if self.ant >= 2**63 else self.ant
            (found,) = base.execute("SELECT online_until FROM node WHERE node_id = ?", (signed,)).fetchone()
        return float(found)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[_Real]:
    folder = tmp_path_factory.mktemp("door")
    made = Deployment(folder, tiny_model)
    try:
        made.serve()
        made.join("ant", write_rows(folder / "rows"))
        made.wait_for("ant", "connected to")
        yield _Real(made)
    finally:
        made.end()


def _memory(pid: int, what: str) -> int:
    """Bytes of a process; `what` is a line of proc(5)'s status, such as VmHWM, the most that it ever had."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith(f"{what}:")]
    return int(line.split()[1]) * 1024


def _send_much(port: int, trust: ssl.SSLContext, headers: dict[str, str], size: int) -> int:
    """The bytes of a body that were taken until the other side hung up."""
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    head = f"POST /v1/fleet/push-object HTTP/1.1\r\nhost: x\r\n{lines}content-length: {size}\r\n\r\n"
    block, sent = b"x" * 2**20, 0
    with (
        socket.create_connection(("127.0.0.1", port), timeout=60) as line,
        contextlib.suppress(OSError),
        trust.wrap_socket(line, server_hostname="127.0.0.1") as tls,
    ):
        tls.sendall(head.encode())
        while sent < size:
            tls.sendall(block)
            sent += len(block)
    return sent


@pytest.mark.long
def test_bodies_of_a_gigabyte_leave_the_superlink_as_it_was(real: _Real) -> None:
    pid, stranger = real.superlink(), _Site("north", 5)
    before = _memory(pid, "VmHWM")
    headers = [{}, stranger.signed(), real.bee.signed()]  # unsigned, of an unknown key, of a registered one
    taken: list[int] = []
    threads = [
        threading.Thread(
            target=lambda own=own: taken.append(_send_much(real.made.port, real.trust, own, 2**30))  # type: ignore[misc]
        )
        for own in (*headers, {}, {})
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 5 and max(taken) < 64 * 2**20, taken  # what buffers of the network hold
    assert real.superlink() == pid
    assert _memory(pid, "VmHWM") - before < 64 * 2**20


async def _slow(port: int, trust: ssl.SSLContext, number: int, until: float) -> int:
    """A caller who never gets done, again and again; how often it was sent away."""
    own = trust if number % 2 else None  # every other one stops before TLS
    source = "127.0.0.1" if number % 5 == 0 else "127.0.0.2"  # the site's address, or another one
    ended = 0
    while time.monotonic() < until:
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(until - time.monotonic() + 1):
                reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=own, local_addr=(source, 0))
                try:
                    writer.write(b"GET /health HTTP/1.1\r\nx: " if own else b"\x16\x03\x01")
                    while time.monotonic() < until and not reader.at_eof():
                        writer.write(b"y" if own else b"\x00")
                        with contextlib.suppress(TimeoutError):
                            await asyncio.wait_for(reader.read(1), 1.0)
                finally:
                    writer.close()
        ended += time.monotonic() < until
        await asyncio.sleep(3.0)
    return ended


@pytest.mark.long
def test_slow_callers_shut_nobody_out(real: _Real) -> None:
    """For longer than a sign of life holds off the next, 30 s; some from the address that the site has."""
    port, until = real.made.port, time.monotonic() + 40
    online = real.online_until()

    async def attack() -> tuple[list[int], list[int]]:
        slow = [asyncio.create_task(_slow(port, real.trust, number, until)) for number in range(600)]
        statuses = []
        while time.monotonic() < until:
            async with httpx.AsyncClient(verify=real.trust, trust_env=False, timeout=30) as out:
                try:
                    statuses.append((await out.get(f"https://127.0.0.1:{port}/health")).status_code)
                except httpx.TransportError:
                    statuses.append(0)
            await asyncio.sleep(1.0)
        return statuses, await asyncio.gather(*slow)

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))
    try:
        statuses, ended = asyncio.run(attack())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert set(statuses) == {200} and len(statuses) > 4
    assert sum(ended) > 600 and min(ended) > 0  # none is left alone
    assert real.online_until() > max(online, time.time())
    status = real.made.call("deploy", "status", str(real.made.kits / "server"))
    assert "site ant: online" in status.stdout
    said = (real.state / "door.log").read_text()
    assert "too many connections" in said and "too slow a head" in said
    assert len(said.splitlines()) < 30


@pytest.mark.long
def test_no_site_answers_as_another_nor_is_a_call_taken_twice(real: _Real) -> None:
    bee, behind = real.bee, json.loads((real.state / "running.json").read_text())["port"]
    with real.calls(real.made.port) as door, real.calls(behind) as superlink:

        def ask(out: httpx.Client, call: str, body: Any, headers: dict[str, str]) -> int:
            return out.post(f"/v1/fleet/{call}", content=body.SerializeToString(), headers=headers).status_code

        own, pull = _bodies(bee.node, bee.pem, bee.node), PullMessagesRequest(node=Node(node_id=bee.node))
        assert ask(door, "activate-node", own["activate-node"], bee.signed()) == 200
        headers = bee.signed()
        assert ask(door, "pull-messages", pull, headers) == 200
        assert ask(superlink, "pull-messages", pull, headers) == 200  # Flower itself takes it again
        for again in (headers, _flipped(headers)):
            assert ask(door, "pull-messages", pull, again) == 401
            assert ask(door, "send-node-heartbeat", own["send-node-heartbeat"], again) == 401
        as_ant = _bodies(bee.node, bee.pem, real.ant)["push-messages"]
        assert ask(door, "push-messages", as_ant, bee.signed()) == 401
        assert ask(superlink, "push-messages", as_ant, bee.signed()) not in (401, 403)  # to it, the source may be any
        for call, foreign in _bodies(real.ant, bee.pem, real.ant).items():
            if call != "activate-node":
                assert ask(door, call, foreign, bee.signed()) == 401, call
        assert ask(door, "deactivate-node", own["deactivate-node"], bee.signed()) == 200


@pytest.mark.long
def test_a_site_cannot_fill_the_log_of_the_superlink(real: _Real) -> None:
    """By texts that Flower logs as they come, from 64 KiB to 5 MiB a call: 100 MiB in all."""
    bee, log = real.bee, real.state / "superlink.log"
    before, evil = log.stat().st_size, "\nINFO : all is well\x1b[2J"
    with real.calls(real.made.port) as door:

        def ask(call: str, body: Any) -> httpx.Response:
            return door.post(f"/v1/fleet/{call}", content=body.SerializeToString(), headers=bee.signed())

        own = _bodies(bee.node, bee.pem, bee.node)
        assert ask("activate-node", own["activate-node"]).status_code == 200
        for _ in range(20):
            fab = GetFabRequest(node=Node(node_id=bee.node), run_id=1, hash_str=evil + "x" * 60_000)
            told = _with(own["push-messages"], "messages_list", "metadata", "reply_to_message_id", text=fab.hash_str)
            pushed = PushObjectRequest(node=Node(node_id=bee.node), run_id=1, object_id=evil + "x" * (5 * 2**20))
            for call, body in (("get-fab", fab), ("push-messages", told), ("push-object", pushed)):
                answer = ask(call, body)
                assert answer.status_code == 400 and len(answer.content) < 100, (call, answer.text[:100])
        assert ask("get-fab", own["get-fab"]).status_code == 403  # of no run that there is; this is logged
        assert ask("deactivate-node", own["deactivate-node"]).status_code == 200
    said = log.read_text()[before:]
    assert "[Fleet.GetFab]" in said and len(said) < 20_000
    assert "all is well" not in said and "\x1b" not in log.read_text()
