"""What the commands share: arguments, the configuration of a run, and how results are printed."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from apiary.config import loading
from apiary.config import schema as configs
from apiary.core.errors import UserError

ConfigFile = Annotated[Path | None, typer.Argument(help="a TOML file; none = the built-in demo", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Option("-s", metavar="KEY=VALUE", help="set one key, e.g. -s train.lr=1e-4")
]


def settings_of(
    config: Path | None, overrides: list[str] | None, out: Path | None, resume: bool
) -> tuple[configs.RunConfig, Path]:
    """The configuration of a run, and its directory; of a run that goes on without a file, its own one."""
    if resume and out is None:
        raise UserError("--resume needs --out DIR: the run to go on with")
    name = config.stem if config else "demo"
    folder = (out or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}").resolve()
    stored = folder / "config.toml" if resume and config is None and (folder / "config.toml").exists() else config
    return loading.load(stored, overrides or []), folder


def print_table(metrics: Mapping[str, Any]) -> None:
    """Print the table of metrics.json: in colour on a terminal, plain in a pipe."""
    from apiary.report import table_plain, table_text

    if sys.stdout.isatty():
        from rich.console import Console

        Console().print(table_text(metrics))
    else:
        typer.echo(table_plain(metrics))


def shown(path: Path) -> str:
    """The path relative to here where it lies below, for shorter lines."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
