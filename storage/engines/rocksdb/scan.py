"""Keys in order, without the binding's habit of ending a scan early: at a block that it cannot
read, it says nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rocksdict import Rdict, ReadOptions


def scan(
    db: Rdict, low: bytes, high: bytes | None, new_options: Callable[[], ReadOptions]
) -> Iterator[tuple[bytes, bytes]]:
    """(key, value) with low <= key < high, or to the end, of the newest state.

    Raises what the binding raises.

    The fast iterator of the binding ends in silence where it fails. So where it ends, another one
    is put there, which tells: either there is nothing more, or it raises, or there is more and
    the scan goes on.
    """
    while True:
        item: tuple[bytes, bytes] | None = None
        items: Iterator[Any] = db.items(from_key=low, read_opt=_bounded(new_options(), high))
        for item in items:
            yield item
        if item is not None:
            low = item[0] + b"\0"
        probe = db.iter(_bounded(new_options(), high))
        probe.seek(low)
        if not probe.valid():
            probe.status()
            return
        key: bytes = probe.key()
        yield key, probe.value()
        low = key + b"\0"


def _bounded(options: ReadOptions, high: bytes | None) -> ReadOptions:
    if high is not None:
        options.set_iterate_upper_bound(high)
    return options
