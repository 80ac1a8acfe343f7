"""The folds that somebody holds."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from foldlog.storage.engines.rocksdb.fold.snapshot import RocksDbFold

_SPARE = 16
"""References to folds that were freed, kept before they are dropped."""


class HeldFolds:
    """The folds that somebody holds. One thread adds; any thread may look.

    Not a `WeakSet`: a thread may not look into one while another adds. And it runs a callback when
    a fold is freed: each commit would pay for that.
    """

    def __init__(self) -> None:
        # Appended to, or replaced whole.
        self._folds: list[weakref.ref[RocksDbFold]] = []
        self._limit = _SPARE

    def add(self, fold: RocksDbFold) -> None:
        """Cost: 0.3 us on average."""
        folds = self._folds
        folds.append(weakref.ref(fold))
        if len(folds) > self._limit:
            self._folds = alive = [held for held in folds if held() is not None]
            self._limit = 2 * len(alive) + _SPARE

    def all(self) -> list[RocksDbFold]:
        """Those that are not freed, oldest first."""
        return [fold for held in tuple(self._folds) if (fold := held()) is not None]

    def keep(self, folds: Sequence[RocksDbFold]) -> None:
        """Forget all but these."""
        self._folds, self._limit = [weakref.ref(fold) for fold in folds], 2 * len(folds) + _SPARE
