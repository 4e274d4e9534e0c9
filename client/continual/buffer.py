"""The replay buffer: which rows it keeps of those that came, as a pure function of their digests."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import NamedTuple

from apiary.config.schema import ContinualConfig
from apiary.core.seeds import derive_seed
from apiary.data.examples import Example
from apiary.data.turns import conversation_text


class Rule(NamedTuple):
    """Which rows stay: the `rows` of least priority (reservoir), or each one with `chance` (poisson)."""

    key: bytes  # of the priorities
    rows: int | None
    chance: float = 1.0


class BufferedRow(NamedTuple):
    """A row in the buffer."""

    digest: str  # of its conversation, SHA-256 in hex
    stage: int  # from 0
    example: Example


class Buffer(NamedTuple):
    """Rows of finished stages, by rising priority."""

    rule: Rule
    rows: tuple[BufferedRow, ...] = ()


def buffer_rule(config: ContinualConfig, seed: int, client: str, rows: int) -> Rule:
    """The rule of a client that has so many training rows over all stages."""
    key = derive_seed(seed, client, "buffer").to_bytes(8, "big")
    share = config.buffer if config.buffer < 1 else min(1.0, int(config.buffer) / max(rows, 1))
    if config.policy == "poisson":
        return Rule(key, None, share)
    if 0 < config.buffer < 1:
        return Rule(key, max(1, round(share * rows)))
    return Rule(key, int(config.buffer))


def row_digest(example: Example) -> str:
    """SHA-256 of the conversation; tags do not count."""
    return hashlib.sha256((conversation_text(example.turns) + example.tools).encode()).hexdigest()


def priority(digest: str, key: bytes) -> int:
    """A row's place in [0, 2^64), uniform over keys and independent between rows."""
    return int.from_bytes(hashlib.blake2b(bytes.fromhex(digest), key=key, digest_size=8).digest(), "big")


def admit(buffer: Buffer, rows: Iterable[Example], stage: int) -> Buffer:
    """The buffer after the rows of a stage were offered to it; a conversation is kept once, however often it comes.

    A reservoir keeps the M rows of least priority of all ever offered, which is a uniform sample of them without
    replacement (Vitter 1985, in the form by random keys). Under "poisson" each row stays or goes by itself, whatever
    else there is, as differential privacy has it.
    """
    key = buffer.rule.key
    offered = [*buffer.rows, *(BufferedRow(row_digest(row), stage, row) for row in rows)]
    # Of equal conversations the one of the earliest stage stays, whichever came first.
    offered.sort(key=lambda row: (row.digest, row.stage, sorted(row.example.tags.items())))
    once = {row.digest: row for row in reversed(offered)}
    ranked = sorted((priority(digest, key), digest) for digest in once)
    limit = buffer.rule.chance * 2.0**64
    return Buffer(buffer.rule, tuple(once[digest] for rank, digest in ranked if rank < limit)[: buffer.rule.rows])
