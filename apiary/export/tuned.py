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
from apiary.models import adapters
from apiary.models.adapter_files import read_adapter
from apiary.models.adapters import LanguageModel
from apiary.tracking import metrics_file
from apiary.tracking.run_directory import result_folders


class Tuned(NamedTuple):
    """A base model with an adapter, and the settings it was tuned with."""

    config: RunConfig
    lm: LanguageModel
    template: Template
    adapter: StateDict
    run: Path | None  # the run directory, if it is one


def open_tuned(path: Path, overrides: Sequence[str] = ()) -> Tuned:
    """The model of a run directory or an adapter folder.

    Args:
        path: a run (with `adapter/` in it) or a PEFT adapter folder.
        overrides: `key=value` settings on top of the stored ones.

    Raises:
        UserError: neither of the two, or the base model cannot be had.
    """
    run = path if (path / "adapter" / WEIGHTS).exists() else None
    folder = path / "adapter" if run else path
    if not (folder / WEIGHTS).exists():
        unfinished = (path / "config.toml").exists()
        hint = (
            "it is not finished: apiary simulate --out DIR --resume"
            if unfinished
            else "give a run directory or a PEFT adapter folder"
        )
        raise UserError(f"{str(path)!r} holds no adapter; {hint}")
    stored = next((f for f in (path / "config.toml", folder / SETTINGS) if f.exists()), None)
    config = loading.load(stored, [*_settings_of(folder, stored), *overrides])
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


def _settings_of(folder: Path, stored: Path | None) -> list[str]:
    """What PEFT's own file says, for an adapter that carries no settings of ours."""
    if stored is not None:
        return []
    try:
        values = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{str(folder)!r}: adapter_config.json cannot be read: {error}") from None
    if values.get("peft_type") != "LORA":
        raise UserError(f"{str(folder)!r}: peft_type = {values.get('peft_type')!r}; only LORA can be opened")
    targets = values["target_modules"]
    return [
        f"model.name={json.dumps(values['base_model_name_or_path'])}",
        f"adapter.rank={values['r']}",
        f"adapter.alpha={float(values['lora_alpha'])}",
        f"adapter.scaling={'rslora' if values.get('use_rslora') else 'lora'}",
        f"adapter.targets={json.dumps(targets)}",
    ]


def score(tuned: Tuned, source: str) -> tuple[dict[str, Measured], list[str]]:
    """The table's rows for other data: base and federated, and the run's own baselines where they were kept.

    With them, a line for each thing that keeps some of the data out of the table.

    Raises:
        UserError: the data cannot be read, or no example of it fits.
    """
    config, lm, template, adapter, run = tuned
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
    remarks = [line for report in data.reports for line in report.lines()]
    everything = len(data.test or data.examples)
    if (measured := len(held_out.examples)) < everything:
        remarks.append(
            f"{measured} of {everything} examples are measured: evaluate.max_examples = "
            f"{config.evaluate.max_examples}, and {held_out.left_out} that do not fit prompt.max_tokens are left out"
        )
    rows = comparison.compare(lm, held_out, config, adapter, alone, pooled).rows
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
