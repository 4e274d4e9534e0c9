"""What clients are sent: the payload of each rank, the messages made of it, and how many bytes they take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from flwr.app import ArrayRecord, Message

from apiary.config.schema import RunConfig
from apiary.core.messages import ClientInfo, Payload
from apiary.core.tensors import StateDict
from apiary.transport import flower_records, from_config
from server import messaging
from server.broadcast import Broadcast
from server.membership import Member
from strategies import Aggregator, ServerState

Kind = Literal["train", "evaluate"]


class Source(NamedTuple):
    """What payloads are made from."""

    aggregator: Aggregator
    state: ServerState
    clients: int  # clients that the run knows in all, also those that are away


class _Made(NamedTuple):
    payload: Payload
    records: tuple[ArrayRecord, ...]  # as `_records` makes them


class Payloads:
    """Makes payloads, and the messages that carry them.

    It owns the payloads of the newest state, made once for each rank (and group of clients, where the method has such),
    with their Flower records, which all these clients share; the `Broadcast` where `wire.down` names a codec, which
    puts a parcel of changes in the adapter's place; and the count of bytes that parcels saved in messages made since
    `count_bytes` was last called.

    Args:
        config: the run.
        copies: the state of the broadcast, from a checkpoint; empty at first.
    """

    def __init__(self, config: RunConfig, copies: StateDict) -> None:
        whole = from_config.configured_codec(config, "down").whole
        self._broadcast = None if whole else Broadcast(config, copies)
        # By finished rounds, rank, group, and how many clients there are.
        self._made: dict[tuple[int, int, int | None, int], _Made] = {}
        self._saved_bytes = 0

    def payload(self, source: Source, client: ClientInfo) -> Payload:
        """What a client of this rank and group is sent, before any coding."""
        return self._make(source, client).payload

    def messages(self, kind: Kind, members: Iterable[Member], number: int, source: Source) -> list[Message]:
        """The messages of a round, one for each member.

        Args:
            kind: what the members are asked to do.
            members: who is asked.
            number: the round, from 1; 0 for the evaluation before the first one.
            source: what the payloads are made from.
        """
        return [self._message(kind, member, number, source) for member in members]

    def count_bytes(self, messages: Sequence[Message], suffix: str) -> dict[str, int]:
        """The bytes of the arrays in messages just made, as fields of an event.

        Args:
            messages: all that were made since the last call.
            suffix: of the fields' names.

        Returns:
            `bytes_SUFFIX`; and where parcels are sent, `float32_SUFFIX`: the bytes with whole adapters in their place.
        """
        size = sum(flower_records.array_bytes(message.content) for message in messages)
        saved, self._saved_bytes = self._saved_bytes, 0
        return {f"bytes_{suffix}": size, **({f"float32_{suffix}": size + saved} if self._broadcast else {})}

    def set_version(self, client: str, version: str) -> None:
        """Note the version of the adapter's copy that a client says it holds at the handshake."""
        if self._broadcast:
            self._broadcast.set_version(client, version)

    def confirm(self, client: str) -> None:
        """Note that a client sent a valid reply, and so holds what it was sent."""
        if self._broadcast:
            self._broadcast.confirm(client)

    def advance(self, number: int, source: Source) -> ServerState:
        """Move the broadcast on after the step of a round.

        Args:
            number: the round.
            source: with the state that the step led to.

        Returns:
            That state, with the broadcast's own in it.
        """
        if self._broadcast is None:
            return source.state
        copies = self._broadcast.advance(number, lambda rank: self.payload(source, ClientInfo("", rank, 0)).adapter)
        return source.state._replace(copies=copies)

    def _make(self, source: Source, client: ClientInfo) -> _Made:
        group = source.aggregator.group
        key = (source.state.round, client.rank, group(source.state, client.client) if group else None, source.clients)
        if key not in self._made:
            self._made = {old: made for old, made in self._made.items() if old[0] == key[0]}
            payload = source.aggregator.payload(source.state, client._replace(clients=source.clients))
            self._made[key] = _Made(payload, _records(payload))
        return self._made[key]

    def _message(self, kind: Kind, member: Member, number: int, source: Source) -> Message:
        payload, records = self._make(source, member.info)
        if self._broadcast:
            parcel = flower_records.parcel_arrays(self._broadcast.parcel(member.info, payload.adapter))
            self._saved_bytes += flower_records.record_bytes(records[0]) - flower_records.record_bytes(parcel)
            records = (parcel, *records[1:])
        mixes = source.aggregator.local.mixes
        parts = records if kind == "train" or mixes else records[:2]  # to be measured takes no control variate
        content = flower_records.request(number, *parts, last_round=member.info.last_round)
        return messaging.message(content, member.node, kind, number)


def _records(payload: Payload) -> tuple[ArrayRecord, ...]:
    """The records of a payload: adapter, base delta, tensors of the method's own."""
    return tuple(flower_records.to_arrays(part) for part in payload[:3])
