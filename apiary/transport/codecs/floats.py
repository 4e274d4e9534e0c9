"""Codecs that keep every entry as a float."""

from __future__ import annotations

import numpy as np
from torch import Generator

from apiary.core.errors import NotFinite
from apiary.transport.codec import (
    CODECS,
    Bytes,
    Codec,
    Floats,
    of_bf16,
    take,
)


@CODECS.register("fp32")
def fp32() -> Codec:
    """The change as it is, 4 bytes an entry."""

    def unpack(body: Bytes, n: int) -> tuple[Floats, int]:
        values = take(body, 0, n, "<f4").astype(np.float32)
        if not np.isfinite(values).all():
            raise NotFinite("it holds NaN or infinity")
        return values, 4 * n

    def pack(flat: Floats, rng: Generator) -> bytes:
        return flat.astype("<f4", copy=False).tobytes()

    return Codec("fp32", pack, unpack, lambda n: 4 * n, entrywise=True)


@CODECS.register("bf16")
def bf16() -> Codec:
    """The change rounded to the nearest bfloat16, 2 bytes an entry: each entry to 1 part in 512."""

    def pack(flat: Floats, rng: Generator) -> bytes:
        bits = flat.view(np.uint32)
        even = (bits >> 16) & 1
        rounded = ((bits + 0x7FFF + even) >> 16).astype("<u2")
        rounded -= (rounded & 0x7FFF) == 0x7F80  # above the largest bfloat16, where rounding leads to infinity
        return rounded.tobytes()

    def unpack(body: Bytes, n: int) -> tuple[Floats, int]:
        bits = take(body, 0, n, "<u2")
        if ((bits & 0x7F80) == 0x7F80).any():
            raise NotFinite("it holds NaN or infinity")
        return of_bf16(bits), 2 * n

    return Codec("bf16", pack, unpack, lambda n: 2 * n, entrywise=True)
