"""Methods that give each client a model of its own, on three kinds of clients, with the same steps in all.

    python benchmarks/own_models.py [--seeds 3] [--skews iid,default,skills] [--ways "fedavg;ditto"] [-s KEY=VALUE]...

All clients make as many optimizer steps, whatever these train; `own_steps` says how many of them trained a model that
never travels. Told are the mean over clients of the loss on their own held-out rows and its difference to that of
training alone with as many steps, how many clients are better and how many worse off than that, the loss on everybody's
rows, and the bytes that travelled for training. Where a method sends half as much, a second run of it makes as many
bytes of smaller visits.
`fedavg, then tuned` makes half of its steps in the federation and the others at home, from the federated adapter and at
a third of the learning rate, as `[personal]` does.

Each run is a process of its own, and what has been measured with the same settings is kept.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
RESULTS: Final = ROOT / "benchmarks" / "results" / "own_models.json"
SKEWS: Final[Mapping[str, tuple[str, ...]]] = {
    "iid": ("data.partition=iid",),
    "default": (),
    # Two clients to a skill in the mean, so that there is somebody to form a group with.
    "skills": ("data.clients=16", 'data.partition={ name = "pathological", by = "skill", classes = 1 }'),
}
ROUNDS, STEPS = 12, 6  # of a client
WAYS: Final[Mapping[str, tuple[str, ...]]] = {
    "fedavg": ("strategy.name=fedavg",),
    "fedavg, momentum": ('strategy.server_optimizer={ name = "nesterov", lr = 0.7, momentum = 0.5 }',),
    "fedsa": ("adapter.share=a",),
    "fedsa, as many bytes": ("adapter.share=a", f"rounds={2 * ROUNDS}", f"train.steps={STEPS // 2}"),
    "ditto": ("strategy.name=ditto",),
    "ditto, pull 0.01": ("strategy.name=ditto", "strategy.options.penalty=0.01"),
    "ditto, pull 1": ("strategy.name=ditto", "strategy.options.penalty=1.0"),
    "ditto, three quarters own": ("strategy.name=ditto", "strategy.options.own=0.75"),
    "fedalt": ("strategy.name=fedalt",),  # all steps train what is sent, as with `fedavg`, and as much is sent
    "clustered": ("strategy.name=clustered",),
    "fedavg, then tuned": ("strategy.name=fedavg", f"train.steps={STEPS // 2}"),
}
_TUNED: Final = "fedavg, then tuned"
_ALWAYS: Final = (
    f"rounds={ROUNDS}",
    f"train.steps={STEPS}",
    "train.batch_tokens=512",  # half of the default, for the time that it takes
    "strategy.server_optimizer=none",  # not all methods take another
    "evaluate.generate=false",
    "evaluate.every=0",
    "evaluate.samples=0",
    "evaluate.max_examples=120",  # of everybody's rows; a client has fewer of its own
)


def one(skew: str, way: str, seed: int, overrides: Sequence[str]) -> dict[str, Any]:
    """The figures of one run."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "run"
        # Training alone is the same whatever the federation does with the steps; it is measured with `fedavg` alone.
        baselines = 'evaluate.baselines=["local"]' if way == "fedavg" else "evaluate.baselines=[]"
        settings = [f"seed={seed}", *_ALWAYS, baselines, *SKEWS[skew], *WAYS[way], *overrides]
        command = [sys.executable, "-m", "apiary.cli.main", "simulate", "--quiet", "--out", str(out)]
        began = time.monotonic()
        done = subprocess.run(
            [*command, *(w for s in settings for w in ("-s", s))], capture_output=True, text=True, cwd=ROOT
        )
        if done.returncode:
            sys.exit(done.stderr.strip())
        metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
        events = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        own = {client["client"]: client["own"]["federated"] for client in metrics["clients"]}
        more: dict[str, Any] = {}
        if way == "fedavg":
            more["alone"] = {client["client"]: client["own"]["local"] for client in metrics["clients"]}
        if way == _TUNED:
            own, more["own_steps"] = tuned(out)
        seconds = round(time.monotonic() - began)
    rounds = [event for event in events if event["event"] == "round"]
    visits = [event for event in events if event["event"] == "client"]
    (row,) = [row for row in metrics["table"] if row["method"] == "federated"]
    return {
        "skew": skew,
        "way": way,
        "seed": seed,
        "overrides": list(overrides),
        "own": own,
        "all": None if way == _TUNED else row["loss"],
        "steps": sum(event["steps"] for event in visits) + more.get("own_steps", 0),
        "own_steps": sum(event.get("own_steps", 0) for event in visits),  # those at home, where there are any
        "bytes": sum(event["bytes_up"] + event["bytes_down"] for event in rounds),
        "groups": {c: g for event in rounds for c, g in event.get("groups", {}).items()},
        "silhouette": next((event["silhouette"] for event in rounds if "silhouette" in event), None),
        "seconds": seconds,
        "machine": metrics["machine"],
        **more,
    }


def tuned(run: Path) -> tuple[dict[str, float], int]:
    """Each client's own loss once it has tuned the federated adapter at home, and the steps of all clients for that.

    A client makes as many steps at home as it made in the federation of the finished run directory `run`.
    """
    from apiary.config import loading
    from apiary.core.tensors import add
    from apiary.data import injection, tokenization
    from apiary.evaluation import comparison
    from apiary.models import adapter_files, adapters
    from client import handlers
    from client.training import trainer

    config = loading.load(run / "config.toml")
    lm = adapters.load(config.model, config.adapter)
    template = tokenization.make_template(config.prompt, lm.tokenizer)
    adapter = adapter_files.read_adapter(lm, run / "adapter" / "adapter_model.safetensors")
    events = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    gently = config.train.model_copy(update={"lr": config.train.lr * config.personal.lr_factor})
    own, total = {}, 0
    for client in handlers.federation(config.to_json()).clients:
        left = sum(event["steps"] for event in events if event["event"] == "client" and event["client"] == client.name)
        state = adapter
        if left:
            corpus = injection.encode_training(client.train, template, lm.tokenizer, config.prompt)
            # A cursor of its own, far from those of the federation, so that its rows come in another order.
            cursor = trainer.Cursor(epoch=10_000)
            plan = trainer.VisitPlan(config.seed, client.name, left, total_steps=left, cursor=cursor)
            state = add(adapter, trainer.fit(lm, adapter, corpus, gently, plan).delta)
        held_out = comparison.prepare(client.test, template, lm, config)
        own[client.name], total = comparison.measure(lm, state, held_out, config).loss, total + left
    return own, total


def table(runs: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of what has been measured: means and ranges over seeds."""
    lines = [
        "| clients | method | own rows | against alone | better, worse off | everyone's rows | steps | own | MB |",
        "|---" * 9 + "|",
    ]
    for skew in SKEWS:
        alone = {run["seed"]: run["alone"] for run in runs if run["skew"] == skew and "alone" in run}
        if alone:
            cells = [_range([statistics.mean(by.values()) for by in alone.values()]), "", "", "", "", "", ""]
            lines.append(f"| {skew} | alone | {' | '.join(cells)} |")
        for way in WAYS:
            found = [run for run in runs if (run["skew"], run["way"]) == (skew, way)]
            if found:
                lines.append(f"| {skew} | {way} | {' | '.join(_cells(found, alone))} |")
    return "\n".join(lines)


def _cells(found: Sequence[Mapping[str, Any]], alone: Mapping[int, Mapping[str, float]]) -> list[str]:
    compared = [(run["own"][c], loss) for run in found for c, loss in alone.get(run["seed"], {}).items()]
    gaps = [
        statistics.mean(run["own"][c] - loss for c, loss in alone[run["seed"]].items())
        for run in found
        if run["seed"] in alone
    ]
    better = sum(ours < theirs for ours, theirs in compared)
    everyone = [run["all"] for run in found if run["all"] is not None]
    return [
        _range([statistics.mean(run["own"].values()) for run in found]),
        _range(gaps) if gaps else "",
        f"{better}, {len(compared) - better}" if compared else "",
        _range(everyone) if everyone else "",
        f"{statistics.mean(run['steps'] for run in found):.0f}",
        f"{statistics.mean(run['own_steps'] for run in found):.0f}",
        f"{statistics.mean(run['bytes'] for run in found) / 1e6:.1f}",
    ]


def _range(values: Sequence[float]) -> str:
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return ""
    mean = f"{statistics.mean(known):.3f}"
    return mean if len(known) == 1 else f"{mean} ({min(known):.3f} to {max(known):.3f})"


def main() -> None:
    """Measure what is missing, write the results after each run, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--skews", default=",".join(SKEWS))
    parser.add_argument("--ways", help="separated by semicolons; all without it")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("-s", "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    ways = args.ways.split(";") if args.ways else list(WAYS)
    if unknown := [name for name in (*ways, *args.skews.split(",")) if name not in WAYS and name not in SKEWS]:
        parser.error(f"{unknown[0]!r}: allowed are {'; '.join(WAYS)} and {', '.join(SKEWS)}")
    runs = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else []
    for seed in range(args.seeds):
        for skew in args.skews.split(","):
            for way in ways:
                key = (skew, way, seed, args.overrides)
                if any((run["skew"], run["way"], run["seed"], run["overrides"]) == key for run in runs):
                    continue
                runs.append(one(skew, way, seed, args.overrides))
                args.out.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    print(table(runs))


if __name__ == "__main__":
    main()
