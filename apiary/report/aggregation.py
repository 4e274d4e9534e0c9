"""What the report says of how the server put the clients' updates together: what averaging misses, and who was cut."""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, Literal, NamedTuple

from markupsafe import Markup

from apiary.report import plots
from apiary.report.data import Metrics, Round, RoundGauge
from apiary.units import missed_text, share_text

_NAMED = 40  # clients with a line of their own
_SEEN = 5e-4  # the least that is shown as more than 0.0%
_AVERAGES = ("fedavg", "scaffold")  # methods that average A and B apart and leave it at that


class Aggregation(NamedTuple):
    """What the section shows."""

    sentences: list[str]
    chart: Markup | None
    cut_said: list[str]
    cut: list[tuple[str, str, str, str]]  # client, rounds it was cut in, rounds it took part in, why
    left_out: int  # clients that were cut and have no line


def aggregation_content(metrics: Metrics, config: str = "") -> Aggregation | None:
    """The section; None for a run that has nothing to say, such as one of an earlier version.

    Args:
        metrics: the results.
        config: the run's configuration as TOML; without it, the method is not known by name.
    """
    strategy = _strategy(config)
    measured = [r for r in metrics.rounds if r.gauge is not None and (r.clients or 0) > 1]
    judged = [r for r in metrics.rounds if r.shares]
    chosen = Counter(r.method for r in metrics.rounds if r.method)
    if not measured and not judged and not any(r.unchanged for r in metrics.rounds):
        return None
    sentences = [
        *_missed(measured, strategy.get("name", ""), bool(judged)),
        *_chosen(chosen),
        *_lost(metrics.rounds),
        *_unchanged(metrics.rounds),
    ]
    rows, said = _cut_rows(judged), _cut_sentences(judged, strategy.get("name", ""))
    return Aggregation(sentences, _chart(measured, strategy), said, rows[:_NAMED], max(0, len(rows) - _NAMED))


def _strategy(config: str) -> Mapping[str, Any]:
    try:
        found = tomllib.loads(config).get("strategy", {})
    except tomllib.TOMLDecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def _known(rounds: Sequence[Round]) -> list[tuple[int, float]]:
    """Rounds and what averaging A and B apart missed in them; where nothing changed on the whole there is no share."""
    return [(r.round, r.gauge.relative) for r in rounds if r.gauge and r.gauge.relative is not None]


def _missed(rounds: Sequence[Round], method: str, robust: bool) -> list[str]:
    known = [value for _, value in _known(rounds)]
    if not known:
        return []
    averaged = method in ("", *_AVERAGES)
    who, learnt = (" over the clients that counted", "they learnt") if robust else ("", "the clients learnt")
    if max(known) < _SEEN:
        return [f"Averaging A and B apart{who} {'was' if averaged else 'would have been'} as good as exact."]
    middle, most = median(known), max(known)
    spread = f" in a typical round, and {missed_text(most)} at most" if len(known) > 1 else ""
    verb = "missed" if averaged else "misses" if method == "auto" else "would have missed"
    return [
        f"Averaging A and B apart{who} {verb} {missed_text(middle)} of what {learnt}{spread}.",
        *_recovered(rounds, robust),
    ]


def _recovered(rounds: Sequence[Round], robust: bool) -> list[str]:
    """What each exact method recovers: what it can hold in ranks that it adds to the base, or in the adapter's own."""
    seen = [r.gauge for r in rounds if r.gauge and (r.gauge.relative or 0.0) >= _SEEN]
    added, own = _of(seen, "flora"), _of(seen, "flexlora")
    if not added or not own:
        return []
    least = "at least " if any(g.stderr for g in seen) else ""
    all_of_it, some = (share_text(min(1.0, max(0.0, median(x))), 0) for x in (added, own))
    if robust:  # no other method is a way out here: the exact ones trust everybody
        return [f"Of that, factors of the adapter's rank can hold {least}{some}, and such of any rank {all_of_it}."]
    return [
        f"Exact methods recover it: FLoRA and FedEx-LoRA {all_of_it}, by adding ranks to the base; FlexLoRA, which "
        f"keeps to the adapter's rank, {least}{some}."
    ]


def _of(gauges: Sequence[RoundGauge], method: Literal["flora", "flexlora"]) -> list[float]:
    """The parts of the error that a method would take away."""
    return [gain / g.relative for g in gauges if g.relative and (gain := getattr(g, method)) is not None]


def _chosen(methods: Mapping[str, int]) -> list[str]:
    if not methods:
        return []
    parts = [f"{name} in {_rounds(count)}" for name, count in sorted(methods.items(), key=lambda item: -item[1])]
    return [f"The run chose by this from round to round: {' and '.join(parts)}."]


def _lost(rounds: Sequence[Round]) -> list[str]:
    """What the bound on the rank of the base has cost; nothing where it was never reached."""
    lost = [r.dropped for r in rounds if r.dropped]
    if not lost:
        return []
    return [
        f"What stands in the base had to be cut to its highest rank (base_rank) in {_rounds(len(lost))}, and lost "
        f"{share_text(median(lost))} of its squared norm in a typical one, {share_text(max(lost))} at most."
    ]


def _unchanged(rounds: Sequence[Round]) -> list[str]:
    if not (count := sum(r.unchanged for r in rounds)):
        return []
    return [f"{_rounds(count).capitalize()} changed nothing, for too few clients answered well to keep the promise."]


def _rounds(count: int) -> str:
    return f"{count:,} round" + ("" if count == 1 else "s")


def _cut_sentences(judged: Sequence[Round], method: str) -> list[str]:
    if not judged:
        return []
    clients, cut = {name for r in judged for name in r.shares}, Counter(name for r in judged for name in r.cut)
    if not cut:
        return [f"None of the {len(clients)} clients was cut."]
    told = f"{len(cut)} of {len(clients)} clients {'was' if len(cut) == 1 else 'were'} cut"
    if method == "krum":
        return [
            f"{told} at least once. That says little of them: krum takes one client's change a round, and no other."
        ]
    return [
        f"{told} at least once. That is no proof of ill will: a client whose data are unlike the others' looks much "
        "the same, and some methods leave somebody out in every round."
    ]


def _cut_rows(judged: Sequence[Round]) -> list[tuple[str, str, str, str]]:
    """Who was cut, the most often first, with the newest reason."""
    part = Counter(name for r in judged for name in r.shares)
    times = Counter(name for r in judged for name in r.cut)
    newest = {name: (r.round, why) for r in sorted(judged, key=lambda r: r.round) for name, why in r.cut.items()}
    ordered = sorted(times, key=lambda name: (-times[name], name))
    return [
        (name, f"{times[name]:,}", f"{max(part[name], times[name]):,}", _why(*newest[name], times[name]))
        for name in ordered
    ]


def _why(number: int, reason: str, times: int) -> str:
    return f"{reason} (round {number}{', the last time' if times > 1 else ''})"


def _chart(rounds: Sequence[Round], strategy: Mapping[str, Any]) -> Markup | None:
    known = _known(rounds)
    if len(known) < 2 or max(value for _, value in known) < _SEEN:
        return None
    options = strategy.get("options", {})
    threshold = options.get("threshold", 0.1) if strategy.get("name") == "auto" else None
    return plots.gauge_chart(rounds, threshold if isinstance(threshold, int | float) else None)
