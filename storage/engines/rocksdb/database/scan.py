"""Scanning keys in order, with errors reported.

The binding's iterator ends silently at a block that it cannot read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rocksdict import Rdict, ReadOptions


def scan(
    db: Rdict,
    low: bytes,
    high: bytes | None,
    new_options: Callable[[], ReadOptions],
    reverse: bool = False,
) -> Iterator[tuple[bytes, bytes]]:
    """(key, value) with low <= key < high, or to the end, of the newest state.

    With `reverse`, descending; then `high` must be given. Raises what the binding raises.

    The binding's fast iterator ends silently on an error. So a slower one is placed where it ended:
    it finds nothing more, or raises, or finds another key, and the scan continues.
    """
    while high is None or low < high:
        item: tuple[bytes, bytes] | None = None
        # No variable holds an iterator, or a traceback would, and with it the database open.
        for item in _items(db, low, high, new_options, reverse):
            if reverse and item[0] < low:
                return
            yield item
        if item is not None:
            low, high = (low, item[0]) if reverse else (item[0] + b"\0", high)
        found = _probe(db, low, high, new_options, reverse)
        if found is None or found[0] < low:
            return
        yield found
        key = found[0]
        low, high = (low, key) if reverse else (key + b"\0", high)


def _items(
    db: Rdict, low: bytes, high: bytes | None, new_options: Callable[[], ReadOptions], reverse: bool
) -> Iterator[tuple[bytes, bytes]]:
    start = high if reverse else low
    return db.items(reverse, start, _below(new_options(), high))  # type: ignore[return-value]


def _probe(
    db: Rdict, low: bytes, high: bytes | None, new_options: Callable[[], ReadOptions], reverse: bool
) -> tuple[bytes, bytes] | None:
    """The first entry, or with `reverse` the last. Raises what the binding raises."""
    probe = db.iter(_below(new_options(), high))
    try:
        if reverse:
            probe.seek_for_prev(high)  # type: ignore[arg-type]
        else:
            probe.seek(low)
        if probe.valid():
            return probe.key(), probe.value()
        probe.status()
        return None
    finally:
        del probe


def _below(options: ReadOptions, high: bytes | None) -> ReadOptions:
    if high is not None:
        options.set_iterate_upper_bound(high)
    return options
