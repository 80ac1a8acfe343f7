"""Opening a log for a writer, and reopening it after a crash, under one lock throughout."""

from __future__ import annotations

from foldlog.protocol.errors import LogChangedError, LogRegressedError
from foldlog.storage.engines.append_log.engine import LogEngine
from foldlog.storage.engines.options import EngineOptions
from foldlog.storage.log.sidecars.lock import WriterLock


class LogSeat:
    """See `foldlog.protocol.engine.Seat`."""

    def __init__(self, options: EngineOptions) -> None:
        self._options = options
        self._lock: WriterLock | None = None

    def open(self, crashed: LogEngine | None = None) -> LogEngine:
        """See `Seat`. The log is replayed: the memory of a crashed engine is not trusted."""
        options = self._options
        if self._lock is None:
            self._lock = WriterLock(options.files, options.path)
        if crashed is not None:
            crashed.abandon(keep_lock=True)
        engine = LogEngine(
            options.path,
            format=options.format,
            on_damage=options.on_damage,
            sync_each=options.sync_each,
            cache_bytes=options.cache_bytes,
            files=options.files,
            lock=self._lock,
            crashed=None if crashed is None else crashed.log,
        )
        if crashed is not None:
            try:
                _check_successor(engine, crashed)
            except BaseException:
                engine.log.discard(keep_lock=True)
                raise
        return engine

    def release(self) -> None:
        """See `Seat`."""
        if self._lock is not None:
            self._lock.release()


def _check_successor(engine: LogEngine, crashed: LogEngine) -> None:
    """LogChangedError or LogRegressedError unless the replay holds what had been published."""
    if engine.log.file.header.log_id != crashed.log.file.header.log_id:
        raise LogChangedError(engine.path, "was replaced by another log")
    if engine.fold.seq < crashed.fold.seq:
        raise LogRegressedError(
            engine.path,
            f"ends with batch {engine.fold.seq}, but batch {crashed.fold.seq} was published",
        )
