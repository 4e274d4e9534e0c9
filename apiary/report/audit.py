"""What an audit of one client's updates found, for terminal and page: `audit.json` as lines of a table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from apiary.core.formatting import MISSING, plural
from apiary.privacy.audit import exposure, one_run
from apiary.privacy.statement import rounded_up
from apiary.tracking.metrics_file import read_finding

AUDIT_FILE = "audit.json"
COMMAND = "apiary privacy audit RUN"
_SCHEMA = 2
_BY = {"loss": "by the fall of the loss", "update": "by the update's direction"}


class Line(NamedTuple):
    """One figure."""

    what: str
    found: str  # with its 95% interval, where there is one
    chance: str  # what an attack that knows nothing reaches
    remark: str = ""


def read_audit(folder: Path) -> dict[str, Any] | None:
    """The newest audit of a run; None where there is none.

    Raises:
        UserError: the file is no audit that this version knows.
    """
    return read_finding(folder / AUDIT_FILE, _SCHEMA, "audit", "the audit")


def audit_content(audit: Mapping[str, Any] | None, private: bool) -> dict[str, Any]:
    """What the page shows of an audit, by the names that its template uses."""
    if audit is None:
        return {"audit": None, "unmeasured": unmeasured(private)}
    return {"audit": {"intro": intro(audit), "lines": lines(audit), "verdict": verdict(audit)}, "unmeasured": ""}


def unmeasured(private: bool) -> str:
    """The line of a report without an audit: what an update could tell, and how to measure it."""
    could = (
        "what an update tells of a row is bounded by the epsilon above"
        if private
        else "an update can tell which rows a client trained on, and words of them"
    )
    return f"{could[0].upper()}{could[1:]}; how much an attack really finds, {COMMAND} measures."


def intro(audit: Mapping[str, Any]) -> str:
    """Whose updates were attacked, and how."""
    return (
        f"A server that is honest but curious, and one client: {audit['client']}, {plural(audit['rounds'], 'visit')} "
        f"replayed with {audit['rows']:,} rows. Some of its rows, and canaries among them, were in or out by a coin; "
        "figures have 95% intervals where there is enough to take them from."
    )


def lines(audit: Mapping[str, Any]) -> list[Line]:
    """All figures, each with what chance gives."""
    return [*_membership(audit), *_exposure(audit), *_inversion(audit), _bound(audit)]


def _membership(audit: Mapping[str, Any]) -> list[Line]:
    made = []
    for row in audit["membership"]:
        after = "first update" if row["updates"] == 1 else f"{row['updates']} updates"
        many = f"{row['members']} rows in, {row['others']} out"
        what = f"Membership {_BY[row['attack']]}, {after}"
        few = "" if row["auc"] else f"too few rows: {many}"
        made.append(Line(f"{what}: AUC", _figure(row["auc"], 1, 2), "0.50", few or many))
        passed = row["false_positives"]
        said = f"this threshold lets {_figure(passed, 100, 1, '%')} through" if passed else "fewer than 100 rows out"
        made.append(
            Line(f"{what}: found at 1% false positives", _figure(row["true_positives"], 100, 0, "%"), "1%", said)
        )
    return made


def _exposure(audit: Mapping[str, Any]) -> list[Line]:
    if not audit["exposure"]:
        return [Line("Exposure of planted secrets", MISSING, "", "too few rows to plant them among")]
    chance, made = f"{exposure.CHANCE:.1f} bits", []
    for row in audit["exposure"]:
        times = "once" if row["copies"] == 1 else f"{row['copies']} times"
        remark = f"of {row['highest']:.0f}; median of {plural(len(row['bits']), 'secret')}, p = {row['p_value']:.2g}"
        made.append(
            Line(f"Exposure of a secret planted {times}", _figure(row["median"], 1, 1, " bits"), chance, remark)
        )
    return made


def _inversion(audit: Mapping[str, Any]) -> list[Line]:
    if not audit["inversion"]:
        return [Line("Gradient inversion", MISSING, "", "no adapted layer whose input follows from a token alone")]
    return [
        Line(
            f"Tokens read from one gradient of {plural(row['rows'], 'row')}",
            _figure(row["recovered"], 100, 0, "%"),
            MISSING if row["chance"] is None else f"{100 * row['chance']:.0f}%",
            f"median of {plural(row['trials'], 'batch')}",
        )
        for row in audit["inversion"]
    ]


def _bound(audit: Mapping[str, Any]) -> Line:
    found, claim = audit["lower_bound"], audit["claim"]
    said = f"claimed: {rounded_up(claim['epsilon'])} at delta {claim['delta']:g}" if claim else "nothing is claimed"
    right = f"{found['right']} of {found['guesses']} guesses right on {plural(found['canaries'], 'canary')}"
    right = right.replace("canarys", "canaries")
    return Line("Epsilon is at least", f"{found['epsilon']:.2f}", "0.00", f"{said}; {right}")


def verdict(audit: Mapping[str, Any]) -> str:
    """What was found, in plain words, and what it says of the claim, if there is one."""
    return f"{_in_words(audit)} {_of_claim(audit)}"


def _in_words(audit: Mapping[str, Any]) -> str:
    told = []
    sure = [row["auc"] for row in audit["membership"] if row["auc"] and (row["auc"]["low"] or 0) > 0.5]
    if sure:
        best = max(sure, key=lambda auc: auc["value"])
        told.append(
            f"of a row that the client trained on and one that it did not, the attack tells which is which in "
            f"{100 * best['value']:.0f}% of cases (the AUC; a coin: 50%)"
        )
    shown = [row for row in audit["exposure"] if row["p_value"] < 0.05 / len(audit["exposure"])]
    if shown:
        few = min(row["copies"] for row in shown)
        told.append(
            f"a secret code that stands in {plural(few, 'row')} is likelier than others to the model (exposure)"
        )
    bound = audit["lower_bound"]
    if bound["epsilon"] > 0:
        guesses = f"{bound['right']} of {plural(bound['guesses'], 'guess')}"
        told.append(f"which canaries (planted rows) were in is told rightly in {guesses}")
    read = [row for row in audit["inversion"] if (row["recovered"]["low"] or 0) > (row["chance"] or 0)]
    if read:
        most = max(read, key=lambda row: row["recovered"]["value"])
        whose = "its" if most["rows"] == 1 else "their"
        told.append(
            f"a single step of plain gradient descent on {plural(most['rows'], 'row')} gives "
            f"{100 * most['recovered']['value']:.0f}% of {whose} words away: the worst case, for an update of several "
            "steps, or by AdamW, is no gradient, and this attack does not apply to it as it stands"
        )
    if not told:
        return "No attack did better than chance, beyond doubt."
    return f"Found: {'; '.join(told)}."


def _of_claim(audit: Mapping[str, Any]) -> str:
    claim, bound = audit["claim"], audit["lower_bound"]["epsilon"]
    if not claim:
        return (
            "Nothing is claimed of these updates, and nothing bounds what a stronger attack finds; record-level "
            "privacy would."
        )
    if bound > claim["epsilon"]:
        return (
            f"The lower bound {bound:.2f} is above the claim {claim['epsilon']:.2f}: by chance that happens in at most "
            "5% of audits; with another --seed it should not, or the mechanism is broken."
        )
    claimed, canaries = rounded_up(claim["epsilon"]), audit["lower_bound"]["canaries"]
    most = one_run.highest(canaries, claim["delta"])
    return (
        f"The lower bound is below the claim, {claimed}, as it must be; so few canaries as {canaries} could show "
        f"{most:.2f} at most, were every one told rightly. That an attack fails proves no safety."
    )


def _figure(figure: Mapping[str, float | None] | None, scale: float, digits: int, unit: str = "") -> str:
    numbers = [figure[key] for key in ("value", "low", "high")] if figure else []
    shown = [f"{scale * number:.{digits}f}" for number in numbers if number is not None]
    if not shown:
        return MISSING
    return f"{shown[0]}{unit} [{', '.join(shown[1:])}]" if shown[1:] else f"{shown[0]}{unit}"
