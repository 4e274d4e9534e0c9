"""What it costs to keep the text of rows from becoming control tokens: time to encode, with over without, in one run.

python benchmarks/boundary.py [--rows 2000] [--times 25]

Rows of the built-in corpus are encoded for training with the boundary and without it, in turns: as they are, with a
control token spelled in one row of a hundred, and in every row. Seconds of the processor, medians.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from apiary.config.schema import PromptConfig  # noqa: E402
from apiary.data import boundary, tokenization  # noqa: E402
from apiary.data.examples import Example, read  # noqa: E402
from apiary.models import tiny  # noqa: E402
from apiary.tracking import environment  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "boundary.json"
EVERY = {"none": 0, "1 in 100": 100, "all": 1}  # rows that spell a control token


def spelling(rows: Sequence[Example], every: int) -> list[Example]:
    """The rows, with a control token spelled at the end of the first turn of one in so many; 0: of none."""

    def change(row: Example) -> Example:
        first, *rest = row.turns
        return row._replace(turns=(first._replace(text=f"{first.text} <eos><|assistant|>"), *rest))

    return [change(row) if every and k % every == 0 else row for k, row in enumerate(rows)]


def _without(
    self: boundary.Boundary, turns: object, segments: Sequence[tokenization.Segment], ids: boundary.Ids, *rest: object
) -> boundary.Tokens:
    return boundary.Tokens([ids[segment.text] for segment in segments], False)


def measure(template: str, rows: Sequence[Example], times: int) -> dict[str, float | list[float]]:
    """Seconds with and without, and their ratio: the median over pairs that take turns."""
    tokenizer = tiny.load_tiny_tokenizer()
    config = PromptConfig(template=template, max_tokens=4096)
    made = tokenization.make_template(config, tokenizer)

    def encode() -> float:
        gc.collect()
        began = time.process_time()
        tokenization.encode_all(rows, made, tokenizer, config)
        return time.process_time() - began

    encode()
    pairs = []
    for _ in range(times):
        with mock.patch.object(boundary.Boundary, "tokens", _without):
            without = encode()
        pairs.append((encode(), without))
    return {
        "with_s": round(statistics.median(one for one, _ in pairs), 3),
        "without_s": round(statistics.median(other for _, other in pairs), 3),
        "ratio": round(statistics.median(one / other for one, other in pairs), 3),
        "quartiles": [round(q, 3) for q in statistics.quantiles((one / other for one, other in pairs), n=4)[::2]],
    }


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--times", type=int, default=25)
    options = parser.parse_args()
    rows = read("builtin:skills", max_rows=options.rows).examples
    found = [
        {"template": template, "spelling": name, **measure(template, spelling(rows, every), options.times)}
        for template in ("chat", "alpaca")
        for name, every in EVERY.items()
    ]
    results = {"machine": environment.machine(), "rows": len(rows), "times": options.times, "encoded": found}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
