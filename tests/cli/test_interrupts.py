"""Ctrl-C ends a run also where Python drops it."""

from __future__ import annotations

import os
import signal
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import simulation.run
from apiary.cli.main import app
from apiary.tracking.event_log import Observer


@pytest.fixture(autouse=True)
def _heard(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """SIGINT as a terminal's, also where the tests run in the background; no word of what is dropped."""
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class _Kept:
    """Something with a finalizer, as the arrays that datasets make have it."""


def _dropped() -> None:
    """Ctrl-C while a finalizer runs: Python cannot raise out of it."""
    kept = _Kept()
    weakref.finalize(kept, os.kill, os.getpid(), signal.SIGINT)
    del kept


def _rounds(reached: list[int]) -> Callable[..., dict[str, Any]]:
    def run(*args: Any, resume: bool = False, observers: Sequence[Observer] = ()) -> dict[str, Any]:
        for number in range(1, 6):
            reached.append(number)
            if number == 2:
                _dropped()
            for observer in observers or args[2]:
                observer({"event": "phase", "name": f"round {number}"})
        return {}

    return run


@pytest.mark.parametrize("command", ["simulate", "personal"])
def test_what_python_drops_ends_the_run_at_its_next_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    reached: list[int] = []
    name = {"simulate": "simulate", "personal": "personalise"}[command]
    monkeypatch.setattr(simulation.run, name, _rounds(reached))
    words = ["simulate", "--out", str(tmp_path / "run")] if command == "simulate" else ["personal", str(tmp_path)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 130
    assert reached == [1, 2]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
