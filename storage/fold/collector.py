"""Holding back the garbage collector's full collections while a million objects are made that all live on.

They walk all objects of the process, again and again as their number grows: of the 1.4 s that a list of 1,000,000 entries took,
0.9 s were theirs. The collections of young objects go on, for they are cheap, and it is they who find that tuples of plain
values need no tracking. The collector belongs to the whole process, so this is counted among threads and kept short.
"""

from __future__ import annotations

import gc

_NEVER = 2**31 - 1
_holders: dict[int, None] = {}
_thresholds = gc.get_threshold()


class no_full_collections:
    """None within; they go on after the last of those that overlap. One that is dropped half-way, by an interrupt, has ended."""

    def __enter__(self) -> None:
        global _thresholds
        present = gc.get_threshold()
        if present[2] != _NEVER:
            _thresholds = present
        _holders[id(self)] = None
        gc.set_threshold(*present[:2], _NEVER)

    def __exit__(self, *error: object) -> None:
        self._end()

    def _end(self) -> None:
        _holders.pop(id(self), None)
        if (
            not _holders and gc.get_threshold()[2] == _NEVER
        ):  # else the host has set its own meanwhile
            gc.set_threshold(*_thresholds)
        if _holders and gc.get_threshold()[2] != _NEVER:  # one came just now
            gc.set_threshold(*gc.get_threshold()[:2], _NEVER)

    def __del__(self) -> None:
        if id(self) in _holders:
            self._end()
