"""The model card of an exported adapter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apiary.config import summary
from apiary.config.schema import RunConfig
from apiary.config.summary import public_name
from apiary.data import structured
from apiary.models.adapter_files import Written
from apiary.privacy import statement
from apiary.report.card_table import card_table


def card(
    config: RunConfig,
    rank: int,
    metrics: Mapping[str, Any] | None,
    privacy: Mapping[str, Any],
    *,
    merged: bool = False,
    exported: bool = True,
    why: str = "",
    rounds: int | None = None,
) -> str:
    """The model card: what it was tuned from, how, and how well it did.

    Args:
        config: the run.
        rank: of the adapter that is handed on.
        metrics: its results, where they are there.
        privacy: its account (`apiary.privacy.statement`); empty where it is not known.
        merged: whether the card is for a whole model.
        exported: whether the base stands beside the adapter.
        why: what there is to say of the choice of the template.
        rounds: how many made the adapter; where None, as the results say, else those of the run.
    """
    told = (metrics or {}).get("delivered") or {}
    made = rounds or told.get("round") or config.rounds
    template = f"`{Path(config.prompt.template).name}`" + (f" ({why})" if why else "")
    lines = [
        *_front(config, merged, "federated-learning, lora, apiary"),
        "# A federated LoRA adapter" + (", merged into its base" if merged else ""),
        "",
        f"Tuned with Apiary from {_base(config)} by federated learning in {made} rounds, by "
        f"{summary.sentence(config)}; prompt template {template}. "
        f"Clients sent {summary.sent(config)} and counts.",
        *_grown(config.adapter.rank, rank, merged),
        *_apart(config),
        *_local(config, merged),
        "",
        "```python",
        *_use(config, merged, exported),
        "```",
        *card_table(metrics),
        "",
        "Privacy: " + (statement.sentence(privacy) if privacy else "the run's own folder says what was promised."),
        "",
        "All settings are in `apiary.toml`, but for those of the data, which stayed where the data is.",
    ]
    return "\n".join(lines) + "\n"


def card_of_other(config: RunConfig, written: Written, *, merged: bool, cut: bool = False) -> str:
    """The model card of an adapter that another tool made: what its folder told, and no more.

    Args:
        config: names the base.
        written: the adapter as it is handed on.
        merged: whether the card is for a whole model.
        cut: whether it had a higher rank.
    """
    scaling = "rslora" if written.rslora else "lora"
    products = "its products as near as that rank lets them be" if cut else "with the same products"
    lines = [
        *_front(config, merged, "lora"),
        "# A LoRA adapter" + (", merged into its base" if merged else ""),
        "",
        f"Made on {_base(config)} by another tool, and written by Apiary as one adapter of rank "
        f"{written.rank}, alpha {written.alpha:g} and scaling {scaling}, {products}. How it was tuned is not known "
        "here.",
        *_local(config, merged),
        "",
        "```python",
        *_use(config, merged, exported=True),
        "```",
    ]
    return "\n".join(lines) + "\n"


def is_local(name: str) -> bool:
    """Whether a base is a folder of a machine, and no name that others know."""
    path = Path(name).expanduser()
    return not name.startswith("builtin:") and (path.is_absolute() or name.startswith(".") or path.is_dir())


def _front(config: RunConfig, merged: bool, tags: str) -> list[str]:
    name = config.model.name
    return [
        "---",
        *([] if name.startswith("builtin:") or is_local(name) else [f"base_model: {name}"]),
        "library_name: " + ("transformers" if merged else "peft"),
        f"tags: [{tags}]",
        "---",
    ]


def _base(config: RunConfig) -> str:
    """The base in a sentence, with its revision where one is named."""
    model = config.model
    return f"`{public_name(model.name)}`" + (f" (revision `{model.revision}`)" if model.revision else "")


def _local(config: RunConfig, merged: bool) -> list[str]:
    """That the base is a folder of the maker's machine, which no hub knows."""
    if merged or not is_local(config.model.name):
        return []
    return [
        "",
        f"The base is a folder on the machine where this was made, `{public_name(config.model.name)}`: no hub knows it "
        "by that name. Put the path of your copy of it in its place.",
    ]


def _use(config: RunConfig, merged: bool, exported: bool) -> list[str]:
    """The lines of Python that load what the card is for."""
    name, revision = config.model.name, config.model.revision
    if merged:
        return [
            "from transformers import AutoModelForCausalLM",
            "",
            'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")',
        ]
    if name.startswith("builtin:") and not exported:
        return ["# No hub knows this base: `apiary export RUN --to DIR` writes it beside the adapter."]
    return [
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f'base = AutoModelForCausalLM.from_pretrained("{base_path(name)}"'
        + (f', revision="{revision}")' if revision and not is_local(name) else ")"),
        'model = PeftModel.from_pretrained(base, "THIS_FOLDER")',
    ]


def _apart(config: RunConfig) -> list[str]:
    """How prompts are to be written where data stands between delimiters."""
    if config.prompt.boundary == "plain":
        return []
    return [
        "",
        "It was tuned on structured queries: what a question is about (a document, the answer of a tool) stands "
        f"between `{structured.BEGIN}` and `{structured.END}`, each on a line of its own, after the question. Whoever "
        "serves it must write prompts so, and must first take both out of every text, again and again until none is "
        "left, in any case, spacing and Unicode form. `apiary chat` and `apiary evaluate` do that.",
    ]


def _grown(trained: int, rank: int, merged: bool) -> list[str]:
    if rank == trained:
        return []
    if rank < trained:
        return ["", f"It was cut to rank {rank} from a higher one, to what is nearest to its products at that rank."]
    had = "Before it was merged the adapter had" if merged else "This adapter has"
    return ["", f"{had} rank {rank}: the {trained} that are trained, and what the method has added to the base."]


def base_path(name: str) -> str:
    """The base as the card's commands name it: a hub id, a folder's name, or the built-in base's own folder."""
    return "THIS_FOLDER/base" if name.startswith("builtin:") else public_name(name)
