"""Chat templates are programs of whoever made the model: they run in a process of their own, within limits.

That process (`chat_sandbox`) has Jinja's sandbox, the limits below, an empty environment and no part of Apiary. It is
started when first needed, one for each process that writes conversations, and ends with it. Whoever has many
conversations to write has them written ahead, many in one request: then the process costs next to nothing.

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
import weakref
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from apiary.core.errors import UserError
from apiary.data import chat_sandbox
from apiary.data.segments import OTHERS, Unwritable

__all__ = ["DATE", "MEGABYTES", "SECONDS", "Job", "render_ahead", "rendered"]

SECONDS = 5.0  # of the processor, for one text; the longest conversations take a hundredth
MEGABYTES = 1024  # of address space
ROOM = 1 << 20  # characters that a text may have beyond four times what the template is given
DATE = "2024-07-26"  # what Llama's templates write where they are told no date
_LONGEST_SOURCE = 1 << 20  # characters
_KEPT = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONHOME", "SYSTEMROOT")  # what Python needs to start


class Job(NamedTuple):
    """A text to write: by which template, on which day, and its variables as JSON."""

    source: str
    date: str
    variables: str


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

    def ask(self, request: bytes) -> list[list[str | None]] | str:
        """The replies, or why the process ended."""
        assert self._popen.stdin is not None and self._popen.stdout is not None
        line = b""
        with contextlib.suppress(OSError):
            self._popen.stdin.write(request + b"\n")
            self._popen.stdin.flush()
            line = self._popen.stdout.readline()
        if line.endswith(b"\n"):
            replies: list[list[str | None]] = json.loads(line)
            return replies
        self.close()
        status = self._popen.returncode
        if status == -signal.SIGPROF:
            return f"needs more than {SECONDS:g} s of the processor for one conversation"
        how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        return f"ends the process that it runs in ({how})"


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
_ahead: dict[Job, list[str | None]] = {}  # what is written and not yet asked for
_refused: dict[str, str] = {}  # source -> why it is not run again


def rendered(job: Job) -> str:
    """What a template writes.

    Raises:
        Unwritable: it refuses this conversation, or writes more than `ROOM` allows.
        UserError: it breaks another limit, and is not run again in this process.
    """
    with _lock:
        if (reply := _ahead.pop(job, None)) is None:
            (reply,) = _replies([job])
    text, error = reply
    if error == chat_sandbox.TOO_LONG:
        raise Unwritable(error)
    if error == chat_sandbox.TOO_MUCH_MEMORY:
        _refused[job.source] = f"{error} (over {MEGABYTES} MB)"
        raise _stopped(_refused[job.source])
    if text is None:
        raise Unwritable("refuses a conversation", " ".join(str(error).split()))
    return text


def render_ahead(jobs: Iterable[Job]) -> None:
    """Have many texts written at once, for `rendered` to find; those of the last call are forgotten.

    Raises:
        UserError: as `rendered`.
    """
    by_template: dict[tuple[str, str], list[Job]] = {}
    for job in dict.fromkeys(jobs):
        by_template.setdefault((job.source, job.date), []).append(job)
    with _lock:
        _ahead.clear()
        for alike in by_template.values():
            _ahead.update(zip(alike, _replies(alike), strict=True))


def _replies(jobs: list[Job]) -> list[list[str | None]]:
    """A reply for each of some jobs with one template and day."""
    global _process
    source, date, _ = jobs[0]
    if source in _refused:
        raise _stopped(_refused[source])
    if len(source) > _LONGEST_SOURCE:
        raise _stopped(f"has more than {_LONGEST_SOURCE:,} characters")
    if _process is None or _process.owner != os.getpid():  # a fork has no process of its own yet
        if _process is not None:
            _process.close.detach()
        _process = _Process()
    request: Mapping[str, Any] = {"source": source, "date": date, "jobs": [job.variables for job in jobs]}
    replies = _process.ask(json.dumps(request).encode("ascii"))
    if isinstance(replies, str):
        _process = None
        _refused[source] = replies
        raise _stopped(replies)
    return replies


def _stopped(why: str) -> UserError:
    return UserError(
        f'prompt.template = "chat": the chat template of this tokenizer {why}; '
        f"a template is a program, and this one is not run; {OTHERS}"
    )
