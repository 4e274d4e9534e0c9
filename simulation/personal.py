"""Models of the clients' own after a simulated federation: made, kept in the run directory, and measured.

What a client makes and how it chooses is `client.personal`. Here its rows are dealt out in three parts that share no
question: it trains on one, chooses by another, and is reported on the third.

With `personal.enabled` the rows that choose were taken out of the training rows before round 1, so that no contender
has seen them. A run without such rows can have personal models all the same (`apiary personal`): the federated adapter
has then seen every training row, and a choice by any of them, cross-validation included, would lean towards it. There
half of the client's held-out rows chooses, the half that `apiary.data.federation.decides` names, and everything is
reported on the other half.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from apiary.config.schema import RunConfig
from apiary.core.files import finite, write_atomic
from apiary.core.tensors import StateDict, digest
from apiary.data import injection, store, tokenization
from apiary.data.examples import Example
from apiary.data.federation import Federation, decides, deciding_of
from apiary.data.tokenization import Template
from apiary.evaluation import comparison, intervals
from apiary.evaluation.comparison import HeldOut, Measured
from apiary.export.adapter_folder import WEIGHTS, save_adapter_folder
from apiary.export.personal import CHOICE, label, note, read_choice
from apiary.models import adapter_files
from apiary.models.adapters import LanguageModel
from apiary.report.data import OUTCOMES, gain_of
from apiary.tracking.event_log import RunLog
from apiary.tracking.run_directory import result_folders
from client.personal import candidates
from client.personal.candidates import Contest, Rows
from client.personal.choice import FEWEST
from simulation import adversaries
from simulation.visits import ClientVisits

_SET_APART = "training rows set apart before round 1, which nothing was trained on"
_HALF = "half of the client's held-out rows; figures are on the other half"


class OwnRows(NamedTuple):
    """A client's rows; no question is in two of the parts."""

    train: Sequence[Example]
    validation: Sequence[Example]  # that choose
    reported: Sequence[Example]  # that figures are on, and nothing else


class Made(NamedTuple):
    """A client's own model."""

    adapter: StateDict
    alone: StateDict  # training alone where it is best
    choice: dict[str, Any]  # the content of choice.json


def rows_of(federation: Federation, figures: Federation, config: RunConfig) -> dict[str, OwnRows]:
    """The parts of each client's rows.

    Args:
        federation: with all held-out rows.
        figures: with those alone that figures are on (`set_deciding_apart`).
        config: the run.
    """
    found = {}
    for client, shown in zip(federation.clients, figures.clients, strict=True):
        if config.personal.enabled:
            found[client.name] = OwnRows(client.train, client.validation, shown.test)
            continue
        rest = np.flatnonzero(np.fromiter((not decides(row) for row in shown.test), bool))
        found[client.name] = OwnRows(client.train, deciding_of(client.test), store.pick(shown.test, rest))
    return found


class Home(NamedTuple):
    """Where and with what clients' own models are made."""

    config: RunConfig
    lm: LanguageModel  # the base with an adapter of the server's rank
    template: Template
    folder: Path  # the run directory


def make_and_measure(
    home: Home,
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
    made = make_all(home, federated, honest, took_part, log)
    return measure_all(home, made, federated, local, honest, held_out)


def make_all(
    home: Home,
    federated: Mapping[str, StateDict],
    rows: Mapping[str, OwnRows],
    took_part: Sequence[ClientVisits],
    log: RunLog,
) -> dict[str, Made]:
    """Make and choose each client's own model, and keep it in the run directory; what is there already is taken.

    A client trains on the rows that curation last left it, with as many steps as a multiple of its own in the
    federation; one that never took part counts as the client with the most.

    Args:
        home: where and with what.
        federated: each client's model from the federation.
        rows: each client's rows.
        took_part: what the clients did.
        log: receives `personal` events.
    """
    visits = {one.client: one for one in took_part}
    most = max((one.total for one in took_part), default=1)
    made = {}
    for done, (client, own) in enumerate(rows.items(), 1):
        began = time.monotonic()
        if visited := visits.get(client):
            own = own._replace(train=visited.choices[max(visited.choices)])
        task = _Task(client, visited.total if visited else most, federated[client], own)
        made[client] = _kept(home, task) or _make(home, task)
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


class _Task(NamedTuple):
    """One client's model that is to be made."""

    client: str
    steps: int  # that it made in the federation
    federated: StateDict
    rows: OwnRows

    def places(self, folder: Path) -> tuple[Path, Path]:
        """The folders of its own model and of its training alone."""
        found = result_folders(folder)
        return found.personal / self.client, found.alone_best / self.client

    def seal(self, config: RunConfig) -> str:
        """What the model follows from, as hex digits; one of another seal is made anew."""
        settings = config.model_dump(mode="json", include={"seed", "model", "adapter", "prompt", "train", "personal"})
        settings["train"].pop("threads")
        rows = [len(part) for part in self.rows[:2]]
        parts = [digest(self.federated, 64), json.dumps(settings, sort_keys=True), self.steps, *rows]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _kept(home: Home, task: _Task) -> Made | None:
    """The model of this seal that stands in the run directory already; None where it does not."""
    own, alone = task.places(home.folder)
    choice = read_choice(own)
    if choice is None or choice.get("seal") != task.seal(home.config):
        return None
    if not ((own / WEIGHTS).exists() and (alone / WEIGHTS).exists()):
        return None
    adapter, best = (adapter_files.read_adapter(home.lm, place / WEIGHTS) for place in (own, alone))
    return Made(adapter, best, choice)


def _make(home: Home, task: _Task) -> Made:
    config, lm, template, folder = home
    train = injection.encode_training(task.rows.train, template, lm.tokenizer, config.prompt)
    drawn = comparison.evenly(task.rows.validation, config)
    validation = tokenization.encode_all(drawn, template, lm.tokenizer, config.prompt)
    found = candidates.contest(lm, config, task.client, task.steps, task.federated, Rows(train, validation))
    choice = {"schema": 1, "seal": task.seal(config), **_told(config, task, found, len(train))}
    own, alone = task.places(folder)
    save_adapter_folder(lm, found.alone, alone, config, folder, note=note({"kept": "alone", "weight": 1.0}))
    save_adapter_folder(lm, found.adapter, own, config, folder, note=note(choice))
    write_atomic(own / CHOICE, json.dumps(finite(choice), indent=1) + "\n")
    made = _kept(home, task)  # what is measured is what was written
    if made is None:
        raise OSError(f"{str(own)!r} cannot be read again")
    return made


def _told(config: RunConfig, task: _Task, found: Contest, trained: int) -> dict[str, Any]:
    """What was chosen and why; see docs/personal.md."""
    choice, candidates = found.choice, found.candidates
    kept = candidates[choice.chosen]
    alone = next(candidate for candidate in candidates if candidate.kind == "alone")
    return {
        "client": task.client,
        "kept": kept.kind,
        "weight": kept.weight,
        "steps": kept.steps,
        "federation_steps": task.steps,
        "alone_steps": alone.steps,
        "why": _why(config, found),
        "rows": {
            "train": trained,
            "validation": len(found.tokens),
            "chosen_by": _SET_APART if config.personal.enabled else _HALF,
        },
        "settings": config.personal.model_dump(mode="json"),
        "candidates": [
            {
                "kind": candidate.kind,
                "weight": candidate.weight,
                "steps": candidate.steps,
                "distance": candidate.distance,
                "loss": loss,
                "behind": loss - choice.losses[choice.best],
                "error": error,
            }
            for candidate, loss, error in zip(candidates, choice.losses, choice.errors, strict=True)
        ],
        "curves": found.curves,
    }


def _why(config: RunConfig, found: Contest) -> str:
    """The reason for a choice, as a sentence's end."""
    choice, count = found.choice, len(found.tokens)
    if not choice.enough:
        if count >= FEWEST:
            return "no candidate gives a number on the validation rows, so nothing speaks against the federated model"
        return f"{count} validation rows are too few to choose by, where {FEWEST} are needed: the federated model stays"
    best = found.candidates[choice.best]
    named, margin = label(best.kind, best.weight), f"{config.personal.margin:g}"
    if choice.chosen == choice.best:
        return f"it has the lowest loss of {len(found.candidates)} candidates on {count} validation rows"
    return (
        f"it is the nearest to the federated model of those that {count} validation rows cannot tell, by {margin} "
        f"standard errors, from the one with the lowest loss: {named}"
    )


# -- measuring -------------------------------------------------------------------------------------------------------


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
        home: where and with what.
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
        own = comparison.prepare(rows[client].reported, home.template, home.lm, loss_only)
        runs = {name: comparison.measure(home.lm, state, own, loss_only) for name, state in states.items()}
        if not own.examples:
            runs = {}
        for name in ("federated", "personal"):
            if id(states[name]) not in seen:  # most methods have one federated model for all clients
                seen[id(states[name])] = comparison.measure(home.lm, states[name], everyone, loss_only).loss
        found[client] = {
            **{key: one.choice[key] for key in _SHOWN},
            **_on_own(runs, config.seed),
            "mix_loss": {name: seen[id(states[name])] for name in ("federated", "personal")},
        }
    return Figures(found, _whole(config, found))


_SHOWN = ("kept", "weight", "steps", "federation_steps", "alone_steps", "why", "rows", "curves")  # of choice.json


def _on_own(runs: Mapping[str, Measured], seed: int) -> dict[str, Any]:
    """Losses on a client's own rows with their intervals, and of its own model the differences to the others."""
    return {
        "own": {name: run.loss for name, run in runs.items()},
        "own_ci95": {name: comparison.table_row(name, run, seed)["ci95"]["loss"] for name, run in runs.items()},
        "own_paired": comparison.differences(runs, seed, "personal") if runs else {},
    }


_STEPS = {  # of choice.json: the steps behind each row
    "local": "federation_steps",
    "local_best": "alone_steps",
    "federated": "federation_steps",
    "personal": "steps",
}


def _whole(config: RunConfig, clients: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The run's part: a row for each way, as means over clients, and how many gain by their own model."""
    measured = [client for client in clients.values() if client["own"]]
    steps = {
        "local": "federation_steps",
        "local_best": "alone_steps",
        "federated": "federation_steps",
        "personal": "steps",
    }
    table = []
    for name, key in steps.items():
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
