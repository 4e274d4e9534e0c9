"""The tables of what a deployment costs, bears and withstands, from committed results."""

from __future__ import annotations

import statistics
from typing import Any

_NAMES = {  # of a process -> what a reader calls it
    "ServerApp": "the run's own process",
    "worker": "worker, with the base",
    "keeper of the server": "`deploy server`",
    "keeper of the site": "`deploy client`",
    "following submit": "a `submit` that follows",
}
_SERVER = ("ServerApp", "SuperLink", "SuperExec", "door", "keeper of the server", "following submit")
_SITE = ("worker", "node", "keeper of the site", "sandbox of chat templates")


def rounds(results: dict[str, Any]) -> str:
    """Seconds a round by part, beside an earlier version where one was measured."""
    lines = [
        "| seconds a round, median (least to most) | training message | evaluation message | both | not work of the "
        "sites |",
        "|---|---|---|---|---|",
    ]
    labels = {"now": "now", "before": f"at {results['before']}"}
    for label, run in results["runs"].items():
        cells = [
            f"{run[part]['median']:.1f} ({run[part]['least']:.1f} to {run[part]['most']:.1f})"
            for part in ("train", "evaluate", "whole", "rest")
        ]
        lines.append(f"| {labels[label]} | {' | '.join(cells)} |")
    times = results["times"]
    runs = "one run" if times == 1 else f"{times} runs each, taking turns,"
    return "\n".join(
        [
            *lines,
            "",
            f"{results['sites']} sites, {runs} of {results['rounds']} rounds, the first not counted. {_on(results)}",
        ]
    )


def memory(results: dict[str, Any]) -> str:
    """Megabytes by process, the server's beside a site's."""
    lines = ["| server | | site | |", "|---|---|---|---|"]
    for number in range(max(len(_SERVER), len(_SITE))):
        cells = [_size(results["mb"], roles[number] if number < len(roles) else "") for roles in (_SERVER, _SITE)]
        lines.append(f"| {' | '.join(cells)} |")
    sums = [sum(results["mb"][role]["pss"] for role in roles) for roles in (_SERVER[:-1], _SITE)]
    note = f"Proportional, the server comes to {sums[0]:.0f} without the `submit`, the site to {sums[1]:.0f}."
    if alone := results["mb"].get("libraries alone"):
        note += (
            f" A process that has only loaded torch, transformers and peft, and made an optimizer: {alone['pss']:.0f}."
        )
    return "\n".join([*lines, "", f"{note} {_on(results)}"])


def _size(found: dict[str, dict[str, float]], role: str) -> str:
    if role not in found:
        return " | "
    return f"{_NAMES.get(role, role)} | {found[role]['rss']:.0f} ({found[role]['pss']:.0f})"


def attacks(results: dict[str, Any]) -> str:
    """What each attack came to."""
    lines = [
        "| attack | tries | refused, or held to the cap | from sending to the log's line (s), median and most | honest "
        "answers lost | same adapter |",
        "|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        after = f"{row['after_s']['median']:.1f}, {row['after_s']['most']:.1f}" if row.get("after_s") else ""
        held = row["refused"] + row.get("capped", 0)
        lines.append(f"| {_attack(row)} | {row['tried']:,} | {held:,} | {after} | {row['lost']} | {_same(row)} |")
    note = (
        "The first rows are of strangers, while a run goes on; from `1000 in every entry` on a site with a real key "
        f"does it in each of the {results['times']} rounds of a run, beside three honest ones."
    )
    return "\n".join([*lines, "", f"{note} {_on(results)}"])


def _same(row: dict[str, Any]) -> str:
    if row["same"]:
        return "yes"
    if row.get("share"):
        return f"no: it counts {row['share']:g} times the median, {100 * row['distance']:.0f}% of its norm away"
    return f"no: {100 * row['distance']:.0f}% of its norm away" if "distance" in row else "no"


def _attack(row: dict[str, Any]) -> str:
    if "taken_mib" in row:
        return f"{row['attack']}: {row['taken_mib']:.0f} MiB taken at most, SuperLink {row['superlink_mib']:+.0f} MiB"
    return f"{row['attack']}: /health answered {row['health']} times" if "health" in row else str(row["attack"])


def many_sites(results: dict[str, Any]) -> str:
    """What one server needs by number of sites."""
    lines = [
        "| sites | server ready after (s) | seconds a round, least to most | of processor time: the run's own process, "
        "SuperLink, door, all stubs | the run's own process, MB at most and in the last round | SuperLink, likewise | "
        "door, likewise | database, MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in results["runs"]:
        sizes = [
            f"{max(mb.get(role, 0) for mb in run['mb']):,.0f}, {run['mb'][-1].get(role, 0):,.0f}"
            for role in ("ServerApp", "SuperLink", "door")
        ]
        spent = (
            f"{statistics.median(each.get(role, 0.0) for each in run['processor_s']):.1f}"
            for role in ("ServerApp", "SuperLink", "door", "stub sites")
        )
        seconds = f"{min(run['round_s']):.0f} to {max(run['round_s']):.0f}"
        lines.append(
            f"| {run['sites']} | {run['ready_s']:.0f} | {seconds} | {', '.join(spent)} | {' | '.join(sizes)} | "
            f"{run['database_mb']:,.0f} |"
        )
    note = (
        f"Updates of {results['megabytes']:g} MB, {results['rounds']} rounds (seconds: without the first), "
        "proportional sizes."
    )
    return "\n".join([*lines, "", f"{note} {_on(results)}"])


def _on(results: dict[str, Any]) -> str:
    return f"On {results['machine']['cores']} cores of an {results['machine']['cpu']}."


TABLES = {
    "deployment_rounds": rounds,
    "attacks": attacks,
    "deployment_memory": memory,
    "many_sites": many_sites,
}
