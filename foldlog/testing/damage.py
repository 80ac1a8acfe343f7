"""Damaged bytes: small changes to the content of a file."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator


def flips(data: bytes, bits: Iterable[int] | None = None) -> Iterator[tuple[int, bytes]]:
    """(bit, `data` with that bit flipped), for every bit or for those in `bits`. Cost: a copy
    each."""
    for bit in range(8 * len(data)) if bits is None else bits:
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        yield bit, bytes(flipped)


def sampled_flips(data: bytes, count: int, seed: int) -> Iterator[tuple[int, bytes]]:
    """`flips` of `count` random bits, the same for the same seed."""
    return flips(
        data, sorted(random.Random(seed).sample(range(8 * len(data)), min(count, 8 * len(data))))
    )


def truncations(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(length, prefix) for every proper prefix of `data`."""
    for size in range(len(data)):
        yield size, data[:size]


def splices(first: bytes, second: bytes, count: int, seed: int) -> Iterator[tuple[int, int, bytes]]:
    """(left, right, `first[:left] + second[right:]`) for `count` random pairs of offsets."""
    chance = random.Random(seed)
    for _ in range(count):
        left, right = chance.randrange(1, len(first)), chance.randrange(len(second))
        yield left, right, first[:left] + second[right:]
