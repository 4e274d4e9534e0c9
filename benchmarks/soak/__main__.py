"""`python -m benchmarks.soak`: see the package."""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import benchmarks.soak
from apiary.tracking import environment
from benchmarks.deployment import RESULTS, ROOT
from benchmarks.soak import tries
from benchmarks.soak.faults import FAULTS
from benchmarks.soak.field import Field
from benchmarks.soak.table import summary, text
from benchmarks.soak.tries import Plan
from benchmarks.soak.watch import Watch

_APART = "APIARY_SOAK_APART"  # in the environment: this process has a mount namespace of its own
_EACH = 20  # tries
_FEW = 6  # of one run, at most
_PRIVATE = 1 / 3  # of the runs promise privacy, by chance


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.soak",
        description=benchmarks.soak.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--times", type=int, default=_EACH, help="tries of each fault")
    parser.add_argument("--faults", default=",".join(FAULTS), help="some of them, separated by commas")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "soak.jsonl", help="goes on with what is in it")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--rounds", type=int, default=24, help="of a run")
    parser.add_argument("--private", choices=("some", "all", "none"), default="some", help="runs that promise privacy")
    parser.add_argument("--together", action="store_true", help="faults of all kinds in one run")
    parser.add_argument("--no-reference", action="store_true", help="compare no adapter with an undisturbed run's")
    given = parser.parse_args()
    faults = given.faults.split(",")
    if unknown := set(faults) - set(FAULTS):
        parser.error(f"--faults {', '.join(sorted(unknown))}: allowed are {', '.join(FAULTS)}")
    _go_apart()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    rows = read(given.out)
    plans = [
        Plan.drawn(given.seed, fault, number)
        for number in range(1, given.times + 1)
        for fault in random.Random(f"{given.seed} {number}").sample(faults, len(faults))  # each at each place of a run
        if not any((row["fault"], row["number"]) == (fault, number) for row in rows)
    ]
    left_out = soak(plans, given) if plans else []
    rows = [row for row in read(given.out) if row["fault"] in faults]
    found = summary(rows)
    print(text(found))
    for row in rows:
        for line in row["failures"]:
            print(f"{row['fault']} {row['number']} ({row['run']}): {line}")
    for fault in left_out:
        print(f"{fault}: not tried, for nothing may be mounted here (it needs root, or user namespaces)")
    if all(found.get(fault, {"tries": 0})["tries"] >= given.times for fault in FAULTS):
        result = {"machine": environment.machine(gpu=False), "load": round(os.getloadavg()[0], 1), "faults": found}
        (RESULTS / "soak.json").write_text(json.dumps(result, indent=1) + "\n")
    if left_out or any(row["failures"] for row in rows):
        sys.exit(1)


def _go_apart() -> None:
    """Start this program again where it may mount, without a trace outside; goes on here where it may not."""
    command = ["unshare", *(("--user", "--map-root-user") if os.geteuid() else ()), "--mount"]
    if _APART in os.environ or shutil.which("unshare") is None or subprocess.run([*command, "true"]).returncode:
        return
    os.environ[_APART] = "1"
    os.execvp(command[0], [*command, sys.executable, "-m", "benchmarks.soak", *sys.argv[1:]])


def read(out: Path) -> list[dict[str, Any]]:
    """The tries that are on record; a torn last line is cut off."""
    if not out.exists():
        return []
    *lines, torn = out.read_bytes().split(b"\n")
    if torn:
        os.truncate(out, out.stat().st_size - len(torn))
    return [json.loads(line) for line in lines]


def runs_of(plans: Sequence[Plan], rounds: int, together: bool = False) -> Iterator[list[Plan]]:
    """The tries of a run each: of the server's faults alone, of the sites', or of stragglers; or of all `together`.

    A fault that is to hit while a run starts is the first of one.
    """
    for kind in {_kind(plan, together): None for plan in plans}:
        own = [plan for plan in plans if _kind(plan, together) == kind]
        starting = collections.deque(plan for plan in own if plan.phase == "start")
        later = collections.deque(plan for plan in own if plan.phase != "start")
        while starting or later:
            some = [starting.popleft() if starting else later.popleft()]
            while later and len(some) < _FEW and _length([*some, later[0]]) <= rounds:
                some.append(later.popleft())
            yield some


def _kind(plan: Plan, together: bool) -> tuple[bool, bool]:
    fault = FAULTS[plan.fault]
    return (fault.of_site and not together, fault.slow)


def _length(plans: Sequence[Plan]) -> int:
    return 1 + sum(FAULTS[plan.fault].rounds for plan in plans)


def soak(plans: Sequence[Plan], given: argparse.Namespace) -> list[str]:
    """Make all tries, and write a line for each; returns the faults that cannot be made here.

    Raises:
        RuntimeError: a run of a new deployment took no fault, or the undisturbed run did not go well.
    """
    left_out: list[str] = []
    reference: dict[int, str] | None = {} if given.no_reference else None
    while plans:
        with tempfile.TemporaryDirectory(prefix="soak-") as folder:
            field = Field(Path(folder))
            try:
                left_out = [] if field.disks["server"].mounted else ["site_disk", "server_disk"]
                plans = [plan for plan in plans if plan.fault not in left_out]
                field.begin()
                if reference is None:
                    reference = _undisturbed(field, given.rounds)
                plans = _all_runs(field, plans, given, reference)
            finally:
                field.end()
    return left_out


def _undisturbed(field: Field, rounds: int) -> dict[int, str]:
    """The digest of the adapter after each round of a run in which nothing happens.

    Raises:
        RuntimeError: that run did not go well.
    """
    field.submit("undisturbed", tries.settings_of(rounds, private=False, slow=False))
    watch, began = Watch(field, "undisturbed"), time.monotonic()
    try:
        _, code = tries.carry_out(watch, (), rounds, 0)
    finally:
        watch.end()
    if code != 0 or len(watch.digests) != rounds:
        raise RuntimeError(f"the undisturbed run ended with {code}:\n{field.said('submit')[-2000:]}")
    print(f"undisturbed: {rounds} rounds in {time.monotonic() - began:.0f} s", flush=True)
    return dict(watch.digests)


def _all_runs(field: Field, plans: Sequence[Plan], given: argparse.Namespace, reference: dict[int, str]) -> list[Plan]:
    """Make the tries, run after run, until a run goes wrong; returns those that are left, for another deployment."""
    waiting, number = list(plans), 0
    while waiting:
        some = next(runs_of(waiting, given.rounds, given.together))
        number += 1
        name = f"run-{time.strftime('%H%M%S')}-{number}"
        made, well = _one_run(field, name, some, given, reference)
        if not made and number == 1:
            raise RuntimeError(f"{name} took no fault:\n{field.said('submit')[-2000:]}")
        waiting = [plan for plan in waiting if (plan.fault, plan.number) not in made]
        if not well:
            break
    return waiting


def _one_run(
    field: Field, name: str, some: Sequence[Plan], given: argparse.Namespace, reference: dict[int, str]
) -> tuple[set[tuple[str, int]], bool]:
    """Make the tries of one run, and write their lines; which were made, and whether the deployment is as before."""
    chance = random.Random(f"{given.seed} {some[0].fault} {some[0].number} private").random()
    private = given.private == "all" or (given.private == "some" and chance < _PRIVATE)
    field.submit(name, tries.settings_of(given.rounds, private, FAULTS[some[0].fault].slow))
    watch, began = Watch(field, name), time.monotonic()
    try:
        made, code = tries.carry_out(watch, some, given.rounds, given.seed)
    finally:
        watch.end()
    rows = list(tries.accounts(watch, made, code, private, reference))
    with given.out.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    for row in rows:
        print(f"{row['fault']} {row['number']}: {'; '.join(row['failures']) or 'held'}", flush=True)
    print(f"{name}: {len(made)} of {len(some)} tries in {time.monotonic() - began:.0f} s, exit {code}", flush=True)
    if not made or any(row["failures"] for row in rows):
        _keep(field, watch.folder, given.out.with_suffix("") / name)
    shutil.rmtree(watch.folder / "checkpoints", ignore_errors=True)
    well = bool(made) and code == 0 and all(one.back is not None for one in made) and not rows[-1]["left_over"]
    return {(one.plan.fault, one.plan.number) for one in made}, well


def _keep(field: Field, run: Path, place: Path) -> None:
    """Keep the logs of a run with a broken promise."""
    place.mkdir(parents=True, exist_ok=True)
    logs = [*run.glob("*.jsonl"), *field.folder.glob("*.log"), *field.state.glob("*.log")]
    for path in logs:
        shutil.copy(path, place / path.name)
    for site in field.relays:
        for path in field.site_state(site).glob("*.log"):
            shutil.copy(path, place / f"{site}-{path.name}")


if __name__ == "__main__":
    main()
