"""Why each row passes the model alone in private training, and what that costs.

The clipped sum of per-row gradients is made in two ways: by Opacus's hooks, from one batch that all rows share, and as
private training makes it, one row after the other. Measured for both, in float32 and in bfloat16: how far blanking a
row moves the sum beyond that row's own clipped gradient, which nobody would be charged for; and the time of a row. The
two take turns, so that a machine that slows down slows both.

python benchmarks/rows_alone.py [--rows 40] [--repeats 5] [--threads 1] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from opacus_sum import opacus_sum  # noqa: E402

from apiary.config import loading  # noqa: E402
from apiary.core.tensors import StateDict, norm, subtract  # noqa: E402
from apiary.data import tokenization  # noqa: E402
from apiary.data.batches import Corpus  # noqa: E402
from apiary.data.federation import federate  # noqa: E402
from apiary.models import adapters  # noqa: E402
from apiary.models.loss import row_losses  # noqa: E402
from apiary.tracking.environment import machine  # noqa: E402
from client.training import dp_sgd  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "rows_alone.json"
CLIP = 2.0**-10  # far below every gradient, so that each row weighs the whole of it; a power of two, so sums are exact
BLANKED = 8  # rows that are blanked, each in turn


def shared(lm: adapters.LanguageModel, corpus: Corpus, rows: list[int]) -> StateDict:
    """The clipped sum of rows that share one batch."""
    return {name: g.detach().double() for name, g in opacus_sum(lm, corpus, rows, CLIP).items()}


def alone(lm: adapters.LanguageModel, corpus: Corpus, rows: list[int]) -> StateDict:
    """The clipped sum of rows that each pass the model alone."""
    return dp_sgd.clipped_sum(lm, row_losses, corpus, np.array(rows, np.int64), CLIP).gradients


def beyond(make: Any, lm: adapters.LanguageModel, corpus: Corpus, rows: list[int]) -> list[float]:
    """By how much the sum moves beyond the row's own gradient when it is blanked, in clipping norms, for some rows."""
    whole = make(lm, corpus, rows)
    found = []
    for row in rows[:BLANKED]:
        moved = subtract(whole, make(lm, corpus, [r for r in rows if r != row]))
        found.append(norm(subtract(moved, make(lm, corpus, [row]))) / CLIP)
    return found


def seconds(make: Any, lm: adapters.LanguageModel, corpus: Corpus, rows: list[int]) -> float:
    """One pass over the rows, per row."""
    began = time.perf_counter()
    make(lm, corpus, rows)
    return (time.perf_counter() - began) / len(rows)


def measure(dtype: str, rows: int, repeats: int) -> dict[str, Any]:
    """Both ways with the base model of the default run in one data type."""
    config = loading.load(None, [f"model.dtype={dtype}", "model.device=cpu"])
    lm = adapters.load(config.model, config.adapter)
    rng = torch.Generator().manual_seed(0)  # not as it is when it is fresh: B is zero, and A would get no gradient
    state = {name: 0.1 * torch.randn(t.shape, generator=rng) for name, t in adapters.get_adapter(lm).items()}
    adapters.set_adapter(lm, state)
    template = tokenization.make_template(config.prompt, lm.tokenizer)
    examples = federate(config.data, config.seed).clients[0].train[:rows]
    corpus = tokenization.encode_all(examples, template, lm.tokenizer, config.prompt)
    numbers = list(range(len(corpus)))
    ways = {"shared": shared, "alone": alone}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for make in ways.values():
        make(lm, corpus, numbers)  # shapes are compiled when they are first met
    for _ in range(repeats):
        for name, make in ways.items():
            times[name].append(seconds(make, lm, corpus, numbers))
    moved = {name: beyond(make, lm, corpus, numbers) for name, make in ways.items()}
    return {
        "dtype": dtype,
        "rows": len(corpus),
        "tokens": int(corpus.lengths.sum()),
        "seconds_a_row": {name: statistics.median(values) for name, values in times.items()},
        "ratio": statistics.median(a / b for a, b in zip(times["alone"], times["shared"], strict=True)),
        "beyond": {name: max(values) for name, values in moved.items()},
    }


def main() -> None:
    """Measure both data types and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    runs = [measure(dtype, args.rows, args.repeats) for dtype in ("float32", "bfloat16")]
    made = {"machine": machine(gpu=False), "threads": args.threads, "runs": runs}
    args.out.write_text(json.dumps(made, indent=1) + "\n")
    print(json.dumps(runs, indent=1))


if __name__ == "__main__":
    main()
