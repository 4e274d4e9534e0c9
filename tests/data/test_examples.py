"""Reading, checking and splitting instruction data."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import re
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apiary.config.loading import load
from apiary.config.schema import DataConfig
from apiary.core.errors import UserError
from apiary.data.examples import Example, Source, answer, read
from apiary.data.federation import federate, is_held_out, too_few_clients
from apiary.data.fields import tidy
from apiary.data.skills.corpus import SKILLS
from apiary.data.turns import Turn

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data")

ROWS = [{"instruction": f"Say {i}", "input": "please", "output": f"it is {i}"} for i in range(9)]
TURNS = [
    (Turn("user", f"Say {i}\n\nplease", data=len(f"Say {i}\n\n")), Turn("assistant", f"it is {i}")) for i in range(9)
]


def write_lines(path: Path, rows: list[object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def many(n: int, start: int = 0) -> list[dict[str, str]]:
    return [{"instruction": f"Question {i}", "output": "x", "kind": "ab"[i % 2]} for i in range(start, start + n)]


# Every form of one small data set reads as the same conversations.


def as_jsonl(folder: Path) -> Path:
    path = folder / "d.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n\r\n".join(json.dumps(r).encode() for r in ROWS))
    return path


def as_list(folder: Path) -> Path:
    path = folder / "d.json"
    path.write_text(json.dumps(ROWS))
    return path


def as_object(folder: Path) -> Path:
    path = folder / "d.json"
    path.write_text(json.dumps({"version": 1, "data": ROWS}))
    return path


def as_lines_named_json(folder: Path) -> Path:
    path = folder / "d.json"
    write_lines(path, ROWS)
    return path


def as_csv(folder: Path, delimiter: str = ",") -> Path:
    path = folder / "d.csv"
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(ROWS[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)
    return path


def as_semicolon_csv(folder: Path) -> Path:
    return as_csv(folder, ";")


def as_parquet(folder: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "d.parquet")
    return folder / "d.parquet"


def as_folder(folder: Path) -> Path:
    for i, row in enumerate(ROWS):  # two digits beside one: natural order is the order of numbers
        write_lines(folder / f"client_{i + 4}.jsonl", [row])
    return folder


@pytest.mark.parametrize(
    "form",
    [
        as_jsonl,
        as_list,
        as_object,
        as_lines_named_json,
        as_csv,
        as_semicolon_csv,
        as_parquet,
        as_folder,
    ],
)
def test_every_format_reads_as_the_same_conversations(tmp_path, form):
    source = read(str(form(tmp_path)))
    assert [example.turns for example in source.examples] == TURNS
    assert all(report.usable == report.rows and not report.problems for report in source.reports)
    if form is as_folder:
        assert source.origins == tuple(f"client_{i}" for i in range(4, 13))


# Column mappings

Q, A = "What is two and two?", "four"
PAIR = (Turn("user", Q), Turn("assistant", A))
CHAT = [{"role": "user", "content": Q}, {"role": "assistant", "content": A}]


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"instruction": Q, "input": "", "output": A}, {}),
        ({"instruction": Q, "output": A}, {}),
        ({"instruction": f" {Q}\n", "input": None, "output": f"{A} "}, {}),
        ({"instruction": Q, "context": "", "response": A}, {}),
        ({"prompt": Q, "completion": A}, {}),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, {}),
        ({"question": Q, "answer": A}, {}),
        ({"messages": CHAT}, {}),
        ({"conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": A}]}, {}),
        ({"text": Q, "label": A}, {"instruction": "text", "output": "label"}),
        (
            {"text": Q, "i": " ", "label": A},
            {"instruction": "text", "input": "i", "output": "label"},
        ),
        ({"dialogue": CHAT, "output": "no"}, {"messages": "dialogue"}),
    ],
)
def test_column_mappings_agree(tmp_path, row, columns):
    source = read(write_lines(tmp_path / "d.jsonl", [row]), columns=columns)
    assert source.examples[0].turns == PAIR
    assert answer(source.examples[0]) == A


# Without code fences: what ends in an open one keeps its last line breaks as an input, not as a question.
text = st.text(st.characters(codec="utf-8", exclude_characters="`~"), min_size=1, max_size=20).filter(str.strip)


@settings(max_examples=25, deadline=None)
@given(q=text, extra=st.one_of(st.just(""), text), a=text)
def test_mappings_agree_on_any_text(tmp_path_factory, q, extra, a):
    folder = tmp_path_factory.mktemp("any")
    joined = q.strip() + (f"\n\n{tidy(extra)}" if extra.strip() else "")
    forms = [
        {"instruction": q, "input": extra, "output": a},
        {"instruction": q, "context": extra, "response": a},
        {"prompt": joined, "completion": a},
        {"messages": [{"role": "user", "content": joined}, {"role": "assistant", "content": a}]},
    ]
    read_back = {said(read(write_lines(folder / f"{i}.jsonl", [form]))) for i, form in enumerate(forms)}
    assert read_back == {(Turn("user", joined), Turn("assistant", tidy(a)))}


def said(source: Source) -> tuple[Turn, ...]:
    """The first conversation, without where its data part begins."""
    return tuple(turn._replace(data=None) for turn in source.examples[0].turns)


def test_many_turns_and_a_system_message_are_kept(tmp_path):
    system = {"role": "system", "content": "Be brief."}
    row = {"messages": [system, *CHAT, *CHAT], "topic": "sums", "level": 3, "more": {"a": 1}}
    example = read(write_lines(tmp_path / "d.jsonl", [row])).examples[0]
    assert example.turns == (Turn("system", "Be brief."), *PAIR, *PAIR)
    assert example.tags == {"topic": "sums", "level": "3"}  # scalars only


@pytest.mark.parametrize(("value", "written"), [(3, "3"), (0.5, "0.5"), (True, "true"), (False, "false"), ("0", "0")])
def test_numbers_and_booleans_are_answers(tmp_path, value, written):
    source = read(write_lines(tmp_path / "d.jsonl", [{"question": "How many?", "answer": value}]))
    assert answer(source.examples[0]) == written


# Problems are counted with their row numbers, and nothing else is lost


def test_problems_are_counted_with_their_rows(tmp_path):
    good = json.dumps({"instruction": "a", "output": "b"})
    lines = [
        good,  # 1
        "",
        '{"instruction": "a"',  # 3
        '{"instruction": "a"}',
        '{"instruction": "a", "output": " "}',  # 5
        '{"instruction": "a", "output": ["b"]}',
        '{"instruction": 7, "output": "b"}',  # 7
        "[1, 2]",
        '{"instruction": "a", "output": "\\ud800"}',  # 9
        '{"instruction": "a", "output": null}',
        good,  # 11
        "nonsense",
        '{"instruction": "a", "input": {}, "output": "b"}',  # 13
        '{"instruction": "a", "output": NaN}',
    ]
    path = tmp_path / "mixed.jsonl"
    path.write_text("\n".join(lines))
    (report,) = read(str(path)).reports
    assert (report.name, report.rows, report.usable) == ("mixed.jsonl", 13, 2)
    assert report.problems == {
        "bad JSON": (2, (3, 12)),
        "missing field 'output'": (3, (4, 10, 14)),
        "empty field 'output'": (1, (5,)),
        "wrong type in field 'output' (list)": (1, (6,)),
        "wrong type in field 'instruction' (int)": (1, (7,)),
        "not an object": (1, (8,)),
        "broken Unicode in field 'output'": (1, (9,)),
        "wrong type in field 'input' (dict)": (1, (13,)),
    }


U, B, S = ({"role": role, "content": "x"} for role in ("user", "assistant", "system"))


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([U], "no assistant turn"),
        ([S], "no assistant turn"),
        ([B], "no user turn"),
        ([S, B], "no user turn"),
        ([B, U], "no assistant turn after a user turn"),
        ([U, {"role": "narrator", "content": "x"}, B], "unknown role in a message"),
        ([{"content": "x"}, B], "a message has no role"),
        (["x", B], "a message is not an object"),
        ([U, {"role": "assistant"}], "missing field 'content'"),
        ([U, {"role": "assistant", "content": ""}], "empty field 'content'"),
        ([], "empty field 'messages'"),
        ("x", "wrong type in field 'messages' (str)"),
        (None, "missing field 'messages'"),
    ],
)
def test_broken_conversations_are_counted(tmp_path, messages, reason):
    source = read(write_lines(tmp_path / "d.jsonl", [{"messages": [U, B]}, {"messages": messages}]))
    assert len(source.examples) == 1
    assert source.reports[0].problems == {reason: (1, (2,))}


broken = st.sampled_from(["", "no", "[]", "{}", '{"question": 1}', '{"question": "q", "answer": ""}'])


@settings(max_examples=25, deadline=None)
@given(lines=st.lists(st.one_of(broken, st.just('{"question": "q", "answer": "a"}')), max_size=30))
def test_a_report_accounts_for_every_row(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("report") / "d.jsonl"
    path.write_text("\n".join(['{"question": "q", "answer": "a"}', *lines]))
    source = read(str(path))
    (report,) = source.reports
    assert report.rows == 1 + sum(bool(line) for line in lines)
    assert report.usable == len(source.examples) == 1 + sum('"a"' in line for line in lines)
    assert report.rows == report.usable + sum(count for count, _ in report.problems.values())
    wrong = [i for i, line in enumerate(lines, 2) if line and '"a"' not in line]
    assert {row for _, rows in report.problems.values() for row in rows} <= set(wrong)


def test_max_rows_takes_from_every_file_and_says_what_it_left(tmp_path):
    write_lines(tmp_path / "a.jsonl", many(60))
    write_lines(tmp_path / "b.jsonl", many(40, 60))
    source = read(str(tmp_path), max_rows=10)
    assert [source.origins.count(name) for name in "ab"] == [6, 4]
    counts = [report.problems["left out by data.max_rows"] for report in source.reports]
    assert counts == [(54, (2, 3, 4, 5, 6)), (36, (2, 3, 4, 5, 6))]
    assert [report.usable for report in source.reports] == [6, 4]


# Errors


def bad_files() -> list[tuple[str, bytes, list[str]]]:
    return [
        ("d.xml", b"<a/>", ["d.xml", ".jsonl", ".parquet"]),
        ("d.jsonl", b"", ["d.jsonl", "empty"]),
        ("d.json", b"", ["d.json", "empty"]),
        ("d.json", b"[", ["d.json", "not valid JSON", "line 1"]),
        ("d.json", b'{"a": 1}', ["d.json", "list of rows", "found none"]),
        ("d.json", b'{"data": [], "rows": []}', ["data, rows"]),
        ("d.json", b"[1, 2]", ["none of its 2 rows", "row 1", "not an object"]),
        ("d.csv", b"", ["d.csv", "empty"]),
        ("d.csv", b'question,answer\n"a,b\n', ["d.csv", "not valid CSV"]),
        ("d.csv", b"question,question\na,b\n", ["two columns", "'question'"]),
        ("d.csv", b"question,answer\n\xff\xfe,b\n", ["d.csv", "UTF-8"]),
        ("d.csv", b"question,answer\na,b,c\n", ["none of its 1 rows", "more fields"]),
        ("d.parquet", b"PAR1 not really", ["d.parquet", "Parquet"]),
        ("d.jsonl", b"{}\n\nnope", ["d.jsonl"]),
        ("d.jsonl", b"\n\nnope\nnope", ["none of its 2 rows", "row 3", "bad JSON"]),
        ("d.jsonl", b'{"question": "a", "answer": ""}', ["row 1", "empty field 'answer'", "fill"]),
        ("d.jsonl", b'{"text": "a", "label": 1}', ["text, label", "data.columns"]),
        ("d.jsonl", b'{"a": ' + b"[" * 100_000, ["bad JSON"]),
    ]


@pytest.mark.parametrize(("name", "content", "words"), bad_files())
def test_bad_files_give_one_clear_line(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        read(str(tmp_path / name))
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"instruction": "txt", "output": "label"}, ["'txt'", "did you mean 'text'"]),
        ({"instruction": "text", "output": "zzz"}, ["'zzz'", "it has text, label"]),
        ({"instuction": "text", "output": "label"}, ["'data.columns.instuction'", "'instruction'"]),
        ({"instruction": "text"}, ["instruction and output"]),
        ({"messages": "text", "output": "label"}, ["either messages"]),
    ],
)
def test_wrong_column_names_are_told(tmp_path, columns, words):
    path = write_lines(tmp_path / "d.jsonl", [{"text": "a", "label": "b"}])
    with pytest.raises(UserError) as error:
        read(path, columns=columns)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    "source",
    ["nowhere/d.jsonl", "./nowhere", "/nowhere/at/all", "d.csv", "../nowhere/d", "~/nowhere", "a/b/c", "rows/"],
)
def test_a_missing_file_is_told_as_given(source):
    with pytest.raises(UserError, match="no such file or folder; relative paths") as error:
        read(source)
    assert f"data.source = {source!r}" in str(error.value)


@pytest.mark.parametrize("source", ["rowz", "squad", "glue:mrpc", "rows.v2"])
def test_a_name_without_a_slash_is_no_hub_id_and_nobody_is_asked(source, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: pytest.fail("the hub was asked"))
    with pytest.raises(UserError, match="no such file or folder; a hub id is owner/name"):
        read(source)


def test_an_unknown_builtin_is_told():
    for name in ("builtin:skill", "builtin:skills:", "builtin:skills:0", "builtin:skills:1e3"):
        with pytest.raises(UserError, match="builtin:skills:100"):
            read(name)
    with pytest.raises(UserError, match="only 3038 contents"):  # there is no end of sums, but of sums of two digits
        read("builtin:skills:9999")


def test_a_smaller_builtin_corpus_is_a_part_of_the_larger_with_the_same_held_out_rows():
    small, whole = read("builtin:skills:20"), read("builtin:skills")
    assert len(small.examples) == 12 * 20 and len(whole.examples) == 12 * 500
    assert Counter(row.tags["skill"] for row in small.examples) == dict.fromkeys(SKILLS, 20)
    known = set(map(repr, whole.examples))
    assert all(repr(row) in known for row in small.examples)
    assert small.test == whole.test


@pytest.fixture
def hub_is_there(monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda self, name, timeout: None)


def test_a_hub_set_that_cannot_be_had_is_told(hub_is_there, monkeypatch):
    import datasets

    def unreachable(*args: object, **kwargs: object) -> None:
        raise ConnectionError("Couldn't reach the Hub\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError) as error:
        read("someone/some-data")
    assert "no file or folder" in str(error.value)
    assert "Couldn't reach the Hub" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_hub_that_does_not_answer_is_asked_once_and_without_noise(monkeypatch, capfd, caplog):
    import datasets
    import httpx

    asked = []

    def unreachable(self, name, **options):
        asked.append(name)
        raise httpx.ConnectError("no route to the hub")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)
    monkeypatch.setattr("huggingface_hub.HfApi.hf_hub_download", unreachable)
    with pytest.raises(UserError, match=r"does not answer \(no route to the hub\), and no copy of it is here"):
        read("someone/no-such-data")
    assert asked == ["someone/no-such-data"]
    assert capfd.readouterr() == ("", "") and not caplog.records
    assert not datasets.config.HF_HUB_OFFLINE


def test_what_the_hubs_client_says_while_it_tries_is_not_shown(hub_is_there, monkeypatch, caplog):
    import datasets

    def stubborn(*args: object, **kwargs: object) -> None:
        for name in ("huggingface_hub.utils._http", "datasets.load"):
            logging.getLogger(name).warning("Retrying in 1s [Retry 1/5].")
        raise ConnectionError("gone")

    monkeypatch.setattr(datasets, "load_dataset", stubborn)
    with pytest.raises(UserError, match="gone"):
        read("someone/some-data")
    assert not caplog.records


def test_a_hub_set_is_read_like_a_file(hub_is_there, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, split: datasets.Dataset.from_list(ROWS))
    source = read("someone/some-data")
    assert [example.turns for example in source.examples] == TURNS
    assert source.test is None


def test_folders_without_data_and_clashing_clients_are_told(tmp_path):
    with pytest.raises(UserError, match="no training file"):
        read(str(tmp_path))
    write_lines(tmp_path / "a.jsonl", many(2))
    write_lines(tmp_path / "a.ndjson", many(2))
    with pytest.raises(UserError, match=r"'a\.jsonl' and 'a\.ndjson'"):
        read(str(tmp_path))


def test_files_that_are_no_data_are_named_in_the_log(tmp_path, caplog):
    write_lines(tmp_path / "a.jsonl", many(2))
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / ".hidden").write_text("hello")
    assert len(read(str(tmp_path)).examples) == 2
    assert "notes.txt" in caplog.text
    assert ".hidden" not in caplog.text


# Super-NaturalInstructions


def test_super_natural_instructions_folders(tmp_path):
    for number, definition in ((2, ["Answer it."]), (10, "Sort it.")):
        folder = tmp_path / f"task{number}_x"
        folder.mkdir()
        for part, output in (("train", ["first", "second"]), ("test", "third")):
            instances = [{"id": "1", "input": f"{part} {number}", "output": output}]
            task = {"Definition": definition, "Positive Examples": [], "Instances": instances}
            (folder / f"{part}.json").write_text(json.dumps(task))
    source = read(str(tmp_path))
    assert source.origins == ("task2_x", "task10_x")
    assert source.examples[0] == Example(
        (Turn("user", "Answer it.\n\ntrain 2", data=12), Turn("assistant", "first")), {"task": "task2_x"}
    )
    assert source.test is not None
    assert [answer(example) for example in source.test] == ["third", "third"]
    assert source.test[1].turns[0].text == "Sort it.\n\ntest 10"


def test_single_task_files_become_one_client_each(tmp_path):
    for name in ("task1_a", "task2_b"):
        task = {
            "Definition": ["Do."],
            "Instances": [{"input": "i", "output": ["o"]}, {"input": "i"}],
        }
        (tmp_path / f"{name}.json").write_text(json.dumps(task))
    source = read(str(tmp_path))
    assert source.origins == ("task1_a", "task2_b")
    assert source.reports[0].problems == {"missing field 'output'": (1, (2,))}


# Held-out rows


def example_of(*texts: str) -> Example:
    roles = ("user", "assistant") * len(texts)
    return Example(tuple(Turn(r, t) for r, t in zip(roles, texts, strict=False)), {})  # type: ignore[arg-type]


def test_the_held_out_share_is_about_the_fraction():
    rows = [example_of(f"question {i}", "a") for i in range(4000)]
    for fraction in (0.1, 0.5):
        share = sum(is_held_out(row, fraction) for row in rows) / len(rows)
        assert abs(share - fraction) < 4 * (fraction * (1 - fraction) / len(rows)) ** 0.5
    assert not any(is_held_out(row, 0.0) for row in rows)
    assert all(is_held_out(row, 1.0) for row in rows)


@given(q=text, a=text, b=text, fraction=st.floats(0, 1))
def test_the_prompt_alone_decides(q, a, b, fraction):
    side = is_held_out(example_of(q, a), fraction)
    assert is_held_out(Example(example_of(q, b).turns, {"site": "other"}), fraction) == side
    assert is_held_out(example_of(f"  {q}\n", a), fraction) == side


def test_the_side_of_a_known_prompt_never_changes():
    # Another normal form or hash would move rows from training to test between versions.
    digest = hashlib.blake2b(b"user\x1fwhat is two and two?", digest_size=16).digest()
    threshold = int.from_bytes(digest[:8], "big") / 2**64
    assert not is_held_out(example_of("What  is two and two?", "4"), threshold - 1e-9)
    assert is_held_out(example_of("What  is two and two?", "4"), threshold + 1e-9)


@settings(max_examples=15, deadline=None)
@given(order=st.permutations(range(40)), clients=st.integers(1, 5))
def test_sites_agree_whatever_their_order(tmp_path_factory, order, clients):
    rows = many(40)
    folder = tmp_path_factory.mktemp("order")
    plain = write_lines(folder / "a.jsonl", rows)  # type: ignore[arg-type]
    mixed = write_lines(folder / "b.jsonl", [rows[i] for i in order])
    options = {"clients": clients, "partition": "iid", "test_fraction": 0.3}
    sets = [
        {example.turns for example in federate(DataConfig(source=path, **options), 0).test} for path in (plain, mixed)
    ]
    assert sets[0] == sets[1]


# Federations


def all_rows(federation, part):
    return [example for client in federation.clients for example in getattr(client, part)]


def test_train_and_test_are_disjoint_and_complete(tmp_path):
    path = write_lines(tmp_path / "d.jsonl", many(200) + many(50))  # 50 prompts stand twice
    config = DataConfig(source=path, clients=4, partition="iid", test_fraction=0.2)
    federation = federate(config, 3)
    train, test = all_rows(federation, "train"), all_rows(federation, "test")
    assert len(train) + len(test) == 250
    assert sorted(e.turns for e in test) == sorted(e.turns for e in federation.test)
    assert not {e.turns[:-1] for e in train} & {e.turns[:-1] for e in test}
    assert [client.name for client in federation.clients] == [f"client-{i:02d}" for i in range(4)]
    assert federate(config, 3) == federation
    assert federate(config, 4) != federation


def test_a_separate_test_set_is_kept_out_of_training(tmp_path):
    train = write_lines(tmp_path / "train.jsonl", many(100))
    shared = [{"instruction": f"question   {i}", "output": "other"} for i in range(5)]
    test = write_lines(tmp_path / "held.jsonl", [*shared, *many(20, 500)])
    config = DataConfig(source=train, test=test, clients=2, partition="iid", test_fraction=0)
    federation = federate(config, 0)
    assert len(federation.test) == 25
    prompts = {e.turns[0].text for e in all_rows(federation, "train")}
    assert prompts == {f"Question {i}" for i in range(5, 100)}
    assert federation.reports[0].problems == {"also in the held-out set": (5, (1, 2, 3, 4, 5))}
    assert federation.reports[0].usable == 95
    assert federation.reports[1].name == "held.jsonl"


def test_a_missing_test_set_is_told_under_its_own_key(tmp_path):
    path = write_lines(tmp_path / "d.jsonl", many(9))
    with pytest.raises(UserError, match=r"data\.test = 'no\.jsonl': no such file"):
        federate(DataConfig(source=path, test="no.jsonl", partition="iid"), 0)


@pytest.mark.parametrize(
    ("partition", "clients", "helps"),
    [
        ("iid", 1, "there is 1 client; lower it or raise data.clients"),
        ("natural", 2, "there are 2 clients, for .* one of each file; lower it, or put more files into data.source"),
        ("natural", 1, "there is 1 client, for .* let data.source be a folder with a file for each client, or"),
    ],
)
def test_what_helps_against_too_few_clients_is_what_the_partition_looks_at(partition, clients, helps):
    config = load(None, [f"data.partition={partition}", "strategy.min_clients=3"])
    (line,) = too_few_clients(config, clients)
    assert re.match(f"strategy.min_clients = 3: {helps}", line)
    assert ("data.clients" in line) == (partition != "natural")
    assert too_few_clients(config, 3) == []


def test_a_file_of_held_out_rows_alone_is_not_told_to_lower_the_clients(tmp_path):
    for name in ("a", "b"):
        write_lines(tmp_path / f"{name}.jsonl", many(2))
    with pytest.raises(
        UserError, match=r"client 'a' has no training row left of 2.*lower data\.test_fraction"
    ) as error:
        federate(DataConfig(source=str(tmp_path), partition="natural", test_fraction=0.999999), 0)
    assert "data.clients" not in str(error.value) and "dirichlet" not in str(error.value)


def test_a_client_without_training_rows_is_named(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    write_lines(data / "big.jsonl", many(50))
    write_lines(data / "small.jsonl", many(1, 60))
    test = write_lines(tmp_path / "held.jsonl", many(1, 60))
    with pytest.raises(UserError, match=r"'small' has no training row left of 1"):
        federate(DataConfig(source=str(data), test=test, partition="natural", test_fraction=0), 0)


def test_the_answer_column_named_by_the_user_can_be_partitioned_by(tmp_path):
    rows = [{"text": f"t{i}", "label": i % 3} for i in range(90)]
    config = DataConfig(
        source=write_lines(tmp_path / "d.jsonl", rows),
        columns={"instruction": "text", "output": "label"},
        clients=3,
        partition={"name": "by_value", "by": "label"},
    )
    labels = [{answer(e) for e in client.train} for client in federate(config, 0).clients]
    assert sorted(map(sorted, labels)) == [["0"], ["1"], ["2"]]


def test_the_default_partition_on_data_without_skills_names_its_columns(tmp_path):
    path = write_lines(tmp_path / "d.jsonl", many(100))
    with pytest.raises(UserError, match=r"by = 'skill'.*it has kind"):
        federate(DataConfig(source=path), 0)


def test_more_clients_than_rows_names_both(tmp_path):
    path = write_lines(tmp_path / "d.jsonl", many(5))
    with pytest.raises(UserError, match=r"data\.clients = 8.*5 usable rows"):
        federate(DataConfig(source=path, partition="iid"), 0)


def test_the_builtin_corpus_brings_its_own_test():
    federation = federate(DataConfig(), 0)
    assert len(federation.clients) == 8
    assert {"skill"} <= set(federation.test[0].tags)
    held_out = {e.turns[:-1] for e in federation.test}
    assert not held_out & {e.turns[:-1] for e in all_rows(federation, "train")}


# Real data, and the recipes that name it


@needs_data
def test_dolly_as_it_lies_in_its_files():
    config = load(ROOT / "configs" / "dolly.toml").data
    federation = federate(config, 0)
    assert [client.name for client in federation.clients] == [f"client_{i}" for i in range(10)]
    for client in federation.clients:
        with (DATA / "dolly" / f"{client.name}.jsonl").open("rb") as file:
            lines = sum(1 for _ in file)
        assert len(client.train) + len(client.test) == lines
    assert sum(report.usable for report in federation.reports) == 13441
    assert not {e.turns[:-1] for e in federation.test} & {e.turns[:-1] for e in all_rows(federation, "train")}


@needs_data
@pytest.mark.parametrize(
    ("source", "rows", "test"),
    [("superni", 8117, 818), ("gsm8k", 7473, 1319), ("medical", 5942, None)],
)
def test_real_data_is_recognised(source, rows, test):
    found = read(str(DATA / source))
    assert len(found.examples) == rows
    assert (None if found.test is None else len(found.test)) == test


@needs_data
def test_finance_by_its_own_column_names():
    federation = federate(load(ROOT / "configs" / "finance.toml").data, 0)
    assert {answer(e) for e in federation.test} == {"0", "1", "2"}
    assert sum(len(c.train) + len(c.test) for c in federation.clients) == 2388


@pytest.mark.parametrize("name", ["dolly", "superni", "finance", "smollm2-dolly"])
def test_recipes_load(name):
    config = load(ROOT / "configs" / f"{name}.toml")
    assert config.rounds >= 3
    if name != "smollm2-dolly" and DATA.is_dir():
        assert Path(config.data.source).exists()


# A row is read by itself

SHAPES = st.sampled_from(
    [
        {"instruction": "q", "output": "a"},
        {"instruction": "q", "input": "i", "output": "a", "context": "c"},
        {"instruction": "q", "context": "c", "response": "a"},
        {"instruction": "q", "input": None, "output": "a", "context": "c"},
        {"instruction": "q", "output": None, "response": "a"},
        {"instruction": "q", "output": "", "response": "a"},
        {"messages": CHAT, "instruction": "q", "output": "a"},
        {"messages": None, "conversations": CHAT, "prompt": "q", "completion": "a"},
        {"messages": [], "question": "q", "answer": "a"},
        {"prompt": CHAT[:1], "completion": CHAT[1:], "answer": "x"},
        {"question": "q", "answer": "a", "instruction": "", "output": ""},
        {"instruction": "q"},
        {"other": 1},
        [],
    ]
)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(SHAPES, min_size=1, max_size=8), more=SHAPES, place=st.integers(0, 8))
def test_one_row_more_changes_how_no_other_is_read(tmp_path_factory, rows, more, place):
    """The claim of record-level privacy, on the path that a site takes: files that differ in one row."""
    folder = tmp_path_factory.mktemp("neighbours")
    rows = [{"question": "one", "answer": "usable"}, *rows]
    place = min(place, len(rows))
    near = [*rows[:place], more, *rows[place:]]
    one, two = (read(write_lines(folder / f"{i}.jsonl", some)) for i, some in enumerate((rows, near)))
    by_row = {
        spot.row - (spot.row > place + 1): e
        for e, spot in zip(two.examples, two.places, strict=True)
        if spot.row != place + 1
    }
    assert by_row == {spot.row: e for e, spot in zip(one.examples, one.places, strict=True)}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"instruction": "q", "output": None, "response": "a"}, "a"),
        ({"messages": CHAT, "instruction": "q", "output": "a"}, A),  # both are whole: a conversation says more
        ({"messages": [], "question": "q", "answer": "a"}, "a"),
        ({"question": "q", "answer": "a", "instruction": "", "output": ""}, "a"),
        ({"instruction": "q", "output": "a", "response": "b"}, "a"),
    ],
)
def test_each_row_says_by_itself_which_columns_it_fills(tmp_path, row, said):
    others = [{"instruction": "x", "output": "y"}] * 9
    source = read(write_lines(tmp_path / "d.jsonl", [*others, row]))
    assert (answer(source.examples[-1]), len(source.examples)) == (said, 10)
