"""The command line. Wrong input ends in one line and exit code 2, a failed run in exit code 1, Ctrl-C in 130."""

from __future__ import annotations

import difflib
import errno
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

# Flower and the tokenizers read these when they are imported.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from apiary.cli import deploy, shared
from apiary.cli.shared import AsJson, ConfigFile, Overrides, Resume, print_json, print_table, settings_of, shown
from apiary.config import loading, methods
from apiary.config import schema as configs
from apiary.core.errors import UserError
from apiary.core.formatting import name_text

app = typer.Typer(
    name="apiary",
    help="Federated fine-tuning of language models on instruction data that stays where it is.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

GgufType = Literal["f32", "f16", "bf16", "q8_0"]
Tuned = Annotated[Path, typer.Argument(metavar="RUN|ADAPTER", help="a run directory or a PEFT adapter folder")]


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"apiary {version('apiary')} (flwr {version('flwr')}, torch {version('torch')})")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print versions")
    ] = False,
) -> None:
    """Options of all commands."""


@app.command()
def simulate(
    config: ConfigFile = None,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="the run directory; default runs/NAME-TIME")] = None,
    resume: Resume = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="print only errors and the final table")] = False,
) -> None:
    """Run clients and server on this machine, compare with the baselines, and write a report."""
    settings, folder = settings_of(config, overrides, out, resume)
    from apiary.cli.interrupts import heeded
    from apiary.tracking.console import make_progress

    try:
        with make_progress(quiet) as shown_to, heeded(shown_to) as observer:
            observer({"event": "phase", "name": "starting"})
            # Only now: what is wrong with the file is told, and that something happens, without waiting for torch.
            from simulation.run import simulate as run

            metrics = run(settings, folder, resume=resume, observers=[observer])
    except KeyboardInterrupt:
        again = (
            f"go on with: apiary simulate --out {shown(folder)} --resume"
            if (folder / "config.toml").exists()
            else "nothing was written"
        )
        typer.echo(f"apiary: interrupted; {again}", err=True)
        raise typer.Exit(130) from None
    print_table(metrics)
    typer.echo(f"report: {shown(folder / 'report.html')}   adapter: {shown(folder / 'adapter')}")


@app.command()
def sweep(
    config: ConfigFile = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("-s", metavar="KEY=VALUE", help="set a key; KEY=A,B,C or KEY=LOW..HIGH[:log|:STEP] varies it"),
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, max=1000, help="runs of each setting; default 1")] = None,
    search: Annotated[
        str | None,
        typer.Option(help="grid, or tpe, gp, qmc, random by Optuna; default: grid, with a range tpe"),
    ] = None,
    trials: Annotated[int | None, typer.Option(min=1, help="settings that a search draws")] = None,
    pruner: Annotated[
        str | None, typer.Option(help="of a search: none, median, halving, hyperband; gives settings far behind up")
    ] = None,
    runs: Annotated[int | None, typer.Option(min=1, help="begin no more runs than these")] = None,
    minutes: Annotated[float | None, typer.Option(help="begin no run after so many minutes")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="runs at a time; default: as cores and memory allow")] = None,
    confirm: Annotated[
        int, typer.Option(min=0, max=1000, help="run winner and reference again with so many fresh seeds")
    ] = 0,
    out: Annotated[Path | None, typer.Option(help="the sweep's folder; default runs/sweep-NAME-TIME")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the sweep in --out, or begin it there")] = False,
    as_json: AsJson = False,
) -> None:
    """Run settings that differ in a few keys with several seeds, choose one by rows of its own, and write a page."""
    from apiary.cli import sweep

    asked = sweep.Asked(config, tuple(overrides or ()), seeds, search, trials, pruner)
    spent = sweep.budget(runs, minutes)
    made, folder = sweep.prepare(asked, out, resume, spent)
    sweep.run(made, folder, spent, jobs, confirm, as_json)


@app.command()
def evaluate(
    tuned: Tuned,
    data: Annotated[
        str | None,
        typer.Option("--data", help="a file, a folder, a hub id, or builtin:skills; may be left out with --probe"),
    ] = None,
    probe: Annotated[
        Literal["injection"] | None,
        typer.Option(help="injection: place instructions in the data of questions and see whom the answers follow"),
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Print the table (base, federated, and the run's baselines) for other data; with --probe injection an attack."""
    if probe is not None:
        _probe(tuned, data, overrides or [], as_json)
        return
    if data is None:
        raise UserError("--data is needed: the rows to measure on, such as --data rows.jsonl")
    from apiary.evaluation.comparison import differences, table_row
    from apiary.export import tuned as results

    with shared.stdout_kept(as_json):
        opened = results.open_tuned(tuned, overrides or [])
        rows, remarks = results.score(opened, data)
    for line in remarks:
        typer.echo(f"warning: {line}", err=True)
    seed = opened.config.seed
    unlike = {method: {"not_alike": reasons} for method, reasons in results.unlike(opened).items()}
    table = [{**table_row(method, run, seed), **unlike.get(method, {})} for method, run in rows.items()]
    found = {"table": table, "paired": differences(rows, seed)}
    if as_json:
        print_json({**found, "warnings": remarks})
    else:
        print_table(found)


def _probe(tuned: Path, data: str | None, overrides: Sequence[str], as_json: bool) -> None:
    from apiary.cli import probe
    from apiary.evaluation.injection import lines

    with shared.stdout_kept(as_json):
        found = probe.run_probe(tuned, data, overrides)
    if as_json:
        print_json(found)
    else:
        typer.echo("\n".join(lines(found)))


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="run directories that differ in the seed alone")],
    as_json: AsJson = False,
) -> None:
    """Print the mean table of runs that differ in the seed alone, with intervals over seeds and rows."""
    from apiary.evaluation.runs import compare_runs, lines

    found = compare_runs(runs)
    if as_json:
        print_json(found)
    else:
        typer.echo("\n".join(lines(found)))


@app.command()
def chat(
    tuned: Tuned,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="ask once and print the answer")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="longest answer, in tokens")] = 128,
    data_file: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="text that the (first) question is about: it stands behind the question, as data where the model was "
            "tuned with prompt.boundary = structured",
        ),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Talk to a tuned model; an empty line or Ctrl-D ends, /new starts over, /data PATH gives data to a question."""
    from apiary.cli import chat as talk
    from apiary.export import tuned as results

    given = "" if data_file is None else talk.read_data(data_file)
    opened = results.open_tuned(tuned, overrides or [])
    for line in opened.remarks:
        typer.echo(f"warning: {line}", err=True)
    if prompt is not None:
        typer.echo(talk.answer(opened, prompt, given, max_new_tokens))
    else:
        talk.converse(opened, given, max_new_tokens)


@app.command()
def export(
    run: Tuned,
    to: Annotated[Path, typer.Option("--to", help="the folder to write")],
    merge: Annotated[bool, typer.Option("--merge", help="merge the adapter into a whole model")] = False,
    plain_scale: Annotated[
        bool,
        typer.Option("--plain-scale", help="scale by alpha/rank with a whole alpha, for servers that know no rsLoRA"),
    ] = False,
    max_rank: Annotated[
        int | None, typer.Option(min=1, help="cut a higher rank to this one, and say what that costs")
    ] = None,
    gguf: Annotated[
        bool, typer.Option("--gguf", help="a file for llama.cpp as well: of the adapter, or with --merge of the model")
    ] = False,
    gguf_type: Annotated[
        GgufType | None, typer.Option(help="how the file of a merged model holds its matrices; unset: f16")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="read what was written with other code and compare its logits")
    ] = False,
) -> None:
    """Write the adapter, or the merged model, as a folder that other tools load, and print how to serve it."""
    if gguf_type and not (gguf and merge):
        raise UserError("--gguf-type is of a merged model in a GGUF file: give --merge and --gguf as well")
    from apiary.export.export import export_run

    kind = (gguf_type or "f16") if gguf else None
    done = export_run(
        run, to.resolve(), merge=merge, plain_scale=plain_scale, max_rank=max_rank, gguf=kind, check=check
    )
    for line in done.warnings:
        typer.echo(f"warning: {line}", err=True)
    for line in done.said:
        typer.echo(line)
    typer.echo(f"written: {shown(done.folder)}")
    for command in done.commands:
        typer.echo(f"serve it: {command}")


@app.command()
def personal(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="the run directory of a finished simulation")],
    overrides: Overrides = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="print only errors and the result")] = False,
) -> None:
    """Make each client's own model after a finished simulation, and write metrics and report again."""
    from apiary.cli.interrupts import heeded
    from apiary.report import personal_lines
    from apiary.tracking.console import make_progress

    with make_progress(quiet) as shown_to, heeded(shown_to) as observer:
        observer({"event": "phase", "name": "starting"})
        from simulation.run import personalise

        metrics = personalise(run.resolve(), overrides or [], [observer])
    typer.echo("\n".join(personal_lines(metrics)))
    typer.echo(f"report: {shown(run.resolve() / 'report.html')}   models: {shown(run.resolve() / 'personal')}")


@app.command()
def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="a run directory")]) -> None:
    """Write report.html of a run again, from its log and metrics."""
    from apiary.report import write_report

    typer.echo(f"report: {shown(write_report(run))}")


@app.command()
def doctor(config: ConfigFile = None, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check a configuration against data, model and machine, and print the plan, before any training."""
    from apiary.doctor import document, examine

    def names(settings: configs.RunConfig) -> None:
        from simulation.run import check_names  # here, so that a broken file is told without waiting for torch

        check_names(settings)

    def remarks(settings: configs.RunConfig, clients: Sequence[str]) -> list[str]:
        from simulation.run import remarks

        return remarks(settings, clients)

    def load() -> configs.RunConfig:
        return shared.load(config, overrides)

    if as_json:
        with shared.stdout_kept():
            found = document(load, checks=[names], remarks=remarks)
        print_json(found)
        if found["problems"]:
            raise UserError(*found["problems"])
    elif not examine(load, checks=[names], remarks=remarks):
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
    from apiary.cli import curate

    done = curate.curate_file(data, config, out, overrides or [], adapter, held_out, report)
    for line in done.remarks:
        typer.echo(f"warning: {line}", err=True)
    typer.echo(curate.table(done.curation))

    typer.echo(f"written: {shown(done.out.resolve())}   private page: {shown(done.report.resolve())}")


privacy_app = typer.Typer(
    help="Differential privacy: what a run would cost, and what updates tell.", no_args_is_help=True
)
app.add_typer(privacy_app, name="privacy")
app.add_typer(deploy.app, name="deploy")


@privacy_app.command("plan")
def privacy_plan(
    config: ConfigFile = None,
    overrides: Overrides = None,
    rows: Annotated[int | None, typer.Option(min=1, help="rows of the smallest client; unset: read the data")] = None,
    as_json: AsJson = False,
) -> None:
    """Print sample rate, noise and epsilon by round, before any training."""
    settings = shared.load(config, overrides)
    from apiary.privacy.plan import describe, document, plan

    with shared.stdout_kept(as_json):
        made = plan(settings, rows)
    if as_json:
        print_json(document(settings, made))
        return
    for line in describe(settings, made):
        typer.echo(line)


@privacy_app.command("audit")
def privacy_audit(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="the run directory of a finished simulation")],
    client: Annotated[str | None, typer.Option(help="the client; unset: the one with most rows")] = None,
    canaries: Annotated[int, typer.Option(min=16, help="canaries at most, and as many of the client's own rows")] = 200,
    rounds: Annotated[int | None, typer.Option(min=1, help="visits that are replayed; unset: those of the run")] = None,
    seed: Annotated[int, typer.Option(min=0, help="of canaries, coins and noise of the replay")] = 0,
    data: Annotated[
        str | None, typer.Option(help="at a site, of a deployed run: the site's rows, a file or a folder")
    ] = None,
    state: Annotated[
        Path | None, typer.Option(help="beside --data: the site's state folder, whose pinned split holds rows out")
    ] = None,
    counts: Annotated[
        str | None, typer.Option(help="beside --data: as the site tells its counts; unset: rounded")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Attack one client's updates as a curious server could, and print what they tell beside the claimed epsilon."""
    from apiary.cli import audit

    with shared.stdout_kept(as_json):
        found = audit.run_audit(run, client, canaries, rounds, seed, data, state, counts)
    if as_json:
        print_json(found)
    else:
        typer.echo(audit.table(found))


@app.command("config")
def show_config(
    key: Annotated[str | None, typer.Argument(help="a key or a table, such as strategy: with all methods")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="the defaults as one JSON document")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="the JSON schema of a configuration")] = False,
) -> None:
    """Print configuration keys with their defaults and what they mean; of a KEY also its methods with their options."""
    if schema:
        if as_json or key is not None:
            raise UserError("--schema is of the whole configuration: leave KEY and --json out")
        print_json(loading.json_schema())
        return
    rows = [row for row in loading.describe() if key is None or row[0] == key or row[0].startswith(f"{key}.")]
    if not rows:
        raise UserError(_no_key(str(key)))
    if as_json:
        print_json(loading.defaults([name for name, _, _ in rows]))
        return
    for name, default, description in rows:
        typer.echo(f"{name} = {default}\n    {description}")
        for method in methods.kinds()[name].describe() if key is not None and name in methods.kinds() else ():
            typer.echo(f"    {method.name}: {method.summary}")
            for option, value, said in method.options:
                typer.echo(f"        {option} = {value}" + (f"  {said}" if said else ""))
    if key is None:
        typer.echo("\nThe methods of a table and their options: apiary config strategy, apiary config wire, ...")


def _no_key(key: str) -> str:
    """What there is instead of a key that there is not."""
    for table, kind in methods.kinds().items():
        if key in kind.functions:
            return f"{key!r} is no key but may stand at {table}: apiary config {table}"
    known = dict.fromkeys(name for row in loading.describe() for name in (row[0].partition(".")[0], row[0]))
    close = difflib.get_close_matches(key, known, n=1)
    return f"no key {key!r}; " + (f"did you mean {close[0]!r}?" if close else "apiary config lists all")


def main() -> None:
    """The entry point: turns errors into one line and an exit code."""
    shared.set_up_output()
    sys.exit(_guarded(app))


# What is wrong with a name, or with what lies there.
_NO_NAME = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EINVAL, errno.EILSEQ, errno.EEXIST)


def _guarded(command: Callable[[], Any]) -> int:
    try:
        command()
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else 0
    except UserError as error:
        for problem in error.problems:
            typer.echo(f"apiary: {problem}", err=True)
        return 2
    except KeyboardInterrupt:
        typer.echo("apiary: interrupted", err=True)
        return 130
    except UnicodeEncodeError as error:
        typer.echo(f"apiary: '{name_text(str(error.object))[:200]}': this name is not UTF-8; rename it", err=True)
        return 2
    except OSError as error:
        if error.errno in _NO_NAME and error.filename is not None:
            typer.echo(f"apiary: '{name_text(str(error.filename))[:200]}': {error.strerror}", err=True)
            return 2
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS):
            raise
        typer.echo(
            f"apiary: cannot write {error.filename or 'the run'}: {error.strerror}; a run goes on with --resume",
            err=True,
        )
        return 1
    except RuntimeError as error:
        before = {"RunFailed": "the run failed: ", "CheckFailed": ""}.get(type(error).__name__)
        if before is None:
            raise
        typer.echo(f"apiary: {before}{error}", err=True)
        return 1
    return 0


if __name__ == "__main__":
    main()
