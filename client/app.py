"""The ClientApp: a thin shell that turns Flower messages into calls of the worker.

Whatever goes wrong inside, the server learns the kind of error and the line of our code, never a message text: that
could quote a row or a path. The whole error stays in the client's own log.
"""

from __future__ import annotations

import errno
import functools
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

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of the organisation's own disk: nothing to go on with


@functools.lru_cache(maxsize=1)
def _worker(config: str) -> Worker:
    return Worker(configs.from_json(config))


@functools.lru_cache(maxsize=1)
def federation(config: str) -> examples.Federation:
    """The clients of a simulated run, read once per process; `config` is the run's JSON."""
    run = configs.from_json(config)
    return examples.federate(run.data, run.seed)


def _site(context: Context) -> Site:
    """The site of a virtual node: its part of the configured source, its memory under the node's `state-path`."""
    clients = federation(str(context.run_config["config"])).clients
    index = int(context.node_config[PARTITION_ID_KEY])
    if int(context.node_config[NUM_PARTITIONS_KEY]) != len(clients):
        raise ValueError(f"{context.node_config[NUM_PARTITIONS_KEY]} nodes for {len(clients)} clients")
    name, train, test = clients[index]
    return Site(name, train, test, Path(str(context.node_config["state-path"])) / name)


def _answer(message: Message, context: Context, act: Callable[[Worker, Site], RecordDict]) -> Message:
    site: Site | None = None
    try:
        site = _site(context)
        content = act(_worker(str(context.run_config["config"])), site)
    except OSError as error:
        if error.errno in _FULL:
            raise
        return _failed(message, error, site)
    except Exception as error:
        return _failed(message, error, site)
    return Message(content, reply_to=message)


def _failed(message: Message, error: Exception, site: Site | None) -> Message:
    """An error reply that says little; all of it goes into `errors.log` in the site's own folder."""
    if site is not None:
        site.folder.mkdir(parents=True, exist_ok=True)
        with (site.folder / "errors.log").open("a", encoding="utf-8") as log:
            log.write("".join(traceback.format_exception(error)) + "\n")
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, _safe_reason(error)), reply_to=message)


def _safe_reason(error: Exception) -> str:
    """The kind of an error and where in our code it came up, without its text."""
    ours = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).parent.name in _OURS]
    place = (
        f" in {Path(ours[-1].filename).parent.name}/{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else ""
    )
    kind = "its loss is not a number" if isinstance(error, FloatingPointError) else type(error).__name__
    return f"{kind}{place}; its own errors.log says more"


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
