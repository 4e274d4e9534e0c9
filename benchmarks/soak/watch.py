"""What is seen of one run from outside: its log as it grows, `apiary deploy status`, and the adapter of each round."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from apiary.core.errors import UserError
from benchmarks.soak.field import SITES, Field
from deploy import flower_cli, runs

_STATUS_S = 2.0


class Seen(NamedTuple):
    """An event of a run's log, when it was first seen."""

    at: float  # monotonic seconds
    event: Mapping[str, Any]


class Watch:
    """Follows a run; it owns what was seen of it, which stays where the run cuts its log.

    Args:
        field: where it runs.
        name: of its directory.
    """

    def __init__(self, field: Field, name: str) -> None:
        self.field, self.name, self.folder = field, name, field.run_folder(name)
        self.seen: list[Seen] = []
        self.digests: dict[int, str] = {}  # of the adapter after each round
        self.status: list[tuple[float, list[str]]] = []  # when it was asked, and what it said
        self.printed: list[tuple[float, str, str]] = []  # when, by whom and what a site or the server printed
        self._lines: set[str] = set()
        self._read = {name: field.length(name) for name in ("server", *SITES)}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Ask for no status any more."""
        self._end.set()
        self._thread.join()

    def look(self) -> None:
        """Take in what is new."""
        with contextlib.suppress(OSError):
            for line in (self.folder / "log.jsonl").read_text(encoding="utf-8").split("\n")[:-1]:
                if line not in self._lines:
                    self._lines.add(line)
                    with contextlib.suppress(ValueError):
                        self.seen.append(Seen(time.monotonic(), json.loads(line)))
        for name, known in self._read.items():
            new = self.field.said(name, known)
            self._read[name] += len(new.encode())
            self.printed += [(time.monotonic(), name, line) for line in new.splitlines()]
        for path in (self.folder / "checkpoints").glob("round-*/state.json"):
            with contextlib.suppress(OSError, ValueError, KeyError):
                self.digests[int(path.parent.name[-4:])] = json.loads(path.read_text())["digests"]["adapter"]

    def after(self, since: float, *kinds: str) -> Iterator[Seen]:
        """Events of these kinds that were first seen after a moment."""
        return (seen for seen in self.seen if seen.at > since and seen.event["event"] in kinds)

    def latest(self, kind: str) -> int:
        """The highest round of an event of this kind in the newest part of the log; 0 where there is none."""
        found = 0
        for _, event in self.seen:
            if event["event"] == "start":
                found = 0
            elif event["event"] == kind:
                found = max(found, event["round"])
        return found

    def log(self) -> list[Mapping[str, Any]]:
        """The log as it stands."""
        with contextlib.suppress(OSError):
            return [json.loads(line) for line in (self.folder / "log.jsonl").read_text().splitlines()]
        return []

    def account(self) -> str:
        """What `apiary deploy verify` finds wrong with the account of signed answers; "" is nothing."""
        try:
            self.field.run("deploy", "verify", str(self.folder), "--keys", str(self.field.kits / "server" / "sites"))
        except RuntimeError as error:
            return " ".join(str(error).split())[:300]
        return ""

    def ended(self) -> bool:
        """Whether `submit`, which follows the run, has ended."""
        return self.field.kept["submit"].poll() is not None

    def _ask(self) -> None:
        while not self._end.wait(_STATUS_S):
            try:
                lines = runs.describe(runs.standing(self.field.state))
            except (UserError, flower_cli.FlowerError, OSError) as error:
                lines = [f"no status: {error}"]
            self.status.append((time.monotonic(), lines))


def cohort_of(log: list[Mapping[str, Any]], number: int) -> tuple[set[str], set[str]]:
    """Who was asked in a round, and whose answer counted."""
    of_round = [event for event in log if event.get("round") == number]
    asked = {name for event in of_round if event["event"] == "asked" for name in event["clients"]}
    return asked, {event["client"] for event in of_round if event["event"] == "client"}


def equal_until(log: list[Mapping[str, Any]], number: int) -> bool:
    """Whether every site's answer counted in every round so far."""
    return all(cohort_of(log, earlier)[1] == set(SITES) for earlier in range(1, number + 1))


def charges(folder: Path, run: str) -> list[tuple[int, str]]:
    """The round and the request of each charge of a run in a site's ledger."""
    ledger = folder / "ledger.json"
    if not ledger.exists():
        return []
    entries = json.loads(ledger.read_text())["entries"]
    return [(int(entry["round"]), str(entry["request"])) for entry in entries if entry["run"] == run]


def releases(folder: Path, run: str) -> set[str]:
    """The requests of a run whose answers a site has ever made."""
    place = folder / "runs" / run
    told = place / "released.txt"
    found = {path.stem.rpartition("-")[2] for path in place.glob("release-*.safetensors")}
    return found | (set(told.read_text().split()) if told.exists() else set())
