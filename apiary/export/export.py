"""A finished run handed on: its adapter, or the base with the adapter merged in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from apiary.config.schema import RunConfig
from apiary.config.summary import public_name
from apiary.core import files
from apiary.core.errors import UserError
from apiary.data.templates import with_template
from apiary.export.adapter_folder import OF_THE_SITE, SETTINGS, exported_rank
from apiary.export.model_card import base_path, card
from apiary.export.personal import note, read_choice
from apiary.export.tuned import Tuned, open_tuned
from apiary.models import adapter_files, adapters
from apiary.privacy import statement
from apiary.tracking import metrics_file


def export_run(path: Path, to: Path, *, merge: bool) -> Path:
    """A folder to hand on: the adapter with its card, or with `merge` a whole model that needs no PEFT.

    For a built-in base, which no hub knows, the base is written beside the adapter as `base/`.

    Raises:
        UserError: `to` is not empty, or the run has no adapter.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"{str(to)!r} is a file or not empty; choose another --to")
    # Merging in 16 bits would round a light update away.
    tuned = open_tuned(path, ["model.dtype=float32"] if merge else [])
    metrics = metrics_file.read_metrics(tuned.run) if tuned.run and (tuned.run / "metrics.json").exists() else None
    privacy = statement.read(tuned.run) if tuned.run else {}
    draft = to.with_name(f".{to.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        _write_export(tuned, draft, merge)
        text = card(tuned.config, exported_rank(tuned.adapter), metrics, privacy, merged=merge, why=tuned.template.why)
        choice = read_choice(path)
        files.write_atomic(draft / "README.md", text + (note(choice) if choice else ""))
        files.write_atomic(draft / SETTINGS, _handed_on(tuned.config).to_toml(without=OF_THE_SITE))
        for file in draft.rglob("*.safetensors"):  # written by others with the owner's rights alone
            file.chmod(0o644)
        if to.exists():
            to.rmdir()
        draft.rename(to)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return to


def _handed_on(config: RunConfig) -> RunConfig:
    """The settings without what is nobody else's business: where the data lay, and folders of this machine."""
    model = config.model.model_copy(update={"name": public_name(config.model.name)})
    strategy = config.strategy.model_copy(update={"root": None})
    config = with_template(config, public_name(config.prompt.template))
    return config.model_copy(update={"model": model, "strategy": strategy})


def _write_export(tuned: Tuned, draft: Path, merge: bool) -> None:
    base, tokenizer = adapters.load_base(tuned.config.model)
    tokenizer.save_pretrained(draft)
    if not merge:
        adapter_files.save_adapter(tuned.lm, tuned.adapter, draft / "adapter")
        for file in (draft / "adapter").iterdir():
            file.rename(draft / file.name)
        (draft / "adapter").rmdir()
        written = draft / "adapter_config.json"
        values = json.loads(written.read_text(encoding="utf-8"))
        values["base_model_name_or_path"] = base_path(tuned.config.model.name).removeprefix("THIS_FOLDER/")
        written.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        if tuned.config.model.name.startswith("builtin:"):
            base.save_pretrained(draft / "base")
            tokenizer.save_pretrained(draft / "base")
        return
    adapter_files.merged(tuned.lm, tuned.adapter).save_pretrained(draft)
