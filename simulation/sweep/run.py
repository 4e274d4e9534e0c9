"""A whole sweep: check, run, choose, confirm, write the page."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from apiary.core.errors import UserError
from apiary.core.files import finite, write_atomic
from apiary.tracking import run_directory
from simulation import shared_baselines
from simulation.sweep import definition, page, results, space, words
from simulation.sweep.definition import Budget, Sweep
from simulation.sweep.loop import BASELINES, RUNS, Loop
from simulation.sweep.results import Run, is_finished, read_run, run_name
from simulation.sweep.space import Values
from simulation.sweep.workers import Job, Rows, Worker, messages

RESULTS, REPORT, BEST = "results.json", "report.html", "best.toml"
_SHARE: Final = 0.8  # of the free memory that runs may take together
_TRAINING: Final = 1.5  # what a run takes at most, in what its process has taken once data and model are loaded
Tell = Callable[[str], None]


def sweep(
    asked: Sweep,
    folder: Path,
    *,
    budget: Budget = Budget(),
    jobs: int | None = None,
    confirm: int = 0,
    tell: Tell = lambda line: None,
) -> dict[str, Any]:
    """Run a sweep, or go on with one, to its end or that of its budget.

    Args:
        asked: what is run. Where `folder` holds the same sweep it goes on.
        folder: of the sweep.
        budget: where it ends.
        jobs: runs at a time; None: as many as cores and memory allow.
        confirm: fresh seeds with which the winner and the reference are run again in the end.
        tell: receives lines on the way.

    Returns:
        The content of results.json.

    Raises:
        UserError: wrong input, or another process has the folder; nothing was written.
        apiary.core.errors.RunFailed: no run came to a result.
    """
    with run_directory.claim(folder) as warnings:
        begun = (folder / definition.FILE).exists()
        if begun:
            kept, machine = definition.read(folder)
            definition.check_same(kept, asked)
        elif run_directory.content(folder):
            raise UserError(f"{str(folder)!r} is not empty and holds no sweep; choose another --out")
        for line in [*warnings, *words.at_the_start(asked)]:
            tell(f"warning: {line}")
        workers: list[Worker] = []
        shared_baselines.sweep(folder / BASELINES)
        try:
            if not begun:
                machine = _check(asked, workers, jobs)
            definition.write(folder, asked, machine)
            loop = Loop(asked, folder, workers, jobs or machine["jobs"], machine["threads"], budget, tell)
            return _run(loop, confirm, machine)
        finally:
            for worker in workers:
                worker.stop()


def _run(loop: Loop, confirm: int, machine: Mapping[str, int]) -> dict[str, Any]:
    """Run what is left, and write what came of it; also where it is interrupted, as far as it came."""
    try:
        loop.run()
        if confirm:
            loop.run_besides(_fresh_runs(loop, confirm))
    except KeyboardInterrupt:
        if any(map(is_finished, (loop.folder / RUNS).iterdir())):
            _write(loop, machine)
        raise
    return _write(loop, machine)


def _fresh_runs(loop: Loop, count: int) -> list[tuple[int, int]]:
    """The winner and the reference with seeds that chose nothing; nothing where they are one."""
    found = _document(loop)
    pair = {found["winner"]["number"], found["reference"]["number"]}
    first = loop.sweep.seeds[-1] + 1
    return [(number, first + more) for more in range(count) for number in sorted(pair)] if len(pair) == 2 else []


def _document(loop: Loop) -> dict[str, Any]:
    runs = loop.folder / RUNS
    settings = results.gather(loop.sweep, runs, loop.settings, loop.progress.ended)
    return results.document(loop.sweep, settings, _fresh(loop.sweep, runs, loop.settings))


def _fresh(sweep: Sweep, runs: Path, settings: Sequence[Values]) -> dict[int, dict[int, Run]]:
    """Finished runs with seeds that are none of the sweep's, by number and seed."""
    found: dict[int, dict[int, Run]] = {}
    for number in range(len(settings)):
        for place in runs.glob(run_name(number, 0).removesuffix("0") + "*"):
            seed = int(place.name.partition("-seed")[2])
            if seed not in sweep.seeds and is_finished(place):
                found.setdefault(number, {})[seed] = read_run(place)
    return found


def _write(loop: Loop, machine: Mapping[str, int]) -> dict[str, Any]:
    """Write results, page and the winner's configuration."""
    made, folder = loop.sweep, loop.folder
    found = _document(loop)
    first = made.config(found["winner"]["values"], made.seeds[0])
    own = first.model_copy(update={"evaluate": first.evaluate.model_copy(update={"set_apart": False})})
    names = [path.name for path in (folder / RUNS).iterdir()]
    found |= {
        "spent": loop.spent,
        "seconds": round(loop.progress.seconds, 1),
        "runs": {"begun": len(names), "finished": sum(is_finished(folder / RUNS / name) for name in names)},
        "machine": dict(machine),
        "baselines": shared_baselines.count(folder / BASELINES),
    }
    found["warnings"] = [*words.at_the_start(made), *words.remarks(found)]
    found["verdict"] = words.verdict(found)
    write_atomic(folder / BEST, f"# {made.command(found['winner']['values'])}\n" + own.to_toml())
    write_atomic(folder / RESULTS, json.dumps(finite(found), ensure_ascii=False, indent=1) + "\n")
    write_atomic(folder / REPORT, page.render(found, folder.name))
    return found


# -- before the first run ----------------------------------------------------------------------------------------------


def _check(made: Sweep, workers: list[Worker], jobs: int | None) -> dict[str, int]:
    """Load data and model for the settings in a first process; returns how runs share the machine.

    Raises:
        UserError: data or model do not fit a setting, or settings would be measured on different rows.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = made.base.train.threads or max(1, cores // jobs if jobs else 1)
    worker = Worker(threads)
    workers.append(worker)
    probes = list({space.words(values): values for values in space.probes(made.axes)}.values())
    first = _rows(worker, made, probes[0])
    for values in probes[1:]:
        if _rows(worker, made, values).digest != first.digest:
            raise UserError(
                f"{space.words(values)}: would be measured on other held-out rows, or other tokens of them, "
                f"than {space.words(probes[0])}, so that their losses could not be compared; leave the key "
                "that does it out"
            )
    runs = len(made.settings() or []) * len(made.seeds) or cores
    if jobs is None:
        alone = first.device != "cpu" or made.base.simulate.engine != "local"
        fits = 1 if first.free is None else 1 + int(_SHARE * first.free / (_TRAINING * first.memory))
        jobs = 1 if alone else max(1, min(cores // threads, fits, runs))
        if made.base.train.threads is None and jobs < cores:
            threads = cores // jobs
            workers.remove(worker)  # its threads are set
            worker.stop()
    return {"jobs": jobs, "threads": threads, "cores": cores}


def _rows(worker: Worker, made: Sweep, values: Values) -> Rows:
    worker.start(Job("check", made.config(values, made.seeds[0]).to_json(), "", "", check=True))
    ((_, message),) = messages([worker])
    if message.kind == "refused":
        raise UserError(*message.content)
    if message.kind != "checked":
        raise UserError(f"the first process ended while it loaded data and model: {message.content}")
    assert isinstance(message.content, Rows)
    return message.content
