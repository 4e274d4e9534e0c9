"""Models of the clients' own after a simulated federation: made, kept in the run directory, and measured.

What a client makes, how it chooses, and how its rows are dealt out for that, is `client.personal`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from apiary.config.schema import RunConfig
from apiary.core.tensors import StateDict
from apiary.data.federation import Federation
from apiary.evaluation import comparison, intervals
from apiary.evaluation.comparison import HeldOut
from apiary.report.data import OUTCOMES, gain_of
from apiary.tracking.event_log import RunLog
from apiary.tracking.run_directory import CHECKPOINTS, result_folders
from client.personal import own_model
from client.personal.own_model import SHOWN, STEPS, Home, Made, OwnRows, Task
from server import checkpoint
from simulation import adversaries
from simulation.visits import ClientVisits
from strategies.from_config import local_from_config


def quarters(config: RunConfig) -> tuple[int, ...]:
    """The rounds before the last whose shared model clients look at with their validation rows, where any do."""
    if not config.personal.enabled or local_from_config(config).personal:
        return ()
    return tuple(sorted({math.ceil(config.rounds * part / 4) for part in (1, 2, 3)} - {config.rounds}))


def rows_of(federation: Federation, figures: Federation, config: RunConfig) -> dict[str, OwnRows]:
    """The parts of each client's rows.

    Args:
        federation: with all held-out rows.
        figures: with those alone that figures are on (`set_deciding_apart`).
        config: the run.
    """
    pairs = zip(federation.clients, figures.clients, strict=True)
    return {client.name: own_model.rows_of(client, shown.test, config) for client, shown in pairs}


def make_and_measure(
    home: Home,
    folder: Path,
    federated: Mapping[str, StateDict],
    rows: Mapping[str, OwnRows],
    took_part: Sequence[ClientVisits],
    local: Mapping[str, StateDict],
    held_out: HeldOut,
    log: RunLog,
) -> Figures:
    """`make_all` for all clients but those that a simulation makes attack, and `measure_all`."""
    hostile = adversaries.attackers(home.config, list(rows))
    honest = {client: own for client, own in rows.items() if client not in hostile}
    log.event("phase", name="personal models")
    made = make_all(home, folder, federated, honest, took_part, local, log)
    return measure_all(home, made, federated, local, honest, held_out)


def make_all(
    home: Home,
    folder: Path,
    federated: Mapping[str, StateDict],
    rows: Mapping[str, OwnRows],
    took_part: Sequence[ClientVisits],
    local: Mapping[str, StateDict],
    log: RunLog,
) -> dict[str, Made]:
    """Make and choose each client's own model, and keep it in the run directory; what is there already is taken.

    A client trains on the rows that curation last left it, with as many steps as a multiple of its own in the
    federation; one that never took part counts as the client with the most.

    Args:
        home: with what.
        folder: the run directory.
        federated: each client's model from the federation.
        rows: each client's rows.
        took_part: what the clients did.
        local: each client's training alone in the federation's steps, where it was trained.
        log: receives `personal` events.
    """
    visits = {one.client: one for one in took_part}
    finished = max((max(one.steps) for one in took_part), default=0)
    most = max((one.total for one in took_part), default=1)
    made, places = {}, result_folders(folder)
    states = {n: checkpoint.load_round(folder / CHECKPOINTS, n) for n in quarters(home.config) if n < finished}
    shared = {number: state.model for number, state in states.items() if state is not None}
    for done, (client, own) in enumerate(rows.items(), 1):
        began = time.monotonic()
        if visited := visits.get(client):
            own = own._replace(train=visited.choices[max(visited.choices)])
        steps = visited.total if visited else most
        where = places.personal / client, places.alone_best / client
        known = local.get(client) if visited and _alike(home.config, visited, finished) else None
        # Rounds in which a client was not asked are no further look; the last one is the federated model itself.
        by_steps = {visited.until(number): state for number, state in shared.items()} if visited else {}
        earlier = [(made_by_then, state) for made_by_then, state in by_steps.items() if 0 < made_by_then < steps]
        task = Task(client, steps, federated[client], own, *where, local=known, earlier=earlier)
        try:
            made[client] = own_model.kept(home, task) or own_model.make(home, task)
        except own_model.NothingToTrain:
            log.event("warning", message=f"{client} makes no model of its own: none of its rows can be trained on")
            continue
        kept = made[client].choice
        log.event(
            "personal",
            client=client,
            kept=kept["kept"],
            weight=kept["weight"],
            done=done,
            total=len(rows),
            seconds=time.monotonic() - began,
        )
    return made


def _alike(config: RunConfig, visited: ClientVisits, finished: int) -> bool:
    """Whether the baseline `local` is trained as candidates are: one rank, the same rows and factors, to the end."""
    adapter = config.adapter
    return (
        adapter.train != "alternate" and not adapter.ranks and len(visited.choices) == 1 and finished == config.rounds
    )


class Figures(NamedTuple):
    """What the clients' own models come to, for metrics.json."""

    clients: dict[str, dict[str, Any]]  # `personal` of each client
    whole: dict[str, Any]  # the part `personal` of the run


def measure_all(
    home: Home,
    made: Mapping[str, Made],
    federated: Mapping[str, StateDict],
    local: Mapping[str, StateDict],
    rows: Mapping[str, OwnRows],
    held_out: HeldOut,
) -> Figures:
    """Every client's own model beside the others, on rows that neither trained nor chose.

    Args:
        home: with what.
        made: the clients' own models.
        federated: each client's model from the federation.
        local: each client's training alone in the federation's steps, where it was trained.
        rows: each client's rows.
        held_out: everyone's held-out rows.
    """
    config = home.config
    loss_only = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"generate": False})})
    everyone, seen = held_out._replace(questions=()), dict[int, float]()
    found = {}
    for client, one in made.items():
        states = {
            **({"local": local[client]} if client in local else {}),
            "local_best": one.alone,
            "federated": federated[client],
            "personal": one.adapter,
        }
        on_own = own_model.on_own_rows(home, states, rows[client].reported)
        for name in ("federated", "personal"):
            if id(states[name]) not in seen:  # most methods have one federated model for all clients
                seen[id(states[name])] = comparison.measure(home.lm, states[name], everyone, loss_only).loss
        found[client] = {
            **{key: one.choice[key] for key in SHOWN},
            **on_own,
            "mix_loss": {name: seen[id(states[name])] for name in ("federated", "personal")},
        }
    return Figures(found, _whole(config, found))


def _whole(config: RunConfig, clients: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The run's part: a row for each way, as means over clients, and how many gain by their own model."""
    measured = [client for client in clients.values() if client["own"]]
    table = []
    for name, key in STEPS.items():
        having = [client for client in measured if name in client["own"]]
        if not having:
            continue
        losses = [client["own"][name] for client in having]
        ends = intervals.over_clients(losses)
        table.append(
            {
                "method": name,
                "own": sum(losses) / len(losses),
                "own_ci95": None if ends is None else list(ends),
                "steps": round(sum(client[key] for client in having) / len(having)),
                **(
                    {"mix": sum(client["mix_loss"][name] for client in having) / len(having)}
                    if name in ("federated", "personal")
                    else {}
                ),
            }
        )
    gain = gain_of(
        (name, c["own"].get("local_best"), c["own"].get("personal"), c["own_paired"].get("local_best"))
        for name, c in clients.items()
    )
    told = {"set_apart": config.personal.enabled, "settings": config.personal.model_dump(mode="json"), "table": table}
    if gain is None:
        return told
    counts = {outcome.replace(" ", "_"): gain.count(outcome) for outcome in OUTCOMES}
    return {**told, "gain": {**counts, "mean": gain.mean, "mean_ci95": gain.mean_ends, "over": "clients"}}
