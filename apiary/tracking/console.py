"""How a run is followed: a live board on a terminal, plain lines in a pipe, refusals with --quiet.

All three are observers of the run log. What they show is a pure fold: `fold(state, event)` and
`board(state, now)`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from apiary.core.formatting import (
    bytes_text,
    change_text,
    clean,
    count_text,
    loss_text,
    missed_text,
    seconds_text,
)
from apiary.tracking import delivery
from apiary.tracking.event_log import Event, Observer

_NAMED = 6  # how many waiting clients are named; the others are counted
_DECLINES = {"idle": "no rows of this stage, or too few", "budget": "the privacy budget is spent"}
_NOT_TOLD = "not told under record-level privacy"
_RECENT = 5  # rounds whose mean duration makes the forecast
_TENTHS = 10  # of the baselines, however many: so often plain lines tell how far they are


@dataclasses.dataclass(frozen=True)
class State:
    """What is known of a run after some of its events. Times are unix seconds."""

    clients: int = 0
    rounds: int = 0
    round: int = 0  # the last one asked for
    finished_rounds: int = 0
    phase: str = "starting"
    started: float | None = None
    asked_at: float | None = None
    asked: tuple[str, ...] = ()
    waiting: tuple[str, ...] = ()
    round_tokens: float = 0.0
    rate: float | None = None  # trained tokens per second; expected rows under record-level privacy
    private: bool = False  # whether clients account for record-level privacy, and so tell no loss and no tokens
    train_loss: float | None = None
    gauge: float | None = None  # what averaging A and B apart missed in the last round, of the clients' mean change
    method: str = ""  # of the last round, where the run chooses by the round
    averaged: bool = True  # whether the run averages A and B apart, as far as is known
    switched: bool = False  # whether that is another one than in the round before, or the first
    losses: tuple[float, ...] = ()  # held-out, in order: the last one, and the one before if the rows are the same
    own: tuple[str, ...] = ()  # sites on whose own rows the loss is measured; none where it is on the server's
    first: tuple[int, float] | None = None  # round and loss of the first measurement on these rows
    bytes_up: int = 0
    bytes_down: int = 0
    ends: tuple[float, ...] = ()  # when rounds began or ended, newest last
    refused: int = 0
    sat_out: tuple[tuple[str, str], ...] = ()  # clients that rightly did not train in this round, and why
    baseline: tuple[str, int, int] | None = None  # method, done, total
    after: tuple[str, ...] = ()  # what the run does after its rounds, and the forecast of these leaves out
    phase_at: float | None = None
    share_done: float = 0.0  # of the work of this phase, after the rounds


def fold(state: State, event: Event) -> State:
    """The state after one more event; unknown kinds change nothing."""
    change = _FOLDS.get(event["event"])
    return dataclasses.replace(state, **change(state, event)) if change else state


def _start(state: State, event: Event) -> dict[str, Any]:
    return {
        "started": state.started or event["time"],
        "rounds": event.get("rounds") or 0,
        "clients": event.get("clients") or 0,
        "averaged": (event.get("method") or {}).get("averages") != "never",
        "after": tuple(map(clean, event.get("after") or ())),
    }


def _phase(state: State, event: Event) -> dict[str, Any]:
    return {"phase": clean(event["name"]), "baseline": None, "phase_at": event.get("time"), "share_done": 0.0}


def _asked(state: State, event: Event) -> dict[str, Any]:
    names = tuple(clean(name) for name in event["clients"])
    return {
        "round": event["round"],
        "asked": names,
        "waiting": names,
        "asked_at": event["time"],
        "round_tokens": 0.0,
        "sat_out": (),
        "ends": state.ends or (event["time"],),
    }


def _client(state: State, event: Event) -> dict[str, Any]:
    tokens = state.round_tokens + (event.get("tokens") or 0)
    changes: dict[str, Any] = {"waiting": _without(state.waiting, event), "round_tokens": tokens}
    changes["private"] = state.private or "spent" in event
    if state.asked_at is not None and event["time"] > state.asked_at:
        changes["rate"] = tokens / (event["time"] - state.asked_at)
    return changes


def _refused(state: State, event: Event) -> dict[str, Any]:
    return {"waiting": _without(state.waiting, event), "refused": state.refused + 1}


def _declined(state: State, event: Event) -> dict[str, Any]:
    one = (clean(event["client"]), event["reason"])
    return {"waiting": _without(state.waiting, event), "sat_out": (*state.sat_out, one)}


def _without(names: tuple[str, ...], event: Event) -> tuple[str, ...]:
    try:
        place = names.index(clean(event["client"]))
    except ValueError:
        return names
    return names[:place] + names[place + 1 :]


def _round(state: State, event: Event) -> dict[str, Any]:
    seconds, tokens, method = event.get("seconds"), event.get("tokens"), clean(event.get("method") or "")
    return {
        "round": event["round"],
        "finished_rounds": event["round"],
        "waiting": (),
        "train_loss": event.get("train_loss"),
        "gauge": (event.get("gauge") or {}).get("relative"),
        "method": method,
        "switched": method != state.method,
        "rate": tokens / seconds if tokens and seconds else state.rate,
        "bytes_up": state.bytes_up + (event.get("bytes_up") or 0),
        "bytes_down": state.bytes_down + (event.get("bytes_down") or 0),
        "ends": (*state.ends, event["time"])[-_RECENT - 1 :],
    }


def _evaluate(state: State, event: Event) -> dict[str, Any]:
    changes: dict[str, Any] = {"bytes_down": state.bytes_down + (event.get("bytes_evaluate") or 0)}
    loss = event.get("loss")
    own: tuple[str, ...] = ()
    if loss is None and event.get("clients"):
        loss, own = event.get("clients_loss"), tuple(sorted(map(clean, event["clients"])))
    if loss is None:
        return changes
    same = own == state.own  # other sites, other rows: a change of the loss would tell nothing
    return changes | {
        "losses": (*(state.losses if same else ()), loss)[-2:],
        "own": own,
        "first": state.first if same and state.first else (event["round"], loss),
    }


def _baseline(state: State, event: Event) -> dict[str, Any]:
    return {
        "phase": "baselines",
        "baseline": (clean(event["method"]), event["done"], event["total"]),
        "share_done": event.get("share") or event["done"] / max(event["total"], 1),
    }


def _personal(state: State, event: Event) -> dict[str, Any]:
    return {
        "phase": "personal models",
        "baseline": ("own models", event["done"], event["total"]),
        "share_done": event["done"] / max(event["total"], 1),
    }


_FOLDS: dict[str, Callable[[State, Event], dict[str, Any]]] = {
    "start": _start,
    "phase": _phase,
    "asked": _asked,
    "client": _client,
    "refused": _refused,
    "declined": _declined,
    "round": _round,
    "evaluate": _evaluate,
    "baseline": _baseline,
    "personal": _personal,
    "finish": lambda state, event: {"phase": "done", "baseline": None},
}


def eta(state: State, now: float) -> float | None:
    """Seconds until the last round ends, from the mean of recent rounds; None before the first end.

    Time already spent in the current round counts; what comes after the rounds (the table's other
    rows) does not.
    """
    if len(state.ends) < 2 or not state.rounds:
        return None
    each = (state.ends[-1] - state.ends[0]) / (len(state.ends) - 1)
    left = (state.rounds - state.finished_rounds) * each - max(0.0, now - state.ends[-1])
    return max(0.0, left)


def phase_eta(state: State, now: float) -> float | None:
    """Seconds until a phase after the rounds ends, if all its work goes as fast as that done; None before any is."""
    if state.phase_at is None or not 0 < state.share_done < 1 or now <= state.phase_at:
        return None
    return (now - state.phase_at) * (1 - state.share_done) / state.share_done


def board(state: State, now: float) -> RenderableType:
    """The live board: where the run is, what it learns, what it costs, and whom it waits for."""
    facts = Table.grid(padding=(0, 2), expand=False)
    facts.add_column(style="dim", justify="right", no_wrap=True)
    facts.add_column(overflow="fold")
    for name, value in _facts(state, now):
        facts.add_row(name, Text(value))
    title = Text(f"apiary · {state.phase}", style="bold")
    return Panel(
        Group(_bars(state), facts),
        title=title,
        title_align="left",
        border_style="cyan",
        expand=True,
    )


def _bars(state: State) -> RenderableType:
    grid = Table.grid(padding=(0, 2), expand=True)
    grid.add_column(no_wrap=True, justify="right", style="bold")
    grid.add_column(ratio=1)
    grid.add_column(justify="right", no_wrap=True)
    if state.rounds:
        inside = (len(state.asked) - len(state.waiting)) / len(state.asked) if state.waiting else 0.0
        done = min(state.finished_rounds + inside, state.rounds)
        bar = ProgressBar(total=state.rounds, completed=done)
        grid.add_row("round", bar, f"{state.round} of {state.rounds}")
    if state.baseline is not None:
        method, done_now, total = state.baseline
        bar = ProgressBar(total=max(total, 1), completed=done_now)
        grid.add_row(Text(method if method == "own models" else f"baseline {method}"), bar, f"{done_now} of {total}")
    return grid


def _facts(state: State, now: float) -> Iterator[tuple[str, str]]:
    if state.asked and state.phase != "done":
        yield (
            "clients",
            f"{len(state.asked) - len(state.waiting)} of {len(state.asked)} done" + _refusals(state),
        )
    if state.train_loss is not None or state.losses:
        yield "train loss", _NOT_TOLD if state.private else f"{loss_text(state.train_loss)} nats per token"
        yield "held-out loss", _held_out(state)
    if state.gauge is not None:
        yield f"averaging {_misses(state)}", missed_text(state.gauge) + _averaged_by(state)
    if state.rate is not None:
        yield "speed", _rate(state)
    if state.bytes_up or state.bytes_down:
        yield "sent", f"{bytes_text(state.bytes_up)} up, {bytes_text(state.bytes_down)} down"
    if state.started is not None:
        yield "time", _clock(state, now)
    if state.waiting:
        yield "waiting for", _names(state.waiting)


def _misses(state: State) -> str:
    return "misses" if state.averaged else "would miss"


def _averaged_by(state: State) -> str:
    return f"; averaged by {state.method}" if state.method else ""


def _refusals(state: State) -> str:
    return f", {state.refused} refused" if state.refused else ""


def _held_out(state: State) -> str:
    if not state.losses:
        return "not measured yet"
    where = " on each site's own held-out rows" if state.own else ""
    return f"{loss_text(state.losses[-1])}{_change(state)} nats per token{where}{_since_first(state)}"


def _change(state: State) -> str:
    return f" ({change_text(state.losses[-1] - state.losses[-2])})" if len(state.losses) > 1 else ""


def _since_first(state: State) -> str:
    """By how much the loss on the sites' rows fell in all; the table says it of the server's."""
    if not state.own or state.first is None or len(state.losses) < 2:
        return ""
    number, loss = state.first
    since = f"round {number}" if number else "before training"
    return f", {change_text(state.losses[-1] - loss)} since {since}"


def _clock(state: State, now: float) -> str:
    spent = f"{seconds_text(now - (state.started or now))} so far"
    left = eta(state, now)
    training = state.finished_rounds < state.rounds
    if left is not None and training:
        return f"{spent}, about {seconds_text(left)} of rounds left{_then(state)}"
    return spent + _phase_left(state, now)


def _then(state: State) -> str:
    return f", then {' and '.join(state.after)}" if state.after else ""


def _phase_left(state: State, now: float) -> str:
    left = phase_eta(state, now)
    return "" if left is None else f", about {seconds_text(left)} left of this"


def _names(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def line(state: State, event: Event) -> str | None:
    """The plain line for an event, given the state after it; None for events that get no line."""
    match event["event"]:
        case "start":
            size = f"{event.get('clients')} clients, {event.get('rounds')} rounds"
            made = f"\nmade by: {clean(event['outline'])}" if "outline" in event else ""
            return f"run: {size}, seed {event.get('seed')}{made}"
        case "template":
            return f"prompt template: {clean(event['template'])}"
        case "phase" if event["name"] not in ("training", "evaluating"):
            return f"phase: {clean(event['name'])}"
        case "round":
            return "\n".join([_round_line(state, event), *_asides(state, event)])
        case "evaluate":
            return _evaluate_line(state, event)
        case "refused":
            where = {None: "handshake", 0: "before training"}.get(number := event.get("round"), f"round {number}")
            return f"refused: {clean(event['client'])} ({where}): {clean(event['reason'])}"
        case "waiting":
            where = "handshake" if event.get("round") is None else f"round {event['round']}"
            names = _names(tuple(clean(name) for name in event["clients"]))
            return f"{where}: no answer for {seconds_text(event['seconds'])} from {names}"
        case "warning":
            return f"warning: {clean(event['message'])}"
        case "baseline" if event["done"] >= event["total"]:
            return "baselines: trained" + _took(state, event)
        case "baseline" if _TENTHS * event["done"] // event["total"] > _TENTHS * (event["done"] - 1) // event["total"]:
            return f"baselines: {event['done']} of {event['total']} trained{_phase_left(state, event['time'])}"
        case "personal":
            return f"own model of {clean(event['client'])}: {_kept(event)}{_phase_left(state, event['time'])}"
        case "stop":
            return f"stopped after round {event['round']}: {clean(event['reason'])}"
        case delivery.EVENT:
            return clean(delivery.sentence(delivery.read(event)))
        case "finish":
            return f"finished in {seconds_text(event.get('seconds'))}" + _result(state)
    return None


def _took(state: State, event: Event) -> str:
    return f" in {seconds_text(event['time'] - state.phase_at)}" if state.phase_at is not None else ""


def _kept(event: Event) -> str:
    share = f" ({event['weight']:g} alone)" if event["kept"] == "mixed" else ""
    return f"kept {clean(event['kept'])}{share}, {event['done']} of {event['total']}"


def _round_line(state: State, event: Event) -> str:
    parts = [
        f"{event['clients']} of {event['asked']} clients",
        f"train loss {_NOT_TOLD if state.private else loss_text(event.get('train_loss'))}",
        _rate(state),
        f"{bytes_text(event.get('bytes_up'))} up"
        + (f", {bytes_text(down)} down" if (down := event.get("bytes_down")) else ""),
        seconds_text(event.get("seconds")),
    ]
    if state.gauge is not None:
        parts.insert(2, f"averaging A and B apart {_misses(state)} {missed_text(state.gauge)} of the change")
    left = eta(state, event["time"])
    if left is not None and state.finished_rounds < state.rounds:
        parts.append(f"about {seconds_text(left)} left{_then(state)}")
    return f"round {event['round']}/{state.rounds}: " + ", ".join(parts)


def _rate(state: State) -> str:
    return f"{count_text(state.rate)} {'expected rows' if state.private else 'tokens'}/s"


def _asides(state: State, event: Event) -> list[str]:
    """What a round is told beside its figures: who sat it out, that its method is another one, and who was cut."""
    told = []
    for reason, why in _DECLINES.items():
        if names := tuple(name for name, given in state.sat_out if given == reason):
            told.append(f"sat out: {_names(names)} ({why})")
    if state.switched and state.method:
        missed = f": averaging A and B apart missed {missed_text(state.gauge)}" if state.gauge is not None else ""
        told.append(f"method: {state.method} from round {event['round']} on{missed}")
    if cut := event.get("cut"):
        told.append(f"cut: {_names(tuple(f'{clean(name)} ({clean(why)})' for name, why in cut.items()))}")
    return told


def _evaluate_line(state: State, event: Event) -> str | None:
    where = f"round {event['round']}/{state.rounds}" if event["round"] else "before training"
    if event.get("loss") is None and "clients" in event:
        return f"{where}: {_own_rows(state, event)}"
    if "loss" not in event:
        why = "the server has no data.test, and sites are not asked for theirs"
        return None if event["round"] else f"{where}: held-out loss not measured: {why}"
    low, high = event.get("ci95") or (None, None)
    interval = f", 95% interval over rows {loss_text(low)} to {loss_text(high)}" if low is not None else ""
    sent = f", {bytes_text(down)} down to measure" if (down := event.get("bytes_evaluate")) else ""
    return f"{where}: held-out loss {loss_text(event.get('loss'))}{_change(state)} nats per token{interval}{sent}"


def _own_rows(state: State, event: Event) -> str:
    """What the sites tell of their own held-out rows: the loss over all of them, and of each site if these are few."""
    losses = {clean(name): loss for name, loss in event["clients"].items()}
    few = tuple(clean(name) for name in event.get("clients_few") or ())
    parts = [f"too few held-out rows to tell a loss: {_names(few)}"] if few else []
    if losses:
        each = ", ".join(f"{name} {loss_text(loss)}" for name, loss in losses.items())
        told = f": {each}" if len(losses) <= _NAMED else f" at {len(losses)} sites"
        loss = f"{loss_text(event.get('clients_loss'))}{_change(state)} nats per token"
        parts.insert(0, f"loss on each site's own held-out rows {loss}{told}")
    return "; ".join(parts) or "no site told a loss on its own held-out rows"


def _result(state: State) -> str:
    if not state.own or not state.losses:
        return ""
    return f"; loss on each site's own held-out rows {loss_text(state.losses[-1])} nats per token{_since_first(state)}"


class Lines:
    """An observer that writes one plain line for each event worth one.

    Args:
        stream: where the lines go.
        kinds: write only these kinds; None = all that have a line.
    """

    def __init__(self, stream: TextIO, kinds: frozenset[str] | None = None) -> None:
        self._stream, self._kinds, self._state = stream, kinds, State()

    def __call__(self, event: Event) -> None:
        """Writes the event's line, if it has one."""
        self._state = fold(self._state, event)
        text = line(self._state, event)
        if text is not None and (self._kinds is None or event["event"] in self._kinds):
            self._stream.write(text + "\n")
            self._stream.flush()


class Board:
    """An observer that keeps `board` on a terminal up to date; above it stay template, refusals, warnings, who was cut.

    Use as a context manager, so that the cursor comes back even when the run fails.
    """

    def __init__(self, console: Console) -> None:
        self._console, self._state = console, State()
        self._live = Live(
            get_renderable=lambda: board(self._state, time.time()),
            console=console,
            refresh_per_second=2,  # the run needs the cores more than the clock does
        )

    def __enter__(self) -> Board:
        """Shows the board."""
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Leaves the last board on the screen and gives the terminal back."""
        self._live.stop()

    def __call__(self, event: Event) -> None:
        """Folds the event in; the next refresh shows it."""
        self._state = fold(self._state, event)
        if event["event"] in ("refused", "warning", "stop"):
            style = "yellow" if event["event"] == "warning" else "red"
            self._console.print(Text(line(self._state, event) or "", style=style))
        elif event["event"] in ("template", delivery.EVENT):
            self._console.print(Text(line(self._state, event) or "", style="dim"))
        elif event["event"] == "round":
            for text in _asides(self._state, event):
                self._console.print(Text(text, style="yellow"))


@contextlib.contextmanager
def make_progress(quiet: bool, stream: TextIO | None = None) -> Iterator[Observer]:
    """The observer that fits: refusals alone when quiet, a board on a terminal, else plain lines.

    Args:
        quiet: only what went wrong at a client.
        stream: standard error by default, so that standard output holds results alone.
    """
    out = sys.stderr if stream is None else stream
    if quiet:
        yield Lines(out, frozenset({"refused"}))
    elif out.isatty() and not (console := Console(file=out)).is_dumb_terminal:
        with Board(console) as shown:
            yield shown
    else:
        yield Lines(out)
