"""An adapter as a folder that peft and others load."""

from __future__ import annotations

from pathlib import Path

from apiary.config.schema import RunConfig
from apiary.core import files, lora
from apiary.core.lora import is_half
from apiary.core.tensors import StateDict
from apiary.data.templates import make_template, with_template
from apiary.export.model_card import card
from apiary.models import adapter_files
from apiary.models.adapters import LanguageModel
from apiary.privacy import statement

WEIGHTS = "adapter_model.safetensors"


SETTINGS = "apiary.toml"  # the run's configuration, kept inside the adapter folder


OF_THE_SITE = ("data",)  # tables that say where private data lies


def save_adapter_folder(
    lm: LanguageModel,
    adapter: StateDict,
    folder: Path,
    config: RunConfig,
    run: Path | None = None,
    *,
    rounds: int | None = None,
    note: str = "",
    about: str = "",
) -> None:
    """Write a PEFT folder that any tool loads, with a model card and the run's settings.

    Args:
        lm: the base with its adapter.
        adapter: what is written.
        folder: where to.
        config: the run.
        run: its directory; the parent of `folder` where None.
        rounds: how many made the adapter; those of the run where None.
        note: a paragraph of the card on what is not the run's own model; it says itself what protects the rows.
        about: a paragraph of the card on whose adapter this is, where clients have different ones.
    """
    template = make_template(config.prompt, lm.tokenizer)
    config = with_template(config, template.name)
    privacy = {} if note else statement.read(run or folder.parent)
    text = card(config, exported_rank(adapter), None, privacy, exported=False, why=template.why, rounds=rounds)
    if config.adapter.share != "both" and is_half(adapter):
        text += "\nThese are the factors A that clients share. B is zero: each client has its own, and keeps it.\n"
    adapter_files.save_adapter(lm, adapter, folder, text + about + note)
    files.write_atomic(folder / SETTINGS, config.to_toml(without=OF_THE_SITE))


def exported_rank(adapter: StateDict) -> int:
    """The rank of an adapter with what its method put into the base, as it is handed on."""
    trained, base_delta = lora.parts(adapter)
    return sum(max((f.rank for f in lora.split(part).values()), default=0) for part in (trained, base_delta))
