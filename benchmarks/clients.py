"""What a virtual client costs beside its optimizer steps, and how that grows with the number of clients.

Three measurements, each in a process of its own so that peak memory is its own:

- visit: the clients of the built-in demo on the local engine, warm; the cost of a visit beyond its optimizer steps is
  the time of the whole message less the time inside the steps.
- local: one round over 10, 100 and 1,000 virtual clients, in one process.
- ray: the same round on Flower's simulation on Ray.

    python benchmarks/clients.py [--quick]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from apiary.config import loading

RESULTS = Path(__file__).parent / "results" / "clients.json"


def overrides(clients: int, engine: str) -> list[str]:
    """One round, one step a client, on the built-in corpus dealt evenly; nothing but the round itself."""
    return [
        f"data.clients={clients}",
        "data.partition=iid",
        "data.test_fraction=0.0",
        "rounds=1",
        "train.steps=1",
        "train.batch_tokens=128",
        "train.threads=1",
        "model.dtype=float32",
        "evaluate.every=0",
        "evaluate.clients=false",
        f"simulate.engine={engine}",
        "strategy.join_timeout_s=600",
    ]


def one_round(clients: int, engine: str) -> dict[str, Any]:
    """Seconds per train message and peak memory of the driver, over one round."""
    from apiary.tracking.event_log import RunLog, read_events
    from server.app import make_app
    from simulation.engines import ENGINES

    run = loading.load(None, overrides(clients, engine))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        log = RunLog(folder)
        began = time.monotonic()
        ENGINES.build(engine, config=run)(make_app(log), run, clients, folder)
        total = time.monotonic() - began
        done = next(e for e in read_events(folder) if e["event"] == "round")
        steps = sum(e["seconds"] for e in read_events(folder) if e["event"] == "client")
        log.close()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return {
        "clients": clients,
        "engine": engine,
        "round_s": done["seconds"],
        "ms_per_message": 1000 * done["seconds"] / clients,
        "ms_per_message_beside_training": 1000 * (done["seconds"] - steps) / clients if engine == "local" else None,
        "whole_run_s": total,
        "peak_driver_bytes": peak,
        "peak_largest_child_bytes": children,
    }


def visit() -> dict[str, Any]:
    """What a warm client visit of the demo costs beyond its optimizer steps, and how often the base was loaded."""
    import statistics

    from flwr.app import Message

    from apiary.models import adapters
    from apiary.transport import flower_records
    from client.app import make_app
    from client.training import trainer
    from simulation.engines import site_facts
    from simulation.in_process_grid import LocalGrid

    run = loading.load(None, ["rounds=1000"])
    inside = [0.0]
    step = trainer._Loop.step

    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return step(*args, **kwargs)
        finally:
            inside[0] += time.perf_counter() - began

    trainer._Loop.step = timed  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as scratch:
        lm = adapters.load(run.model, run.adapter)
        start = adapters.fresh_adapter(lm, 0)
        grid = LocalGrid(make_app(site_facts(run.to_json(), Path(scratch))), run.data.clients)
        loads = []
        beside = []
        for number in range(1, 8):
            for node in grid.get_node_ids():
                content = flower_records.request(number, flower_records.to_arrays(start), flower_records.to_arrays({}))
                inside[0], began = 0.0, time.perf_counter()
                (reply,) = grid.send_and_receive([Message(content, node, "train")])
                flower_records.read_train_reply(reply.content)
                whole = time.perf_counter() - began
                if number > 1:  # the first visit tokenises the client's data
                    beside.append(1000 * (whole - inside[0]))
                loads.append(adapters.base_loads())
    return {
        "median_ms_beside_steps": statistics.median(beside),
        "max_ms": max(beside),
        "base_loads": loads[-1],
        "visits": len(beside),
    }


def main() -> None:
    """Run each measurement in its own process and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="10 and 100 clients only")
    parser.add_argument(
        "--one", nargs=2, metavar=("ENGINE", "CLIENTS"), help="one measurement, as JSON on the last line"
    )
    parser.add_argument("--visit", action="store_true", help="the visit measurement, as JSON on the last line")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one_round(int(args.one[1]), args.one[0])))
    elif args.visit:
        print(json.dumps(visit()))
    else:
        _all([10, 100] if args.quick else [10, 100, 1000])


def _all(sizes: list[int]) -> None:
    from apiary.tracking.environment import start_fields

    out: dict[str, Any] = {"machine": start_fields(loading.load())["machine"], "visit": _apart("--visit"), "rounds": []}
    RESULTS.parent.mkdir(exist_ok=True)
    for size in sizes:
        for engine in ("local", "ray"):
            out["rounds"].append(_apart("--one", engine, str(size)))
            RESULTS.write_text(json.dumps(out, indent=1) + "\n")
    print(json.dumps(out, indent=1))


def _apart(*args: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, __file__, *args], capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    print(args, result, file=sys.stderr)
    return result


if __name__ == "__main__":
    main()
