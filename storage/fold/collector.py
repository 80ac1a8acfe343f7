"""Holding back the garbage collector's full collections while a million objects are made that all live on.

They walk all objects of the process, again and again as their number grows: of the 1.4 s that a list of 1,000,000 entries took,
0.9 s were theirs. The collections of young objects go on, for they are cheap, and it is they who find that tuples of plain
values need no tracking. The collector belongs to the whole process, so this is counted among threads and kept short.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_NEVER = 2**31 - 1
_lock = threading.Lock()
_holding = 0
_thresholds = gc.get_threshold()


@contextmanager
def no_full_collections() -> Iterator[None]:
    """None within; they go on behind the last of those that overlap."""
    global _holding, _thresholds
    with _lock:
        if not _holding:
            _thresholds = gc.get_threshold()
            gc.set_threshold(*_thresholds[:2], _NEVER)
        _holding += 1
    try:
        yield
    finally:
        with _lock:
            _holding -= 1
            if (
                not _holding and gc.get_threshold()[2] == _NEVER
            ):  # else the host has set its own meanwhile
                gc.set_threshold(*_thresholds)
