"""Answers under privacy that have left: kept, so that a request that comes again gets the same bits.

The file of an answer is what says that it was made: it comes whole, in one atomic step, and its name holds the
request. A list keeps the names of answers whose files are gone. A name is on the list, on the disk, before its file
is removed, so at every moment, also of a kill, an answer that was ever made is known by its file or by the list.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save as pack

from apiary.core.files import write_atomic
from apiary.core.messages import FitReport
from client.training.trainer import Cursor, FitResult

_KEPT, _ANSWERED = 3, "released.txt"  # releases kept, and the names of all that were ever made


def released(folder: Path, number: int, request: str, make: Callable[[], FitResult]) -> FitResult:
    """The answer to a request: the one on disk if there is one, else what `make` makes, once it is on disk.

    A request that comes twice gets the same bits. Made again, on a GPU or after an update, they could differ in the
    last place, and two noisy values with the same noise tell their difference.

    Args:
        folder: the client's own; the newest three answers are kept in it, and the names of all.
        number: the round.
        request: the release's name, from `unanswered`.
        make: makes the answer; not asked where it is on disk.

    Raises:
        OSError: the disk is full; the answer may be on it all the same, and is then given when it is asked for again.
    """
    path = _release(folder, number, request)
    if not path.exists():
        result = make()
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, pack(dict(result.delta), {"report": json.dumps(result.report._asdict())}), private=True)
        _prune(folder, path)
        return result
    with safe_open(path, "pt") as file:
        delta = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
        values: dict[str, Any] = json.loads(file.metadata()["report"])
    return FitResult(delta, Cursor(), FitReport(**values))


def unanswered(folder: Path, number: int, name: Callable[[Sequence[str]], str]) -> str:
    """A request's name, under which no answer ever left that is no longer kept.

    Such an answer is not made again under its own noise: it gets another name, and so noise and a charge of its own.

    Args:
        folder: as in `released`.
        number: the round.
        name: makes the name from what tells repetitions apart; nothing for the first.
    """
    gone = {request for request in _answered(folder) if not _release(folder, number, request).exists()}
    names = (name(again) for again in itertools.chain([()], ([f"again {n}"] for n in itertools.count(1))))
    return next(request for request in names if request not in gone)


def _prune(folder: Path, newest: Path) -> None:
    """Remove all but the newest answers, `newest` being the last, once the list of names holds every one of them."""
    older = sorted(set(_files(folder)) - {newest}, key=lambda file: file.stat().st_mtime_ns)
    # All names, not those of what goes alone: an answer may also be removed by hand.
    names = dict.fromkeys((*_answered(folder), *map(_request, older), _request(newest)))
    write_atomic(folder / _ANSWERED, "".join(f"{name}\n" for name in names), private=True)
    for old in older[: 1 - _KEPT]:
        old.unlink(missing_ok=True)


def _release(folder: Path, number: int, request: str) -> Path:
    return folder / f"release-{number:04d}-{request}.safetensors"


def _files(folder: Path) -> list[Path]:
    return list(folder.glob("release-*.safetensors"))


def _request(release: Path) -> str:
    return release.stem.rpartition("-")[2]


def _answered(folder: Path) -> list[str]:
    path = folder / _ANSWERED
    return path.read_text(encoding="utf-8").split() if path.exists() else []
