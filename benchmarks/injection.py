"""What structured queries are worth against planted instructions, and what they cost in plain loss.

The federation of federation.toml is trained with `prompt.boundary` plain and structured, the latter a second time with
twice the tokens in a step: rows with an instruction in their data are longer, so that as many tokens hold fewer
answers. Then instructions are placed in the data of held-out questions, as `apiary evaluate --probe injection` does it.

python benchmarks/injection.py [--seeds 3] [--questions 60] [-s KEY=VALUE]...
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from apiary.config import loading
from apiary.data.federation import federate
from apiary.evaluation import injection
from apiary.export.tuned import open_tuned
from apiary.models.adapters import fresh_adapter
from apiary.tracking.environment import machine
from simulation.run import simulate

FEDERATION = Path(__file__).with_name("federation.toml")
RESULTS = Path(__file__).parent / "results" / "injection.json"
SETTINGS = ["evaluate.baselines=[]", "evaluate.every=0", "evaluate.samples=0"]
WAYS = {
    "plain": [],
    "structured": ["prompt.boundary=structured"],
    "structured, twice the tokens": ["prompt.boundary=structured", "train.batch_tokens=2048"],
}


def run(way: str, keys: list[str], questions: int, folder: Path) -> dict[str, Any]:
    """One run with its figures on held-out rows as they are, and under attack; with the first way the base's too."""
    metrics = simulate(loading.load(FEDERATION, keys), folder)
    (row,) = [row for row in metrics["table"] if row["method"] == "federated"]
    tuned = open_tuned(folder, [f"evaluate.max_examples={questions}"])
    asked = injection.prepare(
        federate(tuned.config.data, tuned.config.seed).test, tuned.template, tuned.lm, tuned.config
    )
    methods = {"federated": tuned.adapter}
    if way == "plain":
        methods["base"] = fresh_adapter(tuned.lm, tuned.config.seed)
    probe = injection.document(methods, tuned.lm, asked, tuned.config)
    return {"way": way, "seed": tuned.config.seed, "loss": row["loss"], "accuracy": row["accuracy"], "probe": probe}


def main() -> None:
    """Run the seeds one after the other; the results are written after each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--questions", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("-s", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    runs: list[dict[str, Any]] = []
    for seed in range(args.seeds):
        for way, keys in WAYS.items():
            with tempfile.TemporaryDirectory() as scratch:
                chosen = [*SETTINGS, *keys, *args.overrides, f"seed={seed}"]
                runs.append(run(way, chosen, args.questions, Path(scratch) / "run"))
            print(json.dumps({key: runs[-1][key] for key in ("way", "seed", "loss", "accuracy")}), flush=True)
            made = {"machine": machine(gpu=False), "questions": args.questions, "runs": runs}
            args.out.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
