"""`apiary deploy`: the commands of a federation between machines. What they need is loaded when they are called."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from apiary.cli.shared import AsJson, ConfigFile, Overrides, Resume, print_json, settings_of, shown
from apiary.config.schema import RunConfig
from apiary.core.counts import parse as parse_counts
from apiary.core.errors import UserError

app = typer.Typer(help="Run a federation between machines: kits, processes, runs.", no_args_is_help=True)

ServerKit = Annotated[Path, typer.Argument(metavar="KIT", help="the server's folder, made by `apiary deploy init`")]
State = Annotated[Path | None, typer.Option(help="folder of what must survive a restart; default KIT/state")]
Sites = Annotated[list[str] | None, typer.Option("--site", help="name of a site; once for each")]


@app.command("init")
def deploy_init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="new: will hold a folder for each")],
    server: Annotated[str, typer.Option(metavar="HOST:PORT", help="where the sites reach the server")],
    site: Sites = None,
) -> None:
    """Make the kits of a federation: certificates, keys, a folder for the server and for each site."""
    from deploy import kits

    for path in kits.init(folder, server, site or []):
        typer.echo(f"written: {shown(path.resolve())}")
    typer.echo(f"keep {shown((folder / 'ca' / 'ca.key').resolve())} offline: it signs servers of this federation")


@app.command("add")
def deploy_add(folder: Annotated[Path, typer.Argument(metavar="DIR")], site: Sites = None) -> None:
    """Make the kits of further sites; a running server takes them up from its folder `sites`."""
    from deploy import kits

    for path in kits.add(folder, site or []):
        typer.echo(f"written: {shown(path.resolve())}")


@app.command("renew")
def deploy_renew(folder: Annotated[Path, typer.Argument(metavar="DIR")]) -> None:
    """Write the server's certificate anew, for three years; needs the authority's key."""
    from deploy import kits

    typer.echo(f"written: {shown(kits.renew(folder).resolve())}")


@app.command("server")
def deploy_server(
    kit: ServerKit,
    state: State = None,
    bind: Annotated[str, typer.Option(help="this machine's address to listen on, at the kit's port")] = "0.0.0.0",
) -> None:
    """Serve a federation until SIGTERM or Ctrl-C."""
    from deploy import kits, server

    opened = kits.read(kit, "server")
    raise typer.Exit(server.run(opened, (state or opened.folder / "state").resolve(), bind))


@app.command("client")
def deploy_client(
    kit: Annotated[Path, typer.Argument(metavar="KIT", help="the site's folder, made by `apiary deploy init`")],
    data: Annotated[Path, typer.Option(help="the site's rows: a file, or a folder of files")],
    model: Annotated[
        str | None, typer.Option(help="this site's place of the base; needed unless the run's is built in")
    ] = None,
    device: Annotated[str | None, typer.Option(help="such as cuda:1; default: as the run says")] = None,
    port: Annotated[int | None, typer.Option(help="of 127.0.0.1, where /health answers; default: nowhere")] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="train adapters of this rank at most; default: as the run says")
    ] = None,
    max_epsilon: Annotated[
        float | None,
        typer.Option(help="refuse every run without record-level privacy of this epsilon or less"),
    ] = None,
    max_delta: Annotated[float, typer.Option(help="likewise, beside --max-epsilon")] = 1e-5,
    counts: Annotated[
        str, typer.Option(help="how counts are told: rounded, exact, or ROWS:TOKENS to state numbers of your own")
    ] = "rounded",
    column: Annotated[
        list[str] | None,
        typer.Option(metavar="FIELD=NAME", help="the site's own name of a column, such as instruction=question"),
    ] = None,
    state: State = None,
) -> None:
    """Take part as one site until SIGTERM or Ctrl-C."""
    if max_epsilon is not None and not 0.0 < max_epsilon < math.inf:
        raise UserError(f"--max-epsilon {max_epsilon:g}: expected a number above 0, such as 8")
    if not 0.0 < max_delta < 1.0:
        raise UserError(f"--max-delta {max_delta:g}: expected a number between 0 and 1, such as 1e-5")
    policy = parse_counts(counts, "--counts")
    from apiary.data.availability import parse_columns
    from deploy import kits, site

    opened = kits.read(kit, "site")
    where = (state or opened.folder / "state").resolve()
    names = parse_columns(column or [])
    options = site.Options(data, model, device, port, max_epsilon, max_delta, rank, policy, names)
    raise typer.Exit(site.run(opened, where, options))


@app.command("split")
def deploy_split(
    kit: Annotated[Path, typer.Argument(metavar="KIT", help="the site's folder, made by `apiary deploy init`")],
    test_fraction: Annotated[
        float | None, typer.Option(help="hold out this fraction from now on; default: only print what is pinned")
    ] = None,
    new_key: Annotated[bool, typer.Option("--new-key", help="and deal all rows anew, by another secret key")] = False,
    agree: Annotated[
        Path | None,
        typer.Option(
            metavar="CONFIG", help="agree to a run's stages, curation, prompt and rows for own models, and to no others"
        ),
    ] = None,
    state: State = None,
) -> None:
    """Print or change which of its rows a site holds out and uses; for its operator, while the site is stopped."""
    from apiary.config import loading
    from apiary.data import split
    from deploy import kits, processes

    opened = kits.read(kit, "site")
    where = (state or opened.folder / "state").resolve()
    if test_fraction is None and new_key:
        raise UserError("--new-key: name the fraction as well (--test-fraction 0.1)")
    run = None if agree is None else loading.load(agree, [])
    pinned = None if new_key else split.load(where)
    if test_fraction is None and run is not None:
        test_fraction = run.data.test_fraction
        if pinned is not None and pinned.fraction != test_fraction:
            raise UserError(
                f"--agree: the run has data.test_fraction = {test_fraction:g}, and this site has pinned "
                f"{pinned.fraction:g}; to change that as well, name it (--test-fraction {test_fraction:g})"
            )
    before = [] if pinned is None else split.lines(pinned)
    if test_fraction is not None:
        split.draw(test_fraction)  # an impossible one is refused before the folder is made
        with processes.hold(where):
            pinned = split.repin(where, test_fraction, new_key=new_key, agreed=run)
    told = ["nothing yet: the first run decides"] if pinned is None else split.lines(pinned)
    for line in told:
        typer.echo(f"pinned: {line}")
    for line in before:
        if line not in told:
            typer.echo(f"no more: {line}")
    if before and before[0] != told[0]:
        typer.echo("rows that were trained on may be held out from now on, which flatters losses on them", err=True)


@app.command("personal")
def deploy_personal(
    kit: Annotated[Path, typer.Argument(metavar="KIT", help="the site's folder, made by `apiary deploy init`")],
    adapter: Annotated[
        Path, typer.Argument(metavar="RUN|ADAPTER", help="a run directory, or what `apiary export` wrote of it")
    ],
    data: Annotated[Path, typer.Option(help="the site's rows: a file, or a folder of files")],
    out: Annotated[Path | None, typer.Option(help="the folder to write; default KIT/personal/NAME")] = None,
    model: Annotated[Path | None, typer.Option(help="this site's folder of the base, unless that is built in")] = None,
    device: Annotated[str | None, typer.Option(help="such as cuda:1; default: as the run says")] = None,
    column: Annotated[
        list[str] | None, typer.Option(metavar="FIELD=NAME", help="the site's own name of a column")
    ] = None,
    run: Annotated[
        str | None, typer.Option(help="the run's name in KIT/state/runs, or none; default: as the adapter tells")
    ] = None,
    start: Annotated[
        Path | None, typer.Option(help="the site's copy of the adapter that the run began from (adapter.start)")
    ] = None,
    state: State = None,
    overrides: Overrides = None,
) -> None:
    """Make a site's own model at home after a run, of the adapter and its own rows; nothing is sent."""
    import os

    os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub's library is imported: nothing is fetched either
    from apiary.cli import own_model
    from apiary.data.availability import parse_columns
    from deploy import kits

    opened = kits.read(kit, "site")
    names = parse_columns(column or [])
    where = (state or opened.folder / "state").resolve()
    made = own_model.Asked(opened.site, data, where, model, device, names, adapter.resolve(), run, start)
    folder = (out or opened.folder / "personal" / own_model.name_of(adapter)).resolve()
    for line in own_model.make(made, folder, overrides or []):
        typer.echo(line)


def _one_run(
    config: Path | None, overrides: list[str] | None, out: Path | None, resume: bool
) -> tuple[RunConfig, Path]:
    """The configuration of a run at sites, and its directory.

    Raises:
        UserError: what is wrong with it, or it is a sweep.
    """
    why = (
        "sites run no sweep: each run there takes their time and, where it is private, of their rows' budget; sweep a "
        "simulation (apiary sweep), and submit one setting"
    )
    try:
        settings, folder = settings_of(config, overrides, out, resume)
    except UserError as error:
        from simulation.sweep import space

        varied = space.parse(overrides or [])[1]
        raise (UserError(f"{varied[0].key}: several values; {why}") if varied else error) from None
    if settings.evaluate.set_apart:
        raise UserError(f"evaluate.set_apart = true: is for choosing between the runs of a sweep, and {why}")
    return settings, folder


@app.command("submit")
def deploy_submit(
    kit: ServerKit,
    config: ConfigFile = None,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="the run directory; default runs/NAME-TIME")] = None,
    resume: Resume = False,
    detach: Annotated[bool, typer.Option("--detach", help="do not follow the run")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="print only errors and the final table")] = False,
    state: State = None,
) -> None:
    """Start a run on the server of this machine, and follow it to its end."""
    settings, folder = _one_run(config, overrides, out, resume)
    from apiary.cli import submit
    from apiary.tracking.console import make_progress
    from deploy import flower_cli, following, run_checks

    for line in () if quiet else run_checks.remarks(settings):
        typer.echo(f"warning: {line}", err=True)
    try:
        started = submit.start(settings, kit, state, folder, resume)
    except flower_cli.FlowerError as error:
        typer.echo(f"apiary: the run could not be started: {error}", err=True)
        raise typer.Exit(1) from None
    try:
        typer.echo(f"run {started.run} started: {shown(folder)}")
        if detach:
            return
        if started.interrupted:
            raise KeyboardInterrupt
        with make_progress(quiet) as observer:
            failure = following.follow(started.state, started.run, folder, [observer])
    except KeyboardInterrupt:
        typer.echo("apiary: no longer followed; the run goes on: apiary deploy status KIT", err=True)
        raise typer.Exit(130) from None
    except flower_cli.FlowerError as error:
        typer.echo(f"apiary: {error}", err=True)
        raise typer.Exit(1) from None
    if failure:
        typer.echo(f"apiary: the run failed: {failure}", err=True)
        raise typer.Exit(1)
    submit.print_table(folder)
    typer.echo(f"report: {shown(folder / 'report.html')}   adapter: {shown(folder / 'adapter')}")


@app.command("status")
def deploy_status(kit: ServerKit, state: State = None, as_json: AsJson = False) -> None:
    """Print the sites, online or not, and the runs."""
    from deploy import flower_cli, kits, runs

    opened = kits.read(kit, "server")
    try:
        found = runs.standing((state or opened.folder / "state").resolve())
    except flower_cli.FlowerError as error:
        typer.echo(f"apiary: the server cannot be asked: {error}", err=True)
        raise typer.Exit(1) from None
    if as_json:
        print_json(runs.document(found))
        return
    for line in runs.describe(found):
        typer.echo(line)


@app.command("verify")
def deploy_verify(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="the run directory")],
    keys: Annotated[Path, typer.Option(metavar="DIR", help="NAME.pub of each site: `sites` of the server's kit")],
) -> None:
    """Check by the sites' public keys who sent what in a run; needs no server."""
    from deploy import account

    found = account.verify(run, keys)
    for line in account.describe(found):
        typer.echo(line)
    if found.problems:
        raise typer.Exit(1)


@app.command("stop")
def deploy_stop(
    kit: ServerKit,
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="its number in `apiary deploy status`, or its run directory")
    ],
    state: State = None,
) -> None:
    """End a run for good: it does not go on by itself any more."""
    from deploy import flower_cli, kits, stopping

    opened = kits.read(kit, "server")
    try:
        ended = stopping.stop((state or opened.folder / "state").resolve(), run)
    except flower_cli.FlowerError as error:
        typer.echo(f"apiary: the server cannot be asked: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"run {ended} ended")
