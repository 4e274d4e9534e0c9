"""How one server bears many sites: real calls, keys and signatures, and nothing trained.

The server is as `apiary deploy server` starts it, of real processes. The sites are threads of one process beside it,
each with a kit, a line and a node's loop of its own, as `deploy.node` has them; in place of a worker a stub answers a
change of random numbers at once. So the seconds are those of the transport and of what the server does, with the sites'
half of it on the same cores; the megabytes are the server's alone.

python benchmarks/many_sites.py [--sites 10 50] [--rounds 6] [--megabytes 20]
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from flwr.app import Message, RecordDict  # noqa: E402
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto  # noqa: E402
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto  # noqa: E402

from apiary.core import counts  # noqa: E402
from apiary.core.messages import FitReport, Update, Visit  # noqa: E402
from apiary.tracking import environment  # noqa: E402
from apiary.transport import flower_records, sealed, signatures  # noqa: E402
from apiary.transport.signatures import Claim, Question  # noqa: E402
from benchmarks.deployment import RESULTS, Federation, write_rows  # noqa: E402
from client.site import Facts  # noqa: E402
from client.site_worker import Service  # noqa: E402
from client.worker_rpc import Envelope  # noqa: E402
from deploy import fleet, kits, node  # noqa: E402
from deploy.session import CONNECTED, Journal  # noqa: E402

_ENTRIES_A_RANK = 17_408  # of an adapter for the built-in model
_LONGEST_S = 3_000.0
_SETTINGS = ("evaluate.every=0", "strategy.quorum=1.0", "strategy.join_timeout_s=900", "train.steps=1")


class Stub:
    """What answers in place of a site's worker; the handshake is a real worker's, for its digests must be right."""

    _one = threading.Lock()  # a handshake of the shared service

    def __init__(self, kit: kits.Kit, seed: int, service: Service) -> None:
        self._name, self._service = str(kit.site), service
        self._key = signatures.private_key(kit.folder / kits.SITE_KEY)
        self._rank = 0
        self._random = torch.Generator().manual_seed(seed)

    def ask(self, message: Message, context: Any) -> Message:
        """The signed answer to a message."""
        head, run = message.metadata, str(context.run_config["name"])
        hello = head.message_type == flower_records.HELLO
        content = self._hello(message, context) if hello else self._change(message)
        body = sealed.pack(content)
        question = Question(run, head.group_id, head.message_type, head.message_id, self._name)
        claim = Claim(question, sealed.ANSWER, signatures.digest(body))
        return Message(sealed.seal(sealed.header(claim, signatures.sign(self._key, claim)), body), reply_to=message)

    def _hello(self, message: Message, context: Any) -> RecordDict:
        config = {"config": str(context.run_config["config"]), "name": str(context.run_config["name"])}
        header = {"kind": flower_records.HELLO, "round": "0", "message": "", **config}
        with self._one:
            answer = self._service.answer(Envelope(header, recorddict_to_proto(message.content).SerializeToString()))
        told = flower_records.read_hello_reply(recorddict_from_proto(RecordDictProto.FromString(answer.body)))
        self._rank = told.rank
        return flower_records.hello_reply(told._replace(client=self._name))

    def _change(self, message: Message) -> RecordDict:
        _, payload = flower_records.read_request(message.content)
        change = {
            name: torch.randn(tensor.shape, generator=self._random).mul_(1e-4)
            for name, tensor in payload.adapter.items()
        }
        update = Update(self._name, change, 1000.0, self._rank)
        return flower_records.train_reply(Visit(update, FitReport(1000, 20, 1, 2.0, 0.1)))


def play(folder: Path, rows: Path) -> None:
    """Be all the sites whose kits lie in a folder, until the process is ended."""
    torch.set_num_threads(1)
    own = sorted(path.parent for path in folder.glob(f"*/{kits.SITE_KEY}"))
    state = folder.parent / "sites"
    state.mkdir()
    facts = Facts(client="stub", data=rows, state=state, counts=counts.parse("rounded", "--counts"))
    service, end, threads = Service(facts), threading.Event(), []
    for number, path in enumerate(own):
        kit = kits.read(path, "site")
        stub, place = Stub(kit, number, service), state / str(kit.site)
        place.mkdir()
        line = fleet.Line(str(kit.server), kit.folder / kits.CA, kit.folder / kits.SITE_KEY, end)
        answering = node.Answering(stub.ask, lambda: None)
        threads.append(threading.Thread(target=node.run, args=(line, answering, {}, Journal(place), end)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


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
    made.launch("sites", [sys.executable, __file__, "--play", str(made.kits), "--rows", str(rows)])
    deadline = time.monotonic() + _LONGEST_S
    while (said := (made.folder / "sites.log").read_text(errors="replace")).count(CONNECTED) < len(made.names):
        assert made.kept["sites"].poll() is None and time.monotonic() < deadline, said
        time.sleep(0.5)
    settings = [f"rounds={rounds}", f"adapter.rank={rank}", f"strategy.min_clients={len(made.names)}", *_SETTINGS]
    words = [word for each in settings for word in ("-s", each)]
    config = str(ROOT / "configs" / "deployment.toml")
    made.start("submit", "started", "deploy", "submit", str(made.kits / "server"), config, "--out", "run", *words)
    log = made.folder / "run" / "log.jsonl"
    found: list[dict[str, Any]] = []  # one a round: when it ended, and the most of each process until then
    most: dict[str, float] = {}
    while made.kept["submit"].poll() is None:
        assert time.monotonic() < deadline, (made.folder / "submit.log").read_text(errors="replace")[-2000:]
        for role, sizes in made.memory("server").items():
            most[role] = max(most.get(role, 0.0), sizes["pss"])
        events = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        done = [event for event in events if event["event"] == "round"]
        for event in done[len(found) :]:
            found.append({"ended": event["time"], "answered": event["clients"], "mb": most})
            most = {}
        time.sleep(0.3)
    assert made.kept["submit"].returncode == 0, (made.folder / "submit.log").read_text(errors="replace")[-2000:]
    assert [row["answered"] for row in found] == [len(made.names)] * rounds
    ends = [row["ended"] for row in found]
    return {
        "sites": len(made.names),
        "ready_s": round(ready, 1),
        "round_s": [round(b - a, 1) for a, b in itertools.pairwise(ends)],
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
    parser.add_argument("--play", type=Path, help=argparse.SUPPRESS)  # be the sites of these kits
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS / "many_sites.json")
    args = parser.parse_args()
    if args.play is not None:
        play(args.play, args.rows)
        return
    runs = []
    for number in args.sites:
        runs.append(measure(number, args.rounds, args.megabytes))
        print(json.dumps(runs[-1]), flush=True)
        machine = environment.machine(gpu=False)
        result = {"machine": machine, "megabytes": args.megabytes, "rounds": args.rounds, "runs": runs}
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
