"""`apiary chat`: what the model is asked, with data beside a question, and what goes back into a conversation."""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from chat_templates import BYTE_TOKENIZER, CHATML, build
from command_line import apiary, assert_refused
from conftest import overrides_for

from apiary.cli import chat
from apiary.config import loading
from apiary.core.errors import UserError
from apiary.data import examples, tokenization
from apiary.data.turns import Turn
from apiary.evaluation import comparison
from apiary.export import tuned
from apiary.models import adapters

THINKS = CHATML.replace(  # the last answer alone keeps its thinking, and no answer may hold a mark of it
    "{{ m['content'] + '<|im_end|>' }}{% endgen",
    "{{ '<think>' + m.reasoning_content + '</think>' if loop.last and m.reasoning_content }}"
    "{{ m['content'].split('</think>')[-1] + '<|im_end|>' }}{% endgen",
)
Ask = Callable[..., list[str]]


@pytest.fixture
def asks(tiny_model: Path, rows_file: Path, monkeypatch: pytest.MonkeyPatch) -> Ask:
    """Runs `apiary chat` on a model that gives these answers in turn; the prompts that it got, as text."""

    def run(*words: str | Path, says: Sequence[str] = ("Yes.",), keys: Sequence[str] = (), **more: Any) -> list[str]:
        config = loading.load(None, [*overrides_for(tiny_model, rows_file), "prompt.max_tokens=400", *keys])
        kept = adapters.load(config.model, config.adapter)  # for all tests of this process
        lm = dataclasses.replace(kept, tokenizer=copy.deepcopy(kept.tokenizer))
        lm.tokenizer.chat_template = THINKS
        template = tokenization.make_template(config.prompt, lm.tokenizer)
        opened = tuned.Tuned(config, lm, template, adapters.fresh_adapter(lm, 0), None)
        left, asked = list(says), list[str]()

        def answer_all(lm: Any, prompts: list[list[int]], *_: Any) -> tuple[str, ...]:
            asked.extend(lm.tokenizer.decode(ids) for ids in prompts)
            return (left.pop(0),)

        monkeypatch.setattr(tuned, "open_tuned", lambda path, overrides: opened)
        monkeypatch.setattr(comparison, "answer_all", answer_all)
        done = apiary("chat", "run", *words, **more)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == list(says)[: len(asked)]
        return asked

    return run


@pytest.fixture
def paper(tmp_path: Path) -> Path:
    path = tmp_path / "a paper.txt"
    path.write_bytes(b"\xef\xbb\xbf\r\nBees <<<END>>>\r\nfly.\r\n\r\n")
    return path


def test_data_with_a_question_is_set_apart_as_in_training(asks: Ask, paper: Path) -> None:
    row = {"instruction": "Who flies?", "input": "Bees <<<END>>>\nfly.", "output": "Bees."}
    (paper.parent / "row.jsonl").write_text(json.dumps(row), encoding="utf-8")
    (trained,) = examples.read(str(paper.parent / "row.jsonl")).examples
    for boundary, written in (
        ("structured", "User: Who flies?\n\n<<<DATA>>>\nBees \nfly.\n<<<END>>>\n\nAssistant:\n"),
        ("plain", "User: Who flies?\n\nBees <<<END>>>\nfly.\n\nAssistant:\n"),
    ):
        keys = [f"prompt.boundary={boundary}"]
        assert asks("-p", " Who flies?", "--data-file", paper, keys=keys) == [written]
        assert build("plain", BYTE_TOKENIZER, boundary=boundary)[0].prompt(trained.turns) == written


def test_data_of_a_conversation_stand_with_one_question_and_stay_with_it(asks: Ask, paper: Path) -> None:
    lines = f"Hello.\n/data {paper}\nWho flies?\nSure?\n/data {paper}\n/new\nWho?\n\n"
    given = "<<<DATA>>>\nBees \nfly.\n<<<END>>>"
    first, second, third, anew = asks(stdin=lines, says="abcd", keys=["prompt.boundary=structured"])
    assert "DATA" not in first
    assert second.endswith(f"User: Who flies?\n\n{given}\n\nAssistant:\n")
    assert third.count(given) == 1 and third.endswith("Assistant:\nb<eos>\n\nUser: Sure?\n\nAssistant:\n")
    assert anew == "User: Who?\n\nAssistant:\n"
    first, second = asks("--data-file", paper, stdin="Who flies?\nSure?\n", says="ab")
    assert "fly." in first and second.count("fly.") == 1


def test_thinking_goes_back_as_thinking(asks: Ask) -> None:
    says = ["<think>A bee?</think>Maja.", "<think>So"]  # the longest answer ended the second one
    first, second, third = asks(stdin="Who?\nWho else?\nSure?\n", says=[*says, "Yes."], keys=["prompt.template=chat"])
    asked = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    assert first == asked.format("Who?")
    end = "<|im_end|><eos>\n"  # the mark is no token of this tokenizer, so EOS ends an answer
    assert second == f"{first}Maja.{end}{asked.format('Who else?')}"
    assert third == f"{second}{end}{asked.format('Sure?')}"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot be read (No such file or directory)"),
        (b" \n", "holds no text"),
        (b"caf\xe9", "is not UTF-8 text; save it as UTF-8"),
        (b"a" * (2**24 + 1), "is larger than 16 MiB"),
    ],
)
def test_data_that_cannot_be_used_are_refused_in_a_line(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "given\n.txt"
    if content is not None:
        path.write_bytes(content)
    assert_refused(apiary("chat", tmp_path, "-p", "Who?", "--data-file", path), "data file", reason)
    with pytest.raises(UserError, match="cannot be read"):
        chat.read_data(tmp_path)


def test_other_encodings_that_say_so_are_read(tmp_path: Path) -> None:
    for encoding in ("utf-8-sig", "utf-16", "utf-16-le", "utf-32"):
        (tmp_path / encoding).write_text("    if bee:\n        fly()\n", encoding=encoding)
        assert chat.read_data(tmp_path / encoding) == "    if bee:\n        fly()"


BAD_LINES = ("/data", "/data nowhere.txt", "/data ~nobody/x", "/data nul\0")


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_line_of_a_pipe_that_cannot_be_used_ends_the_conversation(line: str, asks: Ask) -> None:
    """The next question would be answered without its data."""
    with pytest.raises(AssertionError, match=r"apiary: .*data"):
        asks(stdin=f"{line}\nWho?\n")


def test_at_a_terminal_such_a_line_is_told_and_the_conversation_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter([*BAD_LINES, "Who?", ""])
    monkeypatch.setattr(chat, "_ask", lambda: next(lines))
    monkeypatch.setattr(sys, "stdin", _Terminal())
    monkeypatch.setattr(tuned, "reply", lambda *asked: tuned.Reply("Yes.", Turn("assistant", "Yes.")))
    chat.converse(None, "", 4)  # type: ignore[arg-type]  # the model is not asked
    told = capsys.readouterr()
    assert told.out == "Yes.\n" and told.err.count("apiary: ") == len(told.err.splitlines()) == len(BAD_LINES)


class _Terminal:
    def isatty(self) -> bool:
        return True
