"""The adapter that a run begins from: a new one, or the one in the folder that `adapter.start` names.

A folder is read where the run is started and at its server, never at a site: rank, alpha, scaling and targets are
written into the configuration that travels, and the adapter itself is the first that a client receives.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apiary.config import compatibility
from apiary.config.schema import AdapterConfig, ModelConfig, RunConfig
from apiary.config.summary import public_name
from apiary.core import lora
from apiary.core.errors import UserError
from apiary.core.lora import Factors
from apiary.models import adapters, peft_folder, targets
from apiary.models.adapters import LanguageModel
from apiary.models.peft_folder import Foreign
from apiary.models.peft_keys import PeftFolder, read_folder


def resolved(config: RunConfig) -> RunConfig:
    """The configuration with what `adapter.start` says of the adapter, and of the base where `model.name` is not given.

    Without `adapter.start` it is as it was. What has been resolved stays as it is, as long as the folder does.

    Raises:
        UserError: the folder cannot be read or honoured, holds another adapter than before, or a key of the table
            `adapter` that somebody has set does not go with it.
    """
    if config.adapter.start is None:
        return config
    forget()
    folder = _folder(config.adapter.start)
    model = config.model
    if "name" not in model.model_fields_set and folder.base:
        model = model.model_copy(update={"name": folder.base, "revision": folder.values.get("revision")})
    foreign = _opened(str(folder.path.resolve()), model)
    adapter = _adapter(config.adapter, foreign, model)
    changed = config.model_copy(update={"model": model, "adapter": adapter})
    if problems := compatibility.problems(changed):
        raise UserError(*problems)
    return changed


def _folder(start: str) -> PeftFolder:
    try:
        return read_folder(peft_folder.folder_of(Path(start).expanduser()))
    except UserError as error:
        raise UserError(f"adapter.start: {error}") from None


@functools.lru_cache(maxsize=1)
def _opened(path: str, model: ModelConfig) -> Foreign:
    try:
        return peft_folder.open_folder(read_folder(Path(path)), model)
    except UserError as error:
        raise UserError(f"adapter.start: {error}") from None


def forget() -> None:
    """Read folders again: what was read before may have changed since."""
    _opened.cache_clear()


def _adapter(given: AdapterConfig, foreign: Foreign, model: ModelConfig) -> AdapterConfig:
    """The table `adapter` of the run: as given where somebody has set a key, else as the start has it."""
    start, own = f"adapter.start = {given.start!r}", foreign.settings
    chosen = given.model_fields_set
    _check_digest(given, foreign)
    rank = given.rank if "rank" in chosen else own.rank
    if rank < own.rank:
        raise UserError(f"adapter.rank = {rank}: {start} has rank {own.rank}; set that or more, or leave it out")
    kind = given.scaling if "scaling" in chosen else own.scaling
    scale = lora.scaling(own.alpha, own.scaling)(own.rank)
    alpha = given.alpha if "alpha" in chosen else scale / lora.scaling(1.0, kind)(rank)  # the scale stays
    if rank == own.rank and kind == own.scaling and "alpha" not in chosen:
        alpha = own.alpha  # to the bit
    if "targets" in chosen:
        base, _ = adapters.load_base(model)
        named, there = (targets.find(base, one, model.name).weights for one in (given, own))
        if odd := sorted(named ^ there):
            which = "names" if odd[0] in named else "leaves out"
            raise UserError(
                f"adapter.targets {which} {odd[0]!r}, and {start} {'does not' if odd[0] in named else 'does'}; leave "
                "the key out"
            )
    values: dict[str, Any] = {"rank": rank, "alpha": alpha, "scaling": kind, "start_digest": foreign.digest}
    if "targets" not in chosen:
        values["targets"] = own.targets
    return given.model_copy(update={**values, "start": str(Path(given.start or "").expanduser().resolve())})


def _check_digest(given: AdapterConfig, foreign: Foreign) -> None:
    if given.start_digest not in (None, foreign.digest):
        raise UserError(
            f"adapter.start = {given.start!r}: it holds another adapter than the one that the run began from (digest "
            f"{given.start_digest} then, {foreign.digest} now); put that back, or begin another run without "
            "adapter.start_digest"
        )


def starting_adapter(lm: LanguageModel, config: RunConfig) -> dict[str, Tensor]:
    """What a run begins from, as an adapter of the model's rank.

    Of `adapter.start` the products are kept. Directions that it has not (its rank is lower, or that of a module is) are
    those of a new adapter: A random, B zero, or they would never learn. Where clients have several ranks, its factors
    are those whose leading directions approximate the product best, so that each gets the best start of its rank.

    Args:
        lm: the model, of the run's rank or a lower one.
        config: the run, resolved.

    Raises:
        UserError: the folder is gone or holds another adapter by now.
    """
    fresh = adapters.fresh_adapter(lm, config.seed)
    if config.adapter.start is None:
        return fresh
    foreign = _opened(str(_folder(config.adapter.start).path.resolve()), config.model)
    _check_digest(config.adapter, foreign)
    made = {}
    for module, new in lora.split(fresh).items():
        part = foreign.parts[module]
        held = Factors(part.b * (part.scale / lm.scale), part.a)
        if config.adapter.ranks:
            held = lora.balanced(lora.svd(held), config.adapter.rank)
        held = lora.resize(held, lm.rank)
        unused = ~(held.a.any(1) | held.b.any(0))
        made[module] = Factors(held.b, torch.where(unused[:, None], new.a, held.a))
    return lora.join(made)


def named_start(lm: LanguageModel, config: RunConfig) -> dict[str, Tensor] | None:
    """As `starting_adapter`; None where the run begins from a new adapter, which says what the base says."""
    return None if config.adapter.start is None else starting_adapter(lm, config)


def remarks(config: RunConfig) -> list[str]:
    """What there is to say of the adapter that a run begins from, a line each, for its log: without paths.

    Raises:
        UserError: the folder is gone, or cannot be honoured.
    """
    if config.adapter.start is None:
        return []
    folder = _folder(config.adapter.start)
    lines = [*_opened(str(folder.path.resolve()), config.model).remarks]
    if folder.base and config.model.name not in (folder.base, str(Path(folder.base).resolve())):
        lines.append(f"made on the base {public_name(folder.base)!r}; in use is {public_name(config.model.name)!r}")
    elif (revision := folder.values.get("revision")) != config.model.revision and revision:
        lines.append(f"made on the revision {revision!r} of its base; in use is {config.model.revision!r}")
    if config.privacy.unit == "record":
        lines.append("the privacy of this run does not cover rows that the start was tuned on")
    return [f"adapter.start: {line}" for line in lines]
