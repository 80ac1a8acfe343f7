"""The engine on RocksDB: what it adds to the contract, which the conformance suite checks."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import pickle
import random
import shutil
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import foldlog
from foldlog import (
    AppendLogSnapshot,
    Delete,
    FoldlogError,
    ForkedStore,
    KvEntry,
    LogChangedError,
    LogPoisonedError,
    Purge,
    Put,
    RocksDbSnapshot,
    StoreClosed,
    StoreLocked,
    VersionToken,
    WatchCursor,
)
from foldlog.protocol.engine import Snapshot
from foldlog.protocol.updates import DecodedBatch, encode_batch
from foldlog.storage.engines.options import EngineOptions
from foldlog.storage.engines.rocksdb import RocksDbEngine, commits, writes
from foldlog.storage.engines.rocksdb import engine as engine_module
from foldlog.storage.engines.rocksdb import past as past_module
from foldlog.storage.engines.rocksdb.database import opening
from foldlog.storage.engines.rocksdb.fold import difference, snapshot
from foldlog.storage.engines.rocksdb.fold.held import HeldFolds
from foldlog.storage.engines.rocksdb.fold.trail import Trail
from foldlog.storage.engines.rocksdb.seat import RocksDbSeat
from foldlog.storage.log.files import OS_FILES

CACHE = 8 * 1024 * 1024
TIMEOUT_S = 120


@pytest.fixture
def engine(path: Path) -> Iterator[RocksDbEngine]:
    engine = RocksDbEngine(path, cache_bytes=CACHE)
    yield engine
    engine.close()


def cursor(number: int) -> WatchCursor:
    return WatchCursor.from_u64(number)


def commit(engine: RocksDbEngine, updates: list[Any], number: int = 0) -> Any:
    number = number or engine.snapshot.seq + 1
    return engine.commit([encode_batch(updates, cursor(number))])


def state(fold: Any) -> dict[str, bytes]:
    return {entry.key: entry.value for entry in fold.range("")}


# Snapshots.


def test_a_fold_has_the_reading_face_of_a_snapshot(engine: RocksDbEngine) -> None:
    commit(engine, [Put("a/1", b"1", VersionToken(b"v")), Put("a/2", b"2"), Put("b", b"3")])
    fold = engine.snapshot
    assert isinstance(fold, Snapshot)
    assert fold.range("a/") == [
        KvEntry("a/1", b"1", VersionToken(b"v")),
        KvEntry("a/2", b"2", VersionToken.unknown()),
    ]
    assert list(fold) == list(fold.keys()) == ["a/1", "a/2", "b"]
    assert list(fold.keys("a/2")) == ["a/2"]
    assert list(fold.items("a")) == [("a/1", b"1"), ("a/2", b"2")]
    assert [entry.key for entry in fold.entries_after("a/", "a/1")] == ["a/2"]
    assert [[entry.key for entry in block] for block in fold.blocks("", "a/1")] == [["a/2", "b"]]
    assert [key in fold for key in ("b", "c", 7)] == [True, False, False]
    assert (len(fold), bool(fold)) == (3, True)
    assert (fold.seq, fold.cursor()) == (1, cursor(1))
    with pytest.raises(TypeError, match="pickled"):
        pickle.dumps(fold)


def test_a_snapshot_of_an_empty_store_is_true(engine: RocksDbEngine) -> None:
    assert (bool(engine.snapshot), len(engine.snapshot), engine.snapshot.seq) == (True, 0, 0)


@pytest.mark.parametrize("block_entries", [1, 3, 1024])
def test_held_snapshots_stay_as_they_were(
    engine: RocksDbEngine, monkeypatch: pytest.MonkeyPatch, block_entries: int
) -> None:
    """The binding's iterators read the newest state even where they are asked of an older
    snapshot: a range of a snapshot that was held across a commit showed what came later.
    """
    monkeypatch.setattr(snapshot, "BLOCK_ENTRIES", block_entries)
    chance = random.Random(17)
    model: dict[str, bytes] = {}
    held = []
    for number in range(60):
        updates: list[Any] = []
        for _ in range(chance.randrange(6)):
            key = f"{chance.choice('ab')}{chance.randrange(25):02}"
            if chance.random() < 0.6:
                updates.append(Put(key, b"%d" % number))
                model[key] = b"%d" % number
            else:
                updates.append(chance.choice([Delete, Purge])(key))
                model.pop(key, None)
        held.append((commit(engine, updates), dict(model)))
        if chance.random() < 0.2:
            engine.compact()
    chance.shuffle(held)
    for fold, expected in held:
        assert state(fold) == expected
        assert [entry.key for entry in fold.range("b")] == sorted(
            key for key in expected if key.startswith("b")
        )
        assert len(fold) == len(expected)
        assert {key: fold.get(key) and fold.get(key).value for key in model} == {
            key: expected.get(key) for key in model
        }
        after = "a12"
        assert [entry.key for entry in fold.entries_after("a", after)] == sorted(
            key for key in expected if after < key < "b"
        )


def test_a_scan_that_goes_on_beside_commits_sees_one_state(engine: RocksDbEngine) -> None:
    keys = [f"k{n:04}" for n in range(3000)]
    commit(engine, [Put(key, b"old") for key in keys])
    fold = engine.snapshot
    seen: list[str] = []
    for block in fold.blocks():
        seen += [entry.key for entry in block if entry.value == b"old"]
        commit(
            engine, [Put(key, b"new") for key in keys[::2]] + [Delete(key) for key in keys[1::2]]
        )
        commit(engine, [Put(f"{key}+", b"new") for key in keys])
    assert seen == keys


def test_readers_in_threads_see_whole_states_while_one_thread_writes(engine: RocksDbEngine) -> None:
    commit(engine, [Put(f"k{n:03}", b"0") for n in range(200)])
    stop = threading.Event()
    torn: list[object] = []

    def read() -> None:
        try:
            while not stop.is_set():
                fold = engine.snapshot
                values = {entry.value for entry in fold.range("k")}
                found = fold.get("k100")
                if values != {b"%d" % (fold.seq - 1)} or found is None or found.value not in values:
                    torn.append((fold.seq, values, found))
        except BaseException as error:
            torn.append(error)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(1, 40):
        commit(engine, [Put(f"k{n:03}", b"%d" % number) for n in range(200)])
    stop.set()
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert torn == []


def test_a_snapshot_that_nobody_holds_is_released_and_the_others_are_told(
    engine: RocksDbEngine,
) -> None:
    assert engine.held() == (0, 0.0, 0)
    fold = engine.snapshot
    commit(engine, [Put("a", b"1")])
    commit(engine, [Put("a", b"2")])
    held = engine.held()
    assert held.snapshots == 1
    assert 0 < held.oldest_s < TIMEOUT_S
    assert engine._db.property_int_value("rocksdb.num-snapshots") == 2  # the newest is one, too
    del fold
    assert engine.held() == (0, 0.0, 0)
    assert engine._db.property_int_value("rocksdb.num-snapshots") == 1


def test_a_look_at_what_was_changed_misses_no_commit_that_ends_meanwhile(
    engine: RocksDbEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had read the keys of a commit before they were noted, found that the commit had ended, and
    began after it from then on: a range of the snapshot showed that change."""
    commit(engine, [Put("a", b"1")])
    fold, keys = engine.snapshot, Trail.keys
    meanwhile = iter([[Put("b", b"2")], [Put("c", b"3")]])

    def keys_before_commits(self: Trail) -> Iterator[bytes]:
        found = list(keys(self))
        for updates in meanwhile:
            commit(engine, updates)
        return iter(found)

    monkeypatch.setattr(Trail, "keys", keys_before_commits)
    fold.changed_since()
    assert fold.changed_since() == [b"b", b"c"]
    assert state(fold) == {"a": b"1"}


def test_what_commits_change_is_kept_only_for_those_who_hold_an_older_snapshot(
    engine: RocksDbEngine,
) -> None:
    oldest = weakref.ref(engine._trail)
    fold = engine.snapshot
    for number in range(10):
        commit(engine, [Put("a", b"%d" % number)])
    assert oldest() is not None
    assert state(fold) == {}
    del fold
    assert oldest() is None


@pytest.mark.parametrize("opens", [1, 3])
def test_the_cache_is_as_large_as_asked_for_each_time_a_database_is_opened(
    path: Path, opens: int
) -> None:
    """The binding takes the options of an existing database from its files, where no cache is
    recorded: from the second open on, it was 8 MiB, and hot reads took 50 times as long.
    """
    for _ in range(opens):
        engine = RocksDbEngine(path, cache_bytes=3 * CACHE)
        assert engine.cache().limit_bytes == 3 * CACHE
        engine.close()


def test_a_snapshot_ends_with_its_store_and_does_not_keep_it_locked(path: Path) -> None:
    """A snapshot, or an iterator of the binding, keeps the database open: the next open found it
    locked by this very process until the last of them was collected.
    """
    snap = RocksDbSnapshot.open(path, cache_bytes=CACHE)[1]
    snap.apply([Put(f"k{n:04}", b"v") for n in range(3000)], cursor(1))
    fold = snap.snapshot()
    blocks = fold.blocks()
    next(blocks)
    snap.close()
    again = RocksDbSnapshot.open(path, cache_bytes=CACHE)[1]
    for use in (lambda: fold.get("k0001"), lambda: fold.range("k"), lambda: next(blocks)):
        with pytest.raises(StoreClosed):
            use()
    with pytest.raises(StoreClosed):
        len(fold)
    assert len(again) == 3000
    again.close()


def test_the_keys_that_are_noted_for_a_held_snapshot_are_counted(engine: RocksDbEngine) -> None:
    commit(engine, [Put("a", b"1")])
    assert engine.held().memory_bytes == 0
    held = engine.snapshot
    for number in range(10):
        commit(engine, [Put(f"key/{n:04d}", b"v") for n in range(100)], number)
    real = sum(sys.getsizeof(b"key/0000") + 8 for _ in range(1000))
    assert real * 9 // 10 < engine.held().memory_bytes < real * 11 // 10
    newer = engine.snapshot
    del held
    commit(engine, [Put("a", b"2")])
    assert 0 < engine.held().memory_bytes < 100
    del newer
    assert engine.held().memory_bytes == 0


# Staged batches, differences, the past.


def test_staged_batches_are_seen_by_who_staged_them_only(engine: RocksDbEngine) -> None:
    commit(engine, [Put("a", b"1"), Put("b", b"1"), Put("c", b"1")])
    batches = [
        encode_batch([Put("b", b"2", VersionToken(b"v")), Delete("a")], cursor(2)),
        encode_batch([Put("bb", b"3"), Delete("never")], cursor(3)),
    ]
    staged = engine.stage(batches)
    assert state(staged) == {"b": b"2", "bb": b"3", "c": b"1"}
    assert staged.get("a") is None
    assert staged.get("b") == KvEntry("b", b"2", VersionToken(b"v"))
    assert (staged.seq, staged.cursor(), len(staged)) == (3, cursor(3), 3)
    assert state(engine.snapshot) == {"a": b"1", "b": b"1", "c": b"1"}
    fold = engine.commit(batches, staged)
    assert (state(fold), fold.seq, fold.cursor()) == (state(staged), 3, cursor(3))


def test_the_difference_of_any_two_snapshots_is_exact(engine: RocksDbEngine, path: Path) -> None:
    """`foldlog.diff` took snapshots of logs only, and failed on others with an AttributeError."""
    first = commit(engine, [Put("a", b"1"), Put("b", b"1"), Put("p/x", b"1")])
    second = commit(engine, [Put("b", b"2"), Delete("a")], 2)
    assert list(foldlog.diff(first, second)) == [Delete("a"), Put("b", b"2")]
    assert list(foldlog.diff(second, first)) == [Put("a", b"1"), Put("b", b"1")]
    assert list(foldlog.diff(second, second)) == []
    with AppendLogSnapshot.open(path.with_name("log"))[1] as log:
        log.apply([Put("b", b"2"), Put("p/y", b"3")], cursor(1))
        state = log.snapshot()
        assert list(foldlog.diff(second, state)) == [Delete("p/x"), Put("p/y", b"3")]
        assert list(foldlog.diff(state, second, "p/")) == [Put("p/x", b"1"), Delete("p/y")]
        assert list(foldlog.diff(state, second, "q")) == []
    for wrong in (None, {}, engine):
        with pytest.raises(TypeError, match="two snapshots"):
            foldlog.diff(second, wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="prefix"):
        foldlog.diff(second, second, b"p")  # type: ignore[arg-type]
    engine.close()
    with pytest.raises(StoreClosed):
        list(foldlog.diff(first, second))


@pytest.mark.parametrize("known", [True, False], ids=["by the trail", "by reading both"])
def test_a_difference_leads_from_any_state_to_any_other(
    engine: RocksDbEngine, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    if not known:
        monkeypatch.setattr(difference, "_written_between", lambda old, new: None)
    chance = random.Random(5)
    folds = [engine.snapshot]
    for number in range(12):
        updates: list[Any] = [Put(f"k{chance.randrange(9)}", b"%d" % number) for _ in range(3)]
        folds.append(commit(engine, [*updates, Delete(f"k{chance.randrange(9)}")]))
    for old in folds:
        for new in folds:
            changes = list(engine.difference(old, new))
            assert [change.key for change in changes] == sorted({change.key for change in changes})
            found = state(old)
            for change in changes:
                if isinstance(change, Put):
                    assert found.get(change.key) != change.value
                    found[change.key] = change.value
                else:
                    del found[change.key]
            assert found == state(new)
            under = list(engine.difference(old, new, "k3"))
            assert under == [change for change in changes if change.key == "k3"]


def test_what_is_staged_on_top_of_a_stage_holds_both(engine: RocksDbEngine) -> None:
    commit(engine, [Put("a", b"0")], 1)
    first = engine.stage([encode_batch([Put("b", b"1")], cursor(2))])
    second = engine.stage([encode_batch([Put("c", b"2")], cursor(3))], first)
    assert (list(second), second.seq, second.cursor()) == (["a", "b", "c"], 3, cursor(3))
    assert second.get("b") is not None
    assert list(engine.snapshot) == ["a"]


def batches_since(
    engine: RocksDbEngine, start: WatchCursor
) -> Iterator[tuple[int, DecodedBatch]] | None:
    return engine.batches_since(engine.snapshot, start)


def test_batches_since_a_cursor_are_those_that_this_process_wrote(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = RocksDbEngine(path, cache_bytes=CACHE)
    for number in range(1, 6):
        commit(engine, [Put("a", b"%d" % number), Delete("b"), Purge("c")], number)
    past = list(batches_since(engine, cursor(3)) or ())
    assert [(seq, batch.cursor) for seq, batch in past] == [(4, cursor(4)), (5, cursor(5))]
    assert past[0][1].updates() == [Put("a", b"4"), Delete("b"), Purge("c")]
    assert [seq for seq, _ in batches_since(engine, WatchCursor.none()) or ()] == [1, 2, 3, 4, 5]
    assert list(batches_since(engine, cursor(5)) or ()) == []
    assert batches_since(engine, cursor(9)) is None
    monkeypatch.setattr(past_module, "BACKLOG_BYTES", 60)
    commit(engine, [Put("a", b"6")], 6)
    assert batches_since(engine, cursor(1)) is None
    assert [seq for seq, _ in batches_since(engine, cursor(5)) or ()] == [6]
    engine.close()
    engine = RocksDbEngine(path, cache_bytes=CACHE)
    assert list(batches_since(engine, cursor(6)) or ()) == []
    assert batches_since(engine, cursor(5)) is None
    engine.close()


def test_a_past_with_a_gap_is_not_told(engine: RocksDbEngine) -> None:
    """An exception between a commit and the note of its batch left a gap: a watch that resumed
    from before it missed that batch."""
    commit(engine, [Put("a", b"1")], 1)
    engine._commit([], 1, cursor(2))  # published, and never noted
    assert batches_since(engine, cursor(1)) is None
    commit(engine, [Put("a", b"3")], 3)
    assert batches_since(engine, cursor(1)) is None
    assert [seq for seq, _ in batches_since(engine, cursor(2)) or ()] == [3]


def test_a_past_that_is_trimmed_while_it_is_read_is_told_whole_or_not_at_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The start was read before the batches, and one was dropped in between: it was missing."""
    past = past_module.Past(0, cursor(100))
    for number in (1, 2):
        past.add(number - 1, cursor(number - 1), [encode_batch([Put("a", b"x")], cursor(number))])
    copied = past_module._copied

    def trimmed(batches: Any) -> Any:
        batches.popleft()
        return copied(batches)

    monkeypatch.setattr(past_module, "_copied", trimmed)
    assert past.since(cursor(100), 2) is None


# Writing.


def test_the_origin_of_the_cursor_is_written_with_it(path: Path) -> None:
    engine = RocksDbEngine(path, cache_bytes=CACHE)
    assert engine.snapshot.origin == b""
    engine.commit([encode_batch([Put("a", b"1")], cursor(1), b"nats:routes")])
    engine.commit([encode_batch([Put("a", b"2")], cursor(2))])
    engine.close()
    engine = RocksDbEngine(path, cache_bytes=CACHE)
    assert (engine.snapshot.origin, engine.snapshot.seq) == (b"nats:routes", 2)
    engine.close()


def test_a_sync_moves_the_synced_position(path: Path) -> None:
    engine = RocksDbEngine(path, cache_bytes=CACHE)
    commit(engine, [Put("a", b"1")])
    assert engine.synced == (0, WatchCursor.none())
    engine.sync()
    assert engine.synced == (1, cursor(1))
    engine.close()
    engine = RocksDbEngine(path, cache_bytes=CACHE, sync_each=True)
    assert engine.synced == (1, cursor(1))
    commit(engine, [Put("a", b"2")])
    assert engine.synced == (2, cursor(2))
    engine.close()


class Interposed:
    """A database of which single calls are replaced."""

    def __init__(self, db: Any, **calls: Any) -> None:
        self._db = db
        self.__dict__.update(calls)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._db, name)


def fail_a_sync(engine: RocksDbEngine) -> None:
    def flush_wal(sync: bool) -> None:
        raise Exception("IO error: While fsync: 000004.log: Input/output error")

    engine._source.db = Interposed(engine._source.db, flush_wal=flush_wal)
    with pytest.raises(OSError, match="While fsync") as caught:
        engine.sync()
    assert caught.value.errno == 5


@pytest.mark.parametrize("written", [True, False])
def test_a_commit_that_an_exception_cut_short_is_settled_by_what_the_database_holds(
    engine: RocksDbEngine, written: bool
) -> None:
    """A KeyboardInterrupt can come between the write and the publishing of what was written."""
    commit(engine, [Put("a", b"1")])
    db = engine._source.db

    def write(*args: object) -> None:
        if written:
            db.write(*args)  # type: ignore[union-attr]
        raise KeyboardInterrupt

    engine._source.db = Interposed(db, write=write)
    with pytest.raises(KeyboardInterrupt):
        commit(engine, [Put("a", b"2"), Put("b", b"2")], 2)
    engine._source.db = db
    assert state(engine.snapshot) == {"a": b"1"}
    fold = commit(engine, [Put("c", b"3")], 3)
    settled = {"a": b"2", "b": b"2"} if written else {"a": b"1"}
    assert state(fold) == {**settled, "c": b"3"}
    assert fold.seq == (3 if written else 2)


@pytest.mark.parametrize("sync_each", [True, False])
def test_what_a_writer_that_died_had_written_is_on_disk_before_it_is_answered(
    path: Path, monkeypatch: pytest.MonkeyPatch, sync_each: bool
) -> None:
    """A writer died between the write and its sync. Its successor told the caller that the batch
    was synced, which it was not."""
    engine = RocksDbEngine(path, cache_bytes=CACHE, sync_each=sync_each)
    sync = writes.Writes.sync

    def die(self: writes.Writes) -> None:
        raise KeyboardInterrupt

    if not sync_each:
        commit(engine, [Put("a", b"1")], 1)
    with monkeypatch.context() as patch:
        patch.setattr(writes.Writes, "sync", die)
        with pytest.raises(KeyboardInterrupt):
            commit(engine, [Put("a", b"1")], 1) if sync_each else engine.sync()
    synced: list[int] = []

    def counted(self: writes.Writes) -> None:
        sync(self)
        synced.append(engine._db.get(b"a") is not None)

    monkeypatch.setattr(writes.Writes, "sync", counted)
    assert engine.resume().seq == 1
    assert synced
    assert engine.synced == (1, cursor(1))
    engine.close()


@pytest.mark.parametrize("error", [MemoryError, TimeoutError, LookupError])
def test_an_exception_that_only_struck_the_thread_is_passed_on_and_the_store_goes_on(
    engine: RocksDbEngine, path: Path, error: type[Exception]
) -> None:
    """Want of memory was called damage, and the exception of a handler an error of RocksDB."""
    fold = commit(engine, [Put("a", b"1")])
    db, view = engine._source.db, fold.view

    class Struck:
        def __getitem__(self, key: bytes) -> bytes:
            raise error

    def strike(*args: object) -> None:
        raise error

    calls = dict.fromkeys(("write", "get", "flush_wal", "items", "flush", "live_files"), strike)
    engine._source.db, fold.view = Interposed(db, **calls), Struck()
    for use in (
        lambda: commit(engine, [Put("a", b"2")], 2),
        lambda: fold.get("a"),
        lambda: fold.range(),
        engine.sync,
        engine.resume,
        engine.verify,
        lambda: engine.begin_export(None)(path.with_name("artifact")),
    ):
        with pytest.raises(error):
            use()
    engine._source.db, fold.view = db, view
    assert engine.failure is None
    assert commit(engine, [Put("a", b"2")], 2).seq == 2
    assert engine.verify().ok


def test_folds_that_nobody_holds_are_not_kept_and_the_others_are() -> None:
    held = HeldFolds()
    folds = [snapshot.RocksDbFold(None, None, None, seq, cursor(seq)) for seq in range(100)]  # type: ignore[arg-type]
    for fold in folds:
        held.add(fold)
    assert held.all() == folds
    del folds[10:], fold
    for seq in range(1000):
        held.add(snapshot.RocksDbFold(None, None, None, seq, cursor(seq)))  # type: ignore[arg-type]
    assert held.all() == folds
    assert len(held._folds) < 50
    held.keep(folds[1:3])
    assert held.all() == folds[1:3]
    held.keep([])
    assert held.all() == []


def stalling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let RocksDB want its writers to wait, again and again, until a flush is through."""
    options_of = opening._options

    def options(*args: Any) -> Any:
        options = options_of(*args)
        options.set_write_buffer_size(65536)
        options.set_max_write_buffer_number(2)
        options.set_level_zero_slowdown_writes_trigger(2)
        options.set_level_zero_stop_writes_trigger(3)
        return options

    monkeypatch.setattr(opening, "_options", options)


def test_a_write_that_would_stall_waits_without_the_interpreter_lock_and_is_written_once(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The binding keeps the interpreter lock while RocksDB makes a writer wait.

    So such a write is refused, and tried again; with the batch of the first attempt, which the
    binding had used up, it failed for good.
    """
    stalling(monkeypatch)
    engine = RocksDbEngine(path, cache_bytes=CACHE)
    db, attempts = engine._source.db, 0

    def write(*args: object) -> None:
        nonlocal attempts
        attempts += 1
        db.write(*args)  # type: ignore[union-attr]

    engine._source.db = Interposed(db, write=write)
    for number in range(120):
        commit(engine, [Put(f"k{number:03}", bytes(20_000)), Put("n", b"%d" % number)])
    assert attempts > 120
    assert (len(engine.snapshot), engine.snapshot.get("n").value) == (121, b"119")
    engine._source.db = db
    engine.close()


def test_a_write_that_stalls_for_too_long_is_refused_and_nothing_of_it_is_written(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stalling(monkeypatch)
    monkeypatch.setattr(writes, "STALL_LIMIT_S", -1)
    engine = RocksDbEngine(path, cache_bytes=CACHE)

    def fill() -> None:
        for number in range(10_000):
            commit(engine, [Put("n", b"%d" % number), Put("v", bytes(20_000))])

    with pytest.raises(FoldlogError, match="Write stall"):
        fill()
    expected = engine.snapshot.seq
    assert expected > 0
    assert engine.failure is None
    engine.close()
    monkeypatch.undo()
    engine = RocksDbEngine(path, cache_bytes=CACHE)
    assert engine.snapshot.seq == expected
    assert engine.snapshot.get("n").value == b"%d" % (expected - 1)
    engine.close()


@pytest.mark.parametrize("kind", ["export", "range"])
def test_an_error_that_a_caller_keeps_does_not_keep_the_database_open(
    engine: RocksDbEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """An export failed for lack of descriptors, and its error was still in memory.

    A frame of its traceback held the database, so that the writer could not heal for 10 s, and then
    gave up: StoreLocked, by its own process.
    """
    commit(engine, [Put("a", b"1")])

    def fails(db: Any, *_: Any) -> Any:
        raise Exception("IO error: While open a file: /db/000009.sst: Too many open files")

    with monkeypatch.context() as patch:
        if kind == "export":
            patch.setattr(engine, "_rocksdict", SimpleNamespace(Checkpoint=fails))
        else:
            patch.setattr(snapshot, "scan", fails)
        export, read = engine.begin_export(None), engine.snapshot.range
        with pytest.raises(OSError, match="Too many open files") as kept:
            export(tmp_path / "artifact") if kind == "export" else read("")
    monkeypatch.setattr(commits, "LINGER_S", 0.0)
    gc.disable()
    try:
        engine.heal()
    finally:
        gc.enable()
    assert state(engine.snapshot) == {"a": b"1"}
    assert kept.value.errno == errno.EMFILE


def test_a_failed_sync_is_final_until_the_database_is_opened_anew(engine: RocksDbEngine) -> None:
    commit(engine, [Put("a", b"1")])
    fail_a_sync(engine)
    assert engine.failure
    with pytest.raises(LogPoisonedError, match="While fsync"):
        commit(engine, [Put("a", b"2")])
    assert state(engine.snapshot) == {"a": b"1"}
    fold = engine.heal()
    assert (engine.failure, state(fold), engine.synced) == (None, {"a": b"1"}, (1, cursor(1)))
    commit(engine, [Put("a", b"2")])


@pytest.mark.parametrize("reopens", [True, False])
def test_reads_continue_while_the_database_is_healed(
    path: Path, monkeypatch: pytest.MonkeyPatch, reopens: bool
) -> None:
    """Every read raised FoldlogError from the failed sync's `heal` until the database was open.

    And if it could not be opened, on a full disk, every get and the statistics raised StoreClosed.
    """
    engine = RocksDbEngine(path, cache_bytes=CACHE)
    older = commit(engine, [Put("a", b"1")])
    newest = commit(engine, [Put("b", b"2")], 2)
    fail_a_sync(engine)
    expected = {"a": b"1", "b": b"2"}
    open_source = RocksDbEngine._open_source
    seen: list[object] = []

    def reading_meanwhile(opening: RocksDbEngine) -> None:
        folds = (newest, opening.snapshot)
        seen.extend((state(fold), fold.get("b"), len(fold)) for fold in folds)
        open_source(opening)

    def no_space(*args: Any, **options: Any) -> Any:
        raise OSError(28, "no space left")

    def refuse(path: Path) -> Any:
        raise OSError(24, "too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(RocksDbEngine, "_open_source", reading_meanwhile)
        if reopens:
            engine.heal()
        else:
            patch.setattr(commits, "open_database", no_space)
            for _ in range(3):  # the last time, it is read through what the one before opened
                with pytest.raises(OSError, match="no space"):
                    engine.heal()
                if len(seen) == 4:
                    patch.setattr(engine_module, "stored_fold", refuse)
    assert len(seen) == (2 if reopens else 6)
    assert seen == [(expected, KvEntry("b", b"2", VersionToken.unknown()), 2)] * len(seen)
    assert (state(newest), newest.get("b").value) == (expected, b"2")
    with pytest.raises(FoldlogError, match="opened anew"):
        older.get("a")
    assert engine.sizes().log_bytes
    assert bool(engine.cache().limit_bytes) == reopens
    if reopens:
        commit(engine, [Put("b", b"3"), Put("c", b"3")], 3)
        assert state(newest) == expected, "it is still the state that it was"
        assert engine.held().snapshots == 1
    engine.close()
    with pytest.raises(StoreClosed):
        newest.get("a")
    RocksDbEngine(path, cache_bytes=CACHE).close()  # nothing of it is open any more


@pytest.mark.parametrize("how", ["heal", "abandon", "close"])
def test_a_database_is_opened_again_once_a_read_from_before_has_ended(
    path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """RocksDB is locked while a thread is in the middle of a read. A store with busy readers failed
    for good when it should have healed: it was locked by itself."""
    engine = RocksDbEngine(path, cache_bytes=CACHE)
    commit(engine, [Put("a", b"1")])
    in_hand: list[object] = [engine.snapshot.view]  # as a thread has it in the middle of a get
    refused: list[StoreLocked] = []

    def open_database(*args: Any, **options: Any) -> Any:
        try:
            return opening.open_database(*args, **options)
        except StoreLocked as error:
            refused.append(error)
            in_hand.clear()
            raise

    monkeypatch.setattr(commits, "open_database", open_database)
    if how == "heal":
        fail_a_sync(engine)
        engine.heal()
        again = engine
    else:
        engine.abandon() if how == "abandon" else engine.close()
        again = RocksDbEngine(path, cache_bytes=CACHE)
    assert len(refused) == 1
    assert state(again.snapshot) == {"a": b"1"}
    again.close()


def test_a_read_that_never_ends_does_not_let_an_opening_wait_for_ever(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commits, "LINGER_S", 0.0)
    engine = RocksDbEngine(path, cache_bytes=CACHE)
    view = engine.snapshot.view
    engine.close()
    with pytest.raises(StoreLocked):
        RocksDbEngine(path, cache_bytes=CACHE)
    del view
    RocksDbEngine(path, cache_bytes=CACHE).close()


FILE_LIMIT = """
import resource, sys
from pathlib import Path
from foldlog import FoldlogError, LogPoisonedError, Put, RocksDbSnapshot, WatchCursor

path = Path(sys.argv[1])
_, snap = RocksDbSnapshot.open(path, cache_bytes=2**23)
snap.apply([Put("a", b"1")], WatchCursor.from_u64(1))
size = max(file.stat().st_size for file in path.glob("*.log"))
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 500, hard))
for expected in (OSError, LogPoisonedError):
    try:
        snap.apply([Put("a", bytes(5000))], WatchCursor.from_u64(2))
    except expected as error:
        print(type(error).__name__, "File too large" in str(error), snap.get("a").value, len(snap))
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
snap.heal()
print(snap.get("a").value, snap.cursor(), snap.apply([Put("b", b"2")], WatchCursor.from_u64(2)))
print(snap.verify().ok, [entry.key for entry in snap.range("")])
snap.close()
"""


def output_of(script: str, path: Path) -> str:
    """What a process prints that runs `script` on `path`; it must end well."""
    done = subprocess.run(
        # From 3.12 on, Python warns of every fork of a process with threads.
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", script, str(path)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert (done.stderr, done.returncode) == ("", 0)
    return done.stdout


def test_a_disk_that_takes_no_more_loses_nothing_and_heals(path: Path) -> None:
    assert output_of(FILE_LIMIT, path).splitlines() == [
        "OSError True b'1' 1",
        "LogPoisonedError True b'1' 1",
        "b'1' WatchCursor.from_u64(1) 2",
        "True ['a', 'b']",
    ]


@pytest.mark.parametrize("what", ["removed", "replaced"])
def test_a_directory_that_somebody_took_away_is_noticed_before_the_next_write(
    path: Path, what: str
) -> None:
    engine = RocksDbEngine(path, cache_bytes=CACHE)
    commit(engine, [Put("a", b"1")])
    path.rename(path.with_name("moved"))
    if what == "replaced":
        path.mkdir()
    with pytest.raises(LogChangedError):
        commit(engine, [Put("a", b"2")])
    assert state(engine.snapshot) == {"a": b"1"}
    engine.abandon()
    path.with_name("moved").rename(path.with_name("again"))
    engine = RocksDbEngine(path.with_name("again"), cache_bytes=CACHE)
    assert state(engine.snapshot) == {"a": b"1"}
    engine.close()


def test_an_abandoned_store_loses_nothing(path: Path) -> None:
    engine = RocksDbEngine(path, cache_bytes=CACHE)
    fold = commit(engine, [Put("a", b"1")])
    engine.abandon()
    with pytest.raises(StoreClosed):
        fold.get("a")
    with pytest.raises(StoreClosed):
        commit(engine, [Put("a", b"2")], 2)
    engine.close()
    engine = RocksDbEngine(path, cache_bytes=CACHE)
    assert (state(engine.snapshot), engine.snapshot.cursor()) == ({"a": b"1"}, cursor(1))
    engine.close()


FORKED = """
import os, signal, sys
from foldlog import ForkedStore, Put, RocksDbSnapshot, WatchCursor

_, snap = RocksDbSnapshot.open(sys.argv[1], cache_bytes=2**23)
snap.apply([Put("a", b"1")], WatchCursor.from_u64(1))
fold = snap.snapshot()
snap.apply([Put("a", b"2")], WatchCursor.from_u64(2))
pid = os.fork()
if pid == 0:
    signal.alarm(20)
    refused = 0
    for use in (
        lambda: snap.apply([], WatchCursor.none()), lambda: snap.get("a"), lambda: fold.range("")
    ):
        try:
            use()
        except ForkedStore:
            refused += 1
    snap.close()
    sys.exit(refused)  # not _exit: what the interpreter frees at its end is what hung
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), fold.get("a").value, snap.get("a").value)
snap.close()
"""


def test_a_forked_child_refuses_and_ends(path: Path) -> None:
    """RocksDB's threads are not in the child, and freeing the database waited for them: the child
    never ended.
    """
    assert output_of(FORKED, path) == "3 b'1' b'2'\n"
    assert ForkedStore("x").args == ("x",)


def test_the_sizes_of_a_store_are_told(engine: RocksDbEngine) -> None:
    commit(engine, [Put(f"k{n}", bytes(1000)) for n in range(100)])
    before = engine.sizes()
    assert before.base_bytes == 0
    assert before.appended_bytes > 100_000
    assert before.log_bytes > 100_000
    engine._db.flush()
    assert engine.sizes().base_bytes > 0


def test_a_store_that_is_open_here_is_locked(path: Path) -> None:
    engine = RocksDbEngine(path, cache_bytes=CACHE)
    with pytest.raises(StoreLocked) as caught:
        RocksDbEngine(path, cache_bytes=CACHE)
    assert caught.value.pid == os.getpid()
    commit(engine, [Put("a", b"1")])
    engine.close()
    RocksDbEngine(path, cache_bytes=CACHE).close()


@pytest.mark.parametrize("block_entries", [1, 3, 1024])
def test_a_range_with_bounds_is_that_part_of_the_whole_in_either_direction(
    engine: RocksDbEngine, monkeypatch: pytest.MonkeyPatch, block_entries: int
) -> None:
    monkeypatch.setattr(snapshot, "BLOCK_ENTRIES", block_entries)
    commit(engine, [Put(f"k{n:02}", b"old") for n in range(0, 40, 2)])
    fold = engine.snapshot
    commit(engine, [Put(f"k{n:02}", b"new") for n in range(40)])
    commit(engine, [Delete(f"k{n:02}") for n in range(0, 40, 6)])
    for held in (fold, engine.snapshot):
        whole = held.range("")
        for prefix in ("", "k", "k1", "x"):
            for start, stop in ((None, None), ("k05", None), (None, "k30"), ("k10", "k10")):
                expected = [
                    entry
                    for entry in whole
                    if entry.key.startswith(prefix)
                    and (start is None or start <= entry.key)
                    and (stop is None or entry.key < stop)
                ]
                bounds = {"start": start, "stop": stop}
                assert held.range(prefix, **bounds) == expected
                assert held.range(prefix, **bounds, reverse=True) == expected[::-1]
                assert held.range(prefix, **bounds, limit=3) == expected[:3]
                backwards = held.range(prefix, **bounds, limit=3, reverse=True)
                assert backwards == expected[::-1][:3]
    assert fold.get("k01", "none") == "none"
    assert list(fold.get_many(["k04", "k01", "k02"])) == ["k04", "k02"]


@pytest.mark.parametrize("how", ["heal", "restart"])
def test_a_database_whose_directory_went_meanwhile_is_not_created_anew(
    path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Unmounted or moved while a store was about to open it again, it was replaced by an empty
    one, which then stood in the way of whoever put it back."""
    engine = RocksDbEngine(path, cache_bytes=CACHE)
    commit(engine, [Put("a", b"1")])
    away = path.with_name("away")

    def go_and_open(*args: Any, **options: Any) -> Any:
        path.rename(away)
        return opening.open_database(*args, **options)

    monkeypatch.setattr(commits, "open_database", go_and_open)
    seat = RocksDbSeat(EngineOptions(path, None, "refuse", False, CACHE, OS_FILES))
    fail_a_sync(engine) if how == "heal" else engine.abandon()
    with pytest.raises(LogChangedError, match="unmounted"):
        engine.heal() if how == "heal" else seat.open(engine)
    assert not path.exists()
    monkeypatch.undo()
    engine.abandon()
    away.rename(path)
    again = RocksDbEngine(path, cache_bytes=CACHE)
    assert state(again.snapshot) == {"a": b"1"}
    again.close()


@pytest.mark.parametrize("work", ["export", "compact", "pass", "sync", "heal", "close"])
def test_nothing_is_written_to_a_database_that_took_the_name(
    path: Path, tmp_path: Path, work: str
) -> None:
    """An export flushes first. The store's directory had been replaced, and the flush wrote its
    table over one of the database that was there now, whose entries were lost."""
    with RocksDbSnapshot.open(tmp_path / "theirs")[1] as theirs:
        theirs.apply([Put("theirs", b"1" * 100)], cursor(1))
    engine = RocksDbEngine(path, cache_bytes=CACHE)
    commit(engine, [Put("ours", b"2" * 5000)])
    begun = engine.begin_compaction()
    path.rename(path.with_name("away"))
    shutil.copytree(tmp_path / "theirs", path)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    jobs = {
        "export": lambda: engine.begin_export(None)(tmp_path / "artifact"),
        "compact": engine.compact,
        "pass": begun.run,
        "sync": engine.sync,
        "heal": engine.heal,
        "close": engine.close,
    }
    with contextlib.suppress(LogChangedError):
        jobs[work]()
    engine.abandon()
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert not (tmp_path / "artifact").exists()
