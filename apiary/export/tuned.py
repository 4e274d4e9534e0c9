"""What can be done with a finished run or an adapter: open it, score it on other data, talk to it, hand it on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from apiary.config import loading
from apiary.config.schema import RunConfig
from apiary.core.errors import UserError
from apiary.core.lora import is_half
from apiary.core.tensors import StateDict
from apiary.data import examples, tokenization
from apiary.data.examples import Example
from apiary.data.templates import with_template
from apiary.data.tokenization import Template
from apiary.data.turns import Turn
from apiary.evaluation import comparison
from apiary.evaluation.comparison import Measured
from apiary.export.adapter_folder import SETTINGS, WEIGHTS
from apiary.models import adapters, peft_folder
from apiary.models.adapter_files import read_adapter
from apiary.models.adapters import LanguageModel
from apiary.models.peft_keys import CONFIG, read_folder
from apiary.models.start import named_start
from apiary.tracking import metrics_file
from apiary.tracking.run_directory import result_folders


class Tuned(NamedTuple):
    """A base model with an adapter, and the settings it was tuned with."""

    config: RunConfig
    lm: LanguageModel
    template: Template
    adapter: StateDict
    run: Path | None  # the run directory, if it is one
    remarks: tuple[str, ...] = ()  # what there is to say of an adapter that another tool made, a line each
    elsewhere: bool = False  # whether another tool made it


def open_tuned(path: Path, overrides: Sequence[str] = ()) -> Tuned:
    """The model of a run directory or an adapter folder.

    Args:
        path: a run (with `adapter/` in it) or a PEFT adapter folder.
        overrides: `key=value` settings on top of the stored ones.

    Raises:
        UserError: neither of the two, the base model cannot be had, or an adapter of another tool cannot be honoured.
    """
    run = path if (path / "adapter" / WEIGHTS).exists() else None
    folder = path / "adapter" if run else path
    if _made_elsewhere(path, folder):
        return _open_elsewhere(path, overrides)
    if not (folder / WEIGHTS).exists():
        unfinished = (path / "config.toml").exists()
        hint = (
            "it is not finished: apiary simulate --out DIR --resume"
            if unfinished
            else "give a run directory or a PEFT adapter folder"
        )
        raise UserError(f"{str(path)!r} holds no adapter; {hint}")
    stored = next((f for f in (path / "config.toml", folder / SETTINGS) if f.exists()), None)
    config = loading.load(stored, overrides)
    if config.prompt.template == "auto" and (folder / SETTINGS).exists():  # a tokenizer may have got a template since
        config = with_template(config, loading.load(folder / SETTINGS).prompt.template)
    lm = adapters.load(config.model, config.adapter)
    template = tokenization.make_template(config.prompt, lm.tokenizer)
    config = with_template(config, template.name)
    try:
        adapter = read_adapter(lm, folder / WEIGHTS)
        adapters.set_adapter(lm, adapter)
    except ValueError as error:
        raise UserError(f"{str(path)!r} does not fit the base {config.model.name!r}: {error}") from None
    if config.adapter.share != "both" and is_half(adapter):
        kept = result_folders(run or path.parent).personal
        at_site = "a site has it in its state folder, as runs/RUN/adapter"
        where = f"open one in {str(kept)!r}" if kept.is_dir() else at_site
        raise UserError(
            f"{str(path)!r} holds the factors that clients share, which are no model by themselves: with "
            f"adapter.share = {config.adapter.share!r} each client has one of its own; {where}"
        )
    return Tuned(config, lm, template, adapter, run)


def _made_elsewhere(path: Path, folder: Path) -> bool:
    """Whether a folder is to be read as an adapter that carries no settings of ours."""
    if (path / "config.toml").exists() or (folder / SETTINGS).exists():
        return False
    return (path / CONFIG).exists() or any(path.glob(f"*/{CONFIG}"))


def _open_elsewhere(path: Path, overrides: Sequence[str]) -> Tuned:
    """The model of an adapter folder that another tool made: its base, and the adapter as plain peft loads it.

    Raises:
        UserError: a key or a tensor of it cannot be honoured, or the base model cannot be had.
    """
    folder = read_folder(path)
    keys = {item.partition("=")[0].strip() for item in overrides}
    if own := sorted(key for key in keys if key.partition(".")[0] == "adapter"):
        raise UserError(f"-s {own[0]}: {str(path)!r} brings its own adapter; leave the key out")
    named = bool(keys & {"model", "model.name"})
    if folder.base is None and not named:
        raise UserError(f"{str(path)!r}: {CONFIG} names no base_model_name_or_path; name it: -s model.name=...")
    if not named and folder.base and Path(folder.base).is_absolute() and not Path(folder.base).is_dir():
        raise UserError(
            f"{str(path)!r}: {CONFIG}: base_model_name_or_path = {folder.base!r}: no such folder on this machine; say "
            "where the base is: -s model.name=..."
        )
    revision = folder.values.get("revision")
    given = [] if named else [f"model.name={json.dumps(folder.base)}"]
    if revision and not named:
        given.append(f"model.revision={json.dumps(revision)}")
    config = loading.load(None, [*given, *overrides])
    remarks = list[str]()
    if folder.base and config.model.name not in (folder.base, str(Path(folder.base).resolve())):
        left = f", of revision {revision!r}" if revision else ""
        remarks.append(f"made on base_model_name_or_path = {folder.base!r}{left}; in use is {config.model.name!r}")
    elif revision and config.model.revision != revision:
        remarks.append(f"made on revision = {revision!r}; in use is {config.model.revision!r}")
    lm, state, foreign = peft_folder.load(folder, config.model)
    config = config.model_copy(update={"adapter": foreign.settings})
    template = tokenization.make_template(config.prompt, lm.tokenizer)
    config = with_template(config, template.name)
    said = tuple(f"{str(path)!r}: {line}" for line in (*remarks, *foreign.remarks))
    return Tuned(config, lm, template, state, None, said, elsewhere=True)


def score(tuned: Tuned, source: str) -> tuple[dict[str, Measured], list[str]]:
    """The table's rows for other data: base, federated, and the run's own start and baselines where they were kept.

    With them, a line for each thing that keeps some of the data out of the table.

    Raises:
        UserError: the data cannot be read, or no example of it fits.
    """
    config, lm, template, adapter, run = tuned[:5]
    data = examples.read(source, split=config.data.split, columns=config.data.columns, max_rows=config.data.max_rows)
    held_out = comparison.prepare(data.test or data.examples, template, lm, config)
    if not held_out.examples:
        raise UserError(f"{source!r}: no example fits prompt.max_tokens = {config.prompt.max_tokens}; raise it with -s")
    alone: dict[str, StateDict] = {}
    pooled: dict[str, StateDict] = {}
    if run:
        places = result_folders(run)
        # A name with a dot in front is what a kill left of a folder under way.
        alone = {f.parent.name: read_adapter(lm, f) for f in sorted(places.alone.glob(f"[!.]*/{WEIGHTS}"))}
        together = (("central", places.central), ("central_serial", places.central_serial))
        pooled = {m: read_adapter(lm, place / WEIGHTS) for m, place in together if (place / WEIGHTS).exists()}
    remarks = [*tuned.remarks, *(line for report in data.reports for line in report.lines())]
    if tuned.elsewhere:
        remarks.append("the row 'federated' is this adapter, which another tool made")
    everything = len(data.test or data.examples)
    if (measured := len(held_out.examples)) < everything:
        remarks.append(
            f"{measured} of {everything} examples are measured: evaluate.max_examples = "
            f"{config.evaluate.max_examples}, and {held_out.left_out} that do not fit prompt.max_tokens are left out"
        )
    begun = None
    try:
        begun = named_start(lm, config)
    except UserError as error:
        remarks.append(f"no row for the start: {error}")
    rows = comparison.compare(lm, held_out, config, adapter, alone, pooled, start=begun).rows
    for name, reasons in unlike(tuned).items():
        if name in rows:
            remarks.append(f"{name} is not like with like: it {', and it '.join(reasons.values())}")
    return rows, remarks


def unlike(tuned: Tuned) -> dict[str, dict[str, str]]:
    """Why baselines of the run are no fair comparison, by method, as its own metrics have it."""
    try:
        table = metrics_file.read_metrics(tuned.run)["table"] if tuned.run else []
    except UserError:  # it has not finished
        table = []
    told = {row["method"]: row["not_alike"] for row in table if "not_alike" in row}
    if told or tuned.config.privacy.unit == "none":
        return told
    noise = {"noise": "went without the noise of differential privacy"}  # the run is of an earlier version
    return dict.fromkeys(("local", "central"), noise)


class Reply(NamedTuple):
    """What a model answers. written: all of it, thinking with its marks included; turn: for the conversation."""

    written: str
    turn: Turn


def reply(tuned: Tuned, history: Sequence[Turn], max_new_tokens: int) -> Reply:
    """The model's next turn, decoded greedily, with the template it was tuned with."""
    example = Example((*history, Turn("assistant", "")), {})
    ids = tokenization.encode_prompt(example, tuned.template, tuned.lm.tokenizer, tuned.config.prompt.max_tokens)
    adapters.set_adapter(tuned.lm, tuned.adapter)
    (written,) = comparison.answer_all(tuned.lm, [ids], max_new_tokens, tuned.template.thinking)
    return Reply(written, tuned.template.answer(written))
