"""Experiment trackers as observers of a run, through accelerate."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apiary.config.schema import LogConfig, RunConfig
from apiary.core.errors import UserError

if TYPE_CHECKING:
    from apiary.tracking.event_log import Event, Observer

_TRACKED = frozenset({"round", "evaluate"})
_PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX")}  # where it is not the tracker's own name


def tracker(config: RunConfig, folder: Path) -> Observer:
    """An observer that logs the numbers of round and evaluate events to all `log.trackers`.

    Names are `round/train_loss`, `evaluate/loss`, `evaluate/clients/NAME` and so on. The trackers
    are closed by the run's finish event. Without trackers it does nothing.

    Raises:
        UserError: a tracker's package is not installed.
    """
    trackers = [_start(name, config.log, folder) for name in config.log.trackers]
    settings = dict(_settings(config.model_dump(mode="json")))
    for each in trackers:
        each.store_init_configuration(settings)

    def observe(event: Event) -> None:
        if event["event"] in _TRACKED:
            values = dict(_numbers(event["event"], event))
            for each in trackers:
                each.log(values, step=event["round"])
        elif event["event"] == "finish":
            for each in trackers:
                each.finish()

    return observe


def check(config: RunConfig) -> None:
    """Check that every tracker's package is here, before any work.

    Raises:
        UserError: the package of a configured tracker isn't installed.
    """
    for name in config.log.trackers:
        if all(importlib.util.find_spec(package) is None for package in _PACKAGES.get(name, (name,))):
            raise _missing(name)


def _missing(name: str) -> UserError:
    return UserError(
        f"log.trackers = {name!r}: its package is not installed; `pip install {name}`, or leave the tracker out"
    )


def _start(name: str, config: LogConfig, folder: Path) -> Any:
    from accelerate.state import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # accelerate's own logger refuses to speak before its state exists
    kind = LOGGER_TYPE_TO_CLASS[name]
    options: dict[str, Any] = {
        "wandb": {"name": folder.name, "dir": str(folder)},
        "trackio": {"name": folder.name},
        "mlflow": {"run_name": folder.name},
    }.get(name, {})
    if kind.requires_logging_directory:
        options["logging_dir"] = str(folder / "trackers")
    try:
        started = kind(config.project, **options)
        started.start()
    except ImportError:
        raise _missing(name) from None
    return started


def _numbers(prefix: str, fields: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in fields.items():
        if isinstance(value, Mapping):
            yield from _numbers(f"{prefix}/{key}", value)
        elif key == "ci95" and isinstance(value, list) and None not in value:
            yield from zip((f"{prefix}/ci95_low", f"{prefix}/ci95_high"), value, strict=True)
        elif key not in ("time", "round") and isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{prefix}/{key}", value


def _settings(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, bool | int | float | str]]:
    """Flat dotted settings, in types that every tracker takes.

    Absolute paths stay home: a tracker may be someone else's server.
    """
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _settings(value, f"{prefix}{key}.")
        elif value is not None and not (isinstance(value, str) and Path(value).is_absolute()):
            yield (
                f"{prefix}{key}",
                value if isinstance(value, (bool, int, float, str)) else str(value),
            )
