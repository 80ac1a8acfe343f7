"""The past of folds over a log, which each fold can reach by itself."""

from __future__ import annotations

from collections.abc import Iterator

from foldlog.protocol.errors import StoreClosed
from foldlog.protocol.tokens import WatchCursor
from foldlog.protocol.updates import DecodedBatch, Delete, Put
from foldlog.storage.fold.diff import diff
from foldlog.storage.fold.snapshot import FoldSnapshot
from foldlog.storage.log.backlog import batches_since


class LogPast:
    """See `foldlog.protocol.engine.Past`. It needs no engine: a follower's folds have one, too."""

    def batches_since(
        self, snapshot: FoldSnapshot, cursor: WatchCursor
    ) -> Iterator[tuple[int, DecodedBatch]] | None:
        """See `Past`, and `backlog.batches_since`."""
        return batches_since(snapshot, cursor)

    def difference(
        self, old: FoldSnapshot, new: FoldSnapshot, prefix: str = ""
    ) -> Iterator[Put | Delete]:
        """See `Past`, and `diff`. StoreClosed for snapshots of an engine that is closed, since they
        do not outlive it."""
        if not (isinstance(old, FoldSnapshot) and isinstance(new, FoldSnapshot)):
            raise StoreClosed("the store is closed")
        return diff(old, new, prefix)
