"""Holding back full garbage collections while many long-lived objects are created.

A full collection walks all objects of the process, again and again as their number grows: of the
1.4 s that a list of 1,000,000 entries took, 0.9 s went there. Collections of young objects go on.
They are cheap, and they untrack tuples of plain values. The collector belongs to the whole process,
so holders are counted across threads and should be brief.
"""

from __future__ import annotations

import gc

_NEVER = 2**31 - 1
_holders: dict[int, None] = {}
_thresholds = gc.get_threshold()


class no_full_collections:
    """No full collection within; the last of overlapping blocks restores them.

    A block that an interrupt drops half-way counts as ended.
    """

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
        # Leave thresholds alone that the host has set meanwhile.
        if not _holders and gc.get_threshold()[2] == _NEVER:
            gc.set_threshold(*_thresholds)
        if _holders and gc.get_threshold()[2] != _NEVER:  # a block began just now
            gc.set_threshold(*gc.get_threshold()[:2], _NEVER)

    def __del__(self) -> None:
        if id(self) in _holders:
            self._end()
