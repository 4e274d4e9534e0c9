"""What the commands share: arguments, the configuration of a run, and how results are printed."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from apiary.config import loading, methods
from apiary.config import schema as configs
from apiary.core.errors import UserError
from apiary.core.files import finite
from apiary.core.formatting import is_unicode, name_text

ConfigFile = Annotated[Path | None, typer.Argument(help="a TOML file; none = the built-in demo", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Option("-s", metavar="KEY=VALUE", help="set one key, e.g. -s train.lr=1e-4")
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume", help="go on after the last finished round of --out; where that holds nothing yet, begin anew"
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON document and nothing else")]


def set_up_output() -> None:
    """Let this process write any text, and hear of libraries what is wrong alone."""
    for stream in (sys.stdout, sys.stderr):  # a name or a row may hold what the terminal's encoding does not
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    for noisy in ("flwr", "transformers", "ray", "httpx", "huggingface_hub", "datasets", "peft"):
        logging.getLogger(noisy).setLevel(logging.ERROR)


def load(config: Path | None, overrides: Sequence[str] | None) -> configs.RunConfig:
    """The configuration of a TOML file, or the defaults, with `key=value` overrides on top.

    Raises:
        UserError: what is wrong with it, names of methods included; nothing heavy is imported to find that out.
    """
    settings = loading.load(config, overrides or ())
    if wrong := methods.problems(settings):
        raise UserError(*wrong)
    return settings


def settings_of(
    config: Path | None, overrides: list[str] | None, out: Path | None, resume: bool
) -> tuple[configs.RunConfig, Path]:
    """The configuration of a run, and its directory; of a run that goes on without a file, its own one."""
    if resume and out is None:
        raise UserError("--resume needs --out DIR: the run to go on with, or to begin")
    name = config.stem if config else "demo"
    folder = (out or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}").resolve()
    if not is_unicode(str(folder)):
        raise UserError(f"--out '{name_text(str(out or folder))}': this name is not UTF-8; name another folder")
    stored = folder / "config.toml" if resume and config is None and (folder / "config.toml").exists() else config
    return load(stored, overrides), folder


def print_table(metrics: Mapping[str, Any]) -> None:
    """Print the table of metrics.json: in colour on a terminal, plain in a pipe."""
    from apiary.report import table_plain, table_text

    if sys.stdout.isatty():
        from rich.console import Console

        Console().print(table_text(metrics))
    else:
        typer.echo(table_plain(metrics))


@contextlib.contextmanager
def stdout_kept(wanted: bool = True) -> Iterator[None]:
    """Send what libraries print to stderr, if `wanted`, so that a document stands alone on stdout."""
    with contextlib.redirect_stdout(sys.stderr) if wanted else contextlib.nullcontext():
        yield


def print_json(document: Mapping[str, Any]) -> None:
    """Print a document as JSON that every reader takes: what is not finite becomes null."""
    typer.echo(json.dumps(finite(document), indent=2))


def shown(path: Path) -> str:
    """The path relative to here where it lies below, for shorter lines."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
