"""The ClientApp: a thin shell that turns Flower messages into calls of the worker.

Whatever goes wrong inside, the server learns the kind of error and the line of our code, never a message text: that
could quote a row or a path. The whole error stays in the client's own log.
"""

from __future__ import annotations

import functools
import logging
import traceback
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import Mod
from flwr.common.constant import NUM_PARTITIONS_KEY, PARTITION_ID_KEY, ErrorCode

from apiary import config as configs
from apiary import examples, records
from client.worker import Site, Worker

logger = logging.getLogger(__name__)


@functools.lru_cache(maxsize=1)
def _worker(config: str) -> Worker:
    return Worker(configs.from_json(config))


@functools.lru_cache(maxsize=1)
def _federation(config: str) -> examples.Federation:
    run = configs.from_json(config)
    return examples.federate(run.data, run.seed)


def _site(context: Context) -> Site:
    """The site of a virtual node: its part of the configured source, its memory under the node's `state-path`."""
    federation = _federation(str(context.run_config["config"]))
    index = int(context.node_config[PARTITION_ID_KEY])
    if int(context.node_config[NUM_PARTITIONS_KEY]) != len(federation.clients):
        raise ValueError(f"{context.node_config[NUM_PARTITIONS_KEY]} nodes for {len(federation.clients)} clients")
    name, train, test = federation.clients[index]
    return Site(name, train, test, Path(str(context.node_config["state-path"])) / name)


def _answer(message: Message, context: Context, act: Callable[[Worker, Site], RecordDict]) -> Message:
    try:
        content = act(_worker(str(context.run_config["config"])), _site(context))
    except Exception as error:
        logger.debug("a client failed", exc_info=True)
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, _safe_reason(error)), reply_to=message)
    return Message(content, reply_to=message)


def _safe_reason(error: Exception) -> str:
    """The kind of an error and where in our code it came up, without its text."""
    ours = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).parent.name in _OURS]
    place = (
        f" in {Path(ours[-1].filename).parent.name}/{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else ""
    )
    kind = "its loss is not a number" if isinstance(error, FloatingPointError) else type(error).__name__
    return f"{kind}{place}; the client's own log says more"


_OURS = ("apiary", "client", "builtin", "curation", "continual")


def make_app(*mods: Mod) -> ClientApp:
    """A ClientApp whose messages pass through `mods` first."""
    app = ClientApp(mods=list(mods))

    @app.query("hello")
    def hello(message: Message, context: Context) -> Message:
        return _answer(message, context, lambda worker, site: records.hello_reply(worker.hello(site)))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        number, payload = records.read_request(message.content)
        return _answer(message, context, lambda worker, site: records.train_reply(*worker.train(site, number, payload)))

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        _, payload = records.read_request(message.content)
        return _answer(
            message, context, lambda worker, site: records.score_reply(site.client, worker.evaluate(site, payload))
        )

    return app


app = make_app()
