"""The wire format read byte by byte, and blockwise rounding entry by entry, in plain Python."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence


def crc32(data: bytes) -> int:
    """The CRC-32 of ISO 3309, bit by bit."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0xEDB88320 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def open_message(message: bytes, present: Sequence[bool]) -> tuple[str, bytes]:
    """The label and the body of a message whose frame is as documented, and which has these tensors in it."""
    assert message[:4] == b"APIW" and message[4] == 1
    assert struct.unpack("<I", message[-4:])[0] == crc32(message[:-4])
    end = 6 + message[5]
    size = math.ceil(len(present) / 8)
    bits = int.from_bytes(message[end + 8 : end + 8 + size], "little")
    assert bits == sum(1 << place for place, here in enumerate(present) if here)
    return message[6:end].decode("ascii"), message[end + 8 + size : -4]


def bfloat16_up(x: float) -> float:
    """The smallest bfloat16 that is not below x > 0: 8 significant bits, exponents from -126, multiples of 2^-133."""
    _, exponent = math.frexp(x)
    ulp = 2.0 ** (max(exponent, -125) - 8)
    return math.ceil(x / ulp) * ulp


def scale(block: Sequence[float], levels: int) -> float:
    """max|x| / levels, rounded up to a bfloat16; zero for a block of zeros."""
    top = max(map(abs, block), default=0.0)
    return bfloat16_up(top / levels) if top else 0.0


def quantised(values: Sequence[float], size: int, levels: int, uniforms: Sequence[float] | None = None) -> list[float]:
    """What a receiver sees of `values`: each the multiple of its block's scale that rounding leads to.

    To the nearest, ties to even; with `uniforms` u in [0, 1) to floor(x / a) + [u < frac(x / a)].
    """
    seen = []
    for start in range(0, len(values), size):
        block = values[start : start + size]
        a = scale(block, levels)
        for place, x in enumerate(block, start):
            ratio = x / a if a else 0.0
            if uniforms is None:
                code = round(ratio)
            else:
                code = math.floor(ratio) + (uniforms[place] < ratio - math.floor(ratio))
            assert abs(code) <= levels
            seen.append(code * a)
    return seen


def read_blocks(part: bytes, n: int, size: int, bits: int) -> tuple[list[float], bytes]:
    """The entries of a blockwise part, and what follows it."""
    blocks = math.ceil(n / size)
    scales = [struct.unpack("<f", b"\0\0" + part[2 * i : 2 * i + 2])[0] for i in range(blocks)]
    rest = part[2 * blocks :]
    if bits == 8:
        codes, rest = [b - 256 if b > 127 else b for b in rest[:n]], rest[n:]
    else:
        nibbles = [half for b in rest[: math.ceil(n / 2)] for half in (b & 15, b >> 4)]
        codes, rest = [h - 16 if h > 7 else h for h in nibbles[:n]], rest[math.ceil(n / 2) :]
    return [code * scales[i // size] for i, code in enumerate(codes)], rest


def read_topk(part: bytes, n: int, kept: int) -> tuple[list[float], bytes]:
    """The entries of a top-k part, and what follows it."""
    (exponent,) = struct.unpack("<h", part[:2])
    halves = struct.unpack(f"<{kept}e", part[2 : 2 + 2 * kept])
    rest, seen, at = part[2 + 2 * kept :], [0.0] * n, -1
    for half in halves:
        gap = shift = 0
        while True:
            byte, rest = rest[0], rest[1:]
            gap += (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
        at += gap + 1
        seen[at] = half * 2.0**exponent
    return seen, rest
