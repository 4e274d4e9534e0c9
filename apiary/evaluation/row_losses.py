"""`row_losses.json` of a simulation: what each model made of each held-out row, by which several runs are compared.

A simulation alone writes it, where all rows lie on one machine; in a deployment no score of a single row leaves a
site. A row stands there as a digest of its text: not the text, but whoever holds the file and guesses a row can tell
that it is there. So the file is as private as the data.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from apiary.core.errors import UserError
from apiary.core.files import finite, write_atomic
from apiary.data.examples import Example
from apiary.data.turns import conversation_text

Floats = NDArray[np.float64]
ROW_LOSSES_FILE = "row_losses.json"
_SCHEMA = 1


class RowLosses(NamedTuple):
    """A run's held-out rows in the order of its table."""

    rows: tuple[str, ...]  # (n,) digests
    tokens: Floats  # (n,) response tokens
    nats: Mapping[str, Floats]  # (n,) by method


def write_row_losses(folder: Path, examples: Sequence[Example], tokens: Floats, nats: Mapping[str, Floats]) -> None:
    """Write the losses of each held-out row by method.

    Args:
        folder: the run directory.
        examples: (n,) the rows.
        tokens: (n,) their response tokens.
        nats: (n,) summed loss of a row, by method.
    """
    values = {
        "schema": _SCHEMA,
        "rows": [_digest(example) for example in examples],
        "tokens": [int(count) for count in tokens],
        "nats": {method: [float(value) for value in row] for method, row in nats.items()},
    }
    write_atomic(folder / ROW_LOSSES_FILE, json.dumps(finite(values)) + "\n")


def _digest(example: Example) -> str:
    """16 hex digits of the conversation; tags do not count."""
    text = (conversation_text(example.turns) + example.tools).encode("utf-8")
    return hashlib.blake2b(text, digest_size=8).hexdigest()


def read_row_losses(folder: Path) -> RowLosses:
    """What `write_row_losses` wrote; a loss that was no number is NaN.

    Raises:
        UserError: no such file, or another shape than this version writes.
    """
    path = folder / ROW_LOSSES_FILE
    if not path.exists():
        raise UserError(
            f"run folder {str(folder)!r} has no {ROW_LOSSES_FILE}: apiary simulate writes it at the end of a run; "
            "an unfinished run goes on with --resume, and a deployment keeps no losses of single rows"
        )
    try:
        values = json.loads(path.read_bytes())
        rows, tokens = tuple(map(str, values["rows"])), np.array(values["tokens"], np.float64)
        nats = {str(method): np.array(row, np.float64) for method, row in values["nats"].items()}
        whole = values["schema"] == _SCHEMA and {len(rows)} == {len(row) for row in (tokens, *nats.values())}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{str(path)!r} cannot be read: {type(error).__name__}; was the file edited?") from None
    if not whole or not len(rows):
        raise UserError(f"{str(path)!r} has another shape than this version writes; make the run anew")
    return RowLosses(rows, tokens, nats)
