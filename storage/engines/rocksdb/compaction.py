"""A compaction of all tables, as the writer drives compactions."""

from __future__ import annotations

from collections.abc import Callable

from foldlog.protocol.engine import Cancelled
from foldlog.storage.formats.format import Progress


class FullCompaction:
    """A compaction of all tables, which RocksDB runs in one pass. See `Compaction`."""

    written = False
    live_bytes = 0

    def __init__(self, seq: int, compact: Callable[[], None]) -> None:
        self.seq, self._compact = seq, compact
        self.cancelled = False
        self.outcome: object = None

    def run(self, progress: Progress | None = None) -> None:
        """Run the compaction to its end. It cannot be stopped half-way."""
        if self.cancelled:
            raise Cancelled
        self._compact()

    def measure_live(self, progress: Progress | None = None) -> None:
        """Nothing to do: RocksDB bounds its own size."""

    def discard(self) -> None:
        """There is nothing to undo."""
