"""Which round each site answered last in a run, and why not the newest one, by the run's log."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from apiary.core.formatting import seconds_text
from apiary.tracking.event_log import Event


class Attendance(NamedTuple):
    """How a site stands in a run."""

    answered: int | None = None  # the last round that it answered; None: none yet
    why: str = ""  # why it did not answer what it was asked last; "" where it did, or where nothing is asked of it

    def sentence(self) -> str:
        """In words, for a line of its own site."""
        last = "has answered no round yet" if self.answered is None else f"last answered round {self.answered}"
        return f"{last}; {self.why}" if self.why else last


def of_events(events: Iterable[Event], now: float, replies: Iterable[Mapping[str, Any]] = ()) -> dict[str, Attendance]:
    """Each site that a run knows of, by name.

    Args:
        events: the run's, in order.
        now: seconds since 1970, as the log counts them.
        replies: the newest of its account. An answer stands there when it has come, and in the log when it counts,
            which may be when the last one has come (`server.screen`).
    """
    answered: dict[str, int] = {}
    refused: dict[str, str] = {}  # since its last answer
    pending: dict[str, tuple[str, float]] = {}  # what is asked of it, and since when
    known: dict[str, None] = {}
    for event in events:
        number, client = event.get("round"), str(event.get("client"))
        match event["event"]:
            case "start":  # of a run that goes on: rounds that were answered before stay so, and nothing else does
                pending.clear()
                refused.clear()
            case "handshake":
                known[client] = None
                pending.pop(client, None)
                refused.pop(client, None)
            case "asked":
                pending |= {str(name): (f"round {number}", event["time"]) for name in event["clients"]}
            case "waiting":
                for name in map(str, event["clients"]):
                    known[name] = None
                    pending.setdefault(name, (_question(event), event["time"] - event["seconds"]))
            case "client" | "declined":
                answered[client] = number or 0
                pending.pop(client, None)
                refused.pop(client, None)
            case "refused":
                known[client] = None
                place = "at the handshake" if number is None else f"in round {number}"
                refused[client] = f"refused {place}: {event['reason']}"
                pending.pop(client, None)
            case "round" | "evaluate" | "finish" | "failed":
                pending.clear()
    for reply in replies:
        name, counts = str(reply["site"]), reply["kind"] == "train" and reply["verdict"] == "signed"
        if counts and name in pending and pending[name][0] == f"round {reply['round']}":
            answered[name] = int(reply["round"])
            del pending[name]
    why = {name: f"no answer to {what} for {seconds_text(now - since)}" for name, (what, since) in pending.items()}
    names = [*known, *answered, *why]
    return {name: Attendance(answered.get(name), why.get(name) or refused.get(name, "")) for name in names}


def _question(event: Event) -> str:
    if event.get("round") is None:
        return "the handshake"
    return f"round {event['round']}" + (" (evaluation)" if event["question"] == "evaluate" else "")
