"""Who takes part: nodes that come and leave, and the handshake in between."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from apiary.config.schema import RunConfig
from apiary.core import errors
from apiary.core.errors import RunFailed
from apiary.core.messages import ClientInfo, Fingerprint, Hello
from apiary.transport import flower_records
from server import messaging, validation
from strategies.aggregator import ROOT

_AGAIN_S = 10.0  # how soon a node whose handshake failed in passing is asked again


class EventLog(Protocol):
    """Where events go; `apiary.tracking.event_log.RunLog` is one."""

    def event(self, kind: str, **fields: Any) -> None:
        """Record one event."""


class Member(NamedTuple):
    """A client that has passed the handshake and is there."""

    node: int
    info: ClientInfo
    examples: int


class _Refusal(NamedTuple):
    reasons: frozenset[str]  # all that were logged
    until: float  # monotonic seconds; asked again from then on


class Roster:
    """The clients that a run may ask, by name.

    Args:
        config: the run.
        fingerprint: what a client must agree on to take part.
        mixed: whether the aggregation method takes clients of lower ranks than the run's.
        log: receives the run's events.
        name_of: the name that a node's key is registered under, which it must then tell as its own; empty where a key
            has none, and None where there are no keys, as in a simulation.
        info_of: what the run knows of a client that has passed, beside what it says of itself.
    """

    def __init__(
        self,
        config: RunConfig,
        fingerprint: Fingerprint,
        *,
        mixed: bool,
        log: EventLog,
        name_of: Callable[[int], str | None],
        info_of: Callable[[Hello], ClientInfo],
    ) -> None:
        self.config, self.fingerprint = config, fingerprint
        self.members: dict[str, Member] = {}
        self._mixed, self._log, self._name_of, self._info_of = mixed, log, name_of, info_of
        self._refused: dict[int, _Refusal] = {}
        self._greeted: dict[str, int] = {}  # hellos without an answer yet: message id -> node

    def wait_for(self, grid: Grid, expected: int) -> None:
        """Wait for the nodes of `expected` clients and shake hands with them.

        Raises:
            RunFailed: they did not come in `strategy.join_timeout_s`, or too few passed.
        """
        deadline, pause = time.monotonic() + self.config.strategy.join_timeout_s, messaging.Pause()
        while len(nodes := list(grid.get_node_ids())) < expected:
            if time.monotonic() > deadline:
                raise RunFailed(
                    f"{len(nodes)} of {expected} clients joined within strategy.join_timeout_s = "
                    f"{self.config.strategy.join_timeout_s:g} s"
                )
            pause.sleep()
        self._greet(grid, patience=self.config.strategy.join_timeout_s)
        needed = min(self.config.strategy.min_clients, expected)
        if len(self.members) < needed:
            raise RunFailed(
                f"{len(self.members)} clients passed the handshake, {needed} are needed; see the lines above"
            )

    def gather(self, grid: Grid, number: int) -> None:
        """Look who is there now; wait a while if that is fewer than a round may have.

        Raises:
            RunFailed: it still is after `strategy.join_timeout_s`.
        """
        needed = self.config.strategy.min_clients
        deadline, pause = time.monotonic() + self.config.strategy.join_timeout_s, messaging.Pause()
        self._greet(grid)
        while len(self.members) < needed:
            if time.monotonic() > deadline:
                there = len(self.members)
                raise RunFailed(f"round {number}: {there} clients are left, strategy.min_clients = {needed} are needed")
            pause.sleep()
            self._greet(grid)

    def _greet(self, grid: Grid, patience: float = 0.0) -> None:
        """Shake hands with nodes that are new, and forget those that left.

        Waits as long as answers keep coming within `patience` seconds of each other. Who has not answered by then
        holds nobody up: a later call admits it.
        """
        nodes, now = set(grid.get_node_ids()), time.monotonic()
        self.members = {name: m for name, m in self.members.items() if m.node in nodes}
        self._greeted = {i: node for i, node in self._greeted.items() if node in nodes}
        self._refused = {node: refusal for node, refusal in self._refused.items() if node in nodes}
        refused = {node for node, refusal in self._refused.items() if now < refusal.until}
        known = {member.node for member in self.members.values()} | refused | set(self._greeted.values())
        if new := sorted(nodes - known):
            hellos = [Message(RecordDict(), node, flower_records.HELLO, group_id="0") for node in new]
            self._greeted |= messaging.push(grid, hellos)
        last, pause = time.monotonic(), messaging.Pause()
        while self._greeted:
            answers = messaging.pull(grid, self._greeted)
            for node, reply in answers:
                self._meet(node, reply)
                last, pause = time.monotonic(), messaging.Pause()
            if not answers:
                if time.monotonic() - last >= patience:
                    return
                pause.sleep(len(self._greeted))

    def _meet(self, node: int, reply: Message) -> None:
        if reply.has_error():
            reason = reply.error.reason or "it failed without a reason"
            self._turn_away(node, self._called(node), reason, for_s=_AGAIN_S)
            return
        try:
            self._admit(node, flower_records.read_hello_reply(reply.content))
        except errors.WireError as error:
            self._turn_away(node, self._called(node), str(error))

    def _admit(self, node: int, hello: Hello) -> None:
        wrong = [
            part
            for part, ours, theirs in zip(Fingerprint._fields, self.fingerprint, hello.fingerprint, strict=True)
            if ours != theirs
        ]
        registered = self._name_of(node)
        if registered is not None and registered != hello.client:
            # Before all else: nothing that it says in another's name may count. Not for good: it may be mended.
            told = f"it calls itself {hello.client[:64]!r}, which is not the name that its key is registered under"
            self._turn_away(node, self._called(node), told, for_s=_AGAIN_S)
        elif hello.client == ROOT:
            self._turn_away(node, self._called(node), "it calls itself as the server does; give it another name")
        elif wrong:
            reason = f"it holds another {' and '.join(wrong)} than the server (fingerprints differ)"
            self._turn_away(node, hello.client, reason)
        elif (other := self.members.get(hello.client)) and other.node != node:
            # Not for good: an organisation that restarted may come before its old node is given up.
            self._turn_away(node, hello.client, "another client of this name is still there", for_s=_AGAIN_S)
        elif hello.tokens == 0:
            self._turn_away(node, hello.client, "it has nothing to train on")
        elif reason := validation.wrong_rank(hello.rank, self.config, self._mixed):
            self._turn_away(node, hello.client, reason)
        elif not validation.possible(hello.tokens, hello.examples, self.config):
            self._turn_away(
                node, hello.client, f"it claims {hello.tokens:g} tokens in {hello.examples:g} examples; that cannot be"
            )
        else:
            self.members[hello.client] = Member(node, self._info_of(hello), hello.examples)
            self._refused.pop(node, None)
            info = self.members[hello.client].info
            self._log.event(
                "handshake", client=hello.client, examples=hello.examples, tokens=hello.tokens, rank=info.rank
            )

    def _turn_away(self, node: int, client: str, reason: str, for_s: float = math.inf) -> None:
        """Refuse a node at the handshake until `for_s` seconds have passed or it has left; logs a reason once."""
        told = self._refused[node].reasons if node in self._refused else frozenset()
        self._refused[node] = _Refusal(told | {reason}, time.monotonic() + for_s)
        if reason not in told:
            self._log.event("refused", client=client, reason=reason)

    # -- names ----------------------------------------------------------------------------------

    def note(self, info: ClientInfo) -> None:
        """Keep what a round has told of a member."""
        self.members[info.client] = self.members[info.client]._replace(info=info)

    def check_sender(self, client: str, message: Message) -> None:
        """Check that who answers as `client` is who was asked.

        Raises:
            WireError: it is another node.
        """
        if client not in self.members or self.members[client].node != message.metadata.src_node_id:
            raise errors.WireError(f"it answers as {client!r}, which is not who was asked")

    def sender_of(self, message: Message) -> str:
        """The client that a message comes from, whatever it calls itself."""
        node = message.metadata.src_node_id
        return next((name for name, m in self.members.items() if m.node == node), None) or self._called(node)

    def _called(self, node: int) -> str:
        return self._name_of(node) or f"a site that did not tell its name (node {node})"
