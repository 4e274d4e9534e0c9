"""Checkpoints, client memory and sampling: what must survive a kill, and what must not depend on it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apiary.config import loading
from apiary.config.schema import RunConfig
from apiary.core.errors import UserError
from apiary.privacy import statement
from client import round_files
from client import state as memory
from client.state import Memory
from client.training.trainer import Cursor
from server import app, checkpoint
from server.rounds import Progress
from server.sampling import Draw, choose, panel
from strategies import ServerState

RUN = RunConfig()


def state(number: int) -> ServerState:
    generator = torch.Generator().manual_seed(number)
    return ServerState(number, {"w": torch.randn(50, 40, generator=generator)}, {}, {"m": torch.ones(3) * number})


def test_newest_whole_checkpoint_comes_back(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        checkpoint.save(tmp_path, state(number), {"best_loss": 0.5}, RUN)
    loaded = checkpoint.load(tmp_path, RUN)
    assert loaded is not None
    assert loaded[0].round == 3 and torch.equal(loaded[0].adapter["w"], state(3).adapter["w"])
    assert loaded[1] == {"best_loss": 0.5}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["round-0002", "round-0003"]


@pytest.mark.parametrize("damage", ["truncate", "flip", "no index", "half json"])
def test_damaged_checkpoint_is_passed_over(tmp_path: Path, damage: str) -> None:
    checkpoint.save(tmp_path, state(1), {}, RUN)
    newest = checkpoint.save(tmp_path, state(2), {}, RUN)
    weights = newest / "adapter.safetensors"
    data = weights.read_bytes()
    match damage:
        case "truncate":
            weights.write_bytes(data[: len(data) // 2])
        case "flip":
            weights.write_bytes(data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])
        case "no index":
            (newest / "state.json").unlink()
        case _:
            (newest / "state.json").write_text('{"round": 2,')
    loaded = checkpoint.load(tmp_path, RUN)
    assert loaded is not None and loaded[0].round == 1


def test_an_older_checkpoint_of_another_run_is_not_taken_where_the_newest_is_torn(tmp_path: Path) -> None:
    """The index of the newest one is whole and says this run, so only the one that is read can be refused."""
    checkpoint.save(tmp_path, state(1), {}, RUN.model_copy(update={"seed": 7}))
    newest = checkpoint.save(tmp_path, state(2), {}, RUN)
    (newest / "adapter.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"checkpoint round-0001 was made with another seed"):
        checkpoint.load(tmp_path, RUN)
    assert checkpoint.load(tmp_path) is not None  # to look at it, whoever made it


def test_nothing_there_is_none(tmp_path: Path) -> None:
    assert checkpoint.load(tmp_path, RUN) is None


_WRITER = """
import sys, torch
from pathlib import Path
from apiary.config import loading
from apiary.config.schema import RunConfig
from server import app, checkpoint
from server.rounds import Progress
from strategies import ServerState
n = 0
while True:
    n += 1
    checkpoint.save(Path(sys.argv[1]), ServerState(n, {"w": torch.full((200, 200), float(n))}, {}, {}), {}, RunConfig())
    print(n, flush=True)
"""


@pytest.mark.slow
def test_kill_at_random_moments_never_leaves_a_torn_checkpoint(tmp_path: Path) -> None:
    for attempt in range(4):
        folder = tmp_path / str(attempt)
        command = [sys.executable, "-c", _WRITER, str(folder)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as process:
            try:
                assert process.stdout is not None
                process.stdout.readline()
                time.sleep(0.013 * (attempt + 1))
            finally:
                process.kill()
        loaded = checkpoint.load(folder, RUN)
        assert loaded is not None
        assert torch.equal(loaded[0].adapter["w"], torch.full((200, 200), float(loaded[0].round)))


def test_full_disk_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, state(1), {}, RUN)

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "sync", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(tmp_path, state(2), {}, RUN)
    assert sorted(os.listdir(tmp_path)) == ["round-0001"]


def test_memory_goes_back_with_the_server(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        memory.save(tmp_path, Memory(number, Cursor(0, number * 7)))
    assert memory.load(tmp_path, before=4) == Memory(3, Cursor(0, 21))
    assert memory.load(tmp_path, before=2) == Memory(1, Cursor(0, 7))
    round_files.begin(tmp_path, 2)  # rounds 2 and 3 are done again after a crash
    assert memory.load(tmp_path, before=10) == Memory(1, Cursor(0, 7))
    memory.save(tmp_path, Memory(2, Cursor(0, 99)))
    assert memory.load(tmp_path, before=10) == Memory(2, Cursor(0, 99))
    assert memory.load(tmp_path / "nobody", before=5) == Memory()


def test_a_straggler_does_not_turn_the_clock_back(tmp_path: Path) -> None:
    memory.save(tmp_path, Memory(3, Cursor(0, 21)))
    memory.save(tmp_path, Memory(2, Cursor(0, 14)))  # round 2's visit ends after round 3's
    assert memory.load(tmp_path, before=4) == Memory(3, Cursor(0, 21))


def test_memory_of_a_rarely_asked_client_is_kept(tmp_path: Path) -> None:
    memory.save(tmp_path, Memory(2, Cursor(1, 5)))
    memory.save(tmp_path, Memory(90, Cursor(2, 0)))
    shutil.rmtree(tmp_path / "unrelated", ignore_errors=True)
    assert memory.load(tmp_path, before=90) == Memory(2, Cursor(1, 5))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.floats(0.01, 1.0), st.integers(1, 70), st.integers(0, 10**6), st.integers(1, 100))
def test_cohort_size_and_determinism(n: int, fraction: float, minimum: int, seed: int, number: int) -> None:
    names = [f"c{i}" for i in range(n)]
    one = choose(names, Draw(fraction, minimum, seed), number)
    two = choose(reversed(names), Draw(fraction, minimum, seed), number)
    assert one == two == sorted(set(one))
    assert len(one) >= min(n, minimum) and len(one) >= fraction * n - 1e-6 and len(one) <= n
    assert len(one) <= max(minimum, fraction * n + 1)


def test_sampling_is_uniform() -> None:
    names = [f"c{i}" for i in range(10)]
    counts = dict.fromkeys(names, 0)
    for number in range(2000):
        for name in choose(names, Draw(0.3, 1, seed=1), number):
            counts[name] += 1
    # 2000 rounds x 3 of 10: mean 600, standard deviation sqrt(2000 * 0.3 * 0.7) = 20.5
    assert all(abs(count - 600) < 5 * 20.5 for count in counts.values())


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 60), st.floats(0.01, 1.0), st.integers(1, 70), st.integers(0, 10**6))
def test_the_panel_is_of_a_cohorts_size_and_outlasts_who_comes_and_leaves(
    n: int, fraction: float, minimum: int, seed: int
) -> None:
    names = [f"c{i}" for i in range(n)]
    size = len(choose(names, Draw(fraction, minimum, seed), 1))
    draw = Draw(fraction, minimum, seed)
    before = panel(reversed(names), draw)
    assert before == sorted(set(before)) and len(before) == size
    for gone in names:
        after = panel([name for name in names if name != gone], draw)
        # Read the other way round: somebody came.
        assert len(set(before) - {gone} ^ set(after)) <= 1


def test_every_client_is_on_the_panel_of_some_seed() -> None:
    names = [f"c{i}" for i in range(10)]
    counts = Counter(name for seed in range(2000) for name in panel(names, Draw(0.3, 1, seed)))
    # 2000 seeds x 3 of 10: mean 600, standard deviation sqrt(2000 * 0.3 * 0.7) = 20.5
    assert all(abs(counts[name] - 600) < 5 * 20.5 for name in names)


def test_what_was_spent_in_rounds_that_are_not_done_again_stays_in_the_account(tmp_path: Path) -> None:
    """A run that goes on from round 4 after round 6: one client is there again, the other is not."""
    config = loading.load(None, ["privacy.unit=record"])
    at_6 = Progress(spent={"back": [3.0, 3.5, 1e-5, 1.0, 0.1, 6], "gone": [2.0, 2.5, 1e-5, 1.0, 0.1, 6]})
    app.save(tmp_path, config, state(6), at_6)
    at_5 = Progress(spent={"back": [2.5, 3.0, 1e-5, 1.0, 0.1, 5], "gone": [1.5, 2.0, 1e-5, 1.0, 0.1, 4]})
    app.save(tmp_path, config, state(5), at_5)
    told = statement.read(tmp_path)
    assert {name: one["epsilon"] for name, one in told["clients"].items()} == {"back": 3.0, "gone": 2.0}
    assert told["epsilon"] == 3.0
    app.save(tmp_path, config, state(7), Progress(spent={"back": [3.25, 3.75, 1e-5, 1.0, 0.1, 7]}))
    assert statement.read(tmp_path)["clients"]["back"]["steps"] == 7


def test_what_virtual_clients_keep_is_on_disk_before_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power failure between the two must leave no checkpoint of a round whose files may be torn."""
    told: list[str] = []
    monkeypatch.setattr(app.files, "flush", lambda folder: told.append(f"flush {folder.name}"))
    save = checkpoint.save
    monkeypatch.setattr(app.checkpoint, "save", lambda *a, **k: (told.append("checkpoint"), save(*a, **k))[1])
    (tmp_path / "run").mkdir()
    app.save(tmp_path / "run", RUN, state(1), Progress())
    assert told == ["flush run", "checkpoint"]
