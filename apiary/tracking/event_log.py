"""The run directory: an append-only event log, files whole or absent, and what the run ran on.

`log.jsonl` holds one JSON object a line; whoever follows a run (terminal, trackers) is an observer
of the same events.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import platform
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

from apiary.config.schema import RunConfig, UserError

Event: TypeAlias = dict[str, Any]
Observer: TypeAlias = Callable[[Event], None]

LOG_FILE, METRICS_FILE, SCHEMA = "log.jsonl", "metrics.json", 1
_PACKAGES = ("torch", "transformers", "peft", "flwr")
# What a resumed run tells again from its beginning; the latter where they belong to no round.
_RETOLD, _RETOLD_BESIDE_ROUNDS = frozenset({"baseline", "finish"}), frozenset({"warning", "handshake", "refused"})
_logger = logging.getLogger(__name__)


class RunLog:
    """Appends events to `folder/log.jsonl` and hands each one to the observers.

    A last line torn by a killed process is repaired on opening. An observer that raises is reported
    once and left out from then on: a tracker's network must not cost a run of hours.

    Args:
        folder: the run directory; made if absent.
        observers: called with each event, after it is on disk.

    Raises:
        OSError: the folder or the log cannot be written.
    """

    def __init__(self, folder: Path, observers: Sequence[Observer] = ()) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / LOG_FILE
        _mend(path)
        self._observers = list(observers)
        self._lock = threading.RLock()  # reentrant: an observer may itself log an event
        self._file = path.open("ab", buffering=0)

    def event(self, kind: str, **fields: Any) -> None:
        """Logs one event; NaN and infinities become null.

        Raises:
            OSError: the disk is full; the log then still ends with a whole line.
        """
        record: Event = {"event": kind, "time": round(time.time(), 3), **finite(fields)}
        line = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            self._append(line)
            for observer in tuple(self._observers):
                self._tell(observer, record)

    def _append(self, line: bytes) -> None:
        end = self._file.seek(0, os.SEEK_END)
        try:
            view = memoryview(line)
            while view:
                view = view[self._file.write(view) :]
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(end)
            raise

    def _tell(self, observer: Observer, record: Event) -> None:
        try:
            observer(record)
        except Exception:
            _logger.warning("an observer of the run failed and is left out from here on", exc_info=True)
            self._observers.remove(observer)

    def close(self) -> None:
        """Closes the file; further events are an error."""
        self._file.close()


def finite(value: Any) -> Any:
    """`value` as JSON can hold it: containers and numpy scalars plain, NaN and infinities None."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [finite(item) for item in (sorted(value) if isinstance(value, (set, frozenset)) else value)]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if hasattr(value, "tolist"):  # numpy scalars and arrays, tensors
        return finite(value.tolist())
    return str(value)


def read_events(folder: Path) -> list[Event]:
    """All events in order, or [] without a log. A torn last line is passed over.

    Raises:
        UserError: a line before the last one is not an event.
    """
    path = folder / LOG_FILE
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    events = []
    for number, line in enumerate(lines, 1):
        event = _parse(line)
        if event is not None:
            events.append(event)
        elif line.strip() and number < len(lines):
            raise UserError(f"{path.name} line {number} is not an event: was the file edited? Remove that line")
    return events


def _parse(line: bytes) -> Event | None:
    try:
        event = json.loads(line)
    except ValueError:  # covers broken JSON and broken UTF-8
        return None
    return event if isinstance(event, dict) and "event" in event else None


def _mend(path: Path) -> None:
    """Ends the log with a whole line: adds a lacking newline, or cuts a torn line off."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        body = file.read()
        if not body or body.endswith(b"\n"):
            return
        start = body.rfind(b"\n") + 1
        if _parse(body[start:]) is not None:
            file.write(b"\n")
        else:
            file.truncate(start)


def truncate_after(folder: Path, last_round: int) -> None:
    """Cuts the log back to the end of round `last_round`, so that a resumed run tells one story.

    Everything from the first event of a later round on goes, and so does what will be told again: the
    end of the run and its baselines, handshakes and warnings about the data. Without a finished round
    (`last_round` = 0) the measurement before the first one goes too.
    """
    kept = []
    for event in read_events(folder):
        number = event.get("round")
        if number is not None and (number > last_round or last_round == 0):
            break
        if event["event"] not in (_RETOLD if number is not None else _RETOLD | _RETOLD_BESIDE_ROUNDS):
            kept.append(event)
    lines = (json.dumps(event, ensure_ascii=False, separators=(",", ":")) + "\n" for event in kept)
    write_atomic(folder / LOG_FILE, "".join(lines))


def spent_before(folder: Path) -> float:
    """Seconds between starts and last events of the earlier parts of a resumed run."""
    events = read_events(folder)
    starts = [i for i, event in enumerate(events) if event["event"] == "start"]
    return float(sum(events[b - 1]["time"] - events[a]["time"] for a, b in pairwise(starts)))


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Holds a run directory for one process, until the end or the process's death; no file is written for it.

    Raises:
        BlockingIOError: another process holds it.
    """
    import fcntl  # not on every system that simulates

    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:  # a file system without locks
            _logger.debug("%s cannot be locked", folder)
        yield
    finally:
        os.close(handle)


def is_draft(path: Path) -> bool:
    """Whether it is an unfinished file or adapter folder of ours; other names with a dot in front are the user's."""
    return path.name.startswith(".") and (path.name.endswith(".tmp") or path.name.startswith(".adapter-"))


def sweep(folder: Path) -> None:
    """Remove drafts that a killed run left in its run directory, or a killed visit in that of its client."""
    made_by_us = [folder / place for place in ("checkpoints", "baselines", "baselines/local", "personal")]
    drafts = [path for path in folder.iterdir() if is_draft(path)]
    for draft in [*drafts, *(path for place in made_by_us for path in place.glob(".*"))]:
        shutil.rmtree(draft, ignore_errors=True) if draft.is_dir() else draft.unlink()


def write_atomic(path: Path, content: str | bytes, *, private: bool = False) -> None:
    """Writes a file whole or not at all: a temporary file beside it, fsync, rename.

    Args:
        path: the file.
        content: all of it.
        private: for its owner's eyes only, at every moment.

    Raises:
        OSError: the disk is full or the folder read-only; an older file stays as it was and nothing
            else is left.
    """
    body = content.encode() if isinstance(content, str) else content
    beside = path.with_name(f".{path.name}.tmp")
    if private:
        beside.unlink(missing_ok=True)  # an old draft would keep its own permissions
    try:
        with open(beside, "wb", opener=_private if private else None) as file:
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise
    _sync_folder(path.parent)


def for_owner(path: str, flags: int) -> int:
    """An opener for `open` whose new files are for their owner's eyes only."""
    return os.open(path, flags, 0o600)


def _private(path: str, flags: int) -> int:
    return for_owner(path, flags | os.O_EXCL)


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems cannot sync a folder; the rename still stands
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_metrics(folder: Path, metrics: Mapping[str, Any]) -> None:
    """Writes `metrics.json` atomically: NaN and infinities as null, the schema number in front."""
    values = {"schema": SCHEMA, **finite(metrics)}
    write_atomic(folder / METRICS_FILE, json.dumps(values, ensure_ascii=False, indent=1) + "\n")


def read_metrics(folder: Path) -> dict[str, Any]:
    """What `write_metrics` wrote.

    Raises:
        UserError: no such folder, no metrics in it, not JSON, or a schema that this version does
            not know.
    """
    path = folder / METRICS_FILE
    if not folder.is_dir():
        raise UserError(f"run folder {str(folder)!r} does not exist")
    if not path.exists():
        begun = (folder / LOG_FILE).exists()
        hint = "the run has not finished: --resume continues it" if begun else "is it a run folder?"
        raise UserError(f"run folder {str(folder)!r} has no {METRICS_FILE}; {hint}")
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{str(path)!r} is not valid JSON: {error}") from None
    if not isinstance(values, dict) or values.get("schema") != SCHEMA:
        found = values.get("schema") if isinstance(values, dict) else None
        raise UserError(f"{str(path)!r}: schema = {found!r}, but this version reads schema {SCHEMA}")
    return values


def rounds_table(events: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rounds of metrics.json: training and held-out figures by round, from the log."""
    rounds: dict[int, dict[str, Any]] = {}
    for event in events:
        if event["event"] in ("round", "evaluate"):
            kept = {
                k: v
                for k, v in event.items()
                if k not in ("event", "time", "clients") or (event["event"] == "round" and k == "clients")
            }
            rounds.setdefault(event["round"], {}).update(kept)
    return [rounds[number] for number in sorted(rounds)]


def ranks(events: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """The rank of each client's factors, as it last told it."""
    return {e["client"]: e["rank"] for e in events if e["event"] in ("handshake", "client") and "rank" in e}


def curation_counts(events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The `curation` part of metrics.json: rows, kept and dropped by step, by client, as each last told them."""
    newest = {
        event["client"]: event["curated"] for event in events if event["event"] == "client" and "curated" in event
    }
    return {name: newest[name] for name in sorted(newest)}


def start_fields(config: RunConfig) -> dict[str, Any]:
    """What the first line of a log says: versions, commit, config digest, seed, machine.

    No host, user or path: a log can be shown to a partner as it is.
    """
    return {
        "versions": _versions(),
        "commit": _commit(Path(__file__).resolve().parents[2]),
        "config_digest": hashlib.sha256(config.to_json().encode()).hexdigest()[:16],
        "seed": config.seed,
        "machine": machine(gpu=config.model.device != "cpu"),
    }


def _versions() -> dict[str, str]:
    from apiary import __version__

    versions = {"apiary": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def _commit(root: Path) -> str | None:
    """The commit of a source checkout at `root` (`-dirty` where edited), else None.

    Only a repository whose top is `root` counts: a package installed inside somebody's own
    repository must not claim that repository's commit.
    """
    if not (root / ".git").exists():
        return None
    command = [
        "git",
        "-C",
        str(root),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def machine(*, gpu: bool = True) -> dict[str, Any]:
    """Processor, usable cores, memory in bytes and GPU of this machine; None where unknown."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": cores,
        "memory_bytes": _memory_bytes(),
        "gpu": _gpu_name() if gpu else None,
    }


def _cpu_name() -> str | None:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or None


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _gpu_name() -> str | None:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return "Apple GPU (MPS)" if torch.backends.mps.is_available() else None
