"""The store: what callers on any thread see of the writer, the readers and the supervisor.

A read sends no message: it loads the published snapshot on the caller's thread. A write puts a
request into the writer's mailbox. The request's future belongs to the caller and always ends, with
the answer or a typed error, whichever actors die meanwhile.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pykka

from foldlog.actors.base.adapter import Mail, Place
from foldlog.actors.base.answers import Answer, Unanswered, callback_threads, runs_callbacks
from foldlog.actors.feeds.feeds import Feeds
from foldlog.actors.store.core import Config, Core, State, Stats, no_step
from foldlog.actors.store.requests import (
    CompactRequest,
    ExportRequest,
    ForwardWrite,
    LocalWrite,
    Request,
    SyncRequest,
    WriteRequest,
    check_version,
)
from foldlog.actors.store.supervisor import CloseNow, Reopen, Supervisor
from foldlog.health import Health, Status, store_health
from foldlog.life_cycle import (
    UNOPENED_TIMEOUT_S,
    await_dropped,
    close,
    close_dropped,
    live,
    would_wait_for_itself,
)
from foldlog.protocol.engine import CacheUse, Engine, Held, OpenReport, Sizes
from foldlog.protocol.errors import (
    ForkedStore,
    ReentrantCall,
    RequestTimeout,
    StoreClosed,
    StoreFailed,
)
from foldlog.protocol.options import (
    APPLY_TIMEOUT_S,
    CACHE_BYTES,
    CLOSE_TIMEOUT_S,
    COMPACT_THRESHOLD,
    FORMAT,
    JOB_TIMEOUT_S,
    MAILBOX_BATCHES,
    MAILBOX_BYTES,
    MAX_RESTARTS,
    READERS,
    RESTART_WINDOW_S,
    STUCK_AFTER_S,
    SYNC_INTERVAL_S,
    UNSET,
    OnDamage,
    Sync,
    Unset,
    check_flag,
    check_timeout,
)
from foldlog.protocol.store import Backend, FormatName, StrPath
from foldlog.protocol.tokens import CursorLike, VersionToken, WatchCursor
from foldlog.protocol.updates import Delete, Put, Update, encode_batch
from foldlog.storage.artifacts.artifact import ExportManifest
from foldlog.storage.formats.format import VerifyReport
from foldlog.storage.log.files import OS_FILES, Files, path_text, resolve
from foldlog.watched import Watched

TURN_TIMEOUT_S = 20.0
"""A call with at least this timeout writes on its own thread if the writer is idle; there, a stuck
disk can hold it past its deadline. A call with a shorter timeout leaves the write to the writer's
thread, so it returns on time."""


def open(
    path: StrPath,
    *,
    backend: Backend = "append-log",
    format: FormatName | None = None,
    readers: int = READERS.default,
    sync: Sync = "interval",
    sync_interval_s: float = SYNC_INTERVAL_S.default,
    compact_threshold: int = COMPACT_THRESHOLD.default,
    on_damage: OnDamage = "refuse",
    cache_bytes: int = CACHE_BYTES.default,
    mailbox_batches: int = MAILBOX_BATCHES.default,
    mailbox_bytes: int = MAILBOX_BYTES.default,
    max_restarts: int = MAX_RESTARTS.default,
    restart_window_s: float = RESTART_WINDOW_S.default,
    stuck_after_s: float = STUCK_AFTER_S.default,
    files: Files = OS_FILES,
    step: Callable[[str], None] | None = None,
) -> Store:
    """Open or create the store in the log at `path`.

    An answered `apply` is in every later snapshot in the process, and survives a killed process. It
    survives a power loss with `sync="always"`; with `sync="interval"`, once a background sync has
    covered it (one every `sync_interval_s`; see `store.synced_cursor`); with `sync="never"`, only
    by luck.

    `backend`: "rocksdb" keeps the store in a RocksDB database in the directory `path`, for folds
    larger than memory. It needs the extra `rocksdb`. Snapshots end when the store closes, all but
    the newest when it recovers from a disk error, and none works in a forked child. A watch can
    resume from a cursor only while its batches are in memory, else CursorExpired. Other processes
    cannot follow the store. `export_to` writes RocksDB's files. `compact_threshold` and `files`
    have no effect. See `docs/which-engine.md`.

    `format`: the format of a new log; None means "foldlog". An existing log keeps the format in its
    header; InvalidFormatError if `format` names another. "slipstream-v2" is the file of the Rust
    crate, used in place, with weaker guarantees (a crash may leave part of a batch, all entries are
    kept in memory, it cannot be followed): see `docs/interchange.md`.

    `readers`: the number of actors that serve `store.reader`. `compact_threshold`: the log is
    compacted in the background once this many bytes were appended, and no fewer than the base has.
    The log stays below `3 x (live + compact_threshold)` plus one batch; writes are slowed down if
    necessary. `on_damage="cut"`: keep what precedes the first damage, and set the rest aside in a
    file. `cache_bytes`: the most memory for what was read from disk, entries and indexes; the least
    used goes first. Changes since the last compaction come on top. `mailbox_batches`,
    `mailbox_bytes`: the most that may wait for the writer. `max_restarts`: restarts of one actor
    allowed within `restart_window_s` before the store is FAILED. `stuck_after_s`: how long the
    writer may be unresponsive before the store is FAILED until it responds again; time while the
    process was paused does not count. `files`, `step`: see `foldlog.testing`.

    Invalid options raise TypeError or ValueError at once. In every call, `timeout_s` is in seconds:
    0 does not wait, None and infinity wait forever, nan and negative numbers raise ValueError.

    Raises StoreLocked, CorruptLogError, InvalidFormatError, LogRegressedError or OSError; also
    RuntimeError if no thread can be started, as in an isolated subinterpreter. On an error, nothing
    stays open. If this process has just dropped a store on the same log without closing it, waits
    for it to close.

    >>> with foldlog.open("routes.log") as routes:
    ...     routes.apply([Put("a", b"10.0.0.1"), Put("b", b"10.0.0.2")], WatchCursor.from_u64(1))
    ...     routes.apply([Delete("b")], WatchCursor.from_u64(2))
    ...     routes.range()
    1
    2
    [KvEntry(key='a', value=b'10.0.0.1', version=VersionToken(''))]
    """
    config = Config(
        resolve(path),
        readers,
        sync,
        sync_interval_s,
        compact_threshold,
        on_damage,
        cache_bytes,
        mailbox_batches,
        mailbox_bytes,
        max_restarts,
        restart_window_s,
        stuck_after_s=stuck_after_s,
        format=format,
        backend=backend,
        files=files,
        step=no_step if step is None else step,
    )
    await_dropped(config.path)
    core = Core(config)
    supervisor = Supervisor(core)
    try:
        supervisor.open()
        return Store(core, supervisor)
    except BaseException:
        supervisor.post(CloseNow(Answer()))  # also after a KeyboardInterrupt
        core.ended.wait(UNOPENED_TIMEOUT_S)
        raise


def write_of(updates: Iterable[Update], cursor: CursorLike, forward_only: bool) -> WriteRequest:
    """The request for a batch, checked and encoded."""
    if forward_only is not False:
        check_flag("forward_only", forward_only)
    batch = encode_batch(updates, cursor)
    return ForwardWrite(batch) if forward_only else WriteRequest(batch)


class Store(Watched):
    """An open store. Any thread may call any method."""

    def __init__(self, core: Core, supervisor: Supervisor) -> None:
        """Not for callers: use `foldlog.open`."""
        self._core = self._published = core
        self._supervisor = supervisor
        self._offer = supervisor.writer.inbox.offer
        # The actors hold the core, not the store, so that a dropped store can be detected.
        self._finalizer = weakref.finalize(self, close_dropped, supervisor, os.getpid())
        self._finalizer.atexit = False
        live[supervisor] = os.getpid()

    @property
    def synced_cursor(self) -> WatchCursor:
        """The position up to which every update survives a power loss. Acknowledge this one
        upstream, if that matters."""
        return self._core.synced[1]

    # Writes, carried out by the writer in the order of its mailbox.

    def apply(
        self,
        updates: Iterable[Update],
        cursor: CursorLike,
        timeout_s: float | None = APPLY_TIMEOUT_S,
        *,
        forward_only: bool = False,
    ) -> int:
        """Atomically fold the updates and advance the cursor. Returns the batch's sequence once it
        is written and published.

        Any cursor is accepted, even one before the last: cursors are opaque, and only the caller
        knows whether the upstream was restored or recreated. With `forward_only`, a cursor that is
        not at or after the last one (as `protocol.tokens.has_reached` says) raises CursorRegressed,
        and nothing is written.

        Invalid updates raise TypeError or ValueError at once. Backpressure if the mailbox stays
        full, OSError if the log cannot be written: nothing was stored. RequestTimeout if no answer
        comes in time: the batch was withdrawn or, if the message says `outcome is unknown`, the
        writer is processing it. Also StoreFailed, StoreClosed, ForkedStore.
        """
        self._core.snapshot.seq  # noqa: B018 - StoreClosed before TypeError or ValueError
        if timeout_s is not APPLY_TIMEOUT_S:
            timeout_s = check_timeout(timeout_s)  # before the updates, which may be an iterator
        seq: int = self._send(write_of(updates, cursor, forward_only), timeout_s)
        return seq

    def apply_async(
        self,
        updates: Iterable[Update],
        cursor: CursorLike,
        timeout_s: float | None = 0.0,
        *,
        forward_only: bool = False,
    ) -> Future[int]:
        """`apply`, answered through the future returned. Batches in flight share commit groups.

        Batches from one thread are written in the order of its calls. `timeout_s`: how long to wait
        for room in the mailbox before raising Backpressure; by default, not at all.
        """
        self._core.snapshot.seq  # noqa: B018
        timeout_s = check_timeout(timeout_s)
        return self._submit(write_of(updates, cursor, forward_only), timeout_s)

    def put(
        self, key: str, value: bytes, timeout_s: float | None = APPLY_TIMEOUT_S
    ) -> VersionToken:
        """Set `key`, for programs without an upstream. Returns the version: the batch's sequence as
        a u64 token. Errors as for `apply`.

        The cursor stays where it is.
        """
        return self._write(LocalWrite(Put(key, value)), timeout_s)

    def create(
        self, key: str, value: bytes, timeout_s: float | None = APPLY_TIMEOUT_S
    ) -> VersionToken:
        """`put`, for a key that must not exist. KeyExists if it does."""
        return self._write(LocalWrite(Put(key, value), must_be_new=True), timeout_s)

    def update(
        self,
        key: str,
        value: bytes,
        *,
        expected: VersionToken,
        timeout_s: float | None = APPLY_TIMEOUT_S,
    ) -> VersionToken:
        """`put`, for an entry that must be at version `expected`, else VersionMismatch. Atomic: no
        write comes between check and write."""
        check_version(expected)
        return self._write(LocalWrite(Put(key, value), expected=expected), timeout_s)

    def delete(
        self,
        key: str,
        *,
        expected: VersionToken | Unset = UNSET,
        timeout_s: float | None = APPLY_TIMEOUT_S,
    ) -> VersionToken:
        """Remove `key`; with `expected`, only at that version, else VersionMismatch. Returns the
        version of the removal.

        `expected=None` raises TypeError, here and in `update`: it usually comes from a missing
        entry.
        """
        return self._write(LocalWrite(Delete(key), expected=expected), timeout_s)

    def _write(self, request: LocalWrite, timeout_s: float | None) -> VersionToken:
        return VersionToken.from_u64(self._send(request, check_timeout(timeout_s)))

    def _submit(
        self, request: Request, timeout_s: float = 0.0, place: Place | None = None
    ) -> Future[Any]:
        """Put a request into the writer's mailbox: see `Inbox.offer`. The caller waits for its
        future."""
        self._offer(Mail(request), timeout_s, place)
        return request.future

    def _leave(self, place: Place) -> None:
        """Give up a place in the line for room in the mailbox."""
        self._supervisor.writer.inbox.leave(place)

    def _send(self, request: Request, timeout_s: float) -> Any:
        """Have the writer carry out `request`, and wait for the answer. `timeout_s` is checked."""
        mail, writer = Mail(request), self._supervisor.writer
        in_hand = False
        if callback_threads and runs_callbacks():
            self._check_thread()
        if timeout_s >= TURN_TIMEOUT_S and isinstance(request, WriteRequest):
            try:
                in_hand = writer.work_in_turn(mail)
            except BaseException as error:
                if not writer.is_own_fault(error):
                    raise
                in_hand = True  # the writer died, and settles the request when it restarts
        if not in_hand:
            self._check_thread()
            self._offer(mail, timeout_s)
        future = request.future
        try:
            return future.result(request.created + timeout_s - time.monotonic())
        except Unanswered:
            if future.cancel():
                raise RequestTimeout(
                    f"no answer within {timeout_s} s; the request was withdrawn"
                ) from None
            if not future.done():
                raise RequestTimeout(
                    f"no answer within {timeout_s} s; its outcome is unknown"
                ) from None
            return future.result()  # it arrived at the last moment

    def sync(self, timeout_s: float | None = APPLY_TIMEOUT_S) -> None:
        """Make every batch answered before this call survive a power loss, whatever the option
        `sync`.

        Cost: an fsync, during which applies wait; nothing if the log is already synced. If the
        fsync fails, the store recovers by writing a new file, and this call returns after that.
        """
        self._send(SyncRequest(), check_timeout(timeout_s))

    def compact(self, timeout_s: float | None = JOB_TIMEOUT_S) -> None:
        """Compact the log: rewrite it as its fold. Reads and applies continue meanwhile.

        Returns once a rewrite that includes all batches before this call is done.
        """
        self._send(CompactRequest(), check_timeout(timeout_s))

    def export_to(
        self,
        dest_dir: StrPath,
        timeout_s: float | None = JOB_TIMEOUT_S,
        *,
        format: FormatName | None = None,
    ) -> ExportManifest:
        """Write the state, including all batches before this call, as an artifact at `dest_dir`.
        Applies continue meanwhile.

        `format`: the artifact's format; None means the log's. The Rust crate imports
        "slipstream-v2".

        FileExistsError if `dest_dir` exists. The artifact appears complete or not at all. A FAILED
        store, or one that fails meanwhile, exports what its readers see, on the caller's thread and
        without a deadline.
        """
        FORMAT.check(format)
        timeout_s = check_timeout(timeout_s)
        dest = os.path.abspath(path_text(dest_dir))
        manifest: ExportManifest
        if self._core.state is not State.FAILED:
            try:
                manifest = self._send(ExportRequest(dest, format), timeout_s)
                return manifest
            except StoreFailed:
                pass  # whoever meets the error that fails the store may call before it has failed
        self.snapshot()
        manifest = self._engine.begin_export(format)(dest)
        return manifest

    @property
    def _engine(self) -> Engine:
        engine = self._core.engine
        if engine is None:
            raise StoreClosed(f"{self.path} is closed")
        return engine

    def verify(self) -> VerifyReport:
        """Check every invariant of the log, up to its current end. Reports every problem and
        changes nothing.

        Runs on the caller's thread; applies and compactions continue. Cost: reads the whole file,
        about 1 us an entry.
        """
        self.snapshot()
        report: VerifyReport = self._engine.verify()
        return report

    # Messages.

    @property
    def writer(self) -> pykka.ActorRef[Any]:
        """The writer's actor reference: takes Apply, Compact, Export. Stays valid across
        restarts."""
        return self._supervisor.writer.actor_ref

    @property
    def reader(self) -> pykka.ActorRef[Any]:
        """An actor reference that reaches all readers: takes Get, Range, RangePage. Stays valid
        across restarts."""
        return self._supervisor.readers[0].actor_ref

    # State, statistics and life cycle.

    @property
    def path(self) -> Path:
        """The log's absolute path, with symbolic links resolved."""
        return self._core.config.path

    @property
    def state(self) -> State:
        """The state of the store."""
        return self._core.state

    @property
    def report(self) -> OpenReport:
        """What the last open or replay of the log found and did."""
        assert self._core.report is not None
        return self._core.report

    def stats(self) -> Stats:
        """The store's statistics. Cost: microseconds, plus counting the entries on the first call
        after a batch."""
        core = self._core
        snapshot, engine, statistics = self.snapshot(), core.engine, core.statistics
        sizes = Sizes(0, 0, 0) if engine is None else engine.sizes()
        held = Held(0, 0.0) if engine is None else engine.held()
        cache = CacheUse(0, 0) if engine is None else engine.cache()
        latencies, unsynced_since = sorted(statistics.latencies_s), core.unsynced_since
        return Stats(
            state=core.state,
            reason=core.reason,
            seq=snapshot.seq,
            cursor=snapshot.cursor(),
            synced_seq=core.synced[0],
            entries=len(snapshot),
            log_bytes=sizes.log_bytes,
            base_bytes=sizes.base_bytes,
            appended_bytes=sizes.appended_bytes,
            mailbox_depth=len(self._supervisor.writer.inbox),
            batches=statistics.batches,
            groups=statistics.groups,
            largest_group=statistics.largest_group,
            latency_mean_s=sum(latencies) / len(latencies) if latencies else 0.0,
            latency_p99_s=latencies[len(latencies) * 99 // 100] if latencies else 0.0,
            restarts=tuple(statistics.restarts),
            compactions=statistics.compactions,
            last_compaction_s=statistics.last_compaction_s,
            last_compaction_unix_s=statistics.last_compaction_unix_s,
            compaction_error=statistics.compaction_error,
            throttled_s=statistics.throttled_s,
            snapshot_age_s=time.monotonic() - core.published_at,
            unsynced_s=0.0 if unsynced_since is None else time.monotonic() - unsynced_since,
            subscriptions=len(core.feeds.backlog),
            held_snapshots=held.snapshots,
            oldest_held_s=held.oldest_s,
            held_bytes=held.memory_bytes,
            cached_bytes=cache.held_bytes,
        )

    def health(self) -> Health:
        """Ready, degraded or failed, with reasons: for a readiness probe. Cost: that of `stats`.
        Never raises."""
        try:
            stats = self.stats()
        except StoreClosed:
            return Health(Status.FAILED, ("the store is closed",))
        return store_health(stats, self._core.config, time.time())

    def reopen(self, timeout_s: float | None = JOB_TIMEOUT_S) -> None:
        """Try again after FAILED: replay the log and continue. StoreFailed if that fails, too. Does
        nothing if RUNNING.

        If the store is already restarting or reopening, waits for the outcome.
        """
        timeout_s = check_timeout(timeout_s)
        self._enter()
        self._check_thread()
        answer: Answer[None] = Answer()
        self._supervisor.post(Reopen(answer))
        if not answer.wait(timeout_s):
            raise RequestTimeout(f"the store did not reopen within {timeout_s} s")
        answer.result()

    def close(self, timeout_s: float | None = CLOSE_TIMEOUT_S) -> None:
        """Serve waiting requests, sync and seal the log, stop the actors, release the lock. Closing
        twice is fine.

        Called on one of the store's own threads, or from a signal handler that interrupted a write
        on this thread, it returns at once, and the store closes after that write. RequestTimeout if
        the writer does not finish in time. Raises any error from sealing the log.
        """
        timeout_s = check_timeout(timeout_s)
        if self._core.state is State.FORKED:
            return
        was_closed = self._core.ended.is_set()
        error = close(self._supervisor, timeout_s)
        if self._core.ended.is_set():
            self._finalizer.detach()
            live.pop(self._supervisor, None)
        if error is not None and not was_closed:
            raise error

    @property
    def _feeds(self) -> Feeds:
        return self._core.feeds

    def _enter(self) -> None:
        if self._core.state is State.FORKED:
            raise ForkedStore(f"{self.path} was opened before this process was forked")

    def _check_thread(self) -> None:
        if would_wait_for_itself(self._supervisor):
            raise ReentrantCall(
                "called during a write on this thread, from a callback, or on one of the store's"
                " own threads, and would wait for itself: use apply_async"
            )

    def __repr__(self) -> str:
        return f"<foldlog.Store {str(self.path)!r} {self.state}>"
