"""A site's own model after a deployed run: its operator makes it at home, once the adapter has been handed out.

The adapter brings the run's settings, the site its rows, its base and its state folder: the key by which it holds rows
out and sets them apart, how many steps it made in the run, the rows that curation left it, and what the run's method
keeps at a client. Nothing is sent or fetched, and nobody is told what was kept, for that follows from private rows.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from apiary.config import loading
from apiary.config.schema import RunConfig
from apiary.core.errors import UserError
from apiary.core.files import own_folder
from apiary.core.lora import is_half
from apiary.core.messages import Payload
from apiary.core.tensors import StateDict
from apiary.data import injection, split, stages, templates, tokenization
from apiary.data.availability import check_rows
from apiary.data.examples import Example
from apiary.data.federation import ClientData, set_deciding_apart, untrained
from apiary.data.split import Split
from apiary.data.templates import with_template
from apiary.evaluation import comparison
from apiary.export.adapter_folder import SETTINGS, WEIGHTS
from apiary.models import adapter_files, adapters, availability, start
from apiary.privacy import sampling
from apiary.tracking import metrics_file
from apiary.tracking.run_directory import CONFIG, RUN_ID
from client import curated_rows, round_files, state
from client.curation import Context
from client.personal import own_model
from client.personal.own_model import Home, Task
from client.site import Facts, at_home, local_algorithm, names_code
from client.training import trainer
from client.worker import open_received

NO_RUN = "none"  # as `Handed.run`: the site took part in none of those that its state folder knows
_ID = re.compile(r"[0-9a-f]{8}")


class Handed(NamedTuple):
    """What the consortium hands out, and what the operator says of it."""

    path: Path  # a run directory, or an adapter folder with the run's settings in it
    run: str | None = None  # the run's folder in the site's state; None: the one that the path, or the state, tells
    start: Path | None = None  # the site's copy of the adapter that the run began from (`adapter.start`)


class Plan(NamedTuple):
    """All that a site's own model takes, loaded and checked before anything is trained."""

    home: Home
    task: Task
    out: Path
    remarks: tuple[str, ...]  # what there is to say of it, a line each


class _Settings(NamedTuple):
    """The run's settings as they were handed out."""

    config: RunConfig
    folder: Path  # with the weights
    run: Path | None  # the run directory, if it is one
    rounds: int  # that made what was delivered


class _Past(NamedTuple):
    """What the site's state folder knows of its part in the run."""

    name: str
    folder: Path
    steps: int  # optimizer steps in the rounds that made the adapter; 0 where they are not known


def prepare(facts: Facts, handed: Handed, out: Path, overrides: Sequence[str] = ()) -> Plan:
    """Load and check everything; nothing is written.

    Args:
        facts: what the site's operator says: its rows, state folder, base, device and columns.
        handed: the adapter.
        out: the folder that the model will be written to; new or empty.
        overrides: `personal.KEY=VALUE` on top of the run's own settings.

    Raises:
        UserError: the first thing that cannot work.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {str(out)!r}: is a file or not empty; choose another folder")
    settings = _settings(handed, own_model.only_personal(overrides))
    _check(settings, facts, handed)
    pinned = split.load(facts.state)
    if pinned is None:
        raise UserError(
            f"{str(facts.state)!r} holds no {split.FILE}: this site has taken part in no run; give its state folder "
            "(--state), or pin first which rows it holds out (apiary deploy split KIT --test-fraction 0.1)"
        )
    past = _past(facts.state, handed, settings)
    _check_pinned(pinned, settings, past)
    config = at_home(settings.config, facts)
    data = config.data.model_copy(update={"test_fraction": pinned.fraction})
    begun = {"start": str(handed.start.expanduser().resolve())} if handed.start else {}
    config = config.model_copy(update={"data": data, "adapter": config.adapter.model_copy(update=begun)})
    client, shown, remarks = _rows(config, facts, pinned)
    lm = adapters.load(config.model, config.adapter)
    template = tokenization.make_template(config.prompt, lm.tokenizer)
    home = Home(with_template(config, template.name), lm, template)
    _check_base(home, past, facts)
    federated, more = _federated(home, settings, past)
    rows = own_model.rows_of(client, shown, config)
    chosen, told = _last_chosen(client, config, past)
    rows = rows._replace(train=chosen)
    steps, how = _steps(home, rows.train, settings, past)
    draft = out.with_name(f".{out.name}.draft") / "model"  # within a folder that is its owner's from the first byte on
    task = Task(facts.client, steps, federated, rows, draft, draft / "alone")
    if not config.personal.enabled:
        remarks.append(
            "the run set no rows apart for this before round 1, so half of the held-out rows chooses, and figures are "
            "on the other half"
        )
    return Plan(home, task, out, (*remarks, *more, *told, how))


def make(plan: Plan) -> dict[str, Any]:
    """Make the site's own model and write its folder, for its owner alone; returns the content of its `choice.json`.

    Beside the model lies `alone/`, training alone at its best. Both are PEFT folders with settings. `choice.json` holds
    the choice with its reasons and the figures on the site's own held-out rows.

    Raises:
        UserError: no row can be trained on.
        OSError: the disk is full or the place cannot be written; nothing is left behind.
    """
    home, task, out, remarks = plan
    shutil.rmtree(task.own.parent, ignore_errors=True)
    own_folder(task.own.parent)
    try:
        made = own_model.make(home, task)
        states = {"local_best": made.alone, "federated": task.federated, "personal": made.adapter}
        figures = own_model.on_own_rows(home, states, task.rows.reported)
        choice = {**made.choice, **figures, "remarks": list(remarks)}
        own_model.write_choice(task.own, choice)
        own_folder(task.own)
        if out.exists():
            out.rmdir()
        task.own.rename(out)
    finally:
        shutil.rmtree(task.own.parent, ignore_errors=True)
    return choice


# -- what was handed out ---------------------------------------------------------------------------------------------


def _settings(handed: Handed, overrides: Sequence[str]) -> _Settings:
    """The settings that come with the adapter.

    Raises:
        UserError: there is no adapter, or it comes without settings, or they cannot be read.
    """
    path = handed.path
    inside = path.name == "adapter" and (path.parent / CONFIG).exists()
    run = path.parent if inside else path if (path / CONFIG).exists() else None
    folder = run / "adapter" if run else path
    if not (folder / WEIGHTS).exists():
        raise UserError(f"{str(path)!r} holds no adapter; give a finished run directory or what `apiary export` wrote")
    stored = run / CONFIG if run else folder / SETTINGS
    if not stored.exists():
        raise UserError(f"{str(path)!r} holds no {SETTINGS}: without the run's settings nothing can be trained like it")
    config = loading.load(stored, overrides)
    if config.prompt.template == "auto" and (folder / SETTINGS).exists():  # what it came to in the run
        config = with_template(config, loading.load(folder / SETTINGS).prompt.template)
    rounds = config.rounds
    with suppress(UserError, KeyError, TypeError):  # a run directory without results: all of its rounds
        rounds = int(metrics_file.read_metrics(run)["delivered"]["round"]) if run else rounds
    return _Settings(config, folder, run, rounds)


def _check(settings: _Settings, facts: Facts, handed: Handed) -> None:
    """Check that the run goes with own models, and that what the operator says can be used. Opens no network.

    Raises:
        UserError: the first thing that does not.
    """
    config = settings.config
    if config.continual.stages:
        raise UserError("continual.stages: a client's rows change from stage to stage, and its model would be of one")
    if local_algorithm(config).gradient_free:
        raise UserError(
            f"strategy.name = {config.strategy.name!r}: it trains without gradients, and its learning rate means "
            "something else to the training with gradients that makes own models"
        )
    if names_code(config):
        raise UserError("the run names code by module:function, which this site does not load")
    if config.prompt.template not in templates.BUILTIN:
        known = ", ".join(templates.BUILTIN)
        raise UserError(f"prompt.template = {config.prompt.template!r}: sites take the built-in ones alone ({known})")
    if config.adapter.start is not None and handed.start is None:
        raise UserError("adapter.start: the run began from an adapter; name this site's copy of it (--start DIR)")
    if config.adapter.start is None and handed.start is not None:
        raise UserError("--start: the run began from a new adapter, not from one in a folder; leave it out")
    if facts.model is None and not config.model.name.startswith("builtin:"):
        raise UserError("the run's base model is not built in: name this site's place of it (--model DIR)")
    if facts.model is not None and not Path(facts.model).is_dir() and not facts.model.startswith("builtin:"):
        raise UserError(f"--model {facts.model!r}: no such folder; nothing is fetched here, so give the model's folder")
    if facts.model is not None:
        availability.check_model(facts.model, "--model")
    if facts.device is not None:
        availability.check_device(facts.device, "--device")
    if not facts.data.exists():
        raise UserError(f"--data {str(facts.data)!r}: no such file or folder")
    check_rows(str(facts.data), "--data", facts.columns)


# -- what the state folder knows -------------------------------------------------------------------------------------


def _past(folder: Path, handed: Handed, settings: _Settings) -> _Past | None:
    """The site's part in the run; None where it had none.

    Raises:
        UserError: there is no such run in the state folder, or nothing tells which of several it is.
    """
    runs = folder / "runs"
    known = {path.name: path for path in sorted(runs.iterdir()) if path.is_dir()} if runs.is_dir() else {}
    trained = [name for name, path in known.items() if state.load(path, sys.maxsize).round]
    if handed.run == NO_RUN:
        return None
    if handed.run is not None:
        if handed.run not in known:
            raise UserError(f"--run {handed.run!r}: the state folder has no such run; {_listed(trained)}")
        names = [handed.run]
    elif settings.run is not None and (settings.run / RUN_ID).exists():
        number = (settings.run / RUN_ID).read_text(encoding="utf-8").strip()
        names = [name for name in known if _ID.fullmatch(number) and name.endswith(f"-{number}")]
    else:
        names = trained
    if len(names) > 1:
        raise UserError(
            f"nothing in {str(handed.path)!r} tells which run it is of: name it (--run NAME, or --run {NO_RUN} if this "
            f"site had no part in it); {_listed(names)}"
        )
    if not names or not state.load(known[names[0]], sys.maxsize).round:
        return None
    made = state.steps_of(known[names[0]])
    return _Past(names[0], known[names[0]], sum(steps for number, steps in made.items() if number <= settings.rounds))


def _listed(names: Sequence[str]) -> str:
    return f"there are {', '.join(names)}" if names else "there is none in which it trained"


def _check_pinned(pinned: Split, settings: _Settings, past: _Past | None) -> None:
    """Check that the site's rows are today dealt out and read as they were in the run.

    Raises:
        UserError: they are not.
    """
    config = settings.config
    other = split.differing(pinned, config)
    if (pinned.reading or {}).get("prompt.template") == "auto":  # the adapter's settings name what that came to
        other = [key for key in other if key != "prompt.template"]
    if past is None:  # nothing of its rows is in the adapter: only how rows become tokens has to be the same
        other = [key for key in other if key.startswith("prompt.")]
    elif settings.run is not None and pinned.fraction != config.data.test_fraction:
        raise UserError(
            f"data.test_fraction = {config.data.test_fraction:g}: this site has pinned {pinned.fraction:g} since this "
            f"run; give a state folder with the {split.FILE} of that time (--state)"
        )
    if other:
        raise UserError(
            f"{', '.join(other)}: the adapter was tuned with another value than this site has pinned; is it of another "
            "run (--run)? Else give a state folder with the "
            f"{split.FILE} of that time, or agree to the run's settings (apiary deploy split KIT --agree run.toml)"
        )


def _check_base(home: Home, past: _Past | None, facts: Facts) -> None:
    """Check that base, tokenizer and template are those with which the site took part.

    Raises:
        UserError: one is another.
    """
    before = state.load_fingerprint(past.folder) if past else None
    if past is None or before is None:
        return
    now = adapters.fingerprint(home.lm, home.template)._asdict()
    if other := [name for name, value in before._asdict().items() if now[name] != value]:
        where = f"--model {facts.model!r}" if facts.model else home.config.model.name
        raise UserError(
            f"{where}: this site took part in {past.name!r} with another {' and '.join(other)}; give that one, or the "
            "adapter of another run"
        )


def _federated(home: Home, settings: _Settings, past: _Past | None) -> tuple[StateDict, list[str]]:
    """The site's model from the federation, with what the method keeps at the site, and what there is to say of it.

    Raises:
        UserError: the adapter is of another base.
    """
    config, lm, _ = home
    local = local_algorithm(config)
    try:
        adapter = adapter_files.read_adapter(lm, settings.folder / WEIGHTS)
        adapters.set_adapter(lm, adapter)
    except ValueError as error:
        raise UserError(f"{str(settings.folder)!r} does not fit the base {config.model.name!r}: {error}") from None
    start.starting_adapter(lm, config)  # what is wrong with its copy is told before the training
    if not local.personal:
        return adapter, []
    if config.adapter.share == "both":  # its method made it a whole model of its own, which its worker kept
        mine = past.folder / "adapter" / WEIGHTS if past else None
        if mine is None or not mine.exists():
            return adapter, ["its state folder has no model that the method made for it, so the shared one stands in"]
        made = "the model that the run's method made for it, from its state folder, is the federated one"
        return adapter_files.read_adapter(lm, mine), [made]
    if not is_half(adapter):
        raise UserError(f"{str(settings.folder)!r} is the model of one client, and not what clients share; give that")
    shared = Payload({name: tensor for name, tensor in adapter.items() if local.shares(name)}, {})
    kept = round_files.newest(past.folder, local.keeps, settings.rounds + 1) if past else {}
    said = "its own factors, from its state folder, are in the federated model"
    none = "its state folder has no factors of its own for this run, so in the federated model they are new ones"
    return open_received(lm, config, local, kept, shared).adapter, [said if kept else none]


# -- its rows and steps ----------------------------------------------------------------------------------------------


def _rows(config: RunConfig, facts: Facts, pinned: Split) -> tuple[ClientData, Sequence[Example], list[str]]:
    """The site's rows as in the run, those of its held-out rows that figures are on, and what was left out in reading.

    Raises:
        UserError: none is left to train on.
    """
    federation = stages.rows_of_run(config, pinned.key, whole=False)
    (client,) = federation.clients
    if not client.train:
        raise UserError(f"--data {str(facts.data)!r}: no training row is left beside those held out and set apart")
    shown = client.test
    if config.evaluate.patience and config.scores_from_clients:  # the others decided which round is delivered
        shown = set_deciding_apart(federation, config)[0].clients[0].test
    return client._replace(name=facts.client), shown, [line for r in federation.reports for line in r.lines()]


def _last_chosen(
    client: ClientData, config: RunConfig, past: _Past | None
) -> tuple[Sequence[Example], tuple[str, ...]]:
    """The training rows that curation last left in the run, with a line where they are not known."""
    if not config.curate.steps:
        return client.train, ()
    with suppress(OSError, ValueError):
        context = Context(config.seed, client.name, untrained(client.test, client.validation))
        found = curated_rows.choices(client.train, config.curate, context, past.folder) if past else {}
        if found:
            return found[max(found)], ()
    return client.train, ("its state folder has no choice of curation for these rows, so all of them are trained on",)


def _steps(home: Home, rows: Sequence[Example], settings: _Settings, past: _Past | None) -> tuple[int, str]:
    """How many optimizer steps the site counts with, and where that comes from.

    Raises:
        UserError: no row can be trained on.
    """
    config, lm, template = home
    corpus = injection.encode_training(rows, template, lm.tokenizer, config.prompt)
    if not len(corpus):
        raise UserError(f"prompt.max_tokens = {config.prompt.max_tokens}: no training row of this site fits")
    comparison.check_positions(lm, config)
    if past is not None and past.steps:
        return past.steps, f"it made {past.steps} optimizer steps in {past.name}, by its state folder"
    if config.privacy.unit == "record":
        drawn = sampling.draw(config, [len(rows)], 1)
        visit = drawn.steps if drawn else 1
    else:
        visit = trainer.steps_per_round(config.train, corpus)
    planned = max(1, round(settings.rounds * config.strategy.fraction) * visit)
    where = "took no part in this run" if past is None else f"has no step log of {past.name}"
    return planned, f"it {where}, so it counts with the {planned} optimizer steps that the run plans for a client"
