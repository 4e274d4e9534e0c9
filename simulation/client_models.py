"""The models that the clients of a finished simulation hold, where its method gives them models of their own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from apiary.config.schema import RunConfig
from apiary.core.errors import RunFailed, StateLost
from apiary.core.messages import ClientInfo
from apiary.core.tensors import StateDict
from apiary.models.adapters import LanguageModel
from apiary.tracking.event_log import read_events
from apiary.tracking.run_directory import CHECKPOINTS
from client import round_files
from client.worker import open_own, open_received
from server import checkpoint
from strategies import Aggregator


def of_clients(
    lm: LanguageModel, config: RunConfig, method: Aggregator, clients: Iterable[str], folder: Path
) -> dict[str, StateDict]:
    """What each client makes of what it would be sent after the last round, and of what it keeps.

    Args:
        lm: the model with an adapter of the run's rank.
        config: the run.
        method: its method.
        clients: whose models.
        folder: the run directory, with its newest checkpoint.

    Raises:
        RunFailed: the checkpoint of the last round, or a client's state that the method counts on, is gone or damaged.
    """
    found = checkpoint.load(folder / CHECKPOINTS, config)
    if found is None:
        raise RunFailed("the checkpoint of the last round is gone or damaged, and with it what clients share")
    state, last, made = found[0], found[1].get("last_round", {}), {}
    known = len(last.keys() | {event["client"] for event in read_events(folder) if event["event"] == "handshake"})
    for client in clients:
        info = ClientInfo(client, config.adapter.rank, last.get(client, 0), known)
        payload = method.payload(state, info)._replace(last_round=info.last_round)
        kept = round_files.of_method(folder / "clients" / client, method.local, config.rounds + 1, info.last_round)
        own = open_own(lm, config, method.local, kept, payload)
        try:
            made[client] = (own or open_received(lm, config, method.local, kept, payload)).over(payload).model
        except StateLost as error:
            raise RunFailed(f"{client}: {error}") from None
    return made


def with_groups(clients: Sequence[Mapping[str, Any]], events: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The `clients` part of metrics.json, with the group of each client that the log says is in one."""
    groups = {client: group for event in events for client, group in event.get("groups", {}).items()}
    return [{**row, **({"group": groups[row["client"]]} if row["client"] in groups else {})} for row in clients]
