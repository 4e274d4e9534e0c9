"""What `apiary doctor` tells of a run: machine, rows, clients, one example with its mask, cost."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from apiary.config import summary
from apiary.config.schema import RunConfig
from apiary.core.formatting import bytes_text, count_text, seconds_text, share_text
from apiary.data import tokenization
from apiary.data.federation import Federation
from apiary.data.tokenization import Corpus, Template
from apiary.doctor import forecast
from apiary.models import base
from apiary.models.adapters import LanguageModel
from apiary.tracking import environment
from client.personal.candidates import schedules
from strategies.from_config import method_from_config

_SHORT = {  # names that fit the column
    "Factors trained": "factors",
    "Factors shared": "shared",
    "Server optimiser": "server step",
    "Weights of the clients": "weights",
    "On the wire": "wire",
}
_FEW = 20  # clients that are listed one by one
_FILES = 8  # files whose problems are listed one by one
_MANY = 0.1  # share of examples that is too much to lose
_BAR = 30  # letters of the longest bar
_STRETCH = 700  # characters of a stretch of the preview
# Data may hold anything; nothing of it may steer the operator's terminal.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class PreparedRun(NamedTuple):
    """A run of which everything could be had."""

    config: RunConfig
    federation: Federation
    lm: LanguageModel
    template: Template
    corpora: tuple[Corpus, ...]  # of the clients' training examples, in order


class Cost(NamedTuple):
    """What a run will take, all told."""

    work: forecast.Work
    traffic: forecast.Traffic
    trial: forecast.Trial
    seconds: float  # of training, without baselines and evaluation
    copies: int  # runs of that length, baselines and clients' own models included
    processes: int  # that hold the model at a time
    memory: int  # bytes of each


def cost_of(run: PreparedRun) -> Cost:
    """What a run will take, found by trying out one pass."""
    work = forecast.plan_work(run.config, run.corpora)
    trial = forecast.try_out(run.lm, max(run.corpora, key=len), run.config)
    return Cost(
        work,
        forecast.plan_traffic(run.config, run.lm, work),
        trial,
        seconds=trial.seconds * run.config.train.accumulate * work.total,
        copies=1 + len(set(run.config.evaluate.baselines) - {"base"}) + _own_copies(run.config),
        processes=_processes(run),
        memory=forecast.base_bytes(run.lm) + _adapter_bytes(run) + trial.activation_bytes,
    )


def _own_copies(config: RunConfig) -> int:
    """How many times the run's steps the clients' own models take, beside what a baseline trains already."""
    if not config.personal.enabled:
        return 0
    steps = 1000  # of a client, to see the share of each schedule
    known = steps if "local" in config.evaluate.baselines else 0
    return math.ceil((schedules(steps, config.personal.budget).total - known) / steps)


def _adapter_bytes(run: PreparedRun) -> int:
    return forecast.state_bytes(run.config)[0] * forecast.adapter_size(run.lm)


def print_run(run: PreparedRun, cost: Cost, console: Console) -> None:
    """Print what follows from data and model together."""
    _print_lengths(run, console)
    _print_clients(run, cost.work, console)
    _print_preview(run, console)
    _print_cost(run, cost, console)


def _head(console: Console, title: str) -> None:
    console.print(Text(f"\n{title}", style="bold cyan"))


def _fact(console: Console, name: str, value: str) -> None:
    console.print(Text.assemble((f"  {name:<12}", "dim"), _clean(value)))


def _warn(console: Console, text: str) -> None:
    console.print(Text(f"  warning: {text}", style="yellow"))


def _clean(text: str) -> str:
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def print_machine(config: RunConfig, device: torch.device, console: Console) -> None:
    """Print the device and its arithmetic, and why these."""
    _head(console, "Machine")
    machine = environment.machine()
    name = machine["gpu"] if device.type != "cpu" else machine["cpu"]
    memory = bytes_text(forecast.device_bytes(device))
    cores = f", {machine['cores']} cores" if device.type == "cpu" else ""
    why = "asked for" if config.model.device != "auto" else "the best that is here"
    _fact(console, "device", f"{device} ({why}): {name}{cores}, {memory} of memory")
    dtype = str(base.resolve_dtype(config.model, device)).removeprefix("torch.")
    if config.model.dtype != "auto":
        why = "asked for"
    elif dtype == "bfloat16":
        why = "this device multiplies it"
    else:
        why = "this device has no instructions for bfloat16"
    _fact(console, "arithmetic", f"{dtype} ({why})")


def print_template(template: Template, console: Console) -> None:
    """Print how conversations are written for the model, and why so."""
    _fact(console, "template", template.words)


def print_decoding(lm: LanguageModel, console: Console) -> None:
    """Print how answers are decoded, and what of the base's own settings does not count in it."""
    _fact(console, "answers", lm.generation.words)


def print_rows(federation: Federation, turns: Mapping[str, int], console: Console) -> None:
    """Print how many rows there are, which are left out for what, and what is read otherwise than it stands."""
    _head(console, "Data")
    rows = sum(report.rows for report in federation.reports)
    usable = sum(report.usable for report in federation.reports)
    share = share_text(usable / rows if rows else None)
    _fact(console, "rows", f"{count_text(rows)}, of them {count_text(usable)} usable ({share})")
    troubled = [report for report in federation.reports if report.problems or report.remarks or report.notes]
    for report in troubled[:_FILES]:
        for note in report.notes:
            _fact(console, "", f"{report.name}: {note}")
        for what, found in ((" left out", report.problems), ("", report.remarks)):
            for reason, (count, first) in found.items():
                places = ", ".join(map(str, first)) + (", ..." if count > len(first) else "")
                part = f"{count_text(count)} of {count_text(report.rows)}{what} ({places})"
                _fact(console, "", f"{report.name}: {part}: {reason}")
    if len(troubled) > _FILES:
        _fact(console, "", f"and {len(troubled) - _FILES} more files of which there is something to say")
    trained = sum(len(client.train) for client in federation.clients)
    own = sum(len(client.test) for client in federation.clients)
    text = f"{count_text(trained)} to train on, {count_text(own)} held out at the clients"
    _fact(console, "examples", f"{text}, {count_text(len(federation.test))} held out for the table")
    text = f"{count_text(turns['turns'])} in these, of them {count_text(turns['answers'])} of the assistant"
    _fact(console, "turns", f"{text}, {count_text(turns['trained'])} trained")


def turn_counts(federation: Federation) -> dict[str, int]:
    """How many turns the clients' examples have, how many are the assistant's, and how many of those are trained."""
    turns = answers = trained = 0
    for part in chain.from_iterable((client.train, client.test) for client in federation.clients):
        for row in part:
            flags = [turn.trained for turn in row.turns if turn.role == "assistant"]
            turns, answers, trained = turns + len(row.turns), answers + len(flags), trained + sum(flags)
    return {"turns": turns, "answers": answers, "trained": trained}


def print_warnings(lines: Sequence[str], console: Console) -> None:
    """Print what encoding cuts and leaves out, in the lines that a run tells it in."""
    for line in lines[:_FILES]:
        _warn(console, _clean(line))
    if len(lines) > _FILES:
        _warn(console, f"and {len(lines) - _FILES} more files of which rows are cut or left out")


class LengthBin(NamedTuple):
    """Rows of so many tokens before cutting; last is None for those longer than all bins."""

    first: int
    last: int | None
    rows: int


def length_bins(lengths: ArrayLike, limit: int) -> list[LengthBin]:
    """How many rows there are of each length in tokens, in bins that double; the limit is the end of one of them.

    Args:
        lengths: (n,), tokens of each row, before cutting.
        limit: `prompt.max_tokens`.
    """
    ends = [limit >> k for k in range(4, 0, -1) if limit >> k] + [limit << k for k in range(4)]
    counts = np.bincount(np.searchsorted(ends, lengths), minlength=len(ends) + 1).tolist()
    starts = [1, *(end + 1 for end in ends)]
    return [LengthBin(*each) for each in zip(starts, [*ends, None], counts, strict=True)]


def _print_bins(run: PreparedRun, console: Console) -> None:
    limit = run.config.prompt.max_tokens
    bins = length_bins(np.concatenate([corpus.whole for corpus in run.corpora]), limit)
    while bins and not bins[-1].rows:
        bins.pop()
    total, most = sum(each.rows for each in bins), max((each.rows for each in bins), default=1)
    for number, each in enumerate(bins):
        end = f"to {count_text(each.last)}" if each.last else f"from {count_text(each.first)}"
        bar = "#" * math.ceil(_BAR * each.rows / most)
        over = "  too long" if each.rows and each.first > limit else ""
        text = f"{end:>11} tokens  {bar:<{_BAR}}  {count_text(each.rows)} rows ({share_text(each.rows / total)}){over}"
        _fact(console, "lengths" if not number else "", text)


def _print_lengths(run: PreparedRun, console: Console) -> None:
    _print_bins(run, console)
    cut = sum(corpus.stats.cut for corpus in run.corpora)
    dropped = sum(corpus.stats.dropped for corpus in run.corpora)
    n = sum(len(corpus) for corpus in run.corpora) + dropped
    text = f"{count_text(cut)} cut ({share_text(cut / n)})"
    text += f", {count_text(dropped)} dropped ({share_text(dropped / n)})"
    _fact(console, "too long", f"{text} at {run.config.prompt.max_tokens} tokens")
    stats = [corpus.stats for corpus in run.corpora]
    within, off, gone = (
        sum(values) for values in zip(*((s.cut_within, s.trained_cut, s.trained_dropped) for s in stats), strict=True)
    )
    there = sum(s.response_tokens for s in stats) + off + gone
    if off or gone:
        text = f"{count_text(off)} cut ({share_text(off / there)}), {count_text(gone)} dropped"
        text += f" ({share_text(gone / there)}), of the trained tokens; {count_text(within)} rows cut within an answer"
        _fact(console, "", text)
    if cut + dropped > _MANY * n:
        _warn(console, "much is lost; raise prompt.max_tokens, or see why prompt.template cannot write it")
    spelled = sum(len(corpus.spelled) for corpus in run.corpora)
    text = f"tokens spelled in {count_text(spelled)} examples ({share_text(spelled / n)}), where they stay plain text"
    _fact(console, "control", text if spelled else "tokens spelled in no example")
    tokens = sum(corpus.stats.tokens for corpus in run.corpora)
    trained = sum(corpus.stats.response_tokens for corpus in run.corpora)
    text = f"{count_text(tokens)}, of them {count_text(trained)} trained"
    _fact(console, "tokens", f"{text} ({share_text(trained / tokens)})")


def _print_clients(run: PreparedRun, work: forecast.Work, console: Console) -> None:
    ranks = run.config.adapter.ranks
    own = len(run.corpora) <= _FEW and ranks != "memory" and len(set(ranks)) > 1  # whether they are told one by one
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("client")
    for name in (*(["rank"] if own else []), "examples", "trained tokens", "steps an epoch", "epochs in the run"):
        table.add_column(name, justify="right")
    visits = run.config.rounds * work.cohort / len(run.corpora)
    rows = [
        (float(len(corpus)), float(corpus.stats.response_tokens), epoch, visits * steps / epoch)
        for corpus, epoch, steps in zip(run.corpora, work.per_epoch, work.per_round, strict=True)
    ]
    if len(rows) <= _FEW:
        for number, (client, row) in enumerate(zip(run.federation.clients, rows, strict=True)):
            rank = [str(ranks[number % len(ranks)])] if own else []
            table.add_row(_clean(client.name), *rank, *_cells(row))
    else:
        columns = list(zip(*rows, strict=True))
        for name, pick in (("least", min), ("median", statistics.median), ("most", max)):
            table.add_row(f"{name} of {len(rows)}", *_cells([pick(c) for c in columns]))
    console.print(table)


def _cells(row: Sequence[float]) -> list[str]:
    return [*(count_text(value) for value in row[:3]), f"{row[3]:.2f}" if row[3] < 1 else f"{row[3]:.1f}"]


def _print_preview(run: PreparedRun, console: Console) -> None:
    for example in run.federation.clients[0].train:
        tokenizer = run.lm.tokenizer
        stretches = tokenization.preview(example, run.template, tokenizer, run.config.prompt)
        if stretches:
            break
    _head(console, f"One example (template {run.template.name}); [[ ]] is what is trained")
    text = Text()
    for stretch, trained in stretches:
        shown = _clean(_shorten(stretch))
        text.append(f"[[{shown}]]" if trained else shown, "bold green" if trained else "dim")
    console.print(text)


def _shorten(text: str) -> str:
    if len(text) <= _STRETCH:
        return text
    half = _STRETCH // 2
    return f"{text[:half]} ... ({len(text) - 2 * half} characters) ... {text[-half:]}"


def _print_cost(run: PreparedRun, cost: Cost, console: Console) -> None:
    _head(console, "Cost")
    size, rank = forecast.adapter_size(run.lm), run.config.adapter.rank
    for name, value in summary.facts(run.config):
        _fact(console, _SHORT.get(name, name.lower()), value)
    _fact(console, "trained", f"{count_text(size)} parameters at rank {rank}")
    _fact(console, "", run.lm.coverage.words)
    _print_traffic(run, cost, console)
    _print_steps(run, cost.work, console)
    _print_memory(run, cost, console)
    what = "the baselines and clients' own models" if run.config.personal.enabled else "the baselines"
    also = f", {seconds_text(cost.copies * cost.seconds)} with {what}" if cost.copies > 1 else ""
    tried = f"by a pass over {count_text(cost.trial.tokens)} tokens, without evaluation"
    _fact(console, "time", f"about {seconds_text(cost.seconds)} of training{also} ({tried})")


def _print_traffic(run: PreparedRun, cost: Cost, console: Console) -> None:
    traffic, work = cost.traffic, cost.work
    ranks = run.config.adapter.ranks
    mean = " of mean rank" if ranks != "memory" and set(ranks) - {run.config.adapter.rank} else ""
    # What stands in the base travels with each message.
    grows = " in the mean round (less in the first ones, for the base grows)" if traffic.grows else ""
    most = "at most " if method_from_config(run.config).scalars else ""
    text = f"{bytes_text(traffic.down)} down{grows} and {most}{bytes_text(traffic.up)} up a client{mean}"
    _fact(console, "per round", f"{text}; {work.cohort} clients:")
    again = f", {traffic.evaluations} evaluations at the clients included"
    whole = f"{bytes_text(traffic.total)} in the whole run{again if traffic.evaluations else ''}"
    down, up = (bytes_text(size * work.cohort) for size in (traffic.down, traffic.up))
    _fact(console, "", f"{down} down and {up} up; {whole}")
    if traffic.grows and not run.config.strategy.options.get("base_rank"):
        _fact(console, "", "what stands in the base grows in every round; strategy.options.base_rank bounds it")


def _print_steps(run: PreparedRun, work: forecast.Work, console: Console) -> None:
    least, most = min(work.per_round), max(work.per_round)
    each = count_text(least) if least == most else f"{count_text(least)} to {count_text(most)}"
    text = f"{each} a client and round, {count_text(work.total)} in {run.config.rounds} rounds"
    _fact(console, "steps", text)
    for name in run.config.evaluate.baselines:
        if name == "central_serial":
            width = max(1, round(work.total / work.serial))
            more = (
                f"{count_text(work.serial)} more, each on {count_text(width)} times the tokens: as long as the others"
            )
            _fact(console, "", f"baseline {name}: {more}")
        elif name != "base":
            _fact(console, "", f"baseline {name}: {count_text(work.total)} more")


def _print_memory(run: PreparedRun, cost: Cost, console: Console) -> None:
    what = forecast.state_bytes(run.config)[1]
    parts = (
        f"{bytes_text(forecast.base_bytes(run.lm))} base + {bytes_text(_adapter_bytes(run))} {what} + "
        f"{bytes_text(cost.trial.activation_bytes)} for {run.config.train.batch_tokens} tokens a pass"
    )
    total, there = cost.processes * cost.memory, forecast.device_bytes(run.lm.device)
    text = f"about {bytes_text(total)} of {bytes_text(there)}: {parts}"
    if cost.processes > 1:
        text += f", in {cost.processes} processes"
    _fact(console, "memory", text)
    if there is not None and total > there:
        fix = "lower train.batch_tokens (and raise train.accumulate), or use a smaller model"
        _warn(console, f"this may not fit; {fix}")


def _processes(run: PreparedRun) -> int:
    """Processes that hold the model at a time: one, or Ray's workers and the server."""
    if run.config.simulate.engine == "local":
        return 1
    simulate, cores = run.config.simulate, int(environment.machine(gpu=False)["cores"] or 1)
    workers = cores // simulate.cpus_per_client
    if simulate.gpus_per_client:
        workers = min(workers, int(torch.cuda.device_count() / simulate.gpus_per_client))
    return 1 + max(1, min(workers, len(run.corpora)))
