"""What a curious server learns from one client's updates, without privacy and at several budgets.

One client of a small federation is audited as `apiary privacy audit` does it: membership of its rows, exposure of
planted secrets, a lower bound on epsilon from canaries, and tokens read from one gradient. All settings make the same
number of steps on about the same number of rows at the same learning rate.

python benchmarks/audit.py [--seeds 2] [--epsilons 16,8,3] [-s KEY=VALUE]...
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from apiary.config import loading
from apiary.config.schema import RunConfig
from apiary.data.federation import federate
from apiary.models import adapters
from apiary.tracking.environment import machine
from client.worker import Worker
from simulation import audit
from simulation.replay import Bench

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "audit.json"
BATCH_ROWS = 64
SETTINGS = [
    "rounds=4",
    "adapter.rank=4",
    "adapter.alpha=4.0",
    "data.clients=16",
    "data.partition=iid",
    "train.steps=3",
    "train.lr=1e-2",
    "train.warmup=0.0",
    "train.batch_tokens=2900",  # about as many rows in a step as private runs expect
]


def run(config: RunConfig, canaries: int) -> dict[str, Any]:
    """The audit of the first client of a federation with this configuration."""
    client = federate(config.data, config.seed).clients[0]
    bench = Bench(config, adapters.load(config.model, config.adapter), Worker(config), client, config.adapter.rank)
    return audit.audit(bench, audit.Options(canaries=canaries, seed=config.seed))


def main() -> None:
    """Run the seeds one after the other; the results are written after each audit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epsilons", default="16,8,3")
    parser.add_argument("--canaries", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("-s", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    runs: list[dict[str, Any]] = []
    for seed in range(args.seeds):
        for budget in ["none", *args.epsilons.split(",")]:
            private = ["privacy.unit=record", f"privacy.batch_rows={BATCH_ROWS}", f"privacy.epsilon={budget}"]
            keys = [*SETTINGS, *(private if budget != "none" else []), *args.overrides, f"seed={seed}"]
            config = loading.load(None, keys)
            found = run(config, args.canaries)
            found.pop("machine")
            runs.append({"budget": budget, **found})
            print(json.dumps({"budget": budget, "seed": seed, "bound": found["lower_bound"]}), flush=True)
            settings = {"keys": [*SETTINGS, *args.overrides], "batch_rows": BATCH_ROWS}
            made = {"machine": machine(gpu=False), "settings": settings, "runs": runs}
            args.out.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
