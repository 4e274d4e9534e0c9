"""What a configuration leaves to the run: defaults that depend on its other keys."""

from __future__ import annotations

from typing import Final

from apiary.config.schema import Method, RunConfig

_MOMENTUM: Final = Method.model_validate({"name": "nesterov", "lr": 0.7, "momentum": 0.5})


def resolved(config: RunConfig) -> RunConfig:
    """The configuration with what `strategy.server_optimizer` = "auto" comes to; as it was where it says another.

    Nesterov's momentum where it was measured (docs/tuning.md): plain averages of both factors, without noise on them,
    and of one task, for what it remembers is of rounds that may have had another one. None elsewhere. A run writes what
    it came to into its own configuration.
    """
    if config.strategy.server_optimizer.name != "auto":
        return config
    adapter = config.adapter
    averages = config.strategy.name == "fedavg" and adapter.train == "both" and adapter.share == "both"
    quiet = config.privacy.unit == "none" and not config.continual.stages
    chosen = _MOMENTUM if averages and quiet else Method(name="none")
    return config.model_copy(update={"strategy": config.strategy.model_copy(update={"server_optimizer": chosen})})
