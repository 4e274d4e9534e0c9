"""What a curious server learns from one client's updates, without privacy and at several budgets.

One client of a small federation is audited as `apiary privacy audit` does it: membership of its rows, exposure of
planted secrets, a lower bound on epsilon from canaries, and tokens read from one gradient. All settings make the same
number of steps on about the same number of rows at the same learning rate.

python benchmarks/audit.py [--seeds 2] [--epsilons 16,8,3] [--jobs 1] [-s KEY=VALUE]...
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from apiary.config import loading
from apiary.data.federation import federate
from apiary.models import adapters
from apiary.tracking.environment import machine
from client.worker import Worker
from simulation import audit
from simulation.replay import Bench

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "audit.json"
BATCH_ROWS = 88
SETTINGS = [
    "rounds=4",
    "adapter.rank=4",
    "adapter.alpha=4.0",
    "data.clients=6",
    "data.test_fraction=0.5",  # so that a client has rows left out by the hundred: a rate at 1% needs them
    "data.partition=iid",
    "train.steps=3",
    "train.lr=1e-2",
    "train.warmup=0.0",
    "train.batch_tokens=3950",  # about as many rows in a step as private runs expect
]


def run(seed: int, budget: str, canaries: int, overrides: list[str], threads: int) -> dict[str, Any]:
    """The audit of the first client of a federation with this seed and this epsilon, or "none"."""
    torch.set_num_threads(threads)
    private = ["privacy.unit=record", f"privacy.batch_rows={BATCH_ROWS}", f"privacy.epsilon={budget}"]
    keys = [*SETTINGS, *(private if budget != "none" else []), *overrides, f"seed={seed}"]
    config = loading.load(Path(__file__).with_name("federation.toml"), keys)
    client = federate(config.data, config.seed).clients[0]
    bench = Bench(config, adapters.load(config.model, config.adapter), Worker(config), client, config.adapter.rank)
    found = audit.audit(bench, audit.Options(canaries=canaries, seed=seed))
    found.pop("machine")
    return {"budget": budget, **found}


def main() -> None:
    """Run the audits, some at a time; the results are written after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epsilons", default="16,8,3")
    parser.add_argument("--canaries", type=int, default=260)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="audits at a time")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("-s", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    each = [(seed, budget) for seed in range(args.seeds) for budget in ["none", *args.epsilons.split(",")]]
    settings = {"keys": [*SETTINGS, *args.overrides], "batch_rows": BATCH_ROWS, "jobs": args.jobs}
    runs: list[dict[str, Any]] = []
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        made = [pool.submit(run, *which, args.canaries, args.overrides, args.threads) for which in each]
        for future in made:
            found = future.result()
            runs.append(found)
            bound = found["lower_bound"]
            shown = {"budget": found["budget"], "seed": found["seed"], "seconds": found["seconds"], "bound": bound}
            print(json.dumps(shown), flush=True)
            document = {"machine": machine(gpu=False), "settings": settings, "runs": runs}
            args.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
