"""A fold plus batches that are not yet written."""

from __future__ import annotations

from collections.abc import Mapping

from foldlog.protocol.tokens import WatchCursor
from foldlog.storage.engines.rocksdb.database.errors import ABSENT
from foldlog.storage.engines.rocksdb.fold.snapshot import RocksDbFold


class _StagedView:
    def __init__(self, below: RocksDbFold, staged: Mapping[bytes, bytes | None]) -> None:
        self.below, self.staged = below, staged

    def __getitem__(self, raw_key: bytes, /) -> bytes:
        if raw_key not in self.staged:
            return self.below.view[raw_key]
        raw = self.staged[raw_key]
        if raw is None:
            raise LookupError(*ABSENT)
        return raw


class StagedFold(RocksDbFold):
    """A fold plus batches that are not yet written, for writes that depend on the state."""

    __slots__ = ("staged",)

    def __init__(
        self,
        base: RocksDbFold,
        staged: Mapping[bytes, bytes | None],
        seq: int,
        cursor: WatchCursor,
        origin: bytes = b"",
    ) -> None:
        super().__init__(base._source, _StagedView(base, staged), base._trail, seq, cursor, origin)
        self.staged = staged
        """Encoded entries by encoded key; None for a removed one."""

    def changed_since(self) -> list[bytes]:
        return sorted({*super().changed_since(), *self.staged})
