"""Processes that run the runs of a sweep: each loads the base once and keeps it from run to run.

A worker is a process of its own (spawned, not forked: torch's threads do not survive a fork). It ends with the sweep's
process, however that ends: its end of the pipe then closes. It may be in the middle of a run, which goes on from its
last checkpoint when the sweep does.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal, NamedTuple

from apiary.core.errors import RunFailed, UserError

_START = multiprocessing.get_context("spawn")


class Job(NamedTuple):
    """One run, or the check of one before any run."""

    name: str  # of its folder
    config: str  # JSON
    folder: str
    shared: str  # folder of the baselines that runs share
    reports: bool = False  # whether each evaluation is told, and answered with whether the run goes on
    check: bool = False  # only load data and model, and tell of the rows that it would be measured on


class Message(NamedTuple):
    """What a worker tells."""

    kind: Literal["round", "done", "checked", "pruned", "failed", "refused", "died"]
    job: Job
    content: Any = None  # (round, loss); a check's `Rows`; a reason, or lines of reasons


class Rows(NamedTuple):
    """What a run would be measured on."""

    digest: str  # of the rows of the figures and their tokens
    figures: int
    deciding: int
    memory: int  # bytes that the process took at most until then
    free: int | None  # bytes that the machine has left beside it; None where that is not known
    device: str


class Pruned(BaseException):
    """The run is given up. No Exception, for those of an observer do not end a run."""


class Worker:
    """A process that runs one job at a time, as the sweep's process sees it.

    Args:
        threads: with which it computes, unless the run itself says.
    """

    def __init__(self, threads: int) -> None:
        self.connection, far = _START.Pipe()
        self._process = _START.Process(target=_serve, args=(far, threads), daemon=True)
        self._process.start()
        far.close()
        self.job: Job | None = None

    def start(self, job: Job) -> None:
        """Begin a job; the worker is idle."""
        self.job = job
        self.connection.send(job)

    def receive(self) -> Message:
        """The next message of the job that it runs; a worker that is gone says so."""
        job = self.job
        assert job is not None
        try:
            message: Message = self.connection.recv()
        except (EOFError, OSError):
            self._process.join(10)
            message = Message("died", job, self._process.exitcode)
        if message.kind != "round":
            self.job = None
        return message

    def answer(self, go_on: bool) -> None:
        """Answer a round that was told."""
        self.connection.send(go_on)

    def stop(self) -> None:
        """End the process, whatever it does."""
        self.connection.close()
        self._process.terminate()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def messages(workers: Sequence[Worker]) -> Iterator[tuple[Worker, Message]]:
    """Wait for the busy ones; what those tell that have something to tell."""
    busy = {worker.connection: worker for worker in workers if worker.job is not None}
    for connection in wait(list(busy)):
        worker = busy[connection]  # type: ignore[index]
        yield worker, worker.receive()


# -- in the worker -----------------------------------------------------------------------------------------------------


def _serve(connection: Connection, threads: int) -> None:
    """Run jobs until the other end of the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the sweep's, which ends this process
    os.dup2(2, 1)  # what libraries print is no part of the sweep's output
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, inbox), daemon=True).start()
    import torch

    torch.set_num_threads(threads)
    while True:
        job = inbox.get()
        connection.send(_message(job, connection, inbox))


def _listen(connection: Connection, inbox: queue.SimpleQueue[Any]) -> None:
    """Pass on what comes; end the process, in the middle of a run too, when nobody is there any more."""
    while True:
        try:
            inbox.put(connection.recv())
        except (EOFError, OSError):
            os._exit(1)


def _message(job: Job, connection: Connection, inbox: queue.SimpleQueue[Any]) -> Message:
    """What a job came to."""
    try:
        if job.check:
            return Message("checked", job, _check(job))
        _run(job, connection, inbox)
        return Message("done", job)
    except Pruned:
        return Message("pruned", job)
    except UserError as error:
        return Message("refused", job, list(error.problems))
    except (RunFailed, OSError) as error:
        return Message("failed", job, str(error))
    except Exception as error:  # one setting must not end the others; a fault of ours names its kind and its place
        import traceback

        traceback.print_exc()
        return Message("failed", job, f"{type(error).__name__}: {error}")


def _run(job: Job, connection: Connection, inbox: queue.SimpleQueue[Any]) -> None:
    from apiary.config import loading
    from simulation.run import simulate

    def observe(event: dict[str, Any]) -> None:
        if event["event"] == "evaluate" and event["round"] > 0 and "deciding" in event:
            connection.send(Message("round", job, (event["round"], event["deciding"]["loss"])))
            if not inbox.get():
                raise Pruned

    observers = [observe] if job.reports else []
    folder = Path(job.folder)
    simulate(loading.from_json(job.config), folder, resume=True, observers=observers, shared=Path(job.shared))


def _check(job: Job) -> Rows:
    """Load a run's data and model, and see what it would be measured on and what memory that takes.

    Raises:
        UserError: the first thing that cannot work.
    """
    import hashlib
    import resource
    import sys

    import numpy as np
    import torch

    from apiary.config import loading
    from client.device_rank import free_bytes
    from simulation.run import plan

    prepared = plan(loading.from_json(job.config))
    held_out, corpus = prepared.held_out, prepared.held_out.corpus
    assert held_out.deciding is not None  # evaluate.set_apart
    read = hashlib.sha256()
    tokens = np.add.reduceat(corpus.trained, corpus.offsets[:-1], dtype=np.int64)
    for example, count in zip(held_out.examples, tokens.tolist(), strict=True):
        read.update(repr((example.turns, count)).encode("utf-8", "surrogatepass"))
    unit = 1 if sys.platform == "darwin" else 1024
    return Rows(
        read.hexdigest(),
        len(held_out.examples),
        len(held_out.deciding.examples),
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        free_bytes(torch.device("cpu")),
        prepared.lm.device.type,
    )
