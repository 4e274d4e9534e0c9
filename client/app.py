"""The ClientApp: a thin shell that turns Flower messages into calls of the worker.

Whatever goes wrong inside, the server learns the kind of error and the line of our code, never a message text: that
could quote a row or a path. The whole error stays in the client's own log.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
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

_log = logging.getLogger(__name__)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of the organisation's own disk: nothing to go on with


@functools.lru_cache(maxsize=1)
def _worker(config: str) -> Worker:
    return Worker(configs.from_json(config))


@functools.lru_cache(maxsize=1)
def federation(config: str) -> examples.Federation:
    """The clients of a simulated run, read once per process; `config` is the run's JSON."""
    run = configs.from_json(config)
    return examples.federate(run.data, run.seed)


def forget() -> None:
    """Read everything again when it is next asked for."""
    _worker.cache_clear()
    federation.cache_clear()


def _site(context: Context) -> Site:
    """The site of a virtual node: its part of the configured source, its memory under the node's `state-path`."""
    clients = federation(str(context.run_config["config"])).clients
    index = int(context.node_config[PARTITION_ID_KEY])
    if int(context.node_config[NUM_PARTITIONS_KEY]) != len(clients):
        raise ValueError(f"{context.node_config[NUM_PARTITIONS_KEY]} nodes for {len(clients)} clients")
    name, train, test = clients[index]
    return Site(name, train, test, Path(str(context.node_config["state-path"])) / name)


def _answer(message: Message, context: Context, act: Callable[[Worker, Site], RecordDict]) -> Message:
    """The reply to a message; an error reply for whatever goes wrong.

    Raises:
        OSError: the disk is full; without the path, for Flower would send the text to the server.
    """
    site: Site | None = None
    try:
        site = _site(context)
        content = act(_worker(str(context.run_config["config"])), site)
    except OSError as error:
        if error.errno in _FULL:
            raise OSError(error.errno, os.strerror(error.errno)) from None
        return _failed(message, error, site)
    except Exception as error:
        return _failed(message, error, site)
    return Message(content, reply_to=message)


def _failed(message: Message, error: Exception, site: Site | None) -> Message:
    """An error reply that says little; all of it stays on this machine."""
    written = site is not None and _write_down(error, site.folder)
    # A traceback that stands in a file is not for everybody's terminal.
    _log.log(logging.INFO if written else logging.ERROR, "a message could not be answered", exc_info=error)
    where = "its own errors.log says more" if written else "the log on its machine says more"
    reason = f"{_safe_reason(error)}; {where}"
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)


def _write_down(error: Exception, folder: Path) -> bool:
    """Whether the whole error could be added to `errors.log` in the site's own folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "errors.log").open("a", encoding="utf-8", errors="replace") as log:
            log.write("".join(traceback.format_exception(error)) + "\n")
    except OSError:
        return False
    return True


def _safe_reason(error: Exception) -> str:
    """The kind of an error and where in our code it came up, without its text."""
    ours = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).parent.name in _OURS]
    place = (
        f" in {Path(ours[-1].filename).parent.name}/{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else ""
    )
    kind = "its loss is not a number" if isinstance(error, FloatingPointError) else type(error).__name__
    return f"{kind}{place}"


_OURS = ("apiary", "client", "builtin", "curation", "continual")


def make_app(*mods: Mod) -> ClientApp:
    """A ClientApp whose messages pass through `mods` first."""
    app = ClientApp(mods=list(mods))

    @app.query("hello")
    def hello(message: Message, context: Context) -> Message:
        return _answer(message, context, lambda worker, site: records.hello_reply(worker.hello(site)))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        def act(worker: Worker, site: Site) -> RecordDict:
            return records.train_reply(*worker.train(site, *records.read_request(message.content)))

        return _answer(message, context, act)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        def act(worker: Worker, site: Site) -> RecordDict:
            _, payload = records.read_request(message.content)
            return records.score_reply(site.client, worker.evaluate(site, payload))

        return _answer(message, context, act)

    return app


app = make_app()
