"""Compaction, as the writer conducts it: when to begin, what follows each pass, how long writes
wait.

Maintenance runs the long passes. All else happens here, in the writer's turns.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

from foldlog.actors.base.adapter import Inbox, Mail
from foldlog.actors.store.core import Core, State
from foldlog.actors.store.internal import CompactJob, LetGo, Rewritten
from foldlog.actors.store.requests import CompactRequest
from foldlog.protocol.engine import Compaction, Engine, check_failure
from foldlog.protocol.errors import FoldlogError
from foldlog.protocol.logger import log
from foldlog.protocol.options import COMPACT_THRESHOLD

DEFAULT_COMPACT_THRESHOLD = COMPACT_THRESHOLD.default
HOLD_S = 0.001
PATIENCE_S = 1.0
"""How long one compaction may hold writes back while the log is below 3 x the default threshold."""
RETRY_S = 1.0
"""Delay before a failed compaction is retried; doubled each time, up to `MAX_RETRY_S`."""
MAX_RETRY_S = 60.0
FULL_RETRY_S = 5.0
"""The same delay while writes are refused until a compaction succeeds."""


class Compactor:
    """See the module. Used in the writer's turns, except `holds_back`."""

    def __init__(
        self,
        core: Core,
        step: Callable[[str], None],
        maintenance: Inbox,
        made_progress: Callable[[], None],
    ) -> None:
        """`made_progress`: called while a write waits and the compaction advances."""
        self._core, self._step = core, step
        self._maintenance, self._made_progress = maintenance, made_progress
        self.running: Compaction | None = None
        """The compaction under way."""
        self.failures = 0
        """Compactions that failed in a row."""
        self._started = 0.0
        self._patience_s = 0.0
        """How much longer the running compaction may hold writes back while the log is small."""
        self.wanted: list[CompactRequest] = []
        """Requests waiting for the running compaction or the next one."""
        self._live = 0
        """After a failed compaction: live bytes, as far as known."""
        self._failed_at = self._retry_at = 0.0
        """After a failed compaction: when it failed, when to retry (time.monotonic())."""
        self._waits_for_room = False
        """The disk had no room for the compaction that failed."""

    @property
    def _engine(self) -> Engine:
        engine = self._core.engine
        assert engine is not None, "the writer has not started"
        return engine

    def want(self, request: CompactRequest) -> None:
        """Answer `request` once a rewrite that includes all batches before it is done."""
        if request not in self.wanted:  # it may have been in hand at a crash
            request.seq = self._engine.snapshot.seq
            self.wanted.append(request)
        self.begin_if_due()

    def begin_if_due(self) -> None:
        """Begin a compaction if one is wanted or worthwhile, and none is running."""
        engine = self._core.engine  # not by the property: each write comes here
        assert engine is not None
        if self.running is not None:
            if not self.running.cancelled:
                return
            # Maintenance could not report it: the store had failed and was reopened.
            self.drop()
        if not self.wanted and not engine.should_compact(self._core.config.compact_threshold):
            return
        if engine.is_compact:
            self.answer_wanted(None, engine.snapshot.seq)
        elif self.wanted or time.monotonic() >= self._retry_at:
            self._step("compact.begin")
            self.running = engine.begin_compaction()
            self._started = time.monotonic()
            self._patience_s = PATIENCE_S
            self._maintenance.put(Mail(CompactJob(self.running)))

    def pass_ended(self, done: Rewritten) -> None:
        """A compaction pass has ended: begin the next pass, finish the compaction, or abandon
        it."""
        rewrite = done.rewrite
        if rewrite is not self.running:
            rewrite.discard()  # it belongs to an engine that is gone
            return
        if rewrite.outcome is not done:
            return  # the writer waited for it and has already handled it
        rewrite.outcome = None
        if done.error is not None:
            self._failed(rewrite, done.error)
        elif self._engine.next_pass(rewrite):
            self._maintenance.put(Mail(CompactJob(rewrite)))
        else:
            self._finish(rewrite)

    def _finish(self, rewrite: Compaction) -> None:
        engine, core = self._engine, self._core
        self._step("compact.finish")
        old = LetGo([engine.snapshot])
        try:
            fold = engine.finish_compaction(rewrite)
        except (OSError, FoldlogError) as failed:
            self._failed(rewrite, failed)
            return
        self.running = None
        self.failures = 0
        core.publish(fold)
        core.feeds.jump(fold)  # the same state: lets subscribers release the old file
        statistics = core.statistics
        statistics.compactions += 1
        statistics.compaction_error = ""
        statistics.last_compaction_s = time.monotonic() - self._started
        statistics.last_compaction_unix_s = time.time()
        log.info(
            "%s: compacted to %d bytes in %.2f s",
            engine.path,
            engine.sizes().log_bytes,
            statistics.last_compaction_s,
        )
        self._step("compact.finished")
        self.answer_wanted(None, rewrite.seq)
        self._maintenance.tell(old)
        check_failure(engine)  # the directory could not be synced
        core.note_synced(fold)
        self.begin_if_due()

    def _failed(self, rewrite: Compaction, error: Exception) -> None:
        self.drop()
        rewrite.discard()
        delay_s = min(RETRY_S * 2.0**self.failures, MAX_RETRY_S)
        self.failures += 1
        self._failed_at, self._live = time.monotonic(), rewrite.live_bytes
        self._retry_at = self._failed_at + delay_s
        self._waits_for_room = not self._engine.has_room(self._live)
        self._core.statistics.compaction_error = f"{type(error).__name__}: {error}"
        log.warning(
            "%s: compaction failed, the log goes on as it was; tried again in %.0f s: %s",
            self._engine.path,
            delay_s,
            error,
        )
        self.answer_wanted(error, rewrite.seq)
        self.begin_if_due()

    def holds_back(self, size: int) -> bool:
        """True if a write of `size` bytes would wait for the running compaction. Any thread."""
        rewrite, engine = self.running, self._core.engine
        if rewrite is None or engine is None:
            return False
        allowed = engine.allowed_bytes(rewrite, self._core.config.compact_threshold)
        return engine.size_bytes + size > allowed

    def hold_back(self, size: int) -> None:
        """Delay a write of `size` bytes while the running compaction lags, so that the log stays
        bounded.

        Where the threshold is small, so is the log, and only a short wait is worthwhile.
        """
        began, allowed = 0.0, 0.0
        threshold = self._core.config.compact_threshold
        small_bytes = self._engine.limit_bytes(0, DEFAULT_COMPACT_THRESHOLD) or 0
        while (rewrite := self.running) is not None:
            end, before = self._engine.size_bytes + size, allowed
            allowed = self._engine.allowed_bytes(rewrite, threshold)
            if end <= allowed or rewrite.cancelled:
                break
            if isinstance(rewrite.outcome, Rewritten):
                self.pass_ended(rewrite.outcome)
                continue
            now = time.monotonic()
            began = began or now
            if allowed != before:
                self._made_progress()
            small = end <= small_bytes
            # A writer that has restarted may write before the supervisor has heard of it.
            is_open = self._core.state in (State.RUNNING, State.RESTARTING)
            if not is_open or (small and now - began > self._patience_s):
                break
            time.sleep(HOLD_S)
        if began:
            held_s = time.monotonic() - began
            self._core.statistics.throttled_s += held_s
            self._patience_s = max(self._patience_s - held_s, 0.0)

    def is_log_full(self, size: int) -> bool:
        """True if `size` more bytes would exceed the log's bound. For a log that could not be
        compacted: once the disk has room again, that is tried before the log takes it."""
        live, threshold = self._live, self._core.config.compact_threshold
        limit = self._engine.limit_bytes(live, max(threshold, DEFAULT_COMPACT_THRESHOLD))
        full = limit is not None and self._engine.size_bytes + size > limit
        if full:  # more may be live by now, or there may be space again
            self._retry_at = min(self._retry_at, self._failed_at + FULL_RETRY_S)
            self.begin_if_due()
        elif self._waits_for_room and self._engine.has_room(live):
            self._waits_for_room, self._retry_at = False, 0.0
            self.begin_if_due()
        return full

    def answer_wanted(self, error: Exception | None, seq: int | None = None) -> None:
        """Answer requests waiting for a compaction: of the log as of batch `seq`, or all of
        them."""
        for request in tuple(self.wanted):
            if seq is not None and request.seq is not None and request.seq > seq:
                continue  # the rewrite does not cover its batches
            if error is not None:
                request.fail(copy.copy(error))
            elif request.start():
                request.succeed(None)
            self.wanted.remove(request)  # last: memory may run out on the way

    def drop(self) -> None:
        """Give up the running compaction, if there is one."""
        if self.running is not None:
            self._engine.drop_compaction(self.running)
            self.running = None
