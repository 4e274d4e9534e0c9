"""Philox4x64-10 as its paper has it, in plain Python integers."""

from __future__ import annotations

from collections.abc import Iterator

_MASK = 2**64 - 1
_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)  # the golden ratio and sqrt(3) - 1


def block(counter: int, key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Four 64-bit words for a 256-bit counter (Salmon et al. 2011, section 3.3 and table 2)."""
    x = [(counter >> (64 * i)) & _MASK for i in range(4)]
    k = list(key)
    for _ in range(10):
        high0, low0 = divmod(x[0] * _MULTIPLIERS[0], 2**64)
        high1, low1 = divmod(x[2] * _MULTIPLIERS[1], 2**64)
        x = [high1 ^ x[1] ^ k[0], low1, high0 ^ x[3] ^ k[1], low0]
        k = [(part + step) & _MASK for part, step in zip(k, _WEYL, strict=True)]
    return x[0], x[1], x[2], x[3]


def words(key: tuple[int, int]) -> Iterator[int]:
    """The words of the counters 1, 2, ..., as numpy's generator counts."""
    counter = 0
    while True:
        counter += 1
        yield from block(counter, key)
