"""Writes the tables of the README, the docs and the base's card between their markers.

They come from the committed results; the tables of what goes together, of the aggregation methods and of the shapes of
rows come from the code that decides it.

python benchmarks/tables.py [--check]
"""

from __future__ import annotations

import functools
import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_ASKED = 280  # letters of a question or an answer that is shown
_NONE = "*No measurement is committed yet.*"
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # another package is called benchmarks too

from apiary.core.counts import rounded  # noqa: E402
from benchmarks import deployment_tables, methods, shapes, together  # noqa: E402
from benchmarks import own_models as ways  # noqa: E402
from benchmarks.personal import CASES, summary  # noqa: E402
from benchmarks.soak import table as soak_table  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
TINY = ROOT / "apiary" / "models" / "tiny" / "checkpoint"
PAGES = (ROOT / "README.md", TINY / "README.md", *sorted((ROOT / "docs").glob("*.md")))


def demo(results: dict[str, Any]) -> str:
    """The default run: mean over seeds of each row, on everybody's rows and on the clients' own."""
    runs = results["runs"]
    lines = ["| | loss on everybody's held-out rows | on the clients' own | exact match |", "|---|---|---|---|"]
    names = {
        "base": "`base`: untuned",
        "local": "`local`: each client alone, same steps",
        "local_best": "each client alone at its best, with up to twice the steps",
        "federated": "`federated`",
        "personal": "each client's own model, with up to twice the steps",
        "central": "`central`: all data in one place, same total steps",
        "central_serial": "`central_serial`: all data in one place, as few steps as one client makes",
    }
    for method, label in names.items():
        rows = [row for run in runs for row in run["table"] if row["method"] == method]
        own = [row for run in runs for row in run["personal"]["table"] if row["method"] == method]
        losses = [row["loss"] for row in rows] or [row["mix"] for row in own if "mix" in row]
        cells = (
            _spread(losses, 1, 2) if losses else "",
            _spread([row["own"] for row in own], 1, 2) if own else "",
            f"{_spread([row['accuracy'] for row in rows], 100, 0)}%" if rows else "",
        )
        lines.append(f"| {label} | {' | '.join(cells)} |")
    wall = _spread([run["wall_s"] for run in runs], 1, 0)
    taken = "".join(
        f", {statistics.mean(run['baselines_s'][name] for run in runs):.0f} s of it for `{name}`"
        for name in runs[0].get("baselines_s", ())
    )
    taken += f", {statistics.mean(run['personal_s'] for run in runs):.0f} s for own models"
    found = f"From command to report: {wall} s on {_machine(results)}{taken}."
    return "\n".join([*lines, "", " ".join([_seeds(len(runs)), *_over_seeds(results), found])])


def _over_seeds(results: dict[str, Any]) -> list[str]:
    """What the runs of all seeds say together; nothing of results that were not compared so."""
    if "compared" not in results:
        return []
    pair, runs = results["compared"]["paired"]["local"], results["runs"]
    low, high = pair["ci95"]
    counts = ("gain", "lose", "cannot_tell")
    shared, own = (
        ", ".join(f"{sum(found[name] for found in told)} {name.replace('_', ' ')}" for name in counts)
        for told in ([run["gain"] for run in runs], [run["personal"]["gain"] for run in runs])
    )
    return [
        f"`federated` less `local`: {pair['difference']:.2f} (95% interval over seeds and rows {low:.2f} to "
        f"{high:.2f}).",
        f"Of {sum(run['gain']['clients'] for run in runs)} clients of all seeds, each on its own held-out rows: by the "
        f"federated model against alone in the same steps {shared}; by its own model against alone at its best {own}.",
    ]


def clients(results: dict[str, Any]) -> str:
    """Time per message and peak memory by number of clients and engine."""
    lines = [
        "| virtual clients | asked | engine | ms per client message | seconds with start and handshakes "
        "| peak memory of the server's process |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['clients']:,} | {row['asked']:,} | {row['engine']} | {row['ms_per_message']:.0f} "
        f"| {row['whole_run_s']:.0f} | {row['peak_driver_bytes'] / 2**20:,.0f} MiB |"
        for row in results["rounds"]
    ]
    by = {(row["clients"], row["engine"]): row["ms_per_message"] for row in results["rounds"]}
    ratios = ", ".join(
        f"{by[count, 'ray'] / by[count, 'local']:.1f} times as long for {count}"
        for count, engine in by
        if engine == "ray"
    )
    loads = [row["load"] for row in results["rounds"]]
    note = "Ray has a worker on each core, where `local` is one process"
    return "\n".join(
        [
            *lines,
            "",
            f"A message takes Ray {ratios} clients: {note}. Measured {_beside(max(loads))}, on {_machine(results)}.",
        ]
    )


def _beside(load: float) -> str:
    """What else the machine did, by its load average; what is measured makes one of it by itself."""
    return "with nothing else running" if load < 2 else f"beside other work (load {load:.0f})"


def message(results: dict[str, Any]) -> str:
    """What a message costs, part by part, as processor time and beside its one step."""
    names = {
        "decode": "decode the adapter, and at the server the change",
        "set": "write the adapter into the model",
        "plan": "plan the batches, take one",
        "encode": "encode the change",
        "check": "check the change at the server",
        "fold": "fold it into the sums, and into the gauge of the averaging error",
        "log": "write the event",
        "disk": "read and write what the client keeps",
        "rest": "all else: Flower's messages, the client's rows, the optimizer's state",
    }
    found = results["parts"]
    step = found["ms"]["step"]
    lines = ["| part | ms | beside the step |", "|---|---|---|", f"| one step of one short row | {step:.1f} | 100% |"]
    lines += [f"| {text} | {found['ms'][part]:.1f} | {found['ms'][part] / step:.0%} |" for part, text in names.items()]
    beside = found["ms_beside_step"]
    return "\n".join(
        [
            *lines,
            f"| beside the step, together | {beside:.1f} | {beside / step:.0%} |",
            "",
            f"Processor time of one thread, the least of five rounds of {found['clients']} clients; a round costs "
            f"{found['ms_once_a_round']:.0f} ms more for the step of the server and the checkpoint. Measured "
            f"{_beside(found['load'])}, on {_machine(results)}.",
        ]
    )


def clients_run(results: dict[str, Any]) -> str:
    """A whole run of many clients."""
    run, mib = results["run"], 2**20
    rounds = [size / mib for name, size in run["resident_bytes"].items() if name.startswith("round ")]
    sizes, taken, before = run["file_bytes"], [], 0
    for name, held in results["imports"]["resident_bytes"].items():
        taken.append(f"`{name.partition('.')[0]}` {(held - before) / mib:.0f}")
        before = held
    return (
        f"{run['clients']:,} clients, {run['rounds']} rounds, half of them away and 5% failing in each: "
        f"{run['wall_s'] / 60:.1f} minutes, {run['cpu_s'] / 60:.1f} of the processor's, {_beside(run['load'])}. "
        f"Memory after a round: {min(rounds):.0f} to {max(rounds):.0f} MiB; at most "
        f"{run['peak_bytes'] / mib:.0f} MiB. `report.html` has {sizes['report.html'] / 1e6:.1f} MB, `metrics.json` "
        f"{sizes['metrics.json'] / 1e6:.1f}, `log.jsonl` {sizes['log.jsonl'] / 1e6:.1f}.\n\nMiB that imports alone "
        f"take, one after the other: {', '.join(taken)}; a simulation does not import the last. On {_machine(results)}."
    )


def training(results: dict[str, Any]) -> str:
    """Ratios against TRL."""
    return str(results["readme"])


def base(results: dict[str, Any]) -> str:
    """The built-in base: loss by kind of document, and what it answers when tuned."""
    tuned = results["tuned"]
    lines = ["| kind | loss |", "|---|---|"]
    lines += [f"| {kind.replace('_', ' ')} | {loss:.2f} |" for kind, loss in results["losses"].items()]
    skills = sorted(tuned["skills"].items(), key=lambda item: -item[1])
    said = ", ".join(f"{skill} {100 * accuracy:.0f} %" for skill, accuracy in skills)
    lines += [
        "",
        f"Tuned with LoRA on all skills pooled (rank {tuned['rank']}, {tuned['steps']} steps of "
        f"{tuned['rows_per_step']} rows, rate {tuned['lr']:g}) it answers {100 * tuned['accuracy']:.0f} % of "
        f"{tuned['n']} held-out rows exactly: {said}. One run (`benchmarks/base.py`), on {_machine(results)}.",
    ]
    return "\n".join(lines)


def continual(results: dict[str, Any]) -> str:
    """One stage after the other, with replay, and all tasks at once."""
    names = {
        "sequential": "one stage after the other",
        "replay": "with a tenth of the rows kept and replayed",
        "joint": "all tasks at once",
    }
    lines = [
        "| | exact match, all tasks | loss | backward transfer, points | forgetting, points |",
        "|---|---|---|---|---|",
    ]
    for way, label in names.items():
        runs = [run for run in results["runs"] if run["way"] == way]
        right, loss = ([run["federated"][key] for run in runs] for key in ("accuracy", "loss"))
        parts = [
            _spread([run[key]["accuracy"] for run in runs], 100, 0) if key in runs[0] else ""
            for key in ("stage_backward_transfer", "stage_forgetting")
        ]
        lines.append(f"| {label} | {_spread(right, 100, 0)}% | {_spread(loss, 1, 2)} | {' | '.join(parts)} |")
    return _noted(lines, results, "Every way makes the same number of steps of the same number of tokens.")


def curation(results: dict[str, Any]) -> str:
    """What a federation is worth on clean, spoiled and curated rows."""
    names = {
        "clean": "the rows as they were",
        "spoiled": "two fifths of them spoiled",
        "random": "spoiled, then as many rows at random as curation keeps",
        "curated at once": "spoiled, then curated, from the first round on",
        "curated": "spoiled, then curated, IFD after three rounds",
        "oracle": "spoiled, then all bad rows removed by an oracle",
    }
    lines = ["| | held-out loss | exact match |", "|---|---|---|"]
    for name, label in names.items():
        if not all(name in run["runs"] for run in results["runs"]):
            continue
        rows = [run["runs"][name] for run in results["runs"]]
        loss, right = ([row[key] for row in rows] for key in ("loss", "accuracy"))
        lines.append(f"| {label} | {_spread(loss, 1, 2)} | {_spread(right, 100, 0)}% |")
    again = results["runs"][0]["every"]
    return _noted(lines, results, f"All in the same number of steps; curated again every {again} rounds.")


def masking(results: dict[str, Any]) -> str:
    """What of personal details is masked, and what else is."""
    lines = ["| details of our own making | found | of |", "|---|---|---|"]
    lines += [f"| {way} | {100 * row['share']:.2f}% | {row['n']:,} |" for way, row in results["found"].items()]
    lines += ["", "| no details | masked all the same | of |", "|---|---|---|"]
    lines += [
        f"| {kind} | {100 * row['share']:.2f}% | {row['n']:,} |" for kind, row in results["taken_wrongly"].items()
    ]
    below = results["regions_below_99"]
    lines += [
        "",
        "Phone numbers of all regions of phonenumbers, in its own formats, each with its own region named; "
        f"regions with less than 99%: {', '.join(below) or 'none'} (`benchmarks/masking.py`, on {_machine(results)}).",
    ]
    return "\n".join(lines)


def judges(results: dict[str, Any]) -> str:
    """Which bad rows curation finds, by who judges."""
    kinds = {
        "shuffled": "another row's answer",
        "duplicate": "copy",
        "near_duplicate": "near copy",
        "truncated": "half the answer",
    }
    lines = [
        f"| the judge | {' | '.join(kinds.values())} | of what is dropped, bad | clean rows lost |",
        "|---|---|---|---|---|---|---|",
    ]
    names = {"untuned": "the untuned base", "tuned": "after a run on the spoiled rows"}
    for judge, label in names.items():
        found = [run["caught"][judge] for run in results["runs"]]
        cells = [_spread([f["recall"][kind] for f in found], 100, 0) for kind in kinds]
        cells += [_spread([f[key] for f in found], 100, 0) for key in ("precision", "clean_lost")]
        lines.append(f"| {label} | {' | '.join(f'{cell}%' for cell in cells)} |")
    return _noted(lines, results)


def privacy(results: dict[str, Any]) -> str:
    """What a promise costs in loss and in answers."""
    methods = dict.fromkeys(run["method"] for run in results["runs"])
    names = {"base": "untuned", "not private": "no privacy", "no noise": "drawn and clipped, but no noise"}
    lines = ["| | held-out loss | exact match | noise over clip |", "|---|---|---|---|"]
    for method in methods:
        runs = [run for run in results["runs"] if run["method"] == method]
        right = [run["accuracy"] for run in runs if run["accuracy"] is not None]
        cells = [_spread([run["loss"] for run in runs], 1, 2), f"{_spread(right, 100, 0)}%" if right else ""]
        known = [run["noise_multiplier"] for run in runs if run.get("noise_multiplier") is not None]
        cells.append(f"{statistics.mean(known):.2f}" if known else "")
        lines.append(f"| {names.get(method, method)} | {' | '.join(cells)} |")
    set_to, private = results["settings"], results["settings"]["privacy"]
    return _noted(
        lines,
        results,
        f"{set_to['clients']} clients, {set_to['rounds']} rounds, {private['batch_rows']} rows expected in a step, "
        f"delta {private['delta']:g}.",
    )


def aggregation_error(results: dict[str, Any]) -> str:
    """How far each method ends from the mean of the products, by drift and skew."""
    if "error" not in results:
        return _NONE
    rows = results["error"]
    drifts, skews = (list(dict.fromkeys(row[key] for row in rows)) for key in ("drift", "skew"))
    lines: list[str] = []
    for kind, title in (("one", "one rank, 16"), ("mixed", "ranks 2, 4, 8, 16")):
        if lines:
            lines.append("")
        lines += [
            f"| {title} | {' | '.join(f'drift {drift:g}' for drift in drifts)} |",
            "|---" * (len(drifts) + 1) + "|",
        ]
        for method in dict.fromkeys(row["method"] for row in rows if row["ranks"] == kind):
            known = {(r["drift"], r["skew"]): r["error"] for r in rows if (r["ranks"], r["method"]) == (kind, method)}
            cells = [" / ".join(_percent(known[drift, skew]) for skew in skews) for drift in drifts]
            lines.append(f"| {method} | {' | '.join(cells)} |")
    note = f"Percent, for a skew of {' / '.join(f'{skew:g}' for skew in skews)}. Mean over 3 seeds, 8 clients."
    return "\n".join([*lines, "", note])


def _percent(share: float) -> str:
    return "0" if share < 5e-6 else f"{100 * share:.2g}" if share < 1 else f"{100 * share:.0f}"


def aggregation_module(results: dict[str, Any]) -> str:
    """Time and memory of one module by rank, and what the dense decomposition takes."""
    if "module" not in results:
        return _NONE
    rows, dense = results["module"], results["dense"]
    ranks = list(dict.fromkeys(row["rank"] for row in rows))
    lines = [f"| ms / MiB | {' | '.join(f'rank {rank}' for rank in ranks)} |", "|---" * (len(ranks) + 1) + "|"]
    for method in dict.fromkeys(row["method"] for row in rows):
        own = {row["rank"]: row for row in rows if row["method"] == method}
        cells = [f"{own[rank]['ms']:,.0f} / {own[rank]['working_bytes'] / 2**20:,.0f}" for rank in ranks]
        lines.append(f"| `{method}` | {' | '.join(cells)} |")
    return "\n".join(
        [
            *lines,
            "",
            f"At rank {dense['rank']} the dense singular value decomposition of FlexLoRA's authors takes "
            f"{dense['dense_s']:.1f} s for this one module, by QR of the factors it takes {dense['qr_s']:.2f} s: "
            f"{dense['times_faster']:.0f} times faster, and the products differ by {dense['relative_difference']:.0e} "
            f"of their norm. Medians of 3, on {_machine(results)}.",
        ]
    )


def aggregation_memory(results: dict[str, Any]) -> str:
    """Peak memory of the methods that are sums."""
    if "memory" not in results:
        return _NONE
    rows = results["memory"]
    counts = list(dict.fromkeys(row["updates"] for row in rows))
    lines = [f"| | {' | '.join(f'{count:,} updates' for count in counts)} |", "|---" * (len(counts) + 1) + "|"]
    for method in dict.fromkeys(row["method"] for row in rows):
        peaks = [row["peak_bytes"] / 2**20 for row in rows if row["method"] == method]
        lines.append(f"| `{method}` | {' | '.join(f'{peak:,.0f} MiB' for peak in peaks)} |")
    size = rows[0]["update_bytes"] / 1e6
    note = f"Highest resident size of a process that folds in updates of {size:.0f} MB as they come."
    return "\n".join([*lines, "", note])


def aggregation_round(results: dict[str, Any]) -> str:
    """Seconds of a round of a 7B model."""
    if "round" not in results:
        return _NONE
    lines = ["| | s while answers come | s after the last one |", "|---|---|---|"]
    names = {
        row["method"]: f"`{row['method']}`" if " " not in row["method"] else row["method"] for row in results["round"]
    }
    lines += [f"| {names[row['method']]} | {row['fold_s']:.1f} | {row['finish_s']:.1f} |" for row in results["round"]]
    layers = results["round"][0]["layers"]
    size = "224 modules" if layers == 32 else f"{layers} of 32 layers"
    return "\n".join([*lines, "", f"{size}, rank 16, 16 clients; on {_machine(results)}."])


def audit(results: dict[str, Any]) -> str:
    """What attacks on one client's updates find, by budget."""
    runs = results["runs"]
    budgets = list(dict.fromkeys(run["budget"] for run in runs))
    names = ["no privacy" if budget == "none" else f"epsilon {budget}" for budget in budgets]
    lines = [f"| | by chance | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    last = max(run["rounds"] for run in runs)

    def add(label: str, chance: str, cell: Callable[[list[dict[str, Any]]], str]) -> None:
        cells = [cell([run for run in runs if run["budget"] == budget]) for budget in budgets]
        lines.append(f"| {label} | {chance} | {' | '.join(cells)} |")

    def member(attack: str, updates: int, key: str, scale: float, digits: int) -> Callable[..., str]:
        def cell(runs: list[dict[str, Any]]) -> str:
            rows = [row for run in runs for row in run["membership"]]
            return _hull([r[key] for r in rows if (r["attack"], r["updates"]) == (attack, updates)], scale, digits)

        return cell

    for updates, told in ((1, "the first update"), (last, f"{last} updates")):
        for attack, by in (("loss", f"loss, {told}"), ("update", f"direction of {told}")):
            add(f"membership by the {by}: AUC", "0.50", member(attack, updates, "auc", 1, 2))
            found = member(attack, updates, "true_positives", 100, 0)
            add(f"membership by the {by}: rows found at 1% false positives, %", "1", found)
    for copies in [row["copies"] for row in runs[0]["exposure"]]:
        times = "once" if copies == 1 else f"{copies} times"
        chosen = functools.partial(_of_each, part="exposure", key="copies", value=copies)
        add(
            f"exposure of a secret planted {times}, median, bits of 8",
            "1.0",
            lambda runs, chosen=chosen: _hull([row["median"] for row in chosen(runs)], 1, 1),
        )
    for rows in [row["rows"] for row in runs[0]["inversion"]]:
        chosen = functools.partial(_of_each, part="inversion", key="rows", value=rows)
        add(
            f"tokens read from one gradient of {rows} row{'s' * (rows > 1)}, median, %, against others' gradients",
            "",
            lambda runs, chosen=chosen: (
                f"{_hull([row['recovered'] for row in chosen(runs)], 100, 0)} against "
                f"{100 * statistics.mean(row['chance'] for row in chosen(runs)):.0f}"
            ),
        )
    add("epsilon is at least (95%)", "0", lambda runs: _spread([r["lower_bound"]["epsilon"] for r in runs], 1, 2))
    add(
        "epsilon that is claimed",
        "",
        lambda runs: _spread([r["claim"]["epsilon"] for r in runs], 1, 2) if runs[0]["claim"] else "",
    )
    return "\n".join([*lines, "", f"{_audited(results, last)} On {_machine(results)}."])


def _of_each(runs: list[dict[str, Any]], part: str, key: str, value: int) -> list[dict[str, Any]]:
    return [row for run in runs for row in run[part] if row[key] == value]


def _hull(figures: list[dict[str, Any]], scale: float, digits: int) -> str:
    """The mean over runs, with the lowest and the highest end of the runs' own intervals."""
    value = f"{scale * statistics.mean(figure['value'] for figure in figures):.{digits}f}"
    ends = [[figure[key] for figure in figures] for key in ("low", "high")]
    if None in (*ends[0], *ends[1]):
        return value
    return f"{value} [{scale * min(ends[0]):.{digits}f}, {scale * max(ends[1]):.{digits}f}]"


def _audited(results: dict[str, Any], last: int) -> str:
    """What the figures of the audits are of, and what their brackets are."""
    runs = results["runs"]
    members = [row for run in runs for row in run["membership"]]
    inside, out = (f"{min(r[key] for r in members)} to {max(r[key] for r in members)}" for key in ("members", "others"))
    passed = [row["false_positives"] for row in members]
    low, high = 100 * min(each["low"] for each in passed), 100 * max(each["high"] for each in passed)
    secrets, batches = len(runs[0]["exposure"][0]["bits"]), runs[0]["inversion"][0]["trials"]
    rows, canaries = (
        " to ".join(map(str, sorted({min(each), max(each)})))
        for each in ([run["rows"] for run in runs], [run["lower_bound"]["canaries"] for run in runs])
    )
    return (
        f"Mean over {len({run['seed'] for run in runs})} seeds. Square brackets: the lowest and the highest end of the "
        f"95% intervals that each seed's run has of its own. {inside} rows in and {out} out; the threshold that lets "
        f"1% of those through lets {low:.1f} to {high:.1f}% of all others through (95%). {secrets} secrets of each "
        f"kind and {batches} batches of each size in a run. Round brackets: range over seeds. One client of 6 with "
        f"{rows} rows, {last} visits of 3 steps, rank 4; {canaries} canaries. Each audit took "
        f"{_spread([run['seconds'] for run in runs], 1, 0)} s, {results['settings']['jobs']} at a time."
    )


_CODED = ("fedavg", "bf16", "int8", "int4", "top 1% up", "top 10% up", "ffa", "alternating")
_MIXED, _SGD = "mixed ranks: ", ("fedavg, SGD", "scaffold, SGD")
_PERSONAL = "each client its own B"
_CODED_MORE = (
    "top 10% down",
    "top 1% down",
    "int4 up, int8 down",
    "int4 up, without feedback",
    "ffa, int8",
    "alternating, int8",
)


def federated(results: dict[str, Any]) -> str:
    """The methods on one federation, where all clients have one rank."""
    others = (*_CODED[1:6], *_CODED_MORE, *_SGD, _PERSONAL)
    return _ways(results, lambda way: way not in others and not way.startswith(_MIXED))


def mixed(results: dict[str, Any]) -> str:
    """The same for clients of several ranks."""
    return _ways(results, lambda way: way == "fedavg" or way.startswith(_MIXED))


def corrected(results: dict[str, Any]) -> str:
    """SCAFFOLD and what it corrects."""
    return _ways(results, lambda way: way in _SGD, "fedavg, SGD")


def personal(results: dict[str, Any]) -> str:
    """What the clients' own rows say of models of their own."""
    lines = ["| | loss on the clients' own held-out rows | on everybody's |", "|---|---|---|"]
    rows = {way: results["summary"][way] for way in ("fedavg", _PERSONAL)}
    lines += [f"| {way} | {_spread(row['own'], 1, 3)} | {_spread(row['loss'], 1, 3)} |" for way, row in rows.items()]
    return "\n".join([*lines, "", f"{_seeds(len(rows['fedavg']['own']))} On {_machine(results)}."])


def codecs(results: dict[str, Any]) -> str:
    """What each codec weighs and loses, and how long it takes."""
    lines = ["| codec | bytes an entry | MB | relative squared error | s to code, to decode |", "|---|---|---|---|---|"]
    for row in results["rows"]:
        options = ", ".join(f"{key} = {json.dumps(value)}" for key, value in row["options"].items())
        lines.append(
            f"| `{row['codec']}`{', ' if options else ''}{options} | {row['bytes'] / results['entries']:.2f} "
            f"| {row['bytes'] / 1e6:.1f} | {row['error']:.1e} | {row['encode_s']:.1f}, {row['decode_s']:.1f} |"
        )
    note = f"A Gaussian change of {results['entries']:,} entries; one thread of {_machine(results)}."
    return "\n".join([*lines, "", note])


def coded(results: dict[str, Any]) -> str:
    """What travels, coded or by halves, on one federation."""
    return _ways(results, lambda way: way in (*_CODED, *_CODED_MORE))


def coded_few(results: dict[str, Any]) -> str:
    """The most telling of them."""
    return _ways(results, lambda way: way in _CODED)


def dolly(results: dict[str, Any]) -> str:
    """Methods and codecs on real instructions, with a tiny model."""
    return _ways(results, lambda way: True)


def _ways(results: dict[str, Any], wanted: Callable[[str], bool], against: str = "fedavg") -> str:
    """A table for each number of seeds; differences are to the way `against`, seed by seed."""
    found = {way: row for way, row in results["summary"].items() if wanted(way)}
    first = results["summary"][against]
    counts = sorted({row["seeds"] for row in found.values()}, reverse=True)
    lines: list[str] = []
    for count in counts:
        # The same seeds in each row of a table, or its means could not be compared.
        same = {key: value[:count] if isinstance(value, list) else value for key, value in first.items()}
        rows = {against: same, **{way: row for way, row in found.items() if row["seeds"] == count and way != against}}
        if len(rows) > 1:
            title = [] if count == counts[0] else ["", "The first seed alone:" if count == 1 else f"{count} seeds:", ""]
            lines += [*title, *_way_rows(rows, against)]
    note = (
        f"{_seeds(counts[0])} Equal bytes: those of half of the rounds of `{against}`. That loss: the one of "
        f"`{against}` after two thirds of its rounds. Rank: of the adapter that is exported. Bytes are those of "
        "training: a run that also measures on its clients' own rows, as by default, sends as much down again, unless "
        f"`wire.down` names a codec. On {_machine(results)}."
    )
    return "\n".join([*lines, "", note])


def _way_rows(rows: dict[str, dict[str, Any]], against: str) -> list[str]:
    figures = ("exact match", "MB in all", "loss at equal bytes", "MB to that loss", "rank")
    lines = [f"| | held-out loss | less `{against}` | {' | '.join(figures)} |", "|---" * 8 + "|"]
    for way, row in rows.items():
        reached = [sent / 1e6 for sent in row["to_target"] if sent is not None]
        equal = [loss for loss in row["at_equal_bytes"] if loss is not None]
        cells = [
            _spread(row["loss"], 1, 3),
            _spread(row["difference"], 1, 3) if way != against else "",
            f"{_spread(row['accuracy'], 100, 0)}%" if row["accuracy"][0] is not None else "not asked",
            f"{row['bytes'] / 1e6:.1f}",
            _spread(equal, 1, 2) if equal else "not one round fits",
            _spread(reached, 1, 0) if len(reached) == len(row["to_target"]) else "not reached",
            str(row["rank"]),
        ]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return lines


def poisoning(results: dict[str, Any]) -> str:
    """For each seed and share of attackers: loss by method and attack, and how often a trigger works.

    Seeds stand apart, for not every cell was measured with each, and means of other seeds could not be compared.
    """
    runs = results["runs"]
    tables = sorted({(run["seed"], run["share"]) for run in runs if run["share"]})
    lines = [line for seed, share in tables for line in _poisoned([r for r in runs if r["seed"] == seed], share)]
    note = (
        f"{results['settings']['clients']} clients, {results['settings']['rounds']} rounds. Held-out loss, nats per "
        "response token; in brackets how many of the questions with the hidden phrase get the attacker's answer. "
        f"* more attackers than the method can be told of with so many clients. On {_machine(results)}."
    )
    return "\n".join([*lines, note])


def _poisoned(runs: list[dict[str, Any]], share: float) -> list[str]:
    """The table of one share of attackers, of the runs of one seed."""
    attacks = list(dict.fromkeys(run["attack"] for run in runs if run["share"] == share))
    found = {(run["method"], run["attack"]): run for run in runs if run["share"] in (0.0, share)}
    lines = [
        f"{share:.0%} of the clients attack, seed {runs[0]['seed']}:",
        "",
        f"| | nobody attacks | {' | '.join(attack.replace('_', ' ') for attack in attacks)} |",
        "|---" * (len(attacks) + 2) + "|",
    ]
    for method in dict.fromkeys(run["method"] for run in runs if run["share"] == share):
        cells = [_attacked(found.get((method, attack))) for attack in ("none", *attacks)]
        lines.append(f"| `{method.replace('+', '`, `')}` | {' | '.join(cells)} |")
    return [*lines, ""]


def limits(results: dict[str, Any]) -> str:
    """What each attack does to plain averaging with the default limits, beside the same without them."""
    runs, settings = results["runs"], results["settings"]
    alone = {run["seed"]: run["loss"] for run in runs if run["attack"] == "none"}
    bare = json.loads((RESULTS / "poisoning.json").read_text())["runs"]
    share = max(run["share"] for run in runs)
    without = {
        run["attack"]: run
        for run in bare
        if run["method"] == "fedavg" and run["seed"] == 0 and run["share"] in (0.0, share)
    }
    hostile = round(share * settings["clients"]) * settings["rounds"]
    lines = [
        "| | without limits, seed 0 | with them | more than with nobody | of the attackers' visits refused "
        "| phrase obeyed |",
        "|---" * 6 + "|",
    ]
    for attack in dict.fromkeys(run["attack"] for run in runs):
        own = [run for run in runs if run["attack"] == attack]
        kept = [run for run in own if "failed" not in run]
        told = [run["success"] for run in kept if run["success"] is not None]
        cells = [
            _attacked(without.get(attack)),
            _spread([run["loss"] for run in kept], 1, 2) if kept else "the run ends",
            _spread([run["loss"] - alone[run["seed"]] for run in kept], 1, 2) if kept and attack != "none" else "",
            f"{_spread([run['refused'] / hostile for run in kept], 100, 0)}%" if kept and attack != "none" else "",
            f"{_spread(told, 100, 0)}%" if told else "",
        ]
        lines.append(f"| {'nobody attacks' if attack == 'none' else attack.replace('_', ' ')} | {' | '.join(cells)} |")
    note = (
        f"`fedavg`, {settings['clients']} clients of which {share:.0%} attack, {settings['rounds']} rounds. Held-out "
        "loss, nats per response token. A line without a range is of seed 0 alone."
    )
    return _noted(lines, results, note)


def _attacked(run: dict[str, Any] | None) -> str:
    """One cell: what became of an attack on a method."""
    if run is None:
        return ""
    mark = "" if run["within"] else "*"
    if "failed" in run:
        return f"the run fails{mark}"
    if run["loss"] is None:
        return f"not a number{mark}"
    told = f" [{run['success']:.0%}]" if run["attack"].startswith("trigger") else ""
    return f"{run['loss']:.2f}{told}{mark}"


def honest(results: dict[str, Any]) -> str:
    """How near honest clients come to the limits, by setting."""
    lines = [
        "| | change over the usual one, limit 5 | of what the optimizer can do | weight over the usual one, counted up "
        "to 3 | loss over the limit | scaled down | capped | refused |",
        "|---" * 8 + "|",
    ]
    runs = results["runs"]
    for way in dict.fromkeys(run["way"] for run in runs):
        own = [run for run in runs if run["way"] == way]
        known = [run["reach"] for run in own if run["reach"] is not None]
        counts = [
            str(total) if (total := sum(run[key] for run in own)) else "" for key in ("shortened", "capped", "refused")
        ]
        cells = [
            f"{most:.2f}" if (most := max(run["length"] for run in own)) else "no median",
            f"{max(known):.2f}" if known else "not known",
            f"{most:.1f}" if (most := max(run["weight"] for run in own)) else "no median",
            f"{max(run['loss'] for run in own):.2f}",
            *counts,
        ]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    visits = sum(run["visits"] for run in runs)
    seeds = len({run["seed"] for run in runs})
    note = f"{visits} visits in {len(runs)} runs, {seeds} seed{'s' if seeds > 1 else ''}; the most of each."
    return "\n".join([*lines, "", f"{note} On {_machine(results)}."])


def rows_alone(results: dict[str, Any]) -> str:
    """What it costs that each row passes alone, and what rows that share a batch move of each other."""
    lines = [
        "| | moved beyond the row's own gradient: one batch | alone | ms a row: one batch | alone | alone takes |",
        "|---|---|---|---|---|---|",
    ]
    for run in results["runs"]:
        moved, times = run["beyond"], run["seconds_a_row"]
        lines.append(
            f"| {run['dtype']} | {moved['shared']:.1g} | {moved['alone']:.1g} | {1000 * times['shared']:.0f} | "
            f"{1000 * times['alone']:.0f} | {run['ratio']:.1f} times as long |"
        )
    note = (
        f"In clipping norms, the most of 8 rows blanked in turn; {results['runs'][0]['rows']} rows of the built-in "
        f"corpus, the built-in base, rank 16, {results['threads']} thread; one batch by Opacus. On "
        f"{_machine(results)}, which others used too."
    )
    return "\n".join([*lines, "", note])


def intervals(results: dict[str, Any]) -> str:
    """False 'clear' differences by method of the interval and number of rows: the mean over pairs of models."""
    rows = results["rows"]
    methods = [key for key in rows[0] if key not in ("pair", "rows")]
    real = [pair for pair in dict.fromkeys(row["pair"] for row in rows) if not pair.startswith("made up")]
    lines = [f"| rows | {' | '.join(methods)} |", "|---" * (len(methods) + 1) + "|"]
    for n in dict.fromkeys(row["rows"] for row in rows):
        cells = []
        for method in methods:
            wrong = {row["pair"]: 100 * sum(row[method][:2]) for row in rows if row["rows"] == n}
            own = [wrong[pair] for pair in real]
            (made_up,) = (share for pair, share in wrong.items() if pair not in real)
            cells.append(f"{statistics.mean(own):.1f} ({min(own):.1f} to {max(own):.1f}); {made_up:.1f}")
        lines.append(f"| {n} | {' | '.join(cells)} |")
    (two, pairs), (three, triples) = results["orders"]["two"], results["orders"]["three against three"]
    return "\n".join(
        [
            *lines,
            "",
            "Percent of intervals that leave out the truth. First the mean and range over four pairs of models: "
            f"federated against {', '.join(real[:-1])} and {real[-1]}; then of a lognormal population, which is made "
            f"up. {results['settings']['draws']:,} draws each from {results['population']:,} held-out rows.",
            "",
            f"{results['settings']['orders']} trainings of `benchmarks/federation.toml` that differ in the order of "
            f"batches alone have a standard deviation of the loss of {results['orders']['sd']:.3f}. On 240 rows, two "
            f"of them are 'clearly' different in {100 * two / pairs:.0f}% of {pairs} comparisons over rows, and three "
            f"of them from three others in {100 * three / triples:.0f}% of {triples} over seeds and rows. "
            f"On {_machine(results)}.",
        ]
    )


def interval_shares(results: dict[str, Any]) -> str:
    """How often intervals of a share of right answers leave out the true one."""
    lines = ["| true share | rows | percentile bootstrap | score interval |", "|---|---|---|---|"]
    lines += [
        f"| {row['true']:.0%} | {row['rows']} | {100 * row['percentile']:.1f} | {100 * row['score']:.1f} |"
        for row in results["shares"]
    ]
    return "\n".join(
        [*lines, "", "Percent of intervals that leave out the true share, from the binomial distribution."]
    )


def boundary(results: dict[str, Any]) -> str:
    """Time to encode with the text of rows kept apart, over the time without."""
    rows = {(row["template"], row["spelling"]): row for row in results["encoded"]}
    spellings = list(dict.fromkeys(spelling for _, spelling in rows))
    lines = ["| rows that spell a control token | chat template | alpaca |", "|---|---|---|"]
    for spelling in spellings:
        cells = (rows[template, spelling] for template in ("chat", "alpaca"))
        texts = (f"{row['ratio']:.2f} ({row['quartiles'][0]:.2f} to {row['quartiles'][1]:.2f})" for row in cells)
        lines.append(f"| {spelling} | {' | '.join(texts)} |")
    note = f"Processor time to encode {results['rows']:,} rows of the built-in corpus, with over without: median and "
    return "\n".join([*lines, "", f"{note}quartiles of {results['times']} pairs in one run. On {_machine(results)}."])


def data(results: dict[str, Any]) -> str:
    """Time, memory and disk of files larger than memory, by their size."""
    ways = {"read": "rows read and split", "site": "a site, to two steps of training", "doctor": "`apiary doctor`"}
    lines = ["| JSONL | rows | | time | resident | of it anonymous | on disk |", "|---|---|---|---|---|---|---|"]
    for run in sorted(results["runs"], key=lambda run: (list(ways).index(run["way"]), run["gb"])):
        memory = (f"{run[key] / 2**30:.2f} GiB" for key in ("resident", "anonymous"))
        cells = [f"{run['gb']:g} GB", f"{run['rows']:,}", ways[run["way"]], f"{run['seconds']:,.0f} s", *memory]
        lines.append(f"| {' | '.join(cells)} | {run['disk'] / 1e9:.1f} GB |")
    return "\n".join([*lines, "", f"On {_machine(results)}, beside other work; times say little."])


def injection(results: dict[str, Any]) -> str:
    """Whom models follow when instructions stand in the data, and what it costs."""
    ways: dict[str, list[tuple[dict[str, Any], str]]] = {"untuned": []}
    for run in results["runs"]:
        ways.setdefault(run["way"], []).append((run, "federated"))
        if any(row["method"] == "base" for row in run["probe"]["rows"]):
            ways["untuned"].append((run, "base"))

    def cells(found: list[tuple[dict[str, Any], str]], intruder: str, attack: str, key: str) -> list[float]:
        return [
            row[key]
            for run, method in found
            for row in run["probe"]["rows"]
            if (row["method"], row["intruder"], row["attack"]) == (method, intruder, attack)
        ]

    lines = ["| | held-out loss | exact match | on the questions asked: right | right under attack | loss rises by |"]
    lines += ["|---|---|---|---|---|---|"]
    for way, found in ways.items():
        plain = [[run[key] for run, method in found if method == "federated"] for key in ("loss", "accuracy")]
        told = [_spread(plain[0], 1, 2), f"{_spread(plain[1], 100, 0)}%"] if plain[0] else ["", ""]
        told += [f"{_spread(cells(found, 'question', a, 'original_followed'), 100, 0)}%" for a in ("none", "all")]
        told.append(_spread(cells(found, "question", "all", "loss_rise"), 1, 2))
        lines.append(f"| {way} | {' | '.join(told)} |")
    attacks = list(dict.fromkeys(row["attack"] for row in results["runs"][0]["probe"]["rows"]))
    lines += ["", f"| the intruder is followed | {' | '.join(ways)} |", "|---" * (len(ways) + 1) + "|"]
    for intruder, label in (("demand", "demands a word"), ("question", "asks another question")):
        for attack in attacks if intruder == "question" else ["all"]:
            if attack != "none":
                shares = [_spread(cells(w, intruder, attack, "intruder_followed"), 100, 0) for w in ways.values()]
                lines.append(f"| {label}: {attack} | {' | '.join(f'{share}%' for share in shares)} |")
        likelier = [_spread(cells(w, intruder, "all", "intruder_likelier"), 100, 0) for w in ways.values()]
        lines.append(f"| {label}: his answer is likelier | {' | '.join(f'{share}%' for share in likelier)} |")
    return _noted(lines, results, f"`benchmarks/federation.toml`; {results['questions']} questions under each attack.")


def real(results: dict[str, Any]) -> str:
    """The recipe's own run: loss on its rows and on rows of another kind."""
    runs = [run for run in results["runs"] if not run["overrides"]]
    run = runs[0]
    names = {
        "base": "`base`: as it comes",
        "local": "`local`: each site alone, same steps",
        "federated": "`federated`",
    }
    lines = [
        "| | held-out loss, nats per response token | on grade-school mathematics | steps, of all sites if they join |",
        "|---|---|---|---|",
    ]
    other = {row["method"]: row for row in run["other"]["table"]}
    for row in run["table"]:
        cells = [_with_ends(row), _with_ends(other[row["method"]]) if row["method"] in other else ""]
        lines.append(f"| {names[row['method']]} | {' | '.join(cells)} | {row['steps']} |")
    said = [f"`federated` less `{name}`: {_difference(found)}." for name, found in run["paired"].items()]
    note = f"{_seeds(len(runs))} Intervals are over {run['table'][0]['n']} rows, of these models alone."
    return "\n".join(
        [*lines, "", " ".join([note, *said, f"{run['seconds'] / 60:.0f} minutes on {_machine(results)}."])]
    )


def real_rates(results: dict[str, Any]) -> str:
    """By learning rate, what tuning changes."""
    lines = ["| `train.lr` | held-out loss | less that of `base` | on mathematics, less that of `base` |"]
    lines.append("|---|---|---|---|")
    for run in sorted(results["runs"], key=lambda run: float(run["lr"])):
        (row,) = (row for row in run["table"] if row["method"] == "federated")
        told = [_with_ends(row), _difference(run["paired"]["base"]), _difference(run["other"]["paired"]["base"])]
        lines.append(f"| {run['lr']:g} | {' | '.join(told)} |")
    return "\n".join([*lines, "", f"One seed. On {_machine(results)}."])


def real_answers(results: dict[str, Any]) -> str:
    """Short questions of the recipe's own run, with the answers before and after."""
    run = next(run for run in results["runs"] if not run["overrides"])
    lines = ["| question | Dolly's answer | before | after |", "|---|---|---|---|"]
    for sample in run["samples"]:
        if len(sample["prompt"]) <= _ASKED:
            cells = (sample["prompt"], sample["reference"], sample["base"], sample["federated"])
            lines.append(f"| {' | '.join(_short(cell) for cell in cells)} |")
    return "\n".join(lines)


def _short(text: str) -> str:
    text = " ".join(text.split()).replace("|", "/")
    return text if len(text) <= _ASKED else f"{text[:_ASKED].rpartition(' ')[0]} ..."


def _with_ends(row: dict[str, Any]) -> str:
    low, high = row["ci95"]["loss"]
    return f"{row['loss']:.2f} ({low:.2f} to {high:.2f})"


def _difference(found: dict[str, Any]) -> str:
    low, high = found["ci95"]
    return f"{found['difference']:+.3f} ({low:+.3f} to {high:+.3f})"


def defaults(results: dict[str, Any]) -> str:
    """By setting and federation the difference to the defaults before they were tuned."""
    found, names = (
        results["summary"],
        {"skills": "default", "even": "the same, evenly dealt", "dolly": "dolly, `probe`", "smollm2": "dolly, SmolLM2"},
    )
    lines = [f"| | {' | '.join(names[task] for task in found)} |", f"|---{'|---' * len(found)}|"]
    before = [f"loss {_spread(found[task]['before']['loss'], 1, 3)}" for task in found]
    lines.append(f"| before | {' | '.join(before)} |")
    for name in results["settings"]:
        if name != "before":
            cells = [_less_before(found[task].get(name)) for task in found]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    note = "The first row has mean and range over seeds, the others differences with 95% intervals over seeds and rows."
    return "\n".join([*lines, "", f"{note} On {_machine(results)}."])


def _less_before(row: dict[str, Any] | None) -> str:
    if row is None:
        return "not run"
    seeds = len(row["loss"])
    ends = "" if row["ci95"] is None else f"{row['ci95'][0]:+.3f} to {row['ci95'][1]:+.3f}, "
    return f"{row['less']:+.3f} ({ends}{seeds} seed{'' if seeds == 1 else 's'})"


_OWN = {
    "local": "alone, as many steps as in the federation",
    "local_best": "alone at its best, with up to twice as many",
    "federated": "federated",
    "personal": "own model, with up to twice as many",
}


def own_default(results: dict[str, Any]) -> str:
    """Clients' own models in the default federation."""
    told = summary(results["runs"])
    lines = ["| | loss on the clients' own held-out rows | on everybody's | steps |", "|---|---|---|---|"]
    for name, label in _OWN.items():
        mix = _spread(told["mix"][name], 1, 3) if name in told["mix"] else ""
        lines.append(
            f"| {label} | {_spread(told['own'][name], 1, 3)} | {mix} | {statistics.mean(told['steps'][name]):.0f} |"
        )
    return "\n".join([*lines, "", f"{_seeds(len(results['runs']))} {_own_told(told)} On {_machine(results)}."])


def _own_told(told: dict[str, Any]) -> str:
    kept = ", ".join(f"{count} {kind}" for kind, count in told["kept"].items())
    return (
        f"Of {told['clients']} clients {told['lower']} have a lower loss by their own model than alone at its best, "
        f"{told['clearly_better']} clearly and {told['clearly_worse']} clearly a higher one (95% intervals over "
        f"their own rows; {told['without_interval']} have too few for one). Kept: {kept}."
    )


def own_cases(results: dict[str, Any]) -> str:
    """Clients' own models by the rows that a client has, and on organisations' rows."""
    lines = [
        "| training rows a client | seeds | alone at its best | federated | own model | clients with a lower loss | "
        "clearly lower | clearly higher | kept |",
        f"|{'---|' * 9}",
    ]
    bases = {"dolly": ", dolly with `probe`", "smollm2": ", dolly with SmolLM2"}
    for case in filter(results["cases"].__contains__, CASES):
        told, runs = results["cases"][case]["summary"], results["cases"][case]["runs"]
        rows = [client["rows"]["train"] + client["rows"]["validation"] for run in runs for client in run["clients"]]
        label = f"{rounded(round(statistics.mean(rows))):,}{bases.get(case, '')}"
        losses = (_spread(told["own"][name], 1, 3) for name in ("local_best", "federated", "personal"))
        better = f"{told['lower']} of {told['clients']} | {told['clearly_better']} | {told['clearly_worse']}"
        kept = ", ".join(f"{count} {kind}" for kind, count in told["kept"].items())
        lines.append(f"| {label} | {len(runs)} | {' | '.join(losses)} | {better} | {kept} |")
    note = "Rows are means over clients, in two digits. Mean and range over seeds."
    return "\n".join([*lines, "", f"{note} On {_machine(results)}."])


def own_models(runs: list[dict[str, Any]]) -> str:
    """Methods that give clients models of their own."""
    seeds = len({run["seed"] for run in runs})
    return "\n".join([ways.table(runs), "", f"{_seeds(seeds)} On {_machine({'machine': runs[0]['machine']})}."])


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "demo": demo,
    "training": training,
    "clients": clients,
    "message": message,
    "clients_run": clients_run,
    "base": base,
    "continual": continual,
    "curation": curation,
    "judges": judges,
    "masking": masking,
    "privacy": privacy,
    "audit": audit,
    "rows_alone": rows_alone,
    "aggregation_error": aggregation_error,
    "aggregation_module": aggregation_module,
    "aggregation_memory": aggregation_memory,
    "aggregation_round": aggregation_round,
    "poisoning": poisoning,
    "limits": limits,
    "honest": honest,
    "federated": federated,
    "dolly": dolly,
    "mixed": mixed,
    "corrected": corrected,
    "personal": personal,
    "coded_few": coded_few,
    "codecs": codecs,
    "coded": coded,
    "intervals": intervals,
    "interval_shares": interval_shares,
    "boundary": boundary,
    "data": data,
    "injection": injection,
    "real": real,
    "real_rates": real_rates,
    "real_answers": real_answers,
    "defaults": defaults,
    "own_models": own_models,
    "own_default": own_default,
    "own_cases": own_cases,
    **deployment_tables.TABLES,
}
_FROM = {  # tables that have no file of results of their own
    "judges": "curation",
    **dict.fromkeys(("message", "clients_run"), "clients"),
    **dict.fromkeys(("real_rates", "real_answers"), "real"),
    "interval_shares": "intervals",
    "own_default": "demo",
    "own_cases": "personal",
    **dict.fromkeys(("mixed", "corrected", "personal", "coded", "coded_few"), "federated"),
    **dict.fromkeys(
        ("aggregation_error", "aggregation_module", "aggregation_memory", "aggregation_round"), "aggregation"
    ),
}


def _fill(text: str, name: str, body: str) -> str:
    pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
    return re.sub(pattern, lambda m: f"{m[1]}{body}\n{m[2]}", text, flags=re.DOTALL)


def _noted(lines: list[str], results: dict[str, Any], note: str = "") -> str:
    """A table with the seeds, the note and the machine below it."""
    seeds = len({run["seed"] for run in results["runs"]})
    return "\n".join([*lines, "", " ".join(filter(None, [_seeds(seeds), note, f"On {_machine(results)}."]))])


def _seeds(count: int) -> str:
    return "One seed." if count == 1 else f"Mean and range over {count} seeds."


def _spread(values: list[float], scale: float, digits: int) -> str:
    if len(values) == 1:
        return f"{scale * values[0]:.{digits}f}"
    shown = [
        f"{round(scale * value, digits) + 0.0:.{digits}f}"
        for value in (statistics.mean(values), min(values), max(values))
    ]
    return f"{shown[0]} ({shown[1]} to {shown[2]})"


def _machine(results: dict[str, Any]) -> str:
    """Where it was measured; runs that came later may name another processor."""
    machine = results["machine"]
    runs = results.get("runs", [])
    processors = dict.fromkeys(run.get("cpu", machine["cpu"]) for run in runs if isinstance(run, dict))
    return f"{machine['cores']} cores of an {' or an '.join(processors or [machine['cpu']])}"


def _soak() -> str:
    path = RESULTS / "soak.json"
    return soak_table.page(json.loads(path.read_text())) if path.exists() else _NONE


def render(text: str) -> str:
    """A page with every table made anew."""
    for name, table in TABLES.items():
        path = RESULTS / f"{_FROM.get(name, name)}.json"
        body = table(json.loads(path.read_text())) if path.exists() else _NONE
        text = _fill(text, name, body)
    for name, table in (
        ("together", together.table),
        ("together_methods", together.methods_table),
        ("methods", methods.table),
        ("row_shapes", shapes.table),
        ("soak", _soak),
    ):
        text = _fill(text, name, table()) if f"<!-- {name} -->" in text else text
    return text


if __name__ == "__main__":
    for page in PAGES:
        made = render(page.read_text())
        if "--check" in sys.argv and made != page.read_text():
            sys.exit(f"{page.relative_to(ROOT)}: tables differ from benchmarks/results")
        page.write_text(made)
