"""Writes the tables of the README, the docs and the base's card between their markers.

They come from the committed results; the table of what goes together comes from the code that decides it.

python benchmarks/tables.py [--check]
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # another package is called benchmarks too

from benchmarks import together  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", ROOT / "apiary" / "builtin" / "tiny" / "README.md", *sorted((ROOT / "docs").glob("*.md")))


def demo(results: dict[str, Any]) -> str:
    """The default run: mean over seeds of each row."""
    runs = results["runs"]
    lines = ["| | held-out loss, nats per response token | exact match |", "|---|---|---|"]
    names = {
        "base": "`base`: untuned",
        "local": "`local`: each client alone, same steps",
        "federated": "`federated`",
        "central": "`central`: all data in one place, same total steps",
    }
    for method, label in names.items():
        rows = [row for run in runs for row in run["table"] if row["method"] == method]
        loss, accuracy = ([row[key] for row in rows] for key in ("loss", "accuracy"))
        lines.append(f"| {label} | {_spread(loss, 1, 2)} | {_spread(accuracy, 100, 0)}% |")
    improved = ", ".join(f"{run['gain']['improved']} of {run['gain']['clients']}" for run in runs)
    wall = _spread([run["wall_s"] for run in runs], 1, 0)
    lines += [
        "",
        f"{_seeds(len(runs))} Clients whose own held-out loss falls by joining: {improved}. "
        f"From command to report: {wall} s on {_machine(results)}.",
    ]
    return "\n".join(lines)


def clients(results: dict[str, Any]) -> str:
    """Time per message and peak memory by number of clients and engine."""
    lines = [
        "| virtual clients | engine | ms per client message | peak memory of the server's process |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {row['clients']:,} | {row['engine']} | {row['ms_per_message']:.0f} "
        f"| {row['peak_driver_bytes'] / 2**20:,.0f} MiB |"
        for row in results["rounds"]
    ]
    visit = results["visit"]
    lines += [
        "",
        f"A visit of a demo client costs {visit['median_ms_beside_steps']:.0f} ms (median of {visit['visits']}) beyond "
        f"its optimizer steps; the base was loaded {visit['base_loads']} time. Machine: {_machine(results)}.",
    ]
    return "\n".join(lines)


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
        "oracle": "spoiled, then all bad rows taken out by who knows them",
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


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "demo": demo,
    "training": training,
    "clients": clients,
    "base": base,
    "continual": continual,
    "curation": curation,
    "judges": judges,
    "privacy": privacy,
}
_FROM = {"judges": "curation"}  # tables that have no file of results of their own


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
    machine = results["machine"]
    return f"{machine['cores']} cores of an {machine['cpu']}"


def render(text: str) -> str:
    """A page with every table made anew."""
    for name, table in TABLES.items():
        path = RESULTS / f"{_FROM.get(name, name)}.json"
        body = table(json.loads(path.read_text())) if path.exists() else "*No measurement is committed yet.*"
        text = _fill(text, name, body)
    return _fill(text, "together", together.table())


if __name__ == "__main__":
    for page in PAGES:
        made = render(page.read_text())
        if "--check" in sys.argv and made != page.read_text():
            sys.exit(f"{page.relative_to(ROOT)}: tables differ from benchmarks/results")
        page.write_text(made)
