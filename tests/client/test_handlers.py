"""The ClientApp itself: what leaves a client when all goes well, and when something goes wrong."""

from __future__ import annotations

import errno
import json
import logging
import stat
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import instruction_rows
from flwr.app import ArrayRecord, Message, RecordDict

from apiary.config import loading
from apiary.data.federation import Federation
from apiary.models import adapters
from apiary.transport import flower_records
from client import app as client_app
from client import handlers, state
from client.training import trainer
from simulation import engines
from simulation.in_process_grid import LocalGrid
from simulation.run import simulate

SECRET = "row 17 says: the queen is in hive 9"
PLACE = "/srv/hospital/rows.jsonl"


class Asked:
    """A real ClientApp with one node to ask, its folder, and what a round's message holds."""

    def __init__(self, overrides: list[str], folder: Path) -> None:
        self.run = loading.load(None, overrides)
        self.folder = folder / "clients" / "client-00"
        app = client_app.make_app(engines.site_facts(self.run.to_json(), folder))
        self.grid = LocalGrid(app, self.run.data.clients)
        adapter = flower_records.to_arrays(adapters.fresh_adapter(adapters.load(self.run.model, self.run.adapter), 0))
        self.content = flower_records.request(1, adapter, ArrayRecord())

    def ask(self, kind: str, content: RecordDict | None = None) -> Message:
        message = Message(self.content if content is None else content, 1000, kind, group_id="1")
        (reply,) = self.grid.send_and_receive([message])
        return reply


@pytest.fixture
def asked(small_run: list[str], tmp_path: Path) -> Asked:
    handlers.forget()
    return Asked(small_run, tmp_path)


def test_a_site_that_was_sent_a_spoilt_adapter_is_not_told_to_train_otherwise(asked: Asked) -> None:
    sent = adapters.fresh_adapter(adapters.load(asked.run.model, asked.run.adapter), 0)
    spoilt = {name: torch.full_like(tensor, 1e30) for name, tensor in sent.items()}
    reply = asked.ask("train", flower_records.request(1, flower_records.to_arrays(spoilt), ArrayRecord()))
    assert reply.has_error()
    assert reply.error.reason.startswith("the adapter that it was sent gives no number on its rows")
    assert "train.lr" not in reply.error.reason


def test_an_error_leaves_its_text_at_home(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise ValueError(f"{PLACE}: {SECRET}")

    monkeypatch.setattr(trainer, "fit", broken)
    reply = asked.ask("train")
    assert reply.has_error()
    sent = " ".join(_strings(reply))
    assert "ValueError" in sent and "client/worker.py:" in sent and "errors.log" in sent
    assert SECRET not in sent and "hospital" not in sent and str(asked.folder) not in sent
    kept = (asked.folder / "errors.log").read_text()
    assert f"{PLACE}: {SECRET}" in kept and "Traceback" in kept


def test_errors_without_end_do_not_fill_the_sites_disk(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server can make a site fail as often as it likes, with texts of its own in the error."""
    log, older, most = asked.folder / "errors.log", asked.folder / "errors.old.log", 60_000
    monkeypatch.setattr("apiary.core.files.LOG_BYTES", most)
    sizes = []
    for number in range(5):

        def broken(*args: Any, number: int = number, **kwargs: Any) -> Any:
            raise ValueError(f"{number} {SECRET}" + "x" * 2**20 + f"end of {number}")

        monkeypatch.setattr(trainer, "fit", broken)
        assert "errors.log" in asked.ask("train").error.reason
        last = log.read_text()
        assert "Traceback" in last and f"end of {number}" in last
        sizes.append(log.stat().st_size)
    assert max(sizes) < most + 25_000 and sum(b < a for a, b in pairwise(sizes)) == 1
    assert older.stat().st_size <= max(sizes) and f"0 {SECRET}" in older.read_text()
    assert stat.S_IMODE(log.stat().st_mode) == stat.S_IMODE(older.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("privacy.noise_multiplier=0.1", "privacy.noise_multiplier = 0.1: epsilon after round 1 would be"),
        ("privacy.batch_rows=5000", "privacy.batch_rows = 5000: at most the"),
    ],
)
def test_a_promise_that_cannot_be_kept_is_refused_at_the_handshake(
    key: str, told: str, small_run: list[str], tmp_path: Path
) -> None:
    """In the words that the site's own plan has: they follow from public numbers."""
    handlers.forget()
    private = ["privacy.unit=record", "privacy.batch_rows=8"]
    assert not Asked([*small_run, *private], tmp_path).ask(flower_records.HELLO, RecordDict()).has_error()
    reply = Asked([*small_run, *private, key], tmp_path).ask(flower_records.HELLO, RecordDict())
    assert reply.error.reason.startswith(told)


def test_a_log_that_cannot_be_written_is_not_promised(
    asked: Asked, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise ValueError(SECRET)

    monkeypatch.setattr(trainer, "fit", broken)
    (asked.folder / "errors.log").mkdir(parents=True)  # a folder where the file should be
    reply = asked.ask("train")
    assert "ValueError" in reply.error.reason and SECRET not in reply.error.reason
    assert "errors.log" not in reply.error.reason
    (told,) = [r for r in caplog.records if r.levelno >= logging.ERROR]
    assert told.exc_info is not None and SECRET in str(told.exc_info[1])


def test_a_site_that_cannot_be_had_is_told_on_its_machine(
    asked: Asked, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unreadable(text: str) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", PLACE)

    monkeypatch.setattr(handlers, "federation", unreadable)
    reply = asked.ask(flower_records.HELLO)
    assert "PermissionError" in reply.error.reason and "hospital" not in reply.error.reason
    assert "errors.log" not in reply.error.reason
    assert any(r.exc_info and PLACE in str(r.exc_info[1]) for r in caplog.records)


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_message_that_cannot_be_read_is_written_down_too(asked: Asked, kind: str) -> None:
    reply = asked.ask(kind, RecordDict())
    assert "WireError" in reply.error.reason
    assert "holds no ArrayRecord" in (asked.folder / "errors.log").read_text()


def test_a_full_disk_is_told_without_its_path(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower sends `str(error)` of whatever an app raises to the server."""

    def full(*args: Any) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded", PLACE)

    monkeypatch.setattr(state, "save", full)
    with pytest.raises(OSError, match="quota exceeded") as caught:
        asked.ask("train")
    assert caught.value.errno == errno.EDQUOT
    assert "hospital" not in str(caught.value)


def test_no_row_and_no_path_is_in_any_message_of_a_run(
    small_run: list[str], tmp_path: Path, rows_file: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, Message]] = []

    class Listening(LocalGrid):
        def _execute(self, message: Message) -> Message:
            reply = super()._execute(message)
            seen.extend((("down", message), ("up", reply)))
            return reply

    monkeypatch.setattr(engines, "LocalGrid", Listening)
    simulate(loading.load(None, [*small_run, "evaluate.baselines=[]", "evaluate.generate=false"]), tmp_path / "run")
    kinds = {(way, m.metadata.message_type.partition(".")[0]) for way, m in seen}
    assert kinds == {(way, kind) for way in ("down", "up") for kind in ("query", "train", "evaluate")}
    private = {row[key] for row in instruction_rows(120) for key in ("instruction", "output")}
    private |= {word for row in instruction_rows(120) for word in row["instruction"].split() if len(word) > 3}
    private |= {str(folder) for folder in (tmp_path, rows_file.parent, tiny_model)} | {rows_file.name}
    sent = "\n".join({text for _, message in seen for text in _strings(message)})
    assert "client-00" in sent and "lora_A" in sent  # the scan sees names and keys
    assert [text for text in private if text in sent] == []


def _strings(message: Message) -> Iterator[str]:
    """Every string of a message: metadata, error, keys and values of its records, and all that its arrays hold."""
    yield from (str(value) for value in vars(message.metadata).values())
    if message.has_error():
        yield str(message.error.reason)
        return
    for name, record in message.content.items():
        yield name
        for key, value in record.items():
            yield str(key)
            if isinstance(record, ArrayRecord):
                yield from (value.dtype, value.stype, value.data.decode("latin-1"))
            else:
                yield json.dumps(value, default=str)


def test_runs_that_read_alike_have_one_federation(tmp_path: Path) -> None:
    """Until a file changes: a sweep reads its data once, and a later run in one process sees new rows."""
    file = tmp_path / "rows.jsonl"

    def write(count: int) -> None:
        file.write_text("".join(json.dumps(row) + "\n" for row in instruction_rows(count)), encoding="utf-8")

    def federation(*more: str) -> Federation:
        texts = [f"data.source={file}", "data.clients=2", "data.partition=iid", *more]
        return handlers.federation(loading.load(None, texts).to_json())

    write(60)
    handlers.forget()
    first = federation()
    assert federation("train.lr=1e-2", "strategy.server_optimizer=nesterov", "privacy.epsilon=2.0") is first
    other = federation("seed=1")
    assert list(other.clients[0].train) != list(first.clients[0].train)
    assert federation("data.test_fraction=0.4") is not other
    assert federation("privacy.unit=record") is not federation()
    before = federation()
    write(90)
    after = federation("train.lr=1e-3")
    assert sum(len(c.train) + len(c.test) for c in after.clients) == 90
    assert sum(len(c.train) + len(c.test) for c in before.clients) == 60
