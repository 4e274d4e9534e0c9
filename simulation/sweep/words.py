"""What a sweep says in sentences, for terminal and page alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from apiary.config import defaults
from apiary.core.formatting import MISSING, bytes_text, change_text, loss_text, plural, seconds_text
from apiary.evaluation import intervals
from simulation.sweep import space
from simulation.sweep.definition import Sweep
from strategies.from_config import local_from_config

_MANY = 5  # seeds from which on Student's factor is below 3
_NOT_ALIKE = "measured on other rows"


def at_the_start(sweep: Sweep) -> list[str]:
    """What is to be known before the first run."""
    return [*_private(sweep), *_optimizers(sweep), *_own_models(sweep)]


def _optimizers(sweep: Sweep) -> list[str]:
    """A default that comes to different things is varied with what is varied."""
    if sweep.base.strategy.server_optimizer.name != "auto":
        return []
    runs = [defaults.resolved(sweep.config(values, sweep.seeds[0])) for values in sweep.settings() or ()]
    found = dict.fromkeys(run.strategy.server_optimizer.name for run in runs)
    if len(found) < 2:
        return []
    return [
        f"strategy.server_optimizer = auto comes to {' in some settings and '.join(found)} in others, so their "
        "differences are not of the varied keys alone; name one to compare them (-s strategy.server_optimizer=none)"
    ]


def _own_models(sweep: Sweep) -> list[str]:
    """What chooses among methods that give clients models of their own."""
    runs = [sweep.config(values, sweep.seeds[0]) for values in space.probes(sweep.axes)]
    if not any(local_from_config(defaults.resolved(run)).personal for run in runs):
        return []
    return [
        "clients get models of their own in some settings, and a sweep chooses by everybody's rows, which such models "
        "give up for their client's: compare methods by clients[].own in the runs' metrics.json, or with apiary compare"
    ]


def _private(sweep: Sweep) -> list[str]:
    """What choosing by private results costs."""
    units = {sweep.base.privacy.unit, *(values.get("privacy.unit") for values in sweep.settings() or ())}
    if "record" not in units:
        return []
    return [
        'privacy.unit = "record": on real private rows every run of a sweep spends its epsilon anew, and all of them '
        "add up; to choose by private results tells of the rows too, which no run's stated epsilon covers (Papernot "
        "and Steinke 2022). Tune on public rows, or account for all runs and the choice"
    ]


def remarks(found: Mapping[str, Any]) -> list[str]:
    """What makes the figures of a sweep weaker than they look."""
    told = []
    rows, seeds = found["rows"], found["winner"]["seeds"]
    if found["spent"]:
        told.append(
            f"the budget is spent ({found['spent']}): {plural(found['runs']['finished'], 'run')} finished; go on with "
            "--resume and a larger one"
        )
    if rows["figures"] < intervals.FEWEST_ROWS:
        told.append(
            f"no intervals: {plural(rows['figures'], 'held-out row')} for the figures, fewer than "
            f"{intervals.FEWEST_ROWS}; raise evaluate.max_examples or data.test_fraction"
        )
    if len(seeds) == 1:
        told.append(
            "one seed: intervals are of these models on these rows, and another seed may turn the order; --seeds 5 "
            "tells"
        )
    elif len(seeds) < _MANY and rows["figures"] >= intervals.FEWEST_ROWS:
        told.append(f"of {len(seeds)} seeds the spread between seeds is hardly known, so that the intervals are wide")
    if other := [
        row for row in found["table"] if row["seeds"] and row["paired"] is None and not _is_reference(row, found)
    ]:
        told.append(
            f"{plural(len(other), 'setting')} cannot be paired with the reference: {_NOT_ALIKE}, or other seeds"
        )
    if lost := [row for row in found["table"] if row["state"] in ("failed", "refused")]:
        told.append(
            f"{plural(len(lost), 'setting')} came to no result and {'is' if len(lost) == 1 else 'are'} out of the "
            f"choice; the first one, {space.words(lost[0]['values'])}: {lost[0]['why']}"
        )
    return told


def _is_reference(row: Mapping[str, Any], found: Mapping[str, Any]) -> bool:
    return bool(row["number"] == found["reference"]["number"])


def row_of(found: Mapping[str, Any], who: str) -> Mapping[str, Any]:
    """The row of the table of the `winner` or the `reference`."""
    return next(row for row in found["table"] if row["number"] == found[who]["number"])


def verdict(found: Mapping[str, Any]) -> list[str]:
    """Who won, by which rows, by how much on the others, and how far that is to be trusted."""
    winner, reference = row_of(found, "winner"), row_of(found, "reference")
    chosen = found["winner"]
    named = "the configuration's own setting" if found["reference"]["configured"] else "the first setting"
    by = (
        f"by the loss on {plural(chosen['rows'], 'held-out row')} set apart for the choice, mean over "
        f"{plural(len(chosen['seeds']), 'seed')}: {loss_text(chosen['choosing'])}"
    )
    if winner["number"] == reference["number"]:
        told = [
            f"{space.words(winner['values'])}, {named}, is the best of {plural(chosen['settings'], 'setting')} {by}."
        ]
        return [*told, _all_together(found)] if found["comparisons"] else told
    told = [
        f"{space.words(winner['values'])} is the best of {plural(chosen['settings'], 'setting')} {by}, against "
        f"{loss_text(chosen['reference_choosing'])} of {named} ({space.words(reference['values'])})."
    ]
    if winner["paired"]:
        told.append(
            f"On the other {plural(found['rows']['figures'], 'held-out row')}, which chose nothing, its loss lies "
            f"{difference_text(winner['paired'])} from that one's; {_clear(winner['paired'], found)}"
        )
    told.append(_confirmation(found))
    if found["edges"]:
        keys = " and ".join(found["edges"])
        told.append(f"It lies at the end of what was tried for {keys}: the best value may lie beyond.")
    return told


def _clear(paired: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    wide = paired["simultaneous"]
    if wide is None:
        return "there are too few rows to say whether that is chance."
    many = found["comparisons"]
    allowed = f"allowing for {plural(many, 'comparison')}" if many > 1 else "there being one comparison"
    clear = wide[1] < 0 or wide[0] > 0
    return f"{allowed} [{_ends(wide)}], which is {'a clear' if clear else 'no clear'} difference."


def _confirmation(found: Mapping[str, Any]) -> str:
    again = found["confirmed"]
    if again is None:
        return (
            f"The best of {plural(found['winner']['settings'], 'setting')} was chosen among the models that the "
            "figures are of: what these owe to the luck of their seeds is still in them, and makes the winner look "
            "better than it is. --resume --confirm 3 measures it with seeds that chose nothing."
        )
    seeds = ", ".join(map(str, again["seeds"]))
    return (
        f"Run again with {'seed' if len(again['seeds']) == 1 else 'seeds'} {seeds}, which chose nothing: "
        f"{difference_text(again)}. This figure is free of the choice."
    )


def _all_together(found: Mapping[str, Any]) -> str:
    better = [
        row for row in found["table"] if row["paired"] and (wide := row["paired"]["simultaneous"]) and wide[1] < 0
    ]
    if better:
        return (
            f"On the rows of the figures {plural(len(better), 'setting')} nevertheless did clearly better; the rows "
            "that choose and these do not agree, and more of both would help."
        )
    return "No setting did clearly better on the rows of the figures either."


def difference_text(paired: Mapping[str, Any] | None) -> str:
    """A paired difference with its 95% interval."""
    if paired is None:
        return ""
    ends = MISSING if paired["ci95"] is None else _ends(paired["ci95"])
    return f"{change_text(paired['difference'])} [{ends}]"


def _ends(ends: Sequence[float]) -> str:
    return ", ".join(map(change_text, ends))


COLUMNS = ("setting", "choosing", "figures", "lowest", "highest", "less the reference [95%]", "[all at once]", "seeds")
COST = ("federation", "sent")


def cells(row: Mapping[str, Any], found: Mapping[str, Any]) -> tuple[str, ...]:
    """A row of the table as texts, in the order of COLUMNS and COST."""
    pair = row["paired"]
    if _is_reference(row, found):
        less, wide = "reference", ""
    elif pair is None:
        less, wide = row["state"] if row["why"] else MISSING, ""
    else:
        less = difference_text(pair)
        wide = "" if pair["simultaneous"] is None else f"[{_ends(pair['simultaneous'])}]"
    losses = (loss_text(row[name]) for name in ("choosing", "loss", "lowest", "highest"))
    cost = (seconds_text(row["seconds"]), bytes_text(row["bytes"]))
    return (space.words(row["values"]), *losses, less, wide, str(len(row["seeds"])), *cost)


def lines(found: Mapping[str, Any]) -> list[str]:
    """The table as plain lines, what it says, and the winner's command."""
    grid = [(*COLUMNS, *COST), *(cells(row, found) for row in found["table"])]
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    told = []
    for place, row in enumerate(grid):
        mark = "*" if place and found["table"][place - 1]["number"] == found["winner"]["number"] else " "
        told.append(mark + "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip())
    told.append(HOW_TO_READ)
    return [*told, *found["verdict"], f"run the winner: {found['command']}"]


HOW_TO_READ = (
    "losses are means over seeds, nats per response token: `choosing` on the rows that choose, the others on those of "
    "the figures; `federation` and `sent` are of one run, without baselines and measuring"
)
