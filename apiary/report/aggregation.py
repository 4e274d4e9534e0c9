"""What the report says of how the server put the clients' updates together: what averaging misses, and who was cut."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from statistics import fmean, median
from typing import NamedTuple

from markupsafe import Markup

from apiary.config import gauged
from apiary.core.formatting import missed_text, share_text
from apiary.report import plots
from apiary.report.data import Metrics, Round, RoundGauge, Traits

_NAMED = 40  # clients with a line of their own
_SEEN = 5e-4  # the least that is shown as more than 0.0%
# By whether the run averaged A and B apart, "" where that is not known: what averaging did.
_MISSED = {"always": "missed", "sometimes": "misses", "never": "would have missed", "": "misses"}
_WAS = {"always": "was", "sometimes": "would have been", "never": "would have been", "": "is"}


class Cut(NamedTuple):
    """A client that was cut."""

    client: str
    times: str  # rounds in which it was
    part: str  # rounds that it took part in
    share: str  # the factor that its change got, on average over the latter
    attacker: str  # "yes" or "no" in a simulated attack, else ""
    why: str


class Aggregation(NamedTuple):
    """What the section shows."""

    sentences: list[str]
    chart: Markup | None
    cut_said: list[str]
    cut: list[Cut]
    left_out: int  # clients that were cut and have no line
    attacked: bool  # whether it is known who attacked


def aggregation_content(metrics: Metrics, name: str, method: Traits) -> Aggregation | None:
    """The section; None for a run that has nothing to say, such as one of an earlier version.

    Args:
        metrics: the results.
        name: the method's, as the run's file has it, of whatever version; "" where it is not known.
        method: what the log tells of it.
    """
    measured = [r for r in metrics.rounds if r.gauge is not None and (r.clients or 0) > 1]
    judged = [r for r in metrics.rounds if r.shares]
    chosen = Counter(r.method for r in metrics.rounds if r.method)
    if not measured and not judged and not any(r.unchanged for r in metrics.rounds):
        return None
    run = _Run(name, method, bool(judged), metrics.attack is not None, metrics.mixed)
    sentences = [
        *_missed(measured, run),
        *_chosen(chosen),
        *_lost(metrics.rounds),
        *_unchanged(metrics.rounds),
    ]
    hostile = frozenset(metrics.attack.clients) if metrics.attack else None
    rows = _cut_rows(judged, hostile)
    return Aggregation(
        sentences,
        _chart(measured, run),
        _cut_sentences(judged, method.takes_one, name, hostile),
        rows[:_NAMED],
        max(0, len(rows) - _NAMED),
        hostile is not None,
    )


class _Run(NamedTuple):
    """What decides how the error of averaging is to be read."""

    name: str  # the method's
    method: Traits
    robust: bool
    attacked: bool
    mixed: bool  # whether clients have several ranks


def _known(rounds: Sequence[Round]) -> list[tuple[int, float]]:
    """Rounds and what averaging A and B apart missed in them; where nothing changed on the whole there is no share."""
    return [(r.round, r.gauge.relative) for r in rounds if r.gauge and r.gauge.relative is not None]


def _missed(rounds: Sequence[Round], run: _Run) -> list[str]:
    known = [value for _, value in _known(rounds)]
    if not known:
        return []
    who, learnt = (" over the clients that counted", "they learnt") if run.robust else ("", "the clients learnt")
    if max(known) < _SEEN:
        return [f"Averaging A and B apart{who} {_WAS[run.method.averages]} as good as exact."]
    middle, most = median(known), max(known)
    spread = f" in a typical round, and {missed_text(most)} at most" if len(known) > 1 else ""
    return [
        f"Averaging A and B apart{who} {_MISSED[run.method.averages]} {missed_text(middle)} of what {learnt}{spread}.",
        *_recovered(rounds, run),
    ]


def _recovered(rounds: Sequence[Round], run: _Run) -> list[str]:
    """What exact methods make of it: with ranks that they add to the base, or in the adapter's own."""
    seen = [r.gauge for r in rounds if r.gauge and (r.gauge.relative or 0.0) >= _SEEN]
    added, own = _parts(seen, lambda g: g.by_adding), _parts(seen, lambda g: g.in_rank)
    if not added or not own:
        return []
    all_of_it, some = (share_text(min(1.0, max(0.0, median(x))), 0) for x in (added, own))
    some = f"an estimated {some} or more" if any(g.stderr for g in seen) else some
    if run.robust:  # no other method is a way out here: the exact ones trust everybody
        return [f"Of what is missed, factors of the adapter's rank can hold {some}, and such of any rank {all_of_it}."]
    if run.attacked:
        return [
            "The attackers' changes are part of this figure. An exact method would follow them exactly, and is no way "
            "out; docs/poisoning.md has those that are."
        ]
    if run.method.recovers in ("all", "bounded"):
        bound = " but for what its bounds on the rank cut" if run.method.recovers == "bounded" else ""
        return [f"{run.name} recovered it{bound}; factors of the adapter's rank could have held {some}."]
    if run.method.recovers == "rank":
        return [f"{run.name} recovered {some} of it, which is what factors of the adapter's rank can hold."]
    recover = "would have recovered" if run.method.averages == "never" else "recover"
    return [
        f"Exact methods {recover} it: {gauged.adds_ranks(run.mixed)} {all_of_it}, by adding ranks to the base; "
        f"{gauged.KEEPS_RANK}, which keeps to the adapter's rank, {some}. Whether the loss falls with it is another "
        "question: where we measured, exactness at the same rank gained nothing (docs/aggregation.md)."
    ]


def _parts(gauges: Sequence[RoundGauge], gain_of: Callable[[RoundGauge], float | None]) -> list[float]:
    """The parts of the error that a method would take away."""
    return [gain / g.relative for g in gauges if g.relative and (gain := gain_of(g)) is not None]


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


def _cut_sentences(judged: Sequence[Round], takes_one: bool, name: str, hostile: Set[str] | None) -> list[str]:
    if not judged:
        return []
    clients, cut = {name for r in judged for name in r.shares}, Counter(name for r in judged for name in r.cut)
    if not cut:
        return [f"None of the {len(clients)} clients was cut."]
    meant = (
        "A client is cut in a round when its change is left out, or counts for less than half of its part or length."
    )
    told = f"{len(cut)} of {len(clients)} clients {'was' if len(cut) == 1 else 'were'} cut at least once."
    said = [told]
    if hostile is not None:
        sent, lost = _counted(judged, hostile)
        others, more = _counted(judged, clients - hostile)
        said.append(
            f"Cut were {lost} of the {sent} changes that attackers sent, and {more} of the {others} of the others."
        )
    if takes_one:
        said.append(f"That says little of them: {name} takes one client's change a round, and no other.")
    elif hostile is None:
        said.append(
            "That is no proof of ill will: a client whose data are unlike the others' looks much the same, and some "
            "methods leave somebody out in every round."
        )
    return [*said, meant]


def _counted(judged: Sequence[Round], clients: Set[str]) -> tuple[int, int]:
    """How many changes came from these clients, and how many of them were cut."""
    return sum(len(clients & r.shares.keys()) for r in judged), sum(len(clients & r.cut.keys()) for r in judged)


def _cut_rows(judged: Sequence[Round], hostile: Set[str] | None) -> list[Cut]:
    """Who was cut, the most often first, with the newest reason."""
    part = Counter(name for r in judged for name in r.shares)
    times = Counter(name for r in judged for name in r.cut)
    newest = {name: (r.round, why) for r in sorted(judged, key=lambda r: r.round) for name, why in r.cut.items()}
    ordered = sorted(times, key=lambda name: (-times[name], name))
    return [
        Cut(
            name,
            f"{times[name]:,}",
            f"{max(part[name], times[name]):,}",
            share_text(_mean_share(judged, name)),
            "" if hostile is None else "yes" if name in hostile else "no",
            _why(*newest[name], times[name]),
        )
        for name in ordered
    ]


def _mean_share(judged: Sequence[Round], client: str) -> float | None:
    shares = [share for r in judged if (share := r.shares.get(client)) is not None]
    return fmean(shares) if shares else None


def _why(number: int, reason: str, times: int) -> str:
    return f"{reason} (round {number}{', the last time' if times > 1 else ''})"


def _chart(rounds: Sequence[Round], run: _Run) -> Markup | None:
    known = _known(rounds)
    if len(known) < 2 or max(value for _, value in known) < _SEEN:
        return None
    left = "At best" if run.robust or run.attacked else gauged.KEEPS_RANK
    return plots.gauge_chart(rounds, run.method.threshold, left)
