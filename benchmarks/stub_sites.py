"""Sites that train nothing: a kit, a line and a node's loop each, as `deploy.node` has them, and no worker.

In place of a worker a stub answers at once, a change of random numbers that depends on the site and the round alone.
All are threads of one process:

python benchmarks/stub_sites.py KITS ROWS [--hostile SITE] [--without SITE]

The hostile site does in each round what the file `act` beside the folder of kits names (`ACTS`), and writes down when.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from cryptography.hazmat.primitives.asymmetric import ec  # noqa: E402
from flwr.app import Array, ArrayRecord, Error, Message, RecordDict  # noqa: E402
from flwr.common.constant import ErrorCode  # noqa: E402
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto  # noqa: E402
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto  # noqa: E402

from apiary.core import counts  # noqa: E402
from apiary.core.messages import FitReport, Score, Update, Visit  # noqa: E402
from apiary.transport import flower_records, sealed, signatures  # noqa: E402
from apiary.transport.signatures import Claim, Question  # noqa: E402
from client.site import Facts  # noqa: E402
from client.site_worker import Service  # noqa: E402
from client.worker_rpc import Envelope  # noqa: E402
from deploy import fleet, kits, node  # noqa: E402
from deploy.session import Journal  # noqa: E402

ACT, DONE = "act", "acts.jsonl"
HONEST_TOKENS = 1000  # that an honest visit trained on


class Stub:
    """What answers in place of a site's worker; the handshake is a real worker's, for its digests must be right."""

    _one = threading.Lock()  # a handshake of the shared service

    def __init__(self, kit: kits.Kit, seed: int, service: Service) -> None:
        self.name, self._seed, self._service = str(kit.site), seed, service
        self.key = signatures.private_key(kit.folder / kits.SITE_KEY)
        self._rank = 0

    def ask(self, message: Message, context: Any) -> Message:
        """The signed answer to a message."""
        return self.signed(message, context, self.content(message, context))

    def signed(
        self, message: Message, context: Any, content: RecordDict, key: ec.EllipticCurvePrivateKey | None = None
    ) -> Message:
        """An answer with its signature, by the site's key or another."""
        head = message.metadata
        question = Question(
            str(context.run_config["name"]), head.group_id, head.message_type, head.message_id, self.name
        )
        body = sealed.pack(content)
        claim = Claim(question, sealed.ANSWER, signatures.digest(body))
        header = sealed.header(claim, signatures.sign(key or self.key, claim))
        return Message(sealed.seal(header, body), reply_to=message)

    def content(self, message: Message, context: Any) -> RecordDict:
        """The answer."""
        kind = message.metadata.message_type
        if kind == flower_records.HELLO:
            return self._hello(message, context)
        if kind == "evaluate":
            return flower_records.score_reply(self.name, Score(2000.0, 1000, 20))
        return flower_records.train_reply(self.visit(message))

    def visit(self, message: Message) -> Visit:
        """A change of random numbers, and plausible ones beside it."""
        number, payload = flower_records.read_request(message.content)
        source = torch.Generator().manual_seed(1_000_000 * self._seed + number)
        change = {name: torch.randn(old.shape, generator=source).mul_(1e-4) for name, old in payload.adapter.items()}
        return Visit(
            Update(self.name, change, float(HONEST_TOKENS), self._rank), FitReport(HONEST_TOKENS, 20, 1, 2.0, 0.1)
        )

    def _hello(self, message: Message, context: Any) -> RecordDict:
        config = {"config": str(context.run_config["config"]), "name": str(context.run_config["name"])}
        header = {"kind": flower_records.HELLO, "round": "0", "message": "", **config}
        with self._one:
            answer = self._service.answer(Envelope(header, recorddict_to_proto(message.content).SerializeToString()))
        told = flower_records.read_hello_reply(recorddict_from_proto(RecordDictProto.FromString(answer.body)))
        self._rank = told.rank
        return flower_records.hello_reply(told._replace(client=self.name))


def _changed(edit: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Visit], Visit]:
    def act(visit: Visit) -> Visit:
        change = {name: edit(tensor) for name, tensor in visit.update.delta.items()}
        return visit._replace(update=visit.update._replace(delta=change))

    return act


def _claims(rows: float) -> Callable[[Visit], Visit]:
    return lambda visit: visit._replace(
        update=visit.update._replace(weight=rows), report=visit.report._replace(tokens=int(rows), examples=int(rows))
    )


_VISITS: dict[str, Callable[[Visit], Visit]] = {
    "1000 in every entry": _changed(lambda t: torch.full_like(t, 1e3)),
    "9e11 in every entry": _changed(lambda t: torch.full_like(t, 9e11)),
    "NaN in every entry": _changed(lambda t: torch.full_like(t, torch.nan)),
    "ten times as long": _changed(lambda t: t * 10),
    "eight times as long, no entry beyond the steps' reach": _changed(lambda t: t.sign() * 8e-4),
    "claims 1e12 tokens": _claims(1e12),
    "a loss of -1e300": lambda visit: visit._replace(report=visit.report._replace(loss=-1e300)),
    "another's name": lambda visit: visit._replace(update=visit.update._replace(client="a")),
    "another adapter's shape": _changed(lambda t: t[..., :-1].clone()),
}
HANDSHAKE = "a handshake of 1e9 rows, and as much weight"
_MESSAGES = (
    "not signed",
    "signed by another key",
    "an answer of the round before",
    "an error text of 60 kB",
    "an error text of 300 kB",
    "a hundred times as large",
)
ACTS = (*_VISITS, *_MESSAGES, HANDSHAKE)
_ROWS, _TOKENS_EACH = 10**9, 50


class Hostile(Stub):
    """A site with a real key that is honest in all but the rounds' answers, and in one act the handshake."""

    def __init__(self, kit: kits.Kit, seed: int, service: Service, folder: Path) -> None:
        super().__init__(kit, seed, service)
        self._folder = folder
        self._before = RecordDict()  # its last answer

    def ask(self, message: Message, context: Any) -> Message:
        """What the act of the hour is."""
        if message.metadata.message_type != "train":
            honest = super().ask(message, context)
            self._before = honest.content
            return honest
        act = self._act()
        answer = self._acted(act, message, context)
        with (self._folder / DONE).open("a", encoding="utf-8") as log:
            line = {"act": act, "run": context.run_config["name"], "round": int(message.metadata.group_id)}
            log.write(json.dumps({**line, "time": time.time()}) + "\n")
        return answer

    def _act(self) -> str:
        return (self._folder / ACT).read_text(encoding="utf-8").strip()

    def _hello(self, message: Message, context: Any) -> RecordDict:
        honest = super()._hello(message, context)
        if self._act() != HANDSHAKE:
            return honest
        told = flower_records.read_hello_reply(honest)
        return flower_records.hello_reply(told._replace(examples=_ROWS, tokens=_ROWS * _TOKENS_EACH))

    def _acted(self, act: str, message: Message, context: Any) -> Message:
        visit = self.visit(message)
        if act == HANDSHAKE:
            tokens = _ROWS * _TOKENS_EACH
            report = visit.report._replace(tokens=tokens, examples=_ROWS, steps=_ROWS)
            visit = visit._replace(update=visit.update._replace(weight=float(tokens)), report=report)
            return self.signed(message, context, flower_records.train_reply(visit))
        if act in _VISITS:
            return self.signed(message, context, flower_records.train_reply(_VISITS[act](visit)))
        honest = flower_records.train_reply(visit)
        if act == "not signed":
            return Message(honest, reply_to=message)
        if act == "signed by another key":
            return self.signed(message, context, honest, ec.generate_private_key(ec.SECP384R1()))
        if act.startswith("an error text of "):
            text = "x" * (1000 * int(act.split()[-2]))
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, text), reply_to=message)
        if act == "a hundred times as large":
            size = 100 * sum(tensor.nbytes for tensor in visit.update.delta.values())
            array = Array("uint8", (size,), "apiary", random.randbytes(size))  # equal objects would be sent once
            return Message(RecordDict({"x": ArrayRecord({"x": array})}), reply_to=message)
        if act == "an answer of the round before":
            before, self._before = self._before, self.signed(message, context, honest).content
            return Message(before, reply_to=message)
        raise ValueError(act)


def play(folder: Path, rows: Path, hostile: str | None = None, without: str | None = None) -> None:
    """Be all the sites whose kits lie in a folder but one, until the process is ended."""
    torch.set_num_threads(1)
    own = sorted(path.parent for path in folder.glob(f"*/{kits.SITE_KEY}") if path.parent.name != without)
    state = folder.parent / "sites"
    state.mkdir(exist_ok=True)
    facts = Facts(client="stub", data=rows, state=state, counts=counts.parse("rounded", "--counts"))
    service, end, threads = Service(facts), threading.Event(), []
    for number, path in enumerate(own):
        kit = kits.read(path, "site")
        bad = kit.site == hostile
        stub = Hostile(kit, number, service, folder.parent) if bad else Stub(kit, number, service)
        place = state / str(kit.site)
        place.mkdir(exist_ok=True)
        line = fleet.Line(str(kit.server), kit.folder / kits.CA, kit.folder / kits.SITE_KEY, end)
        answering = node.Answering(stub.ask, lambda: None)
        threads.append(threading.Thread(target=node.run, args=(line, answering, {}, Journal(place), end)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kits", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--hostile", help="the site that is")
    parser.add_argument("--without", help="the site that stays away")
    args = parser.parse_args()
    play(args.kits, args.rows, args.hostile, args.without)


if __name__ == "__main__":
    main()
