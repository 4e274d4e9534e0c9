"""The run of `make demo`, the defaults with clients' own models, timed from command to report, over several seeds.

python benchmarks/demo.py [--seeds 5] [--keep DIR]
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
sys.path.insert(0, str(ROOT))  # another package is called benchmarks too

from apiary.evaluation.runs import compare_runs  # noqa: E402
from benchmarks import personal  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "demo.json"


def one(seed: int, out: Path) -> dict[str, Any]:
    """The final table of one seed, its wall time and that of its baselines; the run directory stays at `out`."""
    command = [sys.executable, "-m", "apiary.cli.main", "simulate", "--quiet", "--out", str(out)]
    command += ["-s", f"seed={seed}", "-s", "personal.enabled=true"]
    began = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    wall = time.monotonic() - began
    metrics = json.loads((out / "metrics.json").read_text())
    events = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    baselines: dict[str, float] = {}
    for event in events:
        if event["event"] == "baseline":
            baselines[event["method"]] = round(baselines.get(event["method"], 0.0) + event["seconds"], 1)
    own = round(sum(event["seconds"] for event in events if event["event"] == "personal"), 1)
    kept = {key: metrics[key] for key in ("table", "gain", "personal", "machine", "versions")}
    times = {"wall_s": round(wall, 1), "baselines_s": baselines, "personal_s": own}
    return {"seed": seed, **times, **kept, "clients": personal.clients_of(out, metrics)}


def main() -> None:
    """Run the seeds one after the other and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--keep", type=Path, help="keep the run directories there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folders = [(args.keep or Path(scratch)) / f"seed-{seed}" for seed in range(args.seeds)]
        runs = [one(seed, folder) for seed, folder in enumerate(folders)]
        compared = compare_runs(folders)
    machine, versions = runs[0]["machine"], runs[0]["versions"]
    for run in runs:
        del run["machine"], run["versions"]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(
        json.dumps({"machine": machine, "versions": versions, "runs": runs, "compared": compared}, indent=1) + "\n"
    )
    print(RESULTS.read_text())


if __name__ == "__main__":
    main()
