"""What the sites of a deployment tell of their own held-out rows, and how far the loss on them fell.

These rows stay at their sites and differ from site to site. The server gets a sum from each site and no row, so there
is no interval around what is said here.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from apiary.core import formatting
from apiary.core.counts import pooled_loss
from apiary.report.data import Client, Metrics, OwnRound
from apiary.tracking.event_log import Event

FEWEST = 5  # held-out rows; a site with fewer tells no loss, for the sum would say too much of each
TOGETHER = "all together"
NOT_TOLD = "not told under record-level privacy"
_AS_TOLD = {"rounded": "about {}", "declared": "{} (declared)"}  # counts that are not exact, by the site's policy
_NAMED = 40  # sites with a line of their own


class Change(NamedTuple):
    """The loss of the shared model in two rounds, in nats per response token, at the sites that told one in both."""

    first: int  # round
    last: int
    before: float | None  # over the rows of these sites together; None where that cannot be worked out
    now: float | None
    by_site: Mapping[str, tuple[float, float]]

    @property
    def fell(self) -> int:
        """Sites whose loss fell."""
        return sum(now < before for before, now in self.by_site.values())


class Grid(NamedTuple):
    """The sites' table as it is shown; the last row is all sites together."""

    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    left_out: int  # sites without a line


def own_rounds(events: Iterable[Event]) -> list[dict[str, Any]]:
    """The `sites` part of metrics.json: what each evaluation in the log tells of the sites' own held-out rows."""
    return [
        {
            "round": event["round"],
            "loss": event.get("clients_loss"),
            "sites": event["clients"],
            "rows": event.get("clients_rows", {}),
            "few": event.get("clients_few", []),
        }
        for event in events
        if event["event"] == "evaluate" and "clients" in event
    ]


def with_sites(metrics: Metrics, events: Iterable[Event]) -> Metrics:
    """The results with what the log tells of sites, for a deployment whose metrics.json is older than that part."""
    simulated = any(client.own or client.mix or client.mix_loss for client in metrics.clients)
    if metrics.sites is not None or simulated or not metrics.clients:
        return metrics
    return metrics.model_copy(update={"sites": tuple(map(OwnRound.model_validate, own_rounds(events)))})


def told(metrics: Metrics, *, to_the_end: bool = False) -> list[OwnRound]:
    """The rounds in which a site told a loss, up to the one that is delivered or to the end."""
    last = math.inf if to_the_end or metrics.delivered is None else metrics.delivered.round
    return [measured for measured in metrics.sites or () if measured.round <= last and _losses(measured)]


def change(metrics: Metrics) -> Change | None:
    """From the first measurement to the last one; None without two that share a site."""
    rounds = told(metrics)
    if len(rounds) < 2:
        return None
    first, last = rounds[0], rounds[-1]
    before, now = _losses(first), _losses(last)
    both = {name: (before[name], now[name]) for name in before if name in now}
    if not both:
        return None
    return Change(first.round, last.round, _together(first, both), _together(last, both), both)


def _losses(measured: OwnRound) -> dict[str, float]:
    return {name: loss for name, loss in measured.sites.items() if loss is not None}


def _together(measured: OwnRound, names: Collection[str]) -> float | None:
    """The loss over the rows of some of the sites, as `pooled_loss` has it; None where these are unknown."""
    losses = _losses(measured)
    if set(names) == set(losses):
        return measured.loss
    if not set(names) <= set(measured.rows):
        return None
    return pooled_loss((losses[name] * measured.rows[name][1], measured.rows[name][1]) for name in names)


def when(number: int) -> str:
    """`before training`, `after round 3`."""
    return "before training" if number == 0 else f"after round {number}"


def sentences(metrics: Metrics) -> list[str]:
    """By how much the loss fell, and at how many sites; then who tells none, and why."""
    return [*filter(None, [how_far(metrics)]), *silent(metrics)]


def how_far(metrics: Metrics) -> str:
    """By how much the loss fell and at how many sites, naming none; empty where no site told a loss."""
    rounds, moved = told(metrics), change(metrics)
    if not rounds:
        return ""
    if moved is None:
        loss = formatting.loss_text(rounds[-1].loss)
        return f"On each site's own held-out rows the loss is {loss} nats per response token {when(rounds[-1].round)}."
    heard = {name for measured in rounds for name in _losses(measured)}
    both = "" if heard == set(moved.by_site) else " that told one both times"
    at = f"it fell at {moved.fell} of {_sites(len(moved.by_site))}{both}"
    if moved.before is None or moved.now is None:
        return f"On each site's own held-out rows, from {when(moved.first)} to {when(moved.last)}: {at}."
    how = f"{'fell' if moved.now < moved.before else 'rose'} by {formatting.loss_text(abs(moved.now - moved.before))}"
    return (
        f"On each site's own held-out rows, all sites together, the loss {how} nats per response token: from "
        f"{formatting.loss_text(moved.before)} {when(moved.first)} to {formatting.loss_text(moved.now)} "
        f"{when(moved.last)}; {at}."
    )


def silent(metrics: Metrics) -> list[str]:
    """Who tells no loss, and why: sites with too few rows by name, else what stands in the way of all."""
    if metrics.sites is None:
        return []
    if metrics.private:
        where = "" if metrics.row("federated") else "; data.test names rows on the server to measure on"
        rows = any(client.examples is not None for client in metrics.clients)  # a run of an earlier version
        known = "" if rows else f" How many rows a site has, and the loss in training, are {NOT_TOLD}."
        return [f"Under differential privacy sites tell no loss of their own held-out rows{where}.{known}"]
    if few := _few(metrics):
        verbs = ("has", "tells") if len(few) == 1 else ("have", "tell")
        return [f"{_listed(few)} {verbs[0]} fewer than {FEWEST} held-out rows and so {verbs[1]} no loss."]
    if not told(metrics):
        return ["No site was asked for the loss on its own held-out rows (evaluate.clients, evaluate.every)."]
    return []


def _few(metrics: Metrics) -> list[str]:
    """Sites that never told a loss, for they have too few rows."""
    heard = {name for measured in told(metrics) for name in _losses(measured)}
    return sorted({name for measured in metrics.sites or () for name in measured.few} - heard)


def _listed(names: Sequence[str]) -> str:
    shown = [*names[:_NAMED], *([f"{len(names) - _NAMED} more"] if len(names) > _NAMED else [])]
    return f"{', '.join(shown[:-1])} and {shown[-1]}" if len(shown) > 1 else shown[0]


def _sites(count: int) -> str:
    return f"{count:,} site" + ("" if count == 1 else "s")


def grid(metrics: Metrics) -> Grid | None:
    """A line for each site: rows to train on, rows held out, its loss first and last. None where it is no deployment.

    Columns that no site fills are left out.
    """
    if metrics.sites is None or not metrics.clients:
        return None
    rounds, few = told(metrics), set(_few(metrics))
    ends = [when(measured.round) for measured in _ends(rounds)]
    if len(ends) > 1:
        ends.append("change")
    columns = ("site", "rows to train on", "response tokens", "rows held out", *ends)
    lines = [_line(metrics, client, rounds, client.client in few) for client in metrics.clients]
    lines = [*lines[:_NAMED], _total(metrics, rounds)]
    filled = [i for i in range(len(columns)) if any(line[i] != formatting.MISSING for line in lines)]
    picked = [tuple(line[i] for i in filled) for line in lines]
    return Grid(tuple(columns[i] for i in filled), picked, max(0, len(metrics.clients) - _NAMED))


def _ends(rounds: Sequence[OwnRound]) -> list[OwnRound]:
    """The first and the last measurement, or the only one."""
    return [rounds[0], rounds[-1]] if len(rounds) > 1 else list(rounds)


def _line(metrics: Metrics, client: Client, rounds: Sequence[OwnRound], few: bool) -> tuple[str, ...]:
    own = [(measured, loss) for measured in rounds if (loss := _losses(measured).get(client.client)) is not None]
    held_out = own[-1][0].rows.get(client.client, (None, None))[0] if own else None
    # A private site tells how many rows it has, and no tokens.
    counts = [client.examples, None if metrics.private else client.tokens, held_out]
    texts = [client.client, *map(formatting.count_text, counts)]
    if metrics.private and client.examples is None:
        texts[1] = "not told"
    elif client.counts in _AS_TOLD:
        texts[1:] = [text if text == formatting.MISSING else _AS_TOLD[client.counts].format(text) for text in texts[1:]]
    if few:
        texts[3] = f"below {FEWEST}"
    return (*texts, *_fall(own, _ends(rounds)))


def _fall(own: Sequence[tuple[OwnRound, float]], ends: Sequence[OwnRound]) -> list[str]:
    """A site's first and last loss, and the change; the loss alone where there was one measurement."""
    if len(ends) < 2:
        return [formatting.loss_text(loss) for _, loss in own] or [formatting.MISSING] * len(ends)
    first, last = ends
    if not own:
        return [formatting.MISSING] * 3
    if len(own) == 1:
        pair = [_at(own[0], first), formatting.MISSING]
        return [*(pair if own[0][0].round == first.round else reversed(pair)), formatting.MISSING]
    return [_at(own[0], first), _at(own[-1], last), formatting.change_text(own[-1][1] - own[0][1])]


def _at(own: tuple[OwnRound, float], usual: OwnRound) -> str:
    """A loss, with its round where that is not the one of the column."""
    measured, loss = own
    return formatting.loss_text(loss) + ("" if measured.round == usual.round else f" ({when(measured.round)})")


def _total(metrics: Metrics, rounds: Sequence[OwnRound]) -> tuple[str, ...]:
    """All sites together: counts added up, and losses over the rows of all that told one in both rounds."""
    examples = [client.examples for client in metrics.clients if client.examples is not None]
    tokens = [client.tokens for client in metrics.clients if client.tokens is not None and not metrics.private]
    held_out = [count for count, _ in rounds[-1].rows.values()] if rounds else []
    sums = (sum(counts) if counts else None for counts in (examples, tokens, held_out))
    about = "about {}" if any(client.counts != "exact" for client in metrics.clients) else "{}"
    texts = [TOGETHER, *(formatting.MISSING if n is None else about.format(formatting.count_text(n)) for n in sums)]
    ends, moved = _ends(rounds), change(metrics)
    if len(ends) < 2:
        return (*texts, *(formatting.loss_text(measured.loss) for measured in ends))
    if moved is None or moved.before is None or moved.now is None:
        return (*texts, *([formatting.MISSING] * 3))
    both = (formatting.loss_text(moved.before), formatting.loss_text(moved.now))
    return (*texts, *both, formatting.change_text(moved.now - moved.before))
