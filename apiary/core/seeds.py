"""Where all randomness comes from: one seed of the run, and a path for each purpose. Needs no torch."""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, *path: int | str) -> int:
    """A 63-bit seed for one purpose, from the run's seed and a path such as (round, client, "order").

    Different paths give unrelated seeds, and adding a purpose never changes the others.
    """
    text = "\x1f".join([str(seed), *map(str, path)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
