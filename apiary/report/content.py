"""What the report says, worked out from the results: sentences, key figures, rows of each part."""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from apiary.config import loading, summary
from apiary.config.schema import RunConfig
from apiary.core import formatting
from apiary.core.errors import UserError
from apiary.core.formatting import plural
from apiary.evaluation import intervals
from apiary.privacy import statement
from apiary.report import plots, sites
from apiary.report.aggregation import aggregation_content
from apiary.report.data import (
    MEANING,
    METHODS,
    OUTCOMES,
    Client,
    CurationPart,
    Gain,
    Metrics,
    Row,
    Traits,
    gain_on_all,
    gain_on_own,
)
from apiary.report.personal import own_content
from apiary.report.stages import stages_content
from apiary.report.verdict import (
    against,
    caveat,
    delivered,
    headline,
    nats,
    not_alike,
    outcomes_text,
    row_by_row,
    rows_text,
    second,
    value,
)
from apiary.tracking.event_log import Event

_NAMED_CLIENTS = 24  # more are summed up in a chart, and only those that gain least are named
_MIX_ROWS, _MIX_COLUMNS, _TROUBLES = 40, 14, 100
_TROUBLED = 4  # clients named in a row of refusals
_ABSOLUTE = re.compile(r'"(?:/|[A-Za-z]:\\\\)[^"]*?([^"/\\]+)[/\\]*"')


def page_content(metrics: Metrics, events: Sequence[Event], config: str) -> dict[str, Any]:
    """All that the page shows, by the names its template uses."""
    tables = _tables(config)
    run, method = _run_of(tables), _traits(events)
    start = next((event for event in events if event["event"] == "start"), {})
    metrics = sites.with_sites(metrics, events)
    own, everyone = gain_on_own(metrics), gain_on_all(metrics)
    lead = against(metrics)
    return {
        "metrics": metrics,
        "headline": headline(metrics),
        "second": " ".join(filter(None, [second(metrics), delivered(metrics)])),
        "tiles": _tiles(metrics, own, everyone),
        "rows": [_row(row, metrics.table) for row in metrics.table],
        "meaning": MEANING,
        "has_accuracy": any(row.accuracy is not None for row in metrics.table),
        "has_steps": any(row.steps is not None for row in metrics.table),
        "has_rows": any(row.rows is not None for row in metrics.table),
        "has_tokens": any(row.tokens is not None for row in metrics.table),
        "federated": metrics.row("federated"),
        "paired": [row_by_row(metrics, row) for row in metrics.table if row.method in metrics.paired and row != lead],
        "not_alike": not_alike(metrics),
        "probability": _probability(metrics),
        "n": max((row.n or 0 for row in metrics.table), default=0),
        "intervals": any(row.ci95.loss for row in metrics.table),
        "fewest": intervals.FEWEST_ROWS,
        "loss_chart": plots.loss_chart(metrics),
        "cost_chart": plots.cost_chart(metrics),
        "sites": sites.grid(metrics),
        "sites_said": sites.sentences(metrics),
        "sites_chart": plots.sites_chart(sites.told(metrics, to_the_end=True)),
        "sent": _sent(metrics),
        "own": own,
        "own_said": _gains_said(own, caveat(metrics, "local")),
        "everyone_said": outcomes_text(everyone) if everyone else "",
        "clients": _client_bars(metrics.clients, own),
        "gain_chart": plots.gain_chart(own) if own and len(own.gains) > _NAMED_CLIENTS else None,
        "own_models": own_content(metrics),
        "skills": _skills(metrics),
        "mix": _mix(metrics.clients),
        "curation": _curation(metrics.curation),
        "promise": _promise(metrics.privacy),
        "stages": stages_content(metrics.continual),
        "aggregation": aggregation_content(metrics, _method_name(tables), method),
        "outline": _outline(metrics, run),
        "sent_what": _sent_what(method, run),
        "saved": _saved(metrics, run),
        "samples": _samples(metrics),
        "before": any(sample.base is not None for sample in metrics.samples),
        "troubles": _troubles(events),
        "logged": bool(events),
        "config": _ABSOLUTE.sub(r'"…/\1"', config),
        "privacy": statement.sentence(metrics.privacy),
        "facts": [*_made(metrics, run), *_template(events, run), *_facts(metrics, start)],
    }


def _tables(config: str) -> dict[str, Any]:
    try:
        return tomllib.loads(config)
    except tomllib.TOMLDecodeError:
        return {}


def _method_name(tables: Mapping[str, Any]) -> str:
    """The method's name as it stands in the file; "" where there is none."""
    found = tables.get("strategy")
    return str(found.get("name", "")) if isinstance(found, dict) else ""


def _traits(events: Sequence[Event]) -> Traits:
    """What the log tells of the method: the newest start, for an earlier version may have begun the run."""
    told = [event["method"] for event in events if event["event"] == "start" and "method" in event]
    return Traits.model_validate(told[-1]) if told else Traits()


def _run_of(tables: dict[str, Any]) -> RunConfig | None:
    """The run's configuration; None where there is none, or one that this version refuses."""
    try:
        return loading.parse(tables) if tables else None
    except UserError:
        return None


def _outline(metrics: Metrics, run: RunConfig | None) -> str:
    if run is None:
        return ""
    grown = metrics.rank is not None and metrics.rank != run.adapter.rank
    return summary.sentence(run) + (f"; exported at rank {metrics.rank}" if grown else "")


def _made(metrics: Metrics, run: RunConfig | None) -> list[tuple[str, str]]:
    """The choices that made the model, the ranks that clients then had, and that of what is handed on."""
    exported = [("Rank of the exported adapter", str(metrics.rank))] if metrics.rank else []
    return [*(summary.facts(run) if run else []), *(_ranks(metrics.clients) if metrics.mixed else []), *exported]


def _template(events: Sequence[Event], run: RunConfig | None) -> list[tuple[str, str]]:
    """How conversations were written for the model; where the configuration says `auto`, the log says which it was."""
    told = [str(event["template"]) for event in events if event["event"] == "template" and "template" in event]
    if run is not None and run.prompt.template != "auto":
        told.append(Path(run.prompt.template).name)
    return [("Prompt template", told[-1])] if told else []


def _ranks(clients: Sequence[Client]) -> list[tuple[str, str]]:
    """Who has which rank."""
    by_rank: dict[int, list[str]] = {}
    for client in clients:
        if client.rank is not None:
            by_rank.setdefault(client.rank, []).append(client.client)
    many = len(clients) > _NAMED_CLIENTS
    who = {rank: plural(len(names), "client") if many else ", ".join(names) for rank, names in by_rank.items()}
    return [("Ranks of the clients", "; ".join(f"{rank}: {who[rank]}" for rank in sorted(by_rank)))]


def _sent_what(method: Traits, run: RunConfig | None) -> str:
    """What went both ways; where the log does not tell, its configuration does."""
    seeds = method.scalars > 0 or (run is not None and summary.seeds(run))
    return "scalars of random directions, and counts" if seeds else "weights of the adapter and counts"


def _saved(metrics: Metrics, run: RunConfig | None) -> str:
    """What a codec saved; empty where none was used."""
    sent, spared = sum(_sent(metrics)), sum(r.spared for r in metrics.rounds)
    if run is None or not summary.coded(run) or spared <= 0:
        return ""
    return (
        f"Changes travelled as {summary.wire(run)}; as float32 it would have been "
        f"{formatting.bytes_text(sent + spared)}, {(sent + spared) / sent:.1f} times as much."
    )


def _probability(metrics: Metrics) -> float | None:
    """The probability the federated model gives the right token (geometric mean): exp(-loss)."""
    row = metrics.row("federated")
    return None if row is None else math.exp(-value(row))


def _sent(metrics: Metrics) -> tuple[int, int]:
    """Bytes up and down over all rounds and evaluations."""
    return sum(r.bytes_up or 0 for r in metrics.rounds), sum(r.down for r in metrics.rounds)


def _tiles(metrics: Metrics, own: Gain | None, everyone: Gain | None) -> list[tuple[str, str, str]]:
    """The key figures: name, value, remark."""
    tiles: list[tuple[str, str, str]] = []
    joint, alone = metrics.row("federated"), against(metrics)
    others = {"local": "training alone", "start": "the start"}
    versus = others.get(alone.method if alone else "", "the untuned model")
    versus += caveat(metrics, alone.method) if alone else ""
    if joint is not None:
        remark = f"{nats(alone)} by {versus}; lower is better" if alone else "nats per token; lower is better"
        tiles.append(("Held-out loss", nats(joint), remark))
        if joint.accuracy is not None:
            before = formatting.share_text(alone.accuracy, 0) if alone and alone.accuracy is not None else None
            remark = f"{before} by {versus}" if before else "word for word"
            tiles.append(("Answers exactly right", formatting.share_text(joint.accuracy, 0), remark))
    tiles += _site_tiles(metrics)
    answered = metrics.attack.answered if metrics.attack else {}
    if "federated" in answered:
        remark = f"of questions with it; {formatting.share_text(answered.get('base'), 0)} before training"
        tiles.append(("Backdoor success rate", formatting.share_text(answered["federated"], 0), remark))
    if gain := own or everyone:
        where = "on their own tasks" if own else "on the rows of the table"
        where += f" ({rows})" if (rows := rows_text(gain)) else ""
        if everyone and own:
            where += f"; on the rows of the table {' / '.join(_outcomes(everyone))}"
        tiles.append(("Clients: gain / lose / cannot tell", " / ".join(_outcomes(gain)), where))
    if sum(_sent(metrics)):
        rounds = sum(r.round > 0 for r in metrics.rounds)
        tiles.append(
            (
                "Sent over the network",
                formatting.bytes_text(sum(_sent(metrics))),
                f"in {plural(rounds, 'round')}; no training example among it",
            )
        )
    return tiles


def _gains_said(gain: Gain | None, but: str) -> str:
    """How clients fare on their own rows, with what that rests on; `but` says what is not alike in training alone."""
    if gain is None:
        return ""
    rows = f" Each rests on the client's own rows, {rows_text(gain)}." if gain.rows else ""
    ends = gain.mean_ends
    among = "" if ends is None else f" (95% interval over clients {' to '.join(map(formatting.change_text, ends))})"
    return (
        f"with the shared model, against training alone{but}, {outcomes_text(gain)}."
        f"{rows} A client gains or loses where a 95% interval over its rows leaves out zero, {intervals.SCOPE}, and "
        f"cannot tell on fewer than {intervals.FEWEST_ROWS} rows. The mean gain is "
        f"{formatting.change_text(gain.mean)} nats per token{among}, the least {formatting.change_text(gain.worst[1])} "
        f"({gain.worst[0]})."
    )


def _outcomes(gain: Gain) -> list[str]:
    return [str(gain.count(outcome)) for outcome in OUTCOMES]


def _site_tiles(metrics: Metrics) -> list[tuple[str, str, str]]:
    """Of a deployment: the loss on the sites' own rows, at how many it fell, and how many rows they train on."""
    tiles: list[tuple[str, str, str]] = []
    rounds, moved = sites.told(metrics), sites.change(metrics)
    if rounds and not metrics.row("federated"):
        loss = rounds[-1].loss if moved is None else moved.now
        remark = "nats per token; lower is better"
        if moved is not None and moved.before is not None:
            remark = f"{formatting.loss_text(moved.before, 2)} {sites.when(moved.first)}; lower is better"
        tiles.append(("Loss on the sites' own held-out rows", formatting.loss_text(loss, 2), remark))
    if moved is not None:
        remark = "each on its own held-out rows"
        tiles.append(("Sites whose loss fell", f"{moved.fell} of {len(moved.by_site)}", remark))
    examples = [client.examples for client in metrics.clients if client.examples is not None]
    if metrics.sites is not None and examples:
        about = ", about" if any(client.counts != "exact" for client in metrics.clients) else ""
        where = f"at {plural(len(examples), 'site')}{about}"
        tiles.append(("Rows to train on", formatting.count_text(sum(examples)), where))
    return tiles


def _row(row: Row, table: Sequence[Row]) -> dict[str, Any]:
    """A row of the table with its interval's place on a common axis from zero, in percent."""
    ends = [value(r) for r in table if r.loss is not None] + [r.ci95.loss[1] for r in table if r.ci95.loss]
    top = max(ends, default=1.0) * 1.04 or 1.0
    low, high = row.ci95.loss or (row.loss, row.loss)
    place = [None if v is None else round(100 * v / top, 2) for v in (low, row.loss, high)]
    return {"row": row, "place": None if None in place else place}


def _client_bars(clients: Sequence[Client], gain: Gain | None) -> list[dict[str, Any]]:
    """Own held-out loss alone and federated; of a large cohort, the clients that gain least."""
    if gain is None:
        return []
    shown = [c for c in clients if c.client in gain.gains]
    if len(shown) > _NAMED_CLIENTS:
        shown = sorted(shown, key=lambda c: (gain.gains[c.client], c.client))[: _NAMED_CLIENTS // 2]
    pairs = [(c.client, c.own["local"] or 0.0, c.own["federated"] or 0.0) for c in shown]
    top = max((max(alone, joint) for _, alone, joint in pairs), default=0.0) or 1.0
    return [
        {
            "name": name,
            "bars": [("local", alone, 100 * alone / top), ("federated", joint, 100 * joint / top)],
            "outcome": _outcome_text(gain, name),
        }
        for name, alone, joint in pairs
    ]


def _outcome_text(gain: Gain, client: str) -> str:
    """Whether one client gains or loses, by how much, and on how many rows: `gains 0.120 (140 rows)`."""
    pair, change = gain.paired.get(client), gain.gains[client]
    rows = f" ({plural(pair.n, 'row')})" if pair is not None and pair.n is not None else ""
    match gain.outcome(client):
        case "gain":
            return f"gains {formatting.loss_text(abs(change))}{rows}"
        case "lose":
            return f"loses {formatting.loss_text(abs(change))}{rows}"
        case _:
            return f"cannot tell: {formatting.change_text(change)}{rows}"


def _skills(metrics: Metrics) -> dict[str, Any] | None:
    """Accuracy by skill and method, best federated skill first."""
    methods = [m for m in METHODS if any(row.get(m) is not None for row in metrics.skills.values())]
    if not methods:
        return None
    order = sorted(metrics.skills.items(), key=lambda item: (-(item[1].get("federated") or 0.0), item[0]))
    rows = [(name, [values.get(m) for m in methods]) for name, values in order if name]
    return {"methods": methods, "rows": rows} if rows else None


def _mix(clients: Sequence[Client]) -> dict[str, Any] | None:
    """How many examples of each kind each client holds; of many kinds, the rarest are summed."""
    totals: dict[str, int] = {}
    for client in clients:
        for kind, count in client.mix.items():
            totals[kind] = totals.get(kind, 0) + count
    if len(totals) < 2:
        return None
    frequent = sorted(totals, key=lambda kind: (-totals[kind], kind))
    many = len(frequent) > _MIX_COLUMNS
    kinds = sorted(frequent[: _MIX_COLUMNS - 1] if many else frequent)
    rows = []
    for client in clients[:_MIX_ROWS]:
        counts = [client.mix.get(kind, 0) for kind in kinds]
        counts += [sum(client.mix.values()) - sum(counts)] if many else []
        total = sum(counts) or 1
        rows.append((client, [(count, count / total) for count in counts]))
    return {
        "kinds": kinds + (["others"] if many else []),
        "rows": rows,
        "left_out": max(0, len(clients) - _MIX_ROWS),
    }


def _samples(metrics: Metrics) -> list[dict[str, Any]]:
    """Samples with their answers, marked right or wrong only where exact match was measured."""
    marked = any(row.accuracy is not None for row in metrics.table)
    samples = []
    for sample in metrics.samples:
        answers = []
        for method in METHODS:
            text: str | None = getattr(sample, method)
            if text is not None:
                right = text.split() == sample.reference.split() if marked else None
                answers.append({"method": method, "text": text, "right": right})
        shown = [a for a in answers if a["method"] in ("base", "federated")]
        folded = [a for a in answers if a not in shown]
        samples.append({"sample": sample, "shown": shown, "folded": folded})
    return samples


_LIMITED = {  # fields of a `client` event, of what did not count in full
    "capped": ("Capped", "its weight counts up to strategy.weight_cap times the median"),
    "shortened": ("Scaled down", "its change counts up to strategy.norm_guard times the median's length"),
}


def _troubles(events: Iterable[Event]) -> dict[str, Any]:
    """Refusals, limits that held, warnings and early stops, in order.

    What is said of several clients in a round stands in one row.
    """
    told: dict[tuple[str, str, str], list[str]] = {}
    for event in events:
        where = {None: "", 0: "before training"}.get(number := event.get("round"), f"round {number}")
        client, reason = str(event.get("client") or ""), str(event.get("reason", ""))
        match event["event"]:
            case "refused":
                told.setdefault((where or "handshake", "Refused", reason), []).append(client)
            case "warning":
                told.setdefault((where, "Warning", str(event.get("message", ""))), []).append(client)
            case "stop":
                told.setdefault((where, "Stopped", reason), []).append("")
            case "client":
                for field, (what, why) in _LIMITED.items():
                    if field in event:
                        told.setdefault((where, what, why), []).append(client)
    rows = [(where, what, _some(clients), why) for (where, what, why), clients in told.items()]
    return {"rows": rows[:_TROUBLES], "left_out": max(0, len(rows) - _TROUBLES)}


def _some(names: Sequence[str]) -> str:
    """A few names, and how many more there are."""
    named = list(dict.fromkeys(filter(None, names)))
    more = len(named) - _TROUBLED
    return ", ".join(named[:_TROUBLED]) + (f" and {more} more" if more > 0 else "")


def _curation(curation: Mapping[str, CurationPart]) -> dict[str, Any] | None:
    """Rows that each step dropped at each client; of many clients all are summed up in the last row."""
    if not curation:
        return None
    steps = list(dict.fromkeys(step for client in curation.values() for step in client.dropped))
    rows = [(name, c.rows, [c.dropped.get(step, 0) for step in steps], c.kept) for name, c in curation.items()]
    totals = [sum(c.dropped.get(step, 0) for c in curation.values()) for step in steps]
    everything, kept = (sum(values) for values in zip(*((c.rows, c.kept) for c in curation.values()), strict=True))
    return {"steps": steps, "rows": rows[:_NAMED_CLIENTS], "total": ("All", everything, totals, kept)}


def _promise(privacy: Mapping[str, Any]) -> dict[str, Any] | None:
    """The account of a private run, client by client, the worst-off first."""
    clients = privacy.get("clients")
    if privacy.get("unit", "none") == "none" or not clients:
        return None
    worst_first = sorted(clients.items(), key=lambda item: (-item[1]["epsilon"], item[0]))
    return {**privacy, "clients": worst_first[:_NAMED_CLIENTS]}


def _facts(metrics: Metrics, start: Event) -> list[tuple[str, str]]:
    """What it ran on and with: name, value."""
    machine = metrics.machine or start.get("machine") or {}
    versions = metrics.versions or start.get("versions") or {}
    facts: list[tuple[str, Any]] = [
        ("Processor", machine.get("cpu")),
        ("Cores", machine.get("cores")),
        (
            "Memory",
            formatting.bytes_text(machine["memory_bytes"]) if machine.get("memory_bytes") else None,
        ),
        ("GPU", machine.get("gpu")),
        ("System", machine.get("system")),
        ("Duration", formatting.seconds_text(metrics.seconds) if metrics.seconds else None),
        *((str(name), version) for name, version in versions.items()),
        ("Commit", start.get("commit")),
        ("Configuration", start.get("config_digest")),
        ("Seed", start.get("seed")),
    ]
    return [(name, str(value)) for name, value in facts if value is not None]
