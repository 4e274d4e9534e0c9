"""Signed answers: what is signed of each, what becomes of one that is not, and the account of all."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.common.serde import recorddict_to_proto
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from kept_events import Log
from scripted_clients import clients, rounds
from superlink import Answer, Link, LinkedGrid, answer_of, be_the_server, instead

from apiary.core.errors import WireError
from apiary.tracking import reply_log
from apiary.tracking.reply_log import ReplyLog
from apiary.transport import sealed, signatures
from apiary.transport.signatures import Claim, Question
from deploy import certificates
from server.seals import Seals, Site
from server.site_grid import SiteGrid, limit_of

BAD = 1001
RUN = "run-1a2b"


class Pair(NamedTuple):
    private: ec.EllipticCurvePrivateKey
    public: str


def pair(folder: Path, name: str) -> Pair:
    private, public = certificates.site_keys()
    (folder / name).write_bytes(private)
    return Pair(signatures.private_key(folder / name), public.decode())


@pytest.fixture
def pairs(tmp_path: Path) -> list[Pair]:
    return [pair(tmp_path, f"c{i}.key") for i in range(3)]


def claim_of(reply: Message, index: int, body: bytes) -> Claim:
    """What an honest site claims."""
    head = reply.metadata
    question = Question(RUN, head.group_id, head.message_type, head.reply_to_message_id, f"c{index}")
    return Claim(question, "answer", hashlib.sha256(body).hexdigest())


Spoil = Callable[[Claim], Claim]


def signing(
    pairs: list[Pair], index: int, before: Spoil = lambda claim: claim, after: Spoil = lambda claim: claim
) -> Callable[[Message], Answer]:
    """A site that signs, and may claim otherwise: before it signs, or after it has signed."""

    def push(reply: Message) -> Answer:
        training = reply.metadata.message_type == "train"
        body = sealed.pack(reply.content)
        claim = claim_of(reply, index, body)
        claim = before(claim) if training else claim
        signature = signatures.sign(pairs[index].private, claim)
        told = after(claim) if training else claim
        return instead(reply, sealed.seal(sealed.header(told, signature), body))

    return push


def run(tmp_path: Path, pairs: list[Pair], bad: Any = None, number: int = 1) -> tuple[Log, list[dict[str, Any]]]:
    """A run of three sites, of which the second answers as `bad` says; its log, and the account of answers."""
    push = {1000 + i: signing(pairs, i) for i in range(3)} | ({BAD: bad} if bad else {})
    seals = Seals(RUN, lambda node: Site(f"c{node - 1000}", pairs[node - 1000].public), ReplyLog(tmp_path))
    made, log = rounds(
        [f"rounds={number}", "strategy.min_clients=2", "evaluate.every=0"], name_of=lambda n: f"c{n - 1000}"
    )
    made.run(SiteGrid(LinkedGrid(Link(clients(), 3, push)), limit_of(10), seals), 3)
    return log, account(tmp_path)


def account(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "replies.jsonl").read_text().splitlines()]


def refusals(log: Log) -> list[tuple[str, str]]:
    return [(e["client"], e["reason"]) for e in log.of("refused")]


def test_signed_answers_count_and_are_in_the_account(tmp_path: Path, pairs: list[Pair]) -> None:
    log, entries = run(tmp_path, pairs)
    assert refusals(log) == [] and log.of("round")[0]["clients"] == 3
    assert [(e["kind"], e["round"], e["site"], e["verdict"]) for e in entries] == [
        (kind, number, f"c{i}", "signed") for kind, number in (("query.hello", "0"), ("train", "1")) for i in range(3)
    ]


def test_what_the_account_holds_can_be_checked_by_hand(tmp_path: Path, pairs: list[Pair]) -> None:
    """Written out here once more, so that the bytes that are signed are what the documentation says."""
    for entry in run(tmp_path, pairs)[1]:
        public = pairs[int(entry["site"][1:])]
        parts = [RUN, entry["round"], entry["kind"], entry["message"], entry["site"], "answer", entry["digest"]]
        signed = b"apiary reply 1\n" + json.dumps(parts).encode()
        signature = base64.b64decode(entry["signature"])
        public.private.public_key().verify(signature, signed, ec.ECDSA(hashes.SHA384()))
        blob = base64.b64decode(public.public.split()[1])
        assert entry["key"] == "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


def field(name: str, value: str) -> Spoil:
    return lambda claim: claim._replace(question=claim.question._replace(**{name: value}))


FIELDS: dict[str, tuple[Spoil, str, str]] = {
    "run": (field("run", "run-0000"), "stale", "its answer is stale: it is to train of round 1 of run run-0000"),
    "round": (field("round", "7"), "stale", "its answer is stale: it is to train of round 7 of run run-1a2b"),
    "kind": (field("kind", "evaluate"), "stale", "its answer is stale: it is to evaluate of round 1 of run run-1a2b"),
    "message": (field("message", "0" * 64), "stale", "its answer is stale: it is to an earlier message"),
    "site": (field("site", "c0"), "another name", "it signs as 'c0', which is not who was asked"),
}
_FALSE = "the signature of its answer is not that of its registered key"


@pytest.mark.parametrize("name", FIELDS)
def test_an_answer_that_was_signed_for_another_question_is_dropped_and_said(
    name: str, tmp_path: Path, pairs: list[Pair]
) -> None:
    spoil, verdict, reason = FIELDS[name]
    log, entries = run(tmp_path, pairs, signing(pairs, 1, before=spoil))
    assert refusals(log) == [("c1", reason)] and log.of("round")[0]["clients"] == 2
    (entry,) = [e for e in entries if e["verdict"] != "signed"]
    assert (entry["verdict"], entry["site"], entry["round"]) == (verdict, "c1", "1")
    assert entry["claimed"][name] != entry[name]


@pytest.mark.parametrize("name", [*FIELDS, "outcome"])
def test_no_part_of_what_is_signed_can_be_changed_afterwards(name: str, tmp_path: Path, pairs: list[Pair]) -> None:
    spoil: Spoil = (lambda claim: claim._replace(outcome="error")) if name == "outcome" else FIELDS[name][0]
    log, entries = run(tmp_path, pairs, signing(pairs, 1, after=spoil))
    assert refusals(log) == [("c1", _FALSE)]
    assert [e["verdict"] for e in entries].count("false signature") == 1


def test_nor_can_a_byte_of_the_answer(tmp_path: Path, pairs: list[Pair]) -> None:
    def push(reply: Message) -> Answer:
        answer = sealed.pack(reply.content)
        claim = claim_of(reply, 1, answer)
        head = sealed.header(claim, signatures.sign(pairs[1].private, claim))
        return instead(reply, sealed.seal(head, answer[:-1] + bytes([answer[-1] ^ 1])))

    assert set(refusals(run(tmp_path, pairs, push)[0])) == {("c1", _FALSE)}


def test_a_site_cannot_answer_for_another_with_its_own_key(tmp_path: Path, pairs: list[Pair]) -> None:
    """Also where it knows the node and the message of the other."""
    as_other = signing([pairs[0], pairs[2], pairs[2]], 1)
    assert set(refusals(run(tmp_path, pairs, as_other)[0])) == {("c1", _FALSE)}


def test_an_answer_of_an_earlier_round_takes_the_place_of_none(tmp_path: Path, pairs: list[Pair]) -> None:
    """What processes that outlive their run send: right once, signed, and not what was asked."""
    sign = signing(pairs, 1)
    kept: list[Answer] = []

    def sealed_content(answer: Answer) -> RecordDict:
        message = inflate_object_from_contents(answer.tree.object_id, dict(answer.contents))
        assert isinstance(message, Message)
        return message.content

    def replay(reply: Message) -> Answer:
        answer = sign(reply)
        kept.append(answer)
        if reply.metadata.group_id != "2":
            return answer
        return instead(reply, sealed_content(kept[1]))

    log, entries = run(tmp_path, pairs, replay, number=2)
    assert refusals(log) == [("c1", "its answer is stale: it is to train of round 1 of run run-1a2b")]
    assert [event["clients"] for event in log.of("round")] == [3, 2]
    assert [e["verdict"] for e in entries if e["site"] == "c1"] == ["signed", "signed", "stale"]


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"seal": ConfigRecord({"run": "x"}), "body": ArrayRecord()}),
        RecordDict({"seal": MetricRecord({"run": 1}), "body": ArrayRecord()}),
    ],
)
def test_an_answer_without_a_signature_does_not_count(content: RecordDict, tmp_path: Path, pairs: list[Pair]) -> None:
    log, entries = run(tmp_path, pairs, lambda reply: instead(reply, content))
    assert set(refusals(log)) == {("c1", "its answer is not signed")}
    assert [e["verdict"] for e in entries if e["site"] == "c1"] == ["not signed"]


def test_a_plain_answer_of_an_unsigned_version_is_refused_too(tmp_path: Path, pairs: list[Pair]) -> None:
    assert set(refusals(run(tmp_path, pairs, answer_of)[0])) == {("c1", "its answer is not signed")}


def test_parts_that_are_too_long_are_not_read(tmp_path: Path, pairs: list[Pair]) -> None:
    long = signing(pairs, 1, before=field("run", "x" * 501))
    log, entries = run(tmp_path, pairs, long)
    assert refusals(log) == [("c1", "its answer is not signed")]
    assert max(len(json.dumps(entry)) for entry in entries) < 2000


def test_a_signed_error_is_told_and_an_unsigned_one_is_a_failure_of_who_was_asked(
    tmp_path: Path, pairs: list[Pair]
) -> None:
    def failing(reply: Message) -> Answer:
        body = b"client disk full"
        claim = claim_of(reply, 1, body)._replace(outcome="error")
        return instead(reply, sealed.seal(sealed.header(claim, signatures.sign(pairs[1].private, claim)), body))

    log, entries = run(tmp_path, pairs, failing)
    assert set(refusals(log)) == {("c1", "client disk full")}
    assert {(e["verdict"], e["outcome"]) for e in entries if e["site"] == "c1"} == {("signed", "error")}
    (tmp_path / "replies.jsonl").unlink()
    log, entries = run(tmp_path, pairs, lambda reply: instead(reply, Error(2, "it crashed")))
    assert set(refusals(log)) == {("c1", "it crashed")}
    assert [e["verdict"] for e in entries if e["site"] == "c1"] == ["failed"]


def test_a_site_whose_key_was_struck_off_does_not_count(tmp_path: Path, pairs: list[Pair]) -> None:
    be_the_server()
    seals = Seals(RUN, lambda node: Site("", ""), ReplyLog(tmp_path))
    message = Message(RecordDict(), BAD, "train", group_id="1")
    claim = claim_of(message, 1, b"")
    opened = seals.open(message, sealed.seal(sealed.header(claim, signatures.sign(pairs[1].private, claim)), b""))
    assert isinstance(opened, Error) and opened.reason == _FALSE


# -- the bytes -----------------------------------------------------------------------------------


def content() -> RecordDict:
    arrays = ArrayRecord({"a": Array("uint8", (3,), "apiary", b"abc"), "b": Array("uint8", (0,), "apiary", b"")})
    return RecordDict({"n": MetricRecord({"x": 1.5, "y": [1, 2]}), "arrays": arrays, "c": ConfigRecord({"z": "é"})})


def test_what_is_packed_is_unpacked() -> None:
    back = sealed.unpack(sealed.pack(content()))
    assert back == content() and list(back) == ["n", "arrays", "c"]
    assert sealed.unpack(sealed.pack(RecordDict())) == RecordDict()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda body: b"",
        lambda body: body[:-1],
        lambda body: body + b"x",
        lambda body: (2**31).to_bytes(4, "big") + body[4:],
        lambda body: body[:4] + b"\xff" * (len(body) - 4),
        lambda body: (66_000).to_bytes(4, "big") + bytes(66_000),
    ],
)
def test_bytes_that_are_none_of_ours_are_one_error(spoil: Callable[[bytes], bytes]) -> None:
    with pytest.raises(WireError):
        sealed.unpack(spoil(sealed.pack(content())))


def test_an_array_that_claims_more_than_there_is_is_refused() -> None:
    hollow = RecordDict({"arrays": ArrayRecord({"a": Array("uint8", (1,), "apiary", b"\xff" * 8)})})
    head = recorddict_to_proto(hollow).SerializeToString()
    with pytest.raises(WireError, match="another length"):
        sealed.unpack(len(head).to_bytes(4, "big") + head + b"x")


def test_more_beside_the_arrays_than_an_answer_has_is_not_sent() -> None:
    with pytest.raises(ValueError, match="beside its arrays"):
        sealed.pack(RecordDict({"x": ConfigRecord({"x": "y" * 70_000})}))


def test_no_two_claims_have_the_same_bytes() -> None:
    one = Claim(Question("a", 'b","c', "d", "e", "f"), "answer", "0")
    other = Claim(Question("a", "b", 'c","d', "e", "f"), "answer", "0")
    assert one.statement() != other.statement()


# -- the account ---------------------------------------------------------------------------------


def test_the_account_is_cut_with_the_log_and_a_torn_line_goes(tmp_path: Path) -> None:
    log = ReplyLog(tmp_path)
    for number in ("0", "1", "1", "2", "0", "3"):
        log.add(round=number)
    with (tmp_path / "replies.jsonl").open("ab") as file:
        file.write(b'{"round":"4"')
    ReplyLog(tmp_path).add(round="4")
    assert [e["round"] for e in account(tmp_path)] == ["0", "1", "1", "2", "0", "3", "4"]
    reply_log.truncate_after(tmp_path, 2)
    assert [e["round"] for e in account(tmp_path)] == ["0", "1", "1", "2", "0"]
    reply_log.truncate_after(tmp_path, 0)
    assert account(tmp_path) == []
    reply_log.truncate_after(tmp_path / "nowhere", 3)
