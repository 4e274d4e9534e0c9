"""Broadcast of the adapter as coded changes: which copy of it each client holds, and what brings it to the newest one.

It is used where `wire.down` names a codec; otherwise every message has the whole adapter in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from apiary.config.schema import RunConfig
from apiary.core.messages import ClientInfo
from apiary.core.tensors import StateDict, generator
from apiary.transport import downlink, from_config
from apiary.transport.downlink import Downlink, Parcel


class Broadcast:
    """The server's side of the coded way down.

    It owns one downlink for each rank (the copy that clients of the rank hold, and the changes that led to it) and the
    version of the copy that each client holds. Only the downlinks are in the checkpoint: clients say at the handshake
    which version they hold. After a message without a valid reply it is not known what its client holds, so the client
    is sent the whole copy next time.

    Args:
        config: the run.
        saved: what `advance` returned, from a checkpoint; empty at first.
    """

    def __init__(self, config: RunConfig, saved: StateDict) -> None:
        self._codec, self._seed = from_config.configured_codec(config, "down"), config.seed
        self._downlinks = _from_tensors(saved)  # by rank
        self._versions: dict[str, str] = {}  # by client, the version that it holds
        self._sent_versions: dict[str, str] = {}  # by client, the version that its message under way leads to
        self._parcels: dict[tuple[int, str], Parcel] = {}  # by rank and held version

    def set_version(self, client: str, version: str) -> None:
        """Note the version that a client says it holds ("" for none)."""
        self._versions[client] = version

    def parcel(self, client: ClientInfo, adapter: StateDict) -> Parcel:
        """What a client is sent in place of an adapter.

        Args:
            client: the receiver.
            adapter: what a client of its rank is sent where nothing is coded; a new downlink starts from it.
        """
        link = self._downlinks.setdefault(client.rank, downlink.begin(adapter))
        held = self._versions.pop(client.client, "")
        held = held if downlink.knows(link, held) else ""  # all others get the whole copy, and share one parcel
        self._sent_versions[client.client] = link.copy.version
        if (key := (client.rank, held)) not in self._parcels:
            self._parcels[key] = downlink.parcel(link, held)
        return self._parcels[key]

    def confirm(self, client: str) -> None:
        """Note that a client sent a valid reply, and so holds what it was sent."""
        self._versions[client] = self._sent_versions.pop(client, "")

    def advance(self, number: int, adapter_of: Callable[[int], StateDict]) -> dict[str, Tensor]:
        """Move all copies on after a round.

        Args:
            number: the round.
            adapter_of: by rank, what a client is now sent where nothing is coded.

        Returns:
            All downlinks as tensors, for the checkpoint.
        """
        self._parcels = {}
        for rank, link in self._downlinks.items():
            rng = generator(self._seed, number, rank, "down")
            self._downlinks[rank] = downlink.advance(link, adapter_of(rank), self._codec, rng)
        return _to_tensors(self._downlinks)


def _to_tensors(downlinks: Mapping[int, Downlink]) -> dict[str, Tensor]:
    return {f"{rank}/{name}": t for rank, link in downlinks.items() for name, t in downlink.to_tensors(link).items()}


def _from_tensors(tensors: StateDict) -> dict[int, Downlink]:
    by_rank: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        rank, _, name = key.partition("/")
        by_rank.setdefault(int(rank), {})[name] = tensor
    return {rank: downlink.from_tensors(parts) for rank, parts in by_rank.items()}
