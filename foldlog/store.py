"""The store: the face of writer, readers and supervisor, for many threads.

A read through the store needs no message: it loads the published snapshot on the caller's thread. A write becomes a request in
the writer's mailbox, and its future is the caller's own: it ends, with the answer or a typed error, whatever dies meanwhile.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pykka

from foldlog.actors.adapter import Mail, start_aside
from foldlog.actors.answers import Answer, runs_callbacks
from foldlog.actors.core import Config, Core, State, Stats, no_step
from foldlog.actors.delivery import Delivery
from foldlog.actors.feeds import Since, Subscription, Watch
from foldlog.actors.requests import (
    CompactRequest,
    ExportRequest,
    ForwardWrite,
    LocalWrite,
    Request,
    SyncRequest,
    WriteRequest,
)
from foldlog.actors.supervisor import CloseNow, Reopen, Supervisor
from foldlog.health import Health, Status, store_health
from foldlog.protocol.engine import Engine, Held, OpenReport, Sizes
from foldlog.protocol.errors import ForkedStore, ReentrantCall, RequestTimeout, StoreClosed
from foldlog.protocol.forks import Rank, call_after_fork
from foldlog.protocol.options import (
    APPLY_TIMEOUT_S,
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
    check_timeout,
)
from foldlog.protocol.store import Backend, FormatName, StrPath
from foldlog.protocol.tokens import CursorLike, VersionToken, WatchCursor
from foldlog.protocol.updates import Update, encode_batch
from foldlog.storage.artifacts.artifact import ExportManifest
from foldlog.storage.formats.format import VerifyReport
from foldlog.storage.log.files import OS_FILES, Files, resolve
from foldlog.storage.readable import Readable
from foldlog.waiting import WAIT_TIMEOUT_S, Position, SeqLike, wait_until

EXIT_TIMEOUT_S = 10.0
TURN_TIMEOUT_S = 20.0
"""A call that may take so long writes on its own thread, if the writer is idle: there, a disk that is stuck holds it past any
deadline. One with a shorter deadline hands over to the writer's thread, and is free in time."""
UNOPENED_TIMEOUT_S = 5.0
"""What an interrupted `open` waits for the log to be closed again."""


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
    mailbox_batches: int = MAILBOX_BATCHES.default,
    mailbox_bytes: int = MAILBOX_BYTES.default,
    max_restarts: int = MAX_RESTARTS.default,
    restart_window_s: float = RESTART_WINDOW_S.default,
    stuck_after_s: float = STUCK_AFTER_S.default,
    files: Files = OS_FILES,
    step: Callable[[str], None] | None = None,
) -> Store:
    """Open or create the store in the log at `path`.

    What an answered `apply` means: every later snapshot in the process has it, and it survives a killed process, always. It
    survives a power loss with `sync="always"`; with `sync="interval"` up to the last background sync, one each
    `sync_interval_s` (`store.synced_cursor`); with `sync="never"` by luck.

    `backend`: "rocksdb" keeps the store in a RocksDB database, in a directory at `path`, for folds beyond memory; it needs the
    extra `rocksdb`. Snapshots end with the store, in a forked child, and when it heals after an error of the disk; a cursor is
    resumed from while its batches are in memory (`CursorExpired` else); no process follows it; `export_to` writes RocksDB's
    files; `compact_threshold` and `files` are of no effect. See `docs/which-engine.md`.

    `format`: of a new log, "foldlog" if None. A log that exists is of the format that its head tells, and naming another is an
    InvalidFormatError. "slipstream-v2" is the file of the Rust crate, worked on in place. It promises less: a crash may leave a
    part of a batch in it (its cursor is then not moved), the sequences, and the versions of local writes, start anew in each
    process, all entries are in memory, and a few kinds of damage at its very end cannot be told from a torn write. It cannot be
    followed, and a watch cannot go on behind a cursor. See `docs/interchange.md`.

    `readers`: actors that serve `store.reader`. `compact_threshold`: appended bytes (and no fewer
    than the base has) after which the log is compacted, behind the readers; the log stays below `3
    x (live + compact_threshold)` plus one batch, and writes are slowed down for that where they
    must be. `on_damage="cut"`: keep what stands before the first damage and set the rest aside.
    `mailbox_batches`, `mailbox_bytes`: what may wait for the writer. `max_restarts` within
    `restart_window_s`: what one actor may need before the store is FAILED. `stuck_after_s`: when a
    writer that does not come back is given up (until it does); time for which the process was
    paused does not count. `files`, `step`: see `foldlog.testing`.

    TypeError or ValueError at once for an option that makes no sense. A `timeout_s`, here and in every call, is a number of
    seconds: 0 does not wait, None and infinity wait without end, nan and negative ones are a ValueError.

    Raises StoreLocked, CorruptLogError, InvalidFormatError, LogRegressedError or OSError, and nothing stays open.

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
        mailbox_batches,
        mailbox_bytes,
        max_restarts,
        restart_window_s,
        stuck_after_s=stuck_after_s,
        format=format,
        backend=backend,
        files=files,
        step=step or no_step,
    )
    core = Core(config)
    supervisor = Supervisor(core)
    try:
        start_aside(supervisor.thread, supervisor.not_started)
        supervisor.opened.result()
        return Store(core, supervisor)
    except BaseException:
        supervisor.post(CloseNow(Answer()))  # also for a KeyboardInterrupt while the log is read
        core.ended.wait(UNOPENED_TIMEOUT_S)
        raise


def write_of(updates: Iterable[Update], cursor: CursorLike, forward_only: bool) -> WriteRequest:
    """The request for a batch, checked and encoded."""
    batch = encode_batch(updates, cursor)
    return ForwardWrite(batch) if forward_only else WriteRequest(batch)


class Store(Readable):
    """A store that is open. Any thread may call any method."""

    def __init__(self, core: Core, supervisor: Supervisor) -> None:
        """Not for callers: use `foldlog.open`."""
        self._core = self._published = core
        self._supervisor = supervisor
        self._offer = supervisor.writer.inbox.offer
        # The actors hold the core and not the store, so a store that is dropped can be noticed.
        self._finalizer = weakref.finalize(self, _close_dropped, supervisor, os.getpid())
        self._finalizer.atexit = False
        _live[supervisor] = os.getpid()

    @property
    def synced_cursor(self) -> WatchCursor:
        """The position up to which every update survives a power loss: what to acknowledge upstream, if that matters."""
        return self._core.synced_cursor

    # Writing: by the writer, in the order of its mailbox.

    def apply(
        self,
        updates: Iterable[Update],
        cursor: CursorLike,
        timeout_s: float | None = APPLY_TIMEOUT_S,
        *,
        forward_only: bool = False,
    ) -> int:
        """Atomically fold the updates and move the cursor. Returns the batch's sequence, once written and published.

        Any cursor is taken, also one before the last: it is opaque, an upstream may have been restored or recreated, and only
        its feeder knows. With `forward_only`, CursorRegressed unless the cursor is at or after the last one (compared as
        bytes, for cursors of one length): nothing was written.

        TypeError or ValueError at once for updates that are not sound. Backpressure if the mailbox stays full, OSError if
        the log cannot be written: nothing was stored. RequestTimeout if the answer does not come in time: the batch was
        withdrawn, or (`outcome unknown`) the writer has it in hand. Else StoreFailed, StoreClosed, ForkedStore.
        """
        self._core.snapshot.seq  # noqa: B018 - StoreClosed comes before complaints about the arguments
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
        """`apply`, answered to the future that is returned; many in flight make one commit group.

        Batches of one thread are written in the order of its calls. `timeout_s` is how long to wait for room in the mailbox:
        by default, not at all (Backpressure).
        """
        self._core.snapshot.seq  # noqa: B018
        timeout_s = check_timeout(timeout_s)
        return self._submit(write_of(updates, cursor, forward_only), timeout_s)

    def put(
        self, key: str, value: bytes, timeout_s: float | None = APPLY_TIMEOUT_S
    ) -> VersionToken:
        """Set `key`, for programs that are their own source. Returns the version: the batch's sequence as a u64 token.

        The cursor stays where it is.
        """
        return self._write(LocalWrite(key, value), timeout_s)

    def create(
        self, key: str, value: bytes, timeout_s: float | None = APPLY_TIMEOUT_S
    ) -> VersionToken:
        """`put`, for a key that must not exist: else KeyExists."""
        return self._write(LocalWrite(key, value, must_be_new=True), timeout_s)

    def update(
        self,
        key: str,
        value: bytes,
        *,
        expected: VersionToken,
        timeout_s: float | None = APPLY_TIMEOUT_S,
    ) -> VersionToken:
        """`put`, for an entry that must be at version `expected`: else VersionMismatch. Check and write are one step."""
        return self._write(LocalWrite(key, value, expected=expected), timeout_s)

    def delete(
        self,
        key: str,
        *,
        expected: VersionToken | Unset = UNSET,
        timeout_s: float | None = APPLY_TIMEOUT_S,
    ) -> VersionToken:
        """Remove `key`; with `expected`, only at that version: else VersionMismatch. Returns the version of the removal.

        An `expected` of None is a TypeError, here and in `update`: it is what a missing entry turns into, and not an order.
        """
        return self._write(LocalWrite(key, UNSET, expected=expected), timeout_s)

    def _write(self, request: LocalWrite, timeout_s: float | None) -> VersionToken:
        return VersionToken.from_u64(self._send(request, timeout_s))

    def _submit(self, request: Request, timeout_s: float = 0.0) -> Future[Any]:
        """Put a request into the writer's mailbox, and leave the waiting to the caller."""
        self._offer(Mail(request), timeout_s)
        return request.future

    def _send(self, request: Request, timeout_s: float | None) -> Any:
        timeout_s = check_timeout(timeout_s)
        deadline = time.monotonic() + timeout_s
        mail, writer = Mail(request), self._supervisor.writer
        in_hand = False
        if runs_callbacks():
            self._check_thread()
        if timeout_s >= TURN_TIMEOUT_S and isinstance(request, WriteRequest):
            try:
                in_hand = writer.work_in_turn(mail)
            except BaseException as error:
                if not writer.is_own_fault(error):
                    raise
                in_hand = (
                    True  # the writer died of it, and settles the request when it starts again
                )
        if not in_hand:
            self._check_thread()
            self._offer(mail, timeout_s)
        try:
            return request.future.result(max(deadline - time.monotonic(), 0.0))
        except TimeoutError:
            if request.future.done() and not request.future.cancelled():
                return (
                    request.future.result()
                )  # it came in the last moment, or is itself an error of this kind
            if request.future.cancel():
                raise RequestTimeout(
                    f"no answer within {timeout_s} s; the request was withdrawn"
                ) from None
            raise RequestTimeout(
                f"no answer within {timeout_s} s; its outcome is unknown"
            ) from None

    def sync(self, timeout_s: float | None = APPLY_TIMEOUT_S) -> None:
        """Make every batch that was answered before the call survive a power loss, whatever `sync=` says.

        Cost: an fsync, which applies wait for; nothing if the log is synced already. If the disk refuses, the store heals by
        writing a new file, and this returns after that.
        """
        self._send(SyncRequest(), check_timeout(timeout_s))

    def compact(self, timeout_s: float | None = JOB_TIMEOUT_S) -> None:
        """Rewrite the log as its fold, behind the readers and while applies go on.

        Returns when a rewrite has ended that holds all batches before this call.
        """
        self._send(CompactRequest(), timeout_s)

    def export_to(
        self,
        dest_dir: StrPath,
        timeout_s: float | None = JOB_TIMEOUT_S,
        *,
        format: FormatName | None = None,
    ) -> ExportManifest:
        """Write the state, with all batches before this call, as an artifact at `dest_dir`, while applies go on.

        `format`: of the artifact; that of the log, if None. One of "slipstream-v2" is what the Rust crate imports.

        FileExistsError if `dest_dir` exists. It appears complete or not at all. A store that is FAILED exports what its readers
        see, on the caller's thread and without a deadline.
        """
        FORMAT.check(format)
        timeout_s = check_timeout(timeout_s)
        dest = os.path.abspath(os.fspath(dest_dir))
        if self._core.state is State.FAILED:
            return self._export_failed(dest, format)
        manifest: ExportManifest = self._send(ExportRequest(dest, format), timeout_s)
        return manifest

    def _export_failed(self, dest: str, format: FormatName | None) -> ExportManifest:
        self.snapshot()
        manifest: ExportManifest = self._engine.begin_export(format)(dest)
        return manifest

    @property
    def _engine(self) -> Engine:
        engine = self._core.engine
        if engine is None:
            raise StoreClosed(f"{self.path} is closed")
        return engine

    def verify(self) -> VerifyReport:
        """Check every invariant of the log, up to its end as it is now. Tells all that is wrong, and changes nothing.

        Runs on the caller's thread, while applies and compactions go on. Cost: reads the whole file; about 1 us an entry.
        """
        self.snapshot()
        report: VerifyReport = self._engine.verify()
        return report

    # Messages.

    @property
    def writer(self) -> pykka.ActorRef[Any]:
        """The writer's reference, for actors: takes Apply, Compact, Export. It stays valid across restarts."""
        return self._supervisor.writer.actor_ref

    @property
    def reader(self) -> pykka.ActorRef[Any]:
        """A reference that reaches all readers: takes Get, Range, RangePage. It stays valid across restarts."""
        return self._supervisor.readers[0].actor_ref

    # Changes.

    def watch(self, prefix: str = "", since: Since = None) -> Watch:
        """An iterator of events under `prefix`: the state, one Synced, then changes as they come, in order.

        With `since`, in place of the state: the changes behind a cursor (CursorExpired if it is from before the last
        compaction), or the exact difference to a snapshot that the caller holds, deletes included. A cursor that local
        writes left in place may tell those again. Cost for the writer: an append for each commit group. Memory: bounded; one
        that falls behind is told Lagged, and then the difference.
        """
        self._check_process()
        return Watch(Subscription(self._core.feeds, self.snapshot, prefix, since), self)

    def subscribe(
        self, actor_ref: pykka.ActorRef[Any], prefix: str = "", since: Since = None
    ) -> Delivery:
        """`watch`, told to an actor: each event is a message to it. Ends with the store, the actor, or `cancel()`.

        The last message is Ended. An actor that is slow is told Lagged, as a slow iterator is; one that fails on three events
        in a row is unsubscribed. It does not keep the store from being dropped.
        """
        self._check_process()
        return Delivery(actor_ref, Subscription(self._core.feeds, self.snapshot, prefix, since))

    def wait_for(
        self,
        cursor: CursorLike | None = None,
        timeout_s: float = WAIT_TIMEOUT_S,
        *,
        seq: SeqLike | None = None,
    ) -> None:
        """Return once reads see everything up to `cursor`, or up to the batch `seq`: see `Follower.wait_for`."""
        position = Position(cursor, seq)
        self._check_process()
        wait_until(self._core.feeds, self.snapshot, position, timeout_s)

    # Watching over it.

    @property
    def path(self) -> Path:
        """The log, absolute, links resolved."""
        return self._core.config.path

    @property
    def state(self) -> State:
        """What the store is doing."""
        return self._core.state

    @property
    def report(self) -> OpenReport:
        """What the last opening or replay of the log found and did."""
        assert self._core.report is not None
        return self._core.report

    def stats(self) -> Stats:
        """The books. Cost: microseconds, and counting the entries the first time after a batch."""
        core = self._core
        snapshot, engine, books = self.snapshot(), core.engine, core.books
        sizes = Sizes(0, 0, 0) if engine is None else engine.sizes()
        held = Held(0, 0.0) if engine is None else engine.held()
        latencies, unsynced_since = sorted(books.latencies_s), core.unsynced_since
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
            batches=books.batches,
            groups=books.groups,
            largest_group=books.largest_group,
            latency_mean_s=sum(latencies) / len(latencies) if latencies else 0.0,
            latency_p99_s=latencies[len(latencies) * 99 // 100] if latencies else 0.0,
            restarts=tuple(books.restarts),
            compactions=books.compactions,
            last_compaction_s=books.last_compaction_s,
            last_compaction_unix_s=books.last_compaction_unix_s,
            compaction_error=books.compaction_error,
            throttled_s=books.throttled_s,
            snapshot_age_s=time.monotonic() - core.published_at,
            unsynced_s=0.0 if unsynced_since is None else time.monotonic() - unsynced_since,
            subscriptions=len(core.feeds.backlog),
            held_snapshots=held.snapshots,
            oldest_held_s=held.oldest_s,
        )

    def health(self) -> Health:
        """Ready, degraded or failed, with reasons: for a readiness probe. Cost: that of `stats`. Never raises."""
        try:
            stats = self.stats()
        except StoreClosed:
            return Health(Status.FAILED, ("the store is closed",))
        return store_health(stats, self._core.config, time.time())

    def reopen(self, timeout_s: float | None = JOB_TIMEOUT_S) -> None:
        """Try again after FAILED: replay the log, and go on. StoreFailed if that fails, too; nothing to do in RUNNING.

        Where the store restarts or reopens already, it waits for how that ends.
        """
        timeout_s = check_timeout(timeout_s)
        self._check_process()
        self._check_thread()
        answer: Answer[None] = Answer()
        self._supervisor.post(Reopen(answer))
        try:
            answer.result(timeout_s)
        except TimeoutError:
            raise RequestTimeout(f"the store did not reopen within {timeout_s} s") from None

    def close(self, timeout_s: float | None = CLOSE_TIMEOUT_S) -> None:
        """Serve what waits, sync, seal the log, stop the actors, release the lock. Closing twice is fine.

        Called from one of the store's own threads, or from a signal handler that came within a write of this very thread, it
        returns at once, and the store closes when that is done. RequestTimeout if the writer does not come to an end. Raises
        what sealing the log met.
        """
        timeout_s = check_timeout(timeout_s)
        if self._core.state is State.FORKED:
            return
        was_closed = self._core.ended.is_set()
        error = _close(self._supervisor, timeout_s)
        if self._core.ended.is_set():
            self._finalizer.detach()
            _live.pop(self._supervisor, None)
        if error is not None and not was_closed:
            raise error

    def _check_thread(self) -> None:
        if _would_wait_for_itself(self._supervisor):
            raise ReentrantCall(
                "called within a write of this thread, from a callback, or from a thread of the store's own, which would"
                " wait for itself: use apply_async"
            )

    def _check_process(self) -> None:
        if self._core.state is State.FORKED:
            raise ForkedStore(f"{self.path} was opened before this process was forked")

    def __repr__(self) -> str:
        return f"<foldlog.Store {str(self.path)!r} {self.state}>"


# Life cycle beyond the with-statement: a store that was dropped, the end of the interpreter, a fork.

_live: weakref.WeakKeyDictionary[Supervisor, int] = weakref.WeakKeyDictionary()


def _would_wait_for_itself(supervisor: Supervisor) -> bool:
    return (
        runs_callbacks()
        or supervisor.writer.is_in_turn()
        or supervisor.owns(threading.current_thread())
    )


def _close(supervisor: Supervisor, timeout_s: float) -> BaseException | None:
    answer: Answer[BaseException | None] = Answer()
    supervisor.post(CloseNow(answer))
    if _would_wait_for_itself(supervisor):
        return None
    deadline = time.monotonic() + timeout_s
    try:
        error = answer.result(timeout_s)
    except TimeoutError:
        return RequestTimeout(
            f"the store did not close within {timeout_s} s; the writer still has the log"
        )
    supervisor.thread.join(max(deadline - time.monotonic(), 0.1))
    return error


def _close_dropped(supervisor: Supervisor, pid: int) -> None:
    if os.getpid() == pid and supervisor.thread.is_alive():
        supervisor.post(CloseNow(Answer()))  # first: warnings may be errors
        warnings.warn("a foldlog store was dropped without close()", ResourceWarning, stacklevel=2)


@atexit.register
def _close_at_exit() -> None:
    """A script that forgets to close ends promptly, with every answered batch on disk."""
    for supervisor, pid in list(_live.items()):
        if pid == os.getpid():
            with contextlib.suppress(Exception):
                _close(supervisor, EXIT_TIMEOUT_S)


def _after_fork_in_child() -> None:
    # The threads are gone, and whatever lock they held is held for ever: replace what calls could wait on.
    for supervisor in list(_live):
        supervisor.after_fork()
    _live.clear()


call_after_fork(_after_fork_in_child, Rank.STORE)
