"""Clients' own models on several federations, beside training alone at its best within the same number of steps.

Each run is a process of its own. Told are, for each client, the losses on its own held-out rows, which neither trained
nor chose, and the 95% interval of its own model's difference to training alone at its best.

    python benchmarks/personal.py [--cases dolly,150] [--seeds 0,1,2] [-s KEY=VALUE]... [--out FILE]

`50` to `1500` are the default federation with about so many training rows a client; `benchmarks/demo.py` measures the
default itself. What has been measured with the
same settings is kept, so that further cases and seeds are added to what is there. `dolly` needs ../shared with a small
model and ten organisations' rows, `smollm2` these and the model that `make real` makes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "personal.json"
SHARED = ROOT.parent / "shared"


def _rows(per_skill: int, held_out: float) -> tuple[str, ...]:
    return (f"data.source=builtin:skills:{per_skill}", f"data.test_fraction={held_out:.4f}")


DOLLY = (
    f"model.name={SHARED / 'models' / 'probe'}",
    f"data.source={SHARED / 'data' / 'dolly'}",
    "data.partition=natural",
    "prompt.template=alpaca",
)
# A real instruction-tuned model and 1,000 short rows of one of these organisations, dealt out to four clients.
SMOLLM2 = (
    f"model.name={ROOT / 'build' / 'smollm2-135m-instruct'}",
    f"data.source={SHARED / 'data' / 'dolly' / 'client_1.jsonl'}",
    *("data.clients=4", "data.partition.by=category", "data.test_fraction=0.25"),
    *("prompt.template=chat", "rounds=4", "train.steps=4", "train.batch_tokens=512"),
)
CASES: dict[str, tuple[str, ...]] = {
    # 12 skills at 8 clients; of a client's rows some 70 are held out, so that most can tell a difference. With few rows
    # a larger part chooses, or there were not enough of them for training alone to stop early.
    "50": (*_rows(80, 7 / 12), "personal.validation=0.4"),
    "150": _rows(150, 1 / 3),
    "500": _rows(400, 1 / 6),
    "1500": _rows(1110, 1 / 10),
    "dolly": DOLLY,
    "smollm2": (*SMOLLM2, "train.lr=3e-3"),  # of the rates that `benchmarks/defaults.py` tried on it, the best
}
# What is not needed here is not measured: answers, rounds, pooled baselines.
_LEAN = ("evaluate.generate=false", "evaluate.every=0", "evaluate.clients=false", 'evaluate.baselines=["local"]')


def one(case: str, seed: int, overrides: Sequence[str]) -> dict[str, Any]:
    """What one run says of its clients' own models.

    Raises:
        SystemExit: the run failed; its last line says why.
    """
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "run"
        command = [sys.executable, "-m", "apiary.cli.main", "simulate", "--quiet", "--out", str(out)]
        for item in (f"seed={seed}", "personal.enabled=true", *_LEAN, *CASES[case], *overrides):
            command += ["-s", item]
        began = time.monotonic()
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        if done.returncode:
            raise SystemExit(f"{case}, seed {seed}: {(done.stderr.strip().splitlines() or ['no reason'])[-1]}")
        metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
        clients = clients_of(out, metrics)
        events = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        "seed": seed,
        "table": metrics["personal"]["table"],
        "gain": metrics["personal"].get("gain"),
        "clients": clients,
        "personal_s": round(sum(event["seconds"] for event in events if event["event"] == "personal"), 1),
        "wall_s": round(time.monotonic() - began, 1),
        "machine": metrics["machine"],
        "versions": metrics["versions"],
    }


def clients_of(run: Path, metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What each client's own model came to, with its candidates, from a run directory and its metrics."""
    choices = {place.parent.name: json.loads(place.read_text()) for place in run.glob("personal/*/choice.json")}
    return [_client(client, choices[client["client"]]) for client in metrics["clients"]]


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


def summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All runs together: by method the mean over clients of each seed, and over all clients how many are better off."""
    clients = [client for run in runs for client in run["clients"]]
    ends = [client["paired"]["local_best"]["ci95"] for client in clients]
    tables = [run["personal"]["table"] if "personal" in run else run["table"] for run in runs]
    by_method = {row["method"]: [r for t in tables for r in t if r["method"] == row["method"]] for row in tables[0]}
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
    """Run the cases and seeds that are missing and write all results as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES), help="names, separated by commas")
    parser.add_argument("--seeds", default="0,1,2", help="such as 0,1,2")
    parser.add_argument("-s", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    found = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else {}
    if found.get("overrides") != given.overrides:
        found = {"overrides": given.overrides, "cases": {}}
    for seed in map(int, given.seeds.split(",")):
        for case in given.cases.split(","):
            runs = found["cases"].get(case, {"runs": []})["runs"]
            if seed in [run["seed"] for run in runs]:
                continue
            made = one(case, seed, given.overrides)
            found |= {key: made.pop(key) for key in ("machine", "versions")}
            runs = sorted([*runs, made], key=lambda run: run["seed"])
            found["cases"][case] = {"summary": summary(runs), "runs": runs}
            given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            print(case, seed, json.dumps(found["cases"][case]["summary"]), flush=True)


if __name__ == "__main__":
    main()
