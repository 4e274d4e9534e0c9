"""What files far larger than memory take: seconds, resident memory and disk, by the size of a JSONL file.

python benchmarks/data.py [--gb 0.1 1 5] [--ways read site doctor] [--dir FOLDER] [--data-limit GIB]

The file holds seeded instruction rows of 1 to 2 KB, the text of the built-in corpus: one in a hundred stands there
twice, one in two hundred has no answer. Each way is a process of its own: `read`, rows read and split; `site`, what the
worker of a site does with them up to encoded tokens and two steps of training; and `apiary doctor`. Curation is off.

Memory is what the kernel says of the process (/proc/PID/status, Linux): the most that was resident, and the most of it
that was anonymous, which alone has no copy on disk. The rest are pages of mapped files, of libraries above all, which
the system takes back whenever somebody needs the memory. Disk is the most that its files without a name held.
--data-limit sets RLIMIT_DATA, a hard limit of anonymous memory, whether or not it is resident.

Sizes and ways that were measured before stay in the results until they are measured again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from apiary.tracking import environment  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "data.json"
WAYS = ("read", "site", "doctor")
_SETTINGS = ("data.partition=iid", "data.clients=1", "strategy.min_clients=1", "train.steps=2", "evaluate.baselines=[]")
_POOL = 4096  # texts that rows are made of
_TWICE, _NO_ANSWER = 0.01, 0.005
_SAMPLED_S = 0.05


def _pool(rng: random.Random) -> list[str]:
    from apiary.data.skills.corpus import rows

    texts = [f"{row['instruction']} {row['input']} {row['output']}." for row in rows("train")]
    return rng.sample(texts, _POOL)


def make(path: Path, size: int) -> int:
    """Write a file of about so many bytes, and return its rows."""
    rng = random.Random(0)
    pool, kept = _pool(rng), list[str]()
    written = rows = 0
    with path.open("w", encoding="utf-8") as out:
        while written < size:
            if kept and rng.random() < _TWICE:
                line = rng.choice(kept)
            else:
                row = {
                    "id": f"{rows:08x}",
                    "category": rng.choice(("ask", "code", "mail", "chat")),
                    "instruction": f"{rows}: " + " ".join(rng.choices(pool, k=rng.randint(1, 4))),
                    "context": " ".join(rng.choices(pool, k=3)) if rng.random() < 0.3 else "",
                    "output": "" if rng.random() < _NO_ANSWER else " ".join(rng.choices(pool, k=rng.randint(7, 15))),
                }
                line = json.dumps(row) + "\n"
                if len(kept) < 1000:
                    kept.append(line)
            out.write(line)
            written += len(line)
            rows += 1
    return rows


def site(way: str, path: Path, folder: Path) -> None:
    """What a site's worker does with its rows: reads and splits them, and but for `read` encodes and trains on them."""
    from apiary.config import loading
    from apiary.core.messages import Payload, Visit
    from apiary.models import adapters
    from client import site_worker
    from client.worker import Worker

    facts = site_worker.Facts("north", path, folder / "state")
    config = site_worker.at_home(loading.load(None, [f"data.source={path}", *_SETTINGS]), facts)
    rows = site_worker._read_site(config, facts, "run")
    if way == "read":
        return
    worker = Worker(config)
    hello = worker.hello(rows)
    lm = adapters.load(config.model, config.adapter)
    visit = worker.train(rows, 1, Payload(adapters.fresh_adapter(lm, config.seed), {}))
    assert isinstance(visit, Visit) and hello.examples, visit


def _status(pid: int) -> dict[str, int]:
    """Bytes of each kind of memory of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    pairs = (line.split(":") for line in lines)
    return {name: int(value.split()[0]) * 1024 for name, value in pairs if name.startswith(("Vm", "Rss"))}


def _unnamed(pid: int) -> int:
    """Bytes on disk of the files that a process has open and that have no name any more."""
    found = {}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            status = entry.stat()
            if stat.S_ISREG(status.st_mode) and not status.st_nlink:
                found[status.st_ino] = status.st_blocks * 512
    return sum(found.values())


class Watch(threading.Thread):
    """Watches a process until it ends. Owns the most of what it saw, in bytes."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._pid = pid
        self.most = dict.fromkeys(("resident", "anonymous", "disk"), 0)

    def run(self) -> None:
        """Watch until the process is gone."""
        with contextlib.suppress(OSError, KeyError):  # it has ended
            while True:
                now, disk = _status(self._pid), _unnamed(self._pid)
                seen = {"resident": now["VmHWM"], "anonymous": now["RssAnon"], "disk": disk}
                self.most = {name: max(most, seen[name]) for name, most in self.most.items()}
                time.sleep(_SAMPLED_S)


def measure(way: str, path: Path, folder: Path, limit: int | None) -> dict[str, Any]:
    """Seconds and bytes of one way with a file."""
    settings = [word for setting in (f"data.source={path}", *_SETTINGS) for word in ("-s", setting)]
    words = ["-m", "apiary.cli.main", "doctor", *settings]
    if way != "doctor":
        words = [str(Path(__file__).resolve()), "--child", way, str(path), str(folder)]
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=(lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))) if limit else None,
    )
    watch = Watch(process.pid)
    watch.start()
    said = process.communicate()[0]
    seconds = time.perf_counter() - began
    watch.join()
    assert process.returncode == 0, said
    return {"seconds": round(seconds, 1), **watch.most}


def main(words: Sequence[str] | None = None) -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, nargs="+", default=[0.1, 1.0], help="sizes of the file, in 10^9 bytes")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--data-limit", type=float, help="RLIMIT_DATA of each process, in GiB")
    parser.add_argument("--dir", type=Path, help="folder for the file and what is kept on disk; default: TMPDIR")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    if args.child:
        site(args.child[0], *map(Path, args.child[1:]))
        return
    limit = round(args.data_limit * 2**30) if args.data_limit else None
    before = json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else []
    runs = {(run["gb"], run["way"]): run for run in before}
    for size in args.gb:
        with tempfile.TemporaryDirectory(dir=args.dir) as made:
            path = Path(made) / "rows.jsonl"
            rows = make(path, round(size * 1e9))
            for way in args.ways:
                run = {"gb": size, "way": way, "rows": rows, **measure(way, path, Path(made), limit)}
                print(run, flush=True)
                runs[size, way] = run | ({"data_limit": limit} if limit else {})
        ordered = [runs[key] for key in sorted(runs)]
        RESULTS.write_text(json.dumps({"machine": environment.machine(gpu=False), "runs": ordered}, indent=1) + "\n")


if __name__ == "__main__":
    main()
