"""The models that the clients of a finished simulation hold, where its method gives them models of their own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from apiary.config.schema import RunConfig
from apiary.core.errors import RunFailed
from apiary.core.messages import ClientInfo
from apiary.core.tensors import StateDict
from apiary.models.adapters import LanguageModel
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
        RunFailed: the checkpoint of the last round is gone or damaged.
    """
    found = checkpoint.load(folder / CHECKPOINTS, config)
    if found is None:
        raise RunFailed("the checkpoint of the last round is gone or damaged, and with it what clients share")
    state, made = found[0], {}
    for client in clients:
        payload = method.payload(state, ClientInfo(client, config.adapter.rank, state.round))
        kept = round_files.newest(folder / "clients" / client, method.local.keeps, config.rounds + 1)
        own = open_own(lm, config, method.local, kept, payload)
        adapter = (own or open_received(lm, config, method.local, kept, payload)).adapter
        made[client] = payload._replace(adapter=adapter).model
    return made


def with_groups(clients: Sequence[Mapping[str, Any]], events: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The `clients` part of metrics.json, with the group of each client that the log says is in one."""
    groups = {client: group for event in events for client, group in event.get("groups", {}).items()}
    return [{**row, **({"group": groups[row["client"]]} if row["client"] in groups else {})} for row in clients]
