"""Five stages of tasks one after the other: without replay, with it, and all tasks at once, in equal steps.

Each run is a process of its own on `configs/continual.toml`, over several seeds:

- sequential: no buffer, so a stage trains on its own rows alone;
- replay: the recipe as it stands, a tenth of the earlier rows kept and half of each step's tokens replayed;
- joint: no stages, which is what sequential training could reach if nothing were ever forgotten.

    python benchmarks/continual.py [--seeds 3] [--keep DIR] [-s KEY=VALUE]...
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "configs" / "continual.toml"
RESULTS = ROOT / "benchmarks" / "results" / "continual.json"
WAYS = {
    "sequential": ("continual.buffer=0.0",),
    "replay": (),
    "joint": ("continual.stages=[]", "continual.buffer=0.0"),
}


def one(way: str, seed: int, overrides: list[str], keep: Path | None) -> dict[str, Any]:
    """The federated row of the table over all tasks, and what was remembered."""
    with tempfile.TemporaryDirectory() as scratch:
        out = (keep or Path(scratch)) / f"{way}-{seed}"
        command = [sys.executable, "-m", "apiary.cli.main", "simulate", str(RECIPE), "--quiet", "--out", str(out)]
        for item in (f"seed={seed}", 'evaluate.baselines=["base"]', *WAYS[way], *overrides):
            command += ["-s", item]
        began = time.monotonic()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
        wall = time.monotonic() - began
        metrics = json.loads((out / "metrics.json").read_text())
    rows = {row["method"]: row for row in metrics["table"]}
    part = metrics.get("continual", {})
    measured = ("stages", "accuracy", "loss", "overall", "backward_transfer", "forgetting")
    return {
        "way": way,
        "seed": seed,
        "wall_s": round(wall, 1),
        "base": rows["base"],
        "federated": rows["federated"],
        **{f"stage_{key}": part[key] for key in measured if key in part},
        "machine": metrics["machine"],
        "versions": metrics["versions"],
    }


def main() -> None:
    """Run every way with every seed, one after the other, and write the results as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="keep the run directories there")
    parser.add_argument("-s", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    out: dict[str, Any] = {"overrides": args.overrides, "runs": []}
    RESULTS.parent.mkdir(exist_ok=True)
    for seed in range(args.seeds):
        for way in WAYS:
            run = one(way, seed, args.overrides, args.keep)
            out = {"machine": run.pop("machine"), "versions": run.pop("versions"), **out}
            out["runs"].append(run)
            RESULTS.write_text(json.dumps(out, indent=1) + "\n")
            print(way, seed, run["federated"]["loss"], run["federated"]["accuracy"], run.get("stage_forgetting"))


if __name__ == "__main__":
    main()
