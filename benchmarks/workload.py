"""The data for all subjects: the same keys, values, batches and order, from a fixed seed."""

from __future__ import annotations

import random
from collections.abc import Iterator

VALUE_BYTES = 100
BATCH = 1000
"""Updates in a batch when stores are loaded."""


def key(number: int) -> str:
    """The key of entry `number`."""
    return f"key-{number:08d}"


def absent_key(number: int) -> str:
    """A key that no store holds, between the keys of two entries."""
    return f"key-{number:08d}x"


def shuffled(count: int, seed: str) -> list[int]:
    """The numbers 0 to count - 1 in random order."""
    numbers = list(range(count))
    random.Random(seed).shuffle(numbers)
    return numbers


def records(numbers: Iterator[int] | list[int], seed: str) -> Iterator[tuple[str, bytes]]:
    """(key, value) of each number, the values random and incompressible."""
    make = random.Random(seed).randbytes
    for number in numbers:
        yield key(number), make(VALUE_BYTES)


def prefixes(entries: int, width: int, count: int, seed: str) -> list[str]:
    """`count` random prefixes, each matching `width` (a power of ten) neighbouring entries of the
    store."""
    digits = 8 - (len(str(width)) - 1)
    choose = random.Random(seed).randrange
    return [f"key-{choose(max(1, entries // width)):0{digits}d}" for _ in range(count)]
