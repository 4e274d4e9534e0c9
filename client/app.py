"""The ClientApp: a thin shell that hands Flower messages to a worker.

At a site the worker is a process of its own, reached at the node's `worker-address`: the node runs this app, and loads
neither torch nor the model. A virtual client is answered right here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import Mod
from flwr.common.constant import ErrorCode
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto

from apiary.transport import sealed
from client import worker_rpc

WORKER_ADDRESS = "worker-address"
Virtual: TypeAlias = Callable[[str, RecordDict, Context], RecordDict]  # as `client.handlers.simulated`


def _answer(message: Message, context: Context, virtual: Virtual | None = None) -> Message:
    """The reply to a message; an error reply for whatever goes wrong.

    Raises:
        OSError: the disk of a virtual client is full; without the path, for Flower would send the text to the server.
    """
    if WORKER_ADDRESS in context.node_config:
        return _ask_worker(message, context)
    from client import handlers  # not above: it loads torch

    try:
        content = (virtual or handlers.simulated)(message.metadata.message_type, message.content, context)
    except handlers.Refusal as refusal:
        return _refuse(message, str(refusal))
    return Message(content, reply_to=message)


def _ask_worker(message: Message, context: Context) -> Message:
    header = {
        "kind": message.metadata.message_type,
        "round": message.metadata.group_id,
        "config": str(context.run_config["config"]),
        "name": str(context.run_config["name"]),
        "message": message.metadata.message_id,
    }
    body = recorddict_to_proto(message.content).SerializeToString()
    try:
        answer = worker_rpc.ask(str(context.node_config[WORKER_ADDRESS]), worker_rpc.Envelope(header, body))
    except worker_rpc.Unanswered as error:
        return _refuse(message, str(error))
    if "seal" in answer.header:  # an error of the worker's too
        return Message(sealed.seal(answer.header["seal"], answer.body), reply_to=message)
    if "error" in answer.header:
        return _refuse(message, str(answer.header["error"]))
    return Message(recorddict_from_proto(RecordDictProto.FromString(answer.body)), reply_to=message)


def _refuse(message: Message, reason: str) -> Message:
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)


def make_app(*mods: Mod, virtual: Virtual | None = None) -> ClientApp:
    """A ClientApp whose messages pass through `mods` first.

    Args:
        mods: see Flower.
        virtual: answers for virtual clients; `client.handlers.simulated` where None.
    """
    app = ClientApp(mods=list(mods))

    @app.query("hello")
    def hello(message: Message, context: Context) -> Message:
        return _answer(message, context, virtual)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return _answer(message, context, virtual)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return _answer(message, context, virtual)

    return app


app = make_app()
