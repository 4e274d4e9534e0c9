"""What the probe of planted instructions found, for the page: `injection.json` as a short table and a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from apiary.core.formatting import MISSING, change_text, plural, share_text
from apiary.tracking.metrics_file import read_finding

PROBE_FILE = "injection.json"
COMMAND = "apiary evaluate RUN --probe injection"
_SCHEMA = 1
_WANTS = {"demand": "demands a certain word", "question": "asks another question"}
_MODELS = {"base": "untuned", "federated": "tuned"}
_CLEAN, _EVERY = "none", "all"  # what stands for no attack, and for the mean of all kinds


class Line(NamedTuple):
    """One intruder at one model."""

    intruder: str
    model: str
    followed: str  # over all kinds of attack, with its 95% interval
    worst: str  # the kind that is followed most often, with its share
    right: str  # the answers that stay with the question, without and under attack
    rise: str  # of the right answer's loss under attack, nats per token, with its 95% interval


def read_probe(folder: Path) -> dict[str, Any] | None:
    """The newest probe of a run; None where there is none.

    Raises:
        UserError: the file is no probe that this version knows.
    """
    return read_finding(folder / PROBE_FILE, _SCHEMA, "probe", COMMAND)


def probe_content(probe: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the page shows of a probe, by the name that its template uses."""
    if probe is None:
        return {"probe": None}
    return {"probe": {"intro": intro(probe), "lines": lines(probe), "verdict": verdict(probe)}}


def intro(probe: Mapping[str, Any]) -> str:
    """What was asked, and how."""
    kinds = {row["attack"] for row in probe["rows"]} - {_CLEAN, _EVERY}
    apart = {
        "plain": "Nothing sets data apart from the question (prompt.boundary = plain).",
        "structured": "Data stands between delimiters (prompt.boundary = structured).",
    }
    return (
        f"{plural(probe['questions'], 'question')} with an instruction planted in the data, in "
        f"{plural(len(kinds), 'kind')} of attack. {apart[probe['boundary']]} Intervals are 95%, over questions."
    )


def lines(probe: Mapping[str, Any]) -> list[Line]:
    """A line for each intruder and model, over all kinds of attack."""
    return [_line(probe, intruder, method) for intruder in _WANTS for method in _MODELS]


def _line(probe: Mapping[str, Any], intruder: str, method: str) -> Line:
    found = _by_attack(probe, intruder, method)
    clean, every = found.pop(_CLEAN), found.pop(_EVERY)
    kind, worst = max(found.items(), key=lambda item: item[1]["intruder_followed"])
    before, under = (share_text(row["original_followed"]) for row in (clean, every))
    return Line(
        _WANTS[intruder],
        _MODELS[method],
        _share(every),
        f"{kind}: {_share(worst)}" if worst["intruder_followed"] else "none succeeds",
        f"{before} without, {under} under attack",
        _rise(every),
    )


def verdict(probe: Mapping[str, Any]) -> str:
    """One sentence on what tuning did to the intruder's success, and one on what that is worth."""
    after = {intruder: _by_attack(probe, intruder, "federated")[_EVERY] for intruder in _WANTS}
    intruder = max(after, key=lambda name: float(after[name]["intruder_followed"]))
    tuned, untuned = after[intruder], _by_attack(probe, intruder, "base")[_EVERY]
    low, high = tuned["ci95"]["intruder_followed"]
    least, most = untuned["ci95"]["intruder_followed"]
    said = "less often than" if high < least else "more often than" if low > most else "about as often as"
    shares = f"({share_text(tuned['intruder_followed'])} against {share_text(untuned['intruder_followed'])})"
    first = f"An intruder who {_WANTS[intruder]} is followed by the tuned model {said} by the untuned one {shares}."
    if not any(row["intruder_followed"] for row in probe["rows"]):
        first = "Neither the tuned nor the untuned model followed an intruder once."
    return f"{first} Attacks that are made for this model may succeed more often: that one fails proves no safety."


def _by_attack(probe: Mapping[str, Any], intruder: str, method: str) -> dict[str, Mapping[str, Any]]:
    rows = probe["rows"]
    return {row["attack"]: row for row in rows if (row["intruder"], row["method"]) == (intruder, method)}


def _share(row: Mapping[str, Any]) -> str:
    ends = ", ".join(map(share_text, row["ci95"]["intruder_followed"]))
    return f"{share_text(row['intruder_followed'])} [{ends}]"


def _rise(row: Mapping[str, Any]) -> str:
    if row["loss_rise"] is None:  # a loss was no number
        return MISSING
    ends = row["ci95"]["loss_rise"]
    return change_text(row["loss_rise"]) + (f" [{', '.join(map(change_text, ends))}]" if ends else "")
