"""Which rows are held out: a fraction of the questions, by a keyed hash, and how a site pins both for good.

Whoever can choose the fraction, and can compute the hash of a row, learns from two counts whether a site has that row.
So a site draws a key of its own and keeps it, with the first fraction that it was asked for, in `split.json` in its
state folder. A simulation has no adversary: it uses `PUBLIC_KEY`, so that a run is the same wherever it is done again.
"""

from __future__ import annotations

import json
import math
import secrets
from pathlib import Path
from typing import NamedTuple

from apiary.core.errors import UserError
from apiary.core.files import own_folder, write_atomic

FILE, SCHEMA = "split.json", 1
PUBLIC_KEY = b""  # of a simulation: anybody can compute which rows are held out
_KEY_BYTES = 32
_COMMAND = "apiary deploy split"


class Split(NamedTuple):
    """Which rows are held out."""

    fraction: float
    key: bytes  # of the hash of a question; secret at a site


class AnotherSplit(UserError):
    """A run asks for another held-out fraction than the one that is pinned."""


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
        split = Split(float(values["test_fraction"]), bytes.fromhex(values["key"]))
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
    write_atomic(state / FILE, json.dumps(values) + "\n", private=True)


def pin(state: Path, split: Split) -> bool:
    """Pin a split where none is pinned, and say whether that was so.

    Raises:
        OSError: it cannot be written; no row has then been told of.
    """
    if (state / FILE).exists():
        return False
    save(state, split)
    return True


def of_run(state: Path, fraction: float) -> Split:
    """The split for a run: the pinned one, or a new one for the first run, which `pin` has yet to keep.

    Args:
        state: the site's state folder.
        fraction: `data.test_fraction` of the run.

    Raises:
        AnotherSplit: the site has pinned another fraction. The text may be told to the server.
        UserError: what is pinned cannot be read.
    """
    pinned = load(state)
    if pinned is None:
        return draw(fraction)
    if pinned.fraction != fraction:
        raise AnotherSplit(
            f"data.test_fraction = {fraction:g}: this site has pinned {pinned.fraction:g} and takes no other from a "
            f"run; set that in the run, or ask the site's operator ({_COMMAND})"
        )
    return pinned


def repin(state: Path, fraction: float, *, new_key: bool) -> Split:
    """Pin another fraction, as the site's operator asks; under the same key the smaller held-out set is in the larger.

    Args:
        state: the site's state folder.
        fraction: of the questions that are held out from now on.
        new_key: draw another key, so that all rows are dealt anew; what is pinned is then not read.

    Raises:
        UserError: the fraction is impossible, or the key is to be kept and what is pinned cannot be read.
        OSError: it cannot be written.
    """
    fresh = draw(fraction)
    pinned = None if new_key else load(state)
    split = fresh if pinned is None else pinned._replace(fraction=fraction)
    save(state, split)
    return split
