"""`apiary curate`: from file to file, with a page beside it."""

from __future__ import annotations

import json
import math
import re
from datetime import date
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from apiary.cli.curate import as_rows, curate_file
from apiary.cli.curation_page import render
from apiary.cli.main import app
from apiary.config import loading
from apiary.config.schema import Method
from apiary.core.errors import UserError
from apiary.data.columns import Columns, with_turns
from apiary.data.examples import Example, FileReport, Place, Source, check, read
from apiary.data.sources import RawFile
from apiary.data.turns import ToolCall, Turn
from apiary.export import adapter_folder
from apiary.models import adapters
from client.curation import curate as run_curation

LONG = " ".join(f"word{i}" for i in range(30))
ROWS = [
    {"instruction": "Write to ann@x.example", "input": "now", "output": "Done, ann@x.example", "skill": "mail"},
    {"instruction": "Say  yes", "input": "", "output": "yes", "skill": "say"},
    {"instruction": "say YES", "input": "", "output": "Yes", "skill": "say"},
    {"instruction": LONG, "input": "", "output": "fine", "skill": "long"},
    {"instruction": f"{LONG} please", "input": "", "output": "fine", "skill": "long"},
    {"instruction": "<script>alert(1)</script>", "input": "", "output": "...", "skill": "say"},
    {"instruction": "What is held out?", "input": "", "output": "this", "skill": "say"},
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "rows.jsonl", ROWS)


def run(*args: object) -> Result:
    return CliRunner().invoke(app, ["curate", *map(str, args)])


def test_the_default_steps_from_file_to_file(data: Path, tmp_path: Path) -> None:
    apart = write(tmp_path / "apart.jsonl", [{"instruction": "what is held out", "output": "other"}])
    done = run(data, "--out", tmp_path / "kept.jsonl", "--held-out", apart)
    assert done.exit_code == 0, done.output
    kept = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text(encoding="utf-8").splitlines()]
    assert kept == [
        {"instruction": "Write to <EMAIL_1>", "input": "now", "output": "Done, <EMAIL_1>", "skill": "mail"},
        ROWS[1],
        ROWS[4],
    ]
    lines = {line.split()[0]: line.split()[1:3] for line in done.output.splitlines() if line}
    expected = {"mask": 7, "duplicates": 6, "near_duplicates": 5, "length": 4, "held_out": 3}
    assert {name: int(lines[name][0]) for name in expected} == expected
    assert "1 same question as a held-out row" in done.output
    assert "ifd is left out" in done.output


class Page(HTMLParser):
    """The tags and the text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attributes if name in ("src", "href")]


def test_the_page_is_whole_private_and_harmless(data: Path, tmp_path: Path) -> None:
    run(data, "--out", tmp_path / "kept.jsonl")
    text = (tmp_path / "kept.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in page.tags and set(page.links) == {"data:,"}
    assert "&lt;script&gt;alert(1)" in text
    assert "default-src &#39;none&#39;" in text or "default-src 'none'" in text
    assert "private" in text and "4 of 7 rows are kept" in text


def test_the_page_shows_scores(data: Path, tmp_path: Path, small_run: list[str]) -> None:
    overrides = [*small_run, 'curate.steps=[{ name = "ifd", rows = 3, threshold = 1e9 }]', "prompt.max_tokens=200"]
    done = curate_file(str(data), None, tmp_path / "kept.jsonl", overrides, report=tmp_path / "other.html")
    assert len(done.curation.rows) == 3
    text = (tmp_path / "other.html").read_text(encoding="utf-8")
    assert "Scores of ifd" in text and "7 rows by score" in text and text.count("· score") == 3
    assert not (tmp_path / "kept.html").exists()


def test_nothing_is_overwritten(data: Path, tmp_path: Path) -> None:
    before = data.read_bytes()
    for out, report in ((data, tmp_path / "a.html"), (tmp_path / "a.jsonl", data)):
        with pytest.raises(UserError, match="is there already"):
            curate_file(str(data), None, out, report=report)
    assert data.read_bytes() == before and not (tmp_path / "a.jsonl").exists()


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (['curate.steps=["masc"]'], "did you mean 'mask'"),
        (['curate.steps=[{ name = "mask", regions = ["XX"] }]'], "'XX' is no country code"),
        (['curate.steps=[{ name = "length", min = 1000 }]'], "nothing left"),
        (['curate.steps=[{ name = "ifd", keep = 0.5, rows = 2 }]'], "one of keep, rows and tokens"),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(
    data: Path, tmp_path: Path, overrides: list[str], told: str
) -> None:
    with pytest.raises(UserError, match=told):
        curate_file(str(data), None, tmp_path / "kept.jsonl", overrides)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_columns_and_steps_come_from_the_configuration(tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", [{"text": "a b", "label": "ham"}, {"text": "A  b", "label": "HAM"}])
    toml = tmp_path / "c.toml"
    toml.write_text('[data]\ncolumns = { instruction = "text", output = "label" }\n[curate]\nsteps = ["duplicates"]\n')
    curate_file(str(data), toml, tmp_path / "kept.jsonl")
    assert [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines()] == [
        {"text": "a b", "label": "ham"}
    ]


MAIL = ["Ask <EMAIL_7>, then bob@y.example\n\nnot ann@x.example", "ann@x.example\n\n\nand so on"]
FORMS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (  # in whichever field, one number for one address; paragraphs stay in the field that they were in
        {"instruction": f"  {MAIL[0]} ", "input": MAIL[1], "output": 7, "id": 3, "tags": ["a", {"b": None}]},
        {
            "instruction": "Ask <EMAIL_7>, then <EMAIL_8>\n\nnot <EMAIL_9>",
            "input": "<EMAIL_9>\n\n\nand so on",
            "output": 7,
            "id": 3,
            "tags": ["a", {"b": None}],
        },
    ),
    (
        {"prompt": " Who? ", "context": "bob@y.example", "completion": " He. ", "date": "2024-01-01"},
        {"prompt": "Who?", "context": "<EMAIL_1>", "completion": " He. ", "date": "2024-01-01"},
    ),
    (
        {"conversations": [{"from": "human", "value": " hi "}, {"from": "gpt", "value": "bob@y.example", "w": 1}]},
        {"conversations": [{"from": "human", "value": " hi "}, {"from": "gpt", "value": "<EMAIL_1>", "w": 1}]},
    ),
    (
        {
            "prompt": [{"role": "system", "content": "of a@b.example"}, {"role": "user", "content": "x"}],
            "completion": [{"role": "assistant", "content": "a@b.example"}],
        },
        {
            "prompt": [{"role": "system", "content": "of <EMAIL_1>"}, {"role": "user", "content": "x"}],
            "completion": [{"role": "assistant", "content": "<EMAIL_1>"}],
        },
    ),
]


@pytest.mark.parametrize(("row", "expected"), FORMS, ids=lambda row: next(iter(row)))
def test_a_row_keeps_its_columns_and_only_masked_text_changes(
    row: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    data = write(tmp_path / "rows.jsonl", [row])
    curate_file(str(data), None, tmp_path / "kept.jsonl", ['curate.steps=["mask"]'])
    (kept,) = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    assert kept == expected
    assert list(kept) == list(row)


def test_a_detail_that_runs_on_into_the_input_is_masked_all_the_same(tmp_path: Path) -> None:
    """By a step from outside: where instruction and input can no longer be told apart, nothing comes back."""
    row: dict[str, object] = {"instruction": "Call 030", "input": "123 now", "output": "ok", "id": 1}
    said = (Turn("user", "Call <PHONE_1> now"), Turn("assistant", "ok"))
    columns = Columns("instruction", "input", "output")
    assert with_turns(row, columns, said) == {
        "instruction": "Call <PHONE_1> now",
        "input": "",
        "output": "ok",
        "id": 1,
    }
    assert row["input"] == "123 now"
    with pytest.raises(ValueError, match="turns"):
        with_turns(row, columns, said[:1])


def test_files_of_different_columns_keep_them(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "north.jsonl", [{"instruction": "Say a", "input": "b", "output": "c"}])
    write(folder / "south.jsonl", [{"question": "Say d", "answer": "e"}])
    done = curate_file(str(folder), None, tmp_path / "kept.jsonl", ['curate.steps=["mask"]'])
    assert not any("written in one form" in line for line in done.remarks)
    kept = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    assert kept == [{"instruction": "Say a", "input": "b", "output": "c"}, {"question": "Say d", "answer": "e"}]
    assert read(str(tmp_path / "kept.jsonl")).examples == read(str(folder)).examples


def test_what_json_cannot_say_is_said_as_nearly_as_it_can(tmp_path: Path) -> None:
    values = {"instruction": ["q"], "output": ["a"], "day": [date(2024, 2, 3)], "score": [math.nan], "raw": [b"\xff"]}
    pq.write_table(pa.table(values), tmp_path / "rows.parquet")
    curate_file(str(tmp_path / "rows.parquet"), None, tmp_path / "kept.jsonl", ['curate.steps=["mask"]'])
    (kept,) = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    assert kept == {"instruction": "q", "output": "a", "day": "2024-02-03", "score": None, "raw": "b'\\xff'"}


def test_the_page_numbers_rows_as_the_warnings_do(tmp_path: Path) -> None:
    """Blank and broken lines count: what the page calls row 5 stands in line 5 of the file."""
    lines = ["", "not JSON", json.dumps(ROWS[1]), json.dumps({"instruction": "x"}), json.dumps(ROWS[2]), "{}"]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    done = curate_file(str(data), None, tmp_path / "kept.jsonl", ['curate.steps=["duplicates"]'])
    assert "rows.jsonl: 1 of 5 rows left out: bad JSON (rows 2)" in done.remarks
    text = (tmp_path / "kept.html").read_text(encoding="utf-8")
    assert "1 of 5 rows are kept" in text and ">Row 5<" in text
    assert re.search(r"reading</th><td[^>]*>5</td><td[^>]*>3</td>.*1 bad JSON", text)
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("north", "south"):
        (folder / f"{name}.jsonl").write_text("\n".join(lines[2:3]) + "\n", encoding="utf-8")
    curate_file(str(folder), None, tmp_path / "both.jsonl", ['curate.steps=["duplicates"]'])
    assert ">south.jsonl, row 1<" in (tmp_path / "both.html").read_text(encoding="utf-8")


def test_the_page_is_for_its_owner(data: Path, tmp_path: Path) -> None:
    run(data, "--out", tmp_path / "kept.jsonl")
    assert (tmp_path / "kept.html").stat().st_mode & 0o077 == 0


def test_a_tuned_adapter_judges(data: Path, tmp_path: Path, small_run: list[str]) -> None:
    settings = loading.load(None, small_run)
    lm = adapters.load(settings.model, settings.adapter)
    adapter = {name: tensor + 0.3 for name, tensor in adapters.fresh_adapter(lm, 0).items()}
    adapter_folder.save_adapter_folder(lm, adapter, tmp_path / "adapter", settings)
    steps = ['curate.steps=[{ name = "ifd", threshold = 1e9 }]']
    untuned = curate_file(str(data), None, tmp_path / "a.jsonl", [*small_run, *steps]).curation
    tuned = curate_file(str(data), None, tmp_path / "b.jsonl", steps, adapter=tmp_path / "adapter").curation
    assert untuned.scores["ifd"].keys() == tuned.scores["ifd"].keys()
    assert untuned.scores["ifd"] != tuned.scores["ifd"]
    by_default = curate_file(str(data), None, tmp_path / "c.jsonl", adapter=tmp_path / "adapter").curation
    assert [report.name for report in by_default.reports][-1] == "ifd"


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\r"), min_size=1, max_size=12).filter(
    lambda text: bool(text.strip())
)
SPOKEN = st.builds(str.strip, TEXT)
PAIRS = st.builds(lambda a, b: (Turn("user", a), Turn("assistant", b)), SPOKEN, SPOKEN)
SYSTEM = st.builds(lambda s, pair: (Turn("system", s), *pair), SPOKEN, PAIRS)
CHATS = PAIRS | SYSTEM | st.builds(lambda a, b: (*a, *b), PAIRS, PAIRS)
TAGS = st.dictionaries(st.sampled_from(["skill", "source", "prompt", "question", "answer"]), SPOKEN, max_size=3)


@settings(max_examples=80, deadline=None)
@given(rows=st.lists(st.builds(Example, CHATS, TAGS, st.just("")), min_size=1, max_size=5))
def test_what_is_written_reads_back(rows: list[Example], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = write(tmp_path_factory.mktemp("back") / "rows.jsonl", list(as_rows(rows)))
    assert read(str(path)).examples == tuple(rows)


CALL = ToolCall("send", '{"to": "her"}', "call_1")
TOOLS = [{"type": "function", "function": {"name": "send"}}]
TALK = (
    Turn("user", "Write to her"),
    Turn("assistant", "", trained=False, thinking="Easy.", calls=(CALL, CALL._replace(id=""))),
    Turn("tool", "sent", name="send", call_id="call_1"),
    Turn("assistant", "Done."),
)


def test_what_a_row_calls_thinks_and_does_not_train_is_written_as_openai_has_it() -> None:
    function = {"type": "function", "function": {"name": "send", "arguments": '{"to": "her"}'}}
    assert list(as_rows([Example(TALK, {"skill": "mail"}, json.dumps(TOOLS)), Example(PLAIN, {})])) == [
        {
            "messages": [
                {"role": "user", "content": "Write to her"},
                {
                    "role": "assistant",
                    "content": "",
                    "reasoning_content": "Easy.",
                    "tool_calls": [{"id": "call_1", **function}, function],
                    "weight": 0,
                },
                {"role": "tool", "content": "sent", "name": "send", "tool_call_id": "call_1"},
                {"role": "assistant", "content": "Done."},
            ],
            "tools": TOOLS,
            "skill": "mail",
        },
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    ]


PLAIN = (Turn("user", "q"), Turn("assistant", "a"))


def test_one_row_that_is_more_than_a_pair_makes_messages_of_all_but_text() -> None:
    text = Example((Turn("assistant", "A tale."),), {"prompt": "x", "skill": "y", "Summary": "z"})
    rows = [Example(PLAIN, {}), text, Example((PLAIN[0], PLAIN[1]._replace(thinking="Hm.")), {})]
    assert [list(row) for row in as_rows(rows)] == [
        ["messages"],
        ["text", "tag_prompt", "skill", "tag_Summary"],
        ["messages"],
    ]
    assert list(next(as_rows(rows[:2]))) == ["instruction", "output"]


def test_what_was_given_and_not_asked_goes_back_to_the_input() -> None:
    there = Turn("user", "Sum up.\n\nA text.", data=9)
    rows = [Example((asked, PLAIN[1]), {}) for asked in (there, there._replace(data=4), there._replace(data=None))]
    whole = {"instruction": "Sum up.\n\nA text.", "output": "a"}
    assert list(as_rows(rows)) == [{"instruction": "Sum up.", "input": "A text.", "output": "a"}, whole, whole]


def _reads_calls() -> bool:
    talk = [{"role": "user", "content": "q"}, next(as_rows([Example(TALK, {})]))["messages"][1] | {"weight": 1}]
    try:
        (made,) = check([RawFile("", "", [(1, {"messages": talk})])]).examples
    except UserError:
        return False
    return bool(made.turns[-1].calls)


needs_calls = pytest.mark.skipif(not _reads_calls(), reason="this reader does not take calls")


@needs_calls
def test_rows_of_every_kind_read_back(tmp_path: Path) -> None:
    rows = [
        Example(TALK, {"skill": "mail"}, json.dumps(TOOLS)),
        Example((Turn("assistant", "A tale."),), {"tag_prompt": "x"}),
        Example((Turn("system", "Be brief."), *PLAIN), {}),
    ]
    path = write(tmp_path / "rows.jsonl", list(as_rows(rows)))
    assert read(str(path)).examples == tuple(rows)


@needs_calls
def test_what_is_masked_in_a_call_never_comes_back_by_another_field(tmp_path: Path) -> None:
    calls = [{"type": "function", "function": {"name": "send", "arguments": {"to": "ann@x.example"}}}]
    messages = [
        {"role": "user", "content": "Write to ann@x.example"},
        {"role": "assistant", "content": "Done, ann@x.example", "reasoning_content": "ann@x.example", "weight": 1},
        {"role": "user", "content": "Again"},
        {"role": "assistant", "content": "Sure", "tool_calls": calls},
    ]
    data = write(tmp_path / "rows.jsonl", [{"messages": messages, "tools": [{"name": "of ann@x.example"}]}])
    curate_file(str(data), None, tmp_path / "kept.jsonl", ['curate.steps=["mask"]'])
    text = (tmp_path / "kept.jsonl").read_text()
    assert "ann@" not in text and text.count("<EMAIL_1>") == 5


def test_the_page_shows_what_was_called(tmp_path: Path) -> None:
    source = Source((Example(TALK, {}), Example(TALK, {})), ("a", "a"), None, (), (Place(0, 1), Place(0, 2)))
    made = run_curation(source.examples, [Method(name="duplicates")])
    page = render(made, source, [FileReport("rows.jsonl", 2, 2, {})], [Method(name="duplicates")])
    assert "send({&#34;to&#34;: &#34;her&#34;})" in page and "Easy." in page and "sent" in page


def test_tags_that_look_like_text_are_renamed(tmp_path: Path) -> None:
    rows = [
        Example(
            (Turn("user", "q"), Turn("assistant", "a")),
            {"output": "x", "messages": "y", "input": "z", "System Prompt": "w", "tools": "v"},
        )
    ]
    (back,) = read(str(write(tmp_path / "rows.jsonl", list(as_rows(rows))))).examples
    assert back.turns == rows[0].turns
    renamed = {"tag_output": "x", "tag_messages": "y", "tag_input": "z", "tag_System Prompt": "w", "tag_tools": "v"}
    assert back.tags == renamed
