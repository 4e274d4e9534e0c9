"""No traceback reaches a user for what was typed, named or brought: seeded names, locales, files and values."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import os
import random
import string
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from apiary.cli import main
from apiary.cli.curate import curate_file
from apiary.config import loading, methods
from apiary.config.schema import DataConfig
from apiary.core.errors import UserError
from apiary.data.federation import federate

ODD = (
    *(
        "",
        " ",
        "a" * 300,
        "a/" * 3000,
        "nul\x00byte",
        "new\nline",
        "tab\t",
        "\x1b[31mred",
        "-",
        "--",
        "-s",
        "~nobody/x",
    ),
    *(
        "H\udcf4pital",
        "\ud800",
        "\udcff.jsonl",
        "日本語",
        "e\u0301",
        "\u202egnp",
        "\ufeff",
        "..",
        ".",
        "/dev/null",
        "con:",
    ),
    *("a:b", "x=y", "[", "{", '"', "'", "\\", "$HOME", "*", "?", "%s", "{}", "{0}", "\U0001f41d", "1e999", "-0", "nan"),
)
VALUES = (
    "0",
    "1",
    "-1",
    "1.0",
    "1.5",
    "1e999",
    "nan",
    "true",
    "[]",
    "{}",
    '""',
    "[1]",
    '["x"]',
    "{a=1}",
    "0x10",
    "1_0",
)
ENDINGS = (
    *(b".jsonl", b".json", b".csv", b".tsv", b".parquet", b".txt", b".arrow", b".feather", b".xlsx", b".db"),
    *(b".jsonl.gz", b".json.bz2", b".csv.xz", b".jsonl.zst", b".zip", b".csv.zip"),
)
ROWS: tuple[object, ...] = (
    {"instruction": "q", "output": "a"},
    {"instruction": None, "output": []},
    {"instruction": "\ud800", "output": "a"},
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    {"messages": [{"role": ["x"], "content": {}}]},
    {"messages": "x"},
    {"prompt": [{}], "completion": [{}]},
    {"": "", "output": 1e308},
    [[]],
    "text",
    None,
    7,
)


def name(rng: random.Random) -> str:
    if rng.random() < 0.7:
        return rng.choice(ODD)
    letters = string.printable + "äß中\x00\udc80\u200d"
    return "".join(rng.choices(letters, k=rng.randint(0, 12)))


def command(rng: random.Random, folder: Path) -> list[str]:
    """Words of a command line, of which none starts a run that works."""
    path = rng.choice((str(folder / "nothing"), name(rng), str(folder), f"{folder}/{name(rng)}"))
    settings = ["-s", f"{name(rng)}={name(rng)}", "-s", "no.such.key=1"]
    kinds: list[list[str]] = [
        [name(rng), name(rng)],
        ["config", name(rng)],
        ["simulate", path, *settings, "--out", f"{folder}/{name(rng)}"],
        ["simulate", "--out", f"{folder}/x\udcff", "-s", "rounds=1"],
        ["doctor", path, *settings],
        ["privacy", "plan", *settings, "--rows", name(rng)],
        ["curate", path, "--out", f"{folder}/{name(rng)}", "-s", 'curate.steps=["mask"]'],
        ["report", f"{folder}/{name(rng)}"],
        ["evaluate", f"{folder}/{name(rng)}", "--data", path],
        ["export", f"{folder}/{name(rng)}", "--to", f"{folder}/{name(rng)}"],
        ["chat", f"{folder}/{name(rng)}", "--prompt", name(rng)],
        ["deploy", "status", f"{folder}/{name(rng)}"],
        ["deploy", "init", f"{folder}/{name(rng)}", "--server", name(rng), "--site", name(rng)],
        ["deploy", "client", f"{folder}/{name(rng)}", "--data", path],
    ]
    return rng.choice(kinds)


def typed(rng: random.Random, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    words = [word.replace("\x00", "") for word in command(rng, folder)]  # no shell can pass one on
    encoding = rng.choice(("utf-8", "ascii", "latin-1", "cp1252", "shift_jis"))
    streams = {n: io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict") for n in ("stdout", "stderr")}
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["apiary", *words])
        for stream, wrapper in streams.items():
            patch.setattr(sys, stream, wrapper)
        with pytest.raises(SystemExit) as done:
            main.main()
        for wrapper in streams.values():
            wrapper.flush()
        # Click writes the words that it does not know as they came, whatever the encoding.
        text = "".join(w.buffer.getvalue().decode(encoding, "replace") for w in streams.values())  # type: ignore[attr-defined]
    assert done.value.code in (0, 1, 2), (words, done.value.code)
    assert done.value.code != 2 or text.strip(), words
    assert "Traceback" not in text
    return text


def configured(rng: random.Random, folder: Path) -> None:
    paths = ("data.source", "data.test", "model.name", "prompt.template", "strategy.root", "data.partition.by")
    keys = [row[0] for row in loading.describe()] + 5 * [*paths]
    settings = [
        f"{rng.choice((*keys, name(rng)))}={rng.choice((*VALUES, name(rng)))}" for _ in range(rng.randint(1, 3))
    ]
    path = None
    if rng.random() < 0.5:
        path = folder / "run.toml"
        table, _, key = rng.choice(keys).rpartition(".")
        text = (f"[{table}]\n" if table else "") + f"{key} = {rng.choice((*VALUES, name(rng)))}\n"
        path.write_bytes(text.encode(rng.choice(("utf-8", "utf-16", "latin-1")), "replace"))
    config = loading.load(path, settings)
    methods.problems(config)
    config.to_json().encode()
    config.to_toml().encode()


def content(rng: random.Random) -> bytes:
    rows = rng.choices(ROWS, k=rng.randint(0, 6))
    text = rng.choice(
        (
            "\n".join(map(json.dumps, rows)),
            json.dumps(rows),
            json.dumps({rng.choice(("data", "rows", "x")): rows}),
            'instruction,output\n"a,b\n',
            "instruction;output\nq;a\n",
            "[" * 100_000,
            "".join(chr(rng.randrange(1, 0x500)) for _ in range(40)),
        )
    )
    data = text.encode(
        rng.choice(("utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32", "latin-1", "koi8_r", "gb18030")), "replace"
    )
    plain = (data, data, data, bytes(range(256)), b"PAR1" + data, b"ARROW1" + data, b"SQLite format 3\0" + data)
    packed = (
        bz2.compress(data),
        zlib.compress(data),
        gzip.compress(data),
        gzip.compress(bytes(2**24)),
        archive(rng, data),
    )
    whole = rng.choice((*plain, *packed))
    return whole[: rng.randrange(len(whole) + 1)] if rng.random() < 0.2 else whole  # torn


def archive(rng: random.Random, data: bytes) -> bytes:
    """A .zip of no file, of one, or of several; one may have the names that a workbook has."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as made:
        for member in rng.sample(("d.jsonl", "d.csv", "[Content_Types].xml", "xl/workbook.xml"), rng.randint(0, 2)):
            made.writestr(member, data)
    return out.getvalue()


def brought(rng: random.Random, folder: Path) -> None:
    place = folder / "rows"
    place.mkdir(exist_ok=True)
    for _ in range(rng.randint(1, 3)):
        file = os.fsencode(place) + b"/" + rng.choice((b"a", b"test", b"\xf4", b"c d", "é".encode(), b"b\n"))
        try:
            with open(file + rng.choice(ENDINGS), "wb") as out:
                out.write(content(rng))
        except OSError:  # a file system of other rules
            continue
    try:
        source = rng.choice((str(place), *map(str, place.iterdir())))
        if rng.random() < 0.5:
            partition = rng.choice(({"name": "natural"}, {"name": "iid"}, {"name": "by_value", "by": name(rng)}))
            values = {"source": source, "clients": rng.randint(1, 3), "partition": partition}
            federate(DataConfig.model_validate(values), 0)
        else:
            curate_file(source, None, folder / "kept.jsonl", ['curate.steps=["mask", "duplicates", "length"]'])
    finally:
        for path in [*place.iterdir(), folder / "kept.jsonl", folder / "kept.html"]:
            path.unlink(missing_ok=True)


def draws(seed: int, count: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many inputs of each kind were refused in lines; whatever else is raised goes through."""
    monkeypatch.chdir(folder)
    rng = random.Random(seed)
    ways: dict[str, Callable[[], Any]] = {
        "typed": lambda: typed(rng, folder, monkeypatch),
        "configured": lambda: configured(rng, folder),
        "brought": lambda: brought(rng, folder),
    }
    refused, lines = dict.fromkeys(ways, 0), list[str]()
    for number in range(count):
        way = list(ways)[number % len(ways)]
        try:
            ways[way]()
        except UserError as error:
            refused[way] += 1
            lines += error.problems
    assert [line for line in lines if not line.strip() or len(line.splitlines()) != 1] == []
    "".join(lines).encode()  # can be written anywhere
    return refused


def test_a_few_hundred_inputs_are_read_or_refused_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = draws(0, 150, tmp_path, monkeypatch)
    assert refused["configured"] > 10 and refused["brought"] > 10


@pytest.mark.slow
def test_many_more_inputs_are_read_or_refused_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draws(1, 600, tmp_path, monkeypatch)


def test_a_name_that_is_not_utf_8_is_told_by_every_reader(tmp_path: Path) -> None:
    row = '{"instruction": "q", "output": "a"}\n' * 9
    (tmp_path / "sites").mkdir()
    for file in (b"H\xf4pital.jsonl", b"nord.jsonl"):
        with open(os.fsencode(tmp_path) + b"/sites/" + file, "w") as out:
            out.write(row)
    with pytest.raises(UserError, match=r"'H\\xf4pital\.jsonl' in it is not UTF-8; rename it"):
        federate(DataConfig(source=str(tmp_path / "sites")), 0)
    with pytest.raises(UserError, match=r"\\xf4pital\.jsonl': this name is not UTF-8"):
        curate_file(str(tmp_path / "sites" / "H\udcf4pital.jsonl"), None, tmp_path / "kept.jsonl")
