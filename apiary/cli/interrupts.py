"""Ctrl-C that is never lost."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from apiary.tracking.event_log import Event, Observer


@contextlib.contextmanager
def heeded(observer: Observer) -> Iterator[Observer]:
    """The observer, which also ends the run at its next event where Ctrl-C was lost on the way.

    Python raises `KeyboardInterrupt` wherever the main thread is. Where that is a callback which C code called, a
    finalizer of an array for instance, the exception is printed and dropped, and the run would go on to its end: one
    of seventy Ctrl-C at random moments of small rounds. So what was asked is kept until an event passes.
    """
    asked = threading.Event()

    def note(number: int, frame: FrameType | None) -> None:
        asked.set()
        signal.default_int_handler(number, frame)

    def observe(event: Event) -> None:
        observer(event)
        if asked.is_set():
            asked.clear()
            raise KeyboardInterrupt

    # A command that a shell started in the background ignores SIGINT, and goes on to do so.
    heard = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    ours = heard and threading.current_thread() is threading.main_thread()
    if ours:
        signal.signal(signal.SIGINT, note)
    try:
        yield observe
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
