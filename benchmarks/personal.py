"""Clients' own models on a federation, beside training alone at its best within the same number of steps.

Each run is a process of its own. Told are, for each client, the losses on its own held-out rows, which neither trained
nor chose, and the 95% interval of its own model's difference to training alone at its best.

    python benchmarks/personal.py [CONFIG] [--seeds 0,1,2] [-s KEY=VALUE]... [--out FILE]

What has been measured with the same settings is kept, so that further seeds are added to what is there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "personal.json"
# What is not needed here is not measured: answers, rounds, pooled baselines.
_LEAN = ("evaluate.generate=false", "evaluate.every=0", "evaluate.clients=false", 'evaluate.baselines=["local"]')


def one(config: str | None, seed: int, overrides: Sequence[str]) -> dict[str, Any]:
    """What one run says of its clients' own models.

    Raises:
        SystemExit: the run failed; its last line says why.
    """
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "run"
        command = [sys.executable, "-m", "apiary.cli.main", "simulate", *([config] if config else []), "--quiet"]
        command += ["--out", str(out)]
        for item in (f"seed={seed}", "personal.enabled=true", *_LEAN, *overrides):
            command += ["-s", item]
        began = time.monotonic()
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        if done.returncode:
            raise SystemExit(f"seed {seed}: {(done.stderr.strip().splitlines() or ['no reason'])[-1]}")
        metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
        choices = {place.parent.name: json.loads(place.read_text()) for place in out.glob("personal/*/choice.json")}
        events = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        "seed": seed,
        "table": metrics["personal"]["table"],
        "gain": metrics["personal"].get("gain"),
        "clients": [_client(client, choices[client["client"]]) for client in metrics["clients"]],
        "personal_s": round(sum(event["seconds"] for event in events if event["event"] == "personal"), 1),
        "wall_s": round(time.monotonic() - began, 1),
        "machine": metrics["machine"],
        "versions": metrics["versions"],
    }


def _client(client: dict[str, Any], choice: dict[str, Any]) -> dict[str, Any]:
    own = client["personal"]
    keys = ("kept", "weight", "steps", "federation_steps", "alone_steps", "rows", "own", "mix_loss")
    return {
        "client": client["client"],
        **{key: own[key] for key in keys},
        "reported": own["own_paired"]["local_best"]["n"],
        "paired": {name: own["own_paired"][name] for name in ("local_best", "federated")},
        "candidates": [
            {key: candidate[key] for key in ("kind", "weight", "steps", "loss", "error")}
            for candidate in choice["candidates"]
        ],
    }


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All runs together: by method the mean over clients of each seed, and over all clients how many are better off."""
    clients = [client for run in runs for client in run["clients"]]
    ends = [client["paired"]["local_best"]["ci95"] for client in clients]
    methods = [row["method"] for row in runs[0]["table"]]
    by_method = {name: [row for run in runs for row in run["table"] if row["method"] == name] for name in methods}
    return {
        "own": {name: [row["own"] for row in rows] for name, rows in by_method.items()},
        "mix": {name: [row["mix"] for row in rows] for name, rows in by_method.items() if "mix" in rows[0]},
        "steps": {name: [row["steps"] for row in rows] for name, rows in by_method.items()},
        "clients": len(clients),
        "lower": sum(client["paired"]["local_best"]["difference"] < 0 for client in clients),
        "clearly_better": sum(end is not None and end[1] < 0 for end in ends),
        "clearly_worse": sum(end is not None and end[0] > 0 for end in ends),
        "without_interval": sum(end is None for end in ends),
        "kept": dict(Counter(client["kept"] for client in clients).most_common()),
    }


def main() -> None:
    """Run the seeds that are missing and write all results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", help="a TOML file; the default federation without")
    parser.add_argument("--seeds", default="0,1,2", help="such as 0,1,2")
    parser.add_argument("-s", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    settings = {"config": given.config, "overrides": given.overrides}
    found = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else {}
    runs = found["runs"] if found.get("settings") == settings else []
    for seed in map(int, given.seeds.split(",")):
        if seed in [run["seed"] for run in runs]:
            continue
        runs = sorted([*runs, one(given.config, seed, given.overrides)], key=lambda run: run["seed"])
        told = {"settings": settings, "machine": runs[-1]["machine"], "summary": summary(runs), "runs": runs}
        given.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(told["summary"]))


if __name__ == "__main__":
    main()
