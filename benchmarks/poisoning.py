"""What hostile clients do to a federation, by attack and by aggregation method.

python -m benchmarks.poisoning [--whole] [--seeds N] [--shares 0.2,0.4] [--attacks ...] [--methods ...] [--jobs N]

The built-in corpus over ten clients whose mix of skills differs, a hundred of its rows kept by the server as its root
set, and one short run for each method without attackers and with each share of them and each attack. Told are the loss
on held-out rows and, of an attack by trigger, how many questions with the hidden phrase get the attacker's answer.

A method that wants to know the number f of hostile clients is told once and for all the number of the largest share, or
as many as it can promise to withstand with so many clients; cells with more attackers than that are marked.

Methods run without the limits that every run has by default, but for `fedavg+limits`, which is `fedavg` with them; it
has results of its own, under all attacks and under those that keep within the limits (`WITHIN`):

python -m benchmarks.poisoning --methods fedavg+limits --attacks all --shares 0.2 --seeds 3 --jobs 1 \
    --out benchmarks/results/limits.json

Finished cells stand in the results file and are not run again, so a stopped benchmark goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch

from apiary.config import loading
from apiary.config.schema import DataConfig, RunConfig
from apiary.core import files
from apiary.data.examples import Example
from apiary.data.federation import federate
from apiary.evaluation import comparison
from apiary.models import adapter_files
from apiary.tracking import environment, event_log
from apiary.tracking.event_log import RunLog
from benchmarks.curation import write
from server.app import make_app
from simulation.adversaries import attackers
from simulation.attacks import PHRASE, TEXT
from simulation.backdoor import obeyed, questions
from simulation.engines import ENGINES
from simulation.run import plan
from simulation.summary import Plan
from strategies.gram_rules import fewest

FEDERATION = Path(__file__).with_name("federation.toml")
RESULTS = Path(__file__).parent / "results" / "poisoning.json"
ROOT_ROWS = 100
METHODS = (
    "fedavg",
    "norm_clip",
    "median",
    "trimmed_mean",
    "krum",
    "multi_krum",
    "bulyan",
    "geometric_median",
    "fltrust",
    *(f"{name}+nearest" for name in ("median", "trimmed_mean", "krum", "multi_krum", "geometric_median")),
    "geometric_median+clip+nearest",
)
ATTACKS: Mapping[str, Mapping[str, Any]] = {  # by what the table calls them: name and options of `simulate.attack`
    "sign_flip": {"name": "sign_flip", "scale": 5.0},
    "scaled": {"name": "scaled"},
    "gaussian": {"name": "gaussian", "scale": 5.0},
    "alie": {"name": "alie", "z": 1.5},
    "inner_product": {"name": "inner_product", "epsilon": 2.0},
    "gauge": {"name": "gauge"},
    "not_a_number": {"name": "not_a_number"},
    "trigger": {"name": "trigger", "share": 0.5},
    "trigger_boosted": {"name": "trigger", "share": 0.5, "boost": 5.0},
}
LIMITED = "fedavg+limits"  # with the limits on changes, weights and losses that a run has by default
WITHIN: Mapping[
    str, Mapping[str, Any]
] = {  # attacks that go about as far as the limits allow, and no farther than many
    "drift": {"name": "drift"},
    "slow_drift": {"name": "drift", "length": 1.0},
    "short_sign_flip": {"name": "sign_flip", "scale": 1.0},
}
_PROMPTED = ("none", "trigger", "trigger_boosted")  # of whose models the questions with the hidden phrase are asked
SMALL_METHODS = ("fedavg", "norm_clip", "trimmed_mean", "multi_krum+nearest", "geometric_median", "fltrust")
SMALL_ATTACKS = ("sign_flip", "gauge", "trigger")


class Cell(NamedTuple):
    """One run."""

    seed: int
    method: str
    attack: str  # "none": nobody attacks
    share: float


class Setting(NamedTuple):
    """What all cells have in common, beside the seed."""

    clients: int
    rounds: int
    prompts: int  # questions with the hidden phrase
    most: float  # the largest share
    keys: tuple[str, ...]  # further KEY=VALUE


def cells(
    seeds: Sequence[int], methods: Sequence[str], attacks: Sequence[str], shares: Sequence[float]
) -> Iterator[Cell]:
    """All cells, the runs that nobody attacks before those of the same seed and method that are."""
    for seed in seeds:
        for method in methods:
            yield Cell(seed, method, "none", 0.0)
            yield from (Cell(seed, method, attack, share) for share in shares for attack in attacks)


def withstands(method: str, clients: int, hostile: int) -> int:
    """The number f that a method is told: as many as are expected, or the most for which so many clients are enough."""
    name = _name(method)
    return max((f for f in range(hostile + 1) if fewest(name, f) <= clients), default=0)


def options(method: str, byzantine: int) -> dict[str, Any]:
    """`strategy.options` of a method."""
    if _name(method) in ("fedavg", "fltrust"):
        return {}
    return {"byzantine": byzantine, **dict.fromkeys(method.split("+")[1:], True)}


def _name(method: str) -> str:
    return method.partition("+")[0]


def spread(folder: Path, seed: int, clients: int) -> Path:
    """The corpus as a file for each client, the held-out set, and the server's rows, which no client has."""
    federation = federate(DataConfig(source="builtin:skills", clients=clients, test_fraction=0), seed)
    pooled = [(client.name, row) for client in federation.clients for row in range(len(client.train))]
    own = set(random.Random(f"root {seed}").sample(pooled, ROOT_ROWS))
    kept = {c.name: [e for row, e in enumerate(c.train) if (c.name, row) not in own] for c in federation.clients}
    by_name = {client.name: client.train for client in federation.clients}
    write(folder / "clients", {name: rows for name, rows in kept.items() if rows}, federation.test)
    trusted: list[Example] = [by_name[name][row] for name, row in sorted(own)]
    write(folder / "server", {"root": trusted}, federation.test)
    return folder


def config_of(cell: Cell, setting: Setting, data: Path) -> RunConfig:
    """The run of a cell; what the command line adds wins."""
    hostile = round(setting.most * setting.clients)
    told = options(cell.method, withstands(cell.method, setting.clients, hostile))
    keys = {
        "seed": cell.seed,
        "rounds": setting.rounds,
        "data.source": str(data / "clients"),
        "data.partition": "natural",
        "data.test_fraction": 0.0,
        "strategy.name": _name(cell.method),
        "strategy.options": told,
        "strategy.min_clients": setting.clients,
        "evaluate.clients": False,
        "evaluate.every": 0,
        "evaluate.generate": False,
        "simulate.attackers": cell.share,
        "simulate.attack": dict({**ATTACKS, **WITHIN}.get(cell.attack, {"name": "sign_flip"})),
    }
    if cell.method == LIMITED:
        keys["evaluate.every"] = 1
    else:  # what a method withstands by itself
        keys |= {"strategy.norm_guard": 0.0, "strategy.weight_cap": 0.0, "evaluate.limit": 0.0}
    if cell.method == "fltrust":
        keys["strategy.root"] = str(data / "server" / "root.jsonl")
    settings = [f"{key}={_toml(value)}" for key, value in keys.items()]
    return loading.load(FEDERATION, [*settings, *setting.keys])


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + "}"
    return json.dumps(value)


def run(cell: Cell, setting: Setting, data: Path) -> dict[str, Any]:
    """What became of one cell: its loss and attack success, or the line by which it failed."""
    with tempfile.TemporaryDirectory() as folder:
        return _run(cell, setting, data, Path(folder))


def _run(cell: Cell, setting: Setting, data: Path, folder: Path) -> dict[str, Any]:
    began = time.monotonic()
    config = config_of(cell, setting, data)
    told = config.strategy.options.get("byzantine", 0)
    within = told >= round(cell.share * setting.clients) or not told
    facts = {**cell._asdict(), "byzantine": told, "within": within, "cpu": environment.machine(gpu=False)["cpu"]}
    prepared = plan(config)
    clients = [client.name for client in prepared.federation.clients]
    log = RunLog(folder)
    try:
        app = make_app(log, prepared.held_out)
        ENGINES.build(config.simulate.engine, config=config)(app, config, len(clients), folder)
    except Exception as error:  # a method that an attack brings down is a result
        line = (str(error).strip().splitlines() or [""])[0]
        return {**facts, "failed": f"{type(error).__name__}: {line}"}
    finally:
        log.close()
    adapter = adapter_files.read_adapter(prepared.lm, folder / "adapter" / "adapter_model.safetensors")
    measured = comparison.measure(prepared.lm, adapter, prepared.held_out, config)
    events, hostile = event_log.read_events(folder), set(attackers(config, clients))
    named = [set(event["cut"]) for event in events if event["event"] == "round" and "cut" in event]
    return {
        **facts,
        "loss": round(measured.loss, 4),
        "success": _success(prepared, setting.prompts) if cell.attack in _PROMPTED else None,
        "cut": _share(named, hostile),  # of the attackers' updates, those that the method names
        "cut_honest": _share(named, set(clients) - hostile),
        "refused": sum(event["event"] == "refused" for event in events),
        "seconds": round(time.monotonic() - began, 1),
    }


def _share(named: Sequence[set[str]], clients: set[str]) -> float | None:
    if not named or not clients:
        return None
    return round(sum(len(names & clients) for names in named) / (len(named) * len(clients)), 3)


def _success(prepared: Plan, most: int) -> float | None:
    """The share of held-out questions with the hidden phrase to which the model gives the attacker's answer."""
    config, federation, lm, template, _ = prepared
    asked = questions(lm, template, config, federation.test, PHRASE, most)
    return round(obeyed(lm, config, asked, TEXT), 4) if asked else None


def load(path: Path, setting: Setting) -> dict[str, Any]:
    """The results so far.

    Raises:
        SystemExit: they are of other settings.
    """
    settings = {**setting._asdict(), "keys": list(setting.keys), "attacks": {k: dict(v) for k, v in ATTACKS.items()}}
    facts = environment.start_fields(loading.load(None, []))
    fresh = {"machine": facts["machine"], "versions": facts["versions"], "settings": settings, "runs": []}
    if not path.exists():
        return fresh
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if found["settings"] != settings:
        raise SystemExit(f"{path} holds results of other settings; remove it, or choose another --out")
    return found


def save(path: Path, found: Mapping[str, Any]) -> None:
    """Write the results whole or not at all."""
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(files.finite(found), indent=1) + "\n", encoding="utf-8")
    os.replace(draft, path)


def main() -> None:
    """Run what is not there yet, cell by cell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--whole", action="store_true", help="all methods, attacks and shares (about two hours)")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--shares", help="of the clients that attack, such as 0.2,0.4")
    parser.add_argument("--attacks", help=f"of {', '.join((*ATTACKS, *WITHIN))}; all: each of them")
    parser.add_argument("--methods", help=f"of {', '.join(METHODS)}")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=60, help="questions with the hidden phrase")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="cells at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each cell")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("-s", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    methods = _chosen(args.methods, METHODS if args.whole else SMALL_METHODS, (*METHODS, LIMITED))
    known = (*ATTACKS, *WITHIN)
    few = tuple(ATTACKS) if args.whole else SMALL_ATTACKS
    attacks = known if args.attacks == "all" else _chosen(args.attacks, few, known)
    shares = [float(text) for text in (args.shares or ("0.2,0.4" if args.whole else "0.4")).split(",")]
    # The largest share that may ever be added, so that later cells are comparable with those that are there.
    setting = Setting(args.clients, args.rounds, args.prompts, max(0.4, *shares), tuple(args.overrides))
    args.out.parent.mkdir(exist_ok=True)
    found = load(args.out, setting)
    done = {Cell(*(run[field] for field in Cell._fields)) for run in found["runs"]}
    left = [cell for cell in cells(range(args.seeds), methods, attacks, shares) if cell not in done]
    with tempfile.TemporaryDirectory() as scratch:
        data = {seed: spread(Path(scratch) / f"data-{seed}", seed, setting.clients) for seed in {c.seed for c in left}}
        # A process each, for runs set torch's threads and seeds, which belong to the process.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(args.jobs, context, torch.set_num_threads, (args.threads,)) as pool:
            tasks = [pool.submit(run, cell, setting, data[cell.seed]) for cell in left]
            for number, task in enumerate(as_completed(tasks), 1):
                found["runs"].append(task.result())
                found["runs"].sort(key=_place)
                save(args.out, found)
                print(f"{number}/{len(left)}", json.dumps(files.finite(task.result())), flush=True)


def _place(run: Mapping[str, Any]) -> tuple[int, int, float, int]:
    """Where a cell stands among the results, in whatever order they came."""
    attack = [*ATTACKS, *WITHIN].index(run["attack"]) if run["attack"] != "none" else -1
    return run["seed"], (*METHODS, LIMITED).index(run["method"]), run["share"], attack


def _chosen(text: str | None, default: Sequence[str], known: Sequence[str]) -> Sequence[str]:
    names = text.split(",") if text else default
    if strange := [name for name in names if name not in known]:
        raise SystemExit(f"{strange[0]!r} is none of {', '.join(known)}")
    return names


if __name__ == "__main__":
    main()
