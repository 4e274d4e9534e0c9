"""Who may call the server, and in whose name: what the front door asks before it reads a body, and of a small body.

Flower 1.41 signs the time of a call (ECDSA over SHA-256) and neither its path nor its body, and looks at the signature
only once it holds the whole body. So the time, the signature and the key are checked here, by the head of a call alone;
each signature is taken once; and a body must name the node that belongs to the key.
"""

from __future__ import annotations

import base64
import binascii
import datetime
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.proto.fab_pb2 import GetFabRequest
from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest, PullMessagesRequest, PushMessagesRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest, PushObjectRequest
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from google.protobuf.message import DecodeError, Message  # type: ignore[import-untyped]

from apiary.core.errors import UserError
from deploy import certificates, kits, session

# What a site with a key calls; registering is for the server's operator alone.
CALLS: dict[str, Any] = {
    "activate-node": ActivateNodeRequest,
    "deactivate-node": DeactivateNodeRequest,
    "send-node-heartbeat": SendNodeHeartbeatRequest,
    "pull-messages": PullMessagesRequest,
    "push-messages": PushMessagesRequest,
    "get-run": GetRunRequest,
    "get-fab": GetFabRequest,
    "push-object": PushObjectRequest,
    "pull-object": PullObjectRequest,
    "confirm-message-received": ConfirmMessageReceivedRequest,
}
CALL_BYTES = 65_536  # of a call that carries no object
# Flower cuts arrays into objects of 5 MiB; what else a site sends is small, and so is what stands around an object.
OBJECT_BYTES = 5 * 2**20 + 65_536
# Of one answer: an adapter of 4.3 GiB as it travels, and what stands around it. Each costs the SuperLink some queries,
# so it takes no more of them than the run has told it beforehand (`server.site_grid`).
OBJECTS = 900
# A caller's clock may be so far off. Ahead as far as Flower itself takes; behind, far less than Flower's 305 s, which
# must last for the body as well.
BEHIND_S, AHEAD_S = 60.0, 5.0
_REMEMBERED_S = BEHIND_S + AHEAD_S
_SIGNATURES = 20_000  # of one key in twice that time
_RESCAN_S = 1.0  # a key that is written over shows in no time stamp of its folder
_HEADERS = (FLEET_HTTP_PUBLIC_KEY_HEADER, TIMESTAMP_HEADER, FLEET_HTTP_SIGNATURE_HEADER)
_LONGEST = 1024  # characters of such a header
_ID = re.compile(r"(?:[0-9a-f]{64})?")  # of a message, an object or a bundle: SHA-256 of what it names
_WORD = re.compile(r"[ -~]{0,64}")
_WORDS = ("group_id", "message_type", "session_id")  # the texts of a call that are no such ids
_CONTENTS = ("content", "error")  # of an answer, which Flower neither logs nor echoes


class Refused(Exception):
    """A call that goes no further.

    Args:
        reason: a few words that hold nothing of the call, for the log.
        status: what it is answered with. Sites try again after 503, and end their session after 401.
        text: what it is answered besides; None = the reason.
        site: whose key signed it, where that is proved.
    """

    def __init__(self, reason: str, status: int, text: str | None = None, site: str = "") -> None:
        super().__init__(reason)
        self.reason, self.status, self.text, self.site = reason, status, text or reason, site


class UnknownKey(Refused):
    """No site has the key that a call names."""

    def __init__(self) -> None:
        super().__init__("unknown key", 401)


class Caller(NamedTuple):
    """A site that has proved its key."""

    site: str
    node: int
    key: bytes  # public, as PEM


class _Known(NamedTuple):
    site: str
    line: str  # the key in OpenSSH form, without its comment
    key: ec.EllipticCurvePublicKey


class Registry:
    """The keys in the folder of the server's kit and the nodes that they are registered as, read anew when they change.

    Args:
        sites: holds a file `NAME.pub` for each site.
        nodes: the JSON file in which the server keeps which key is which node.
    """

    def __init__(self, sites: Path, nodes: Path) -> None:
        self._sites, self._nodes_file = sites, nodes
        self._known: dict[bytes, _Known] = {}  # by PEM
        self._files: dict[str, tuple[tuple[int, ...], bytes, _Known]] = {}
        self._nodes: dict[str, tuple[str, int]] = {}  # by site: its key and its node
        self._folder_seen: tuple[int, ...] | None = None
        self._nodes_seen: tuple[int, ...] | None = None
        self._scanned = -_RESCAN_S

    def find(self, key: bytes) -> tuple[str, ec.EllipticCurvePublicKey, int | None]:
        """The site of a key, the key, and its node; None where the server has not registered it yet.

        Raises:
            KeyError: no site has this key.
        """
        self._look()
        known = self._known[key]
        line, node = self._nodes.get(known.site, ("", 0))
        return known.site, known.key, node if line == known.line else None

    def _look(self) -> None:
        now, folder = time.monotonic(), _stamp(self._sites)
        if folder != self._folder_seen or now - self._scanned >= _RESCAN_S:
            self._folder_seen, self._scanned = folder, now
            self._read_keys()
        stamp = _stamp(self._nodes_file)
        if stamp != self._nodes_seen and self._read_nodes():
            self._nodes_seen = stamp

    def _read_keys(self) -> None:
        try:
            paths = [Path(entry.path) for entry in os.scandir(self._sites) if entry.name.endswith(".pub")]
        except OSError:  # no folder, no site
            paths = []
        found = {}
        for path in paths:
            stamp, before = _stamp(path), self._files.get(path.stem)
            if before is not None and before[0] == stamp:
                found[path.stem] = before
                continue
            try:
                line = " ".join(kits.public_key(path).split()[:2])
                pem = certificates.public_pem(line)
            except (UserError, ValueError, OSError):  # it may just be being copied: that strikes nobody off
                if before is not None:
                    found[path.stem] = before
                continue
            key = cast(ec.EllipticCurvePublicKey, load_pem_public_key(pem))  # `public_pem` refuses other kinds
            found[path.stem] = stamp, pem, _Known(path.stem, line, key)
        self._files = found
        self._known = {pem: known for _, pem, known in found.values()}

    def _read_nodes(self) -> bool:
        try:
            values = json.loads(self._nodes_file.read_text(encoding="utf-8"))
            self._nodes = {
                name: (" ".join(entry["key"].split()[:2]), int(entry["node"]))
                for name, entry in values.items()
                if entry["node"]
            }
        except FileNotFoundError:
            self._nodes = {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False  # the last ones stand; looked at again with the next call
        return True


def _stamp(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_mtime_ns, found.st_ino, found.st_size


class Admission:
    """The checks of a call.

    Args:
        registry: who may call.
        clock: seconds since 1970.
        began: when this door began to remember signatures, by that clock; None = now.
    """

    def __init__(self, registry: Registry, clock: Callable[[], float] = time.time, began: float | None = None) -> None:
        self._registry, self._clock = registry, clock
        self._began = clock() if began is None else began
        self._used: dict[str, _Used] = {}

    def admit(self, headers: list[tuple[bytes, bytes]]) -> Caller:
        """Who calls, by the head of the call alone.

        Args:
            headers: of the call, names in small letters.

        Raises:
            Refused: no registered key signed it just now, or it was used before.
        """
        pem, stamp, signature = _signed(headers)
        try:
            site, key, node = self._registry.find(pem)
        except KeyError:
            raise UnknownKey from None
        try:
            signed_at = datetime.datetime.fromisoformat(stamp.decode("ascii"))
            if signed_at.tzinfo is None:
                raise ValueError("no time zone")
            at = signed_at.timestamp()
            key.verify(signature, stamp, ec.ECDSA(hashes.SHA256()))
            # (r, -s) is a second valid signature that anybody can make of (r, s): what is used up is r.
            r, _ = decode_dss_signature(signature)
        except (ValueError, OverflowError, InvalidSignature):
            raise Refused("bad signature", 401) from None
        now = self._clock()
        if not now - BEHIND_S < at < now + AHEAD_S:
            off = at - now
            told = f"your clock is {abs(off):.0f} s {'ahead of' if off > 0 else 'behind'} the server's"
            raise Refused("clock off", 401, told, site)
        self._began = min(self._began, now)  # where the clock was set back
        if at <= self._began + AHEAD_S:  # of a time whose signatures this door does not remember
            raise Refused("door just started", 503, site=site)
        used = self._used.setdefault(site, _Used(now))
        if used.full(now):
            raise Refused("too many calls", 503, site=site)
        if not used.take(stamp, r):
            raise Refused("used signature", 401, site=site)
        if node is None:
            raise Refused(session.NOT_REGISTERED, 503, site=site)
        return Caller(site, node, pem)


class _Used:
    """The signatures of one key, for as long as their time stamps would pass, in two halves of which the older goes.

    Flower's signatures are random (ECDSA with a fresh k), so two honest calls never share one, not even when their time
    stamps are equal. Were they made by RFC 6979, two calls in one microsecond would be one here.
    """

    def __init__(self, now: float) -> None:
        self._turned = now
        self._new: set[bytes] = set()
        self._old: set[bytes] = set()

    def full(self, now: float) -> bool:
        if now - self._turned >= _REMEMBERED_S:
            self._turned, self._old, self._new = now, self._new, set()
        self._turned = min(self._turned, now)  # a clock that is set back makes nothing forgotten sooner
        return len(self._new) + len(self._old) >= _SIGNATURES

    def take(self, stamp: bytes, r: int) -> bool:
        one = stamp + r.to_bytes(66, "big")[-16:]
        if one in self._new or one in self._old:
            return False
        self._new.add(one)
        return True


def _signed(headers: list[tuple[bytes, bytes]]) -> tuple[bytes, bytes, bytes]:
    """The public key, the time stamp and its signature, as bytes."""
    given = {name: [value for key, value in headers if key == name.encode()] for name in _HEADERS}
    if not any(given.values()):
        raise Refused("unsigned", 401)
    if any(len(values) != 1 or len(values[0]) > _LONGEST for values in given.values()):
        raise Refused("bad signature", 401)
    (key,), (stamp,), (signature,) = given.values()
    try:
        return base64.b64decode(key, validate=True), stamp, base64.b64decode(signature, validate=True)
    except (binascii.Error, ValueError):
        raise Refused("bad signature", 401) from None


def check(call: str, body: bytes, caller: Caller) -> None:
    """Check that a call speaks in the name of its caller alone.

    That the *objects* of `pull-object`, `push-object` and `confirm-message-received` belong to the caller does not show
    in the call: the SuperLink sees to it (`deploy.objects`), by the node that is proved here.

    Args:
        call: one of `CALLS`.
        body: all of it.
        caller: who signed it.

    Raises:
        Refused: it names another node, holds a text that is none of Flower's, or cannot be read.
    """
    try:
        request = CALLS[call].FromString(body)
    except DecodeError:
        raise Refused("no protobuf", 400, site=caller.site) from None
    if not well_formed(request):
        raise Refused("no id", 400, site=caller.site)
    if isinstance(request, ActivateNodeRequest):
        own = request.public_key == caller.key
    elif isinstance(request, DeactivateNodeRequest):
        own = request.node_id == caller.node
    else:
        own = request.node.node_id == caller.node
    if isinstance(request, PushMessagesRequest):
        # One is all that Flower reads, and it looks only whether the named source was asked.
        own = own and len(request.messages_list) == 1 and len(request.message_object_trees) == 1
        own = own and all(message.metadata.src_node_id == caller.node for message in request.messages_list)
        if own and _more_than(OBJECTS, request.message_object_trees[0]):
            raise Refused("too many objects", 413, site=caller.site)
    if not own:
        raise Refused("in another's name", 401, site=caller.site)


def well_formed(request: Message) -> bool:
    """Whether each text of a call has the form that Flower gives it: Flower logs and echoes them as they come."""
    return all((_WORD if name in _WORDS else _ID).fullmatch(text) for name, text in _texts(request))


def _texts(request: Message) -> Iterator[tuple[str, str]]:
    for field, value in request.ListFields():
        repeated = hasattr(value, "append")
        for one in value if repeated else [value]:
            if isinstance(one, str):
                yield field.name, one
            elif isinstance(one, Message) and field.name not in _CONTENTS:
                yield from _texts(one)


def _more_than(most: int, tree: Any) -> bool:
    """Whether an `ObjectTree` has more objects; one that it names many times counts so often."""
    waiting = [tree]
    for seen, node in enumerate(waiting):
        if seen >= most:
            return True
        waiting += node.children
    return False
