"""Replies of clients, read, decoded and checked one at a time.

All functions here are pure. A client is not trusted: its reply becomes either a checked value or a `Refusal`, whose one
line says what is wrong with it. The limits that numbers are held against are in `server.validation`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from flwr.app import RecordDict

from apiary.config import schedule
from apiary.config.schema import RunConfig
from apiary.core import errors
from apiary.core.errors import WireError
from apiary.core.messages import ClientInfo, Decline, Payload, Score, Spent, Visit
from apiary.core.tensors import StateDict, threads
from apiary.transport import codec, flower_records
from apiary.transport.codec import Codec
from server import validation
from server.membership import Member
from strategies import Aggregator, guard
from strategies.guard import Reference


class Refusal(NamedTuple):
    """Why a reply does not count."""

    reason: str  # one line, which quotes nothing of the reply but names and numbers
    poisoned: bool = False  # whether no honest client would send it
    spent: Spent | None = None  # the privacy that it says was spent, which counts all the same: the update was sent


class Terms(NamedTuple):
    """What the replies to a round's train messages are held against."""

    config: RunConfig
    aggregator: Aggregator
    codec: Codec  # of changes on the way up
    number: int  # the round, from 1
    payload_of: Callable[[ClientInfo], Payload]  # what a client of this rank was sent
    reference: Reference = Reference()  # what was usual in the rounds before
    agreed: float = 0.0  # the usual weight by the counts of the handshakes (`guard.agreed`); 0 where they do not tell


@threads(1)  # the tensors are small: waking other threads for each costs more than they save
def read_train(content: RecordDict, sender: Member | None, terms: Terms) -> Visit | Decline | Refusal:
    """The checked reply to a train message.

    Args:
        content: of the reply.
        sender: the member whose node sent it; None where the node belongs to no member.
        terms: of the round.
    """
    spent = None
    try:
        reply = flower_records.read_train_reply(content)
        if isinstance(reply, Decline):
            _checked_sender(reply.client, sender)
            validation.check_decline(reply, terms.config)
            return reply
        member = _checked_sender(reply.update.client, sender)
        spent = _credible(reply.spent, terms.config)
        return _checked(reply, flower_records.read_message(content), member, terms)
    except WireError as error:
        return Refusal(str(error), isinstance(error, errors.Poisoned), spent)


def read_score(content: RecordDict, sender: Member | None, config: RunConfig) -> Score | Refusal:
    """The checked reply to an evaluate message.

    Args:
        content: of the reply.
        sender: the member whose node sent it; None where the node belongs to no member.
        config: the run.
    """
    try:
        client, score = flower_records.read_score_reply(content)
        _checked_sender(client, sender)
        validation.check_score(score, config)
        return score
    except WireError as error:
        return Refusal(str(error), isinstance(error, errors.Poisoned))


def _checked_sender(client: str, sender: Member | None) -> Member:
    """The member that a reply comes from.

    Raises:
        WireError: the reply gives another client's name than that of the member whose node sent it.
    """
    if sender is None or client != sender.info.client:
        raise WireError(f"it answers as {client!r}, which is not who was asked")
    return sender


def _credible(spent: Spent | None, config: RunConfig) -> Spent | None:
    """What an unchecked reply says of the privacy spent, if it can be entered into the account at all."""
    return spent if spent is not None and config.privacy.unit != "none" and all(map(math.isfinite, spent)) else None


def _checked(visit: Visit, message: bytes, member: Member, terms: Terms) -> Visit:
    """A visit with its change decoded, once it has passed all checks.

    Args:
        visit: as it was read.
        message: the encoded change; empty where it is not encoded.
        member: its sender.
        terms: of the round.

    Raises:
        WireError: the answer is not what this run allows.
    """
    client = _trained_as(member.info, visit.update.rank, terms.aggregator)
    payload = terms.payload_of(client)
    visit = _decoded(visit, message, terms.codec, payload.adapter)
    validation.check_visit(visit, terms.config, member.examples, payload, terms.number)
    if terms.config.strategy.norm_guard:
        steps = validation.trained_steps(visit.report, terms.config, member.examples)
        start, local = payload.adapter, terms.aggregator.local
        validation.check_reach(
            visit, guard.reach(terms.config, terms.number, steps, start, local, terms.codec.feedback)
        )
    if visit.update.rank != client.rank:
        raise WireError(f"its update has rank {visit.update.rank}, and it was sent rank {client.rank}")
    return _with_control(visit, payload, terms)


def _trained_as(client: ClientInfo, rank: int, aggregator: Aggregator) -> ClientInfo:
    """The client with the rank that its update must have: its own, or a lower one where clients may prune."""
    return client._replace(rank=rank) if aggregator.prunes and 0 < rank < client.rank else client


def _decoded(visit: Visit, message: bytes, way_up: Codec, adapter: StateDict) -> Visit:
    """The visit with the change that its message holds, if it has one.

    Raises:
        WireError: the message is damaged, or its change does not fit the adapter; `Poisoned` where it holds NaN or
            infinity, which no encoder makes.
    """
    if not message:
        return visit
    try:
        delta = codec.decode(message, way_up, codec.shapes_of(adapter))
    except errors.CodecError as error:
        kind = errors.Poisoned if isinstance(error, errors.NotFinite) else WireError
        raise kind(f"its update cannot be decoded: {error}") from None
    return visit._replace(update=visit.update._replace(delta=delta))


def _with_control(visit: Visit, payload: Payload, terms: Terms) -> Visit:
    """The visit with what the server knows of its steps, for a method with control variates.

    Raises:
        WireError: the number of steps is not what every visit has in this run.
    """
    if not payload.extra:
        return visit
    validation.check_walk(visit.report, terms.config)
    lr_sum = schedule.lr_sum(terms.config, terms.number, visit.report.steps)
    return visit._replace(update=visit.update._replace(extra=payload.extra, lr_sum=lr_sum))
