"""Bytes that rot: every way to change a file a little."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator


def flips(data: bytes, bits: Iterable[int] | None = None) -> Iterator[tuple[int, bytes]]:
    """`data` with one bit flipped, and the number of the bit: each bit in turn, or those of `bits`. Cost: a copy each."""
    for bit in range(8 * len(data)) if bits is None else bits:
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        yield bit, bytes(flipped)


def sampled_flips(data: bytes, count: int, seed: int) -> Iterator[tuple[int, bytes]]:
    """`flips` of `count` bits by chance, the same for the same seed."""
    return flips(
        data, sorted(random.Random(seed).sample(range(8 * len(data)), min(count, 8 * len(data))))
    )


def truncations(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Every beginning of `data` but the whole, and its length."""
    for size in range(len(data)):
        yield size, data[:size]


def splices(first: bytes, second: bytes, count: int, seed: int) -> Iterator[tuple[int, int, bytes]]:
    """A beginning of `first` and an end of `second`, cut at `count` places by chance, and the two places."""
    chance = random.Random(seed)
    for _ in range(count):
        left, right = chance.randrange(1, len(first)), chance.randrange(len(second))
        yield left, right, first[:left] + second[right:]
