"""Curation on data of known badness: what each kind of bad row is caught by, and what that is worth in a federation.

python benchmarks/curation.py [--seeds 3] [--share 0.4] [--every 3] [--keep DIR] [--out FILE]

The built-in corpus is spread over clients, a share of each client's rows is spoiled, and the same federation runs on
the rows as they were, spoiled, spoiled and curated (with IFD from the first round on, or once the model has trained for
some), and spoiled and cut at random to as many rows as curation keeps.
Every run makes the same number of steps of about the same number of tokens.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from apiary.cli.curate import as_rows
from apiary.config.schema import DataConfig, Method, RunConfig
from apiary.data import tokenization
from apiary.data.examples import Example, answer
from apiary.data.federation import federate
from apiary.export import tuned as results
from apiary.models import adapters
from apiary.models.inference import ModelProbe
from client.curation import Context, Curation, Reader, curate

FEDERATION = Path(__file__).with_name("federation.toml")
RESULTS = Path(__file__).parent / "results" / "curation.json"
KINDS = ("shuffled", "duplicate", "near_duplicate", "truncated")
STEPS = ("duplicates", "near_duplicates", "length", "ifd")
_POLITE = ("Please help: {}", "{} Thank you!", "Hello. {}", "{} Answer at once, please.", "I have a task. {}")


class Spoiled(NamedTuple):
    """Rows of which some are bad; bad: index -> kind; source: index of a copy -> index of what it copies."""

    examples: tuple[Example, ...]
    bad: Mapping[int, str]
    source: Mapping[int, int]


def spoil(examples: Sequence[Example], share: float, rng: random.Random) -> Spoiled:
    """The rows with a share of them made bad, as many of each kind as of any other; their number stays.

    shuffled: the answer of another row; duplicate: a copy of another row in other case and spacing; near_duplicate: a
    copy with words put before or behind it, or one word left out; truncated: the first half of the answer.
    """
    rows = list(examples)
    chosen = rng.sample(range(len(rows)), round(share * len(rows)))
    good = sorted(set(range(len(rows))) - set(chosen))
    bad = {index: KINDS[k % len(KINDS)] for k, index in enumerate(chosen)}
    source: dict[int, int] = {}
    shuffled = [index for index in chosen if bad[index] == "shuffled"]
    for index in chosen:
        match bad[index]:
            case "shuffled":
                others = [i for i in shuffled if answer(examples[i]) != answer(examples[index])] or good
                rows[index] = _answering(examples[index], answer(examples[rng.choice(others)]))
            case "truncated":
                text = answer(examples[index])
                rows[index] = _answering(examples[index], text[: max(1, len(text) // 2)].strip())
            case kind:
                source[index] = rng.choice(good)
                rows[index] = _copy(examples[source[index]], kind, rng)
    same = {i for i in bad if i not in source and answer(rows[i]) == answer(examples[i])}  # one letter has no half
    return Spoiled(tuple(rows), {i: kind for i, kind in bad.items() if i not in same}, source)


def _answering(example: Example, text: str) -> Example:
    return example._replace(turns=(*example.turns[:-1], example.turns[-1]._replace(text=text)))


def _copy(example: Example, kind: str, rng: random.Random) -> Example:
    first, *rest = example.turns
    if kind == "duplicate":
        text = rng.choice((first.text.upper(), first.text.replace(" ", "  "), first.text.lower()))
    elif rng.random() < 0.5:
        text = rng.choice(_POLITE).format(first.text)
    else:
        pieces = first.text.split(" ")
        pieces.pop(rng.randrange(len(pieces)))
        text = " ".join(pieces)
    return example._replace(turns=(first._replace(text=text), *rest))


def caught(spoiled: Spoiled, kept: Sequence[int]) -> dict[str, Any]:
    """Recall of each kind of bad row, and the precision and clean rows lost over all.

    A copy counts as caught when it or its source is gone: which of the two stays does not matter.
    """
    gone = set(range(len(spoiled.examples))) - set(kept)
    hit = {i: i in gone or spoiled.source.get(i) in gone for i in spoiled.bad}
    stands_in = {spoiled.source[i] for i, found in hit.items() if i in spoiled.source and found and i not in gone}
    lost = [i for i in gone if i not in spoiled.bad and i not in stands_in]
    clean = len(spoiled.examples) - len(spoiled.bad)
    totals = Counter(spoiled.bad.values())
    hits = Counter(spoiled.bad[i] for i, found in hit.items() if found)
    return {
        "rows": len(spoiled.examples),
        "bad": dict(totals),
        "recall": {kind: round(hits[kind] / totals[kind], 3) for kind in KINDS if totals[kind]},
        "precision": round(1 - len(lost) / max(1, len(gone)), 3),
        "clean_lost": round(len(lost) / clean, 3),
    }


def reader(adapter: Path | None) -> Reader:
    """The built-in base untuned, or with the adapter of a run."""
    if adapter is not None:
        tuned = results.open_tuned(adapter)
        return Reader(tuned.template, tuned.lm.tokenizer, tuned.config.prompt, lambda: ModelProbe(tuned.lm))
    config = RunConfig()
    lm = adapters.load(config.model, config.adapter)
    adapters.set_adapter(lm, adapters.fresh_adapter(lm, config.seed))
    template = tokenization.make_template(config.prompt, lm.tokenizer)
    return Reader(template, lm.tokenizer, config.prompt, lambda: ModelProbe(lm))


def chosen(spoiled: Spoiled, client: str, judge: Reader) -> Curation:
    """What curation makes of one client's rows."""
    return curate(spoiled.examples, [Method(name=name) for name in STEPS], Context(0, client, (), judge))


def write(folder: Path, clients: Mapping[str, Sequence[Example]], test: Sequence[Example]) -> Path:
    """A folder with a file for each client and the held-out set, for the natural partition."""
    folder.mkdir(parents=True)
    for name, examples in {**clients, "test": test}.items():
        lines = (json.dumps(row) + "\n" for row in as_rows(examples))
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def simulate(data: Path, out: Path, seed: int, *more: str) -> dict[str, Any]:
    """The federated row of one run's final table."""
    keys = [f"seed={seed}", f"data.source={data}", "data.partition=natural", "evaluate.baselines=[]", *more]
    settings = [part for key in keys for part in ("-s", key)]
    command = [sys.executable, "-m", "apiary.cli.main", "simulate", str(FEDERATION), "--quiet", "--out", str(out)]
    command += settings
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    (row,) = [row for row in metrics["table"] if row["method"] == "federated"]
    return {**row, "machine": metrics["machine"], "versions": metrics["versions"]}


def one(seed: int, share: float, every: int, folder: Path) -> dict[str, Any]:
    """All conditions with one seed."""
    federation = federate(DataConfig(source="builtin:skills", test_fraction=0), seed)
    clean = {client.name: client.train for client in federation.clients}
    spoiled = {name: spoil(rows, share, random.Random(f"{seed} {name}")) for name, rows in clean.items()}
    rows = {name: s.examples for name, s in spoiled.items()}
    sources = {
        "clean": write(folder / "clean", clean, federation.test),
        "spoiled": write(folder / "spoiled", rows, federation.test),
    }
    at_once, later = (_settings(every, warmup) for warmup in (0, every))
    runs = {name: simulate(source, folder / f"run-{name}", seed) for name, source in sources.items()}
    found = {
        "untuned": _caught_by(spoiled, None),
        "tuned": _caught_by(spoiled, folder / "run-spoiled"),
    }
    keep = found["tuned"]["kept"] / found["tuned"]["rows"]
    more = {
        "curated": later,
        "curated at once": at_once,
        "random": (f'curate.steps=[{{ name = "random", keep = {keep:.3f} }}]',),
        "oracle": (),
    }
    good = {name: [e for i, e in enumerate(s.examples) if i not in s.bad] for name, s in spoiled.items()}
    sources["oracle"] = write(folder / "oracle", good, federation.test)
    for name, settings in more.items():
        source = sources.get(name, sources["spoiled"])
        runs[name] = simulate(source, folder / f"run-{name}", seed, *settings)
    return {"seed": seed, "share": share, "every": every, "caught": found, "runs": runs}


def _settings(every: int, warmup: int) -> tuple[str, ...]:
    """Curation of a federation; the model is asked for the first time after `warmup` rounds."""
    asked = f'{{ name = "ifd", warmup = {warmup} }}' if warmup else '"ifd"'
    return f"curate.steps=[{', '.join(json.dumps(name) for name in STEPS[:-1])}, {asked}]", f"curate.every={every}"


def _caught_by(spoiled: Mapping[str, Spoiled], adapter: Path | None) -> dict[str, Any]:
    """`caught` over the rows of all clients, curated one by one."""
    judge = reader(adapter)
    pooled, kept, at = Spoiled((), {}, {}), [], 0
    for name, part in spoiled.items():
        kept += [at + index for index in chosen(part, name, judge).kept]
        pooled = Spoiled(
            (*pooled.examples, *part.examples),
            {**pooled.bad, **{at + i: kind for i, kind in part.bad.items()}},
            {**pooled.source, **{at + i: at + j for i, j in part.source.items()}},
        )
        at += len(part.examples)
    return {**caught(pooled, kept), "kept": len(kept)}


def main() -> None:
    """Run the seeds one after the other and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--share", type=float, default=0.4, help="share of each client's rows that is spoiled")
    parser.add_argument("--every", type=int, default=3, help="curate again every so many rounds")
    parser.add_argument("--keep", type=Path, help="keep data and run directories there")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    runs = []
    for seed in range(args.seeds):
        with tempfile.TemporaryDirectory() as scratch:
            runs.append(one(seed, args.share, args.every, (args.keep or Path(scratch)) / f"seed-{seed}"))
    first = next(iter(runs[0]["runs"].values()))
    machine, versions = first["machine"], first["versions"]
    for run in runs:
        for row in run["runs"].values():
            del row["machine"], row["versions"]
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps({"machine": machine, "versions": versions, "runs": runs}, indent=1) + "\n")
    print(args.out.read_text())


if __name__ == "__main__":
    main()
