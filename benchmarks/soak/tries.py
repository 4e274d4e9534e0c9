"""A run of a soak: its faults at their moments, and what became of each."""

from __future__ import annotations

import itertools
import random
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.soak.faults import DEADLINE_S, FAULTS, Strike
from benchmarks.soak.field import SITES, Field, words_of
from benchmarks.soak.watch import Watch, charges, cohort_of, equal_until, releases

PROMISED_S = 30.0  # within which it is told why a run waits
_LONGEST_S = 300.0  # from a fault's end until all takes part again
_PROGRESS = ("start", "handshake", "asked", "client", "round", "finish")
_ONLINE_S = 35.0  # for half a minute Flower calls a node online that is gone
_SLOW_S = 10.0  # from then on it is a reason that status names a question without an answer
_SETTINGS = (
    *("train.steps=1", "train.batch_tokens=256", "train.threads=1", "model.dtype=float32", "model.device=cpu"),
    *("evaluate.every=0", "evaluate.clients=false", "data.test_fraction=0", "adapter.rank=4"),
    *("strategy.min_clients=1", "strategy.quorum=0.3", "strategy.server_optimizer=none"),
)
_PRIVATE = (
    *("privacy.unit=record", "privacy.batch_rows=8", "privacy.noise_multiplier=1", "privacy.epsilon=1e6"),
    "privacy.accountant=rdp",
)


_OF_SERVER, _OF_SITE = ("deploy.superlink", "deploy.superexec", "deploy.proxy"), ("client.site_worker", "deploy.node")
_SANDBOX = "chat_sandbox.py"  # of a worker, for chat templates
_ENDED = "is started again"  # what a server prints of a process of its own that is gone


class Plan(NamedTuple):
    """A try that is to be made."""

    fault: str
    number: int  # from 1
    site: str
    phase: str  # of the round that it waits for: start (of the run), asked, round
    after_s: float

    @classmethod
    def drawn(cls, seed: int, fault: str, number: int) -> Plan:
        """The same plan for the same three."""
        rng = random.Random(f"{seed} {fault} {number}")
        phase = rng.choices(("start", "asked", "round"), (1, 4, 3))[0]
        return cls(fault, number, rng.choice(SITES), phase, round(rng.uniform(0.0, 3.0), 2))


class Try(NamedTuple):
    """A fault that has hit, and what was seen until all went well again."""

    plan: Plan
    at: float  # monotonic seconds
    number: int  # the round
    strike: Strike
    mended: float
    back: float | None  # None: it never came so far


def settings_of(rounds: int, private: bool, slow: bool) -> list[str]:
    """Of a run."""
    deadline = f"strategy.deadline_s={DEADLINE_S if slow else 900.0}"
    return [f"rounds={rounds}", deadline, *_SETTINGS, *(_PRIVATE if private else ())]


def carry_out(watch: Watch, plans: Sequence[Plan], rounds: int, seed: int) -> tuple[list[Try], int | None]:
    """Hit a run that was just submitted, by one plan after the other, and wait for its end.

    Returns:
        The tries that could be made before the run ended, and its exit code; None: it did not end, and was ended.
    """
    tries: list[Try] = []
    for plan in plans:
        rng = random.Random(f"{seed} {plan.fault} {plan.number} how")
        made = _try(watch, plan, rng)
        if made is None:
            break
        tries.append(made)
        if made.back is None:
            break
    limit = time.monotonic() + _LONGEST_S + 10.0 * rounds
    while not watch.ended() and time.monotonic() < limit:
        _step(watch)
    watch.look()
    if watch.ended():
        return tries, watch.field.kept["submit"].returncode
    watch.field.kept["submit"].kill()
    watch.field.kept["submit"].wait()
    return tries, None


def _step(watch: Watch) -> None:
    watch.look()
    watch.field.look()
    time.sleep(0.1)


def _try(watch: Watch, plan: Plan, rng: random.Random) -> Try | None:
    """One try; None where the run ended before the fault could hit."""
    field, fault = watch.field, FAULTS[plan.fault]
    known, since = watch.latest(plan.phase), time.monotonic()
    while not (watch.seen if plan.phase == "start" else watch.latest(plan.phase) > known):
        if watch.ended() or time.monotonic() - since > _LONGEST_S:
            return None
        _step(watch)
    at = time.monotonic() + plan.after_s
    while time.monotonic() < at:
        _step(watch)
    while (strike := fault.hit(field, plan.site, rng)) is None:
        if watch.ended() or time.monotonic() - at > _LONGEST_S:
            return None
        _step(watch)
    at = time.monotonic()
    done = watch.latest("round")
    number = max(watch.latest("asked"), done)
    while time.monotonic() - at < strike.seconds or watch.latest("round") < done + strike.rounds or not strike.over():
        if watch.ended() or time.monotonic() - at > _LONGEST_S:
            break
        _step(watch)
    strike.mend()
    mended = time.monotonic()
    return Try(plan, at, number, strike, mended, _back(watch, mended))


def _back(watch: Watch, mended: float) -> float | None:
    """When all took part again after a fault's end; None: that was not seen.

    That is a whole round with every site. Where the run ends before, all sites must be online by `apiary deploy
    status`, in a question that was asked after the end, for then the next run asks them (`absent`).
    """
    while time.monotonic() - mended < _LONGEST_S:
        if (at := _whole_round(watch, mended)) is not None:
            return at
        if watch.ended():
            return _all_online(watch, max(mended, time.monotonic()))
        _step(watch)
    return None


def _whole_round(watch: Watch, since: float) -> float | None:
    """When the first round that began after a moment had every site's answer."""
    events = [seen.event for seen in watch.after(since, "asked", "client")]
    asked = {event["round"] for event in events if event["event"] == "asked"}
    for seen in watch.after(since, "round"):
        if seen.event["round"] in asked and cohort_of(events, seen.event["round"])[1] == set(SITES):
            return seen.at
    return None


def _all_online(watch: Watch, since: float) -> float | None:
    while time.monotonic() - since < _LONGEST_S:
        for at, lines in watch.status:
            if at > since + _ONLINE_S and all(any(_online(site, line) for line in lines) for site in SITES):
                return at
        _step(watch)
    return None


def _online(site: str, line: str) -> bool:
    return line.startswith(f"site {site}: online")


# -- what became of it ----------------------------------------------------------------------------


def accounts(
    watch: Watch, tries: Sequence[Try], code: int | None, private: bool, reference: Mapping[int, str]
) -> Iterator[dict[str, Any]]:
    """A line for each try of a run that has ended.

    Args:
        watch: of the run.
        tries: in their order.
        code: of `submit`.
        private: whether the run promised privacy.
        reference: the digest of the adapter after each round of an undisturbed run.
    """
    log, strays, account = watch.log(), _left_over(watch.field), watch.account()
    for place, made in enumerate(tries):
        until = tries[place + 1].at if place + 1 < len(tries) else float("inf")
        fault, plan = FAULTS[made.plan.fault], made.plan
        own = _rounds(watch, made.at, until)
        last = max(own, default=0)
        equal = bool(own) and equal_until(log, last)
        lost = [(n, site) for n in own for site in sorted(_missing(log, n))]
        log_s, status_s, line = _told(watch, made, until)
        row: dict[str, Any] = {
            **{"fault": plan.fault, "number": plan.number, "site": plan.site if fault.of_site else "server"},
            **{"how": made.strike.how, "private": private, "run": watch.name},
            "moment": {"round": made.number, "phase": plan.phase, "after_s": plan.after_s},
            "lasted_s": round(made.mended - made.at, 1),
            **{"log_s": log_s, "status_s": status_s, "said": line, "printed_s": _printed(watch, made, until)},
            "back_s": None if made.back is None else round(made.back - made.mended, 1),
            "rounds_again": _again(watch, made.at, until),
            "rounds_lost": _rounds_lost(watch, made.at, until),
            "messages_lost": len(lost),
            "may_lose": fault.lost if fault.lost is not None else len(_rounds(watch, made.at, made.mended)) + 1,
            "site_rounds_away": sum(len(set(SITES) - cohort_of(log, n)[0]) for n in own),
            "others_lost": len([site for _, site in lost if fault.of_site and site != plan.site]),
            "others_away": sorted({site for n in own for site in set(SITES) - cohort_of(log, n)[0]} - _hit(plan)),
            "longest_wait_s": _longest(watch, made.at, min(until, made.back or until)),
            **{"exit": code, "cohort_equal": equal, "same_adapter": None},
            "ledger": _ledger(watch, log, own) if private else None,
            "late": [f"{site} in round {n}" for n in own for site in sorted(_late(log, n))],
            **{"left_over": [], "account": "", "absent": []},
        }
        if place + 1 == len(tries):  # of the whole run
            row |= {"left_over": strays, "account": account}
        if place == 0 and plan.phase != "start":
            row["absent"] = sorted(set(SITES) - cohort_of(log, 1)[0])
        if equal and not private and reference:
            row["same_adapter"] = watch.digests.get(last) == reference.get(last)
        row["failures"] = failures(row)
        yield row


def failures(row: Mapping[str, Any]) -> list[str]:
    """The promises that a try broke, by its line."""
    fault = FAULTS[row["fault"]]
    found = {
        f"the run ended with exit code {row['exit']}": row["exit"] != 0,
        "not all took part again": row["back_s"] is None,
        "a finished round was lost": row["rounds_lost"] > 0,
        "more than the running round was done again": row["rounds_again"] > 1,
        "another site lost a message": row["others_lost"] > 0,
        f"not asked, though it was not hit: {', '.join(row['others_away'])}": bool(row["others_away"]),
        f"not asked in the run's first round, before any fault: {', '.join(row['absent'])}": bool(row["absent"]),
        f"{row['messages_lost']} answers lost; it may cost {row['may_lose']}": row["messages_lost"] > row["may_lose"],
        f"a wait of {row['longest_wait_s']} s; {fault.wait_s:g} s is allowed": row["longest_wait_s"] > fault.wait_s,
        f"no reason within {PROMISED_S:g} s in the log": (row["messages_lost"] > 0 or _long(row))
        and not _soon(row["log_s"]),
        f"no reason within {PROMISED_S:g} s in the status": _long(row) and not _soon(row["status_s"]),
        f"{row['site']} did not say so within {PROMISED_S:g} s": fault.says and not _soon(row["printed_s"]),
        "another adapter from an equal cohort": row["same_adapter"] is False,
        f"the ledger: {row['ledger']}": row["ledger"] not in (None, "exact"),
        f"an answer counted that had been given up: {', '.join(row['late'])}": bool(row["late"]),
        f"the account of the answers: {row['account']}": bool(row["account"]),
        f"left over: {'; '.join(row['left_over'])}": bool(row["left_over"]),
    }
    return [line for line, true in found.items() if true]


def _long(row: Mapping[str, Any]) -> bool:
    """Whether a wait was so long that it must be explained."""
    return bool(row["longest_wait_s"] > PROMISED_S)


def _soon(told_s: float | None) -> bool:
    return told_s is not None and told_s <= PROMISED_S


def _hit(plan: Plan) -> set[str]:
    """The sites that a fault concerns."""
    return {plan.site} if FAULTS[plan.fault].of_site else set()


def _rounds(watch: Watch, since: float, until: float) -> list[int]:
    """The rounds that ended, or the run ended in, between two moments."""
    return sorted({seen.event["round"] for seen in watch.after(since, "round") if seen.at <= until})


def _missing(log: Sequence[Mapping[str, Any]], number: int) -> set[str]:
    asked, answered = cohort_of(list(log), number)
    return asked - answered


def _late(log: Sequence[Mapping[str, Any]], number: int) -> set[str]:
    """Whose answer counted in a round that had gone on without it."""
    refused = {event["client"] for event in log if event["event"] == "refused" and event.get("round") == number}
    return refused & cohort_of(list(log), number)[1]


def _again(watch: Watch, since: float, until: float) -> int:
    """How many rounds were asked for anew."""
    found, asked = (
        0,
        {seen.event["round"] for seen in watch.seen if seen.event["event"] == "asked" and seen.at <= since},
    )
    for seen in watch.after(since, "asked"):
        if seen.at <= until:
            found += seen.event["round"] in asked
            asked.add(seen.event["round"])
    return found


def _rounds_lost(watch: Watch, since: float, until: float) -> int:
    """How many rounds before the running one a run that went on did not go on from.

    A round runs until the next is asked for: only then its checkpoint is known to be there.
    """
    found, done = 0, 0
    for at, event in watch.seen:
        if event["event"] == "asked":
            done = max(done, event["round"] - 1)
        elif event["event"] == "start" and since < at <= until:
            found += max(0, done - int(event["resumed"]))
    return found


def _longest(watch: Watch, since: float, until: float) -> float:
    """The longest time without a further answer or round, in seconds."""
    times = [seen.at for seen in watch.seen if seen.event["event"] in _PROGRESS]
    inside = [at for at in times if since <= at <= until]
    before = max((at for at in times if at < since), default=since)
    marks = [max(before, since), *inside]
    return round(max((b - a for a, b in itertools.pairwise(marks)), default=0.0), 1)


def _told(watch: Watch, made: Try, until: float) -> tuple[float | None, float | None, str]:
    """How many seconds after a fault its place was named with a reason, in the log and by status, and the first line.

    What the server prints counts as its log where its own processes were hit: the run's cannot write then.
    """
    server, site = not FAULTS[made.plan.fault].of_site, made.plan.site
    log = [
        (seen.at, line)
        for seen in watch.after(made.at, "refused", "waiting", "failed", "start")
        if (line := _reason(seen.event, None if server else site))
    ]
    if server:
        log += [(at, line) for at, who, line in watch.printed if who == "server" and made.at <= at and _ENDED in line]
    status = [
        (at, line)
        for at, lines in watch.status
        if at > made.at
        for line in lines
        if any(_names(one, line) for one in (SITES if server else (site,))) or (server and _names_server(line))
    ]
    places = [sorted(one for one in found if one[0] <= until) for found in (log, status)]
    log_s, status_s = (round(found[0][0] - made.at, 1) if found else None for found in places)
    return log_s, status_s, min((found[0] for found in places if found), default=(0.0, ""))[1][:200]


def _reason(event: Mapping[str, Any], site: str | None) -> str:
    """What an event of a run's log says of a site or, for None, of anything that went wrong; "" is nothing."""
    match event["event"]:
        case "refused" if site in (None, event["client"]):
            return f"{event['client']} refused: {event['reason']}"
        case "waiting" if site is None or site in event["clients"]:
            return f"waiting for {', '.join(event['clients'])} for {event['seconds']:g} s"
        case "failed" if site is None:
            return str(event["message"])
        case "start" if site is None and event["resumed"]:
            return f"it goes on after round {event['resumed']}"
    return ""


def _names_server(line: str) -> bool:
    """Whether a line of status says of the server or its run that, and why, nothing goes on."""
    return line.startswith("no status: the SuperLink") or " going: " in line


def _names(site: str, line: str) -> bool:
    """Whether a line of status says of a site that, and why, it does not answer."""
    if not line.startswith(f"site {site}: "):
        return False
    if waited := re.search(r"no answer to .* for (?:([\d.]+) s$)?", line):
        return waited[1] is None or float(waited[1]) >= _SLOW_S  # minutes, or so many seconds
    return ": online" not in line or "; refused" in line


def _printed(watch: Watch, made: Try, until: float) -> float | None:
    """How many seconds after a fault the site or the server itself printed a line on it."""
    fault = FAULTS[made.plan.fault]
    name = made.plan.site if fault.of_site else "server"
    lines = (
        at for at, who, line in watch.printed if who == name and made.at <= at <= until and fault.told.search(line)
    )
    first = next(lines, None)
    return None if first is None else round(first - made.at, 1)


def _ledger(watch: Watch, log: Sequence[Mapping[str, Any]], own: Sequence[int]) -> str:
    """Either "exact", or what is wrong with a site's charges for these rounds."""
    for site in SITES:
        state = watch.field.site_state(site)
        names = [path.name for path in (state / "runs").glob(f"{watch.name}-*")] or [watch.name]
        charged = [charge for name in names for charge in charges(state, name)]
        for number in own:
            here = [request for there, request in charged if there == number]
            counted = site in cohort_of(list(log), number)[1]
            if len(here) > 1 or len(here) < counted:
                which = "counted" if counted else "did not count"
                return f"{site} has {len(here)} charges for round {number}, which {which}"
        made = {request for name in names for request in releases(state, name)}
        if unpaid := made - {request for _, request in charged}:
            return f"{site} made {len(unpaid)} answers that it has not charged"
    return "exact"


def _left_over(field: Field) -> list[str]:
    """What runs and should not, or the other way round, once a run has ended; waits a while for what is about to."""
    deadline = time.monotonic() + 30.0
    while True:
        found = field.strays()
        for name in ("server", *SITES):
            there = [line for pid in field.below(name) if (line := words_of(pid))]  # what has ended has no words
            for word in _OF_SERVER if name == "server" else _OF_SITE:
                own = [line for line in there if word in line]
                found += [] if len(own) == 1 else [f"{name} has {len(own)} of {word}"]
                there = [line for line in there if line not in own]
            found += [f"{name} has {line}" for line in there if _SANDBOX not in line]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.5)
