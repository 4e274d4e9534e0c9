"""Chat templates are programs of whoever made the model: they run in a process of their own, within limits.

That process (`chat_sandbox`) has Jinja's sandbox, the limits below, no part of Apiary, and of the environment what
Python needs to start. It is started when first needed, one for each process that writes conversations, and ends with
it. Whoever has many texts to write says so first: then they are written several in one request, as many as `_REQUEST`
bytes are enough for.

The clock that templates see stands still, at `DATE`. So all clients, a resumed run, an evaluation years later and a
chat write the same text.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from apiary.core.errors import UserError
from apiary.data import chat_sandbox
from apiary.data.segments import OTHERS, Unwritable

__all__ = ["DATE", "MEGABYTES", "SECONDS", "WAIT", "Job", "render_ahead", "rendered"]

SECONDS = 5.0  # of the processor, for one text; the longest conversations take a hundredth
WAIT = 300.0  # seconds for the replies to one request, which take less than one, on a machine with other work, too
MEGABYTES = 1024  # of address space
ROOM = 1 << 20  # characters that a text may have beyond four times what the template is given
DATE = "2024-07-26"  # what Llama's templates write where they are told no date
_LONGEST_SOURCE = 1 << 20  # characters
_REQUEST = 1 << 22  # bytes that the jobs of one request may have together: a lone one may have more
_KEPT = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONHOME", "SYSTEMROOT")  # what Python needs to start


class Job(NamedTuple):
    """A text to write: by which template, on which day, its variables as JSON, and the messages, each as JSON."""

    source: str
    date: str
    variables: str
    messages: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Characters that the template is given."""
        return len(self.variables) + sum(map(len, self.messages))


class _Ended(NamedTuple):
    """Why there is no reply; by_limit: the template's limit of time did it, and not somebody from outside, perhaps."""

    why: str
    by_limit: bool


class _Process:
    """The process that runs templates. Owns it until it is closed or this one ends; one request at a time."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        environment = {name: os.environ[name] for name in _KEPT if name in os.environ}
        environment |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONHASHSEED": "0"}
        limits = (str(SECONDS), str(MEGABYTES), str(ROOM))
        self._popen = subprocess.Popen(
            [sys.executable, "-P", "-B", chat_sandbox.__file__, *limits],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # a Ctrl-C is for the program that is to end in good order
        )
        self.close = weakref.finalize(self, _end, self._popen)

    def ask(self, request: bytes) -> list[list[str]] | _Ended:
        """The replies, or why the process ended."""
        assert self._popen.stdin is not None and self._popen.stdout is not None
        line = b""
        began = time.monotonic()
        late = threading.Timer(WAIT, self._popen.kill)
        late.daemon = True
        late.start()
        with contextlib.suppress(OSError):
            self._popen.stdin.write(request + b"\n")
            self._popen.stdin.flush()
            line = self._popen.stdout.readline()
        late.cancel()
        if line.endswith(b"\n"):
            replies: list[list[str]] = json.loads(line)
            return replies
        self.close()
        status = self._popen.returncode
        if hasattr(signal, "SIGPROF") and status == -signal.SIGPROF:
            return _Ended(f"needs more than {SECONDS:g} s of the processor for one conversation", by_limit=True)
        if time.monotonic() - began >= WAIT:
            return _Ended(f"gives no answer within {WAIT:g} s", by_limit=False)
        if status is None:  # this program is about to end, and has closed the process before
            how = "as this program does"
        else:
            how = f"signal {-status}" if status < 0 else f"exit status {status}"
        return _Ended(f"ends the process that it runs in ({how})", by_limit=False)


def _end(popen: subprocess.Popen[bytes]) -> None:
    for pipe in (popen.stdin, popen.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    try:
        popen.wait(timeout=5)
    except subprocess.TimeoutExpired:
        popen.kill()
        popen.wait()


_lock = threading.Lock()
_process: _Process | None = None
_planned: OrderedDict[Job, None] = OrderedDict()  # what is going to be asked for, in order
_ahead: dict[Job, list[str]] = {}  # the replies to the newest request for several of these
_refused: dict[str, str] = {}  # source -> why it is not run again


def rendered(job: Job) -> str:
    """What a template writes.

    Raises:
        Unwritable: it refuses this conversation, writes more than `ROOM` allows, or needs more memory than there is.
        UserError: it takes too long, or ends the process that it runs in, and is not run again in this process.
    """
    with _lock:
        outcome, text = _ahead[job] if job in _ahead else _fetched(job)
    match outcome:
        case chat_sandbox.WRITTEN:
            return text
        case chat_sandbox.TOO_LONG:
            raise Unwritable("writes far more than it is given")
        case chat_sandbox.TOO_MUCH_MEMORY:
            raise Unwritable("needs too much memory", f"over {MEGABYTES} MB")
    raise Unwritable("refuses a conversation", " ".join(text.split()))


def render_ahead(jobs: Iterable[Job]) -> None:
    """Say what `rendered` is going to be asked for, in this order, so that it is written several texts at a time.

    Nothing is written yet, and what was said before is forgotten.
    """
    with _lock:
        _ahead.clear()
        _planned.clear()
        _planned.update(dict.fromkeys(jobs))


def _fetched(job: Job) -> list[str]:
    """The reply to a job; with it come those to the next ones that were planned, in `_ahead`."""
    if job.source in _refused:
        raise _stopped(_refused[job.source])
    if len(job.source) > _LONGEST_SOURCE:
        raise _stopped(f"has more than {_LONGEST_SOURCE:,} characters")
    if job in _planned:
        while next(iter(_planned)) != job:
            _planned.popitem(last=False)  # nobody asked for it
        group = [*_group()]
        if len(group) > 1:
            replies = _replies(group)
            if not isinstance(replies, _Ended) and replies:
                _ahead.clear()
                for done, reply in zip(group, replies, strict=False):  # those that had room in the reply
                    _ahead[done] = reply
                    del _planned[done]
                return _ahead[job]
            _planned.clear()  # one of these breaks a limit: they are asked for one by one, to see which
    replies = _replies([job])
    if isinstance(replies, _Ended) and not replies.by_limit:  # somebody else may have ended the process: once more
        replies = _replies([job])
    if isinstance(replies, _Ended):
        _refused[job.source] = replies.why
        raise _stopped(replies.why)
    return replies[0] if replies else [chat_sandbox.TOO_MUCH_MEMORY, ""]


def _group() -> Iterator[Job]:
    """The jobs that are planned next, as many as go into one request: one at least."""
    first, size = next(iter(_planned)), 0
    for job in _planned:
        size += job.size
        if job != first and (size > _REQUEST or (job.source, job.date) != (first.source, first.date)):
            return
        yield job


def _replies(jobs: list[Job]) -> list[list[str]] | _Ended:
    """Replies to the first of some jobs with one template and day, none if memory is too small, or why there are none.

    No reply is there for jobs that would have made the whole too large.
    """
    global _process
    if _process is None or _process.owner != os.getpid():  # a fork has no process of its own yet
        if _process is not None:
            _process.close.detach()
        _process = _Process()
    replies = _process.ask(_request(jobs))
    if isinstance(replies, _Ended):
        _process = None
    return replies


def _request(jobs: list[Job]) -> bytes:
    """The jobs as one line of JSON. Conversations that go on from each other are sent once, and cut where each ends."""
    talks: list[tuple[list[str], list[str]]] = []  # messages; cuts
    for job in jobs:
        if not talks or [*job.messages[: len(talks[-1][0])]] != talks[-1][0]:
            talks.append(([], []))
        messages, cuts = talks[-1]
        messages += job.messages[len(messages) :]
        cuts.append(f"[{len(job.messages)}, {job.size}, {job.variables}]")
    written = ", ".join(
        f'{{"messages": [{", ".join(messages)}], "cuts": [{", ".join(cuts)}]}}' for messages, cuts in talks
    )
    source, date, *_ = jobs[0]
    return f'{{"source": {json.dumps(source)}, "date": {json.dumps(date)}, "talks": [{written}]}}'.encode("ascii")


def _stopped(why: str) -> UserError:
    return UserError(
        f'prompt.template = "chat": the chat template of this tokenizer {why}; '
        f"a template is a program, and this one is not run; {OTHERS}"
    )
