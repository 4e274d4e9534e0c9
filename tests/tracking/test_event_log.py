from __future__ import annotations

import json
import math
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apiary.config.loading import parse
from apiary.config.schema import RunConfig
from apiary.core.errors import UserError
from apiary.core.files import write_atomic
from apiary.tracking import environment, metrics_file
from apiary.tracking.event_log import RunLog, append_whole, read_events, truncate_after
from apiary.tracking.reply_log import REPLIES_FILE
from apiary.tracking.trackers import tracker


def kinds(folder: Path) -> list[str]:
    return [event["event"] for event in read_events(folder)]


def test_events_are_json_lines_in_order_and_observers_see_the_same(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    log = RunLog(tmp_path / "run", [seen.append])
    log.event("start", seed=7)
    log.event("round", round=1, train_loss=float("nan"), ci95=(1.0, math.inf), n=np.int64(3))
    log.close()
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == seen == read_events(tmp_path / "run")
    assert seen[1]["train_loss"] is None
    assert seen[1]["ci95"] == [1.0, None]
    assert seen[1]["n"] == 3
    assert abs(seen[0]["time"] - time.time()) < 60


def test_a_failing_observer_is_left_out_and_the_run_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    calls, seen = [], []

    def broken(event: dict[str, Any]) -> None:
        calls.append(event)
        raise ConnectionError("tracker is down")

    log = RunLog(tmp_path, [broken, seen.append])
    log.event("start")
    log.event("finish")
    log.close()
    assert len(calls) == 1
    assert [event["event"] for event in seen] == ["start", "finish"]
    assert "left out" in caplog.text


@given(cut=st.integers(0, 200))
def test_a_log_torn_anywhere_opens_whole_and_goes_on(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    folder = tmp_path_factory.mktemp("run")
    lines = [json.dumps({"event": "round", "round": i, "note": "é\n"}) + "\n" for i in range(4)]
    body = "".join(lines).encode()[:cut]
    (folder / "log.jsonl").write_bytes(body)
    # a line whose newline alone is missing is whole
    whole = sum(len("".join(lines[: i + 1]).encode()) - 1 <= len(body) for i in range(4))
    assert len(read_events(folder)) == whole
    log = RunLog(folder)
    log.event("finish")
    log.close()
    assert kinds(folder) == ["round"] * whole + ["finish"]


def test_events_survive_kill_9(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from apiary.tracking.event_log import RunLog\n"
        "log = RunLog(Path(sys.argv[1])); i = 0\n"
        "while True: log.event('round', round=i); i += 1; print(i, flush=True)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = [process.stdout.readline() for _ in range(20)]
        process.send_signal(signal.SIGKILL)
    events = read_events(tmp_path)
    assert len(events) >= int(said[-1])
    assert [event["round"] for event in events] == list(range(len(events)))


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"event":"start"}\n{"event":\n{"event":"finish"}\n')
    with pytest.raises(UserError, match="line 2"):
        read_events(tmp_path)


def test_truncate_after_leaves_one_story(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    _tell_from(log, 0)
    log.event("baseline", method="local", done=1, total=1)
    log.event("finish", seconds=1)
    log.close()
    before = read_events(tmp_path)

    truncate_after(tmp_path, 3)
    assert [e for e in read_events(tmp_path) if "round" in e] == [e for e in before if "round" in e]
    assert kinds(tmp_path)[-1] == "evaluate"
    truncate_after(tmp_path, 2)
    kept = [e for e in before if "round" in e and e["round"] <= 2]
    assert read_events(tmp_path) == [before[0], *kept]
    truncate_after(tmp_path, 0)
    assert kinds(tmp_path) == ["start"]
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def _tell_from(log: RunLog, finished: int) -> None:
    """A run's events from its start after `finished` rounds to the end of round 3."""
    log.event("start", seed=0)
    log.event("warning", message="rows.jsonl: 3 of 90 rows left out")
    log.event("template", template="alpaca (the tokenizer has no chat template)")
    log.event("handshake", client="a")
    log.event("refused", client="b", reason="it has nothing to train on")
    if not finished:
        log.event("refused", round=0, client="a", reason="ValueError")
        log.event("evaluate", round=0, loss=3.0)
    for number in range(finished + 1, 4):
        log.event("asked", round=number, clients=["a", "c"])
        log.event("refused", round=number, client="c", reason="ValueError")
        log.event("round", round=number)
        log.event("evaluate", round=number, loss=2.0)


@pytest.mark.parametrize("finished", [0, 1, 2])
def test_however_often_a_run_is_resumed_its_log_says_everything_once(tmp_path: Path, finished: int) -> None:
    log = RunLog(tmp_path)
    _tell_from(log, 0)
    log.close()
    once = [{k: v for k, v in e.items() if k != "time"} for e in read_events(tmp_path) if e["event"] != "start"]
    for _ in range(3):
        truncate_after(tmp_path, finished)
        log = RunLog(tmp_path)
        _tell_from(log, finished)
        log.close()
    again = [{k: v for k, v in e.items() if k != "time"} for e in read_events(tmp_path) if e["event"] != "start"]
    assert sorted(map(str, again)) == sorted(map(str, once))


def test_write_atomic_replaces_whole_files(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_atomic(path, "grüße")
    assert path.read_text(encoding="utf-8") == "grüße"
    write_atomic(path, b"\x00\x01")
    assert path.read_bytes() == b"\x00\x01"
    assert list(tmp_path.iterdir()) == [path]


def full_disk(limit: int, action: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs `action` where no file may grow beyond `limit` bytes: the kernel's own ENOSPC cousin."""

    def shrink() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    code = (
        "import sys; from pathlib import Path; from apiary.tracking.event_log import *\n"
        "from apiary.tracking.reply_log import ReplyLog\n"
        f"folder = Path(sys.argv[1])\ntry:\n    {action}\n"
        "except OSError as error: print(type(error).__name__)"
    )
    return subprocess.run(
        [sys.executable, "-B", "-c", code, str(folder)],
        capture_output=True,
        text=True,
        preexec_fn=shrink,
        check=True,
    )


def test_a_full_disk_keeps_the_old_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    path.write_text("old")
    done = full_disk(4096, "write_atomic(folder / 'metrics.json', 'x' * 10_000)", tmp_path)
    assert done.stdout.strip() == "OSError"
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_a_log_of_whole_lines(tmp_path: Path) -> None:
    write = "log.event('start', text='x' * 3000); log.event('round', text='y' * 3000)"
    done = full_disk(4096, f"log = RunLog(folder); {write}", tmp_path)
    assert done.stdout.strip() == "OSError"
    assert (tmp_path / "log.jsonl").read_bytes().endswith(b"\n")
    assert kinds(tmp_path) == ["start"]


def test_a_full_disk_leaves_an_account_of_whole_lines(tmp_path: Path) -> None:
    """The disk takes the beginning of the second line, and says so by a number alone."""
    log = "log = ReplyLog(folder); log.add(round=1, reply='x' * 3000); log.add(round=2, reply='y' * 3000)"
    assert full_disk(4096, log, tmp_path).stdout.strip() == "OSError"
    (line,) = (tmp_path / REPLIES_FILE).read_bytes().splitlines(keepends=True)
    assert line.endswith(b"\n") and json.loads(line)["round"] == 1


class _Slow(FileIO):
    """A file that takes seven bytes at a time."""

    def write(self, body: Any) -> int:
        return super().write(bytes(body)[:7])


def test_a_line_that_is_taken_in_parts_is_written_whole(tmp_path: Path) -> None:
    with _Slow(tmp_path / "lines", "ab") as file:
        for line in (b"first, and longer\n", b"second\n"):
            append_whole(file, line)
    assert (tmp_path / "lines").read_bytes() == b"first, and longer\nsecond\n"


def test_metrics_come_back_with_schema_and_without_nan(tmp_path: Path) -> None:
    metrics_file.write_metrics(tmp_path, {"table": [{"method": "base", "loss": float("nan")}]})
    body = (tmp_path / "metrics.json").read_text()
    assert "NaN" not in body
    assert metrics_file.read_metrics(tmp_path) == {
        "schema": 1,
        "table": [{"method": "base", "loss": None}],
    }


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (None, "has no metrics.json"),
        ("{", "not valid JSON"),
        ("[1]", "schema = None"),
        ('{"schema": 2}', "schema = 2.*reads schema 1"),
        ("\xff\xfe", "not valid JSON"),
    ],
)
def test_broken_metrics_are_one_clear_line(tmp_path: Path, body: str | None, message: str) -> None:
    if body is not None:
        (tmp_path / "metrics.json").write_bytes(body.encode("latin-1"))
    with pytest.raises(UserError, match=message) as caught:
        metrics_file.read_metrics(tmp_path)
    assert "\n" not in str(caught.value)


def test_no_run_folder_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        metrics_file.read_metrics(tmp_path / "gone")


def test_start_fields_say_what_ran_but_not_who_or_where() -> None:
    config = parse({"seed": 5, "data": {"source": "/home/somebody/rows.jsonl"}})
    fields = environment.start_fields(config)
    assert fields["seed"] == 5
    assert fields["versions"].keys() >= {
        "apiary",
        "python",
        "torch",
        "transformers",
        "peft",
        "flwr",
    }
    assert fields["machine"]["cores"] >= 1
    assert fields["config_digest"] != environment.start_fields(RunConfig())["config_digest"]
    text = json.dumps(fields)
    for secret in (socket.gethostname(), os.path.expanduser("~"), "/home", str(Path.cwd())):
        assert secret not in text


def test_a_package_inside_another_repository_claims_no_commit(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "site-packages").mkdir()
    assert environment._commit(tmp_path / "site-packages") is None
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    git = ["git", "-C", str(tmp_path)]
    subprocess.run([*git, *identity, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert environment._commit(tmp_path) == head.stdout.strip()


class FakeTracker:
    """What accelerate asks of a tracker, with a record of what it was told."""

    name = "tensorboard"
    requires_logging_directory = True
    made: list[FakeTracker] = []  # noqa: RUF012

    def __init__(self, project: str, logging_dir: str) -> None:
        self.project, self.logging_dir = project, logging_dir
        self.told: list[tuple[int | None, dict[str, float]]] = []
        self.settings: dict[str, Any] = {}
        self.finished = False
        FakeTracker.made.append(self)

    def start(self) -> None:
        pass

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.settings = values

    def log(self, values: dict[str, float], step: int | None = None) -> None:
        self.told.append((step, values))

    def finish(self) -> None:
        self.finished = True


def test_trackers_get_numbers_by_round_and_no_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "tensorboard", FakeTracker)
    source = str(tmp_path / "rows.jsonl")
    config = parse({"data": {"source": source}, "log": {"trackers": ["tensorboard"], "project": "p"}})
    log = RunLog(tmp_path / "run", [tracker(config, tmp_path / "run")])
    log.event("start", seed=0)
    log.event("round", round=2, train_loss=1.5, clients=8, seconds=float("nan"))
    log.event("evaluate", round=2, loss=1.25, ci95=[1.0, 1.5], n=400, clients={"a": 1.0, "b": None})
    log.event("client", round=2, client="a", loss=1.0)
    log.event("finish", seconds=3)
    log.close()
    (fake,) = FakeTracker.made
    assert fake.project == "p"
    assert fake.told == [
        (2, {"round/train_loss": 1.5, "round/clients": 8}),
        (
            2,
            {
                "evaluate/loss": 1.25,
                "evaluate/ci95_low": 1.0,
                "evaluate/ci95_high": 1.5,
                "evaluate/n": 400,
                "evaluate/clients/a": 1.0,
            },
        ),
    ]
    assert fake.finished
    assert fake.settings["train.lr"] == RunConfig().train.lr
    assert source not in map(str, fake.settings.values())


def test_tensorboard_writes_real_event_files(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = parse({"log": {"trackers": ["tensorboard"]}})
    observe = tracker(config, tmp_path)
    observe({"event": "round", "round": 3, "time": 0.0, "train_loss": 0.5})
    observe({"event": "finish", "time": 1.0})
    (folder,) = {path.parent for path in tmp_path.rglob("events.out.tfevents.*") if path.parent.name == "apiary"}
    scalars = EventAccumulator(str(folder)).Reload().Scalars("round/train_loss")
    assert [(s.step, s.value) for s in scalars] == [(3, 0.5)]


def test_a_tracker_without_its_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(UserError, match=r"log.trackers = 'wandb'.*pip install wandb"):
        tracker(parse({"log": {"trackers": ["wandb"]}}), tmp_path)
