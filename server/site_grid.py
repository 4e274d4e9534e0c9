"""The grid of a deployment: what a site sends as its answer cannot end the run, whatever it is.

Flower's own grid takes the whole of an answer, head and content, as a site wrote it, waits for each of its objects in
turn, and lets what is wrong with it out as an error of the run. Here an answer is one thing: the content of a message.
Who was asked, and for what, the server knows by itself; what cannot be read becomes a failure of its sender alone.

Private to flwr 1.41: the client, the node and the retries of `HttpGrid`, and the functions that put objects together.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import httpx
from flwr.app import Array, Error, Message, RecordDict
from flwr.app.message import make_message
from flwr.common.constant import ErrorCode
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import (
    get_object_body,
    get_object_head_values_from_object_content,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.superlink.grid import HttpGrid

from apiary.transport.flower_records import HELLO
from server.seals import Seals

_log = logging.getLogger(__name__)
UNREADABLE = "its answer cannot be read"
_CUT_OFF = "its answer stopped arriving before it was whole"
_NOT_HANDED_OVER = "the SuperLink cannot hand over its answer (superlink.log says why)"
_PATIENCE_S = 300.0  # without a further object of an answer, 5 MiB of it: 17 kB a second
_FAULTS, _FAULTS_S = 3, 10.0  # HTTP 500 for one message, so often and for so long: then it is not in passing
_SLOW_S, _SLOW_MOST_S = 20.0, 600.0  # until it is told who has not answered: first, and at most from then on
_SMALL = 65_536  # bytes of an object that is not a part of an array
_PART = 2**20  # bytes: sites cut arrays into parts of 5 MiB


class Limit(NamedTuple):
    """What one answer may come to."""

    size: int  # bytes
    objects: int  # that Flower cuts it into

    @property
    def reason(self) -> str:
        """Why an answer that comes to more is refused."""
        return f"its answer is larger than this run allows ({self.size} bytes in {self.objects} objects)"


def limit_of(parameters: int) -> Limit:
    """The limit of a run: twice the bytes of its adapter in float32, which no codec exceeds, and 1 MiB for the rest.

    Args:
        parameters: of the run's adapter.
    """
    size = 8 * parameters + 2**20
    return Limit(size, size // _PART + 16)


class Waits(NamedTuple):
    """What has had no answer for a while."""

    round: int | None  # None: the handshake
    kind: str
    nodes: tuple[int, ...]
    seconds: float


class _Watch:
    """Tells now and then who has not answered the newest messages: after 20 s, and whenever that has doubled.

    It owns which these are, when they were sent, and when it is told next.
    """

    def __init__(self, tell: Callable[[Waits], None]) -> None:
        self._tell = tell
        self._ids: list[str] = []
        self._since, self._next = 0.0, math.inf

    def begin(self, ids: Sequence[str]) -> None:
        """These were sent."""
        self._ids, self._since, self._next = list(ids), time.monotonic(), _SLOW_S

    def look(self, asked: Mapping[str, Message]) -> None:
        """Tell of those that are still asked, if it is time."""
        seconds = time.monotonic() - self._since
        if seconds < self._next:
            return
        self._next = seconds + min(seconds, _SLOW_MOST_S)
        if heads := [asked[i].metadata for i in self._ids if i in asked]:
            number = int(heads[0].group_id) if heads[0].message_type != HELLO else None
            self._tell(Waits(number, heads[0].message_type, tuple(head.dst_node_id for head in heads), seconds))


class _Unusable(Exception):
    """An answer that cannot be taken; the text is the reason."""


class _Arriving:
    """An answer that the SuperLink has listed: its objects that are here, and those that are still to come."""

    def __init__(self, root: str, objects: Sequence[str]) -> None:
        self.root, self.missing = root, list(dict.fromkeys(objects))
        self.contents: dict[str, bytes] = {}
        self.size, self.newest = 0, time.monotonic()

    def add(self, content: bytes, limit: Limit) -> None:
        """Take in the first of the missing objects.

        Raises:
            _Unusable: the answer comes to more than the limit.
        """
        self.size, self.newest = self.size + len(content), time.monotonic()
        kind = get_object_head_values_from_object_content(content)[0]
        if self.size > limit.size or (kind != "ArrayChunk" and len(content) > _SMALL + 128 * limit.objects):
            raise _Unusable(limit.reason)
        self.contents[self.missing.pop(0)] = content

    def inflated(self, limit: Limit) -> Message:
        """The message, once nothing is missing.

        Raises:
            _Unusable: it holds arrays that come to more than the limit, for a part may be named many times.
            Exception: whatever its objects make go wrong.
        """
        if sum(map(self._joined, self.contents.values())) > limit.size:
            raise _Unusable(limit.reason)
        message = inflate_object_from_contents(self.root, self.contents)
        if not isinstance(message, Message):
            raise TypeError(f"a {type(message).__name__}, not a message")
        return message

    def _joined(self, content: bytes) -> int:
        """The bytes that an array comes to when its parts are put together; 0 for another object."""
        kind, parts, _ = get_object_head_values_from_object_content(content)
        if kind != "Array":
            return 0
        named = json.loads(get_object_body(content, Array))["arraychunk_ids"]
        return sum(len(self.contents[parts[place]]) for place in named)


class SiteGrid(Grid):
    """Flower's grid to the sites, but for how answers are taken in.

    A failure of the transport is raised as Flower's grid raises it, once it has given up trying again.

    It owns what was asked of whom and has no answer yet, and the answers that have not wholly arrived.

    Args:
        grid: Flower's.
        limit: of one answer.
        seals: opens signed answers; None where none is signed.
        waits: told of who has not answered for a while.
    """

    def __init__(
        self,
        grid: HttpGrid,
        limit: Limit,
        seals: Seals | None = None,
        waits: Callable[[Waits], None] = lambda waits: None,
    ) -> None:
        self._grid, self._limit, self._seals, self._watch = grid, limit, seals, _Watch(waits)
        self._asked: dict[str, Message] = {}  # by message id, without content
        self._arriving: dict[str, _Arriving] = {}  # by the id of the message that is answered
        self._failed: dict[str, str] = {}  # likewise, the reason
        self._faults: dict[str, tuple[int, float]] = {}  # likewise: how often HTTP 500, and since when (monotonic s)

    def set_run(self, run: Any) -> None:
        """As Flower's."""
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        """As Flower's."""
        return self._grid.run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """As Flower's."""
        return self._grid.create_message(*args, **kwargs)

    def get_node_ids(self) -> Iterable[int]:
        """As Flower's."""
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """As Flower's; remembers what is asked of whom."""
        messages = list(messages)
        ids = list(self._grid.push_messages(messages))
        sent = {message.metadata.message_id: message.metadata for message in messages}
        self._asked |= {i: make_message(metadata=sent[i], content=RecordDict()) for i in ids if i in sent}
        self._watch.begin(ids)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The answers that have wholly arrived, each with the head that the server's own record gives it.

        One that cannot be taken is an error reply with the reason. An answer that is half there holds up no other.
        """
        ids = [i for i in message_ids if i in self._asked]
        if new := [i for i in ids if i not in self._arriving and i not in self._failed]:
            self._list(new)
        replies = [self._take(i) for i in ids]
        self._watch.look(self._asked)
        return [reply for reply in replies if reply is not None]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Not used: a run has `server.messaging` for it, which says who did not answer.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("server.messaging.exchange sends and receives")

    def _list(self, ids: Sequence[str]) -> None:
        """Ask the SuperLink which of these have an answer; one that makes it fail costs the others nothing."""
        try:
            response = self._grid._runtime_client.PullMessages(PullAppMessagesRequest(message_ids=ids))
        except httpx.HTTPStatusError as error:
            if error.response.status_code != httpx.codes.INTERNAL_SERVER_ERROR:
                raise
            self._list_apart(ids)
            return
        for listed, tree in zip(response.messages_list, response.message_object_trees, strict=True):
            answered, root = listed.metadata.reply_to_message_id, listed.metadata.message_id
            if answered in ids:  # whatever else is listed, nobody asked for it
                objects = [each.object_id for each in iterate_object_tree(tree)]
                self._arriving[answered] = _Arriving(root, objects)
                if len(objects) > self._limit.objects:
                    self._failed[answered] = self._limit.reason
                elif root not in objects:
                    self._failed[answered] = UNREADABLE

    def _list_apart(self, ids: Sequence[str]) -> None:
        """Ask for each by itself after an HTTP 500, which the answer of one site can be the cause of."""
        if len(ids) > 1:
            for each in ids:
                self._list([each])
            return
        times, since = self._faults.get(ids[0], (0, time.monotonic()))
        self._faults[ids[0]] = times + 1, since
        if times + 1 >= _FAULTS and time.monotonic() - since >= _FAULTS_S:
            self._failed[ids[0]] = _NOT_HANDED_OVER

    def _take(self, answered: str) -> Message | None:
        """The reply to a message, once all of it is here or it is known that it cannot be taken."""
        if answered not in self._arriving and answered not in self._failed:
            return None
        asked = self._asked[answered]
        try:
            if answered in self._failed:
                raise _Unusable(self._failed[answered])
            if not self._fetch(arriving := self._arriving[answered]):
                return None
            message = arriving.inflated(self._limit)
            taken: RecordDict | Error = message.error if message.has_error() else message.content
            if not isinstance(taken, RecordDict | Error):
                raise TypeError(f"its content is a {type(taken).__name__}")
            read = True
        except httpx.HTTPError:
            raise
        except Exception as error:
            known = isinstance(error, _Unusable)
            _log.warning("an answer of node %d: %s", asked.metadata.dst_node_id, error if known else repr(error)[:300])
            reason = str(error) if known else UNREADABLE
            taken, read = Error(ErrorCode.REPLY_MESSAGE_UNAVAILABLE, reason), False
        self._forget(answered)
        if read and self._seals:
            taken = self._seals.open(asked, taken)
        return Message(taken, reply_to=asked)

    def _fetch(self, arriving: _Arriving) -> bool:
        """Get what is there of an answer; returns whether that is all of it.

        Raises:
            _Unusable: it is too large, an object of it is not known, or none has come for a long time.
        """
        while arriving.missing:
            request = PullObjectRequest(
                node=self._grid.node, run_id=self._grid.run.run_id, object_id=arriving.missing[0]
            )
            response = self._grid._runtime_client.PullObject(request)
            if not response.object_found:
                raise _Unusable(UNREADABLE)
            if not response.object_available:
                if time.monotonic() - arriving.newest > _PATIENCE_S:
                    raise _Unusable(_CUT_OFF)
                return False
            arriving.add(response.object_content, self._limit)
        return True

    def _forget(self, answered: str) -> None:
        """Let the SuperLink, and this grid, drop a message that has its reply."""
        if arriving := self._arriving.pop(answered, None):
            self._grid._runtime_client.ConfirmMessageReceived(
                ConfirmMessageReceivedRequest(
                    node=self._grid.node, run_id=self._grid.run.run_id, message_object_id=arriving.root
                )
            )
        for kept in (self._asked, self._failed, self._faults):
            kept.pop(answered, None)


def guarded(
    grid: Grid, parameters: Callable[[], int], seals: Callable[[], Seals | None], waits: Callable[[Waits], None]
) -> Grid:
    """The grid that a run uses: of a deployment a `SiteGrid`, of a simulation the one that it has.

    Args:
        grid: what Flower gives the ServerApp.
        parameters: of the run's adapter; asked in a deployment alone.
        seals: opens signed answers, where sites are registered; likewise.
        waits: told of who has not answered for a while, likewise.
    """
    if not isinstance(grid, HttpGrid):
        return grid
    limit = limit_of(parameters())
    _tell(grid, limit)
    return SiteGrid(grid, limit, seals(), waits)


def _tell(grid: HttpGrid, limit: Limit) -> None:
    """Tell our SuperLink the limit of this run's answers: it stores no more of one than that.

    Raises:
        httpx.HTTPError: it cannot be reached, or takes nothing.
    """
    client, told = grid._runtime_client, {"run": str(grid.run.run_id), **limit._asdict()}

    def send() -> None:
        answer = client._client.post(f"{client._base_url}/apiary/limit", json=told)
        if answer.status_code != httpx.codes.NOT_FOUND:  # of Flower's own SuperLink, which has no limits
            answer.raise_for_status()

    grid._retry_invoker.invoke(send)
