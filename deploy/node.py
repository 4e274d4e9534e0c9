"""A site's node: one process that fetches the site's messages, has its worker answer them, and sends the answers.

`python -m deploy.node --help` says what it needs; `apiary deploy client` starts it. It takes one message after the
other, and an answer is sent only for the message that it is in the middle of.
"""

from __future__ import annotations

import argparse
import contextlib
import http.server
import importlib
import os
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from deploy import fleet, pace, processes
from deploy.bundle import ForeignCode
from deploy.fleet import Line, Work
from deploy.session import CONNECTED, NOT_TRUSTED, REFUSED, Journal

_LOOK_S, _GOES_ON_S = 0.2, 3.0  # while the worker works: for the wish to end, and for the end of the run
_INSTALLED, _RPC = "client.app", "client.worker_rpc"


class Answering(NamedTuple):
    """How a message is answered."""

    ask: Callable[[Any, Any], Any]  # of Flower's message and context, the reply; waits as long as that takes
    cancel: Callable[[], None]  # lets go of what `ask` waits for


def serve(line: Line, answering: Answering, facts: dict[str, str], journal: Journal, end: threading.Event) -> None:
    """Answer messages until `end` is set; a session is open.

    Raises:
        fleet.Refused, fleet.NotTrusted: the server takes no more calls of this site.
        fleet.Ended: asked to end.
    """
    answered = time.monotonic()
    while not end.is_set():
        looked = time.monotonic()
        work = line.look()
        if work is None:
            now = time.monotonic()
            end.wait(pace.pause(now - answered, now - looked))
            continue
        journal.note(line.node, fleet.packed(work))
        say(f"{work.what}: received")
        _answer(line, work, answering, facts, end)
        journal.note(line.node)
        answered = time.monotonic()


def _answer(line: Line, work: Work, answering: Answering, facts: dict[str, str], end: threading.Event) -> None:
    began = time.monotonic()
    try:
        try:
            message, context = line.fetch(work, facts)
            reply = _ask(line, work, answering, (message, context), end)
        except (ForeignCode, fleet.Rejected) as error:
            reply = fleet.failure(work, f"its node: {error}")
        if reply is None:
            say(f"{work.what}: nobody waits for the answer any more; dropped")
            return
        seconds = time.monotonic() - began  # for the line at the site alone
        try:
            line.send(reply)
        except fleet.Rejected as error:  # too large, say: the server is not to wait for it
            reply = fleet.failure(work, f"the server does not take its answer ({error})")
            line.send(reply)
        say(f"{work.what}: {'failed' if reply.has_error() else 'answered'} after {seconds:.1f} s")
    except fleet.RunOver:
        say(f"{work.what}: its run is over; dropped")
    except fleet.Rejected as error:
        say(f"{work.what}: the server does not take the answer ({error}); dropped")


def _ask(line: Line, work: Work, answering: Answering, given: tuple[Any, Any], end: threading.Event) -> Any:
    """The reply; None where nobody wants it any more."""
    box: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def ask() -> None:
        try:
            box.put(answering.ask(*given))
        except Exception as error:  # its text may hold what is private
            box.put(fleet.failure(work, f"its node failed ({type(error).__name__})"))

    threading.Thread(target=ask, daemon=True).start()
    asked = time.monotonic()
    while True:
        with contextlib.suppress(queue.Empty):
            return box.get(timeout=_LOOK_S)
        if end.is_set():
            answering.cancel()
            return None
        if time.monotonic() - asked > _GOES_ON_S:
            if not line.goes_on(work):
                answering.cancel()
                return None
            asked = time.monotonic()


def run(line: Line, answering: Answering, facts: dict[str, str], journal: Journal, end: threading.Event) -> int:
    """Take part until `end` is set; returns the exit code."""
    try:
        left = journal.read()
        line.open(left.node)
        journal.note(line.node, left.message)
        say(CONNECTED)
        if left.message:
            _give_up(line, left.message)
            journal.note(line.node)
        serve(line, answering, facts, journal, end)
        _end(line, journal)
    except fleet.Ended:
        _end(line, journal)
    except fleet.Refused as error:
        say(str(error))
        return REFUSED
    except fleet.NotTrusted as error:
        say(str(error))
        return NOT_TRUSTED
    except fleet.Rejected as error:  # who answers speaks another protocol, or another version
        say(f"the server rejects a call that every version knows: {error}")
        return 1
    finally:
        line.hang_up()
    return 0


def _end(line: Line, journal: Journal) -> None:
    line.close()
    journal.close()


def _give_up(line: Line, message: bytes) -> None:
    """Tell the server that nothing comes of the message that an earlier session was in the middle of."""
    with contextlib.suppress(ValueError):
        work = fleet.unpacked(message)
        try:
            line.send(fleet.failure(work, "its node ended while it worked on the message"))
            say(f"{work.what}: left over from before; told the server that nothing comes of it")
        except (fleet.RunOver, fleet.Rejected):
            say(f"{work.what}: left over from before; dropped")


def installed() -> Answering:
    """The app that is installed at the site answers, whatever the server sends or names."""
    app, rpc = importlib.import_module(_INSTALLED).app, importlib.import_module(_RPC)

    def ask(message: Any, context: Any) -> Any:
        return app(message=message, context=context)

    return Answering(ask, rpc.cancel)


def answer_health(port: int) -> None:
    """Answer `GET /health` at a port of 127.0.0.1 while this process lives."""

    class Health(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Health)
    threading.Thread(target=server.serve_forever, daemon=True).start()


def say(line: str) -> None:
    """A line of the log."""
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}", flush=True)


def main() -> None:
    """Take part until the process is asked to end."""
    parser = argparse.ArgumentParser(prog="deploy.node", description="The node of one site.")
    parser.add_argument("--server", required=True, help="HOST:PORT")
    parser.add_argument("--ca", required=True, type=Path)
    parser.add_argument("--key", required=True, type=Path)
    parser.add_argument("--site", required=True)
    parser.add_argument("--worker", required=True, help="its address, as gRPC writes it")
    parser.add_argument("--state", required=True, type=Path)
    parser.add_argument("--port", type=int, help="of 127.0.0.1, where /health answers")
    given = parser.parse_args()
    end = processes.wait_for_end()
    if given.port is not None:
        answer_health(given.port)
    line = fleet.Line(given.server, given.ca, given.key, end)
    facts = {"site": given.site, "worker-address": given.worker}
    # Without waiting for threads: gRPC's, or one that waits for a worker that does not answer.
    os._exit(run(line, installed(), facts, Journal(given.state), end))


if __name__ == "__main__":
    main()
