"""What a deployment costs beside its work: a server and sites as real processes on this machine.

`rounds`: seconds a round, for one that trains and evaluates at the sites, and the part of it that is no work of theirs.
With `--before`, beside the same of an earlier commit, taking turns.

`memory`: megabytes by process while a server and one site go through rounds with the built-in model, the most of
each that was seen after the first round. Resident counts a page that several hold for each of them, the
proportional size (PSS) divides it among them. Beside it a process that has loaded torch, transformers and peft, and
made an optimizer, and does nothing: less than that no worker takes.

python benchmarks/deployment.py rounds [--before COMMIT] [--times 2] [--rounds 8]
python benchmarks/deployment.py memory [--rounds 8]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from apiary.tracking import environment  # noqa: E402
from benchmarks.startup import tree_of  # noqa: E402
from deploy.session import CONNECTED  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
STUBS = ROOT / "benchmarks" / "stub_sites.py"
SITES = ("north", "south")
_WORK = re.compile(r"round (\d+) (train|evaluate): ([\d.]+) s")  # of a worker's log
_LONGEST_S = 900.0
_ROWS = 60  # of a site: few, for the work is not what is measured
_ROLES = {  # part of a command -> what it is
    "deploy.superlink": "SuperLink",
    "deploy.proxy": "door",
    "deploy.node": "node",
    "client.site_worker": "worker",
    "serverapp": "ServerApp",
    "superexec": "SuperExec",
    "chat_sandbox": "sandbox of chat templates",
    "stub_sites": "stub sites",
}
_LIBRARIES = """
import peft, torch, transformers
torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))])
print(flush=True)
input()
"""
_SETTINGS = ("train.steps=1", "evaluate.clients=true", "evaluate.every=1", "strategy.join_timeout_s=300")


class Federation:
    """A server and sites of one tree of files, and a folder that all they write is in."""

    def __init__(self, tree: Path, folder: Path, names: Sequence[str] = SITES) -> None:
        self.tree, self.folder, self.kits, self.names = tree, folder, folder / "kits", names
        self.environment = {**os.environ, "PYTHONPATH": str(tree)}
        self.kept: dict[str, subprocess.Popen[bytes]] = {}

    def begin(self, rows: Path) -> None:
        """Start the server and the sites, and wait until all are connected."""
        self.serve()
        for site in self.names:
            self.start(site, "connected to", "deploy", "client", str(self.kits / site), "--data", str(rows))

    def serve(self) -> None:
        """Make kits and start the server."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        sites = [word for site in self.names for word in ("--site", site)]
        self.call("deploy", "init", str(self.kits), "--server", f"127.0.0.1:{port}", *sites)
        self.start("server", "server ready", "deploy", "server", str(self.kits / "server"), "--bind", "127.0.0.1")

    def play(self, rows: Path, *more: str, sites: int | None = None) -> None:
        """Start stubs of the sites (`benchmarks/stub_sites.py`), and wait until all, or `sites`, are connected."""
        self.launch("stubs", [sys.executable, str(STUBS), str(self.kits), str(rows), *more])
        deadline, wanted = time.monotonic() + _LONGEST_S, sites or len(self.names)
        while (said := (self.folder / "stubs.log").read_text(errors="replace")).count(CONNECTED) < wanted:
            assert self.kept["stubs"].poll() is None and time.monotonic() < deadline, said
            time.sleep(0.3)

    def _command(self, words: Sequence[str]) -> list[str]:
        return [sys.executable, "-P", "-m", "apiary.cli.main", *words]

    def call(self, *words: str) -> None:
        """Run a command to its end."""
        done = subprocess.run(
            self._command(words), cwd=self.folder, env=self.environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr

    def start(self, name: str, said: str, *words: str) -> None:
        """Start a command of ours that stays, and wait until its output holds `said`."""
        self.launch(name, self._command(words))
        log = self.folder / f"{name}.log"
        deadline = time.monotonic() + _LONGEST_S
        while said not in log.read_text(errors="replace"):
            assert self.kept[name].poll() is None and time.monotonic() < deadline, log.read_text(errors="replace")
            time.sleep(0.2)

    def launch(self, name: str, command: Sequence[str]) -> None:
        """Start any command that stays."""
        with (self.folder / f"{name}.log").open("wb") as out:
            self.kept[name] = subprocess.Popen(
                command, cwd=self.folder, env=self.environment, stdout=out, stderr=subprocess.STDOUT
            )

    def end(self) -> None:
        """End all that was started."""
        for process in reversed(self.kept.values()):
            process.send_signal(signal.SIGTERM)
        for name in self.kept:
            self.stop(name)

    def stop(self, name: str) -> None:
        """End what was started under a name."""
        process = self.kept[name]
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        if process.poll() is None:
            process.kill()
            process.wait()

    def below(self, name: str) -> list[int]:
        """The processes below a started one."""
        return below(self.kept[name].pid)

    def memory(self, name: str) -> dict[str, dict[str, float]]:
        """Of a started process and each below it: what it is, and its resident and proportional megabytes."""
        found: dict[str, dict[str, float]] = {}
        for pid in [self.kept[name].pid, *below(self.kept[name].pid)]:
            with contextlib.suppress(OSError):  # it has just ended
                words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
                if sizes := _sizes(pid):
                    role = f"keeper of {name}" if pid == self.kept[name].pid else _role(words)
                    found[role] = sizes
        return found


def processor_s(pids: Iterable[int]) -> dict[str, float]:
    """What each process is -> the seconds of processor time that it and those it has outlived took."""
    found: dict[str, float] = {}
    for pid in pids:
        with contextlib.suppress(OSError):  # it has just ended
            role = _role(Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0"))
            ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15]
            found[role] = found.get(role, 0.0) + sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
    return found


def end_in_order() -> None:
    """Let SIGTERM end this process as Ctrl-C does: with all that it has started."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))


def _sizes(pid: int) -> dict[str, float]:
    sizes = re.findall(r"(?m)^(Rss|Pss):\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text())
    return {kind.lower(): round(int(size) * 1024 / 1e6, 1) for kind, size in sizes}


def _libraries() -> dict[str, float]:
    """Of a process that has loaded what each worker loads of others' libraries."""
    command = [sys.executable, "-W", "ignore", "-c", _LIBRARIES]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin and process.stdout
        process.stdout.readline()
        found = _sizes(process.pid)
        process.stdin.write(b"\n")
    return found


def _role(words: Sequence[str]) -> str:
    return next((role for part, role in _ROLES.items() if any(part in word for word in words)), Path(words[0]).name)


@contextlib.contextmanager
def federation(tree: Path, rows: Path, names: Sequence[str] = SITES) -> Iterator[Federation]:
    with tempfile.TemporaryDirectory() as folder:
        made = Federation(tree, Path(folder), names)
        try:
            made.begin(rows)
            yield made
        finally:
            made.end()


def below(pid: int) -> list[int]:
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, path.read_text().split()):
                found += [child, *below(child)]
    return found


def seconds_of(made: Federation, rounds: int) -> dict[str, Any]:
    """Of each round after the first: its seconds, and those that the slower site worked."""
    settings = [word for text in (f"rounds={rounds}", *_SETTINGS) for word in ("-s", text)]
    config = str(made.tree / "configs" / "deployment.toml")
    made.call("deploy", "submit", str(made.kits / "server"), config, "--out", "run", *settings)
    events = [json.loads(line) for line in (made.folder / "run" / "log.jsonl").read_text().splitlines()]
    ends = {event["round"]: event["time"] for event in events if event["event"] == "evaluate"}
    trains = {event["round"]: event["time"] for event in events if event["event"] == "round"}
    worked: dict[tuple[int, str], float] = {}
    for site in SITES:
        for number, kind, seconds in _WORK.findall((made.folder / f"{site}.log").read_text(errors="replace")):
            worked[int(number), kind] = max(worked.get((int(number), kind), 0.0), float(seconds))
    found = []
    for number in range(2, rounds + 1):
        row = {"train": trains[number] - ends[number - 1], "evaluate": ends[number] - trains[number]}
        work = {kind: worked.get((number, kind), 0.0) for kind in row}
        found.append({"seconds": row, "work": work})
    return {"rounds": found, "site_mb": made.memory(SITES[0])}


def spread(values: Sequence[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 2),
        "least": round(min(values), 2),
        "most": round(max(values), 2),
    }


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Over all rounds: seconds for each message's part, in all, and in all without the sites' work."""
    rows = [row for run in runs for row in run["rounds"]]
    whole = [sum(row["seconds"].values()) for row in rows]
    work = [sum(row["work"].values()) for row in rows]
    parts = {kind: spread([row["seconds"][kind] for row in rows]) for kind in ("train", "evaluate")}
    rest = spread([a - b for a, b in zip(whole, work, strict=True)])
    return {**parts, "whole": spread(whole), "work": spread(work), "rest": rest, "site_mb": runs[-1]["site_mb"]}


def write_rows(folder: Path) -> Path:
    """A few made-up rows, the same for each site."""
    whole, rows = folder / "whole.jsonl", folder / "rows.jsonl"
    words = ["curate", "builtin:skills", "--out", str(whole), "-s", "curate.steps=['mask']"]
    command = [sys.executable, "-m", "apiary.cli.main", *words]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    rows.write_text("".join(whole.read_text(encoding="utf-8").splitlines(keepends=True)[:_ROWS]), encoding="utf-8")
    return rows


def memory(number: int) -> None:
    """Write `deployment_memory.json`."""
    words = [word for text in (f"rounds={number}", "strategy.min_clients=1", *_SETTINGS) for word in ("-s", text)]
    most: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder, federation(ROOT, write_rows(Path(folder)), SITES[:1]) as made:
        kit, config = str(made.kits / "server"), str(ROOT / "configs" / "deployment.toml")
        made.start("submit", "started", "deploy", "submit", kit, config, "--out", "run", *words)
        log = made.folder / "run" / "log.jsonl"
        deadline = time.monotonic() + _LONGEST_S
        while made.kept["submit"].poll() is None:
            assert time.monotonic() < deadline
            kinds = {json.loads(line)["event"] for line in log.read_text().splitlines()} if log.exists() else set()
            if "round" in kinds and not kinds & {"finish", "failed"}:
                for name in ("server", SITES[0], "submit"):
                    for role, sizes in made.memory(name).items():
                        before = most.setdefault(role, dict(sizes))
                        before.update({kind: max(size, before[kind]) for kind, size in sizes.items()})
            time.sleep(0.2)
        assert made.kept["submit"].returncode == 0, (made.folder / "submit.log").read_text(errors="replace")
        most["libraries alone"] = _libraries()  # while the worker still shares their pages
    named = {"keeper of submit": "following submit", f"keeper of {SITES[0]}": "keeper of the site"}
    named["keeper of server"] = "keeper of the server"
    found = {named.get(role, role): sizes for role, sizes in most.items()}
    for role, sizes in found.items():
        print(f"{role:22} {sizes['rss']:8.1f} resident {sizes['pss']:8.1f} proportional")
    result = {"machine": environment.machine(gpu=False), "sites": 1, "rounds": number, "mb": found}
    (RESULTS / "deployment_memory.json").write_text(json.dumps(result, indent=1) + "\n")


def rounds(before: str | None, times: int, number: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        trees = {"now": ROOT, **({"before": tree_of(before, Path(folder) / "before")} if before else {})}
        rows = write_rows(Path(folder))
        runs: dict[str, list[dict[str, Any]]] = {label: [] for label in trees}
        loads = []
        for _ in range(times):
            for label, tree in trees.items():
                loads.append(round(os.getloadavg()[0], 1))
                with federation(tree, rows) as made:
                    runs[label].append(seconds_of(made, number))
                print(label, summary(runs[label]), flush=True)
    result = {
        "machine": environment.machine(gpu=False),
        "before": before,
        "sites": len(SITES),
        "times": times,
        "rounds": number,
        "load": loads,  # of the machine when each run began
        "runs": {label: summary(found) for label, found in runs.items()},
    }
    path = RESULTS / "deployment_rounds.json"
    path.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    of_rounds = commands.add_parser("rounds")
    of_rounds.add_argument("--before", help="a commit to compare with")
    of_rounds.add_argument("--times", type=int, default=2)
    of_rounds.add_argument("--rounds", type=int, default=8)
    of_memory = commands.add_parser("memory")
    of_memory.add_argument("--rounds", type=int, default=8)
    args = parser.parse_args()
    end_in_order()
    if args.command == "memory":
        memory(args.rounds)
    else:
        rounds(args.before, args.times, args.rounds)


if __name__ == "__main__":
    main()
