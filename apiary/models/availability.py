"""What can be known of a model, a device and rows before anything starts: no weight is read, nothing is trained."""

from __future__ import annotations

from pathlib import Path

from apiary.config.schema import ModelConfig
from apiary.core.errors import UserError
from apiary.core.formatting import first_line
from apiary.models.base import BUILTIN, ask_hub, resolve_device


def check_device(name: str, key: str) -> None:
    """Check that this machine has a device.

    Args:
        name: as `model.device` names it.
        key: what error lines call it.

    Raises:
        UserError: the text is no device name, or this machine has no such device.
    """
    config = ModelConfig(device=name)
    try:
        resolve_device(config)
    except UserError as error:
        raise UserError(f"{key} {str(error).removeprefix('model.device = ')}") from None


def check_model(name: str, key: str, revision: str | None = None) -> None:
    """Check that a base model is there, with a configuration and a tokenizer that Transformers can read.

    Args:
        name: as `model.name` has it.
        key: what error lines call it.
        revision: of a model on the hub.

    Raises:
        UserError: the model can't be found or read.
    """
    if name.startswith("builtin:"):
        if name != BUILTIN:
            raise UserError(f"{key} {name!r}: the only built-in model is {BUILTIN!r}")
        return
    local = is_folder(name)
    if not local and name.startswith(("/", "./", "../", "~")):
        raise UserError(f"{key} {name!r}: no such folder")
    from transformers import AutoConfig, AutoTokenizer

    source = str(Path(name).expanduser()) if local else name
    if not local:
        try:
            ask_hub(name, revision)
        except Exception as error:  # the hub's errors share no other base
            problem = f"no such folder here, and the hub does not give it ({first_line(error)})"
            raise UserError(f"{key} {name!r}: {problem}") from error
    for part, reader in (("configuration", AutoConfig), ("tokenizer", AutoTokenizer)):
        try:
            reader.from_pretrained(source, revision=revision)
        except Exception as error:  # the model classes' errors share no other base
            problem = f"has no {part} that Transformers can read ({first_line(error)})"
            raise UserError(f"{key} {name!r}: {problem}") from error


def is_folder(name: str) -> bool:
    """Whether a model's name is that of a folder here, which then comes before one on the hub."""
    try:
        return Path(name).expanduser().is_dir()
    except (OSError, RuntimeError):  # a name that no file system takes, or of nobody's home
        return False
