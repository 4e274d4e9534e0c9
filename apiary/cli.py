"""The command line. Wrong input ends in one line and exit code 2, a failed run in exit code 1, Ctrl-C in 130."""

from __future__ import annotations

import errno
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

# Flower and the tokenizers read these when they are imported.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from apiary import config as configs
from apiary.config import UserError

app = typer.Typer(
    name="apiary",
    help="Federated fine-tuning of language models on instruction data that stays where it is.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigFile = Annotated[Path | None, typer.Argument(help="a TOML file; none = the built-in demo", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Option("-s", metavar="KEY=VALUE", help="set one key, e.g. -s train.lr=1e-4")
]
Tuned = Annotated[Path, typer.Argument(metavar="RUN|ADAPTER", help="a run directory or a PEFT adapter folder")]


@app.command()
def simulate(
    config: ConfigFile = None,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="the run directory; default runs/NAME-TIME")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on after the last finished round of --out")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="print only errors and the final table")] = False,
) -> None:
    """Run clients and server on this machine, compare with the baselines, and write a report."""
    settings, folder = _settings(config, overrides, out, resume)
    # Only now: what is wrong with the file is told without waiting for torch.
    from apiary.progress import make_progress
    from simulation.run import simulate as run

    try:
        with make_progress(quiet) as observer:
            metrics = run(settings, folder, resume=resume, observers=[observer])
    except KeyboardInterrupt:
        again = (
            f"go on with: apiary simulate --out {_shown(folder)} --resume"
            if (folder / "config.toml").exists()
            else "nothing was written"
        )
        typer.echo(f"apiary: interrupted; {again}", err=True)
        raise typer.Exit(130) from None
    _print_table(metrics)
    typer.echo(f"report: {_shown(folder / 'report.html')}   adapter: {_shown(folder / 'adapter')}")


@app.command()
def evaluate(
    tuned: Tuned,
    data: Annotated[str, typer.Option("--data", help="a file, a folder, a hub id, or builtin:skills")],
    overrides: Overrides = None,
) -> None:
    """Print the table (base, federated, and the run's baselines) for other data."""
    from apiary import results
    from apiary.evaluate import table_row

    opened = results.open_tuned(tuned, overrides or [])
    rows, remarks = results.score(opened, data)
    for line in remarks:
        typer.echo(f"warning: {line}", err=True)
    _print_table({"table": [table_row(method, run, opened.config.seed) for method, run in rows.items()]})


@app.command()
def chat(
    tuned: Tuned,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="ask once and print the answer")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="longest answer, in tokens")] = 128,
    overrides: Overrides = None,
) -> None:
    """Talk to a tuned model; an empty line or Ctrl-D ends, /new starts over."""
    from apiary import results
    from apiary.examples import Turn

    opened = results.open_tuned(tuned, overrides or [])
    if prompt is not None:
        typer.echo(results.reply(opened, [Turn("user", prompt)], max_new_tokens))
        return
    history: list[Turn] = []
    while (text := _ask()) not in ("", None):
        if text == "/new":
            history = []
            continue
        answer = results.reply(opened, [*history, Turn("user", str(text))], max_new_tokens)
        history += [Turn("user", str(text)), Turn("assistant", answer)]
        typer.echo(answer)


def _ask() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None


@app.command()
def export(
    run: Tuned,
    to: Annotated[Path, typer.Option("--to", help="the folder to write")],
    merge: Annotated[bool, typer.Option("--merge", help="merge the adapter into a whole model")] = False,
) -> None:
    """Write the adapter, or the merged model, as a folder that other tools load."""
    from apiary import results

    typer.echo(f"written: {_shown(results.export(run, to.resolve(), merge=merge))}")


@app.command()
def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="a run directory")]) -> None:
    """Write report.html of a run again, from its log and metrics."""
    from apiary.report import write_report

    typer.echo(f"report: {_shown(write_report(run))}")


@app.command()
def doctor(config: ConfigFile = None, overrides: Overrides = None) -> None:
    """Check a configuration against data, model and machine, and print the plan, before any training."""
    from apiary.doctor import examine

    def names(settings: configs.RunConfig) -> None:
        from simulation.run import check_names  # here, so that a broken file is told without waiting for torch

        check_names(settings)

    if not examine(config, overrides or [], checks=[names]):
        raise typer.Exit(2)


@app.command()
def curate(
    data: Annotated[str, typer.Argument(metavar="DATA", help="a file, a folder, a hub id, or builtin:skills")],
    out: Annotated[Path, typer.Option(help="the JSONL file to write")],
    config: ConfigFile = None,
    overrides: Overrides = None,
    adapter: Annotated[Path | None, typer.Option(metavar="RUN|ADAPTER", help="the tuned model that judges")] = None,
    held_out: Annotated[str | None, typer.Option(help="rows that no kept row may repeat")] = None,
    report: Annotated[Path | None, typer.Option(help="the page about it; default: --out with .html")] = None,
) -> None:
    """Mask, deduplicate and select rows of a data set, as a client would before training."""
    from client.curation import standalone

    done = standalone.curate_file(data, config, out, overrides or [], adapter, held_out, report)
    for line in done.remarks:
        typer.echo(f"warning: {line}", err=True)
    typer.echo(standalone.table(done.curation))
    typer.echo(f"written: {_shown(done.out.resolve())}   private page: {_shown(done.report.resolve())}")


privacy_app = typer.Typer(help="Differential privacy: what a run would cost.", no_args_is_help=True)
app.add_typer(privacy_app, name="privacy")


@privacy_app.command("plan")
def privacy_plan(
    config: ConfigFile = None,
    overrides: Overrides = None,
    rows: Annotated[int | None, typer.Option(min=1, help="rows of the smallest client; unset: read the data")] = None,
) -> None:
    """Print sample rate, noise and epsilon by round, before any training."""
    settings = configs.load(config, overrides or [])
    from apiary.privacy_plan import describe, plan

    for line in describe(settings, plan(settings, rows)):
        typer.echo(line)


deploy_app = typer.Typer(help="Run a federation between machines: kits, processes, runs.", no_args_is_help=True)
app.add_typer(deploy_app, name="deploy")

ServerKit = Annotated[Path, typer.Argument(metavar="KIT", help="the server's folder, made by `apiary deploy init`")]
State = Annotated[Path | None, typer.Option(help="folder of what must survive a restart; default KIT/state")]
Sites = Annotated[list[str] | None, typer.Option("--site", help="name of a site; once for each")]


@deploy_app.command("init")
def deploy_init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="new: will hold a folder for each")],
    server: Annotated[str, typer.Option(metavar="HOST:PORT", help="where the sites reach the server")],
    site: Sites = None,
) -> None:
    """Make the kits of a federation: certificates, keys, a folder for the server and for each site."""
    from deploy import kits

    for path in kits.init(folder, server, site or []):
        typer.echo(f"written: {_shown(path.resolve())}")
    typer.echo(f"keep {_shown((folder / 'ca' / 'ca.key').resolve())} offline: it signs servers of this federation")


@deploy_app.command("add")
def deploy_add(folder: Annotated[Path, typer.Argument(metavar="DIR")], site: Sites = None) -> None:
    """Make the kits of further sites; a running server takes them up from its folder `sites`."""
    from deploy import kits

    for path in kits.add(folder, site or []):
        typer.echo(f"written: {_shown(path.resolve())}")


@deploy_app.command("renew")
def deploy_renew(folder: Annotated[Path, typer.Argument(metavar="DIR")]) -> None:
    """Write the server's certificate anew, for three years; needs the authority's key."""
    from deploy import kits

    typer.echo(f"written: {_shown(kits.renew(folder).resolve())}")


@deploy_app.command("server")
def deploy_server(
    kit: ServerKit,
    state: State = None,
    bind: Annotated[str, typer.Option(help="this machine's address to listen on, at the kit's port")] = "0.0.0.0",
) -> None:
    """Serve a federation until SIGTERM or Ctrl-C."""
    from deploy import kits, server

    opened = kits.read(kit, "server")
    raise typer.Exit(server.run(opened, (state or opened.folder / "state").resolve(), bind))


@deploy_app.command("client")
def deploy_client(
    kit: Annotated[Path, typer.Argument(metavar="KIT", help="the site's folder, made by `apiary deploy init`")],
    data: Annotated[Path, typer.Option(help="the site's rows: a file, or a folder of files")],
    model: Annotated[
        str | None, typer.Option(help="this site's place of the base; needed unless the run's is built in")
    ] = None,
    device: Annotated[str | None, typer.Option(help="such as cuda:1; default: as the run says")] = None,
    port: Annotated[int | None, typer.Option(help="of 127.0.0.1, for its own processes; default: a free one")] = None,
    max_epsilon: Annotated[
        float | None,
        typer.Option(help="refuse every run without record-level privacy of this epsilon or less"),
    ] = None,
    max_delta: Annotated[float, typer.Option(help="likewise, beside --max-epsilon")] = 1e-5,
    state: State = None,
) -> None:
    """Take part as one site until SIGTERM or Ctrl-C."""
    if max_epsilon is not None and not 0.0 < max_epsilon < math.inf:
        raise UserError(f"--max-epsilon {max_epsilon:g}: expected a number above 0, such as 8")
    if not 0.0 < max_delta < 1.0:
        raise UserError(f"--max-delta {max_delta:g}: expected a number between 0 and 1, such as 1e-5")
    from deploy import kits, site

    opened = kits.read(kit, "site")
    where = (state or opened.folder / "state").resolve()
    raise typer.Exit(site.run(opened, where, site.Options(data, model, device, port, max_epsilon, max_delta)))


@deploy_app.command("submit")
def deploy_submit(
    kit: ServerKit,
    config: ConfigFile = None,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="the run directory; default runs/NAME-TIME")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on after the last finished round of --out")] = False,
    detach: Annotated[bool, typer.Option("--detach", help="do not follow the run")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="print only errors and the final table")] = False,
    state: State = None,
) -> None:
    """Start a run on the server of this machine, and follow it to its end."""
    settings, folder = _settings(config, overrides, out, resume)
    from apiary import trackers
    from deploy import flower, kits, submit
    from simulation.run import check_names

    check_names(settings)
    trackers.check(settings)
    for line in () if quiet else submit.remarks(settings):
        typer.echo(f"warning: {line}", err=True)
    opened = kits.read(kit, "server")
    where = (state or opened.folder / "state").resolve()
    try:
        run = submit.start(where, settings, folder, resume=resume)
    except flower.FlowerError as error:
        typer.echo(f"apiary: the run could not be started: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"run {run} started: {_shown(folder)}")
    if detach:
        return
    from apiary.progress import make_progress

    try:
        with make_progress(quiet) as observer:
            failure = submit.follow(where, run, folder, [observer])
    except KeyboardInterrupt:
        typer.echo("apiary: no longer followed; the run goes on: apiary deploy status KIT", err=True)
        raise typer.Exit(130) from None
    except flower.FlowerError as error:
        typer.echo(f"apiary: {error}", err=True)
        raise typer.Exit(1) from None
    if failure:
        typer.echo(f"apiary: the run failed: {failure}", err=True)
        raise typer.Exit(1)
    from apiary.runlog import read_metrics

    if (metrics := read_metrics(folder))["table"]:
        _print_table(metrics)
    typer.echo(f"report: {_shown(folder / 'report.html')}   adapter: {_shown(folder / 'adapter')}")


@deploy_app.command("status")
def deploy_status(kit: ServerKit, state: State = None) -> None:
    """Print the sites, online or not, and the runs."""
    from deploy import flower, kits, submit

    opened = kits.read(kit, "server")
    try:
        for line in submit.describe((state or opened.folder / "state").resolve()):
            typer.echo(line)
    except flower.FlowerError as error:
        typer.echo(f"apiary: the server cannot be asked: {error}", err=True)
        raise typer.Exit(1) from None


@app.command("config")
def show_config() -> None:
    """Print every configuration key with its default and what it means."""
    for key, default, description in configs.describe():
        typer.echo(f"{key} = {default}\n    {description}")


def _settings(
    config: Path | None, overrides: list[str] | None, out: Path | None, resume: bool
) -> tuple[configs.RunConfig, Path]:
    """The configuration of a run, and its directory; of a run that goes on without a file, its own one."""
    if resume and out is None:
        raise UserError("--resume needs --out DIR: the run to go on with")
    name = config.stem if config else "demo"
    folder = (out or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}").resolve()
    stored = folder / "config.toml" if resume and config is None and (folder / "config.toml").exists() else config
    return configs.load(stored, overrides or []), folder


def _print_table(metrics: Mapping[str, Any]) -> None:
    from apiary.report import table_plain, table_text

    if sys.stdout.isatty():
        from rich.console import Console

        Console().print(table_text(metrics))
    else:
        typer.echo(table_plain(metrics))


def _shown(path: Path) -> str:
    """The path relative to here where it lies below, for shorter lines."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def main() -> None:
    """The entry point: turns errors into one line and an exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    for noisy in ("flwr", "transformers", "ray", "httpx", "huggingface_hub", "datasets", "peft"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    sys.exit(_guarded(app))


def _guarded(command: Callable[[], Any]) -> int:
    try:
        command()
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else 0
    except UserError as error:
        typer.echo(f"apiary: {error}", err=True)
        return 2
    except KeyboardInterrupt:
        typer.echo("apiary: interrupted", err=True)
        return 130
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS):
            raise
        typer.echo(
            f"apiary: cannot write {error.filename or 'the run'}: {error.strerror}; a run goes on with --resume",
            err=True,
        )
        return 1
    except RuntimeError as error:
        if type(error).__name__ != "RunFailed":
            raise
        typer.echo(f"apiary: the run failed: {error}", err=True)
        return 1
    return 0


if __name__ == "__main__":
    main()
