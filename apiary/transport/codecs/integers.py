"""Codecs that round entries to small integers with a scale a block."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Generator

from apiary.core.errors import CodecError, NotFinite
from apiary.transport.codec import (
    _LARGEST,
    CODECS,
    Bytes,
    Codec,
    Floats,
    Rounding,
    of_bf16,
    take,
)


@CODECS.register("int8")
def int8(
    block: Annotated[int, Field(ge=2, le=65536, multiple_of=2)] = 128,
    rounding: Rounding = "stochastic",
    feedback: bool = False,
) -> Codec:
    """Whole numbers from -127 to 127 times a scale for each block (Dettmers et al. 2021), 1 byte an entry.

    In blocks of 128, and not 64 as for `int4`: the scales would take 3% of the message, and buy nothing that 8 bits
    need. Down it has the option block alone.

    Args:
        block: entries to a scale.
        rounding: see `int4`.
        feedback: see `int4`.
    """

    def unpack(body: Bytes, n: int) -> tuple[Floats, int]:
        scales, at = _read_scales(body, n, block, levels=127)
        codes = take(body, at, n, "i1")
        values = np.zeros(len(scales) * block, np.float32)
        values[:n] = codes
        if (codes == -128).any():
            raise CodecError("it holds a number that int8 does not use")
        return _scaled(values, scales, n), at + n

    def pack(flat: Floats, rng: Generator) -> bytes:
        scales, codes = _quantise(flat, block, 127, rounding, rng)
        return scales.tobytes() + codes.tobytes()

    return Codec(f"int8/{block}", pack, unpack, lambda n: 2 * _blocks(n, block) + n, feedback)


@CODECS.register("int4")
def int4(
    block: Annotated[int, Field(ge=2, le=65536, multiple_of=2)] = 64,
    rounding: Rounding = "nearest",
    feedback: bool = True,
) -> Codec:
    """Whole numbers from -7 to 7 times a scale for each block, two to a byte.

    A block's scale is max|x| / 7 rounded *up* to a bfloat16. Up, so that no entry is cut, which would bias it; a
    bfloat16, so that it has the range of float32 and neither huge nor tiny blocks are lost. A block of zeros has the
    scale zero.

    Args:
        block: entries to a scale; the last block of a tensor may have fewer.
        rounding: "nearest" has half the squared error of "stochastic", but many clients err alike, so that their mean
            is no better; stochastic errors average out, E h = x.
        feedback: keep what a message leaves out, and add it to the next.
    """

    def pack(flat: Floats, rng: Generator) -> bytes:
        scales, codes = _quantise(flat, block, 7, rounding, rng)
        nibbles = np.append(codes, np.int8(0)) if len(codes) % 2 else codes
        nibbles = nibbles.view(np.uint8) & 15
        return scales.tobytes() + (nibbles[::2] | nibbles[1::2] << 4).tobytes()

    def unpack(body: Bytes, n: int) -> tuple[Floats, int]:
        scales, at = _read_scales(body, n, block, levels=7)
        packed = take(body, at, (n + 1) // 2, "u1")
        low, high = (packed << 4).view(np.int8) >> 4, packed.view(np.int8) >> 4
        if (low == -8).any() or (high == -8).any() or (n % 2 and high[-1]):
            raise CodecError("it holds a number that int4 does not use")
        values = np.zeros(len(scales) * block, np.float32)
        values[0 : 2 * len(low) : 2], values[1 : 2 * len(high) : 2] = low, high
        return _scaled(values, scales, n), at + len(packed)

    return Codec(f"int4/{block}", pack, unpack, lambda n: 2 * _blocks(n, block) + (n + 1) // 2, feedback)


def _blocks(n: int, block: int) -> int:
    return -(-n // block)


def _most_scale(levels: int) -> int:
    """The bits of the largest bfloat16 that times `levels` is still finite."""
    return int((_LARGEST / np.float32(levels)).view(np.uint32)) >> 16


def _quantise(
    flat: Floats, block: int, levels: int, rounding: Rounding, rng: Generator
) -> tuple[NDArray[np.uint16], NDArray[np.int8]]:
    """The scale of each block, as the bits of a bfloat16, and the code of each entry."""
    n, blocks = len(flat), _blocks(len(flat), block)
    grid = np.pad(flat, (0, blocks * block - n)).reshape(blocks, block)
    top = np.maximum(grid.max(1), -grid.min(1))
    up = ((top / levels).view(np.uint32) + 0xFFFF) >> 16
    bits = np.minimum(up, _most_scale(levels)).astype("<u2")
    scales = of_bf16(bits)
    # Division by the scale that the receiver will see, or what it makes of the codes would be biased.
    ratio = grid / np.where(scales > 0, scales, 1)[:, None]
    np.clip(ratio, -levels, levels, out=ratio)  # only beside the largest float32 there is anything to cut
    if rounding == "nearest":
        codes = np.rint(ratio, out=ratio)
    else:
        codes = np.floor(ratio)
        codes += torch.rand(grid.shape, generator=rng).numpy() < ratio - codes
    return bits, codes.astype(np.int8).reshape(-1)[:n]


def _read_scales(body: Bytes, n: int, block: int, levels: int) -> tuple[Floats, int]:
    """The scales that begin a part, and the bytes they take."""
    bits = take(body, 0, _blocks(n, block), "<u2")
    if (bits > _most_scale(levels)).any():  # as are the bits of all negative numbers, NaN and infinity
        raise NotFinite("it holds a scale that is negative, too large or no number")
    return of_bf16(bits), 2 * len(bits)


def _scaled(values: Floats, scales: Floats, n: int) -> Floats:
    grid = values.reshape(len(scales), -1) if len(scales) else values.reshape(0, 1)
    grid *= scales[:, None]
    return values[:n]
