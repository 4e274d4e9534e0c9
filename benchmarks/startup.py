"""How long the command line takes to answer: seconds on the clock and of the processor, and what it imports for it.

Each command is started anew, some times over, beside the same of an earlier commit if one is named. The file system's
cache is warm. Medians; a busy machine makes the clock's seconds longer, those of the processor hardly.

python benchmarks/startup.py [--before COMMIT] [--times 5]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from apiary.tracking import environment  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "startup.json"
HEAVY = ("torch", "transformers", "peft", "flwr", "matplotlib", "numpy", "pydantic")
COMMANDS = {  # what it is called -> its words; {} is a folder with rows.jsonl, empty.jsonl and the kits of a federation
    "--help": "--help",
    "config": "config",
    "config strategy": "config strategy",
    "a wrong key": "simulate -s trane.lr=1",
    "a wrong method": "simulate -s strategy.name=fedavvg",
    "curate by mask": "curate {}/rows.jsonl --out {}/out/kept.jsonl -s curate.steps=['mask']",
    "curate": "curate {}/rows.jsonl --out {}/out/kept.jsonl",
    "a site with an empty file": "deploy client {}/fed/north --data {}/empty.jsonl",
}
STATUS = "deploy status {}/fed/server"


def tree_of(commit: str, folder: Path) -> Path:
    """The files of a commit, written to a new folder."""
    packed = subprocess.run(["git", "-C", str(ROOT), "archive", commit], check=True, stdout=subprocess.PIPE).stdout
    folder.mkdir()
    subprocess.run(["tar", "-x", "-C", str(folder)], check=True, input=packed)
    return folder


def command(words: str, folder: Path, *python: str) -> list[str]:
    return [sys.executable, *python, "-m", "apiary.cli.main", *words.replace("{}", str(folder)).split()]


def started(tree: Path, words: Sequence[str], **given: Any) -> subprocess.Popen[str]:
    """A command of a tree; its errors are what comes out last."""
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(words, cwd=tree, **{**quiet, **given})


def answer(tree: Path, words: str, folder: Path) -> tuple[float, float]:
    """Seconds on the clock and of the processor until a command has ended."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    (folder / "out").mkdir()
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    process = started(tree, command(words, folder))
    said = process.communicate()[1]
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "Traceback" not in said and process.returncode in (0, 2), said
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def first_line(tree: Path, folder: Path) -> tuple[float, None]:
    """Seconds on the clock until a simulation says its first word."""
    began = time.perf_counter()
    process = started(tree, command("simulate --out {}/run", folder))
    assert process.stderr is not None
    said = process.stderr.readline()
    wall = time.perf_counter() - began
    process.kill()
    process.communicate()
    shutil.rmtree(folder / "run", ignore_errors=True)
    assert said.startswith("phase: "), said
    return wall, None


def imported(tree: Path, words: str, folder: Path) -> dict[str, float]:
    """Seconds that each of the heavy packages takes to be imported, of those that are, by Python's own count."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    (folder / "out").mkdir()
    said = started(tree, command(words, folder, "-X", "importtime")).communicate()[1]
    lines = re.findall(r"^import time: +(\d+) \| +\d+ \| +([\w.]+)$", said, flags=re.MULTILINE)
    found: dict[str, float] = {}
    for microseconds, module in lines:
        package = module.partition(".")[0]
        if package in HEAVY:
            found[package] = found.get(package, 0.0) + int(microseconds) / 1e6
    return {package: round(seconds, 3) for package, seconds in found.items()}


@contextlib.contextmanager
def serving(tree: Path, folder: Path) -> Iterator[None]:
    """A server of the federation, for as long as its status is asked."""
    server = started(
        tree, command("deploy server {}/fed/server --bind 127.0.0.1", folder), stdout=subprocess.PIPE, stderr=None
    )
    try:
        assert server.stdout is not None
        assert any("server ready" in line for line in iter(server.stdout.readline, "")), "no server"
        yield
    finally:
        server.send_signal(signal.SIGTERM)
        server.communicate()


def measured(trees: Sequence[Path], times: int, measure: Callable[[Path], tuple[float, float | None]]) -> list[Any]:
    """Medians for each tree, which take turns."""
    found = [[measure(tree) for tree in trees] for _ in range(times)]
    return [
        {
            "wall_s": round(statistics.median(wall for wall, _ in runs), 2),
            "cpu_s": round(statistics.median(cpu for _, cpu in runs), 2) if runs[0][1] is not None else None,
        }
        for runs in zip(*found, strict=True)
    ]


def measure_all(trees: Sequence[Path], folder: Path, times: int) -> dict[str, list[dict[str, Any]]]:
    """By command, what was measured of each tree."""
    rows = [{"instruction": f"Say {n}", "output": f"Write to bee{n}@hive.org"} for n in range(9)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "empty.jsonl").touch()
    kits = "deploy init {}/fed --server localhost:18443 --site north"
    subprocess.run(command(kits, folder), cwd=trees[-1], check=True, stdout=subprocess.DEVNULL)
    found = {}
    for name, words in COMMANDS.items():
        found[name] = measured(trees, times, lambda tree, words=words: answer(tree, words, folder))  # type: ignore[misc]
        for tree, row in zip(trees, found[name], strict=True):
            row["imports_s"] = imported(tree, words, folder)
        print(name, found[name], flush=True)
    found["first line of simulate"] = measured(trees, times, lambda tree: first_line(tree, folder))
    with serving(trees[-1], folder):
        found["deploy status"] = measured(trees, times, lambda tree: answer(tree, STATUS, folder))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", help="a commit to compare with")
    parser.add_argument("--times", type=int, default=5)
    args = parser.parse_args()
    os.environ["PYTHONPATH"] = ""  # each command imports the tree that it runs in
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        trees = [*([tree_of(args.before, folder / "before")] if args.before else []), ROOT]
        found = measure_all(trees, folder, args.times)
    result = {"machine": environment.machine(gpu=False), "times": args.times, "before": args.before}
    labels = ["before", "now"][-len(trees) :]
    commands = {name: dict(zip(labels, rows, strict=True)) for name, rows in found.items()}
    RESULTS.write_text(json.dumps({**result, "commands": commands}, indent=1) + "\n")
    for name, by in commands.items():
        told = ", ".join(
            f"{label} {row['wall_s']:.2f} s ({row['cpu_s']} of the processor)" for label, row in by.items()
        )
        print(f"{name}: {told}")


if __name__ == "__main__":
    main()
