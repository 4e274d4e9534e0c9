"""The site's worker: a process that keeps the base model and answers one message after the other.

It listens on a socket in a folder of its owner alone, with the standard gRPC health service beside. `python -m
client.site_worker --help` says what it needs; `apiary deploy client` starts it.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent import futures
from pathlib import Path
from typing import Any, NamedTuple

import grpc
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from flwr.app import RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from apiary.config import loading
from apiary.config.schema import RunConfig
from apiary.core import counts
from apiary.core.errors import UserError
from apiary.data import split, splits, stages, templates
from apiary.data.availability import Rows, check_rows, parse_columns
from apiary.data.federation import FEWEST
from apiary.models import adapters, availability
from apiary.transport import flower_records, sealed
from apiary.transport.signatures import Claim, Question, digest, private_key, sign
from client import device_rank, handlers, state, worker_rpc
from client.site import Facts, Site, at_home, local_algorithm, names_code
from client.worker import Worker
from client.worker_rpc import Envelope

_log = logging.getLogger(__name__)
_RUN_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")
_ROUND = re.compile(r"[0-9]{1,9}")
_KINDS = ("query.hello", "train", "evaluate")
_WATCH_S, _LET_GO_S = 0.5, 2.0  # how often it is asked whether somebody waits, and for how long nobody does
LET_GO = 5  # the exit code of a process that nobody waited for any more


class _Job(NamedTuple):
    """A run as this site carries it out."""

    name: str
    text: str  # the run's configuration as it came
    worker: Worker
    site: Site


class Service:
    """Answers calls one at a time, for one run after the other; the base stays loaded between them.

    Args:
        facts: what the site's operator says.
        key: what answers are signed with; None: they are not signed, which no deployment takes.
    """

    def __init__(self, facts: Facts, key: EllipticCurvePrivateKey | None = None) -> None:
        self._facts, self._key = facts, key
        self._job: _Job | None = None
        self._one = threading.Lock()
        self._wanted: Callable[[], bool] | None = None  # of the call in work

    def answer(self, call: Envelope, wanted: Callable[[], bool] = lambda: True) -> Envelope:
        """The answer to a call; whatever goes wrong becomes an answer with `error` in its header.

        Args:
            call: `kind`, `round`, `config`, `name` and `message` (its id) in the header, the content of the message in
                the body.
            wanted: whether somebody still waits for the answer; asked when its turn has come.
        """
        with self._one:
            if not wanted():
                return Envelope({"error": "nobody waited any more"})
            self._wanted = wanted
            began, loads = time.monotonic(), adapters.base_loads()
            kind, number = (str(call.header.get(key, "")) for key in ("kind", "round"))
            answer = self._answer(kind, call)
            self._wanted = None
            # Both come from the server and end up in a log: only what they may be is written.
            what = kind if kind in _KINDS else "an unknown message"
            place = f"round {number} " if _ROUND.fullmatch(number) and number != "0" else ""
            new, seconds = adapters.base_loads() - loads, time.monotonic() - began
            failed = f": {answer.header['error']}" if "error" in answer.header else ""
            _log.info("%s%s: %.1f s, %d base loads%s", place, what, seconds, new, failed)
            return answer if self._key is None else self._sealed(call, answer, self._key)

    def watch(self, let_go: Callable[[], None]) -> None:
        """Look, without end, whether the call in work is waited for; `let_go` where nobody has for two seconds.

        What is in work cannot be taken out of torch's hands. Its process can be ended, as it can at any time.
        """
        since: tuple[Callable[[], bool], float] | None = None
        while True:
            time.sleep(_WATCH_S)
            wanted = self._wanted
            if wanted is None or wanted():
                since = None
            elif since is None or since[0] is not wanted:
                since = wanted, time.monotonic()
            elif time.monotonic() - since[1] > _LET_GO_S:
                let_go()
                return

    def _sealed(self, call: Envelope, answer: Envelope, key: EllipticCurvePrivateKey) -> Envelope:
        """The answer with a signature that binds it to the call; an error is signed as well."""
        run, number, kind, message = (str(call.header.get(part, "")) for part in ("name", "round", "kind", "message"))
        outcome, body = sealed.ANSWER, answer.body
        if "error" in answer.header:
            outcome, body = sealed.ERROR, str(answer.header["error"]).encode()
        claim = Claim(Question(run, number, kind, message, self._facts.client), outcome, digest(body))
        return Envelope({"seal": sealed.header(claim, sign(key, claim))}, body)

    def _answer(self, kind: str, call: Envelope) -> Envelope:
        try:
            job = self._job_of(call)
            content = recorddict_from_proto(RecordDictProto.FromString(call.body))
            reply: RecordDict = handlers.answer(
                kind,
                content,
                lambda: job().worker,
                lambda: job().site,
                errors=self._facts.state,
                private=handlers.is_private(str(call.header["config"])),
            )
            if kind == flower_records.HELLO:
                state.save_fingerprint(job().site.folder, flower_records.read_hello_reply(reply).fingerprint)
        except handlers.Refusal as refusal:
            return Envelope({"error": str(refusal)})
        except OSError as error:
            return Envelope({"error": f"client disk full ({error.strerror})"})
        except Exception as error:  # a message of another version
            return Envelope({"error": f"its worker cannot read the message ({type(error).__name__})"})
        return Envelope({}, recorddict_to_proto(reply).SerializeToString() if self._key is None else sealed.pack(reply))

    def _job_of(self, call: Envelope) -> Callable[[], _Job]:
        """What makes the run of a call, once; the run before it is then let go.

        Raises:
            Refusal: the run's name could lead out of the site's folder.
        """
        name, text = str(call.header["name"]), str(call.header["config"])
        if not _RUN_NAME.fullmatch(name):
            raise handlers.Refusal("the run's name is not allowed: letters, digits, '.', '_' and '-'")

        def make() -> _Job:
            if self._job is None or (self._job.name, self._job.text) != (name, text):
                self._job = None
                sent = loading.from_json(text)
                _refuse_foreign_places(sent, self._facts)
                _refuse_chosen_rows(sent)
                config = at_home(sent, self._facts)
                if sent.data.columns and sent.data.columns != config.data.columns:
                    _log.info("data.columns of the run is not used: its columns are for a site to name (--column)")
                _refuse_foreign_code(config)
                _refuse_less_privacy(config, self._facts)
                site = _read_site(config, self._facts, name)
                self._job = _Job(name, text, Worker(config, local_algorithm(config)), site)
            return self._job

        return make


def _refuse_foreign_places(config: RunConfig, facts: Facts) -> None:
    """Check that the server names no file of this site, and nothing to download; looks at no path.

    Raises:
        Refusal: the configuration names a template file, or a model to download.
    """
    if config.prompt.template not in templates.BUILTIN:
        raise handlers.Refusal(
            f"prompt.template names a file: this site takes built-in templates alone ({', '.join(templates.BUILTIN)})"
        )
    if facts.model is None and not config.model.name.startswith("builtin:"):
        raise handlers.Refusal(
            "the run's base model is not built in, and this site was started without --model, its own place of it"
        )


def _refuse_chosen_rows(config: RunConfig) -> None:
    """Check that the server does not say how many of the site's rows count.

    Two counts or losses that differ in one row tell of that row; see also `apiary.data.split`.

    Raises:
        Refusal: the run limits the rows.
    """
    if config.data.max_rows is not None:
        raise handlers.Refusal(
            f"data.max_rows = {config.data.max_rows}: which of its rows a site uses is for the site to choose; leave "
            "it out, and let the sites shorten their files"
        )


def _refuse_foreign_code(config: RunConfig) -> None:
    """Check that the server names no code: what a method `module:function` runs is for the site to choose.

    Raises:
        Refusal: a method is named by module:function.
    """
    if names_code(config):
        raise handlers.Refusal("the run names code by module:function, which this site does not load")


def _refuse_less_privacy(config: RunConfig, facts: Facts) -> None:
    """Check that the run promises the site's rows what its operator asks for.

    Raises:
        Refusal: it promises less, or nothing.
    """
    privacy, limit = config.privacy, facts.max_epsilon
    if limit is None:
        return
    kept = privacy.epsilon <= limit and privacy.delta <= facts.max_delta  # so written, NaN is refused
    if privacy.unit != "record" or not kept:
        told = f"epsilon = {privacy.epsilon:g}, delta = {privacy.delta:g}" if privacy.unit == "record" else "nothing"
        raise handlers.Refusal(
            f'this site asks for privacy.unit = "record", epsilon <= {limit:g} and delta <= {facts.max_delta:g}; '
            f"the run promises {told}"
        )


def _read_site(config: RunConfig, facts: Facts, run: str) -> Site:
    """The site's rows, as one client. Which are in a stage is decided as in a simulation; which are held out, by a key.

    The first run that the site takes part in pins the fraction that is held out, and how rows become tokens; from then
    on they are the site's own. Pinned before a row is read, so that no run can ask again after an error of the rows.

    Raises:
        Refusal: the run asks for another fraction or reading than the pinned one, or for a choice of rows that the
            site's operator has not agreed to.
        UserError: the rows cannot be used, or what is pinned cannot be read.
    """
    before = split.load(facts.state)
    try:
        held_out = split.of_run(facts.state, config)
    except split.AnotherSplit as error:
        raise handlers.Refusal(str(error)) from None
    if held_out != before:
        _log.info("held-out rows pinned by a key of this site's own; pinned: %s", "; ".join(split.lines(held_out)))
    federation = stages.rows_of_run(config, held_out.key, whole=False)
    for report in federation.reports:
        for line in report.lines():
            _log.warning("%s", line)
    for line in splits.remarks(federation, config):
        _log.warning("%s", line)
    (client,) = federation.clients
    folder = facts.state / "runs" / run
    if facts.rank is None and config.adapter.ranks == "memory":
        rank = device_rank.of_device(config, folder)
    else:
        rank = min(facts.rank or config.adapter.rank, config.adapter.rank)
    ledger = facts.state / "ledger.json"
    return Site(facts.client, client.train, client.test, folder, ledger, rank, facts.counts, FEWEST, client.validation)


def check(facts: Facts) -> Rows:
    """What was found of the site's rows, once all that its operator says is known to be usable.

    Raises:
        UserError: no run could use the data, the model or the device; limits that limit nothing; or a held-out split
            that cannot be read.
    """
    split.load(facts.state)
    if facts.max_epsilon is not None and not 0.0 < facts.max_epsilon < math.inf:
        raise UserError(f"--max-epsilon {facts.max_epsilon:g}: expected a number above 0, such as 8")
    if not 0.0 < facts.max_delta < 1.0:
        raise UserError(f"--max-delta {facts.max_delta:g}: expected a number between 0 and 1, such as 1e-5")
    if facts.rank is not None and facts.rank < 1:
        raise UserError(f"--rank {facts.rank}: expected 1 or more")
    if facts.device:
        availability.check_device(facts.device, "--device")
    if facts.model:
        availability.check_model(facts.model, "--model")
    return check_rows(str(facts.data), "--data", facts.columns)


def make_server(service: Service, address: str) -> grpc.Server:
    """A server, not yet started, that answers at `address` (as gRPC writes it), with its health beside."""

    def handle(data: bytes, context: Any) -> bytes:
        return service.answer(worker_rpc.unpack(data), context.is_active).pack()

    _, package, method = worker_rpc.METHOD.split("/")
    server = grpc.server(
        futures.ThreadPoolExecutor(4), options=worker_rpc.OPTIONS
    )  # 4: health answers while one trains
    own = grpc.method_handlers_generic_handler(package, {method: grpc.unary_unary_rpc_method_handler(handle)})
    server.add_generic_rpc_handlers((own,))
    state = health.HealthServicer()
    state.set("", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(state, server)
    server.add_insecure_port(address)
    return server


def _arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="client.site_worker", description="The worker of one site.")
    parser.add_argument("--address", required=True, help="unix:PATH of the socket to listen on")
    parser.add_argument("--site", required=True, help="the site's name")
    parser.add_argument("--key", type=Path, help="the site's private key, which signs its answers")
    parser.add_argument("--data", required=True, type=Path, help="a file, or a folder of files")
    parser.add_argument("--state", required=True, type=Path, help="folder of what the site remembers")
    parser.add_argument("--model", help="the site's own place of the base model")
    parser.add_argument("--device", help="the site's own device")
    parser.add_argument("--rank", type=int, help="the highest rank of an adapter that the site trains")
    parser.add_argument("--max-epsilon", type=float, help="refuse runs that promise the rows less privacy")
    parser.add_argument("--max-delta", type=float, default=Facts._field_defaults["max_delta"], help="likewise")
    parser.add_argument("--column", action="append", default=[], help="FIELD=NAME: the site's own name of a column")
    parser.add_argument("--counts", default="rounded", help="how counts are told: rounded, exact or ROWS:TOKENS")
    return parser.parse_args(words)


def _facts(given: argparse.Namespace) -> Facts:
    named = {name: value for name, value in vars(given).items() if name in Facts._fields}
    named |= {"counts": counts.parse(given.counts, "--counts"), "columns": parse_columns(given.column)}
    return Facts(client=given.site, **named)


def _key(path: Path | None) -> EllipticCurvePrivateKey | None:
    """The key in a file.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return None if path is None else private_key(path)
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{str(path)!r}: {str(error).splitlines()[0]}") from None


def _let_go() -> None:
    _log.info("nobody waits any more for what is in work; the worker ends, to be started again")
    os._exit(LET_GO)


def main() -> None:
    """Serve until the process is ended; exit code 2 with one line where data, model or device cannot be used."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)  # at once: nothing is half-written, and a message is asked again
    given = _arguments()
    facts = _facts(given)
    logging.basicConfig(
        level=logging.INFO, stream=sys.stdout, format=f"%(asctime)s {given.site}: %(message)s", force=True
    )
    for noisy in ("flwr", "transformers", "httpx", "huggingface_hub", "datasets", "peft"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        rows = check(facts)
        key = _key(given.key)
    except UserError as error:
        print(f"apiary: {error}", file=sys.stderr)
        sys.exit(2)
    service = Service(facts, key)
    server = make_server(service, given.address)
    server.start()
    threading.Thread(target=service.watch, args=(_let_go,), daemon=True).start()
    for line in rows.warnings:
        _log.warning("warning: %s", line)
    _log.info("worker ready, %d rows", rows.total)
    server.wait_for_termination()


if __name__ == "__main__":
    main()
