"""The handshake: each reason for which a client may not join, how long it holds, and whom the log names."""

from __future__ import annotations

from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from apiary.config import loading
from apiary.core.messages import ClientInfo, Fingerprint, Hello
from apiary.transport import flower_records
from server import membership
from server.membership import Member, Roster
from simulation.in_process_grid import LocalGrid
from strategies.aggregator import ROOT

PRINT = Fingerprint("base", "tokenizer", "template", "adapter")
GOOD = Hello("c0", PRINT, 4, 10, 100)


class Log:
    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def event(self, kind: str, **fields: Any) -> None:
        self.events.append((kind, fields))


class Greeter:
    """A roster and a grid whose node 1000 + i answers `hellos[i]`: with that content, or raising it."""

    def __init__(self, *hellos: Any, names: dict[int, str] | None = None, mixed: bool = False) -> None:
        self.hellos, self.asked, self.log = list(hellos), [0] * len(hellos), Log()
        app = ClientApp()

        @app.query("hello")
        def hello(message: Message, context: Context) -> Message:
            i = int(context.node_config["partition-id"])
            self.asked[i] += 1
            answer = self.hellos[i]
            if isinstance(answer, Exception):
                raise answer
            content = answer if isinstance(answer, RecordDict) else flower_records.hello_reply(answer)
            return Message(content, reply_to=message)

        run = loading.load(None, ["adapter.rank=4", "strategy.min_clients=1", "prompt.max_tokens=20"])
        self.roster = Roster(
            run,
            PRINT,
            mixed=mixed,
            log=self.log,
            name_of=(lambda node: None) if names is None else lambda node: names.get(node, ""),
            info_of=lambda hello: ClientInfo(hello.client, hello.rank, 0),
        )
        self.grid = LocalGrid(app, len(hellos))

    def greet(self) -> dict[str, Member]:
        self.roster._update(self.grid)
        return self.roster.members


def test_a_client_that_agrees_is_a_member() -> None:
    one = Greeter(GOOD)
    assert one.greet() == {"c0": Member(1000, ClientInfo("c0", 4, 0), 10, 100)}
    told = {"client": "c0", "examples": 10, "tokens": 100, "counts": "exact", "rank": 4}
    assert one.log.events == [("handshake", told)]
    assert (one.roster.name(1000), one.roster.member(1000)) == ("c0", one.roster.members["c0"])
    assert one.roster.member(1001) is None
    one.greet()
    assert one.asked == [1]


@pytest.mark.parametrize(
    ("hello", "reason"),
    [
        (GOOD._replace(fingerprint=PRINT._replace(base="other")), "another base than the server (fingerprints differ)"),
        (
            GOOD._replace(fingerprint=PRINT._replace(tokenizer="t", template="t")),
            "another tokenizer and template than the server",
        ),
        (GOOD._replace(tokens=0), "it has nothing to train on"),
        (GOOD._replace(rank=3), "rank 3; this run allows 4 alone"),
        (GOOD._replace(rank=8), "rank 8"),
        (GOOD._replace(tokens=201), "claims 201 tokens in 10 examples; that cannot be"),
        (GOOD._replace(tokens=-1), "claims -1 tokens"),
    ],
)
def test_a_client_that_does_not_fit_is_refused_for_good_and_by_name(hello: Hello, reason: str) -> None:
    one = Greeter(hello)
    assert one.greet() == {}
    [(kind, fields)] = one.log.events
    assert (
        kind == "refused"
        and fields["client"] == "c0"
        and reason in fields["reason"]
        and set(fields)
        == {
            "client",
            "reason",
        }
    )
    one.greet()
    assert one.asked == [1]


def test_lower_ranks_join_where_the_method_mixes_them() -> None:
    assert set(Greeter(GOOD._replace(rank=3), mixed=True).greet()) == {"c0"}
    assert set(Greeter(GOOD._replace(rank=8), mixed=True).greet()) == set()


@pytest.mark.parametrize(
    ("hello", "reason"),
    [
        (GOOD._replace(client=ROOT), "it calls itself as the server does"),
        (RecordDict(), "its message holds no"),
        (RuntimeError("a row of data"), "RuntimeError"),
    ],
)
def test_who_gives_no_name_of_its_own_is_named_by_its_node(hello: Any, reason: str) -> None:
    one = Greeter(hello)
    assert one.greet() == {}
    [(_, fields)] = one.log.events
    assert fields["client"] == "a site that did not tell its name (node 1000)" and reason in fields["reason"]


def test_nothing_counts_that_is_said_in_anothers_name() -> None:
    """Not even what would be a reason to refuse the other."""
    one = Greeter(GOOD._replace(client="b", fingerprint=PRINT._replace(base="x")), names={1000: "a"})
    assert one.greet() == {}
    [(_, fields)] = one.log.events
    assert fields["client"] == "a" and fields["reason"].startswith("it calls itself 'b', which is not the name that")


@pytest.mark.parametrize(
    ("hellos", "names"),
    [([GOOD._replace(client="b")], {1000: "a"}), ([RuntimeError("x")], None), ([GOOD, GOOD], None)],
    ids=["another's name", "failed", "two of a name"],
)
def test_what_may_be_mended_is_asked_again_and_logged_once(
    hellos: list[Any], names: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(membership, "_AGAIN_S", 0.0)
    one = Greeter(*hellos, names=names)
    for _ in range(3):
        one.greet()
    assert one.asked[-1] == 3
    assert [kind for kind, _ in one.log.events].count("refused") == 1
    one.hellos[-1] = GOOD._replace(client="a")
    assert "a" in one.greet()


def test_a_member_whose_node_left_is_no_member() -> None:
    one = Greeter(GOOD, GOOD._replace(client="c1"))
    assert set(one.greet()) == {"c0", "c1"}
    del one.grid._contexts[1000]
    assert set(one.greet()) == {"c1"}
    assert one.roster.member(1000) is None and one.roster.name(1000).endswith("(node 1000)")
