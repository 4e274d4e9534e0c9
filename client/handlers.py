"""What a client answers to a message: in this process for a virtual client, in the worker for a site of its own.

Whatever goes wrong inside, the server learns the kind of error and the line of our code, never a message text: that
could quote a row or a path. Under record-level privacy it learns not even that, for which error it is may depend on a
row. The whole error stays in the client's own log.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import traceback
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, RecordDict
from flwr.common.constant import NUM_PARTITIONS_KEY, PARTITION_ID_KEY

from apiary.config import loading
from apiary.config.schema import RunConfig
from apiary.core.errors import CodecError, UnsoundStart, UserError
from apiary.core.files import begin_anew, flushed_together, own_folder
from apiary.core.tensors import StateDict
from apiary.data import stages
from apiary.data.federation import Federation
from apiary.privacy import sampling
from apiary.transport import flower_records
from apiary.transport.downlink import Parcel
from client import compression, device_rank
from client.site import Site
from client.worker import Worker

_log = logging.getLogger(__name__)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of the organisation's own disk: nothing to go on with
_HOUSE = Path(__file__).resolve().parents[1]  # the folder that holds our packages, in a checkout and installed alike
_PACKAGES = ("apiary", "client", "strategies")
_ERROR = 20_000  # characters of an error in full; what the server sent may be quoted in it


class Refusal(Exception):
    """A message cannot be answered; the text is what the server may be told."""


def answer(
    kind: str,
    content: RecordDict,
    worker: Callable[[], Worker],
    site: Callable[[], Site],
    errors: Path | None = None,
    *,
    private: bool = False,
) -> RecordDict:
    """The content of the answer to a message of type `kind`.

    Args:
        kind: the type of the message, such as "train".
        content: what it holds.
        worker: makes the worker that answers.
        site: reads the site that is asked.
        errors: the folder that keeps errors in full; the site's own where None.
        private: whether the run promises the rows record-level privacy.

    Raises:
        Refusal: anything went wrong; the text is what the server may be told.
        OSError: the disk is full; without the path, for Flower would send the text to the server.
    """
    try:
        known = site()
        errors = errors or known.folder
        return _ask(worker(), known, kind, content)
    except Refusal:
        raise
    except OSError as error:
        if error.errno in _FULL:
            _write_down(error, errors)
            raise OSError(error.errno, os.strerror(error.errno)) from None
        raise Refusal(_reason(error, errors, private)) from error
    except Exception as error:
        raise Refusal(_reason(error, errors, private)) from error


def _ask(worker: Worker, site: Site, kind: str, content: RecordDict) -> RecordDict:
    if kind == flower_records.HELLO:
        _check_promise(worker, site)
        return flower_records.hello_reply(
            worker.hello(site)._replace(holds=compression.holds(worker.config, site.folder))
        )
    number, payload = flower_records.read_request(content, functools.partial(_receive, worker, site))
    if kind == "train":
        answer = worker.train(site, number, payload)
        return flower_records.train_reply(answer, worker.send(site, number, payload, answer))
    if kind == "evaluate":
        return flower_records.score_reply(site.client, worker.evaluate(site, payload, number))
    raise ValueError(f"no answer to messages of type {kind!r}")


def _receive(worker: Worker, site: Site, sent: Parcel) -> StateDict:
    """What the server sent, unpacked.

    Raises:
        Refusal: the parcel is damaged, or builds on an adapter that the site doesn't hold.
    """
    try:
        return compression.receive(worker.config, site.folder, worker.shapes(site), sent)
    except CodecError as error:
        raise Refusal(f"the server's changes are of no use to it: {error}; it needs the whole adapter") from None


def _check_promise(worker: Worker, site: Site) -> None:
    """Check that the run can keep its promise to the site's rows; what else would be said follows from public numbers.

    Raises:
        Refusal: it cannot, or not for a single round; or its method needs numbers that the site does not tell.
    """
    try:
        sampling.check(worker.config, [site.counts.planned(stages.rows_by_stage(site.train, worker.config))])
    except UserError as error:
        raise Refusal(str(error)) from None
    if worker.local.by_rates and worker.config.train.epochs is not None and site.counts.kind != "exact":
        raise Refusal(
            f"this site tells {site.counts.kind} counts, and the run's method divides by the steps of a visit, which "
            "train.epochs lets depend on its rows; set train.steps"
        )


def _reason(error: Exception, folder: Path | None, private: bool) -> str:
    """A text that says little; all of it stays on this machine."""
    written = _write_down(error, folder)
    # A traceback that stands in a file is not for everybody's terminal.
    _log.log(logging.DEBUG if written else logging.ERROR, "a message could not be answered", exc_info=error)
    told = "it could not answer (what went wrong is not told under record-level privacy)" if private else _safe(error)
    return f"{told}; {'its own errors.log' if written else 'the log on its machine'} says more"


def _write_down(error: Exception, folder: Path | None) -> bool:
    """Whether the whole error could be added to `errors.log` in the site's own folder."""
    if folder is None:
        return False
    try:
        own_folder(folder)
        begin_anew(folder / "errors.log")
        handle = os.open(folder / "errors.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(handle, "a", encoding="utf-8", errors="replace") as log:
            os.fchmod(handle, 0o600)  # of an older one too: a traceback can quote a row
            log.write(_ends("".join(traceback.format_exception(error))) + "\n")
    except OSError:
        return False
    return True


def _ends(text: str) -> str:
    """A text, or its beginning and its end where it is longer than an error may be."""
    half = _ERROR // 2
    return text if len(text) <= _ERROR else f"{text[:half]}\n... {len(text) - 2 * half} characters ...\n{text[-half:]}"


def _safe(error: Exception) -> str:
    """The kind of an error and where in our code it came up, without its text."""
    frames = [(Path(frame.filename), frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    inside = [(path.relative_to(_HOUSE), line) for path, line in frames if path.is_relative_to(_HOUSE)]
    ours = [f"{path.as_posix()}:{line}" for path, line in inside if path.parts[0] in _PACKAGES]
    place = f" in {ours[-1]}" if ours else ""
    if isinstance(error, UnsoundStart):
        kind = "the adapter that it was sent gives no number on its rows, before any step of its own"
    elif isinstance(error, FloatingPointError):
        kind = "its training diverged, and a lower train.lr usually helps"
    else:
        kind = type(error).__name__
    return f"{kind}{place}"


# -- virtual clients: all in this process -------------------------------------------------------


def simulated(
    kind: str, content: RecordDict, context: Context, worker_of: Callable[[str], Worker] | None = None
) -> RecordDict:
    """The content of a virtual client's answer; raises as `answer` does.

    Args:
        kind: the type of the message.
        content: what it holds.
        context: the node's.
        worker_of: makes of the run's JSON the worker that answers; `worker` where None.
    """
    config = str(context.run_config["config"])
    make = worker_of or worker
    site = functools.partial(_site, config, context)
    with flushed_together():  # the server of a simulation flushes before each checkpoint
        return answer(kind, content, functools.partial(make, config), site, private=is_private(config))


@functools.lru_cache(maxsize=1)
def _run_of(config: str) -> RunConfig:
    """A run, checked once and not for each message; `config` is its JSON."""
    return loading.from_json(config)


@functools.lru_cache(maxsize=1)
def is_private(config: str) -> bool:
    """Whether a run promises record-level privacy; `config` is its JSON. One that cannot be read promises nothing."""
    try:
        return _run_of(config).privacy.unit == "record"
    except Exception:  # of another version; what is wrong with it will be said when it is used
        return False


@functools.lru_cache(maxsize=1)
def worker(config: str) -> Worker:
    """The worker of all virtual clients in this process; `config` is the run's JSON."""
    return Worker(_run_of(config))


@functools.lru_cache(maxsize=1)
def federation(config: str) -> Federation:
    """The clients of a simulated run, read once per process; `config` is the run's JSON.

    Runs that differ in nothing that reading depends on have one federation, as those of a sweep.
    """
    run = _run_of(config)
    private, own = {"unit"}, {"enabled", "validation"}
    read = run.model_dump_json(
        include={"seed": True, "data": True, "continual": True, "privacy": private, "personal": own}
    )
    sources = (_stamp(place) for place in (run.data.source, run.data.test) if place)
    return _federation(read, tuple(sources))


@functools.lru_cache(maxsize=1)
def _federation(read: str, sources: tuple[object, ...]) -> Federation:
    """The federation by the part of the configuration that reading sees, as JSON, and the state of the files."""
    run = RunConfig.model_validate_json(read)
    return stages.rows_of_run(run)


def _stamp(place: str) -> object:
    """What changes when a file, or one in a folder, is written; of a database or a hub id it is another each time."""
    if place.startswith("builtin:"):
        return place
    path = Path(place)
    try:
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        return tuple((str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files)
    except (OSError, ValueError):
        return object()


def forget() -> None:
    """Make the worker again when it is next asked for, and read again what may have changed since it was read."""
    worker.cache_clear()
    federation.cache_clear()


def _site(config: str, context: Context) -> Site:
    nodes, clients = int(context.node_config[NUM_PARTITIONS_KEY]), len(federation(config).clients)
    if nodes != clients:
        raise ValueError(f"{nodes} nodes for {clients} clients")
    index = int(context.node_config[PARTITION_ID_KEY])
    return virtual_site(config, index, Path(str(context.node_config["state-path"])))


def virtual_site(config: str, index: int, state: Path) -> Site:
    """The site of the virtual client `index`: its part of the configured source, its memory under `state`."""
    client = federation(config).clients[index]
    folder = state / client.name
    run = _run_of(config)
    given = run.adapter.ranks
    if given == "memory":
        rank = device_rank.of_device(run, folder)
    else:
        rank = given[index % len(given)] if given else run.adapter.rank
    ledger = folder / "ledger.json"
    return Site(client.name, client.train, client.test, folder, ledger, rank, validation=client.validation)
