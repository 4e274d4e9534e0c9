"""What a run that goes on may change of its configuration, and what decides its result and must stay."""

from __future__ import annotations

from typing import Any, Final

from apiary.config import defaults
from apiary.config.schema import RunConfig

MAY_CHANGE: Final = frozenset(
    {
        "train.threads",
        "strategy.deadline_s",
        "strategy.join_timeout_s",
        "evaluate.baselines",
        "evaluate.samples",
        "simulate.engine",
        "simulate.cpus_per_client",
        "simulate.gpus_per_client",
        "log.trackers",
        "log.project",
    }
)
"""Keys that say how a run is carried out and shown, not what is trained or which round is delivered.

`rounds` is not among them: the schedule of the learning rate, the stages and the noise are planned over all rounds.
"""


def differences(made: RunConfig, config: RunConfig) -> dict[str, tuple[Any, Any]]:
    """The keys that decide the result and differ, each with its value in `made` and in `config`."""
    left, right = (_flat(defaults.resolved(one)) for one in (made, config))
    return {key: (value, right[key]) for key, value in left.items() if value != right[key] and key not in MAY_CHANGE}


def _flat(config: RunConfig) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in config.model_dump(mode="json").items():
        flat |= {f"{name}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
    return flat
