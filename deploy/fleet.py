"""A site's line to the server: Flower's Fleet API, every call signed with the site's key.

It takes the place of Flower's SuperNode, which starts a process for every message and runs what the server sends. Here
a bundle is only compared with ours. What is imported from flwr below `flwr.app` is private to its version 1.41.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import email.utils
import json
import random
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Context, Error, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import TIMESTAMP_HEADER, ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto, run_from_proto
from flwr.proto.fab_pb2 import GetFabRequest
from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest, PullMessagesRequest, PushMessagesRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.message_pb2 import PullObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, no_object_id_recompute
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectPushError,
    pull_and_inflate_object_from_tree,
    push_objects,
)
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from flwr.supernode.fleet_http_client import FleetHttpClient

from deploy import bundle, session

_LAST_BEAT_S = 3.0  # for a sign of life that is under way when a session ends
_BEAT_S, _INTERVAL_S = 6.0, 14.0  # Flower gives a node up after two intervals, of ten seconds at least
_FIRST_S, _LONGEST_S = 0.5, 15.0  # between tries while the server does not answer
_NOT_REGISTERED_S = 60.0  # in which a server registers a key that has just been put into `sites`
_PUSH_S = 300.0  # for one object, all of which is one wait; the door gives 5 MiB 223 s
_AHEAD_S, _BEHIND_S = 4.0, 55.0  # of the server's clock: the door refuses more than 5 and 60; dates have whole seconds
_NOT_ACTIVATED, _RUN_OVER, _NO_RUN = 2004, 2007, 2008  # Flower's codes
_PASSING = (408, 429)  # and all from 500 on: the server is busy or starts again

Clock = Callable[[], datetime.datetime]


class Refused(RuntimeError):
    """The server does not take this site's calls; the message says what is known of the reason."""


class NotTrusted(RuntimeError):
    """Who answers is not this federation's server."""


class RunOver(RuntimeError):
    """The run of a call is over, or is not known any more."""


class Rejected(RuntimeError):
    """The server takes this one call never; the message holds its code and no more."""


class Ended(RuntimeError):
    """The node was asked to end."""


class Work(NamedTuple):
    """A message as it is announced; its content is fetched apart."""

    head: Message
    tree: Any  # Flower's `ObjectTree`
    run: int
    what: str  # for the log: the kind, and the round if there is one


class _Signature:
    """Signs each call by its time, as Flower's own interceptor does, but with a clock that can be set.

    It also gives the call that carries an object the time that a slow line takes.
    """

    def __init__(self, key: ec.EllipticCurvePrivateKey, clock: Clock) -> None:
        self.public = public_key_to_bytes(key.public_key())
        self._key, self._clock = key, clock

    def intercept(self, context: Any, call_next: Callable[[Any], httpx.Response]) -> httpx.Response:
        stamp = self._clock().isoformat()
        signed = sign_message(self._key, stamp.encode("ascii"))
        context.request.headers.update(
            {
                FLEET_HTTP_PUBLIC_KEY_HEADER: base64.b64encode(self.public).decode("ascii"),
                TIMESTAMP_HEADER: stamp,
                FLEET_HTTP_SIGNATURE_HEADER: base64.b64encode(signed).decode("ascii"),
            }
        )
        if context.rpc_method.endswith("/PushObject"):
            context.request.extensions["timeout"] = httpx.Timeout(_PUSH_S, connect=30.0).as_dict()
        return call_next(context)


def utc_now() -> datetime.datetime:
    """This machine's time."""
    return datetime.datetime.now(tz=datetime.UTC)


class _Calls:
    """Calls of Flower's client, each tried again until it comes through or is refused.

    It owns the knowledge whether the server was ever reached.
    """

    def __init__(self, client: FleetHttpClient, end: threading.Event, clock: Clock) -> None:
        self._client, self._end, self._clock = client, end, clock
        self._reached = False  # the server, at least once
        self._strange: float | None = None  # since when the server says that it has not registered the key; monotonic

    def __call__(self, name: str, request: Any, over: Callable[[], bool] = lambda: False) -> Any:
        """The answer to a call of Flower's client.

        Args:
            name: of the call.
            request: its protobuf.
            over: asked before each further try whether its run is over, which a call that does not come through never
                hears by itself.

        Raises:
            RunOver, Rejected, Refused, NotTrusted, Ended: as their names say.
        """
        call, pause = getattr(self._client, name), _FIRST_S
        while True:
            try:
                answer = call(request)
                self._reached, self._strange = True, None
                return answer
            except httpx.HTTPStatusError as error:
                self._judge(error.response)
            except httpx.TransportError as error:
                if _is_certificate(error) and not self._reached:
                    raise NotTrusted(_certificate_line(error)) from None
            except ValueError:  # an answer that is no protobuf: of a proxy in between
                pass
            if self._end.wait(pause * random.uniform(0.8, 1.2)):
                raise Ended
            if over():
                raise RunOver
            pause = min(_LONGEST_S, 2.0 * pause)

    def _judge(self, answer: httpx.Response) -> None:
        """Raise for an answer that trying again would not change."""
        if answer.status_code == 503 and answer.text == session.NOT_REGISTERED:
            self._strange = self._strange or time.monotonic()
            if time.monotonic() - self._strange > _NOT_REGISTERED_S:
                raise Refused("not registered there, or struck off")
        if answer.status_code >= 500 or answer.status_code in _PASSING:
            return
        if answer.status_code == 401:
            raise Refused(self._clock_line(answer) or "unknown there, or struck off")
        with contextlib.suppress(ValueError, TypeError, KeyError):
            code = int(json.loads(answer.text)["code"])
            if code == _NOT_ACTIVATED:
                raise Refused("unknown there, or still online from before or elsewhere")
            if code in (_RUN_OVER, _NO_RUN):
                raise RunOver
            raise Rejected(f"HTTP {answer.status_code}, Flower's code {code}")
        raise Rejected(f"HTTP {answer.status_code}")

    def _clock_line(self, answer: httpx.Response) -> str | None:
        for name, value in answer.headers.multi_items():
            if name == "date":
                with contextlib.suppress(ValueError, TypeError):
                    return clock_line((self._clock() - email.utils.parsedate_to_datetime(value)).total_seconds())
        return None


class Line:
    """A site's line to its server.

    It owns the node id while a session is open, the thread that sends signs of life, and what the newest run is.

    Args:
        server: HOST:PORT.
        ca: the certificate that the server's is checked by.
        key: the site's private key.
        end: set when the node is asked to end; waits stop then.
        clock: the time that calls are signed with.
    """

    def __init__(self, server: str, ca: Path, key: Path, end: threading.Event, *, clock: Clock = utc_now) -> None:
        private = serialization.load_ssh_private_key(key.read_bytes(), None)
        if not isinstance(private, ec.EllipticCurvePrivateKey):
            raise Refused("the site's key is none on an elliptic curve")
        self._signature = _Signature(private, clock)
        self._client = FleetHttpClient.from_server_address(server, False, ca.read_bytes(), [self._signature])
        self._call = _Calls(self._client, end, clock)
        self._node: Node | None = None
        self._quiet = threading.Event()
        self._beats: threading.Thread | None = None
        self._runs: dict[int, dict[str, Any]] = {}

    @property
    def node(self) -> int:
        """The id that the server knows the site by."""
        return int(self._there.node_id)

    @property
    def _there(self) -> Node:
        if self._node is None:
            raise RuntimeError("no session is open")
        return self._node

    # -- the session ------------------------------------------------------------------------------

    def open(self, left: int | None = None) -> None:
        """Begin a session.

        Args:
            left: the node id of a session that was not closed: it would keep the key from being used for half a
                minute, and is closed now.

        Raises:
            Refused: the key is not known, or is in use elsewhere, or the clocks differ too much.
            NotTrusted: somebody else answers.
            Ended: asked to end before the server answered.
        """
        if left is not None:
            with contextlib.suppress(Rejected, Refused):
                self._call("DeactivateNode", DeactivateNodeRequest(node_id=left))
        request = ActivateNodeRequest(public_key=self._signature.public, heartbeat_interval=_INTERVAL_S)
        self._node = Node(node_id=self._call("ActivateNode", request).node_id)
        self._quiet = threading.Event()
        self._beats = threading.Thread(target=self._beat, args=(self._quiet,), daemon=True)
        self._beats.start()

    def close(self) -> None:
        """End the session; tried once."""
        self._quiet.set()
        if self._beats is not None:
            self._beats.join(_LAST_BEAT_S)  # a sign of life that came later would have the site online again
        node, self._node = self._node, None
        if node is not None:
            with contextlib.suppress(httpx.HTTPError, RuntimeError, ValueError):
                self._client.DeactivateNode(DeactivateNodeRequest(node_id=node.node_id))

    def hang_up(self) -> None:
        """Let the connection go, with or without a session; nothing can be called any more."""
        self._quiet.set()
        if self._beats is not None:
            self._beats.join()
        self._client.close()

    def _beat(self, quiet: threading.Event) -> None:
        """Give signs of life; what refuses them refuses the next call too, where it is told."""
        while not quiet.is_set():
            lived = False
            with contextlib.suppress(httpx.HTTPError, RuntimeError, ValueError):
                request = SendNodeHeartbeatRequest(node=self._there, heartbeat_interval=_INTERVAL_S)
                lived = bool(self._client.SendNodeHeartbeat(request).success)
            quiet.wait(_BEAT_S * random.uniform(0.8, 1.2) if lived else 1.0)

    # -- messages ---------------------------------------------------------------------------------

    def look(self) -> Work | None:
        """The next message for this site, if there is one.

        The server takes it as the word that the site is in the middle of none: one that was handed out and did not
        arrive, for the line broke, is handed out again.

        Raises:
            Refused, NotTrusted, Ended: as `open`.
        """
        answer = self._call("PullMessages", PullMessagesRequest(node=self._there))
        if not answer.messages_list:
            return None
        head = message_from_proto(answer.messages_list[0])
        number = head.metadata.group_id
        what = f"{head.metadata.message_type[:40]!r}" + (f" of round {number[:9]!r}" if number else "")
        return Work(head, answer.message_object_trees[0], int(head.metadata.run_id), what)

    def fetch(self, work: Work, facts: Mapping[str, str]) -> tuple[Message, Context]:
        """A message with its content, and Flower's context: the site's `facts`, and what its run was started with.

        Raises:
            RunOver: its run is over.
            bundle.ForeignCode: its run is of another app than the installed one.
            Rejected: it cannot be had.
            Refused, NotTrusted, Ended: as `open`.
        """
        configuration = self._run(work.run)
        try:
            message = pull_and_inflate_object_from_tree(
                work.tree,
                make_pull_object_fn_protobuf(lambda request: self._call("PullObject", request), self._there, work.run),
                make_confirm_message_received_fn_protobuf(
                    lambda request: self._call("ConfirmMessageReceived", request), self._there, work.run
                ),
                return_type=Message,
            )
        except (ObjectPullError, TypeError, KeyError, ValueError) as error:
            raise Rejected(f"it cannot be read ({type(error).__name__})") from None
        message.metadata.__dict__["_message_id"] = work.tree.object_id  # what is sent does not hold its own id
        return message, Context(work.run, self.node, dict(facts), RecordDict(), configuration)

    def goes_on(self, work: Work) -> bool:
        """Whether the run of a message goes on, so that its answer is wanted.

        Raises:
            Refused, NotTrusted, Ended: as `open`.
        """
        return self._wanted(work.run, work.tree.object_id)

    def _wanted(self, run: int, message: str) -> bool:
        # For what was taken in and is gone: unlike other calls that tell of a run, this one fills no log of the server.
        try:
            self._call("PullObject", PullObjectRequest(node=self._there, run_id=run, object_id=message))
        except RunOver:
            return False
        except Rejected:
            return True
        return True

    def send(self, reply: Message) -> None:
        """Send an answer.

        Raises:
            RunOver: nobody wants it any more.
            Rejected: the server does not take it.
            Refused, NotTrusted, Ended: as `open`.
        """
        reply.metadata.__dict__["_message_id"] = reply.object_id
        run, asked = int(reply.metadata.run_id), reply.metadata.reply_to_message_id
        with no_object_id_recompute():
            request = PushMessagesRequest(
                node=self._there,
                messages_list=[message_to_proto(remove_content_from_message(reply))],
                message_object_trees=[get_object_tree(reply)],
                clientapp_runtime_list=[0.0],  # exact seconds tell of rows: the answer has those that may be told
            )
            answer = self._call("PushMessages", request)
            push = make_push_object_fn_protobuf(
                lambda request: self._call("PushObject", request, over=lambda: not self._wanted(run, asked)),
                self._there,
                run,
                answer.session_id,
            )
            try:
                push_objects(get_all_nested_objects(reply), push, object_ids_to_push=set(answer.objects_to_push))
            except ObjectPushError as error:
                raise Rejected(type(error).__name__) from None

    def _run(self, run: int) -> dict[str, Any]:
        """What a run was started with, of the newest run kept.

        Raises:
            bundle.ForeignCode: it brings other code, or names another app.
        """
        if run not in self._runs:
            started = run_from_proto(self._call("GetRun", GetRunRequest(node=self._there, run_id=run)).run)
            bundle.check_names(started.fab_id, started.fab_version, started.fab_hash)
            request = GetFabRequest(node=self._there, hash_str=started.fab_hash, run_id=run)
            bundle.check(self._call("GetFab", request).fab.content)
            self._runs = {run: {**bundle.defaults(), **started.override_config}}
        return self._runs[run]


def clock_line(ahead_s: float) -> str | None:
    """What to say of a clock that is so many seconds ahead of the server's; None where it is right enough."""
    seconds = abs(ahead_s)
    if -_BEHIND_S < ahead_s < _AHEAD_S:
        return None
    lengths = {"day": 86_400, "hour": 3_600, "minute": 60, "second": 1}
    unit = next(unit for unit, length in lengths.items() if seconds >= 0.95 * length)
    number = round(seconds / lengths[unit])
    where = "ahead of" if ahead_s > 0 else "behind"
    return f"its clock is {number} {unit}{'s' if number > 1 else ''} {where} the server's: set it right"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_certificate(error: BaseException) -> bool:
    return any(
        isinstance(cause, ssl.SSLCertVerificationError) or "CERTIFICATE_VERIFY" in str(cause)
        for cause in _causes(error)
    )


def _certificate_line(error: BaseException) -> str:
    for cause in _causes(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            return str(cause.verify_message)
    return str(error)


def failure(work: Work, reason: str) -> Message:
    """The answer to a message that comes to nothing; `reason` reaches the server."""
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=work.head)


def packed(work: Work) -> bytes:
    """The head of a message, to be kept in a file."""
    return bytes(message_to_proto(remove_content_from_message(work.head)).SerializeToString())


def unpacked(data: bytes) -> Work:
    """A message of which only the head is left; an answer to it needs no more.

    Raises:
        ValueError: `data` is none that `packed` wrote.
    """
    try:
        head = message_from_proto(MessageProto.FromString(data))
    except Exception as error:
        raise ValueError("no message") from error
    return Work(head, None, int(head.metadata.run_id), repr(head.metadata.message_type))
