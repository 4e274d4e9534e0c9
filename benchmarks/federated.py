"""Every aggregation method on the same federation: the same clients, steps and start, over several seeds.

Each run is a process of its own. Told is the held-out loss at the end and after as many bytes as `fedavg` takes for
half of its rounds, and how many bytes it takes to get as low as `fedavg` is after two thirds of its rounds. All methods
train the same number of steps; what they export may differ in rank (`rank`).

    python benchmarks/federated.py [CONFIG] [--seeds 3] [--ways fedavg,ffa] [--jobs 2] [-s KEY=VALUE]...

What has been measured with the same settings is kept, so that a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FEDERATION = "benchmarks/federation.toml"
RESULTS = ROOT / "benchmarks" / "results"
_MIXED = "adapter.ranks=[4, 8, 16, 16]"
_SGD = ("train.optimizer=sgd", "train.lr=1.0")


def _by(name: str, *more: str, **options: Any) -> tuple[str, ...]:
    return (f"strategy.name={name}", *(f"strategy.options.{k}={json.dumps(v)}" for k, v in options.items()), *more)


WAYS: dict[str, tuple[str, ...]] = {
    "fedavg": _by("fedavg"),
    "uniform": _by("fedavg", "strategy.weighting=uniform"),
    "ffa": _by("fedavg", "adapter.train=b"),
    "ffa, orthonormal A": _by("fedavg", "adapter.train=b", "adapter.init=orthonormal"),
    "alternating": _by("fedavg", "adapter.train=alternate"),
    "fedprox": _by("fedavg", 'train.penalties=[{ name = "fedprox", mu = 0.01 }]'),
    "flora, base of rank 16": _by("flora", base_rank=16),
    "flora, rank 4 on a base of rank 4": _by("flora", "adapter.rank=4", base_rank=4),
    "flora, rank 8 on a base of rank 8": _by("flora", "adapter.rank=8", base_rank=8),
    "fedex, base of rank 16": _by("fedex", base_rank=16),
    "fedex, rank 4 on a base of rank 4": _by("fedex", "adapter.rank=4", base_rank=4),
    "fedex, rank 8 on a base of rank 8": _by("fedex", "adapter.rank=8", base_rank=8),
    "flexlora": _by("flexlora"),
    "lora_fair": _by("lora_fair"),
    "fedrot": _by("fedrot"),
    "auto": _by("auto"),
    "server step of 1.4": _by("fedavg", 'strategy.server_optimizer={ name = "plain", lr = 1.4 }'),
    "server momentum": _by("fedavg", 'strategy.server_optimizer={ name = "momentum", lr = 0.5, momentum = 0.5 }'),
    "server nesterov": _by("fedavg", 'strategy.server_optimizer={ name = "nesterov", lr = 0.7, momentum = 0.5 }'),
    "server adam": _by("fedavg", 'strategy.server_optimizer={ name = "adam", lr = 0.01 }'),
    "server adam, lr 0.003": _by("fedavg", 'strategy.server_optimizer={ name = "adam", lr = 0.003 }'),
    "fedavg, SGD": _by("fedavg", *_SGD),
    "scaffold, SGD": _by("scaffold", *_SGD),
    "each client its own B": _by("fedavg", "adapter.share=a", "evaluate.clients=true"),
    "fedkseed, 10 times the steps": _by("fedkseed", "train.steps=30", "train.lr=3e-4"),
    "geometric_median": _by("geometric_median"),
    "median": _by("median"),
    "mixed ranks: flexlora": _by("flexlora", _MIXED),
    "mixed ranks: flexlora, absolute": _by("flexlora", _MIXED, form="absolute"),
    "mixed ranks: hetlora": _by("hetlora", _MIXED),
    "mixed ranks: rank_slices": _by("rank_slices", _MIXED),
    "mixed ranks: flora, base of rank 16": _by("flora", _MIXED, base_rank=16),
    "bf16": _by("fedavg", "wire.up=bf16", "wire.down=bf16"),
    "int8": _by("fedavg", "wire.up=int8", "wire.down=int8"),
    "int4": _by("fedavg", "wire.up=int4", "wire.down=int4"),
    "int4 up, int8 down": _by("fedavg", "wire.up=int4", "wire.down=int8"),
    "int4 up, without feedback": _by("fedavg", 'wire.up={ name = "int4", rounding = "stochastic", feedback = false }'),
    "top 1% up": _by("fedavg", "wire.up=topk"),
    "top 10% up": _by("fedavg", 'wire.up={ name = "topk", share = 0.1 }'),
    "top 10% down": _by("fedavg", 'wire.down={ name = "topk", share = 0.1 }'),
    "top 1% down": _by("fedavg", "wire.down=topk"),
    "ffa, int8": _by("fedavg", "adapter.train=b", "wire.up=int8", "wire.down=int8"),
    "alternating, int8": _by("fedavg", "adapter.train=alternate", "wire.up=int8", "wire.down=int8"),
}


AGAINST = {"scaffold, SGD": "fedavg, SGD"}  # what a way's differences are to, where that is not `fedavg`


def one(config: str, way: str, seed: int, overrides: Sequence[str], threads: int) -> dict[str, Any]:
    """The federated row of a run, its loss by bytes, and what its adapter's rank came to be."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "run"
        command = [sys.executable, "-m", "apiary.cli.main", "simulate", config, "--quiet"]
        command += ["--out", str(out)]
        # Without `evaluate.clients` all that travels is for training, and is counted with the rounds.
        settings = (f"seed={seed}", f"train.threads={threads}", "evaluate.baselines=[]", "evaluate.clients=false")
        for item in (*settings, *overrides, *WAYS[way]):
            command += ["-s", item]
        began = time.monotonic()
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        wall = time.monotonic() - began
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason"])[-1]
            return {"way": way, "seed": seed, "failed": reason}
        metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
        events = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        exported = json.loads((out / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    (row,) = [row for row in metrics["table"] if row["method"] == "federated"]
    rounds = [event for event in events if event["event"] == "round"]
    bytes_by_round = [event["bytes_up"] + event["bytes_down"] for event in rounds]
    losses = {event["round"]: event["loss"] for event in events if event["event"] == "evaluate" and "loss" in event}
    return {
        "way": way,
        "seed": seed,
        "loss": row["loss"],
        "accuracy": row["accuracy"],
        "n": row["n"],
        "own": statistics.mean(c["own"]["federated"] for c in metrics["clients"] if "federated" in c["own"]),
        "rank": exported["r"],
        "bytes": bytes_by_round,
        "losses": [losses.get(number) for number in range(len(rounds) + 1)],
        "gauge": [event.get("gauge") for event in rounds],
        "wall_s": round(wall, 1),
        "machine": metrics["machine"],
        "versions": metrics["versions"],
    }


def bytes_to(run: dict[str, Any], target: float) -> int | None:
    """The bytes after which a run's loss was at the target or below for the first time; None where it never was."""
    total = 0
    for sent, loss in zip(run["bytes"], run["losses"][1:], strict=True):
        total += sent
        if loss is not None and loss <= target:
            return total
    return None


def loss_after(run: dict[str, Any], budget: float) -> float | None:
    """The loss of the last round that fits so many bytes; None where not even the first one does."""
    total, found = 0, None
    for sent, loss in zip(run["bytes"], run["losses"][1:], strict=True):
        total += sent
        if total > budget:
            break
        found = loss if loss is not None else found
    return found


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By way, each figure for every seed that `fedavg` was run with too; differences are to it, seed by seed."""
    done = {(run["way"], run["seed"]): run for run in runs if "failed" not in run}
    found: dict[str, dict[str, Any]] = {}
    for way in WAYS:
        against = AGAINST.get(way, "fedavg")
        pairs = [
            (run, done[against, seed]) for (name, seed), run in done.items() if name == way and (against, seed) in done
        ]
        if not pairs:
            continue
        found[way] = {
            "seeds": len(pairs),
            "loss": [run["loss"] for run, _ in pairs],
            "accuracy": [run["accuracy"] for run, _ in pairs],
            "own": [run["own"] for run, _ in pairs if "own" in run],
            "difference": [run["loss"] - other["loss"] for run, other in pairs],
            "rank": max(run["rank"] for run, _ in pairs),
            "bytes": statistics.mean(sum(run["bytes"]) for run, _ in pairs),
            "at_equal_bytes": [loss_after(run, _half(other)) for run, other in pairs],
            "to_target": [bytes_to(run, _target(other)) for run, other in pairs],
        }
    return found


def _half(run: dict[str, Any]) -> float:
    return sum(run["bytes"][: len(run["bytes"]) // 2])


def _target(run: dict[str, Any]) -> float:
    return float(run["losses"][2 * len(run["bytes"]) // 3])


def main() -> None:
    """Run what is missing, seed by seed, and write the results as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default=FEDERATION, help="a recipe; default: the one of these benchmarks")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ways", default=",".join(WAYS), help="names, separated by commas without a space")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    parser.add_argument("--out", type=Path, help="default: by the name of the recipe, in benchmarks/results")
    parser.add_argument("-s", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    settings = {"config": args.config, "overrides": args.overrides}
    name = "federated" if args.config == FEDERATION else Path(args.config).stem
    out: Path = args.out or (RESULTS / f"{name}.json")
    held = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"settings": settings}
    if held["settings"] != settings:
        raise SystemExit(f"{out} holds results of other settings; remove it, or choose another --out")
    runs = [run for run in held.get("runs", []) if "failed" not in run]
    facts = {key: held[key] for key in ("machine", "versions") if key in held and runs}
    done = {(run["way"], run["seed"]) for run in runs}
    ways = [way for way in WAYS if way in {name.strip() for name in _names(args.ways)}]
    cells = [(way, seed) for seed in range(args.seeds) for way in ways if (way, seed) not in done]
    out.parent.mkdir(exist_ok=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        tasks = [pool.submit(one, args.config, way, seed, args.overrides, args.threads) for way, seed in cells]
        for task in tasks:
            run = task.result()
            found = {key: run.pop(key) for key in ("machine", "versions") if key in run}
            facts = {**found, **facts}  # of the first run; each run says its own processor
            run |= {"cpu": found["machine"]["cpu"]} if found else {}
            runs.append(run)
            whole = {**facts, "settings": settings, "summary": summary(runs), "runs": runs}
            out.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
            print(run["way"], run["seed"], run.get("loss"), run.get("accuracy"), run.get("failed", ""), flush=True)


def _names(text: str) -> list[str]:
    """The names in a list separated by commas, where a name may hold a comma followed by a space."""
    return text.replace(", ", "\0").replace(",", "\n").replace("\0", ", ").split("\n")


if __name__ == "__main__":
    main()
