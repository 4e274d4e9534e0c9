"""Answers under privacy through kills: no two that differ ever share their noise, wherever a process died."""

from __future__ import annotations

import itertools
import json
import math
import os
import secrets
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from private_visits import payload, rows, settings, site

from apiary.core.files import write_atomic
from apiary.core.messages import FitReport, Visit
from apiary.privacy.noise import SecretNoise
from client import private_visit, releases
from client.training.dp_sgd import PrivateVisit
from client.training.trainer import Cursor, FitResult
from client.worker import Worker

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.chmod", "os.link"}  # as CPython audits what is done to files
KILLED = 9


def marked(lm: Any, start: Any, corpus: Any, config: Any, plan: PrivateVisit) -> FitResult:
    """In place of training: what the noise was, and bits that differ whenever an answer is made anew.

    On a GPU, or after an update, the same sum comes out a little different; here it always does.
    """
    bits = torch.tensor([secrets.randbelow(2**20)], dtype=torch.float32)
    noise = torch.from_numpy(plan.noise.normal(2)).float()
    return FitResult({"noise": noise, "bits": bits}, Cursor(), FitReport(1, 1, 1, 0.0, 0.0))


def ask(worker: Worker, folder: Path, rounds: list[int]) -> None:
    """Asks for these rounds and writes down each answer as it leaves."""
    for number in rounds:
        answer = worker.train(site(folder / "site", rows(40)), number, payload(worker))
        assert isinstance(answer, Visit)
        with open(folder / "left.jsonl", "a", encoding="utf-8") as file:
            delta = answer.update.delta
            file.write(json.dumps([number, delta["noise"].tolist(), delta["bits"].tolist()]) + "\n")


def killed_at(point: int, worker: Worker, folder: Path, rounds: list[int]) -> bool:
    """Whether a process that asks for `rounds` dies before its change number `point` to a file of the site.

    Between two changes the files are the same, so the points are all states that a kill can leave.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == KILLED
    try:
        _die_at(point, str(folder / "site"))
        ask(worker, folder, rounds)
        os._exit(0)
    except BaseException:
        os._exit(1)


def _die_at(point: int, folder: str) -> None:
    seen = 0

    def hook(event: str, given: tuple[Any, ...]) -> None:
        nonlocal seen
        writes = event == "open" and isinstance(given[2], int) and given[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in CHANGES) and folder in os.fsdecode(str(given[0])):
            seen += 1
            if seen == point:
                os._exit(KILLED)  # no handler runs, as with SIGKILL

    sys.addaudithook(hook)


@pytest.mark.slow
def test_a_kill_at_any_point_never_leads_to_the_same_noise_on_two_answers(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four rounds the first answer is removed; then it is asked for again. Every change to a file is a point."""
    monkeypatch.setattr(private_visit, "fit_private", marked)
    monkeypatch.setattr(os, "fsync", lambda _: None)
    worker = Worker(settings(tiny_model, "privacy.accountant=rdp"))
    point, died = 0, True
    while died:
        point += 1
        folder = tmp_path / str(point)
        folder.mkdir()
        died = killed_at(point, worker, folder, [1, 2, 3, 4, 1])
        done = len((folder / "left.jsonl").read_text().splitlines()) if (folder / "left.jsonl").exists() else 0
        ask(worker, folder, [*[1, 2, 3, 4, 1][done:], 1, 4])
        left = [json.loads(line) for line in (folder / "left.jsonl").read_text().splitlines()]
        bits_of: dict[str, set[str]] = {}
        for _, noise, bits in left:
            bits_of.setdefault(str(noise), set()).add(str(bits))
        assert all(len(bits) == 1 for bits in bits_of.values()), f"killed before change {point}: {left}"
        charged = json.loads((folder / "site" / "ledger.json").read_text())["entries"]
        # Each noise that left was paid for, and a kill costs nothing more: four rounds, and the first once more, but
        # where a kill has kept its answer from being removed.
        assert len(charged) == len(bits_of) and len(charged) in (4, 5)
    assert point > 40


class Killed(BaseException):
    """The process ends here."""


def test_kills_one_after_the_other_never_lead_to_the_same_noise_on_two_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four requests, each killed before one of its first three changes to the disk, then asked again: all sequences.

    An answer whose list was never written, for the process died, is known by its file alone until the next request
    writes the list; that one may die as well.
    """
    left_to_live = math.inf

    def dying(change: Callable[..., None]) -> Callable[..., None]:
        def step(path: Path, *given: Any, **named: Any) -> None:
            nonlocal left_to_live
            left_to_live -= not path.name.startswith(".")  # a draft is no change of its own
            if left_to_live < 0:
                raise Killed
            change(path, *given, **named)

        return step

    def answer(folder: Path, number: int) -> None:
        name = releases.unanswered(folder, number, lambda again: f"{number}{'x'.join(again).replace(' ', '')}")
        bits = torch.tensor([float(next(made))])
        report = FitReport(1, 1, 1, 0.0, 0.0)
        left = releases.released(folder, number, name, lambda: FitResult({"bits": bits}, Cursor(), report))
        bits_of.setdefault(name, set()).add(float(left.delta["bits"]))

    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(releases, "write_atomic", dying(write_atomic))
    monkeypatch.setattr(Path, "unlink", dying(Path.unlink))
    made, died = itertools.count(), 0
    for kills in itertools.product([0, 1, 2], repeat=4):
        folder, bits_of = tmp_path / "-".join(map(str, kills)), dict[str, set[float]]()
        for number, left_to_live in enumerate(kills, 1):
            try:
                answer(folder, number)
            except Killed:
                died += 1
                left_to_live = math.inf
                answer(folder, number)
        left_to_live = math.inf
        for number in (1, 2, 3, 4):
            answer(folder, number)
        assert all(len(bits) == 1 for bits in bits_of.values()), f"killed after {kills} changes: {bits_of}"
    assert died > 200


def test_an_answer_that_was_removed_by_hand_is_not_made_again_under_its_noise(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(private_visit, "fit_private", marked)
    worker = Worker(settings(tiny_model, "privacy.accountant=rdp"))
    ask(worker, tmp_path, [1])
    (kept,) = (tmp_path / "site" / "run").glob("release-0001-*")
    kept.unlink()
    ask(worker, tmp_path, [1])
    first, second = (json.loads(line) for line in (tmp_path / "left.jsonl").read_text().splitlines())
    assert first[1] != second[1]


def test_the_noise_that_an_answer_has_is_that_of_its_charge(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a crash that left no answer the same noise is made; it is named by the ledger's own entry."""
    monkeypatch.setattr(private_visit, "fit_private", marked)
    worker = Worker(settings(tiny_model, "privacy.accountant=rdp"))
    ask(worker, tmp_path, [1])
    (entry,) = json.loads((tmp_path / "site" / "ledger.json").read_text())["entries"]
    key = (tmp_path / "site" / "privacy.key").read_bytes()
    (left,) = (json.loads(line) for line in (tmp_path / "left.jsonl").read_text().splitlines())
    assert left[1] == SecretNoise(key, "noise", entry["request"]).normal(2).astype("float32").tolist()
