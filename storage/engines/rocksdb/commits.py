"""An open database and its fold: opening, committing, syncing, closing. One thread writes."""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import sys
import time
from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from foldlog.protocol.engine import OpenReport
from foldlog.protocol.errors import (
    FoldlogError,
    ForkedStore,
    LogChangedError,
    LogPoisonedError,
    StoreClosed,
    StoreLocked,
)
from foldlog.protocol.options import CACHE_BYTES, OnDamage
from foldlog.protocol.tokens import U64_MAX, WatchCursor
from foldlog.protocol.updates import Batch, Change, KvEntry, RawUpdates
from foldlog.storage.engines.rocksdb.database.errors import (
    is_rocksdbs,
    is_stall,
    translated,
    typed,
)
from foldlog.storage.engines.rocksdb.database.opening import binding, open_database
from foldlog.storage.engines.rocksdb.database.record import State, encode_entry
from foldlog.storage.engines.rocksdb.database.state import directory_bytes, state_of
from foldlog.storage.engines.rocksdb.fold.held import HeldFolds
from foldlog.storage.engines.rocksdb.fold.snapshot import RocksDbFold
from foldlog.storage.engines.rocksdb.fold.source import Source, is_read_after_its_end
from foldlog.storage.engines.rocksdb.fold.staged import StagedFold
from foldlog.storage.engines.rocksdb.fold.trail import Trail
from foldlog.storage.engines.rocksdb.past import Past
from foldlog.storage.engines.rocksdb.writes import Writes
from foldlog.storage.fold.snapshot import ClosedFold
from foldlog.storage.forks import Rank, tell_after_fork
from foldlog.storage.formats.format import Progress
from foldlog.storage.handover import Turns
from foldlog.storage.log.files import OS_FILES, resolve

if TYPE_CHECKING:
    from rocksdict import Rdict

LINGER_S = 10.0
"""Seconds that an opening waits for reads from an earlier opening to end."""
_LINGER_PAUSE_S = 0.001
_getframe = sys._getframe


class Commits:
    """A database that is open for writing, and its fold. `RocksDbEngine` adds the rest."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        sync_each: bool = False,
        on_damage: OnDamage = "refuse",
        cache_bytes: int = CACHE_BYTES.default,
        create: bool = True,
    ) -> None:
        """Open the database at `path`, or create it if nothing is there.

        Without `create`, LogChangedError if nothing is there. StoreLocked, CorruptLogError,
        InvalidFormatError or OSError.
        """
        self.path = resolve(path)
        self._name = os.fspath(self.path)  # a stat of a Path takes 1 us longer
        self.sync_each = sync_each
        self.failure: str | None = None
        """RocksDB's message once it has refused to write, else None; `heal` recovers."""
        self._rocksdict = binding()
        self._on_damage, self._cache_bytes = on_damage, cache_bytes
        self._create = create
        """False once it is open: when it is opened again, it must still be there."""
        self._compacted_seq = -1
        # Whose turn it is with the database: any thread may sync it, and none closes it meanwhile.
        self._turns = Turns()
        self._held = HeldFolds()
        self._pid = os.getpid()
        self._bridge = contextlib.ExitStack()  # what `heal` opened to keep reads alive
        self._closing: Rdict | None = None
        """Ended, but still to be closed: `close` may be cut short."""
        created = not self.path.exists()
        self._past = Past(0, WatchCursor.none())
        self._open_source()
        try:
            self._begin_at(created)
        except BaseException:
            self._abandon()
            raise

    def _begin_at(self, created: bool) -> None:
        if created:
            OS_FILES.sync_dir(self.path.parent)
        self._past = Past(self._state.seq, self._state.cursor)
        self.report = OpenReport(
            self.path,
            created=created,
            size=directory_bytes(self.path),
            seq=self.snapshot.seq,
            cursor=self.snapshot.cursor(),
        )
        tell_after_fork(self, Rank.ENGINE)

    # Opening.

    def _open_source(self) -> None:
        self._source = Source(None, self.path, self._rocksdict.ReadOptions, writable=True)
        try:
            self._source.db = self._opened()  # in no variable: a traceback would keep it open
            self._writes = Writes(self._source)
            self._directory = _identity(self._name)
            self._create = False
            self._trail = Trail()
            self._in_doubt: State | None = None  # what the current commit writes
            state = state_of(self._db, self.path) or self._begin()
            self._publish(state)
        except BaseException:
            db = self._source.db
            self._release(StoreClosed(f"{self.path} was not opened"), read_beside=True)
            if db is not None:
                with contextlib.suppress(Exception):
                    db.close()  # a frame of the traceback may hold it
            raise
        # Opening has written what it recovered to tables.
        self._synced = (state.seq, state.cursor)

    def _opened(self) -> Rdict:
        """Open the database.

        Wait for threads that are in the middle of a read from an earlier opening: it is locked
        until they are through. StoreLocked if it takes longer than `LINGER_S`.
        """
        stop_s = 0.0
        while True:
            try:
                return open_database(
                    self.path,
                    create=self._create,
                    cache_bytes=self._cache_bytes,
                    on_damage=self._on_damage,
                )
            except FileNotFoundError:
                if self._create:
                    raise
                raise LogChangedError(
                    self.path, "was deleted, moved or unmounted while its writer was down"
                ) from None
            except StoreLocked as error:
                now = time.monotonic()
                stop_s = stop_s or now + LINGER_S
                if (
                    error.pid != self._pid
                    or now > stop_s
                    or not is_read_after_its_end(self._source)
                ):
                    raise
                time.sleep(_LINGER_PAUSE_S)

    def _begin(self) -> State:
        """Write the first state record to an empty database."""
        state = State(secrets.token_bytes(16), 0, WatchCursor.none())
        self._write((), state)
        self._flush_wal()
        return state

    def _publish(self, state: State) -> RocksDbFold:
        """Take RocksDB's snapshot of what was written, and publish it to readers."""
        source = self._source
        newest = self._trail.next()
        fold = RocksDbFold(source, source, newest, state.seq, state.cursor, state.origin)
        self._held.add(fold)
        # Nothing but a fold that `close` finds may hold it: not a variable, which outlives an
        # exception with its traceback.
        fold.view = source.opened().snapshot()
        self._trail.following = newest
        self._trail, self._state, self._in_doubt = newest, state, None
        # What readers see: the newest fold, until the engine is closed.
        self.snapshot: RocksDbFold | ClosedFold = fold
        return fold

    @property
    def _db(self) -> Rdict:
        return self._source.opened()

    # Writing.

    def stage(self, batches: Sequence[Batch], on: RocksDbFold | None = None) -> RocksDbFold:
        """See `Engine`."""
        fold = self._newest()
        before = fold if on is None else on
        changes = dict(before.staged) if isinstance(before, StagedFold) else {}
        for batch in batches:
            for part in batch.changes:
                for key, value, version in part.values():
                    changes[key.encode()] = None if value is None else encode_entry(value, version)
        last = batches[-1]
        seq, origin = before.seq + len(batches), last.origin
        staged = StagedFold(fold, changes, seq, last.cursor, origin)
        self._held.add(staged)
        return staged

    def commit(self, batches: Sequence[Batch], staged: object = None) -> RocksDbFold:
        """See `Engine`.

        One write batch holds the updates, the cursor, the origin and the sequence.

        Cost: 6 us, and 1 us an update; with `sync_each`, an fsync. The write of the whole group
        holds the interpreter lock: about 0.5 us an update.
        """
        groups = [_raw(part) for batch in batches for part in batch.changes]
        last = batches[-1]
        before = self._commit(groups, len(batches), last.cursor, last.origin)
        self._past.add(before.seq, before.cursor, batches)
        return self._newest()

    def commit_raw(self, updates: RawUpdates, cursor: WatchCursor) -> int:
        """Commit one batch that leaves a gap in the past: see `Past`. Returns its sequence.

        Cost: 0.5 us an update less than `commit`.
        """
        return self._commit([updates], 1, cursor).seq + 1

    def _commit(
        self, groups: Sequence[RawUpdates], batches: int, cursor: WatchCursor, origin: bytes = b""
    ) -> State:
        """Returns the state before. `origin`: of the cursor; empty for the same as before."""
        self._check_usable()
        before = self._state
        if before.seq + batches > U64_MAX:
            raise FoldlogError(f"{self.path}: the sequence is exhausted")
        state = State(before.store_id, before.seq + batches, cursor, origin or before.origin)
        # Before they are written: see `Trail`.
        self._trail.parts += tuple(group.keys for group in groups)
        self._in_doubt = state
        self._write(groups, state)
        if self.sync_each:
            self._flush_wal()
            self._synced = state.seq, state.cursor
        self._publish(state)
        return before

    def load(
        self,
        blocks: Iterable[list[KvEntry]],
        seq: int,
        cursor: WatchCursor,
        progress: Progress | None = None,
    ) -> None:
        """Fill an empty store, which nobody reads yet, up to batch `seq` and `cursor`.

        Not atomic.
        """
        done = 0
        for block in blocks:
            self._writes.load(block)
            done += len(block)
            if progress is not None:
                progress(done, done)
        state = State(self._state.store_id, seq, cursor, self._state.origin)
        self._write((), state)
        self._publish(state)
        self._past.begin(state.seq, state.cursor)
        self.sync()

    def _write(self, groups: Sequence[RawUpdates], state: State) -> None:
        try:
            self._writes.commit(groups, state)
        except Exception as error:
            if not is_rocksdbs(error):
                raise
            raise self._failed(error) from error

    def _flush_wal(self) -> None:
        with translated(self._failed):
            self._writes.sync()

    def _failed(self, error: Exception) -> Exception:
        """The error to raise. RocksDB writes no more after an error; nor does the engine."""
        if is_stall(error):
            self._in_doubt = None  # none of it was written
        elif self._source.db is not None:
            self.failure = str(error)
        return typed(error, self.path)

    def _check_usable(self) -> None:
        self._check_open()
        self.check_file()
        if self._in_doubt is not None:
            self._settle()

    def resume(self) -> RocksDbFold:
        """After the writer has died, continue from what the database holds, and sync it.

        Snapshots stay valid.
        """
        self._check_open()
        self.check_file()
        self._settle()
        self._sync()
        return self._newest()

    @property
    def state(self) -> State:
        """The state record that was published last."""
        return self._state

    def _check_open(self) -> None:
        if os.getpid() != self._pid:
            raise ForkedStore(f"{self.path} was opened before a fork")
        if self._source.db is None:
            self._source.refuse()
        if self.failure is not None:
            raise LogPoisonedError(self.path, self.failure)

    def _settle(self) -> None:
        """After an exception in the middle of a commit: publish what the database holds."""
        state = state_of(self._db, self.path)
        assert state is not None
        if state.seq != self._state.seq:
            if self.sync_each:
                self._flush_wal()
                self._synced = state.seq, state.cursor
            self._publish(state)
            self._past.begin(state.seq, state.cursor)
        self._in_doubt = None

    def sync(self) -> None:
        """See `Engine`. Cost: an fsync, without the interpreter lock."""
        try:
            self._turns.enter(_getframe())
            self._check_open()
            self._sync()
        finally:
            self._turns.leave(_getframe())

    def _sync(self) -> None:
        state = self._state  # before the flush, which may miss later commits
        self._flush_wal()
        self._synced = state.seq, state.cursor

    @property
    def synced(self) -> tuple[int, WatchCursor]:
        """See `Engine`."""
        return self._synced

    def check_file(self) -> None:
        """See `Engine`. Cost: 2 us."""
        try:
            found = _identity(self._name)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise LogChangedError(self.path, f"is gone: {error.strerror}") from None
        if found != self._directory:
            raise LogChangedError(self.path, "was replaced by another directory")

    def confirm_file(self) -> None:
        """See `Engine`. Nothing can be repaired."""
        self.check_file()

    def mark_deleted(self, reason: str) -> bool:
        """See `Engine`. Returns False: what was deleted is gone."""
        return False

    @property
    def closed(self) -> bool:
        """See `Engine`."""
        return self._source.db is None

    @property
    def keeps_origin(self) -> bool:
        """See `Engine`. The state record holds it."""
        return True

    # Ending.

    def close(self) -> None:
        """See `Engine`.

        Snapshots raise StoreClosed from then on: RocksDB's do not outlive the database.
        """
        try:
            self._turns.enter(_getframe())
            self._close()
        finally:
            self._turns.leave(_getframe())

    def _close(self) -> None:
        db = self._source.db
        if db is not None and self.failure is None:
            try:
                self.check_file()
                with translated(partial(typed, path=self.path)):
                    db.flush_wal(True)
            except Exception:
                self._abandon()
                raise
            self._closing = db
            self._end()
        else:
            self._abandon()
        self._finish_closing()

    def _finish_closing(self) -> None:
        if self._closing is None:
            return
        # Closed already, if an earlier call was interrupted just after this.
        with contextlib.suppress(StoreClosed), translated(partial(typed, path=self.path)):
            self._closing.close()
        self._closing = None

    def abandon(self) -> None:
        """See `Engine`. What was committed is in the write-ahead log."""
        try:
            self._turns.enter(_getframe())
            self._abandon()
        finally:
            self._turns.leave(_getframe())

    def _abandon(self) -> None:
        self._stop_writing()
        db = self._source.db
        if db is not None and self._is_replaced():
            _keep_for_ever(db)
            db = None
        self._end()
        if db is not None:
            with contextlib.suppress(Exception):  # it always raises: it was stopped
                db.close()

    def _is_replaced(self) -> bool:
        """True if another directory has the name, with files in it.

        RocksDB must then not be freed: it would remove tables there that it does not know, and make
        its own manifest the current one.
        """
        try:
            return _identity(self._name) != self._directory and bool(os.listdir(self._name))
        except OSError:
            return False

    def _stop_writing(self) -> None:
        """Keep RocksDB from flushing when it is freed: its file names may be another's by now."""
        if self._source.db is not None:
            with contextlib.suppress(Exception):
                self._source.db.cancel_all_background(True)

    def _end(self) -> None:
        reason = f"{self.path} is closed"
        self.snapshot = ClosedFold(reason)
        self._past.begin(self._state.seq, self._state.cursor)
        self._release(StoreClosed(reason))
        self._bridge.close()

    def _release(self, ended: FoldlogError, *, read_beside: bool = False) -> None:
        """Release the database and all its snapshots, so that it can be opened again. With
        `read_beside`, a fold stays that is read through another opening."""
        self._source.ended = ended
        self._source.db = None
        held = self._held.all()
        kept = [fold for fold in held if read_beside and fold.reads_from is not self._source]
        for fold in held:
            if fold not in kept:
                fold.end()
        self._held.keep(kept)

    def after_fork(self) -> None:
        """In a forked child, keep the database from being freed.

        RocksDB's threads do not exist there, and freeing would wait for them forever.
        """
        if self._source.db is None:
            return
        for fold in self._held.all():
            _keep_for_ever(fold.view)
        _keep_for_ever(self._source.db)
        _keep_for_ever(self._bridge)
        self._bridge = contextlib.ExitStack()
        self._release(ForkedStore(f"{self.path} was opened before a fork"))

    def _newest(self) -> RocksDbFold:
        fold = self.snapshot
        fold.seq  # noqa: B018 - raises StoreClosed here, not later
        assert isinstance(fold, RocksDbFold)
        return fold


def _raw(changes: dict[str, Change]) -> RawUpdates:
    _, values, versions = zip(*changes.values(), strict=True)
    return RawUpdates(list(map(str.encode, changes)), values, versions)


def _identity(directory: str) -> tuple[int, int]:
    info = os.stat(directory)
    return info.st_dev, info.st_ino


def _keep_for_ever(value: object) -> None:
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))
