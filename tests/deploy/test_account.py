"""Who sent what can be checked later, with the sites' public keys alone, and nothing in the account can be changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import apiary
from flwr.app import Error, Message, RecordDict
from superlink import be_the_server

from apiary.core.errors import UserError
from apiary.tracking.event_log import RunLog
from apiary.tracking.reply_log import ReplyLog
from apiary.transport import sealed, signatures
from apiary.transport.signatures import Claim, Question
from deploy import account, kits
from server.seals import Seals, Site

SITES = ("ant", "bee")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The run directory of two rounds, in which `bee` answers once too late and once without a signature."""
    kits.init(tmp_path / "fed", "localhost:18443", SITES)
    folder = tmp_path / "run"
    log = RunLog(folder)
    be_the_server()
    keys = {site: signatures.private_key(tmp_path / "fed" / site / "site.key") for site in SITES}
    public = {site: (tmp_path / "fed" / "server" / "sites" / f"{site}.pub").read_text() for site in SITES}
    seals = Seals("run-1", lambda node: Site(SITES[node], public[SITES[node]]), ReplyLog(folder))

    def answer(node: int, kind: str, number: str, claimed: str | None = None, outcome: str = sealed.ANSWER) -> None:
        asked = Message(RecordDict(), node, kind, group_id=number)
        asked.metadata.__dict__["_message_id"] = f"{kind}-{number}-{node}"
        body = sealed.pack(RecordDict())
        question = Question("run-1", claimed or number, kind, asked.metadata.message_id, SITES[node])
        claim = Claim(question, outcome, signatures.digest(body))
        seals.open(asked, sealed.seal(sealed.header(claim, signatures.sign(keys[SITES[node]], claim)), body))

    for node in (0, 1):
        answer(node, "query.hello", "0")
        log.event("handshake", client=SITES[node])
    for number in ("1", "2"):
        answer(0, "train", number)
        log.event("client", round=int(number), client="ant")
    answer(1, "train", "1")
    log.event("client", round=1, client="bee")
    answer(1, "train", "2", claimed="1")
    answer(0, "train", "3", outcome=sealed.ERROR)
    answer(0, "evaluate", "2")
    log.event("evaluate", round=2, clients={}, clients_few=["ant"])
    seals.open(Message(RecordDict(), 1, "evaluate", group_id="2"), RecordDict())
    seals.open(Message(RecordDict(), 1, "evaluate", group_id="3"), Error(8, "crashed"))
    log.close()
    (folder / "run-id").write_text("1\n")
    return folder


def keys_of(run: Path) -> Path:
    return run.parent / "fed" / "server" / "sites"


def test_an_account_that_is_as_it_was_written_holds(run: Path) -> None:
    found = account.verify(run, keys_of(run))
    assert found.problems == []
    shown = signatures.fingerprint((keys_of(run) / "bee.pub").read_text())
    assert found.lines[0].startswith("site ant: 5 signed, by key SHA256:")
    assert found.lines[1] == f"site bee: 1 failed, 1 not signed, 2 signed, 1 stale, by key {shown}"


def test_the_command_tells_it_and_its_exit_code(run: Path) -> None:
    done = apiary("deploy", "verify", run, "--keys", keys_of(run))
    assert done.returncode == 0 and "site ant: 5 signed" in done.stdout
    rewrite(run, lambda entries: entries[0].update(digest="0" * 64))
    done = apiary("deploy", "verify", run, "--keys", keys_of(run))
    assert done.returncode == 1 and "problem: line 1, site ant: it is said to be 'signed'" in done.stdout


def rewrite(run: Path, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    path = run / "replies.jsonl"
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    change(entries)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


OTHERS = {
    "run": "run-2",
    "round": "7",
    "kind": "evaluate",
    "message": "m",
    "site": "bee",
    "outcome": "error",
    "digest": "0" * 64,
    "signature": "AAAA",
    "verdict": "not signed",
}


@pytest.mark.parametrize("name", OTHERS)
def test_no_field_of_an_entry_can_be_changed(name: str, run: Path) -> None:
    rewrite(run, lambda entries: entries[2].update({name: OTHERS[name]}))
    assert any("line 3" in problem for problem in account.verify(run, keys_of(run)).problems)


def test_a_stale_answer_cannot_be_made_a_right_one(run: Path) -> None:
    def change(entries: list[dict[str, Any]]) -> None:
        (stale,) = [entry for entry in entries if entry["verdict"] == "stale"]
        stale.update(verdict="signed", claimed=None)

    rewrite(run, change)
    assert "false signature" in account.verify(run, keys_of(run)).problems[0]


def test_an_answer_that_counted_cannot_be_taken_out(run: Path) -> None:
    rewrite(run, lambda entries: entries.pop(2))
    assert account.verify(run, keys_of(run)).problems == [
        "site ant: the log counts 1 answers to train of round 1, and 0 of the account are signed"
    ]


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"event": "client", "round": 3, "client": "ant"}, "train"),  # it signed that it failed
        ({"event": "evaluate", "round": 2, "clients": {"bee": 0.1}}, "evaluate"),
        ({"event": "evaluate", "round": 2, "clients": {}, "clients_few": ["bee"]}, "evaluate"),
    ],
)
def test_the_log_cannot_count_an_answer_that_was_none(fields: dict[str, Any], kind: str, run: Path) -> None:
    with (run / "log.jsonl").open("a") as log:
        log.write(json.dumps({"time": 1.0, **fields}) + "\n")
    site = "ant" if kind == "train" else "bee"
    assert account.verify(run, keys_of(run)).problems == [
        f"site {site}: the log counts 1 answers to {kind} of round {fields['round']}, and 0 of the account are signed"
    ]


def test_without_the_runs_own_id_an_account_does_not_hold(run: Path) -> None:
    """By it alone answers to another run of the same sites are told."""
    (run / "run-id").unlink()
    (problem,) = account.verify(run, keys_of(run)).problems
    assert problem.startswith("there is no run-id in")


def test_lines_of_another_run_and_second_answers_are_told(run: Path) -> None:
    """Each with a good signature."""
    rewrite(run, lambda entries: entries.insert(3, entries[2]))
    assert account.verify(run, keys_of(run)).problems == [
        "line 4, site ant: its message has been answered in an earlier line"
    ]
    (run / "run-id").write_text("2\n")
    assert "line 1, site ant: it is signed for another run" in account.verify(run, keys_of(run)).problems


def test_with_another_key_nothing_holds(run: Path) -> None:
    kits.init(run.parent / "other", "localhost:18443", SITES)
    found = account.verify(run, run.parent / "other" / "server" / "sites")
    assert len([problem for problem in found.problems if "'false signature'" in problem]) == 8


def test_what_is_no_entry_is_a_problem_and_no_crash(run: Path) -> None:
    with (run / "replies.jsonl").open("a") as file:
        file.write('{"site": "ant"}\n[1]\nnonsense\n')
    assert len(account.verify(run, keys_of(run)).problems) == 3


def test_without_account_or_keys_there_is_one_line(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no replies\.jsonl"):
        account.verify(tmp_path, keys_of(run))
    with pytest.raises(UserError, match=r"holds no NAME\.pub"):
        account.verify(run, tmp_path)
