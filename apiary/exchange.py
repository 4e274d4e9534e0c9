"""What travels between server and clients, as plain frozen types. `apiary.records` puts these on the wire."""

from __future__ import annotations

from typing import NamedTuple

from apiary.tensors import StateDict


class Fingerprint(NamedTuple):
    """Digests that must agree between server and client, or their numbers mean different things."""

    base: str  # names, shapes and sampled bytes of the frozen weights
    tokenizer: str  # vocabulary, merges and special tokens
    template: str  # how an example becomes text, and the chat template if it is used
    adapter: str  # names and shapes of what is trained


class Hello(NamedTuple):
    """A client's answer to the handshake."""

    client: str
    fingerprint: Fingerprint
    rank: int
    examples: int  # training examples
    tokens: int  # response tokens in them, which is what is trained


class ClientInfo(NamedTuple):
    """What the server knows of a client when it makes its payload."""

    client: str
    rank: int
    last_round: int  # 0 = never took part


class Payload(NamedTuple):
    """What the server sends to one client."""

    adapter: StateDict
    base_delta: StateDict  # low-rank factors to fold into the base; may be empty


class Update(NamedTuple):
    """What a client sends back: the change from the adapter that it received."""

    client: str
    delta: StateDict
    weight: float
    rank: int


class FitReport(NamedTuple):
    """Counts of one visit; nothing in it says what the data holds."""

    tokens: int  # response tokens trained
    examples: int
    steps: int
    loss: float  # mean nats per trained token
    seconds: float


class Score(NamedTuple):
    """Sums over held-out examples, so that scores of several clients add up."""

    nats: float
    tokens: int
    examples: int

    @property
    def loss(self) -> float:
        """Nats per response token (NaN when there are none)."""
        return self.nats / self.tokens if self.tokens else float("nan")
