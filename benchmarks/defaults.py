"""The defaults of a run, tried one by one on several federations, beside what they were before they were tuned.

Every setting is one change of the defaults before, or of what is named beside it, with the same clients, rows, start
and seeds. Told are the held-out loss of the federated model by seed, the difference to the defaults before with its 95%
interval over seeds and rows, and what a run of it costs.

    python benchmarks/defaults.py [--tasks skills,even] [--settings NAME;NAME] [--seeds 5] [--jobs 2] [--work DIR]

Runs are kept in the work directory, and one that is there is not run again, so that a benchmark that was stopped goes
on. What the results say of other settings, or of these on other tasks, stays. `dolly` needs ../shared with a small
model and ten organisations' rows, `smollm2` these and the model that `make real` makes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # another package is called benchmarks too

from apiary.config import loading  # noqa: E402
from apiary.evaluation import intervals  # noqa: E402
from apiary.evaluation.intervals import SeedRows  # noqa: E402
from apiary.evaluation.row_losses import read_row_losses  # noqa: E402
from benchmarks.personal import DOLLY, SMOLLM2  # noqa: E402
from simulation.sweep.workers import Job, Worker, messages  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "defaults.json"
# Measured is the table's loss alone, once, at the end; every run computes with one thread, so that two go side by side.
_LEAN = (
    "evaluate.generate=false",
    "evaluate.every=0",
    "evaluate.clients=false",
    "evaluate.samples=0",
    'evaluate.baselines=["base"]',
    "train.threads=1",
)
# What the defaults were before they were tuned, and what was never in question.
BEFORE = (
    "rounds=12",
    "train.steps=3",
    "train.batch_tokens=1024",
    "train.lr=3e-3",
    "train.lr_b=1",
    "train.schedule=cosine",
    "train.warmup=0.03",
    "adapter.rank=16",
    "adapter.alpha=16",
    "adapter.scaling=rslora",
    "adapter.init=kaiming",
    "strategy.name=fedavg",
    "strategy.server_optimizer=none",
    "strategy.weighting=tokens",
)
TASKS: dict[str, tuple[str, ...]] = {
    "skills": ("data.source=builtin:skills:250", "data.test_fraction=0.2"),
    "even": ("data.source=builtin:skills:250", "data.test_fraction=0.2", "data.partition=iid"),
    "dolly": (*DOLLY, "data.test_fraction=0.1"),
    "smollm2": SMOLLM2,
}


def _outer(lr: float, momentum: float) -> str:
    return f'strategy.server_optimizer={{ name = "nesterov", lr = {lr}, momentum = {momentum} }}'


_OUTER = _outer(0.7, 0.5)
_SMALL = ("train.batch_tokens=512", "train.steps=6")
_BEST = (_OUTER, "train.lr=6e-3")  # of the first six; what follows changes one thing of it
SETTINGS: dict[str, tuple[str, ...]] = {
    "before": (),
    "lr 1e-3": ("train.lr=1e-3",),
    "lr 6e-3": ("train.lr=6e-3",),
    "lr 1e-2": ("train.lr=1e-2",),
    "lr 2e-2": ("train.lr=2e-2",),
    "nesterov": (_OUTER,),
    "nesterov, lr 1e-3": (_OUTER, "train.lr=1e-3"),
    "nesterov, lr 6e-3": _BEST,
    "nesterov, lr 4e-3": (_OUTER, "train.lr=4e-3"),
    "nesterov, lr 8e-3": (_OUTER, "train.lr=8e-3"),
    "512 tokens": (*_BEST, "train.batch_tokens=512"),
    "512 tokens, 6 steps": (*_BEST, "train.batch_tokens=512", "train.steps=6"),
    "512 tokens, 6 steps, lr 4e-3": (_OUTER, "train.lr=4e-3", "train.batch_tokens=512", "train.steps=6"),
    "2048 tokens": (*_BEST, "train.batch_tokens=2048"),
    "LoRA+ 2": (*_BEST, "train.lr_b=2"),
    "LoRA+ 4, lr 3e-3": (_OUTER, "train.lr=3e-3", "train.lr_b=4"),
    "LoRA+ 4": (*_BEST, "train.lr_b=4"),
    "rank 8": (*_BEST, "adapter.rank=8", "adapter.alpha=16"),
    "rank 32": (*_BEST, "adapter.rank=32", "adapter.alpha=32"),
    "alpha 8": (*_BEST, "adapter.alpha=8"),
    "alpha 32": (*_BEST, "adapter.alpha=32"),
    "orthonormal A": (*_BEST, "adapter.init=orthonormal"),
    "uniform weights": (*_BEST, "strategy.weighting=uniform"),
    "256 tokens, 12 steps, lr 3e-3": (_OUTER, "train.lr=3e-3", "train.batch_tokens=256", "train.steps=12"),
    "512 tokens, 6 steps, lr 3e-3": (_OUTER, "train.lr=3e-3", "train.batch_tokens=512", "train.steps=6"),
    "512 tokens, 6 steps, lr 4e-3, LoRA+ 2": (_OUTER, "train.lr=4e-3", "train.lr_b=2", *_SMALL),
    "512 tokens, 6 steps, lr 4e-3, plain": ("train.lr=4e-3", *_SMALL),
    "512 tokens, 6 steps, lr 4e-3, decay 0.1": (_OUTER, "train.lr=4e-3", "train.weight_decay=0.1", *_SMALL),
    "512 tokens, 6 steps, lr 4e-3, dropout 0.1": (_OUTER, "train.lr=4e-3", "adapter.dropout=0.1", *_SMALL),
    "512 tokens, 6 steps, lr 4e-3, uniform": (_OUTER, "train.lr=4e-3", "strategy.weighting=uniform", *_SMALL),
    "512 tokens, 6 steps, lr 4e-3, outer lr 1": (_outer(1.0, 0.3), "train.lr=4e-3", *_SMALL),
    "512 tokens, 6 steps, lr 4e-3, momentum 0.7": (_outer(0.5, 0.7), "train.lr=4e-3", *_SMALL),
    "median": ("train.lr=6e-3", "strategy.name=median"),
    "constant rate": (*_BEST, "train.schedule=constant"),
    "warm-up 0.1": (*_BEST, "train.warmup=0.1"),
    "outer lr 1": ("train.lr=6e-3", _outer(1.0, 0.5)),
    "outer momentum 0.3": ("train.lr=6e-3", _outer(1.0, 0.3)),
    "outer momentum 0.9": ("train.lr=6e-3", _outer(0.3, 0.9)),
    "step 1.4": ("train.lr=6e-3", 'strategy.server_optimizer={ name = "plain", lr = 1.4 }'),
}


def cells(tasks: Sequence[str], settings: Sequence[str], seeds: int) -> Iterator[tuple[str, str, int]]:
    """What is to be run, seed by seed."""
    for seed in range(seeds):
        for task in tasks:
            for name in settings:
                yield task, name, seed


def folder_of(work: Path, task: str, name: str, seed: int) -> Path:
    """The run directory of a cell."""
    return work / task / "".join(c if c.isalnum() else "-" for c in name) / str(seed)


def run_all(wanted: Sequence[tuple[str, str, int]], work: Path, jobs: int) -> Iterator[tuple[str, str, int, str]]:
    """Run what is not there yet, several at a time; yields each cell with the reason why it failed, or nothing."""
    left = deque(cell for cell in wanted if not (folder_of(work, *cell) / "metrics.json").exists())
    workers = [Worker(threads=1) for _ in range(jobs)]
    at: dict[str, tuple[str, str, int]] = {}
    try:
        while True:
            for worker in workers:
                if worker.job is None and left:
                    task, name, seed = cell = left.popleft()
                    folder = folder_of(work, task, name, seed)
                    folder.parent.mkdir(parents=True, exist_ok=True)
                    overrides = (*_LEAN, *BEFORE, *TASKS[task], *SETTINGS[name], f"seed={seed}")
                    config = loading.load(None, overrides).to_json()
                    at[str(folder)] = cell
                    worker.start(Job(folder.name, config, str(folder), str(work / "baselines")))
            if not any(worker.job for worker in workers):
                return
            for _, message in messages(workers):
                if message.kind == "died":
                    raise SystemExit(f"{message.job.folder}: its process ended ({message.content})")
                yield *at[message.job.folder], "" if message.kind == "done" else str(message.content)
    finally:
        for worker in workers:
            worker.stop()


def figures(folder: Path) -> dict[str, Any]:
    """What a finished run tells."""
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    (row,) = [row for row in metrics["table"] if row["method"] == "federated"]
    rounds = metrics["rounds"]
    return {
        "loss": row["loss"],
        "seconds": round(sum(done["seconds"] for done in rounds), 1),
        "bytes": sum(done["bytes_up"] + done["bytes_down"] for done in rounds),
        "machine": metrics["machine"],
        "versions": metrics["versions"],
    }


def summary(work: Path, tasks: Sequence[str], settings: Sequence[str], seeds: int) -> dict[str, Any]:
    """By task and setting the losses of the seeds that have been run, and the difference to the defaults before."""
    found: dict[str, Any] = {}
    for task in tasks:
        for name in settings:
            done = [s for s in range(seeds) if (folder_of(work, task, name, s) / "metrics.json").exists()]
            if not done:
                continue
            told = [figures(folder_of(work, task, name, seed)) for seed in done]
            both = [s for s in done if (folder_of(work, task, "before", s) / "metrics.json").exists()]
            pairs = [
                [read_row_losses(folder_of(work, task, which, seed)) for which in (name, "before")] for seed in both
            ]
            rows = [
                SeedRows(one.rows, one.nats["federated"] - other.nats["federated"], one.tokens) for one, other in pairs
            ]
            less = intervals.over_seeds_and_rows(rows) if rows and name != "before" else None
            found.setdefault(task, {})[name] = {
                "loss": [one["loss"] for one in told],
                "less": None if less is None else less.mean,
                "ci95": None if less is None or less.ends is None else list(less.ends),
                "seconds": statistics.mean(one["seconds"] for one in told),
                "bytes": statistics.mean(one["bytes"] for one in told),
            }
    return found


def main() -> None:
    """Run what is missing and write all results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=",".join(TASKS), help="names, separated by commas")
    parser.add_argument("--settings", default=";".join(SETTINGS), help="names, separated by semicolons")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, of one thread each")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "defaults", help="where runs are kept")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    tasks, settings = given.tasks.split(","), given.settings.split(";")
    work, failed = given.work.resolve(), dict[str, str]()
    known = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else {"settings": {}, "summary": {}}
    wanted = list(cells(tasks, settings, given.seeds))

    def write() -> None:
        done = next(cell for cell in reversed(wanted) if (folder_of(work, *cell) / "metrics.json").exists())
        facts = {key: figures(folder_of(work, *done))[key] for key in ("machine", "versions")}
        tried = {**known["settings"], **{name: SETTINGS[name] for name in settings}}
        new, old = summary(work, tasks, settings, given.seeds), known["summary"]
        found = {task: {**old.get(task, {}), **new.get(task, {})} for task in (*old, *new)}
        whole = {**facts, "before": BEFORE, "settings": tried, "failed": failed, "summary": found}
        given.out.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")

    for task, name, seed, reason in run_all(wanted, work, given.jobs):
        if reason:
            failed[f"{task}, {name}, seed {seed}"] = reason
            print(task, name, seed, reason, flush=True)
            continue
        print(task, name, seed, round(figures(folder_of(work, task, name, seed))["loss"], 4), flush=True)
        write()
    write()  # also where nothing was missing


if __name__ == "__main__":
    main()
