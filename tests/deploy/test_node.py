"""A site's node: how often it looks, what it sends and drops, and what becomes of a line that breaks."""

from __future__ import annotations

import datetime
import email.utils
import hashlib
import http.server
import itertools
import queue
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from flwr.app import ConfigRecord, Context, Message, Metadata, RecordDict
from flwr.app.message import make_message
from flwr.common.serde import fab_to_proto, message_to_proto, run_to_proto
from flwr.proto import fab_pb2, fleet_pb2, heartbeat_pb2, message_pb2, run_pb2
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.run import Run
from google.protobuf.message import Message as Proto

from apiary.core.errors import UserError
from client import worker_rpc
from deploy import bundle, fleet, kits, node, pace, processes, session, site
from deploy.fleet import Line, Work
from deploy.node import Answering
from deploy.session import CONNECTED, NOT_TRUSTED, REFUSED, Journal, Left

_NODE, _RUN = 77, 5


def test_a_node_looks_soon_after_work_and_seldom_while_idle() -> None:
    """Work waits no longer than a fifth of the time since the last answer, for a small number of looks."""
    now, looks = 0.0, []
    while now < 60.0:
        looks.append(now)
        now += pace.pause(now, 0.01)
    late = [after - before for before, after in itertools.pairwise(looks)]
    assert late[0] == pytest.approx(0.1) and max(late) == pytest.approx(3.0)
    assert all(wait <= max(0.1, before / 5) + 1e-9 for before, wait in zip(looks, late, strict=False))
    assert len(looks) < 60  # a minute of looking each 0.1 s would be 600


def test_a_slow_server_is_asked_less() -> None:
    assert pace.pause(0.0, 0.5) == pytest.approx(2.0)
    assert pace.pause(0.0, 100.0) == pytest.approx(3.0)  # and never given up


def test_what_is_left_is_read_and_nothing_is_guessed(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    assert journal.read() == Left()
    journal.note(2**64 - 1, b"\x00head")
    assert Journal(tmp_path).read() == Left(2**64 - 1, b"\x00head")
    (tmp_path / "node.json").write_text('{"node": "no number", "message": ""}')
    assert journal.read() == Left()
    journal.close()
    journal.close()
    assert journal.read() == Left() and not list(tmp_path.iterdir())


# -- a SuperLink that fails when it is told to ---------------------------------------------------


class _SuperLink:
    """Behind TLS with a kit's own certificate. `fail` gives, by call, what goes wrong, one after the other."""

    def __init__(self, folder: Path, fab: bytes) -> None:
        kits.init(folder, "127.0.0.1:1", ["ant"])
        self.kit, self.fab = folder / "ant", fab
        self.calls: list[str] = []
        self.fail: dict[str, list[str | int]] = {}
        self.messages: list[Message] = []
        self.objects: dict[str, bytes] = {}
        self.replies: list[Any] = []
        self.seconds: list[float] = []
        self.to_push: list[str] = []
        self.running, self.date = True, email.utils.formatdate(usegmt=True)
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                outer.handle(self)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "server" / "server.crt", folder / "server" / "server.key")
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server.server_address[1]}"

    def handle(self, caller: Any) -> None:
        body = caller.rfile.read(int(caller.headers["content-length"]))
        name = caller.path.rpartition("/")[2]
        self.calls.append(name)
        wrong = self.fail[name].pop(0) if self.fail.get(name) else None
        if wrong == "broken":
            caller.connection.shutdown(socket.SHUT_RDWR)
            caller.close_connection = True
            return
        status, answer = 200, b""
        if isinstance(wrong, int):
            status = wrong
        elif wrong == session.NOT_REGISTERED:
            status, answer = 503, wrong.encode()
        elif not self.running and name in ("get-run", "get-fab", "pull-object", "push-messages", "push-object"):
            status, answer = 403, b'{"code": 2007, "detail": "not running"}'
        elif name == "activate-node" and wrong == "online":
            status, answer = 400, b'{"code": 2004, "detail": "Failed to activate SuperNode."}'
        else:
            answer = self.answer(name, body).SerializeToString()
        caller.send_response_only(status)
        caller.send_header("date", self.date)
        caller.send_header("content-length", str(len(answer)))
        caller.end_headers()
        caller.wfile.write(answer)

    def answer(self, name: str, body: bytes) -> Proto:
        if name == "activate-node":
            return fleet_pb2.ActivateNodeResponse(node_id=_NODE)
        if name == "send-node-heartbeat":
            return heartbeat_pb2.SendNodeHeartbeatResponse(success=True)
        if name == "pull-messages":
            response = fleet_pb2.PullMessagesResponse()
            if self.messages:
                message = self.messages.pop(0)
                self.objects |= {key: value.deflate() for key, value in get_all_nested_objects(message).items()}
                response.messages_list.append(message_to_proto(message))
                response.message_object_trees.append(get_object_tree(message))
            return response
        if name == "pull-object":
            content = self.objects.get(message_pb2.PullObjectRequest.FromString(body).object_id)
            return message_pb2.PullObjectResponse(
                object_found=content is not None, object_available=content is not None, object_content=content or b""
            )
        if name == "get-run":
            run = Run.create_empty(_RUN)
            run.fab_id, run.fab_version = "apiary/apiary-run", bundle.VERSION
            run.fab_hash, run.override_config = hashlib.sha256(self.fab).hexdigest(), {"config": "{}", "name": "first"}
            return run_pb2.GetRunResponse(run=run_to_proto(run))
        if name == "get-fab":
            return fab_pb2.GetFabResponse(fab=fab_to_proto(Fab("0" * 64, self.fab, {})))
        if name == "push-messages":
            request = fleet_pb2.PushMessagesRequest.FromString(body)
            self.replies += request.messages_list
            self.seconds += request.clientapp_runtime_list
            return fleet_pb2.PushMessagesResponse(objects_to_push=self.to_push, session_id="s")
        if name == "push-object":
            return message_pb2.PushObjectResponse(stored=True)
        if name == "confirm-message-received":
            return message_pb2.ConfirmMessageReceivedResponse()
        return fleet_pb2.DeactivateNodeResponse()

    def send(self) -> Message:
        """Have a message for the site ready, as a ServerApp would send it."""
        created = time.time()
        message = make_message(Metadata(_RUN, "", 1, _NODE, "", "3", created, 1000.0, "train"), RecordDict())
        message.metadata.__dict__["_message_id"] = message.object_id
        self.messages.append(message)
        return message


@pytest.fixture(scope="module")
def fab(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Our bundle as Flower builds it."""
    folder = bundle.write(tmp_path_factory.mktemp("bundle") / "apiary-run")
    environment = processes.environment(folder.parent)
    subprocess.run([processes.program("flwr"), "build"], cwd=folder, env=environment, capture_output=True, check=True)
    return next(folder.glob("*.fab")).read_bytes()


@pytest.fixture
def superlink(tmp_path: Path, fab: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[_SuperLink]:
    for name, seconds in (("_FIRST_S", 0.01), ("_BEAT_S", 0.2)):
        monkeypatch.setattr(fleet, name, seconds)
    for name, seconds in (("_LOOK_S", 0.01), ("_GOES_ON_S", 0.05)):
        monkeypatch.setattr(node, name, seconds)
    made = _SuperLink(tmp_path / "kits", fab)
    yield made
    made.server.shutdown()
    made.server.server_close()


class _Site:
    """A node in a thread of the test, with an `answer` for messages."""

    def __init__(
        self, superlink: _SuperLink, state: Path, answer: Callable[[Any, Any], Any], clock: fleet.Clock = fleet.utc_now
    ) -> None:
        self.end, self.asked = threading.Event(), queue.SimpleQueue[Any]()
        self.cancelled, self.code = threading.Event(), -1
        self.journal = Journal(state)
        self.said: list[str] = []
        key, ca = superlink.kit / "site.key", superlink.kit / "ca.crt"
        self.line = Line(superlink.address, ca, key, self.end, clock=clock)

        def ask(message: Message, context: Context) -> Message:
            self.asked.put((message, context))
            return answer(message, context)

        def go() -> None:
            answering = Answering(ask, self.cancelled.set)
            self.code = node.run(self.line, answering, {"site": "ant"}, self.journal, self.end)

        self.thread = threading.Thread(target=go, daemon=True)
        self.thread.start()

    def stop(self) -> int:
        self.end.set()
        self.thread.join(timeout=30)
        assert not self.thread.is_alive()
        return self.code


def _reply(message: Message, context: Context) -> Message:
    return Message(RecordDict(), reply_to=message)


def _until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_message_is_answered_once_with_what_its_run_was_started_with(superlink: _SuperLink, tmp_path: Path) -> None:
    sent = superlink.send()
    site = _Site(superlink, tmp_path, _reply)
    _until(lambda: superlink.replies)
    assert site.stop() == 0
    message, context = site.asked.get(timeout=5)
    assert message.metadata.message_id == sent.metadata.message_id
    assert (context.run_id, context.node_config) == (_RUN, {"site": "ant"})
    assert context.run_config == {"config": "{}", "out": "", "name": "first", "expected": 0}
    (reply,) = superlink.replies
    assert reply.metadata.reply_to_message_id == sent.metadata.message_id
    assert (reply.metadata.src_node_id, reply.metadata.run_id, reply.metadata.group_id) == (_NODE, _RUN, "3")
    assert superlink.calls[-1] == "deactivate-node" and site.journal.read() == Left()
    assert superlink.seconds == [0.0]  # how long it took exactly tells of the rows


def test_a_session_ends_after_the_last_sign_of_life(
    superlink: _SuperLink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that arrived later would have the site online again, for half a minute."""
    answer, done, beating = superlink.answer, list[str](), threading.Event()

    def slow(name: str, body: bytes) -> Any:
        if name == "send-node-heartbeat":
            beating.set()
            time.sleep(0.5)
        done.append(name)
        return answer(name, body)

    monkeypatch.setattr(superlink, "answer", slow)
    site = _Site(superlink, tmp_path, _reply)
    assert beating.wait(30)
    site.stop()
    assert done[-1] == "deactivate-node"


@pytest.mark.parametrize("wrong", [503, 500, 429, "broken"])
@pytest.mark.parametrize(
    "call", ["activate-node", "get-run", "pull-object", "push-messages", "confirm-message-received"]
)
def test_what_passes_is_tried_again(call: str, wrong: str | int, superlink: _SuperLink, tmp_path: Path) -> None:
    superlink.fail[call] = [wrong, wrong]
    superlink.send()
    site = _Site(superlink, tmp_path, _reply)
    _until(lambda: superlink.replies)
    assert not superlink.replies[0].HasField("error")
    assert site.stop() == 0 and superlink.calls.count(call) >= 3


def test_a_line_that_breaks_at_a_look_is_tried_again_in_the_same_session(superlink: _SuperLink, tmp_path: Path) -> None:
    """The server hands out again what did not arrive."""
    superlink.fail["pull-messages"] = ["broken", "broken"]
    superlink.send()
    site = _Site(superlink, tmp_path, _reply)
    _until(lambda: superlink.replies)
    site.stop()
    assert superlink.calls.count("pull-messages") >= 3
    assert [c for c in superlink.calls if c in ("activate-node", "deactivate-node")] == [
        "activate-node",
        "deactivate-node",
    ]


def test_the_answer_to_a_run_that_is_over_is_dropped_and_the_worker_let_go(
    superlink: _SuperLink, tmp_path: Path
) -> None:
    go_on, first = threading.Event(), superlink.send()
    site = _Site(superlink, tmp_path, lambda message, context: (go_on.wait(30), _reply(message, context))[1])
    site.asked.get(timeout=30)
    superlink.running = False
    assert site.cancelled.wait(30)
    superlink.running = True
    second = superlink.send()
    go_on.set()  # the late answer to the first is there before the one to the second
    _until(lambda: superlink.replies)
    site.stop()
    (reply,) = superlink.replies
    assert reply.metadata.reply_to_message_id == second.metadata.message_id
    assert first.metadata.message_id != second.metadata.message_id


def test_an_object_that_does_not_come_through_is_let_go_with_its_run(superlink: _SuperLink, tmp_path: Path) -> None:
    superlink.fail["push-object"] = ["broken"] * 10_000

    def answer(message: Message, context: Context) -> Message:
        reply = _reply(message, context)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        superlink.to_push = [reply.object_id]
        return reply

    superlink.send()
    site = _Site(superlink, tmp_path, answer)
    _until(lambda: "push-object" in superlink.calls)
    superlink.running = False
    _until(lambda: not site.journal.read().message)
    looks = superlink.calls.count("pull-messages")
    _until(lambda: superlink.calls.count("pull-messages") > looks)
    assert site.stop() == 0


def test_a_slow_line_has_minutes_for_an_object_and_for_nothing_else(
    superlink: _SuperLink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: dict[str, list[Any]] = {}
    send = httpx.Client.send

    def noted(client: httpx.Client, request: httpx.Request, **kwargs: Any) -> httpx.Response:
        waits.setdefault(request.url.path.rpartition("/")[2], []).append(request.extensions["timeout"])
        return send(client, request, **kwargs)

    monkeypatch.setattr(httpx.Client, "send", noted)

    def answer(message: Message, context: Context) -> Message:
        reply = Message(RecordDict({f"c{i}": ConfigRecord({"i": i}) for i in range(6)}), reply_to=message)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        superlink.to_push = list(get_all_nested_objects(reply))
        return reply

    superlink.send()
    site = _Site(superlink, tmp_path, answer)
    _until(lambda: superlink.calls.count("push-object") >= 7)  # several at a time
    looks = superlink.calls.count("pull-messages")
    _until(lambda: superlink.calls.count("pull-messages") > looks)
    site.stop()
    assert {(wait["write"], wait["read"]) for wait in waits.pop("push-object")} == {(300.0, 300.0)}
    assert max(wait["write"] for each in waits.values() for wait in each) == 30.0


def test_what_an_ended_node_had_in_work_is_told_and_its_session_taken_over(
    superlink: _SuperLink, tmp_path: Path
) -> None:
    lost = superlink.send()
    head = Work(lost, None, _RUN, "")
    Journal(tmp_path).note(_NODE, fleet.packed(head))
    superlink.messages.clear()
    site = _Site(superlink, tmp_path, _reply)
    _until(lambda: superlink.replies)
    site.stop()
    assert superlink.calls[:2] == ["deactivate-node", "activate-node"]
    (reply,) = superlink.replies
    assert reply.metadata.reply_to_message_id == lost.metadata.message_id
    assert "ended while it worked" in reply.error.reason


def test_a_node_in_mid_message_has_noted_it(superlink: _SuperLink, tmp_path: Path) -> None:
    go_on, sent = threading.Event(), superlink.send()
    site = _Site(superlink, tmp_path, lambda message, context: (go_on.wait(30), _reply(message, context))[1])
    site.asked.get(timeout=30)
    left = site.journal.read()
    assert left.node == _NODE
    assert fleet.unpacked(left.message).head.metadata.message_id == sent.metadata.message_id
    go_on.set()
    _until(lambda: superlink.replies)
    _until(lambda: not site.journal.read().message)
    site.stop()


def test_nothing_private_of_an_error_reaches_the_server(superlink: _SuperLink, tmp_path: Path) -> None:
    def fail(message: Message, context: Context) -> Message:
        raise ValueError("the queen is in hive 9")

    superlink.send()
    site = _Site(superlink, tmp_path, fail)
    _until(lambda: superlink.replies)
    site.stop()
    reason = superlink.replies[0].error.reason
    assert "ValueError" in reason and "queen" not in reason


def test_an_answer_that_the_server_does_not_take_is_told_as_such(superlink: _SuperLink, tmp_path: Path) -> None:
    superlink.fail["push-messages"] = [413]
    sent = superlink.send()
    site = _Site(superlink, tmp_path, _reply)
    _until(lambda: superlink.replies)
    site.stop()
    (reply,) = superlink.replies
    assert "does not take its answer (HTTP 413)" in reply.error.reason
    assert reply.metadata.reply_to_message_id == sent.metadata.message_id


def test_a_run_that_brings_other_code_is_refused_and_nobody_is_asked(superlink: _SuperLink, tmp_path: Path) -> None:
    superlink.fab = b"other code"
    superlink.send()
    site = _Site(superlink, tmp_path, _reply)
    _until(lambda: superlink.replies)
    site.stop()
    assert "runs what is installed there" in superlink.replies[0].error.reason
    assert site.asked.empty()


@pytest.mark.parametrize(
    ("hours", "line"),
    [
        (24.0, "its clock is 1 day ahead of the server's"),
        (-72.0, "its clock is 3 days behind the server's"),
        (1.5, "its clock is 2 hours ahead of the server's"),
        (0.1, "its clock is 6 minutes ahead of the server's"),
        (20 / 3600, "seconds ahead of the server's"),  # of a wait of milliseconds: 19 or 20
        (-20 / 3600, "unknown there"),  # the door takes it
        (0.0, "unknown there"),
    ],
)
def test_a_clock_that_is_off_is_told(
    hours: float, line: str, superlink: _SuperLink, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    superlink.fail["activate-node"] = [401]
    site = _Site(superlink, tmp_path, _reply, lambda: fleet.utc_now() + datetime.timedelta(hours=hours))
    _until(lambda: not site.thread.is_alive())
    assert site.code == REFUSED
    assert line in capsys.readouterr().out.splitlines()[-1]


def test_a_key_that_is_online_elsewhere_is_refused(
    superlink: _SuperLink, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    superlink.fail["activate-node"] = ["online"]
    site = _Site(superlink, tmp_path, _reply)
    _until(lambda: not site.thread.is_alive())
    assert site.code == REFUSED and "still online" in capsys.readouterr().out
    assert CONNECTED not in capsys.readouterr().out


def test_a_key_that_the_server_never_registers_is_refused_at_last(
    superlink: _SuperLink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was struck off, and was put back."""
    monkeypatch.setattr(fleet, "_NOT_REGISTERED_S", 0.3)
    superlink.fail["activate-node"] = [session.NOT_REGISTERED]  # taken up within seconds
    site = _Site(superlink, tmp_path, _reply)
    _until(lambda: "pull-messages" in superlink.calls)
    assert site.stop() == 0
    superlink.fail["activate-node"] = [session.NOT_REGISTERED] * 1000
    site = _Site(superlink, tmp_path, _reply)
    _until(lambda: not site.thread.is_alive())
    assert site.code == REFUSED and "struck off" in capsys.readouterr().out.splitlines()[-1]


def test_another_server_is_not_trusted(superlink: _SuperLink, tmp_path: Path) -> None:
    kits.init(tmp_path / "other", "127.0.0.1:1", ["ant"])
    superlink.kit = tmp_path / "other" / "ant"
    site = _Site(superlink, tmp_path, _reply)
    _until(lambda: not site.thread.is_alive())
    assert site.code == NOT_TRUSTED and superlink.calls == []


# -- the program ---------------------------------------------------------------------------------


def test_who_waits_for_a_worker_can_be_let_go(tmp_path: Path) -> None:
    """A listener that never answers stands for a worker in the middle of something."""
    from concurrent import futures

    import grpc

    begun, let_go = threading.Event(), threading.Event()

    def handle(data: bytes, context: Any) -> bytes:
        begun.set()
        let_go.wait(30)
        return data

    server = grpc.server(futures.ThreadPoolExecutor(1))
    _, package, method = worker_rpc.METHOD.split("/")
    handler = grpc.method_handlers_generic_handler(package, {method: grpc.unary_unary_rpc_method_handler(handle)})
    server.add_generic_rpc_handlers((handler,))
    server.add_insecure_port(f"unix:{tmp_path}/w.sock")
    server.start()
    told = queue.SimpleQueue[Exception]()

    def ask() -> None:
        try:
            worker_rpc.ask(f"unix:{tmp_path}/w.sock", worker_rpc.Envelope({"kind": "train"}))
        except worker_rpc.Unanswered as error:
            told.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        assert begun.wait(30)
        worker_rpc.cancel()
        assert told.get(timeout=30)
    finally:
        let_go.set()
        server.stop(None)


def test_health_answers_where_it_is_asked_for_and_nothing_else_does() -> None:
    port = processes.free_port()
    node.answer_health(port)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10) as answer:
        assert answer.status == 200
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/other", timeout=10)


def test_a_site_with_another_flower_does_not_start(
    superlink: _SuperLink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.42.0")
    with pytest.raises(UserError, match=r"flwr 1\.42\.0 is installed, and a site needs 1\.41"):
        site.run(kits.read(superlink.kit, "site"), tmp_path / "state", site.Options(tmp_path))


def test_the_node_loads_neither_torch_nor_a_web_server() -> None:
    code = (
        "import sys, deploy.node; deploy.node.installed();"
        "print([m for m in ('torch', 'transformers', 'fastapi', 'uvicorn', 'sqlalchemy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
