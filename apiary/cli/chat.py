"""`apiary chat`: questions to a tuned model, each with a text that it is about if there is one."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import typer

from apiary.core.errors import UserError
from apiary.core.formatting import name_text
from apiary.data.fields import tidy
from apiary.data.messages import question_about
from apiary.data.readers.encodings import declared
from apiary.data.turns import Turn
from apiary.export import tuned as results
from apiary.export.tuned import Tuned

_MOST = 2**24  # bytes of data: no prompt is that long, and a device has no end


def read_data(path: Path) -> str:
    """The text that a question is about, cleaned as the input of a row is.

    Raises:
        UserError: the file cannot be read, is no text, holds none, or is larger than 16 MiB.
    """
    where = f"data file '{name_text(str(path))}'"
    try:
        with path.open("rb") as file:
            raw = file.read(_MOST + 1)
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if len(raw) > _MOST:
        raise UserError(f"{where}: is larger than 16 MiB, longer than any prompt; give a part of it")
    try:
        text = raw.decode(declared(raw[:4]) or "utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{where}: is not UTF-8 text; save it as UTF-8") from None
    if not (text := tidy(text.replace("\r\n", "\n"))):
        raise UserError(f"{where}: holds no text")
    return text


def answer(opened: Tuned, asked: str, given: str, max_new_tokens: int) -> str:
    """What the model says to one question about `given`, "" for nothing."""
    return results.reply(opened, [question_about(asked.strip(), given)], max_new_tokens).written


def converse(opened: Tuned, given: str, max_new_tokens: int) -> None:
    """Answer line by line until an empty one or the end of input; `given` is data of the first question.

    At a terminal a line that cannot be used is told and the conversation goes on.

    Raises:
        UserError: a line cannot be used, and it did not come from a terminal: what follows could rest on it.
    """
    history: list[Turn] = []
    while text := (_ask() or "").strip():
        command, _, rest = text.partition(" ")
        try:
            if text == "/new":
                history, given = [], ""
            elif command == "/data":
                given = _data_line(rest.strip())
            else:
                question, given = question_about(text, given), ""
                reply = results.reply(opened, [*history, question], max_new_tokens)
                history += [question, reply.turn]
                typer.echo(reply.written)
        except UserError as error:
            if not sys.stdin.isatty():
                raise
            typer.echo(f"apiary: {error}", err=True)


def _data_line(path: str) -> str:
    if not path:
        raise UserError("/data: give the path of a text file behind it; it stands with the next question")
    given = read_data(Path(os.path.expanduser(path)))  # no shell does it here; this one never raises
    typer.echo(f"{len(given):,} characters stand with the next question", err=True)
    return given


def _ask() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None
