"""`apiary curate`: curation of one data set without a federation, from file to file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import date, time
from pathlib import Path
from typing import Any, NamedTuple

from apiary.cli import shared
from apiary.config.schema import Method, RunConfig
from apiary.core.errors import UserError
from apiary.core.files import finite, write_atomic
from apiary.data.examples import Example, Source, as_read, check, read
from apiary.data.sources import RawFile, load
from apiary.data.turns import ToolCall, Turn, conversation_text
from client.curation.pipeline import Context, Curation, Reader, build_steps, curate

# Columns that a reader would take for what is said beside messages, or instruction and output; and for text alone,
# beside those by which it would know another form.
_OURS = (
    *("messages", "conversations", "instruction", "input", "context", "output", "system", "system_prompt"),
    *("system_message", "tools", "functions", "reasoning_content", "thinking", "reasoning"),
)
_OTHERS = (
    *("text", "prompt", "completion", "question", "answer", "answers", "query", "response", "chosen", "rejected"),
    *("label", "labels", "target", "targets", "summary"),
)
_LITTLE = "builtin:tiny"


class Curated(NamedTuple):
    """What `curate_file` did: the curation, lines for the owner, and where it wrote."""

    curation: Curation
    remarks: tuple[str, ...]
    out: Path
    report: Path


def curate_file(
    data: str,
    config: Path | None,
    out: Path,
    overrides: Sequence[str] = (),
    adapter: Path | None = None,
    held_out: str | None = None,
    report: Path | None = None,
) -> Curated:
    """Read `data`, run `curate.steps` or else the default ones, and write the kept rows and a page about it all.

    Args:
        data: a file, a folder, a hub id, or builtin:skills.
        config: a TOML file; its `data.source` is not read.
        out: the JSONL file to write.
        overrides: `key=value` settings on top.
        adapter: a run or an adapter folder whose model is to judge; without `config` its settings hold too.
        held_out: rows that no kept row may repeat, read like `data`.
        report: the page; by default `out` with .html.

    Raises:
        UserError: a file is there already, the data cannot be read, or a step or option is unknown.
    """
    page = report or out.with_suffix(".html")
    for name, path in (("--out", out), ("--report", page)):
        if path.exists():
            raise UserError(f"{name} {str(path)!r} is there already; name another file")
        if not path.parent.is_dir():
            raise UserError(f"{name} {str(path)!r}: there is no folder {str(path.parent)!r}; make it first")
    if page == out:
        raise UserError("--out and --report name the same file")
    settings = _settings(config, adapter, overrides)
    files = load(data, settings.data.split, "DATA", settings.data.query)
    source = check(files, columns=settings.data.columns, max_rows=settings.data.max_rows)
    apart = read(held_out, split="test", columns=settings.data.columns, key="--held-out") if held_out else None
    against = (apart.test or apart.examples) if apart else (source.test or ())
    methods, remarks = _methods(settings, bool(against), adapter is not None)
    needs_model = any(step.needs_model for _, step in build_steps(methods))
    reader = _reader(settings, adapter, overrides) if needs_model else None
    made = curate(source.examples, methods, Context(settings.seed, "", against, reader))
    lines = [line for part in (source, apart) if part for file in part.reports for line in file.lines()]
    written = _as_read(made, source, files, settings.data.columns)
    if written is None:
        written = "".join(map(_line, as_rows(made.examples)))
        remarks.append("the files have different columns, which one file cannot have: the rows are written in one form")
    write_atomic(out, written)
    from apiary.cli.curation_page import render  # Jinja is not needed where a worker curates

    trained = [report for report, file in zip(source.reports, files, strict=True) if not file.held_out]
    write_atomic(page, render(made, source, trained, methods), private=True)
    return Curated(made, (*lines, *remarks, *made.warnings), out, page)


def _as_read(made: Curation, source: Source, files: Sequence[RawFile], columns: Mapping[str, str]) -> str | None:
    """The kept rows with the columns that they came with, as JSON Lines; None where that would be read otherwise."""
    try:
        kept = as_read(files, ((source.places[index], example) for index, example in made.rows), columns=columns)
        lines = "".join(map(_line, kept))
        again = [(number, json.loads(line)) for number, line in enumerate(lines.split("\n")[:-1], 1)]
        back = check([RawFile("", "", again)], columns=columns)
    except (ValueError, UserError):
        return None
    return lines if list(map(_said, back.examples)) == list(map(_said, made.examples)) else None


def _said(example: Example) -> tuple[str, str]:
    """What a row says; where its data part begins does not count."""
    return conversation_text(example.turns), example.tools


def _line(row: Mapping[str, object]) -> str:
    """A line of JSON; dates as text, and what neither JSON nor UTF-8 can say as the nearest that they can."""
    plain = {name: value.isoformat() if isinstance(value, date | time) else value for name, value in row.items()}
    text = json.dumps(finite(plain), ensure_ascii=False)
    return text.encode("utf-8", "replace").decode("utf-8") + "\n"


def _settings(config: Path | None, adapter: Path | None, overrides: Sequence[str]) -> RunConfig:
    if adapter is None or config is not None:
        return shared.load(config, overrides)
    from apiary.export import tuned as results  # with torch, which most steps do without

    return results.open_tuned(adapter, overrides).config


def _methods(settings: RunConfig, held_out: bool, tuned: bool) -> tuple[tuple[Method, ...], list[str]]:
    """The steps to run, and what there is to say about them."""
    if settings.curate.steps:
        return settings.curate.steps, []
    names = ["mask", "duplicates", "near_duplicates", "length", *(["held_out"] if held_out else [])]
    if tuned or settings.model.name != _LITTLE:
        return tuple(Method(name=name) for name in (*names, "ifd")), []
    remark = (
        f"ifd is left out: {_LITTLE} untuned knows too little to judge rows; "
        "give --adapter RUN, or a model with -s model.name=..."
    )
    return tuple(Method(name=name) for name in names), [remark]


def _reader(settings: RunConfig, adapter: Path | None, overrides: Sequence[str]) -> Reader:
    """The model that judges: of the adapter, or the configured base."""
    from apiary.data import tokenization
    from apiary.export import tuned as results
    from apiary.models import adapters
    from apiary.models.inference import ModelProbe

    if adapter is not None:
        of_model = [item for item in overrides if item.partition(".")[0] in ("model", "adapter", "prompt")]
        tuned = results.open_tuned(adapter, of_model)
        return Reader(tuned.template, tuned.lm.tokenizer, tuned.config.prompt, lambda: ModelProbe(tuned.lm))
    lm = adapters.load(settings.model, settings.adapter)
    adapters.set_adapter(lm, adapters.fresh_adapter(lm, settings.seed))
    template = tokenization.make_template(settings.prompt, lm.tokenizer)
    return Reader(template, lm.tokenizer, settings.prompt, lambda: ModelProbe(lm))


def as_rows(examples: Sequence[Example]) -> Iterator[dict[str, Any]]:
    """Rows that `apiary.data.examples.read` reads back as the same examples.

    All are written as instruction and output, or all as messages (as OpenAI has them) where one of them is more than
    that; text that is to be continued is written as text. A tag that would be taken for one of these columns gets
    `tag_` in front.
    """
    pairs = all(_is_pair(example) or _is_text(example) for example in examples)
    for example in examples:
        if _is_text(example):
            yield {"text": example.turns[0].text, **_tags(example.tags, (*_OURS, *_OTHERS))}
        else:
            yield {**(_pair(example) if pairs else _chat(example)), **_tags(example.tags, _OURS)}


def _is_plain(turn: Turn) -> bool:
    return turn == Turn(turn.role, turn.text, data=turn.data)


def _is_pair(example: Example) -> bool:
    roles = [turn.role for turn in example.turns]
    return roles == ["user", "assistant"] and all(map(_is_plain, example.turns)) and not example.tools


def _is_text(example: Example) -> bool:
    """Whether it is text that is to be continued."""
    return len(example.turns) == 1 and all(map(_is_plain, example.turns)) and not example.tools


def _pair(example: Example) -> dict[str, str]:
    (asked, answered), border = example.turns, "\n\n"  # that a reader puts between the two
    instruction, data = asked.text[: asked.data], asked.text[asked.data :] if asked.data else ""
    if not (data and instruction.endswith(border)):
        return {"instruction": asked.text, "output": answered.text}
    return {"instruction": instruction.removesuffix(border), "input": data, "output": answered.text}


def _chat(example: Example) -> dict[str, Any]:
    tools = {"tools": json.loads(example.tools)} if example.tools else {}
    return {"messages": list(map(_message, example.turns)), **tools}


def _message(turn: Turn) -> dict[str, Any]:
    message: dict[str, Any] = {"role": turn.role, "content": turn.text}
    if turn.thinking:
        message["reasoning_content"] = turn.thinking
    if turn.calls:
        message["tool_calls"] = list(map(_call, turn.calls))
    if turn.name:
        message["name"] = turn.name
    if turn.call_id:
        message["tool_call_id"] = turn.call_id
    if turn.role == "assistant" and not turn.trained:
        message["weight"] = 0
    return message


def _call(call: ToolCall) -> dict[str, Any]:
    label = {"id": call.id} if call.id else {}
    return {**label, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _tags(tags: Mapping[str, str], taken: Sequence[str]) -> dict[str, str]:
    return {f"tag_{name}" if _plain(name) in taken else name: value for name, value in tags.items()}


def _plain(name: str) -> str:
    """A column's name as a reader compares it."""
    return re.sub(r"[\s-]+", "_", name.strip().casefold())


def table(curation: Curation) -> str:
    """Step, rows kept and dropped, and the reasons, as aligned plain lines."""
    grid = [("step", "kept", "dropped", "rewritten", "reasons")]
    for report in curation.reports:
        reasons = ", ".join(f"{count} {reason}" for reason, count in report.reasons.items())
        dropped = report.rows_in - report.rows_out
        grid.append((report.name, str(report.rows_out), str(dropped), str(report.rewritten or ""), reasons))
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    lines = (
        "  ".join([cells[0].ljust(widths[0]), *map(str.rjust, cells[1:4], widths[1:4]), cells[4]]).rstrip()
        for cells in grid
    )
    return "\n".join(lines)
