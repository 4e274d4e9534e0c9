"""A client's own model, from its rows to a folder: what it trains on, what chooses, what is kept, and its figures.

A client's rows are dealt out in three parts that share no question: it trains on one, chooses by another, and is
reported on the third.

With `personal.enabled` the rows that choose were taken out of the training rows before round 1, so that no contender
has seen them. A run without such rows can have own models all the same: the federated adapter has then seen every
training row, and a choice by any of them, cross-validation included, would lean towards it. There half of the client's
held-out rows chooses, the half that `apiary.data.federation.decides` names, and everything is reported on the other
half.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from apiary.config.schema import RunConfig
from apiary.core.errors import UserError
from apiary.core.files import finite, write_atomic
from apiary.core.tensors import StateDict, digest
from apiary.data import injection, store, tokenization
from apiary.data.examples import Example
from apiary.data.federation import ClientData, decides, deciding_of
from apiary.data.tokenization import Template
from apiary.evaluation import comparison
from apiary.evaluation.comparison import Measured
from apiary.export.adapter_folder import WEIGHTS, save_adapter_folder
from apiary.export.personal import CHOICE, label, note, read_choice
from apiary.models import adapter_files, gates
from apiary.models.adapters import LanguageModel
from client.personal import candidates
from client.personal.candidates import Contest, Rows
from client.personal.choice import FEWEST
from client.site import local_algorithm

_SET_APART = "training rows set apart before round 1, which nothing was trained on"
_HALF = "half of the client's held-out rows; figures are on the other half"


class OwnRows(NamedTuple):
    """A client's rows; no question is in two of the parts."""

    train: Sequence[Example]
    validation: Sequence[Example]  # that choose
    reported: Sequence[Example]  # that figures are on, and nothing else


def rows_of(client: ClientData, shown: Sequence[Example], config: RunConfig) -> OwnRows:
    """The parts of a client's rows.

    Args:
        client: with all of its held-out rows.
        shown: those of its held-out rows alone that figures are on (`set_deciding_apart`).
        config: the run.
    """
    if config.personal.enabled:
        return OwnRows(client.train, client.validation, shown)
    rest = np.flatnonzero(np.fromiter((not decides(row) for row in shown), bool))
    return OwnRows(client.train, deciding_of(client.test), store.pick(shown, rest))


def only_personal(overrides: Sequence[str]) -> Sequence[str]:
    """The settings, once they are known to say only how own models are made.

    Raises:
        UserError: one says something else.
    """
    fixed = ("enabled", "validation")
    for text in overrides:
        key = text.partition("=")[0].strip()
        if not key.startswith("personal."):
            raise UserError(f"-s {key}: the run is over; only keys of personal can be set, such as personal.budget=3")
        if key.removeprefix("personal.") in fixed:
            raise UserError(f"-s {key}: it says which rows the run trained on, and the run is over; leave it out")
    return overrides


class Home(NamedTuple):
    """With what own models are made."""

    config: RunConfig
    lm: LanguageModel  # the base with an adapter of the server's rank
    template: Template


class Task(NamedTuple):
    """One client's model that is to be made."""

    client: str
    steps: int  # that it made in the federation
    federated: StateDict
    rows: OwnRows
    own: Path  # the folder of its own model
    alone: Path  # of its training alone; may lie in the other one
    local: StateDict | None = None  # training alone in as many steps, where a simulation has it as a baseline
    earlier: Sequence[tuple[int, StateDict]] = ()  # the federated model after so many of its steps, likewise

    def seal(self, config: RunConfig) -> str:
        """What the model follows from, as hex digits; one of another seal is made anew."""
        settings = config.model_dump(mode="json", include={"seed", "model", "adapter", "prompt", "train", "personal"})
        settings["train"].pop("threads")
        rows = [_digest(part) for part in self.rows[:2]]
        known = digest(self.local, 64) if self.local else ""
        before = [(steps, digest(state, 64)) for steps, state in self.earlier]
        parts = [digest(self.federated, 64), known, before, json.dumps(settings, sort_keys=True), self.steps, *rows]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _digest(rows: Sequence[Example]) -> str:
    read = hashlib.sha256()
    for row in rows:
        read.update(repr(row).encode("utf-8", "surrogatepass"))
    return read.hexdigest()


class Made(NamedTuple):
    """A client's own model."""

    adapter: StateDict
    alone: StateDict  # training alone where it is best
    choice: dict[str, Any]  # the content of choice.json


def kept(home: Home, task: Task) -> Made | None:
    """The model of this seal that stands in its folder already; None where it does not."""
    choice = read_choice(task.own)
    if choice is None or choice.get("seal") != task.seal(home.config):
        return None
    weights = [place / WEIGHTS for place in (task.own, task.alone)]
    if not all(file.exists() for file in weights):
        return None
    adapter, best = (adapter_files.read_adapter(home.lm, file) for file in weights)
    return Made(adapter, best, choice)


class NothingToTrain(Exception):
    """No row of a client can be trained on: curation left none, or none fits `prompt.max_tokens`."""


def make(home: Home, task: Task) -> Made:
    """Make a client's candidates, choose one, and keep it with its reasons, and training alone beside it.

    Raises:
        NothingToTrain: no row can be trained on.
        OSError: a folder cannot be written.
    """
    config, lm, template = home
    train = injection.encode_training(task.rows.train, template, lm.tokenizer, config.prompt)
    if not len(train):
        raise NothingToTrain
    drawn = comparison.evenly(task.rows.validation, config)
    validation = tokenization.encode_all(drawn, template, lm.tokenizer, config.prompt)
    rows = Rows(train, validation)
    found = candidates.contest(lm, config, task.client, task.steps, task.federated, rows, task.local, task.earlier)
    choice = {"schema": 1, "seal": task.seal(config), **_told(config, task, found, len(train))}
    # What other models than training alone were made of, where the method's own cannot be in a folder.
    about = gates.FIXED if local_algorithm(config).mixes and choice["kept"] != "alone" else ""
    save_adapter_folder(lm, found.adapter, task.own, config, note=note(choice), about=about)
    save_adapter_folder(lm, found.alone, task.alone, config, note=note({"kept": "alone", "weight": 1.0}))
    write_choice(task.own, choice)  # last: what has one is whole
    made = kept(home, task)  # what is measured is what was written
    if made is None:
        raise OSError(f"{str(task.own)!r} cannot be read again")
    return made


def write_choice(folder: Path, choice: Mapping[str, Any]) -> None:
    """Write `choice.json`."""
    write_atomic(folder / CHOICE, json.dumps(finite(choice), indent=1) + "\n")


def _told(config: RunConfig, task: Task, found: Contest, trained: int) -> dict[str, Any]:
    """What was chosen and why; see docs/personal.md."""
    choice, contenders = found.choice, found.candidates
    chosen = contenders[choice.chosen]
    alone = next(candidate for candidate in contenders if candidate.kind == "alone")
    return {
        "client": task.client,
        "kept": chosen.kind,
        "weight": chosen.weight,
        "steps": chosen.steps,
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
            for candidate, loss, error in zip(contenders, choice.losses, choice.errors, strict=True)
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
    named, margin = label(best.kind, best.weight), config.personal.margin
    errors = "one standard error" if margin == 1 else f"{margin:g} standard errors"
    if choice.chosen == choice.best:
        return f"it has the lowest loss of {len(found.candidates)} candidates on {count} validation rows"
    return (
        f"it is the nearest to the federated model of those that {count} validation rows cannot tell, by {errors}, "
        f"from the one with the lowest loss: {named}"
    )


# -- measuring -------------------------------------------------------------------------------------------------------

SHOWN = ("kept", "weight", "steps", "federation_steps", "alone_steps", "why", "rows", "curves")  # of choice.json
STEPS: Mapping[str, str] = {  # of choice.json: the steps behind each model
    "local": "federation_steps",
    "local_best": "alone_steps",
    "federated": "federation_steps",
    "personal": "steps",
}


def on_own_rows(home: Home, states: Mapping[str, StateDict], reported: Sequence[Example]) -> dict[str, Any]:
    """Losses on a client's reported rows with their intervals, and of its own model the differences to the others.

    Args:
        home: with what.
        states: the models by name, `personal` among them.
        reported: the rows; with none that can be used there are no figures.
    """
    config = home.config
    loss_only = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"generate": False})})
    own, runs = comparison.prepare(reported, home.template, home.lm, loss_only), dict[str, Measured]()
    if own.examples:
        runs = {name: comparison.measure(home.lm, state, own, loss_only) for name, state in states.items()}
    return {
        "own": {name: run.loss for name, run in runs.items()},
        "own_ci95": {name: comparison.table_row(name, run, config.seed)["ci95"]["loss"] for name, run in runs.items()},
        "own_paired": comparison.differences(runs, config.seed, "personal") if runs else {},
    }
