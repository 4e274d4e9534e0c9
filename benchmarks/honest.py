"""How near honest clients come to the limits that every run has by default.

python -m benchmarks.honest [--seeds N] [--ways ...] [--out FILE]

Short runs on the built-in corpus in which nobody attacks, one for each setting that could make one client stand out:
sizes, methods, codecs, stages, privacy. Of each visit is told how long its change is over the usual one and how far it
is of what the optimizer can do, how much it weighs over the usual weight, and of each round how near its loss comes to
the one that ends a run. An honest client that is refused is a fault of the limits.

Finished runs stand in the results file and are not run again, so a stopped benchmark goes on where it was.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from apiary.config import loading
from apiary.config.schema import DataConfig
from apiary.core.messages import Visit
from apiary.data.federation import federate
from apiary.tracking import environment, event_log
from benchmarks.curation import write
from benchmarks.poisoning import save
from server import explosion, validation
from server.screen import Screen
from simulation import run
from strategies import guard
from strategies.guard import Reach

RESULTS = Path(__file__).parent / "results" / "honest.json"
SIZES = (1, 1, 1, 1, 1, 20)  # of the clients of `skewed`, in parts of `ROWS`
ROWS = 40
COMMON = (
    "rounds=5",
    "data.source=builtin:skills:50",
    "data.clients=7",
    "evaluate.baselines=[]",
    "evaluate.every=1",
    "evaluate.clients=false",
    "evaluate.generate=false",
    "evaluate.samples=0",
)
EPOCH = "train.epochs=1.0"
ONE_BAD = ("strategy.options.byzantine=1", "strategy.min_clients=7")
SGD = ("train.optimizer=sgd", "train.lr=0.3")
STAGES = (
    'continual.stages=[["sort", "count", "classify"], ["lookup", "extract", "filter"], ["arithmetic", "compare"]]',
    "data.clients=4",
)
PRIVATE = (
    "privacy.unit=record",
    "data.clients=4",
    "data.source=builtin:skills",
    "data.partition=iid",
    "adapter.rank=4",
)
WAYS: Mapping[str, Sequence[str]] = {  # by what the table calls them
    "the defaults": (),
    "`train.epochs = 1`": (EPOCH,),
    "one of six with 20 times the rows, `train.epochs = 1`": ("skewed", EPOCH),
    "one of two with 20 times the rows, `train.epochs = 1`": ("skewed two", EPOCH),
    "two skills a client, `train.epochs = 1`": ('data.partition={name="pathological", by="skill", classes=2}', EPOCH),
    "half of the clients a round": ("strategy.fraction=0.5",),
    "`fedalt`": ("strategy.name=fedalt", "evaluate.clients=true"),
    "`clustered`": ("strategy.name=clustered", "evaluate.clients=true"),
    "`wire.up`, `down`: `int4`": ("wire.up=int4", "wire.down=int4"),
    "`wire.up`: `topk`": ("wire.up=topk",),
    "`wire.up`: `topk`, `train.epochs = 1`": ("wire.up=topk", EPOCH),
    "`wire.up`: `int8`": ("wire.up=int8",),
    "stages, with replay": (*STAGES, "continual.buffer=0.1"),
    "stages, with replay, `train.epochs = 1`": (*STAGES, "continual.buffer=0.1", EPOCH),
    "privacy for each row, AdamW": (*PRIVATE, "train.lr=1.5e-2"),
    "privacy for each row, descent": (*PRIVATE, *SGD),
    "`scaffold`": ("strategy.name=scaffold", *SGD),
    "FedProx": ('train.penalties=[{name="fedprox", mu=0.1}]',),
    "`median`": ("strategy.name=median",),
    "`trimmed_mean`": ("strategy.name=trimmed_mean", *ONE_BAD),
    "`krum`": ("strategy.name=krum", *ONE_BAD),
    "`multi_krum`, `nearest`": ("strategy.name=multi_krum", *ONE_BAD, "strategy.options.nearest=true"),
    "`bulyan`": ("strategy.name=bulyan", *ONE_BAD),
    "`geometric_median`": ("strategy.name=geometric_median",),
    "`norm_clip`": ("strategy.name=norm_clip",),
    "gradient descent": SGD,
    "gradient descent, `train.clip_norm = 0`": (*SGD, "train.clip_norm=0"),
    "gradient descent, `train.clip_norm = 0`, `train.epochs = 1`": (*SGD, "train.clip_norm=0", EPOCH),
    "LoRA+": ("train.lr=1e-3", "train.lr_b=16"),
    "factors in turns": ("adapter.train=alternate",),
    "FedSA": ("adapter.share=a", "evaluate.clients=true"),
    "`ditto`": ("strategy.name=ditto", "evaluate.clients=true"),
    "`fedkseed`": ("strategy.name=fedkseed",),
    "`rank_slices`, ranks 2 to 16": ("strategy.name=rank_slices", "adapter.ranks=[2, 4, 8, 16]"),
    "`hetlora`, which prunes": ("strategy.name=hetlora", "strategy.options={prune=0.5, penalty=0.1}"),
    "`flora`": ("strategy.name=flora",),
    "`fedex`": ("strategy.name=fedex",),
}


class Nearest:
    """What the visits of a run came nearest to; ratios of which the limits are `strategy.norm_guard`, 1 and so on."""

    def __init__(self) -> None:
        self.length = self.weight = 0.0
        self.reach: float | None = None  # None: no limit is known
        self.losses: list[float] = []  # before training, and after each round

    def enter(self, screen: Screen) -> None:
        """Take in a round once all its visits are seen."""
        usual, before, rate = guard.medians(screen._seen), screen._before, screen._rate
        weight = max(usual.weight, before.weight)
        for sizes, own in screen._seen:
            self.weight = max(self.weight, own / weight if weight else 0.0)
            for part, size in sizes.items():
                most = max(usual.lengths.get(part, 0.0), before.length(part, rate))
                self.length = max(self.length, size / most if most else 0.0)

    def hold(self, visit: Visit, reach: Reach) -> None:
        """Take in a visit and what training can do."""
        ratios = [
            size / reach.entries[part] for part, size in guard.largest(visit.update.delta).items() if reach.entries
        ]
        if reach.norm < float("inf"):
            squares = sum(float(t.double().square().sum()) for t in visit.update.delta.values())
            ratios.append(squares**0.5 / reach.norm)
        if ratios:
            self.reach = max(self.reach or 0.0, *ratios)


@contextlib.contextmanager
def watched(nearest: Nearest) -> Iterator[None]:
    """Let `nearest` see every visit and loss of the runs in this process."""
    after, check, hold = Screen.after, validation.check_reach, explosion.Watch.hold

    def seen(screen: Screen) -> guard.Reference:
        nearest.enter(screen)
        return after(screen)

    def held(visit: Visit, reach: Reach) -> None:
        nearest.hold(visit, reach)
        check(visit, reach)

    def measured(watch: explosion.Watch, *args: Any) -> str:
        line = hold(watch, *args)
        nearest.losses += [] if watch.loss is None else [watch.loss]
        return line

    with (
        mock.patch.object(Screen, "after", seen),
        mock.patch.object(validation, "check_reach", held),
        mock.patch.object(explosion.Watch, "hold", measured),
    ):
        yield


def skewed(folder: Path, seed: int, sizes: Sequence[int]) -> Path:
    """The corpus as a file for each client, of so many times `ROWS` rows, and the held-out set."""
    (whole,) = federate(DataConfig(source="builtin:skills", clients=1, partition={"name": "iid"}), seed).clients
    rows = list(whole.train)
    parts = {}
    for number, size in enumerate(sizes):
        parts[f"c{number}"], rows = rows[: size * ROWS], rows[size * ROWS :]
    return write(folder, parts, whole.test)


def keys_of(way: str, seed: int, folder: Path) -> list[str]:
    """The KEY=VALUE of a run."""
    keys = [f"seed={seed}", *COMMON, *WAYS[way]]
    for name, sizes in (("skewed", SIZES), ("skewed two", (1, 20))):
        if name in keys:
            at = keys.index(name)
            source = skewed(folder / "data", seed, sizes)
            keys[at : at + 1] = [f"data.source={source}", "data.partition=natural", "data.test_fraction=0"]
    return keys


def one(way: str, seed: int, more: Sequence[str] = ()) -> dict[str, Any]:
    """What the clients of one run came nearest to, and how many were refused, scaled down or capped."""
    torch.set_num_threads(1)
    began, nearest = time.monotonic(), Nearest()
    with tempfile.TemporaryDirectory() as scratch, watched(nearest):
        config = loading.load(None, [*keys_of(way, seed, Path(scratch)), *more])
        failed = ""
        try:
            run.simulate(config, Path(scratch) / "run")
        except Exception as error:  # a run that a limit ends is a result
            failed = (str(error).strip().splitlines() or [type(error).__name__])[0]
        events = event_log.read_events(Path(scratch) / "run")
    kinds = Counter(event["event"] for event in events)
    visits = [event for event in events if event["event"] == "client"]
    losses = nearest.losses
    return {
        "way": way,
        "seed": seed,
        "visits": len(visits),
        "length": round(nearest.length, 3),
        "reach": nearest.reach and round(nearest.reach, 3),
        "weight": round(nearest.weight, 3),
        "loss": round(max(losses[1:]) / explosion.limit(losses[0], config), 3) if losses[1:] else None,
        "losses": [round(loss, 3) for loss in losses],
        "refused": kinds["refused"],
        "reasons": sorted({event["reason"] for event in events if event["event"] == "refused"}),
        "shortened": sum("shortened" in event for event in visits),
        "capped": sum("capped" in event for event in visits),
        "failed": failed,
        "cpu": environment.machine(gpu=False)["cpu"],
        "seconds": round(time.monotonic() - began, 1),
    }


def main() -> None:
    """Run what is not there yet, one after the other, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--ways", type=int, nargs="*", help="numbers of the settings, from 0; all unless given")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    ways = [list(WAYS)[number] for number in args.ways] if args.ways else list(WAYS)
    facts = environment.start_fields(loading.load(None, []))
    found: dict[str, Any] = {"machine": facts["machine"], "versions": facts["versions"], "runs": []}
    if args.out.exists():
        found = json.loads(args.out.read_text(encoding="utf-8"))
    done = {(made["way"], made["seed"]) for made in found["runs"]}
    left = [(way, seed) for seed in range(args.seeds) for way in ways if (way, seed) not in done]
    # A process each, for runs set torch's threads and seeds, which belong to the process.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
        for number, (way, seed) in enumerate(left, 1):
            made = pool.submit(one, way, seed).result()
            found["runs"] = sorted([*found["runs"], made], key=lambda run: (list(WAYS).index(run["way"]), run["seed"]))
            save(args.out, found)
            print(f"{number}/{len(left)}", json.dumps(made), flush=True)


if __name__ == "__main__":
    main()
