"""How one server bears many sites: real calls, keys and signatures, and nothing trained.

The server is as `apiary deploy server` starts it, of real processes. The sites are stubs, all in one process beside it
(`benchmarks/stub_sites.py`). So the seconds are those of the transport and of what the server does, with the sites'
half of it on the same cores; the megabytes are the server's alone. Processor seconds say whose the cores were.

python benchmarks/many_sites.py [--sites 10 50] [--rounds 6] [--megabytes 20]
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from apiary.tracking import environment  # noqa: E402
from benchmarks.deployment import RESULTS, Federation, end_in_order, processor_s, write_rows  # noqa: E402

_ENTRIES_A_RANK = 17_408  # of an adapter for the built-in model
_LONGEST_S = 3_000.0
_SETTINGS = (
    *("evaluate.every=0", "strategy.quorum=1.0", "strategy.join_timeout_s=900", "train.steps=1"),
    "train.schedule=constant",  # or the last rounds' steps could not make the stubs' changes
)


def measure(number: int, rounds: int, megabytes: float) -> dict[str, Any]:
    """Seconds to begin, and of each round the seconds and the megabytes of the server's processes."""
    rank = max(1, round(megabytes * 1e6 / 4 / _ENTRIES_A_RANK))
    names = [f"site{i:03}" for i in range(number)]
    with tempfile.TemporaryDirectory() as text:
        made = Federation(ROOT, Path(text), names)
        try:
            return _measured(made, write_rows(made.folder), rounds, rank)
        finally:
            made.end()


def _measured(made: Federation, rows: Path, rounds: int, rank: int) -> dict[str, Any]:
    began = time.monotonic()
    made.serve()
    ready = time.monotonic() - began
    made.play(rows)
    settings = [f"rounds={rounds}", f"adapter.rank={rank}", f"strategy.min_clients={len(made.names)}", *_SETTINGS]
    words = [word for each in settings for word in ("-s", each)]
    config = str(ROOT / "configs" / "deployment.toml")
    made.start("submit", "started", "deploy", "submit", str(made.kits / "server"), config, "--out", "run", *words)
    log = made.folder / "run" / "log.jsonl"
    found: list[dict[str, Any]] = []  # one a round: when it ended, and the most of each process until then
    most: dict[str, float] = {}
    deadline = time.monotonic() + _LONGEST_S
    while made.kept["submit"].poll() is None:
        assert time.monotonic() < deadline, (made.folder / "submit.log").read_text(errors="replace")[-2000:]
        for role, sizes in made.memory("server").items():
            most[role] = max(most.get(role, 0.0), sizes["pss"])
        events = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        done = [event for event in events if event["event"] == "round"]
        for event in done[len(found) :]:
            spent = processor_s([*made.below("server"), made.kept["stubs"].pid])
            found.append({"ended": event["time"], "answered": event["clients"], "mb": most, "spent": spent})
            most = {}
        time.sleep(0.3)
    assert made.kept["submit"].returncode == 0, (made.folder / "submit.log").read_text(errors="replace")[-2000:]
    assert [row["answered"] for row in found] == [len(made.names)] * rounds
    ends = [row["ended"] for row in found]
    return {
        "sites": len(made.names),
        "ready_s": round(ready, 1),
        "round_s": [round(b - a, 1) for a, b in itertools.pairwise(ends)],
        "processor_s": [
            {role: round(spent - a["spent"].get(role, 0.0), 1) for role, spent in b["spent"].items()}
            for a, b in itertools.pairwise(found)
        ],
        "mb": [row["mb"] for row in found],
        "database_mb": round(sum(p.stat().st_size for p in _databases(made.kits)) / 1e6, 1),
    }


def _databases(kits_folder: Path) -> list[Path]:
    return [path for path in kits_folder.rglob("*") if path.is_file() and ".db" in path.name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, nargs="+", default=[10, 50])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--megabytes", type=float, default=20.0, help="of an update, in float32")
    parser.add_argument("--out", type=Path, default=RESULTS / "many_sites.json")
    args = parser.parse_args()
    end_in_order()
    runs = []
    for number in args.sites:
        runs.append(measure(number, args.rounds, args.megabytes))
        print(json.dumps(runs[-1]), flush=True)
        machine = environment.machine(gpu=False)
        result = {"machine": machine, "megabytes": args.megabytes, "rounds": args.rounds, "runs": runs}
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
