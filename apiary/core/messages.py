"""What travels between server and clients, as plain frozen types.

`apiary.transport.flower_records` puts these on the wire.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

from apiary.core import lora
from apiary.core.tensors import StateDict

_NOTHING: StateDict = MappingProxyType({})
COUNT_POLICIES = ("exact", "rounded", "declared")  # `apiary.core.counts.CountPolicy.kind`


class Fingerprint(NamedTuple):
    """Digests that must agree between server and client, or their numbers mean different things."""

    base: str  # names, shapes and sampled bytes of the frozen weights
    tokenizer: str  # vocabulary, merges and special tokens
    template: str  # how an example becomes text, and the chat template if it is used
    adapter: str  # names and shapes of what is trained


class Hello(NamedTuple):
    """A client's answer to the handshake.

    Under record-level privacy it tells no counts: they depend on the rows.
    """

    client: str
    fingerprint: Fingerprint
    rank: int
    examples: int | None  # training examples, as the client's policy lets it tell them; None where privacy withholds it
    tokens: int | None  # response tokens in them, which is what is trained; likewise
    holds: str = ""  # the version of the server's adapter that it holds, where changes alone travel down
    counts: str = "exact"  # its policy: how it tells its counts, one of `COUNT_POLICIES`


class ClientInfo(NamedTuple):
    """What the server knows of a client when it makes its payload."""

    client: str
    rank: int
    last_round: int  # 0 = never took part
    clients: int = 1  # that the run knows in all, also those that are away


class Payload(NamedTuple):
    """What the server sends to one client."""

    adapter: StateDict
    base_delta: StateDict  # low-rank factors to add to the base, of scale 1; may be empty
    extra: StateDict = _NOTHING  # tensors of the method's own for those who train, such as a control variate
    last_round: int = 0  # the last round in which this client's answer counted; 0 = none

    @property
    def model(self) -> StateDict:
        """Both as one state, as `apiary.models.adapters.set_adapter` takes it."""
        return lora.whole(self.adapter, self.base_delta)


class Update(NamedTuple):
    """What a client sends back: the change from the adapter that it received."""

    client: str
    delta: StateDict
    weight: float
    rank: int
    # Where the method sends tensors of its own, what the server knows of the visit; neither travels.
    extra: StateDict = _NOTHING  # those that the client was sent
    lr_sum: float = 0.0  # the sum of its steps' learning rates


class FitReport(NamedTuple):
    """Counts of one visit, told as the client's policy says; nothing in it says what the data holds.

    Under differential privacy the counts are the expected ones, which depend on public numbers alone.
    """

    tokens: int  # response tokens trained that are new, not replayed
    examples: int
    steps: int
    loss: float  # mean nats per trained token; NaN where privacy withholds it, or a site that walked too few rows
    seconds: float  # NaN where privacy withholds it: a step takes longer when more rows are drawn
    replayed: int = 0  # response tokens trained from the client's buffer


class CurationCounts(NamedTuple):
    """What curation did to a client's training rows, as counts."""

    rows: int
    kept: int
    dropped: Mapping[str, int] = MappingProxyType({})  # by step


class Spent(NamedTuple):
    """What a client's training rows have spent of their privacy budget, all told."""

    epsilon: float  # by the run's accountant, `privacy.accountant`; the one that the budget bounds
    epsilon_rdp: float  # by Rényi divergences, whichever the accountant is
    delta: float
    noise_multiplier: float
    sample_rate: float
    steps: int


class Visit(NamedTuple):
    """A client's whole answer to a round."""

    update: Update
    report: FitReport
    curated: CurationCounts | None = None
    spent: Spent | None = None


class Decline(NamedTuple):
    """A client's answer when it rightly does not train."""

    client: str
    reason: Literal["idle", "budget"]  # it has no rows for this stage, or too few; its privacy budget is spent


class Score(NamedTuple):
    """Sums over held-out examples, so that scores of several clients add up."""

    nats: float
    tokens: int
    examples: int

    @property
    def loss(self) -> float:
        """Nats per response token (NaN when there are none)."""
        return self.nats / self.tokens if self.tokens else float("nan")
