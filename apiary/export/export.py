"""A finished run handed on: its adapter, or the base with the adapter merged in."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any, Literal, NamedTuple

from transformers import PreTrainedModel

from apiary.config import loading
from apiary.config.schema import RunConfig
from apiary.config.summary import public_name
from apiary.core import files
from apiary.core.errors import CheckFailed, UserError
from apiary.data.templates import with_template
from apiary.export import check as checks
from apiary.export import gguf_files, gguf_tokenizer, serving
from apiary.export.adapter_folder import OF_THE_SITE, SETTINGS
from apiary.export.model_card import base_path, card, card_of_other
from apiary.export.personal import note, read_choice
from apiary.export.tuned import Tuned, open_tuned
from apiary.models import adapter_files, adapters, gates, generation
from apiary.models.adapter_files import Written
from apiary.models.base import save_tokenizer_files
from apiary.privacy import statement
from apiary.tracking import metrics_file

_log = logging.getLogger(__name__)

ADAPTER_GGUF, MODEL_GGUF = "adapter.gguf", "model.gguf"
GgufType = Literal["f32", "f16", "bf16", "q8_0"]


class _Wishes(NamedTuple):
    """How a run is handed on: the options of `export_run`."""

    merge: bool
    plain_scale: bool
    max_rank: int | None
    gguf: GgufType | None
    check: bool


class Exported(NamedTuple):
    """What was written, and lines for people."""

    folder: Path
    said: list[str]  # how it was written
    warnings: list[str]  # what servers do otherwise
    commands: list[str]  # that serve it


class _Form(NamedTuple):
    """The adapter in the form that was asked for."""

    written: Written
    compared: Written  # before its scale was folded
    said: list[str]
    cut: bool
    changed: bool  # whether the run's own settings no longer describe it


def export_run(
    path: Path,
    to: Path,
    *,
    merge: bool = False,
    plain_scale: bool = False,
    max_rank: int | None = None,
    gguf: GgufType | None = None,
    check: bool = False,
) -> Exported:
    """A folder to hand on: the adapter with its card, or with `merge` a whole model that needs no PEFT.

    For a built-in base, which no hub knows, the base is written beside the adapter as `base/`.

    Args:
        path: a run or an adapter folder.
        to: the folder to write; with `check` it is there only if no difference was found.
        merge: write a whole model, not an adapter.
        plain_scale: write the adapter under alpha / rank with a whole alpha, for servers that know no rsLoRA.
        max_rank: cut a higher rank to this one.
        gguf: write a file for llama.cpp as well; of a merged model with matrices of this type.
        check: read what was written with other code, and compare logits.

    Raises:
        UserError: `to` is not empty, the run has no adapter, or an option cannot be met.
        CheckFailed: what was read again says something else.
    """
    wishes = _Wishes(merge, plain_scale, max_rank, gguf, check)
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"{str(to)!r} is a file or not empty; choose another --to")
    if wishes.merge and (wishes.plain_scale or wishes.max_rank):
        raise UserError("--plain-scale and --max-rank are of an adapter, and with --merge there is none left")
    if wishes.gguf:
        gguf_files.require()
    # Merging in 16 bits would round a light update away, and comparing in 16 bits would hide a fault.
    tuned = open_tuned(path, ["model.dtype=float32"] if wishes.merge or wishes.check else [])
    for line in tuned.remarks:
        _log.warning("%s", line)
    base, tokenizer = adapters.load_base(tuned.config.model)
    if wishes.gguf:
        gguf_files.check(base.config)
    if wishes.gguf and wishes.merge:
        gguf_tokenizer.check(tokenizer)
    form = _form(tuned, wishes)
    draft = to.with_name(f".{to.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        _write_export(tuned, form.written, draft, wishes)
        _describe(tuned, form, path, draft, merged=wishes.merge)
        said = [*form.said, *(_checked(tuned, form, draft, wishes) if wishes.check else [])]
        for file in [*draft.rglob("*.safetensors"), *draft.glob("*.gguf")]:  # written with the owner's rights alone
            file.chmod(0o644)
        if to.exists():
            to.rmdir()
        draft.rename(to)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return Exported(to, said, _warnings(tuned, base, form.written, wishes), _commands(tuned, form.written, to, wishes))


def _form(tuned: Tuned, wishes: _Wishes) -> _Form:
    written, said = adapter_files.as_written(tuned.lm, tuned.adapter), []
    before = written
    lost = None
    if wishes.max_rank is not None:
        written, lost = serving.cut(written, wishes.max_rank)
        said += [lost.words] if lost else []
    compared = written
    if wishes.plain_scale:
        written, line = serving.plain_scale(written)
        said.append(line)
    return _Form(written, compared, said, lost is not None, written is not before)


def _stored_dtype(tuned: Tuned, path: Path) -> Any:
    """`model.dtype` as the settings beside an adapter have it."""
    stored = (path / "config.toml", path / SETTINGS)
    return next((loading.load(file).model.dtype for file in stored if file.exists()), tuned.config.model.dtype)


def _describe(tuned: Tuned, form: _Form, path: Path, draft: Path, *, merged: bool) -> None:
    """The card, and the settings without what stays at the site."""
    metrics = metrics_file.read_metrics(tuned.run) if tuned.run and (tuned.run / "metrics.json").exists() else None
    privacy = statement.read(tuned.run) if tuned.run else {}
    if tuned.elsewhere:  # nothing is known of how it was tuned, and without settings it opens as it did here
        files.write_atomic(draft / "README.md", card_of_other(tuned.config, form.written, merged=merged, cut=form.cut))
        return
    text = card(tuned.config, form.written.rank, metrics, privacy, merged=merged, why=tuned.template.why)
    choice, before = read_choice(path), path / "README.md"
    fixed = gates.FIXED if before.exists() and gates.FIXED in before.read_text(encoding="utf-8") else ""
    files.write_atomic(draft / "README.md", text + fixed + (note(choice) if choice else ""))
    config = _handed_on(tuned.config)
    if not merged:  # in which bits the base is held is the run's setting, and none of the check's
        dtype = _stored_dtype(tuned, path)
        config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": dtype})})
    if form.changed:  # whoever opens the folder with these settings takes its factors for what they are
        rank, alpha, rslora = form.written[1:]
        shape = {"rank": rank, "ranks": (), "alpha": float(alpha), "scaling": "rslora" if rslora else "lora"}
        config = config.model_copy(update={"adapter": config.adapter.model_copy(update=shape)})
    files.write_atomic(draft / SETTINGS, config.to_toml(without=OF_THE_SITE))


def _checked(tuned: Tuned, form: _Form, draft: Path, wishes: _Wishes) -> list[str]:
    """A line for each thing that was read again, as it says what the run's model says.

    Raises:
        CheckFailed: one of them does not.
    """
    lm, rows = tuned.lm, checks.prompts(tuned)
    whole = checks.own_logits(lm, tuned.adapter, rows)
    said, expected = [], whole
    if form.cut:
        expected = checks.own_logits(lm, checks.state_of(lm, form.compared), rows)
        apart = checks.compare("", whole, expected, 0.0)
        said.append(f"the cut moves logits by {apart.largest:.2g} at most, of up to {apart.top:.3g}")
    if wishes.merge:
        found = [checks.merged_folder(draft, expected, rows)]
    else:
        found = [checks.adapter_folder(tuned, draft, expected, rows)]
    if wishes.gguf and wishes.merge:
        read, rounding = checks.gguf_model(draft / MODEL_GGUF, wishes.gguf, expected, rows)
        found.append(read)
        said.append(f"{rounding.what} moves logits by {rounding.largest:.2g} at most, of up to {rounding.top:.3g}")
    elif wishes.gguf:
        found.append(checks.gguf_adapter(lm, draft / ADAPTER_GGUF, expected, rows))
    for compared in found:
        if not compared.equal:
            raise CheckFailed(f"--check: not equal, so nothing was written: {compared.words}")
    return [*said, *(f"checked: {compared.words}" for compared in found)]


def _warnings(tuned: Tuned, base: PreTrainedModel, written: Written, wishes: _Wishes) -> list[str]:
    lines = [] if wishes.merge else serving.remarks(base, written)
    lines += gguf_files.remark(base.config) if wishes.gguf else []
    if tuned.template.name != "chat":
        own = "the tokenizer's own chat template" if tuned.lm.tokenizer.chat_template else "no chat template"
        lines.append(
            f"tuned with prompt.template = {public_name(tuned.template.name)!r}, and a server's chat endpoint has "
            f"{own}: send prompts in that template to its completions endpoint, or give it one that writes the same"
        )
    return lines


def _commands(tuned: Tuned, written: Written, to: Path, wishes: _Wishes) -> list[str]:
    model = tuned.config.model
    if wishes.merge:
        return [
            serving.model_command(to),
            *([serving.llama_command(to / MODEL_GGUF)] if wishes.gguf else []),
        ]
    base = str(to / "base") if model.name.startswith("builtin:") else model.name
    commands = []
    if serving.vllm_rank(written.rank):
        commands.append(serving.adapter_command(to, base, model.revision, written.rank))
    return [*commands, *([serving.llama_command("BASE.gguf", to / ADAPTER_GGUF)] if wishes.gguf else [])]


def _handed_on(config: RunConfig) -> RunConfig:
    """The settings without what is nobody else's business: where the data lay, and folders of this machine."""
    model = config.model.model_copy(update={"name": public_name(config.model.name)})
    strategy = config.strategy.model_copy(update={"root": None})
    start = config.adapter.start and public_name(config.adapter.start)
    config = with_template(config, public_name(config.prompt.template))
    adapter = config.adapter.model_copy(update={"start": start})
    return config.model_copy(update={"model": model, "strategy": strategy, "adapter": adapter})


def _write_export(tuned: Tuned, written: Written, draft: Path, wishes: _Wishes) -> None:
    base, tokenizer = adapters.load_base(tuned.config.model)
    save_tokenizer_files(tuned.config.model, tokenizer, draft)
    if not wishes.merge:
        adapter_files.write_adapter(tuned.lm, written, draft / "adapter")
        for file in (draft / "adapter").iterdir():
            file.rename(draft / file.name)
        (draft / "adapter").rmdir()
        config = draft / "adapter_config.json"
        values = json.loads(config.read_text(encoding="utf-8"))
        values["base_model_name_or_path"] = base_path(tuned.config.model.name).removeprefix("THIS_FOLDER/")
        config.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        if tuned.config.model.name.startswith("builtin:"):
            base.save_pretrained(draft / "base")
            generation.hand_on(tuned.lm.generation, draft / "base")
            tokenizer.save_pretrained(draft / "base")
        if wishes.gguf:
            gguf_files.write_adapter(written, base.config, draft / ADAPTER_GGUF)
        return
    whole = adapter_files.merged(tuned.lm, tuned.adapter)
    whole.save_pretrained(draft)
    generation.hand_on(tuned.lm.generation, draft)
    if wishes.gguf:
        gguf_files.write_model(whole, tokenizer, draft / MODEL_GGUF, wishes.gguf)
