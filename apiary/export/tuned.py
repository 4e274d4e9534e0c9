"""What can be done with a finished run or an adapter: open it, score it on other data, talk to it, hand it on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from apiary.config import schema as configs
from apiary.config import summary
from apiary.config.schema import RunConfig, UserError
from apiary.config.summary import public_name
from apiary.core import lora
from apiary.core.formatting import loss_text
from apiary.core.lora import is_b
from apiary.core.tensors import StateDict
from apiary.data import examples, tokenization
from apiary.data.examples import Example, Turn
from apiary.data.tokenization import Template
from apiary.evaluation import comparison
from apiary.evaluation.comparison import Measured
from apiary.models import adapters
from apiary.models.adapters import LanguageModel
from apiary.privacy import statement
from apiary.report import sites, verdict
from apiary.report.data import parse_metrics
from apiary.tracking import event_log

_WEIGHTS = "adapter_model.safetensors"
_SETTINGS = "apiary.toml"  # the run's configuration, kept inside the adapter folder
_OF_THE_SITE = ("data",)  # tables that say where private data lies


class Tuned(NamedTuple):
    """A base model with an adapter, and the settings it was tuned with."""

    config: RunConfig
    lm: LanguageModel
    template: Template
    adapter: StateDict
    run: Path | None  # the run directory, if it is one


class Kept(NamedTuple):
    """Where a run directory keeps its baselines, and what belongs to clients."""

    alone: Path  # a PEFT folder for each client
    central: Path  # a PEFT folder
    personal: Path  # a PEFT folder for each client, where each has a model of its own


def kept_in(run: Path) -> Kept:
    """The places in a run directory."""
    return Kept(run / "baselines" / "local", run / "baselines" / "central", run / "personal")


def open_tuned(path: Path, overrides: Sequence[str] = ()) -> Tuned:
    """The model of a run directory or an adapter folder.

    Args:
        path: a run (with `adapter/` in it) or a PEFT adapter folder.
        overrides: `key=value` settings on top of the stored ones.

    Raises:
        UserError: neither of the two, or the base model cannot be had.
    """
    run = path if (path / "adapter" / _WEIGHTS).exists() else None
    folder = path / "adapter" if run else path
    if not (folder / _WEIGHTS).exists():
        unfinished = (path / "config.toml").exists()
        hint = (
            "it is not finished: apiary simulate --out DIR --resume"
            if unfinished
            else "give a run directory or a PEFT adapter folder"
        )
        raise UserError(f"{str(path)!r} holds no adapter; {hint}")
    stored = next((f for f in (path / "config.toml", folder / _SETTINGS) if f.exists()), None)
    config = configs.load(stored, [*_settings_of(folder, stored), *overrides])
    lm = adapters.load(config.model, config.adapter)
    template = tokenization.make_template(config.prompt, lm.tokenizer)
    try:
        adapter = adapters.read_adapter(lm, folder / _WEIGHTS)
        adapters.set_adapter(lm, adapter)
    except ValueError as error:
        raise UserError(f"{str(path)!r} does not fit the base {config.model.name!r}: {error}") from None
    if config.adapter.share != "both" and _is_half(adapter):
        kept = kept_in(run or path.parent).personal
        at_site = "a site has it in its state folder, as runs/RUN/adapter"
        where = f"open one in {str(kept)!r}" if kept.is_dir() else at_site
        raise UserError(
            f"{str(path)!r} holds the factors that clients share, which are no model by themselves: with "
            f"adapter.share = {config.adapter.share!r} each client has one of its own; {where}"
        )
    return Tuned(config, lm, template, adapter, run)


def _is_half(adapter: StateDict) -> bool:
    return not any(tensor.any() for name, tensor in adapter.items() if is_b(name))


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


def save_adapter_folder(
    lm: LanguageModel, adapter: StateDict, folder: Path, config: RunConfig, run: Path | None = None
) -> None:
    """A PEFT folder that any tool loads, with a model card and the run's settings; `run` is the folder's where None."""
    text = card(config, exported_rank(adapter), None, statement.read(run or folder.parent), exported=False)
    if config.adapter.share != "both" and _is_half(adapter):
        text += "\nThese are the factors A that clients share. B is zero: each client has its own, and keeps it.\n"
    adapters.save_adapter(lm, adapter, folder, text)
    event_log.write_atomic(folder / _SETTINGS, config.to_toml(without=_OF_THE_SITE))


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
    central = None
    if run:
        places = kept_in(run)
        # A name with a dot in front is what a kill left of a folder under way.
        alone = {f.parent.name: adapters.read_adapter(lm, f) for f in sorted(places.alone.glob(f"[!.]*/{_WEIGHTS}"))}
        central = adapters.read_adapter(lm, places.central / _WEIGHTS) if (places.central / _WEIGHTS).exists() else None
    remarks = [line for report in data.reports for line in report.lines()]
    everything = len(data.test or data.examples)
    if (measured := len(held_out.examples)) < everything:
        remarks.append(
            f"{measured} of {everything} examples are measured: evaluate.max_examples = "
            f"{config.evaluate.max_examples}, and {held_out.left_out} that do not fit prompt.max_tokens are left out"
        )
    if config.privacy.unit != "none" and (alone or central is not None):
        remarks.append("local and central were trained without noise, federated with it: not like with like")
    return comparison.compare(lm, held_out, config, adapter, alone, central).rows, remarks


def reply(tuned: Tuned, history: Sequence[Turn], max_new_tokens: int) -> str:
    """The model's next turn, decoded greedily, with the template it was tuned with."""
    example = Example((*history, Turn("assistant", "")), {})
    ids = tokenization.encode_prompt(example, tuned.template, tuned.lm.tokenizer, tuned.config.prompt.max_tokens)
    adapters.set_adapter(tuned.lm, tuned.adapter)
    return comparison.answer_all(tuned.lm, [ids], max_new_tokens)[0]


def export(path: Path, to: Path, *, merge: bool) -> Path:
    """A folder to hand on: the adapter with its card, or with `merge` a whole model that needs no PEFT.

    For a built-in base, which no hub knows, the base is written beside the adapter as `base/`.

    Raises:
        UserError: `to` is not empty, or the run has no adapter.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"{str(to)!r} is a file or not empty; choose another --to")
    # Merging in 16 bits would round a light update away.
    tuned = open_tuned(path, ["model.dtype=float32"] if merge else [])
    metrics = event_log.read_metrics(tuned.run) if tuned.run and (tuned.run / "metrics.json").exists() else None
    privacy = statement.read(tuned.run) if tuned.run else {}
    draft = to.with_name(f".{to.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        _write_export(tuned, draft, merge)
        text = card(tuned.config, exported_rank(tuned.adapter), metrics, privacy, merged=merge)
        event_log.write_atomic(draft / "README.md", text)
        event_log.write_atomic(draft / _SETTINGS, _handed_on(tuned.config).to_toml(without=_OF_THE_SITE))
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
    prompt = config.prompt.model_copy(update={"template": public_name(config.prompt.template)})
    strategy = config.strategy.model_copy(update={"root": None})
    return config.model_copy(update={"model": model, "prompt": prompt, "strategy": strategy})


def _write_export(tuned: Tuned, draft: Path, merge: bool) -> None:
    base, tokenizer = adapters.load_base(tuned.config.model)
    tokenizer.save_pretrained(draft)
    if not merge:
        adapters.save_adapter(tuned.lm, tuned.adapter, draft / "adapter")
        for file in (draft / "adapter").iterdir():
            file.rename(draft / file.name)
        (draft / "adapter").rmdir()
        written = draft / "adapter_config.json"
        values = json.loads(written.read_text(encoding="utf-8"))
        values["base_model_name_or_path"] = _base_path(tuned.config.model.name).removeprefix("THIS_FOLDER/")
        written.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        if tuned.config.model.name.startswith("builtin:"):
            base.save_pretrained(draft / "base")
            tokenizer.save_pretrained(draft / "base")
        return
    adapters.merged(tuned.lm, tuned.adapter).save_pretrained(draft)


def exported_rank(adapter: StateDict) -> int:
    """The rank of an adapter with what its method put into the base, as it is handed on."""
    trained, base_delta = lora.parts(adapter)
    return sum(max((f.rank for f in lora.split(part).values()), default=0) for part in (trained, base_delta))


def card(
    config: RunConfig,
    rank: int,
    metrics: Mapping[str, Any] | None,
    privacy: Mapping[str, Any],
    *,
    merged: bool = False,
    exported: bool = True,
) -> str:
    """The model card: what it was tuned from, how, and how well it did.

    Args:
        config: the run.
        rank: of the adapter that is handed on.
        metrics: its results, where they are there.
        privacy: its account (`apiary.privacy.statement`); empty where it is not known.
        merged: whether the card is for a whole model.
        exported: whether the base stands beside the adapter.
    """
    name = config.model.name
    if merged:
        use = [
            "from transformers import AutoModelForCausalLM",
            "",
            'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")',
        ]
    elif name.startswith("builtin:") and not exported:
        use = ["# No hub knows this base: `apiary export RUN --to DIR` writes it beside the adapter."]
    else:
        use = [
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM",
            "",
            f'base = AutoModelForCausalLM.from_pretrained("{_base_path(name)}")',
            'model = PeftModel.from_pretrained(base, "THIS_FOLDER")',
        ]
    lines = [
        "---",
        *([] if name.startswith("builtin:") or name != public_name(name) else [f"base_model: {name}"]),
        "library_name: " + ("transformers" if merged else "peft"),
        "tags: [federated-learning, lora, apiary]",
        "---",
        "# A federated LoRA adapter" + (", merged into its base" if merged else ""),
        "",
        f"Tuned with Apiary from `{public_name(name)}` by federated learning in {config.rounds} rounds, by "
        f"{summary.sentence(config)}; prompt template `{Path(config.prompt.template).name}`. "
        f"Clients sent {summary.sent(config)} and counts.",
        *_grown(config.adapter.rank, rank, merged),
        "",
        "```python",
        *use,
        "```",
        *_card_table(metrics),
        "",
        "Privacy: " + (statement.sentence(privacy) if privacy else "the run's own folder says what was promised."),
        "",
        "All settings are in `apiary.toml`, but for those of the data, which stayed where the data is.",
    ]
    return "\n".join(lines) + "\n"


def _grown(trained: int, rank: int, merged: bool) -> list[str]:
    if rank == trained:
        return []
    had = "Before it was merged the adapter had" if merged else "This adapter has"
    return ["", f"{had} rank {rank}: the {trained} that are trained, and what the method has added to the base."]


def _base_path(name: str) -> str:
    return "THIS_FOLDER/base" if name.startswith("builtin:") else public_name(name)


def _card_table(metrics: Mapping[str, Any] | None) -> list[str]:
    if not metrics:
        return []
    parsed = parse_metrics(metrics)
    said = (verdict.attacked(parsed), verdict.not_alike(parsed), verdict.personal(parsed), sites.how_far(parsed))
    remarks = [line for line in said if line]
    below = ["", " ".join(remarks)] if remarks else []
    if not metrics["table"]:
        return below
    rows = ["", "| | held-out loss (nats per response token) | exact match |", "|---|---|---|"]
    for row in metrics["table"]:
        accuracy = "" if row["accuracy"] is None else f"{100 * row['accuracy']:.1f}%"
        rows.append(f"| {row['method']} | {loss_text(row['loss'])} | {accuracy} |")
    return rows + below
