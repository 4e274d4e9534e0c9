"""The twelve faults of a soak: what each does to a deployment, and how it ends."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks.soak.field import Field

DEADLINE_S = 12.0  # `strategy.deadline_s` of runs with stragglers
_DAY_S = 86_400.0


class Strike(NamedTuple):
    """A fault that has hit."""

    seconds: float = 0.0  # until it ends
    mend: Callable[[], None] = lambda: None  # ends it
    how: str = ""  # where there are several ways
    rounds: int = 0  # whole rounds that must go by besides until it ends
    over: Callable[[], bool] = lambda: True  # and what must have come about


class Fault(NamedTuple):
    """A kind of fault."""

    words: str
    hit: Callable[[Field, str, random.Random], Strike | None]  # None: there is nothing to hit now
    told: re.Pattern[str]  # what the site or the server itself prints of it
    rounds: int  # that it takes up, about
    of_site: bool = True
    slow: bool = False  # needs a run with a deadline
    says: bool = True  # the site or the server must print it
    # Answers that it may cost: the running round's, and of a site that of the next; None: one a round while it lasts.
    lost: int | None = 2
    wait_s: float = 45.0  # without a further answer, at most: Flower gives up a silent site after half a minute


def _killing(of_site: bool, word: str) -> Callable[[Field, str, random.Random], Strike | None]:
    def hit(field: Field, site: str, rng: random.Random) -> Strike | None:
        pid = field.part(site if of_site else "server", word)
        if pid is None:
            return None
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        return Strike()

    return hit


def _whole_site(field: Field, site: str, rng: random.Random) -> Strike:
    field.kill(site)
    return Strike(mend=lambda: field.join(site))


def _gone(field: Field, site: str, rng: random.Random) -> Strike:
    field.kill(site)
    return Strike(mend=lambda: field.join(site), rounds=3)


def _full(of_site: bool) -> Callable[[Field, str, random.Random], Strike | None]:
    def hit(field: Field, site: str, rng: random.Random) -> Strike:
        disk = field.disks[site if of_site else "server"]
        disk.fill()
        return Strike(rng.uniform(2.0, 12.0), disk.free)

    return hit


def _cut(field: Field, site: str, rng: random.Random) -> Strike:
    relay = field.relays[site]
    how = rng.choice(("closed", "silent", "reset in mid-body"))
    if how == "closed":
        relay.close()
    elif how == "silent":
        relay.hush()
    else:
        relay.reset(rng.randint(1, 4), rng.randint(0, 60_000))
        return Strike(mend=relay.mend, how=how, over=lambda: relay.resets == 0)
    return Strike(rng.uniform(1.0, 40.0), relay.mend, how)


def _straggler(field: Field, site: str, rng: random.Random) -> Strike | None:
    pid = field.part(site, "client.site_worker")
    if pid is None:
        return None
    os.kill(pid, signal.SIGSTOP)

    def go_on() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)

    return Strike(DEADLINE_S + rng.uniform(3.0, 8.0), go_on)


def _clock(field: Field, site: str, rng: random.Random) -> Strike:
    ahead = rng.choice((_DAY_S, -_DAY_S))
    field.set_clock(site, ahead)
    return Strike(rng.uniform(8.0, 20.0), lambda: field.set_clock(site, 0.0), "ahead" if ahead > 0 else "behind")


_ENDED = r"the {} ended \(exit code -9\) and is started again"
_GOES_ON = r"its process was gone; it goes on"
_OF_SERVER: dict[str, Any] = {"lost": 3, "wait_s": 90.0}  # the running round's; the run's process starts anew
FAULTS = {
    "node": Fault("a site's node killed", _killing(True, "deploy.node"), re.compile(_ENDED.format("node")), 3),
    "worker": Fault(
        "a site's worker killed", _killing(True, "client.site_worker"), re.compile(_ENDED.format("worker")), 6
    ),
    "site": Fault("all of a site killed and started again", _whole_site, re.compile("(?!)"), 6, says=False),
    "superlink": Fault(
        "the SuperLink killed",
        _killing(False, "deploy.superlink"),
        re.compile(_ENDED.format("SuperLink") + "|" + _GOES_ON),
        3,
        of_site=False,
        **_OF_SERVER,
    ),
    "serverapp": Fault(
        "the run's own process killed",
        _killing(False, "flwr-serverapp"),
        re.compile(_GOES_ON),
        3,
        of_site=False,
        **_OF_SERVER,
    ),
    "door": Fault(
        "the door killed", _killing(False, "deploy.proxy"), re.compile(_ENDED.format("door")), 4, of_site=False, lost=1
    ),
    "site_disk": Fault("a site's disk full", _full(True), re.compile("[Dd]isk|No space"), 6, says=False, lost=None),
    "server_disk": Fault(
        "the server's disk full",
        _full(False),
        re.compile(f"[Dd]isk|No space|{_GOES_ON}"),
        4,
        of_site=False,
        says=False,
        **_OF_SERVER,
    ),
    "network": Fault("a site's network cut", _cut, re.compile("does not answer|node ended|refuses"), 7, says=False),
    "straggler": Fault("a straggler past the deadline", _straggler, re.compile("(?!)"), 5, slow=True, says=False),
    "gone": Fault("a site gone for rounds, then back", _gone, re.compile("(?!)"), 9, says=False),
    "clock": Fault("a site's clock a day off", _clock, re.compile(r"its clock is 1 day (ahead of|behind)"), 7),
}
