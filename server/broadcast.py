"""What clients hold of the server's adapter, and what each is sent so that it holds the newest copy.

Only where the way down is coded: otherwise every message has the whole adapter in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from apiary.config.schema import RunConfig
from apiary.core.messages import ClientInfo
from apiary.core.tensors import StateDict, generator
from apiary.transport import downlink, from_config
from apiary.transport.downlink import Downlink, Parcel


class Copies:
    """The server's side of the way down: one copy for each rank, and which version of it each client holds.

    Only the copies outlast the process: who holds what, clients tell at the handshake. What a client holds after a
    message that it did not answer well is not known, so that it is sent the whole next time.

    Args:
        config: the run.
        saved: what `advance` returned, from a checkpoint; empty at first.
    """

    def __init__(self, config: RunConfig, saved: StateDict) -> None:
        self._codec, self._seed = from_config.configured_codec(config, "down"), config.seed
        self._links = _from_tensors(saved)  # by rank
        self._holds: dict[str, str] = {}  # by client
        self._sent: dict[str, str] = {}  # likewise, in the message that is under way
        self._parcels: dict[tuple[int, str], Parcel] = {}  # by rank and held version

    def greet(self, client: str, holds: str) -> None:
        """Note what a client says that it holds."""
        self._holds[client] = holds

    def pack(self, client: ClientInfo, adapter: StateDict) -> Parcel:
        """What a client is sent in place of `adapter`, which is what it would hold if all were sent as it is."""
        link = self._links.setdefault(client.rank, downlink.begin(adapter))
        held = self._holds.pop(client.client, "")
        held = held if downlink.knows(link, held) else ""  # all others get the whole, and share one parcel
        self._sent[client.client] = link.copy.version
        if (key := (client.rank, held)) not in self._parcels:
            self._parcels[key] = downlink.parcel(link, held)
        return self._parcels[key]

    def arrived(self, client: str) -> None:
        """Note that a client answered well, and so holds what it was sent."""
        self._holds[client] = self._sent.pop(client, "")

    def advance(self, number: int, adapter_of: Callable[[int], StateDict]) -> dict[str, Tensor]:
        """Move on after round `number`; returns all copies as tensors, for the checkpoint.

        Args:
            number: the round.
            adapter_of: by rank, what a client would now hold if all were sent as it is.
        """
        self._parcels = {}
        for rank, link in self._links.items():
            rng = generator(self._seed, number, rank, "down")
            self._links[rank] = downlink.advance(link, adapter_of(rank), self._codec, rng)
        return _to_tensors(self._links)


def _to_tensors(links: Mapping[int, Downlink]) -> dict[str, Tensor]:
    return {f"{rank}/{name}": t for rank, link in links.items() for name, t in downlink.to_tensors(link).items()}


def _from_tensors(tensors: StateDict) -> dict[int, Downlink]:
    by_rank: dict[int, dict[str, Tensor]] = {}
    for whole, tensor in tensors.items():
        rank, _, name = whole.partition("/")
        by_rank.setdefault(int(rank), {})[name] = tensor
    return {rank: downlink.from_tensors(parts) for rank, parts in by_rank.items()}
