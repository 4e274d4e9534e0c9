"""A SuperLink for tests: it hands Flower's own grid the answers of an app in this process, or whatever a test wants."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import httpx
from flwr.app import Context, Error, Message, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.clientapp import ClientApp
from flwr.common.constant import NUM_PARTITIONS_KEY, PARTITION_ID_KEY, SUPERLINK_NODE_ID, ErrorCode
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import ObjectTree, PullObjectResponse
from flwr.proto.node_pb2 import NodeInfo
from flwr.proto.runtime_pb2 import GetNodesResponse, PullAppMessagesResponse, PushAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_id, get_object_tree
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid


def be_the_server() -> None:
    """Let this process make messages, as that of a ServerApp does."""
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, SUPERLINK_NODE_ID


class Answer(NamedTuple):
    """What a site has pushed: the head, the tree of its objects, and the objects that have come."""

    head: Message
    tree: ObjectTree
    contents: dict[str, bytes]


def answer_of(message: Message) -> Answer:
    """A message as an honest SuperNode pushes it."""
    contents = {i: each.deflate() for i, each in get_all_nested_objects(message).items()}
    message.metadata.__dict__["_message_id"] = message.object_id
    return Answer(remove_content_from_message(message), get_object_tree(message), contents)


def instead(reply: Message, taken: RecordDict | Error) -> Answer:
    """A reply with another content, or with an error, as an honest SuperNode pushes it."""
    given = {"error": taken} if isinstance(taken, Error) else {"content": taken}
    return answer_of(make_message(metadata=reply.metadata, **given))  # type: ignore[arg-type]


def of_objects(reply: Message, *contents: bytes, flat: bool = True) -> Answer:
    """An answer of any objects, of which the last is the root."""
    ids = [get_object_id(content) for content in contents]
    tree = ObjectTree(object_id=ids[-1], children=[ObjectTree(object_id=i) for i in ids[:-1]])
    reply.metadata.__dict__["_message_id"] = ids[-1]
    return Answer(remove_content_from_message(reply), tree, dict(zip(ids, contents, strict=True)))


Push = Callable[[Message], Answer | None]  # what a site pushes instead of this reply; None: nothing


class Link:
    """The calls that Flower's grid makes; owns the answers that are there, by the id of what they answer."""

    def __init__(self, app: ClientApp, nodes: int, push: dict[int, Push] | None = None) -> None:
        self.app, self.nodes, self.push = app, range(1000, 1000 + nodes), push or {}
        self.there: dict[str, Answer] = {}
        self.listed: dict[str, Answer] = {}  # by root
        self.broken: set[str] = set()  # ids that make the SuperLink fail
        self.pulled: list[str] = []
        self.told: list[tuple[str, Any]] = []  # calls beside Flower's: where to, and what
        self.says = 200  # to these
        self._sent: dict[str, Message] = {}
        self._client = httpx.Client(transport=httpx.MockTransport(self._hear))
        self._base_url = "http://link"

    def _hear(self, request: httpx.Request) -> httpx.Response:
        self.told.append((request.url.path, json.loads(request.content)))
        return httpx.Response(self.says)

    def GetNodes(self, request: Any) -> Any:
        return GetNodesResponse(nodes=[NodeInfo(node_id=node) for node in self.nodes])

    def PushMessages(self, request: Any) -> Any:
        return PushAppMessagesResponse(message_ids=[m.metadata.message_id for m in request.messages_list])

    def PushObject(self, request: Any) -> Any:
        raise AssertionError("it asked for no object")

    def deliver(self, message: Message) -> None:
        """Let the addressed node answer."""
        index = self.nodes.index(message.metadata.dst_node_id)
        config = {PARTITION_ID_KEY: index, NUM_PARTITIONS_KEY: len(self.nodes)}
        context = Context(1, message.metadata.dst_node_id, config, RecordDict(), {"name": "run-1"})
        try:
            reply = self.app(message, context)
        except Exception as error:
            reply = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, type(error).__name__), reply_to=message)
        answer = self.push.get(message.metadata.dst_node_id, answer_of)(reply)
        if answer is not None:
            self.there[message.metadata.message_id] = answer

    def PullMessages(self, request: Any) -> Any:
        if self.broken & set(request.message_ids):
            asked = httpx.Request("POST", "http://link/v1/runtime/pull-messages")
            raise httpx.HTTPStatusError("500", request=asked, response=httpx.Response(500, request=asked))
        found = [self.there.pop(i) for i in request.message_ids if i in self.there]
        self.listed |= {answer.tree.object_id: answer for answer in found}
        heads, trees = [message_to_proto(answer.head) for answer in found], [answer.tree for answer in found]
        return PullAppMessagesResponse(messages_list=heads, message_object_trees=trees)

    def PullObject(self, request: Any) -> Any:
        self.pulled.append(request.object_id)
        for answer in self.listed.values():
            if request.object_id in answer.contents:
                content = answer.contents[request.object_id]
                return PullObjectResponse(object_found=True, object_available=content != b"", object_content=content)
        return PullObjectResponse(object_found=False)

    def ConfirmMessageReceived(self, request: Any) -> None:
        self.listed.pop(request.message_object_id, None)


class LinkedGrid(HttpGrid):
    """Flower's grid to a `Link`; the nodes answer when they are sent something."""

    def __init__(self, link: Link) -> None:
        super().__init__(token="t")
        self.link = link
        be_the_server()
        self.set_run(Run.create_empty(1))

    @property
    def _runtime_client(self) -> Any:
        return self.link

    def push_messages(self, messages: Any) -> Any:
        messages = list(messages)
        contents = [message.content for message in messages]
        ids = super().push_messages(messages)
        for message, content in zip(messages, contents, strict=True):
            message.__dict__["_content"] = content
            self.link.deliver(message)
        return ids
