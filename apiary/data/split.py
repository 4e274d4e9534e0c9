"""Which rows are held out, which of the others a run uses and how it reads them, and how a site pins all of it.

Whoever can choose the fraction that is held out, and can compute the hash of a row, learns from two counts whether a
site has that row. So a site draws a key of its own and keeps it, with the first fraction that it was asked for, in
`split.json` in its state folder. A simulation has no adversary: it uses `PUBLIC_KEY`, so that a run is the same
wherever it is done again.

Whoever can choose by other settings which rows count learns as much: a stage, or a step of curation, that one row
alone passes is a question about that row. These a site takes from a run only as its operator has agreed to them. How
rows become tokens, `[prompt]`, is pinned by the first run as the fraction is. So is what share of the training rows is
set apart to choose the site's own model by (`personal.enabled`, `personal.validation`): which rows that makes follows
from the site's key alone, and from nothing that a server could aim at a row.
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from apiary.config.schema import CurateConfig, PersonalConfig, PromptConfig, RunConfig
from apiary.core.errors import UserError
from apiary.core.files import own_folder, write_atomic

FILE, SCHEMA = "split.json", 1
PUBLIC_KEY = b""  # of a simulation: anybody can compute which rows are held out
_KEY_BYTES = 32
_COMMAND = "apiary deploy split"
_REST = "prompt, own models, stages and curation"


class Split(NamedTuple):
    """Which rows are held out."""

    fraction: float
    key: bytes  # of the hash of a question; secret at a site
    reading: Mapping[str, Any] | None = None  # which rows are used and how, see `reading`; None: not pinned yet


class AnotherSplit(UserError):
    """A run asks for other rows, or for another way to read them, than what is pinned."""


def reading(config: RunConfig) -> dict[str, Any]:
    """The settings of a run, by key, that say which of a site's rows are used and how they become tokens.

    `data.test_fraction` is pinned beside them. `data.columns` is no setting of a run at a site, nor are the other keys
    of `[data]`.
    """
    values = config.model_dump(mode="json")
    staged = {"by": config.continual.by if config.continual.stages else "", "stages": values["continual"]["stages"]}
    curated = values["curate"] if config.curate.steps else CurateConfig().model_dump(mode="json")
    enabled = config.personal.enabled
    own = {"enabled": enabled, "validation": config.personal.validation if enabled else PersonalConfig().validation}
    parts = {"continual": staged, "curate": curated, "prompt": values["prompt"], "personal": own}
    return {f"{part}.{key}": value for part, keys in parts.items() for key, value in keys.items()}


# What a run asks that takes all rows as they are. Of these keys the operator has to agree to anything else; of
# `[prompt]` and the rows for own models the first run decides.
_ALL_ROWS: Mapping[str, Any] = MappingProxyType(
    {
        "continual.by": "",
        "continual.stages": [],
        **{f"curate.{key}": value for key, value in CurateConfig().model_dump(mode="json").items()},
    }
)
_LEFT_OUT: Mapping[str, Any] = MappingProxyType(
    {
        **_ALL_ROWS,
        **{f"prompt.{key}": value for key, value in PromptConfig().model_dump(mode="json").items()},
        "personal.enabled": False,
        "personal.validation": PersonalConfig().validation,
    }
)  # the value of a key that a file of an older version does not name


def draw(fraction: float) -> Split:
    """A split with a new secret key, from the operating system's generator.

    Raises:
        UserError: the fraction is not from 0 up to below 1.
    """
    if not 0.0 <= fraction < 1.0:
        raise UserError(f"--test-fraction {fraction:g}: expected a number from 0 up to below 1, such as 0.1")
    return Split(fraction, secrets.token_bytes(_KEY_BYTES))


def load(state: Path) -> Split | None:
    """The split that a site has pinned; None where it never took part.

    Args:
        state: the site's state folder.

    Raises:
        UserError: the file cannot be read, or it is gone though the site has taken part in runs.
    """
    path = state / FILE
    try:
        values = json.loads(path.read_bytes())
        if values["schema"] != SCHEMA:
            raise ValueError(f"schema {values['schema']!r}")
        split = Split(float(values["test_fraction"]), bytes.fromhex(values["key"]), values.get("reading"))
        if not (split.reading is None or isinstance(split.reading, dict)):
            raise ValueError("reading")
        if not (math.isfinite(split.fraction) and 0.0 <= split.fraction < 1.0):
            raise ValueError(f"test_fraction {split.fraction:g}")
        if len(split.key) != _KEY_BYTES:
            raise ValueError(f"a key of {len(split.key)} bytes")
    except FileNotFoundError:
        if (state / "runs").exists():
            raise UserError(
                f"the held-out split {str(path)!r} is gone, but this site has taken part in runs: put it back, or pin "
                f"one anew ({_COMMAND} KIT --test-fraction F --new-key); rows once trained on are then held out"
            ) from None
        return None
    except OSError as error:
        raise UserError(f"the held-out split {str(path)!r} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"the held-out split {str(path)!r} cannot be read ({error}): put a sound copy in its place, or pin one "
            f"anew ({_COMMAND} KIT --test-fraction F --new-key)"
        ) from None
    return split


def save(state: Path, split: Split) -> None:
    """Pin a split: written whole or not at all, for the owner's eyes only.

    Raises:
        OSError: the disk is full or the folder read-only.
    """
    own_folder(state)
    values = {"schema": SCHEMA, "test_fraction": split.fraction, "key": split.key.hex()}
    values |= {} if split.reading is None else {"reading": dict(split.reading)}
    write_atomic(state / FILE, json.dumps(values) + "\n", private=True)


def of_run(state: Path, config: RunConfig) -> Split:
    """The split for a run, pinned: as it was, or, for the first run, with what that run asks for.

    Nothing here looks at a row, so neither can what is refused, or pinned, tell of one.

    Args:
        state: the site's state folder.
        config: the run.

    Raises:
        AnotherSplit: the run asks for what is not pinned, or for rows that the operator has to agree to. The text may
            be told to the server.
        UserError: what is pinned cannot be read.
        OSError: it cannot be written.
    """
    pinned, asked = load(state), reading(config)
    fraction = config.data.test_fraction
    if pinned is not None and pinned.fraction != fraction:
        raise AnotherSplit(
            f"data.test_fraction = {fraction:g}: this site has pinned {pinned.fraction:g} and takes no other from a "
            f"run; set that in the run, or ask the site's operator ({_COMMAND})"
        )
    if pinned is None or pinned.reading is None:
        if unasked := [key for key, value in _ALL_ROWS.items() if asked[key] != value]:
            raise AnotherSplit(
                f"{', '.join(unasked)}: this site's operator has agreed to no such choice of its rows; send the run's "
                f"configuration there, to agree to it ({_COMMAND} KIT --agree run.toml)"
            )
        made = (pinned or draw(fraction))._replace(reading=asked)
        save(state, made)
        return made
    if other := differing(pinned, config):
        raise AnotherSplit(
            f"{', '.join(other)}: this site has pinned another value and takes no other from a run; its operator can "
            f"agree to the run's configuration ({_COMMAND} KIT --agree run.toml)"
        )
    return pinned


def differing(pinned: Split, config: RunConfig) -> list[str]:
    """The keys of `reading` of which a site has pinned another value than a run's; empty where none is pinned yet."""
    known, asked = pinned.reading, reading(config)
    if known is None:
        return []
    return [key for key, value in asked.items() if known.get(key, _LEFT_OUT.get(key)) != value]


def repin(state: Path, fraction: float, *, new_key: bool, agreed: RunConfig | None = None) -> Split:
    """Pin what the site's operator asks for; under the same key the smaller held-out set is in the larger.

    Args:
        state: the site's state folder.
        fraction: of the questions that are held out from now on.
        new_key: draw another key, so that all rows are dealt anew; what is pinned is then not read, and is gone.
        agreed: a run whose choice of rows, and whose way to read them, the operator agrees to; those that are pinned
            where None.

    Raises:
        UserError: the fraction is impossible, or the key is to be kept and what is pinned cannot be read.
        OSError: it cannot be written.
    """
    fresh = draw(fraction)
    pinned = None if new_key else load(state)
    split = fresh if pinned is None else pinned._replace(fraction=fraction)
    if agreed is not None:
        split = split._replace(reading=reading(agreed))
    save(state, split)
    return split


def lines(split: Split) -> list[str]:
    """What is pinned, for the site's operator: the key apart, a line for each setting that is not the default."""
    fraction = f"data.test_fraction = {split.fraction:g}"
    if split.reading is None:
        return [fraction, f"nothing else: of {_REST} the first run decides, with all rows"]
    values = {key: value for key, value in split.reading.items() if value != _LEFT_OUT.get(key)}
    told = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]
    return [fraction, *told, f"all else of {_REST} as by default"]
