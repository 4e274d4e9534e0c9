"""A real instruction-tuned model on real rows: what a short federation does to it, by learning rate.

    python benchmarks/real.py [CONFIG] [--lr 3e-4 1e-3 3e-3] [--seeds 1] [--other ROWS] [-s KEY=VALUE]...

Without CONFIG it is configs/smollm2-local.toml; `make real` makes its model first. Each run is a process of its own.
Told are the rows of the run's table; with --other, also the loss of the untuned and the federated model on rows of
another kind, which shows what tuning takes away; and some held-out questions with the answers before and after.

What has been measured with the same settings is kept, so that a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "real.json"
CONFIG = ROOT / "configs" / "smollm2-local.toml"
_OTHER_ROWS = 64
_KEPT = ("method", "loss", "accuracy", "n", "ci95", "steps")


def _apiary(*words: str) -> str:
    command = [sys.executable, "-m", "apiary.cli.main", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        sys.exit(done.stderr.strip() or f"{' '.join(words)}: failed")
    return done.stdout


def one(config: Path, rate: float, seed: int, overrides: Sequence[str], other: Path | None) -> dict[str, Any]:
    """The table of one run, its differences, its samples, and the losses on rows of another kind."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "run"
        settings = (f"seed={seed}", f"train.lr={rate}", *overrides)
        began = time.monotonic()
        _apiary("simulate", str(config), "--quiet", "--out", str(out), *(w for s in settings for w in ("-s", s)))
        seconds = time.monotonic() - began
        metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
        found: dict[str, Any] = {
            "seed": seed,
            "lr": rate,
            "overrides": list(overrides),
            "seconds": round(seconds),
            "table": [{key: row.get(key) for key in _KEPT} for row in metrics["table"]],
            "paired": metrics["paired"],
            "samples": metrics["samples"],
            "machine": metrics["machine"],
            "versions": metrics["versions"],
        }
        if other is not None:
            less = (f"evaluate.max_examples={_OTHER_ROWS}", "evaluate.generate=false", 'evaluate.baselines=["base"]')
            words = [word for setting in less for word in ("-s", setting)]
            found["other"] = json.loads(_apiary("evaluate", str(out), "--data", str(other), "--json", *words))
    return found


def main() -> None:
    """Measure what is missing, and write the results after each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", type=Path, default=CONFIG)
    parser.add_argument("--lr", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--other", type=Path, help="rows of another kind to measure forgetting on")
    parser.add_argument("-s", "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    runs = json.loads(RESULTS.read_text(encoding="utf-8"))["runs"] if RESULTS.exists() else []
    for seed in range(args.seeds):
        for rate in args.lr:
            if any((run["seed"], run["lr"], run["overrides"]) == (seed, rate, args.overrides) for run in runs):
                continue
            runs.append(one(args.config, rate, seed, args.overrides, args.other))
            runs.sort(key=lambda run: (run["overrides"], run["lr"], run["seed"]))
            document = {"machine": runs[0]["machine"], "runs": runs}
            RESULTS.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
            print(seed, rate, {row["method"]: row["loss"] for row in runs[-1]["table"]}, flush=True)


if __name__ == "__main__":
    main()
