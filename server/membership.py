"""Membership: which clients take part. Nodes come and leave, and each new one shakes hands before it is asked."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from apiary.config.schema import RunConfig
from apiary.core import counts, errors
from apiary.core.errors import RunFailed
from apiary.core.messages import ClientInfo, Fingerprint, Hello
from apiary.transport import flower_records
from server import messaging, validation
from strategies.aggregator import ROOT

_AGAIN_S = 10.0  # how soon a node whose handshake failed in passing is asked again
_TELL_S = 10.0  # from when on it is said that the run waits for clients


class EventLog(Protocol):
    """Where events go; `apiary.tracking.event_log.RunLog` is one."""

    def event(self, kind: str, **fields: Any) -> None:
        """Record one event."""


class Member(NamedTuple):
    """A client that has passed the handshake and whose node is there."""

    node: int
    info: ClientInfo
    examples: int | None  # training examples that it can have, by what it told at the handshake; None: it told none
    tokens: int | None = None  # response tokens in them, as it told them; likewise


class _Refused(NamedTuple):
    reasons: frozenset[str]  # all that were logged of this node
    until: float  # monotonic seconds; from then on it is asked again


class _Objection(NamedTuple):
    """Why a client may not join."""

    reason: str
    by_name: bool = True  # whether the event gives the client's own name; if not, the one that the server has for it
    for_s: float = math.inf  # seconds until its node is asked again


class Roster:
    """The members of a run, by name.

    It owns the members, the handshakes without an answer yet, and the nodes that were refused: for how long, and for
    which reasons, so that each reason is logged once.

    Args:
        config: the run.
        fingerprint: what a client must agree on to take part.
        mixed: whether the aggregation method takes clients of lower ranks than the run's.
        log: receives `handshake` and `refused` events.
        name_of: the name that a node's key is registered under, which must then be the one that the client gives; ""
            for a node whose key has none, None where there are no keys, as in a simulation.
        info_of: what the run knows of a client whose handshake passed.
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
        self._clients: dict[int, str] = {}  # the name of each member, by its node
        self._mixed, self._log, self._name_of, self._info_of = mixed, log, name_of, info_of
        self._refused: dict[int, _Refused] = {}  # by node
        self._unanswered: dict[str, int] = {}  # the node of each handshake without an answer yet, by message id

    def wait_for(self, grid: Grid, expected: int) -> None:
        """Wait for the nodes of `expected` clients, or at last of `strategy.min_clients`, and shake hands with them.

        Raises:
            RunFailed: fewer than those came within `strategy.join_timeout_s`, or too few clients passed the handshake.
        """
        patience, needed = self.config.strategy.join_timeout_s, min(self.config.strategy.min_clients, expected)
        began, pause, told = time.monotonic(), messaging.Pause(), False
        while (there := len(list(grid.get_node_ids()))) < expected:
            if not told and time.monotonic() - began > _TELL_S:
                told = self._tell(f"{there} of {expected} clients are here", patience)
            if time.monotonic() - began > patience:
                if there >= needed:  # one that was counted a moment ago may have gone since
                    self._log.event("warning", message=f"the run goes on with {there} of {expected} clients")
                    break
                raise RunFailed(
                    f"{there} of {expected} clients joined within strategy.join_timeout_s = {patience:g} s, "
                    f"{needed} are needed"
                )
            pause.sleep()
        self._update(grid, patience=patience)
        if len(self.members) < needed:
            raise RunFailed(
                f"{len(self.members)} clients passed the handshake, {needed} are needed; see the lines above"
            )

    def gather(self, grid: Grid, number: int) -> None:
        """Update the members before a round; wait while they are fewer than `strategy.min_clients`.

        Raises:
            RunFailed: they still are fewer after `strategy.join_timeout_s`.
        """
        needed = self.config.strategy.min_clients
        patience = self.config.strategy.join_timeout_s
        began, pause, told = time.monotonic(), messaging.Pause(), False
        self._update(grid)
        while len(self.members) < needed:
            if not told and time.monotonic() - began > _TELL_S:
                told = self._tell(f"{len(self.members)} clients are left, of {needed} that are needed", patience)
            if time.monotonic() - began > patience:
                there = len(self.members)
                raise RunFailed(f"round {number}: {there} clients are left, strategy.min_clients = {needed} are needed")
            pause.sleep()
            self._update(grid)

    def _tell(self, line: str, patience: float) -> bool:
        self._log.event(
            "warning", message=f"{line}; the run waits for strategy.join_timeout_s = {patience:g} s at most"
        )
        return True

    def set_info(self, info: ClientInfo) -> None:
        """Replace what the run knows of a member."""
        self.members[info.client] = self.members[info.client]._replace(info=info)

    def name(self, node: int) -> str:
        """The server's own name for the client on a node, whatever it calls itself."""
        unknown = f"a site that did not tell its name (node {node})"
        return self._clients.get(node) or self._name_of(node) or unknown

    def member(self, node: int) -> Member | None:
        """The member on a node; None where there is none."""
        return self.members[self._clients[node]] if node in self._clients else None

    def _update(self, grid: Grid, patience: float = 0.0) -> None:
        """Shake hands with nodes that are new, and drop members whose nodes left.

        Waits as long as answers keep coming within `patience` seconds of each other. A node that has not answered by
        then is not waited for: a later call takes in its answer.
        """
        nodes, now = set(grid.get_node_ids()), time.monotonic()
        self.members = {name: m for name, m in self.members.items() if m.node in nodes}
        self._clients = {m.node: name for name, m in self.members.items()}
        self._unanswered = {i: node for i, node in self._unanswered.items() if node in nodes}
        self._refused = {node: refused for node, refused in self._refused.items() if node in nodes}
        still_refused = {node for node, refused in self._refused.items() if now < refused.until}
        known = set(self._clients) | still_refused | set(self._unanswered.values())
        if new := sorted(nodes - known):
            hellos = [messaging.message(RecordDict(), node, flower_records.HELLO, 0) for node in new]
            self._unanswered |= messaging.push(grid, hellos)
        last, pause = time.monotonic(), messaging.Pause()
        while self._unanswered:
            answers = messaging.pull(grid, self._unanswered)
            for node, reply in answers:
                self._read(node, reply)
                last, pause = time.monotonic(), messaging.Pause()
            if not answers:
                if time.monotonic() - last >= patience:
                    return
                pause.sleep(len(self._unanswered))

    def _read(self, node: int, reply: Message) -> None:
        """Take in a node's answer to the handshake: its client becomes a member, or is refused with a reason."""
        if reply.has_error():
            self._refuse(node, self.name(node), messaging.failure(reply), for_s=_AGAIN_S)
            return
        try:
            hello = flower_records.read_hello_reply(reply.content)
        except errors.WireError as error:
            self._refuse(node, self.name(node), str(error))
            return
        if objection := self._objection(node, hello):
            client = hello.client if objection.by_name else self.name(node)
            self._refuse(node, client, objection.reason, objection.for_s)
            return
        info = self._info_of(hello)
        examples = None if hello.examples is None else counts.most(hello.counts, hello.examples)
        self.members[hello.client] = Member(node, info, examples, hello.tokens)
        self._clients[node] = hello.client
        self._refused.pop(node, None)
        told = {"examples": hello.examples, "tokens": hello.tokens, "counts": hello.counts}
        self._log.event("handshake", client=hello.client, **told, rank=info.rank)

    def _objection(self, node: int, hello: Hello) -> _Objection | None:
        registered = self._name_of(node)
        if registered is not None and registered != hello.client:
            # Before all else: nothing that it says in another's name may count. Not for good: it may be mended.
            reason = f"it calls itself {hello.client[:64]!r}, which is not the name that its key is registered under"
            return _Objection(reason, by_name=False, for_s=_AGAIN_S)
        if hello.client == ROOT:
            return _Objection("it calls itself as the server does; give it another name", by_name=False)
        if wrong := _differing(self.fingerprint, hello.fingerprint):
            return _Objection(f"it holds another {' and '.join(wrong)} than the server (fingerprints differ)")
        if (other := self.members.get(hello.client)) and other.node != node:
            # Not for good: an organisation that restarted may come before its old node is given up.
            return _Objection("another client of this name is still there", for_s=_AGAIN_S)
        if reason := validation.wrong_counts(hello, self.config):
            return _Objection(reason)
        if reason := validation.wrong_rank(hello.rank, self.config, self._mixed):
            return _Objection(reason)
        return None

    def _refuse(self, node: int, client: str, reason: str, for_s: float = math.inf) -> None:
        """Refuse a node at the handshake until `for_s` seconds have passed or it has left; logs each reason once."""
        reason, client = validation.one_line(reason), validation.one_line(client)
        logged = self._refused[node].reasons if node in self._refused else frozenset()
        self._refused[node] = _Refused(logged | {reason}, time.monotonic() + for_s)
        if reason not in logged:
            self._log.event("refused", client=client, reason=reason)


def _differing(ours: Fingerprint, theirs: Fingerprint) -> list[str]:
    """The parts in which two fingerprints differ."""
    return [part for part, a, b in zip(Fingerprint._fields, ours, theirs, strict=True) if a != b]
