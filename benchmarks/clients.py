"""What a message to a virtual client costs beside its training, part by part, and how that grows with the clients.

Four measurements, each in processes of its own so that peak memory is its own:

- imports: what the libraries take before anything is done.
- parts: where the time of a train message goes on the local engine: decode, set, plan, step, encode, check, fold, log
  and disk. Processor time of the main thread, least of five warm rounds, for other work on the machine only adds to it.
- rounds: one round over 10 to 10,000 virtual clients (of the last, one in twenty is asked) in one process, and over
  some of these sizes on Flower's simulation on Ray, the two engines in turns. On a busy machine compare them with
  each other, not with another day's.
- run: ten rounds of 1,000 clients, half of them away and one in twenty failing, from the data to the report.

    python benchmarks/clients.py [--quick]
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from apiary.config import loading

RESULTS = Path(__file__).parent / "results" / "clients.json"
_BUILT_IN_ROWS = 6000
_PARTS_OF, _WARM = 100, 5  # clients, and rounds after the first


def overrides(clients: int, engine: str) -> list[str]:
    """One round, one step a client, on the built-in corpus dealt evenly; nothing but the round itself."""
    return [
        f"data.clients={clients}",
        "data.partition=iid",
        "data.test_fraction=0.0",
        "rounds=1",
        "train.steps=1",
        "train.batch_tokens=16",
        "train.threads=1",
        "model.dtype=float32",
        "evaluate.every=0",
        "evaluate.clients=false",
        f"simulate.engine={engine}",
        "strategy.join_timeout_s=600",
    ]


def one_round(clients: int, engine: str, fraction: float = 1.0) -> dict[str, Any]:
    """Seconds per train message and peak memory of the driver, over one round of a fraction of the clients."""
    from apiary.tracking.event_log import RunLog, read_events
    from server.app import make_app
    from simulation.engines import ENGINES

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        source = [] if 2 * clients <= _BUILT_IN_ROWS else [f"data.source={_rows(folder / 'rows.jsonl', 2 * clients)}"]
        run = loading.load(None, [*overrides(clients, engine), f"strategy.fraction={fraction}", *source])
        log = RunLog(folder)
        began = time.monotonic()
        ENGINES.build(engine, config=run)(make_app(log), run, clients, folder)
        total = time.monotonic() - began
        events = read_events(folder)
        log.close()
        files = sum(len(names) for _, _, names in os.walk(folder / "clients"))
    done = next(e for e in events if e["event"] == "round")
    return {
        "clients": clients,
        "engine": engine,
        "asked": done["asked"],
        "round_s": done["seconds"],
        "ms_per_message": 1000 * done["seconds"] / done["asked"],
        "whole_run_s": total,
        "files_per_client": files / done["asked"],
        "peak_driver_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "peak_largest_child_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
        "load": os.getloadavg()[0],
    }


def _rows(path: Path, count: int) -> Path:
    """A file of rows as short as those of the built-in corpus."""
    path.write_text(
        "".join(
            json.dumps({"instruction": f"Count the letters of word {n:x}.", "output": f"It has {len(f'{n:x}')}."})
            + "\n"
            for n in range(count)
        )
    )
    return path


class _Clock:
    """The processor time that the main thread spends in each part; a part within another counts for itself alone."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self._inner = [0.0]

    def wrap(self, owner: Any, name: str, part: str) -> None:
        """Count what the function `name` of a module or class takes as `part`."""
        whole = getattr(owner, name)

        @functools.wraps(whole)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(part):
                return whole(*args, **kwargs)

        setattr(owner, name, timed)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Within it time is spent on a part."""
        began = time.thread_time()
        self._inner.append(0.0)
        try:
            yield
        finally:
            took = time.thread_time() - began
            self.spent[name] = self.spent.get(name, 0.0) + took - self._inner.pop()
            self._inner[-1] += took


def parts() -> dict[str, Any]:
    """Milliseconds of processor time that a warm train message takes, by part."""
    from apiary.models import adapters
    from apiary.tracking.event_log import RunLog
    from apiary.transport import codec, flower_records
    from client import round_files, state
    from client.training import trainer
    from client.worker import Worker
    from server import aggregation, app, validation
    from server.rounds import Rounds
    from simulation.engines import ENGINES

    clock, rounds = _Clock(), list[dict[str, float]]()
    for owner, name, part in (
        (flower_records, "read_request", "decode"),
        (codec, "decode", "decode"),
        (trainer, "set_adapter", "set"),
        (trainer, "_streams", "plan"),
        (trainer.BatchStream, "take", "plan"),
        (trainer._Loop, "step", "step"),
        (Worker, "send", "encode"),
        (flower_records, "train_reply", "encode"),
        (validation, "check_visit", "check"),
        (aggregation, "fold", "fold"),
        (RunLog, "event", "log"),
        (round_files, "begin", "disk"),
        (state, "load", "disk"),
        (state, "save", "disk"),
        (Rounds, "_aggregate", "once a round"),
        (app, "save", "once a round"),
    ):
        clock.wrap(owner, name, part)
    whole = Rounds._round

    def one(self: Rounds, number: int, grid: Any) -> None:
        clock.spent.clear()
        with clock.part("rest"):
            whole(self, number, grid)
        rounds.append({part: 1000 * spent / _PARTS_OF for part, spent in clock.spent.items()})

    Rounds._round = one  # type: ignore[method-assign]
    run = loading.load(None, [*overrides(_PARTS_OF, "local"), f"rounds={_WARM + 1}"])
    with tempfile.TemporaryDirectory() as scratch:
        ENGINES.build("local", config=run)(app.make_app(RunLog(Path(scratch))), run, _PARTS_OF, Path(scratch))
    least = {part: min(found[part] for found in rounds[1:]) for part in rounds[0]}
    once = least.pop("once a round") * _PARTS_OF
    beside = sum(took for part, took in least.items() if part != "step")
    return {
        "clients": _PARTS_OF,
        "ms": least,
        "ms_once_a_round": once,
        "ms_beside_step": beside,
        "base_loads": adapters.base_loads(),
        "load": os.getloadavg()[0],
    }


def whole_run(clients: int, rounds: int) -> dict[str, Any]:
    """A run of many clients of whom half are away and some fail, from the data to the report."""
    from simulation.run import simulate

    more = ["data.test_fraction=0.1", f"rounds={rounds}", "simulate.away=0.5", "simulate.failing=0.05"]
    more += ["train.batch_tokens=64", "evaluate.max_examples=60", "evaluate.baselines=['base']"]
    run = loading.load(None, [*overrides(clients, "local"), *more])
    began, memory = time.monotonic(), dict[str, int]()

    def observe(event: dict[str, Any]) -> None:
        if event["event"] in ("round", "phase"):
            memory[f"{event['event']} {event.get('round') or event.get('name')}"] = _resident()

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        simulate(run, folder, observers=[observe])
        sizes = {name: (folder / name).stat().st_size for name in ("report.html", "metrics.json", "log.jsonl")}
    return {
        "clients": clients,
        "rounds": rounds,
        "wall_s": time.monotonic() - began,
        "cpu_s": time.process_time(),
        "resident_bytes": memory,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "file_bytes": sizes,
        "load": os.getloadavg()[0],
    }


def imports() -> dict[str, Any]:
    """Memory of a process after each import, in the order of a simulation, which does not import the last."""
    names = ("torch", "transformers, peft", "flwr.app, flwr.serverapp, flwr.clientapp", "flwr_datasets")
    found = {}
    for name in names:
        exec(f"import {name}")
        found[name] = _resident()
    return {"resident_bytes": found}


def _resident() -> int:
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGESIZE")


MEASURES: dict[str, Callable[..., dict[str, Any]]] = {
    "imports": imports,
    "parts": parts,
    "round": lambda clients, engine, fraction="1": one_round(int(clients), engine, float(fraction)),
    "run": lambda clients, rounds: whole_run(int(clients), int(rounds)),
}


def main() -> None:
    """Run each measurement in its own process and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few clients only")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="one measurement, as JSON on the last line")
    args = parser.parse_args()
    if args.only:
        print(json.dumps(MEASURES[args.only[0]](*args.only[1:])))
    else:
        _all(args.quick)


def _all(quick: bool) -> None:
    from apiary.tracking.environment import start_fields

    out: dict[str, Any] = {"machine": start_fields(loading.load())["machine"]}
    out["imports"], out["parts"], out["rounds"] = _apart("imports"), _apart("parts"), []
    for clients in (10, 100) if quick else (10, 100, 1000, 10_000):
        for engine in ("local", "ray") if clients <= 100 else ("local",):
            out["rounds"].append(_apart("round", str(clients), engine, "1" if clients <= 1000 else "0.05"))
            _write(out)
    out["run"] = _apart("run", "50" if quick else "1000", "10")
    _write(out)


def _write(out: dict[str, Any]) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(out, indent=1) + "\n")


def _apart(*args: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, __file__, "--only", *args], capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    print(args, result, file=sys.stderr)
    return result


if __name__ == "__main__":
    main()
