"""The disk of a deployment's server is full in the middle of a run: real processes, and a small disk of memory."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from deployment import Deployment, events_of, overrides, write_held_out, write_rows
from safetensors.torch import load_file

from apiary.config import loading
from simulation.run import simulate

pytestmark = pytest.mark.long


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 200 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200m", "apiary-test", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip("only root may mount a disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def federation(tmp_path: Path, tiny_model: Path) -> Iterator[Deployment]:
    """A server and one site."""
    made = Deployment(tmp_path, tiny_model)
    rows = write_rows(tmp_path / "rows")
    for site in ("bee", "cricket"):
        (rows / f"{site}.jsonl").unlink()
    try:
        made.serve()
        made.join("ant", rows)
        made.wait_for("ant", "connected to")
        yield made
    finally:
        made.end()


def _fill(disk: Path) -> Path:
    """Take all the room that there is, for now."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 16))
    return ballast


def _wait_for_round(run: Path, number: int) -> None:
    deadline = time.monotonic() + 300
    while not ((run / "log.jsonl").exists() and any(e["round"] == number for e in events_of(run, "round"))):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_run_waits_for_room_and_goes_on(federation: Deployment, disk: Path, tiny_model: Path) -> None:
    texts = [*overrides(tiny_model, federation.folder / "rows"), "rounds=4", "strategy.min_clients=1"]
    texts += ["evaluate.every=0", "data.test_fraction=0"]
    texts.append(f"data.test={write_held_out(federation.folder / 'held-out.jsonl')}")
    words = [word for text in texts for word in ("-s", text)]
    run = disk / "run"
    federation.start("submit", "deploy", "submit", str(federation.kits / "server"), "--out", str(run), *words)
    _wait_for_round(run, 1)
    ballast = _fill(disk)
    federation.wait_for("server", "waits for room on the disk")
    assert federation.running["submit"].poll() is None, federation.said("submit")
    ballast.unlink()
    federation.running["submit"].wait(timeout=600)
    assert federation.running["submit"].returncode == 0, federation.said("submit") + federation.said("server")
    assert "it goes on after round" in federation.said("submit")
    assert [event["round"] for event in events_of(run, "round")] == [1, 2, 3, 4]
    simulate(loading.load(None, texts), federation.folder / "rehearsed")
    theirs, ours = (
        load_file(out / "adapter" / "adapter_model.safetensors") for out in (federation.folder / "rehearsed", run)
    )
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items()) and set(ours) == set(theirs)
