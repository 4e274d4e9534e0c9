"""A site's worker signs what it answers: the very bytes, bound to the message that it answers."""

from __future__ import annotations

from pathlib import Path

import pytest
from deployment import overrides, write_rows
from flwr.app import ArrayRecord, Context, Error, Message, RecordDict
from superlink import be_the_server

from apiary.config import loading
from apiary.core.counts import EXACT
from apiary.core.errors import UserError
from apiary.models import adapters
from apiary.tracking.reply_log import ReplyLog
from apiary.transport import flower_records, sealed, signatures
from apiary.transport.signatures import Question
from client import app, site_worker, worker_rpc
from client.site import Facts
from deploy import certificates
from server.seals import Seals, Site

NODE = 7


class Signing:
    """A site whose worker is asked by the ClientApp, and the server's half of the check."""

    def __init__(self, folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        be_the_server()
        rows = write_rows(folder / "rows")
        private, public = certificates.site_keys()
        (folder / "site.key").write_bytes(private)
        self.folder, self.public = folder, public.decode()
        self.run = loading.load(None, overrides(model, rows))
        facts = Facts("ant", rows / "ant.jsonl", folder / "state", self.run.model.name, counts=EXACT)
        self.plain = site_worker.Service(facts)
        service = site_worker.Service(facts, signatures.private_key(folder / "site.key"))
        monkeypatch.setattr(worker_rpc, "ask", lambda address, call: service.answer(call))

    def asked(self, kind: str, content: RecordDict) -> Message:
        message = Message(content, NODE, kind, group_id="1" if kind == "train" else "0")
        message.metadata.__dict__["_message_id"] = f"id of {kind}"
        return message

    def reply(self, message: Message, name: str = "first") -> RecordDict:
        config = {"config": self.run.to_json(), "name": name}
        context = Context(1, NODE, {"worker-address": "unix:x"}, RecordDict(), config)
        return app.app(message, context).content

    def opened(self, message: Message, reply: RecordDict) -> RecordDict | Error:
        return Seals("first", lambda node: Site("ant", self.public), ReplyLog(self.folder)).open(message, reply)


@pytest.fixture
def site(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Signing:
    return Signing(tmp_path, tiny_model, monkeypatch)


def test_the_worker_signs_what_it_answers_and_the_server_opens_it(site: Signing) -> None:
    hello = site.asked(flower_records.HELLO, RecordDict())
    opened = site.opened(hello, site.reply(hello))
    assert isinstance(opened, RecordDict) and flower_records.read_hello_reply(opened).client == "ant"
    adapter = flower_records.to_arrays(adapters.fresh_adapter(adapters.load(site.run.model, site.run.adapter), 0))
    train = site.asked("train", flower_records.request(1, adapter, ArrayRecord()))
    opened = site.opened(train, site.reply(train))
    assert isinstance(opened, RecordDict)
    update = flower_records.read_train_reply(opened).update  # type: ignore[union-attr]
    assert update.client == "ant" and flower_records.read_message(opened) != b""


def test_the_signature_is_over_the_message_that_the_site_was_sent(site: Signing) -> None:
    hello = site.asked(flower_records.HELLO, RecordDict())
    found = sealed.read(site.reply(hello))
    assert found is not None
    assert found.claim.question == Question("first", "0", "query.hello", "id of query.hello", "ant")
    assert signatures.is_signed(found.claim, found.signature, site.public)


def test_an_error_of_the_worker_is_signed_too(site: Signing) -> None:
    hello = site.asked(flower_records.HELLO, RecordDict())
    reply = site.reply(hello, name="../out")
    found = sealed.read(reply)
    assert found is not None and (found.claim.outcome, found.claim.question.run) == ("error", "../out")
    seals = Seals("../out", lambda node: Site("ant", site.public), ReplyLog(site.folder))
    opened = seals.open(hello, reply)
    assert isinstance(opened, Error) and "name is not allowed" in opened.reason


def test_a_worker_whose_key_cannot_be_read_says_so(tmp_path: Path) -> None:
    (tmp_path / "site.key").write_text("nonsense")
    for path in (tmp_path / "site.key", tmp_path / "none.key"):
        with pytest.raises(UserError, match=r"\.key"):
            site_worker._key(path)
