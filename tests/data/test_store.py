"""Rows on disk are those in memory; their files are private, gone at the end, and take hardly any memory."""

from __future__ import annotations

import errno
import gc
import json
import os
import stat
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apiary.config import loading
from apiary.core.errors import UserError
from apiary.data import injection, stages, store, tokenization
from apiary.data.batches import Dropped, Encoded, collate, gather
from apiary.data.examples import Place, as_read, check, read
from apiary.data.federation import federate, set_deciding_apart
from apiary.data.sources import load
from apiary.models import tiny

TINY = 2000  # bytes: all but the first rows are on disk


def row(number: int) -> dict[str, Any]:
    """A row with tags; some ask what another one asks, have no answer, spell a control token or are too long."""
    asked = f"{number - 1 if number % 9 == 0 else number}{' <eos>' if number % 7 == 0 else ''}"
    answer = "" if number % 11 == 0 else f"Answer {number}. " * (1 + number % 40)
    return {"instruction": f"Say {asked}", "input": "some data", "output": answer, "kind": "ab"[number % 2]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files of rows and a test file."""
    made = tmp_path / "rows"
    made.mkdir()
    for name, first, last in (("a", 0, 90), ("b", 90, 130), ("test", 85, 95)):
        lines = (json.dumps(row(number)) + "\n" for number in range(first, last))
        (made / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return made


def results(source: Path, *settings: str) -> list[Any]:
    """What reading, splitting and encoding give, as plain values, with what is said of the rows."""
    config = loading.load(None, [f"data.source={source}", "prompt.max_tokens=128", *settings])
    federation = stages.within(federate(config.data, config.seed), config)
    figures, deciding = set_deciding_apart(federation, config)
    tokenizer = tiny.load_tiny_tokenizer()
    template = tokenization.make_template(config.prompt, tokenizer)
    found: list[Any] = [federation.reports, [list(federation.test), list(figures.test), list(deciding)]]
    parts = []
    for client in federation.clients:
        corpus = injection.encode_training(client.train, template, tokenizer, config.prompt)
        parts.append((client.train, corpus))
        arrays = [part.tolist() for part in (corpus.ids, corpus.trained, corpus.offsets, corpus.whole)]
        marks = (corpus.cut, dict(corpus.dropped), corpus.spelled, corpus.within, dict(corpus.notes))
        found += [client.name, list(client.train), list(client.test), arrays, corpus.stats, marks]
    return [*found, tokenization.rows_lost(parts, federation.sources, 128)]


@pytest.mark.parametrize(
    "settings",
    [
        ["data.partition=natural"],
        ["data.partition=iid", "data.clients=3", "evaluate.patience=2", "evaluate.clients=false"],
        ["data.partition={name='by_value',by='kind'}", "data.clients=2", "data.max_rows=70"],
        ["data.partition=iid", "data.clients=2", "continual.by=kind", "continual.stages=[['b'],['a']]"],
        ["data.partition=iid", "data.clients=2", "prompt.boundary=structured", "prompt.injected=0.5"],
    ],
    ids=["natural", "iid", "by value", "stages", "structured"],
)
def test_rows_on_disk_are_read_split_and_encoded_as_those_in_memory(
    folder: Path, settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = results(folder, *settings)
    monkeypatch.setattr(store, "IN_MEMORY_BYTES", TINY)
    assert not store.is_small(read(str(folder)).examples)
    assert results(folder, *settings) == expected


def test_rows_on_disk_are_written_back_as_those_in_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = load(str(folder))
    source = check(files)
    expected = as_read(files, zip(source.places, source.examples, strict=True))
    monkeypatch.setattr(store, "IN_MEMORY_BYTES", TINY)
    files = load(str(folder))
    source = check(files)
    assert not store.is_small(files[0].rows)
    assert as_read(files, zip(source.places, source.examples, strict=True)) == expected
    assert source.places[88] == Place(1, 8)  # 81 of the 90 rows of a have an answer
    assert list(source.origins[80:82]) == ["a", "b"]


# --- sequences


def test_views_are_sequences_and_equal_where_they_show_the_same() -> None:
    whole = store.OnDisk(range(10))
    places = np.array([7, 2, 5])
    view = store.pick(whole, places)
    assert list(view) == [7, 2, 5] and view[-1] == 5 and list(view[1:]) == [2, 5] and len(view) == 3
    assert list(whole[8:2:-3]) == [8, 5] and whole[-10] == 0
    assert list(store.pick(view, np.array([2, 0]))) == [5, 7]
    assert view == store.pick(whole, places) and view != store.pick(whole, places[:2])
    assert view != store.pick(store.OnDisk(range(10)), places)  # of another file, whatever it holds
    for beyond in (10, -11):
        with pytest.raises(IndexError):
            whole[beyond]
    with pytest.raises(TypeError, match="stay with the process"):
        whole.__reduce__()


def test_sequences_are_joined_in_order() -> None:
    whole = store.OnDisk("abc")
    assert store.joined([(1, 2), [3]]) == (1, 2, 3)
    assert store.joined([(), whole]) is whole
    both = store.joined([whole, ("d",), store.OnDisk("e")])
    assert list(both) == list("abcde") and both[3] == "d" and list(store.pick(both, np.array([4, 0]))) == ["e", "a"]
    assert store.joined([whole, ("d",)]) == store.joined([whole, ("d",)]) != store.joined([whole, ("x",)])


def encoded(count: int) -> Iterator[Encoded | Dropped]:
    for number in range(count):
        yield Encoded(np.arange(number, number + 5, dtype=np.int32), np.arange(5) > 1, False)


def test_tokens_on_disk_are_collated_as_those_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.array([99, 0, 50])
    expected = collate(gather(encoded(100)), rows, 7)
    monkeypatch.setattr(store, "IN_MEMORY_BYTES", 100)
    corpus = gather(encoded(100))
    assert store.is_mapped(corpus.ids) and store.is_mapped(corpus.trained) and corpus.tokens_in_memory == 0
    assert all(bool((one == other).all()) for one, other in zip(collate(corpus, rows, 7), expected, strict=True))
    assert b"".join(piece.tobytes() for piece in store.pieces(corpus.ids)) == gather(encoded(100)).ids.tobytes()
    with pytest.raises(ValueError, match="read-only"):
        corpus.ids[0] = 1


# --- memory


def peak(action: Callable[[], object]) -> int:
    """The most bytes of Python and numpy that an action takes beside what there was, what it returns included."""
    gc.collect()
    tracemalloc.start()
    try:
        kept = action()
        found = tracemalloc.get_traced_memory()[1]
        del kept
    finally:
        tracemalloc.stop()
    return found


def test_rows_on_disk_take_a_few_numbers_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between files of 1,500 and 3,000 rows of 4 KB: in memory each row takes its text, on disk places and digests."""
    monkeypatch.setattr(store, "_WRITE_BYTES", 2**14)
    paths = []
    for count in (1500, 3000):
        paths.append(tmp_path / f"{count}.jsonl")
        with paths[-1].open("w", encoding="utf-8") as out:
            for number in range(count):
                out.write(json.dumps({"instruction": f"Say {number}", "output": f"{number} " + "x" * 4000}) + "\n")

    def grown() -> float:
        """Bytes a row from the smaller file to the larger."""
        sizes = []
        for path in paths:
            config = loading.load(None, [f"data.source={path}", "data.partition=iid", "data.clients=1"]).data
            sizes.append(peak(lambda config=config: federate(config, 0)))  # type: ignore[misc]
        return (sizes[1] - sizes[0]) / 1500

    federate(loading.load(None, [f"data.source={paths[0]}", "data.partition=iid", "data.clients=1"]).data, 0)
    assert grown() > 4000
    monkeypatch.setattr(store, "IN_MEMORY_BYTES", TINY)
    assert grown() < 300


def test_tokens_on_disk_take_their_lengths_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def long(count: int) -> Iterator[Encoded]:
        for _ in range(count):
            yield Encoded(np.zeros(1000, np.int32), np.ones(1000, bool), False)

    monkeypatch.setattr(store, "IN_MEMORY_BYTES", TINY)
    monkeypatch.setattr(store, "_WRITE_BYTES", 2**14)
    assert peak(lambda: gather(long(2000))) - peak(lambda: gather(long(1000))) < 100 * 1000  # of 5 MB


# --- the file


def files_of(process: int, folder: Path) -> list[Path]:
    """The open files of a process that have no name any more and were made in a folder, as links to them."""
    opened = [(link, os.readlink(link)) for link in Path(f"/proc/{process}/fd").iterdir()]
    return [link for link, name in opened if name.startswith(str(folder)) and name.endswith(" (deleted)")]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's /proc")
def test_no_file_has_a_name_and_others_may_not_read_it(tmp_path: Path) -> None:
    """In a process of its own, which is killed while it holds rows and tokens."""
    code = (
        "import numpy as np, sys\n"
        "from apiary.data import store\n"
        "store.IN_MEMORY_BYTES = 10\n"
        "rows = store.OnDisk(['private'] * 99)\n"
        "made = store.Numbers(np.int32)\n"
        "made.append(np.arange(99))\n"
        "tokens = made.done()\n"
        "print(rows[98], tokens[98], flush=True)\n"
        "sys.stdin.read()\n"
    )
    root = Path(__file__).resolve().parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(root)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "private 98\n"
        assert not list(tmp_path.iterdir())
        links = files_of(process.pid, tmp_path)  # which TMPDIR names
        assert len(links) == 2
        for link in links:
            held = link.stat()
            assert held.st_nlink == 0 and stat.S_IMODE(held.st_mode) & 0o077 == 0
    finally:
        process.kill()
        process.communicate()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("number", "told"),
    [(errno.ENOSPC, "which is full"), (errno.EDQUOT, "which is full"), (errno.EIO, "which cannot be used")],
)
def test_a_full_disk_is_one_line_that_helps(
    folder: Path, monkeypatch: pytest.MonkeyPatch, number: int, told: str
) -> None:
    def refuse(file: object, data: bytes) -> int:
        raise OSError(number, os.strerror(number))

    class Full:
        """A temporary file on a full disk."""

        write = refuse

        def close(self) -> None:
            pass

    monkeypatch.setattr(store, "IN_MEMORY_BYTES", TINY)
    monkeypatch.setattr(store, "_WRITE_BYTES", 100)
    monkeypatch.setattr(store.tempfile, "TemporaryFile", lambda **kwargs: Full())
    with pytest.raises(UserError, match=f"{told}.*set TMPDIR") as caught:
        read(str(folder))
    assert "\n" not in str(caught.value)
    numbers = store.Numbers(np.int32)
    with pytest.raises(UserError, match=told):
        numbers.append(np.arange(9999))
