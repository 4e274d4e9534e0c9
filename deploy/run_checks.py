"""Whether the sites of a deployment can take a run, and the server's machine can."""

from __future__ import annotations

from apiary.config import compatibility, defaults
from apiary.config.schema import RunConfig
from apiary.core.errors import UserError

_ONLY_SIMULATED = {
    "relays": "sites send their answers to the server itself",
    "away": "sites are real, and come and fail as they do",
    "failing": "sites are real, and come and fail as they do",
    "attackers": "sites are real, and none is made to attack",
}


def begun(config: RunConfig) -> RunConfig:
    """The configuration with what it leaves to the run, and what `adapter.start` says: sites have no copy of that.

    Raises:
        UserError: it cannot be read or honoured.
    """
    config = defaults.resolved(config)
    if config.adapter.start is None:
        return config
    from apiary.models.start import resolved  # here, for `status` needs no torch

    return resolved(config)


def check(config: RunConfig) -> None:
    """Check that sites can take this run, and that this machine can.

    Raises:
        UserError: it names a template file, which no site would open; or the server has not the model, the device, the
            held-out rows or its own root set; or no rows decide when it stops; or attackers are to be simulated.
    """
    from apiary.data import (
        examples,
        templates,  # here, for `status` needs no torch
    )
    from apiary.models import availability

    if config.prompt.template not in templates.BUILTIN:
        known = ", ".join(templates.BUILTIN)
        raise UserError(f"prompt.template = {config.prompt.template!r}: sites take the built-in ones alone ({known})")
    if config.data.max_rows is not None:
        raise UserError(
            f"data.max_rows = {config.data.max_rows}: sites choose their rows themselves; leave it out, or let them "
            "shorten their files"
        )
    availability.check_device(config.model.device, "model.device =")
    availability.check_model(config.model.name, "model.name =", config.model.revision)
    if config.data.test is not None:
        examples.read(config.data.test, split="test", columns=config.data.columns, key="data.test")
    if config.strategy.root is not None:
        examples.read(config.strategy.root, columns=config.data.columns, key="strategy.root")
    if config.data.test is None and (undecided := compatibility.nothing_decides(config)):
        raise UserError(undecided)
    for key, why in _ONLY_SIMULATED.items():
        if getattr(config.simulate, key):
            raise UserError(f"simulate.{key}: {why}; leave it out")


def remarks(config: RunConfig) -> list[str]:
    """What means something else than in a simulation, or may hurt; a line for each."""
    lines = []
    if config.strategy.deadline_s == 0:
        lines.append("strategy.deadline_s = 0: a round waits without end for a site that is alive but stuck; set it")
    if config.personal.enabled:
        lines.append(
            "personal.enabled = true: sites set rows apart for models of their own, and each makes its own at home, "
            "once the adapter is handed out (apiary deploy personal); no figure of it comes here"
        )
    return lines
