"""Opening a RocksDB store for a writer, and resuming it after a crash."""

from __future__ import annotations

from foldlog.protocol.errors import LogChangedError, LogRegressedError
from foldlog.storage.engines.options import EngineOptions
from foldlog.storage.engines.rocksdb.engine import RocksDbEngine


class RocksDbSeat:
    """See `foldlog.protocol.engine.Seat`. RocksDB holds the lock while the database is open."""

    def __init__(self, options: EngineOptions) -> None:
        """ValueError for an option of the append log.

        Without the extra, `open` raises ImportError.
        """
        if options.format is not None:
            raise ValueError("format is for append logs: a RocksDB store has only one format")
        self._options = options

    def open(self, crashed: RocksDbEngine | None = None) -> RocksDbEngine:
        """See `Seat`. The database outlives its writer's crash: readers notice nothing."""
        if crashed is not None and not crashed.closed:
            crashed.resume()
            return crashed
        options = self._options
        engine = RocksDbEngine(
            options.path,
            sync_each=options.sync_each,
            on_damage=options.on_damage,
            cache_bytes=options.cache_bytes,
            create=crashed is None,
        )
        if crashed is not None:
            before, now = crashed.state, engine.state
            if now.store_id != before.store_id:
                engine.abandon()
                raise LogChangedError(options.path, "was replaced by another store")
            if now.seq < before.seq:
                engine.abandon()
                raise LogRegressedError(
                    options.path,
                    f"ends with batch {now.seq}, but batch {before.seq} was published",
                )
        return engine

    def release(self) -> None:
        """See `Seat`. Closing the database released the lock."""
