"""Rows come out of every kind of file as they were put in, or one line says why not."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import sqlite3
import sys
import types
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

from apiary.config.loading import parse
from apiary.config.schema import DataConfig
from apiary.core import database_uris
from apiary.core.errors import UserError
from apiary.data import store
from apiary.data.examples import Source, read
from apiary.data.federation import federate
from apiary.data.readers import formats
from client import handlers

ROWS = [{"instruction": f"Say {i}", "output": f"it is {i}"} for i in range(5)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
PAIRS = [(row["instruction"], row["output"]) for row in ROWS]


def pairs(source: Source) -> list[tuple[str, ...]]:
    return [tuple(turn.text for turn in example.turns) for example in source.examples]


def zipped(data: bytes, *names: str) -> bytes:
    import io

    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(name, data)
    return out.getvalue()


def zst(data: bytes) -> bytes:
    return bytes(pa.compress(data, codec="zstd", asbytes=True))


PACKED = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zst}


@pytest.mark.parametrize("packing", PACKED)
def test_a_packed_file_reads_as_the_file_in_it(tmp_path: Path, packing: str) -> None:
    path = tmp_path / f"hospital.jsonl{packing}"
    path.write_bytes(PACKED[packing](LINES))
    source = read(str(path))
    assert pairs(source) == PAIRS and set(source.origins) == {"hospital"}
    path.write_bytes(PACKED[packing](LINES * 50)[:-20])
    with pytest.raises(UserError, match=r"^hospital\.jsonl\.\w+: [^\n]+$"):
        read(str(path))


def test_a_zip_of_one_file_is_that_file_and_of_several_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(zipped(LINES, "rows.jsonl", "__MACOSX/._rows.jsonl", ".DS_Store"))
    assert pairs(read(str(tmp_path / "a.zip"))) == PAIRS
    (tmp_path / "a.zip").write_bytes(zipped(LINES, "x.jsonl", "y.jsonl"))
    with pytest.raises(
        UserError, match=r"^a\.zip: this archive holds 2 files \(x\.jsonl, y\.jsonl\); give it one file"
    ):
        read(str(tmp_path / "a.zip"))
    (tmp_path / "a.zip").write_bytes(b"PK nothing")
    with pytest.raises(UserError, match=r"a\.zip: not a readable \.zip"):
        read(str(tmp_path / "a.zip"))


COLUMNS = {name: [row[name] for row in ROWS] for name in ROWS[0]}
JSON = {
    "on one line": "".join(map(json.dumps, ROWS)),
    "over several lines": "\n".join(json.dumps(row, indent=2) for row in ROWS),
    "a list": json.dumps(ROWS, indent=1),
    "columns": json.dumps(COLUMNS),
    "pandas columns": json.dumps({c: dict(enumerate(cells)) for c, cells in COLUMNS.items()}),
    "pandas index": json.dumps(dict(enumerate(ROWS))),
    "pandas split": json.dumps(
        {"columns": list(COLUMNS), "index": [*range(5)], "data": [[*row.values()] for row in ROWS]}
    ),
}


@pytest.mark.parametrize("form", JSON)
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_json_of_every_form_reads_as_its_rows(tmp_path: Path, form: str, suffix: str) -> None:
    if suffix == ".jsonl" and "\n" not in JSON[form] and form != "a list" and form != "on one line":
        pytest.skip("an object on one line is a row of JSON Lines")
    path = tmp_path / f"d{suffix}"
    path.write_text(JSON[form])
    source = read(str(path))
    assert pairs(source) == PAIRS
    assert [place.row for place in source.places] == [1, 2, 3, 4, 5]


def test_json_that_could_be_two_things_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    for value, words in (
        ({"a": {"x": "1"}, "b": {"x": "2"}}, "cannot be told apart"),
        ({"instruction": ["a", "b"], "output": ["c"]}, r"different lengths \(instruction 2, output 1\)"),
    ):
        path.write_text(json.dumps(value))
        with pytest.raises(UserError, match=words):
            read(str(path))


def test_the_test_list_of_an_object_is_held_out(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    path.write_text(json.dumps({"train": ROWS[:3], "test": ROWS[3:4], "validation": ROWS[4:]}))
    source = read(str(path))
    assert pairs(source) == PAIRS[:3] and source.test is not None
    assert [example.turns[0].text for example in source.test] == ["Say 3"]
    (line,) = source.reports[0].lines()
    assert "its split 'validation' (1 rows) is not used" in line
    data = DataConfig.model_validate({"source": str(path), "partition": "iid", "clients": 1, "test_fraction": 0.0})
    assert [example.turns[0].text for example in federate(data, 0).test] == ["Say 3"]


@pytest.mark.parametrize("name", ["data", "rows", "examples"])
def test_a_list_of_rows_beside_a_test_list_is_trained_on(tmp_path: Path, name: str) -> None:
    path = tmp_path / "d.json"
    path.write_text(json.dumps({"test": ROWS[3:], name: ROWS[:3], "about": {"made": "today"}, "version": 1}))
    source = read(str(path))
    assert pairs(source) == PAIRS[:3] and len(source.test or ()) == 2
    assert source.reports[0].lines() == ["d.json: beside its rows it holds 'about', which is not used"]


def test_what_a_json_object_holds_beside_its_rows_is_said(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    for more, said in (
        ({"eval": ROWS[3:]}, "its split 'eval' (2 rows) is not used"),
        ({"test": COLUMNS}, "it holds 'test', which is not used"),
        ({"test": COLUMNS, "info": [1]}, "it holds 'test', 'info', which are not used"),
    ):
        path.write_text(json.dumps({"train": ROWS[:3], **more}))
        source = read(str(path))
        assert pairs(source) == PAIRS[:3]
        (line,) = source.reports[0].lines()
        assert said in line


def test_one_conversation_may_be_a_file(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]
    (tmp_path / "d.json").write_text(json.dumps({"messages": talk, "tools": []}))
    assert pairs(read(str(tmp_path / "d.json"))) == [("Who?", "Me.")]


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_a_row_that_is_nested_too_deeply_is_left_out_alone(tmp_path: Path, suffix: str) -> None:
    rows = [json.dumps(row) for row in ROWS]
    for depth in (60, 200, 700, 3000, 100_000):
        deep = json.dumps({**ROWS[0], "extra": 0}).replace("0}", '{"a": ' * depth + "1" + "}" * depth + "}")
        text = f"[{','.join([*rows, deep])}]" if suffix == ".json" else "\n".join([*rows, deep])
        (tmp_path / f"d{suffix}").write_text(text)
        if suffix == ".json" and depth >= 3000:
            with pytest.raises(UserError, match="not valid JSON"):
                read(str(tmp_path / "d.json"))
            continue
        source = read(str(tmp_path / f"d{suffix}"))
        assert pairs(source)[:5] == PAIRS and len(source.examples) == 5 + (depth == 60), depth


def test_a_saved_data_set_reads_with_its_splits(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    assert pairs(read(str(tmp_path / "one"))) == PAIRS
    shuffled = datasets.Dataset.from_list(ROWS).select([4, 0])
    parts = {
        "train": datasets.Dataset.from_list(ROWS[:3]),
        "test": datasets.Dataset.from_list(ROWS[3:]),
        "dev": shuffled,
    }
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "many")
    source = read(str(tmp_path / "many"))
    assert pairs(source) == PAIRS[:3] and source.test is not None and len(source.test) == 2
    assert pairs(read(str(tmp_path / "many"), split="dev")) == [PAIRS[4], PAIRS[0]]
    with pytest.raises(UserError, match=r"data\.split = 'x': many has no such split; it has train, test, dev"):
        read(str(tmp_path / "many"), split="x")
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(UserError, match="not a whole data set of save_to_disk"):
        read(str(tmp_path / "one"))


def test_arrow_and_feather_files(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(tmp_path / "s.arrow"), "wb") as out, pa.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table)
    with pa.OSFile(str(tmp_path / "f.arrow"), "wb") as out, pa.ipc.new_file(out, table.schema) as writer:
        writer.write_table(table)
    both = pa.table([["a"], ["b"], ["c"]], names=["instruction", "output", "output"])
    pyarrow.parquet.write_table(both, tmp_path / "d.parquet")
    with pytest.raises(UserError, match=r"d\.parquet: two columns are named 'output'; rename one"):
        read(str(tmp_path / "d.parquet"))
    pyarrow.feather.write_feather(table, tmp_path / "z.feather")
    for name in ("s.arrow", "f.arrow", "z.feather"):
        assert pairs(read(str(tmp_path / name))) == PAIRS
    (tmp_path / "s.arrow").write_bytes((tmp_path / "f.arrow").read_bytes()[:200])
    with pytest.raises(UserError, match=r"s\.arrow: [^\n]*$"):
        read(str(tmp_path / "s.arrow"))


FRENCH = [{"instruction": f"Où est le café {i}?", "output": "Près de l'église, à côté"} for i in range(4)]


@pytest.mark.parametrize(("encoding", "said"), [("utf-16", "UTF-16"), ("utf-16-le", "UTF-16"), ("latin-1", "cp1252")])
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
def test_text_in_another_encoding_is_read_and_said(tmp_path: Path, encoding: str, said: str, suffix: str) -> None:
    lines = [json.dumps(row, ensure_ascii=False) for row in FRENCH]
    cells = ["instruction,output", *(f'"{row["instruction"]}","{row["output"]}"' for row in FRENCH)]
    text = {".json": f"[{','.join(lines)}]", ".jsonl": "\r\n".join(lines), ".csv": "\r\n".join(cells)}[suffix]
    path = tmp_path / f"d{suffix}"
    path.write_bytes(text.encode(encoding))
    source = read(str(path))
    assert pairs(source) == [(row["instruction"], row["output"]) for row in FRENCH]
    (line,) = source.reports[0].lines()
    assert f"read as {said} text" in line and "save it as UTF-8" in line


def test_a_bad_line_of_a_utf_8_file_stays_a_bad_line(tmp_path: Path) -> None:
    good = [json.dumps(FRENCH[0], ensure_ascii=False).encode(), *LINES.splitlines()]
    bad = [json.dumps(row, ensure_ascii=False).encode("latin-1") for row in FRENCH]
    (tmp_path / "d.jsonl").write_bytes(b"\n".join([*bad, *good]))
    source = read(str(tmp_path / "d.jsonl"))
    assert len(source.examples) == 6
    assert source.reports[0].problems == {"not UTF-8 text": (4, (1, 2, 3, 4))} and source.reports[0].notes == ()
    (tmp_path / "d.jsonl").write_bytes(bad[0] + b"\n" + LINES * 3)  # one among many, of which none proves anything
    assert read(str(tmp_path / "d.jsonl")).reports[0].problems == {"not UTF-8 text": (1, (1,))}


def test_a_utf_8_file_with_a_bad_byte_is_not_read_otherwise(tmp_path: Path) -> None:
    rows = [json.dumps(row, ensure_ascii=False).encode() for row in FRENCH]
    rows[1] = json.dumps(FRENCH[1], ensure_ascii=False).encode("latin-1")
    (tmp_path / "d.json").write_bytes(b"[" + b",".join(rows) + b"]")
    (tmp_path / "d.csv").write_bytes("instruction,output\né,è\n".encode() + b"\xe9,b\n")
    for name in ("d.json", "d.csv"):
        with pytest.raises(UserError, match="not UTF-8 text at byte"):
            read(str(tmp_path / name))


@pytest.mark.parametrize("encoding", ["cp850", "cp437", "mac_roman"])
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_western_text_of_another_system_is_not_taken_for_windows(tmp_path: Path, encoding: str, suffix: str) -> None:
    said = ["L'élève a mangé après l'été", "Die Kälte fällt früher über Köln", "El niño comió piña mañana"]
    rows = [{"instruction": f"{text} {i}?", "output": text} for i in range(10) for text in said]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    cells = ["instruction,output", *(f'"{row["instruction"]}","{row["output"]}"' for row in rows)]
    path = tmp_path / f"d{suffix}"
    path.write_bytes("\n".join(cells if suffix == ".csv" else lines).encode(encoding))
    with pytest.raises(UserError, match="UTF-8"):
        read(str(path))
    path.write_bytes("\n".join(cells if suffix == ".csv" else lines).encode("cp1252"))
    assert pairs(read(str(path))) == [(row["instruction"], row["output"]) for row in rows]


@pytest.mark.parametrize(
    ("encoding", "said", "is_sure"),
    [
        ("cp1250", ["Pacjent zgłosił się z gorączką", "Żółć, ściśle mówiąc, płynie wąską rurą"], True),
        ("cp1250", ["Příliš žluťoučký kůň úpěl ďábelské ódy", "Nemocný má horečku už třetí den"], False),
        ("cp1252", ["Der Arzt hört die Lunge ab", "Übelkeit nach dem Frühstück, müde"], True),
    ],
)
def test_letters_within_words_tell_encodings_apart(
    tmp_path: Path, encoding: str, said: list[str], is_sure: bool
) -> None:
    """Polish was read as Western, with signs in its words; what is not sure is refused."""
    rows = [{"instruction": f"{text} {i}?", "output": text} for i in range(35) for text in said]
    cells = ["instruction,output", *(f'"{row["instruction"]}","{row["output"]}"' for row in rows)]
    (tmp_path / "d.csv").write_bytes("\n".join(cells).encode(encoding))
    if is_sure:
        assert pairs(read(str(tmp_path / "d.csv"))) == [(row["instruction"], row["output"]) for row in rows]
        return
    with pytest.raises(UserError, match="not UTF-8 text at byte"):
        read(str(tmp_path / "d.csv"))


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
def test_where_no_row_may_decide_about_another_no_encoding_is_guessed(tmp_path: Path, suffix: str) -> None:
    """Of 30 rows in Latin-1 none stays when one in UTF-8 joins them, so none may be there before."""
    latin = [json.dumps(row, ensure_ascii=False).encode("latin-1") for row in FRENCH * 8]
    cells = [f'"{row["instruction"]}","{row["output"]}"'.encode("latin-1") for row in FRENCH * 8]
    data = {".json": b"[" + b",".join(latin) + b"]", ".jsonl": b"\n".join([*latin, *LINES.splitlines()])}
    path = tmp_path / f"d{suffix}"
    path.write_bytes(data.get(suffix, b"instruction,output\n" + b"\n".join(cells)))
    config = DataConfig.model_validate({"source": str(path), "partition": "iid", "clients": 1})
    (guessed,) = federate(config, 0).reports
    assert guessed.usable == guessed.rows >= 32 and "which is a guess" in guessed.notes[0]
    if suffix == ".jsonl":
        (alone,) = federate(config, 0, guess=False).reports
        assert alone.problems == {"not UTF-8 text": (32, (1, 2, 3, 4, 5))} and alone.usable == 5
    else:
        with pytest.raises(UserError, match="not UTF-8 text at byte"):
            federate(config, 0, guess=False)


def test_under_record_level_privacy_no_encoding_is_guessed(tmp_path: Path, tiny_model: Path) -> None:
    """As a client of a run reads its rows, not the reader alone."""
    latin = [json.dumps(row, ensure_ascii=False).encode("latin-1") for row in FRENCH * 8]
    (tmp_path / "d.jsonl").write_bytes(b"\n".join([*latin, *LINES.splitlines() * 6]))
    for unit, rows in (("none", 62), ("record", 30)):
        run = parse(
            {
                "data": {"source": str(tmp_path / "d.jsonl"), "partition": "iid", "clients": 1, "test_fraction": 0.0},
                "privacy": {"unit": unit, "batch_rows": 8},
            }
        )
        handlers.forget()
        assert sum(len(client.train) for client in handlers.federation(run.to_json()).clients) == rows
    handlers.forget()


def test_too_long_lines_and_texts_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "d.jsonl").write_bytes(LINES)
    (tmp_path / "d.json").write_bytes(b"[" + LINES.replace(b"\n", b",").strip(b",") + b"]")
    monkeypatch.setattr("apiary.data.readers.files.LINE_BYTES", 40)
    with pytest.raises(UserError, match="line 1 is longer than"):
        read(str(tmp_path / "d.jsonl"))
    monkeypatch.setattr("apiary.data.readers.files.WHOLE_BYTES", 40)
    with pytest.raises(UserError, match="of text that must be parsed as a whole"):
        read(str(tmp_path / "d.json"))


def test_excel(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.active.append([*ROWS[0]])
    for row in ROWS:
        book.active.append([*row.values()])
        book.active.append([])
    book.create_sheet("notes").append(["x"])
    book.save(tmp_path / "d.xlsx")
    source = read(str(tmp_path / "d.xlsx"))
    assert pairs(source) == PAIRS
    assert source.reports[0].lines() == ["d.xlsx: sheet 'notes' is not used; only the first one is, 'Sheet'"]
    (tmp_path / "d.xlsx").write_bytes((tmp_path / "d.xlsx").read_bytes()[:300])
    with pytest.raises(UserError, match=r"d\.xlsx: not a readable Excel file"):
        read(str(tmp_path / "d.xlsx"))


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "rows.db"
    with sqlite3.connect(path) as connection:
        connection.execute("create table rows (instruction text, output text)")
        connection.executemany("insert into rows values (?, ?)", PAIRS)
    connection.close()
    return path


@pytest.mark.parametrize("form", ["{}", "sqlite:///{}", "sqlite+pysqlite:///{}"])
def test_rows_of_a_query(table: Path, form: str) -> None:
    source = form.format(table)
    some = "select * from rows where output like '%: it is 3' or output = 'it is 3'"
    assert pairs(read(source, query=some)) == [PAIRS[3]]
    for query, why in (
        ("delete from rows", "must be one SELECT"),
        ("pragma user_version = 1", "must be one SELECT"),
        ("attach 'x.db' as x", "must be one SELECT"),
        ("select 1; delete from rows", "must be one statement"),
        ("with x as (select 1) delete from rows", "readonly|read-only|query_only|not return rows"),
    ):
        with pytest.raises(UserError, match=why):
            read(source, query=query)
    if "+" not in form:
        assert pairs(read(source)) == PAIRS
    assert pairs(read(source, query="select * from rows")) == PAIRS  # all are there still


def test_queries_where_they_do_not_belong_and_tables_that_must_be_named(table: Path, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_bytes(LINES)
    with pytest.raises(UserError, match="is no database, so it takes no query"):
        read(str(tmp_path / "d.jsonl"), query="select 1")
    with sqlite3.connect(table) as connection:
        connection.execute("create table more (x)")
    connection.close()
    with pytest.raises(UserError, match=r"^rows\.db: say by data\.query which rows to read.*more, rows"):
        read(str(table))
    table.write_bytes(b"not a database at all, but long enough to look")
    with pytest.raises(UserError, match=r"rows\.db: cannot be read as a SQLite database"):
        read(str(table))


@pytest.mark.parametrize(
    "uri",
    [
        "postgresql://me:hunter2@host/db",
        "mysql://host/db?password=hunter2",
        "x://me:hun/ter2@host/db",
        "mssql+pyodbc:///?odbc_connect=DRIVER%3Dx%3BUID%3Dme%3BPWD%3Dhunter2",
        "x://host/db?auth=hunter2",
        " postgresql://me:hunter2@host/db",
        "'postgresql://me:hunter2@host/db'",
    ],
)
def test_a_password_is_refused_without_being_shown(uri: str) -> None:
    for attempt in (lambda: parse({"data": {"source": uri}}), lambda: read(uri, query="select 1")):
        with pytest.raises(UserError, match=r"must not stand in the URI") as error:
            attempt()
        assert "ter2" not in str(error.value)


def test_a_password_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    uri = "postgresql://me:${HIVE_PASSWORD}@host/db"
    parse({"data": {"source": uri}})
    with pytest.raises(UserError, match="HIVE_PASSWORD is not set"):
        database_uris.fill(uri, "data.source")
    monkeypatch.setenv("HIVE_PASSWORD", "a/b")
    filled, secrets = database_uris.fill(uri, "data.source")
    assert filled == "postgresql://me:a%2Fb@host/db"
    assert database_uris.hide("no a/b or a%2Fb", secrets) == "no *** or ***"
    assert not database_uris.holds_secret("mssql+pyodbc:///?odbc_connect=DRIVER%3Dx%3BPWD%3D${HIVE_PASSWORD}")

    def refuse(filled: str) -> None:
        raise OSError(f"cannot reach {filled}")

    monkeypatch.setitem(sys.modules, "sqlalchemy", types.SimpleNamespace(create_engine=refuse))
    with pytest.raises(UserError, match=r"cannot reach postgresql://me:\*\*\*@host/db"):
        read(uri, query="select 1")


@pytest.mark.parametrize("source", ["https://host/rows.jsonl", "s3://bucket/rows.jsonl", "hf://datasets/a/b"])
def test_a_uri_of_no_database_says_so(source: str) -> None:
    with pytest.raises(UserError, match="copy it here and give its path"):
        read(source)


def test_rows_beyond_the_room_in_memory_are_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "d.jsonl").write_bytes(LINES)
    monkeypatch.setattr(store, "IN_MEMORY_BYTES", 1000)
    assert pairs(read(str(tmp_path / "d.jsonl"))) == PAIRS
    kept = store.collect(ROWS, store.Room(300))
    assert isinstance(kept, store.OnDisk) and list(kept) == ROWS and list(kept[1:4]) == ROWS[1:4]
    assert (kept[-1], len(kept[::2]), list(store.pick(kept, [3, 0]))) == (ROWS[4], 3, [ROWS[3], ROWS[0]])
    with pytest.raises(IndexError):
        kept[5]


def test_every_ending_that_is_read_is_in_the_table() -> None:
    names = " ".join(line.name for line in formats.FORMATS)
    assert [
        ending
        for ending in formats.ALLOWED.replace(";", "").split()
        if ending[0] == "." and ending.strip(",") not in names
    ] == []


def test_the_docs_show_the_table() -> None:
    lines = ["| format | read as | what is said |", "|---|---|---|"]
    lines += [f"| {row.name} | {row.read_as} | {row.said} |" for row in formats.FORMATS]
    text = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    table = text.split("<!-- formats: begin -->\n")[1].split("<!-- formats: end -->")[0]
    assert table.strip().splitlines() == lines, "write these lines between the markers of docs/data.md"
