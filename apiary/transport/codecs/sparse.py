"""Codecs that send some entries alone, with their places."""

from __future__ import annotations

import struct
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from torch import Generator

from apiary.core.errors import CodecError, NotFinite
from apiary.transport.codec import (
    CODECS,
    SHARE,
    Bytes,
    Codec,
    Floats,
    take,
)

_HALF_BITS, _HALF_MOST = 15, 32752.0  # top-k values are scaled to below 2^15; the largest float16 below that


_VARINT_BITS, _VARINT_MOST = 7, 5  # a gap takes at most so many bytes


@CODECS.register("topk")
def topk(share: Annotated[float, Field(gt=0, le=1)] = SHARE) -> Codec:
    """The largest entries of each tensor (Stich et al. 2018), always with error feedback; about 3.3 bytes each at 1%.

    A part holds an exponent for the tensor (2 bytes), the values over 2^exponent in float16, and the number of entries
    skipped before each, 7 bits to a byte. Of each tensor, not of all together: at first B changes much more than A.

    Args:
        share: of a tensor's entries, rounded to a whole number; at least one.
    """

    def kept(n: int) -> int:
        return min(n, max(1, round(share * n)))

    def pack(flat: Floats, rng: Generator) -> bytes:
        n, k = len(flat), kept(len(flat))
        if not k:
            return b""
        index = np.sort(np.argpartition(np.abs(flat), n - k)[n - k :])
        values = flat[index].astype(np.float64)
        exponent = int(np.frexp(np.abs(values).max())[1]) - _HALF_BITS
        halves = np.clip(np.ldexp(values, -exponent), -_HALF_MOST, _HALF_MOST).astype("<f2")
        gaps = np.diff(index, prepend=-1) - 1
        return struct.pack("<h", exponent) + halves.tobytes() + _varints(gaps).tobytes()

    def unpack(body: Bytes, n: int) -> tuple[Floats, int]:
        k = kept(n)
        values = np.zeros(n, np.float32)
        if not k:
            return values, 0
        exponent = int(take(body, 0, 1, "<i2")[0])
        halves = take(body, 2, k, "<f2").astype(np.float64)
        if not (np.abs(halves) <= _HALF_MOST).all() or not -200 < exponent <= 128 - _HALF_BITS:
            raise NotFinite("it holds NaN, infinity or numbers too large")
        at = 2 + 2 * k
        gaps, used = _read_varints(body[at : at + _VARINT_MOST * k], k)
        index = np.cumsum(gaps + 1) - 1
        if index[-1] >= n:
            raise CodecError("it names an entry beyond the end of the tensor")
        values[index] = np.ldexp(halves, exponent)
        return values, at + used

    return Codec(f"topk/{share!r}", pack, unpack, lambda n: (2 + (2 + _VARINT_MOST) * kept(n)) if n else 0, True)


@CODECS.register("sparse")
def sparse() -> Codec:
    """The entries that are not zero, as they are: for changes that are mostly zeros, such as scalars of many seeds.

    A part holds their number (4 bytes), their values in float32, and the number of entries skipped before each, 7 bits
    to a byte; where that would take more than all entries do, all of them and no numbers of skipped ones.
    """

    def pack(flat: Floats, rng: Generator) -> bytes:
        index = np.flatnonzero(flat.view(np.uint32))  # bits: -0.0 is no zero here
        gaps = _varints(np.diff(index, prepend=-1) - 1)
        if 4 * len(index) + len(gaps) >= 4 * len(flat):
            index, gaps = np.arange(len(flat)), gaps[:0]
        return struct.pack("<I", len(index)) + flat[index].astype("<f4").tobytes() + gaps.tobytes()

    def unpack(body: Bytes, n: int) -> tuple[Floats, int]:
        k = int(take(body, 0, 1, "<u4")[0])
        if k > n:
            raise CodecError("it has more entries than the tensor")
        floats = take(body, 4, 4 * k, "u1").view("<f4").astype(np.float32)
        if not np.isfinite(floats).all():
            raise NotFinite("it holds NaN or infinity")
        if k in (0, n):
            return (floats if k else np.zeros(n, np.float32)), 4 + 4 * k
        gaps, used = _read_varints(body[4 + 4 * k : 4 + (4 + _VARINT_MOST) * k], k)
        index = np.cumsum(gaps + 1) - 1
        if index[-1] >= n:
            raise CodecError("it names an entry beyond the end of the tensor")
        values = np.zeros(n, np.float32)
        values[index] = floats
        return values, 4 + 4 * k + used

    return Codec("sparse", pack, unpack, lambda n: 4 + 4 * n)


def _varints(numbers: NDArray[np.int64]) -> Bytes:
    """Non-negative numbers below 2^35, 7 bits to a byte, lowest first; the last byte of each is below 128."""
    places = range(_VARINT_MOST)
    width = 1 + np.searchsorted([1 << _VARINT_BITS * place for place in places[1:]], numbers, side="right")
    starts = np.cumsum(width) - width
    body = np.empty(int(width.sum()), np.uint8)
    for place in places:
        has = width > place
        more = (width[has] > place + 1) << _VARINT_BITS
        body[starts[has] + place] = numbers[has] >> _VARINT_BITS * place & 127 | more
    return body


def _read_varints(window: Bytes, count: int) -> tuple[NDArray[np.int64], int]:
    """The first `count` numbers, and the bytes they take."""
    stops = np.flatnonzero(window < 128)[:count]
    if len(stops) < count:
        raise CodecError("it ends too early")
    starts = np.append(0, stops[:-1] + 1)
    width = stops - starts + 1
    if width.max() > _VARINT_MOST:
        raise CodecError("it holds an index that is too large")
    used = int(stops[-1]) + 1
    place = np.arange(used) - np.repeat(starts, width)
    digits = (window[:used] & 127).astype(np.int64) << _VARINT_BITS * place
    return np.add.reduceat(digits, starts), used
