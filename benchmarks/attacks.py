"""What attacks on a deployment come to: real processes, real calls, and an adapter that should be as without them.

Three honest sites and one hostile, all of them stubs (`benchmarks/stub_sites.py`), answer a real server. First the
honest ones alone: the adapter of that run is what each other should end with. Then the hostile site, which has a real
key, answers every round of a run by each of its acts. Then strangers attack the door while the honest ones run.

python benchmarks/attacks.py [--times 10] [--only strangers|sites]
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import datetime
import json
import re
import socket
import ssl
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import torch
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest  # noqa: E402
from flwr.proto.node_pb2 import Node  # noqa: E402

from apiary.tracking import environment  # noqa: E402
from benchmarks.deployment import RESULTS, Federation, end_in_order, write_rows  # noqa: E402
from benchmarks.stub_sites import ACT, ACTS, DONE, HANDSHAKE, HONEST_TOKENS  # noqa: E402
from deploy import kits  # noqa: E402

HONEST, HOSTILE = ("a", "b", "c"), "x"
_SETTINGS = (
    *("evaluate.every=0", "strategy.min_clients=3", "strategy.join_timeout_s=300"),
    "train.schedule=constant",  # or the last rounds' steps could not make the stubs' changes
)
_GIB = 2**30
_SLOW, _SLOW_S = 600, 40.0
State = dict[str, torch.Tensor]


class Field:
    """A federation to attack; owns what an undisturbed run came to."""

    def __init__(self, made: Federation, rounds: int) -> None:
        self.made, self.rounds = made, rounds
        plan = (ROOT / "configs" / "deployment.toml").read_text(encoding="utf-8").replace("\nsteps = 20\n", "\n")
        self._plan = made.folder / "plan.toml"
        self._plan.write_text(plan, encoding="utf-8")
        self.quiet: State = {}
        self._runs = 0

    def run(self, *more: str, work: str = "train.steps=1", each_round: Callable[[], None] = lambda: None) -> Path:
        """The folder of a whole run, with what happens once in each of its rounds."""
        self._runs += 1
        folder = f"run{self._runs}"
        words = [word for text in (f"rounds={self.rounds}", work, *_SETTINGS, *more) for word in ("-s", text)]
        kit = str(self.made.kits / "server")
        self.made.start("submit", "started", "deploy", "submit", kit, str(self._plan), "--out", folder, *words)
        for number in range(1, self.rounds + 1):
            self._wait_for_round(folder, number)
            each_round()
        process = self.made.kept.pop("submit")
        assert process.wait(900) == 0, (self.made.folder / "submit.log").read_text(errors="replace")[-3000:]
        return self.made.folder / folder

    def _wait_for_round(self, folder: str, number: int) -> None:
        run, deadline = self.made.folder / folder, time.monotonic() + 300
        while not ((run / "log.jsonl").exists() and any(e["round"] == number for e in events_of(run, "asked"))):
            process = self.made.kept["submit"]
            assert time.monotonic() < deadline and process.poll() is None, f"no round {number} of {folder}"
            time.sleep(0.05)

    def same(self, run: Path) -> bool:
        """Whether a run ended with the adapter of the undisturbed one, to the bit."""
        found = adapter_of(run)
        return found.keys() == self.quiet.keys() and all(torch.equal(t, self.quiet[n]) for n, t in found.items())

    def distance(self, run: Path) -> float:
        """How far a run's adapter is from the undisturbed one, as a share of that one's norm."""
        found = adapter_of(run)
        far = sum(float((tensor - self.quiet[name]).double().square().sum()) for name, tensor in found.items())
        return (far / sum(float(tensor.double().square().sum()) for tensor in self.quiet.values())) ** 0.5


def adapter_of(run: Path) -> State:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def events_of(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


# -- a site with a key ----------------------------------------------------------------------------


def hostile(field: Field, act: str) -> dict[str, Any]:
    """One act, in every round of a run."""
    folder = field.made.folder
    (folder / ACT).write_text(act, encoding="utf-8")
    (folder / DONE).unlink(missing_ok=True)
    work = "train.epochs=1" if act == HANDSHAKE else "train.steps=1"  # then rows decide how much a site may train
    run = field.run(f"strategy.min_clients={len(HONEST) + 1}", work=work)
    acts = {row["round"]: row["time"] for row in map(json.loads, (folder / DONE).read_text().splitlines())}
    refused = [event for event in events_of(run, "refused") if event["client"] == HOSTILE and "round" in event]
    counted = [event for event in events_of(run, "client") if event["client"] == HOSTILE]
    capped = [event for event in counted if "capped" in event]
    after = [event["time"] - acts[event["round"]] for event in (*refused, *capped)]
    answered = sum(event["client"] in HONEST for event in events_of(run, "client"))
    return {
        "attack": act,
        "tried": len(acts),
        "refused": len(refused),
        "capped": len(capped),
        "share": max((event["capped"] / HONEST_TOKENS for event in capped), default=None),
        "after_s": {"median": round(statistics.median(after), 2), "most": round(max(after), 2)} if after else None,
        "lost": field.rounds * len(HONEST) - answered,
        "same": field.same(run),
        "distance": field.distance(run),
        "line": refused[0]["reason"] if refused else None,
    }


# -- strangers ------------------------------------------------------------------------------------


class Stranger:
    """Signs as a node does, with a key of a kit or one of its own."""

    def __init__(self, key: ec.EllipticCurvePrivateKey) -> None:
        self._key = key
        self._public = key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )

    def headers(self) -> dict[str, str]:
        """What signs a call now."""
        now = datetime.datetime.now(datetime.UTC).isoformat()
        signature = self._key.sign(now.encode(), ec.ECDSA(hashes.SHA256()))
        return {
            "flwr-public-key": base64.b64encode(self._public).decode(),
            "flwr-timestamp": now,
            "flwr-signature": base64.b64encode(signature).decode(),
        }


class Door:
    """The open port, as those outside see it."""

    def __init__(self, made: Federation) -> None:
        kit = kits.read(made.kits / HOSTILE, "site")
        self.port, self.trust = kit.server.port, ssl.create_default_context(cafile=kit.folder / kits.CA)
        key = serialization.load_ssh_private_key((kit.folder / kits.SITE_KEY).read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        self.site, self.unknown = Stranger(key), Stranger(ec.generate_private_key(ec.SECP384R1()))
        nodes = json.loads((made.kits / "server" / "state" / "nodes.json").read_text())
        self.nodes = {name: int(entry["node"]) for name, entry in nodes.items()}

    def beat(self, node: str, headers: dict[str, str]) -> int:
        """The status of the answer to a sign of life of a site's node."""
        body = SendNodeHeartbeatRequest(node=Node(node_id=self.nodes[node]), heartbeat_interval=30).SerializeToString()
        url = f"https://127.0.0.1:{self.port}/v1/fleet/send-node-heartbeat"
        kind = {"content-type": "application/protobuf", "accept": "application/protobuf"}
        return httpx.post(
            url, content=body, headers={**kind, **headers}, verify=self.trust, trust_env=False, timeout=60
        ).status_code

    def taken(self, headers: dict[str, str]) -> int:
        """The bytes of a body of 1 GiB that were taken before the other side hung up."""
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        head = f"POST /v1/fleet/push-object HTTP/1.1\r\nhost: x\r\n{lines}content-length: {_GIB}\r\n\r\n"
        block, sent = b"x" * 2**20, 0
        with (
            socket.create_connection(("127.0.0.1", self.port), timeout=60) as line,
            contextlib.suppress(OSError),
            self.trust.wrap_socket(line, server_hostname="127.0.0.1") as tls,
        ):
            tls.sendall(head.encode())
            while sent < _GIB:
                tls.sendall(block)
                sent += len(block)
        return sent


def false_calls(field: Field, door: Door) -> list[dict[str, Any]]:
    """Calls that are not what they say, in each round of a run."""
    statuses: dict[str, list[int]] = {}

    def attack() -> None:
        used = door.site.headers()
        assert door.beat(HOSTILE, used) == 200  # or what follows would be refused for another reason
        for kind, node, headers in (
            ("a call without a signature", HOSTILE, {}),
            ("a call of an unknown key", HOSTILE, door.unknown.headers()),
            ("a signature that was used before", HOSTILE, used),
            ("a call in another site's name", HONEST[0], door.site.headers()),
        ):
            statuses.setdefault(kind, []).append(door.beat(node, headers))

    run = field.run(each_round=attack)
    return [
        {"attack": kind, "tried": len(found), "refused": sum(status == 401 for status in found), **_whole(field, run)}
        for kind, found in statuses.items()
    ]


def large_bodies(field: Field, door: Door) -> dict[str, Any]:
    """Bodies of 1 GiB, five at a time, in each round of a run."""
    taken: list[int] = []
    before = _superlink(field.made, "VmRSS")

    def attack() -> None:
        kinds = [{}, door.unknown.headers(), door.site.headers(), {}, {}]
        threads = [threading.Thread(target=lambda own=own: taken.append(door.taken(own))) for own in kinds]  # type: ignore[misc]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    run = field.run(each_round=attack)
    most = _superlink(field.made, "VmHWM")
    return {
        "attack": "bodies of 1 GiB, five at a time",
        "tried": len(taken),
        "refused": sum(size < _GIB for size in taken),
        "taken_mib": round(max(taken) / 2**20, 1),
        "superlink_mib": round((most - before) / 2**20, 1),  # the run itself included
        **_whole(field, run),
    }


def _superlink(made: Federation, what: str) -> int:
    (pid,) = [pid for pid in made.below("server") if b"deploy.superlink" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    (line,) = re.findall(rf"(?m)^{what}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(line) * 1024


def slow_callers(field: Field, door: Door) -> dict[str, Any]:
    """Connections that never get done, half of them before TLS, again and again while a run goes on."""
    until, answers, ended = time.monotonic() + _SLOW_S, [], []

    async def slow(number: int) -> None:
        own = door.trust if number % 2 else None
        while time.monotonic() < until:
            connected = False
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(until - time.monotonic() + 1):
                    reader, writer = await asyncio.open_connection("127.0.0.1", door.port, ssl=own)
                    connected = True
                    try:
                        writer.write(b"GET /health HTTP/1.1\r\nx: " if own else b"\x16\x03\x01")
                        while time.monotonic() < until and not reader.at_eof():
                            writer.write(b"y" if own else b"\x00")
                            with contextlib.suppress(TimeoutError):
                                await asyncio.wait_for(reader.read(1), 1.0)
                    finally:
                        writer.close()
            if connected or own:  # with TLS the door may hang up before there is a connection
                ended.append(time.monotonic() < until)
            await asyncio.sleep(3.0)

    async def all_of_them() -> None:
        callers = [asyncio.create_task(slow(number)) for number in range(_SLOW)]
        while time.monotonic() < until:
            async with httpx.AsyncClient(verify=door.trust, trust_env=False, timeout=30) as out:
                try:
                    answers.append((await out.get(f"https://127.0.0.1:{door.port}/health")).status_code)
                except httpx.TransportError:
                    answers.append(0)
            await asyncio.sleep(1.0)
        await asyncio.gather(*callers)

    thread = threading.Thread(target=lambda: asyncio.run(all_of_them()))
    thread.start()
    time.sleep(5.0)  # then the run begins in the middle of it
    run = field.run()
    thread.join()
    return {
        "attack": f"{_SLOW} callers of a byte a second, for {_SLOW_S:g} s",
        "tried": len(ended),
        "refused": sum(ended),
        "health": f"{sum(status == 200 for status in answers)} of {len(answers)}",
        **_whole(field, run),
    }


def _whole(field: Field, run: Path) -> dict[str, Any]:
    answered = sum(event["client"] in HONEST for event in events_of(run, "client"))
    return {"lost": field.rounds * len(HONEST) - answered, "same": field.same(run)}


# -- all ------------------------------------------------------------------------------------------


def measure(times: int, only: str | None, tell: Callable[[dict[str, Any]], None]) -> None:
    """Every attack in turn, or those of strangers or sites alone."""
    with tempfile.TemporaryDirectory() as folder:
        made = Federation(ROOT, Path(folder), (*HONEST, HOSTILE))
        try:
            rows = write_rows(made.folder)
            made.serve()
            made.play(rows, "--without", HOSTILE, sites=len(HONEST))
            field = Field(made, times)
            field.quiet = adapter_of(field.run())
            again = field.run()
            assert field.same(again), "two undisturbed runs differ"
            if only != "sites":
                _with_strangers(field, tell)
            made.stop("stubs")
            made.play(rows, "--hostile", HOSTILE)
            for act in ACTS if only != "strangers" else ():
                tell(hostile(field, act))
        finally:
            made.end()


def _with_strangers(field: Field, tell: Callable[[dict[str, Any]], None]) -> None:
    door = Door(field.made)
    for row in false_calls(field, door):
        tell(row)
    tell(large_bodies(field, door))
    tell(slow_callers(field, door))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=10, help="tries of each attack, and rounds of a run")
    parser.add_argument("--only", choices=("strangers", "sites"))
    parser.add_argument("--out", type=Path, default=RESULTS / "attacks.json")
    args = parser.parse_args()
    end_in_order()
    rows: list[dict[str, Any]] = []

    def tell(row: dict[str, Any]) -> None:
        print(json.dumps(row), flush=True)
        rows.append(row)
        result = {"machine": environment.machine(gpu=False), "times": args.times, "rows": rows}
        args.out.write_text(json.dumps(result, indent=1) + "\n")

    measure(args.times, args.only, tell)


if __name__ == "__main__":
    main()
