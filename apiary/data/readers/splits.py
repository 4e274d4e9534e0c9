"""The splits of one source: which is trained on, which is held out, and what is said of the others."""

from __future__ import annotations

from collections.abc import Mapping

from apiary.core.errors import UserError
from apiary.data.readers.files import DataFile

HELD_OUT = ("test",)


def choose(file: DataFile, rows: Mapping[str, int | None], split: str) -> tuple[str, str | None]:
    """The split to train on and the held-out one, if any; splits that are not used are noted.

    Args:
        file: whose splits.
        rows: of each split that is there, None where they are not counted.
        split: `data.split`.

    Raises:
        UserError: there is no such split.
    """
    by_name = {name.lower(): name for name in rows}
    chosen = split if split in rows else by_name.get(split.lower())
    if chosen is None:
        raise UserError(f"data.split = {split!r}: {file.name} has no such split; it has {', '.join(rows) or 'none'}")
    held_out = next((by_name[name] for name in HELD_OUT if name in by_name and by_name[name] != chosen), None)
    for name, count in rows.items():
        if name not in (chosen, held_out):
            counted = "" if count is None else f" ({count:,} rows)"
            file.notes.append(f"its split {name!r}{counted} is not used; data.split = {name!r} trains on it")
    return chosen, held_out
