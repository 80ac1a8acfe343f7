"""The past of snapshots: what led from one state to another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from foldlog.protocol.errors import StoreClosed
from foldlog.protocol.tokens import WatchCursor
from foldlog.protocol.updates import DecodedBatch, Delete, Put
from foldlog.storage.fold.diff import diff
from foldlog.storage.fold.snapshot import FoldSnapshot
from foldlog.storage.log.backlog import batches_since


class Past(Protocol):
    """What leads from one snapshot to another. See `Engine`."""

    def batches_since(
        self, snapshot: Any, cursor: WatchCursor
    ) -> Iterator[tuple[int, DecodedBatch]] | None:
        """See `Engine.batches_since`."""

    def difference(self, old: Any, new: Any, prefix: str = "") -> Iterator[Put | Delete]:
        """See `Engine.difference`."""


class LogPast:
    """The past of folds over a log, which each fold can reach by itself."""

    def batches_since(
        self, snapshot: FoldSnapshot, cursor: WatchCursor
    ) -> Iterator[tuple[int, DecodedBatch]] | None:
        """See `backlog.batches_since`."""
        return batches_since(snapshot, cursor)

    def difference(
        self, old: FoldSnapshot, new: FoldSnapshot, prefix: str = ""
    ) -> Iterator[Put | Delete]:
        """See `diff`. StoreClosed for snapshots of an engine that is closed, since they do not
        outlive it."""
        if not (isinstance(old, FoldSnapshot) and isinstance(new, FoldSnapshot)):
            raise StoreClosed("the store is closed")
        return diff(old, new, prefix)
