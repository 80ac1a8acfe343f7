"""The store over each engine of the table: its actors' promises do not depend on the engine."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from actor_kit import until
from engine_kit import backend as backend

import foldlog
from foldlog import (
    CursorExpired,
    Delete,
    FoldlogError,
    InvalidFormatError,
    Put,
    RocksDbSnapshot,
    State,
    Store,
    StoreClosed,
    Synced,
    WatchCursor,
)

pytest.importorskip("rocksdict")
u64 = WatchCursor.from_u64
Open = Callable[..., Store]


@pytest.fixture
def open_store(backend: str, open_store: Open) -> Open:
    return partial(open_store, backend=backend)


def put(number: int) -> list[Put]:
    return [Put(f"key {number:03}", b"%d" % number)]


def test_a_watch_tells_the_state_then_changes_and_resumes_from_cursor_and_snapshot(
    open_store: Open,
) -> None:
    store = open_store()
    store.apply([*put(1), *put(2)], u64(1))
    held = store.snapshot()
    watch = store.watch()
    assert [next(watch).update.key for _ in range(2)] == ["key 001", "key 002"]
    assert next(watch) == Synced(u64(1), 1)
    store.apply([Delete("key 001")], u64(2))
    assert next(watch).update == Delete("key 001")
    for since in (u64(1), held):
        resumed = store.watch(since=since)
        assert next(resumed).update.key == "key 001"
        assert next(resumed) == Synced(u64(2), 2)
    with pytest.raises(CursorExpired):
        store.watch(since=u64(77))


def test_statistics_tell_of_snapshots_that_keep_something_on_disk(open_store: Open) -> None:
    store = open_store()
    store.apply(put(1), u64(1))
    store.compact()
    held = store.snapshot()
    store.apply(put(2), u64(2))
    store.compact()
    store.apply(put(3), u64(3))
    stats = store.stats()
    assert stats.held_snapshots >= 1
    assert stats.oldest_held_s > 0
    assert held.get("key 001") is not None
    del held
    until(lambda: store.stats().held_snapshots == 0, "nothing is held")


def test_what_is_closed_says_so(open_store: Open, backend: str) -> None:
    store = open_store()
    store.apply(put(1), u64(1))
    held = store.snapshot()
    store.close()
    assert store.state is State.CLOSED
    with pytest.raises(StoreClosed):
        store.get("key 001")
    if backend == "rocksdb":
        with pytest.raises(StoreClosed):
            held.get("key 001")
    else:
        assert held.get("key 001") is not None


def test_a_store_whose_files_another_put_in_their_place_fails_and_reads_go_on(
    open_store: Open, path: Path, tmp_path: Path
) -> None:
    store = open_store()
    store.apply(put(1), u64(1))
    os.rename(path, tmp_path / "moved")
    path.mkdir()
    with pytest.raises(FoldlogError):
        store.apply(put(2), u64(2), 5)
    until(lambda: store.state is State.FAILED, "the store has failed")
    assert store.get("key 001") is not None


def test_a_store_whose_files_are_gone_still_tells_its_statistics_and_health(
    open_store: Open, backend: str, path: Path, tmp_path: Path
) -> None:
    """`stats()` and whatever scrapes it raised FileNotFoundError on RocksDB, just when the store
    had failed."""
    store = open_store()
    store.apply(put(1), u64(1))
    os.rename(path, tmp_path / "moved")
    assert store.stats().entries == 1
    if backend == "rocksdb":  # the other writes its log anew
        with pytest.raises(FoldlogError):
            store.apply(put(2), u64(2), 60)
        until(lambda: store.state is State.FAILED, "the store has failed")
    assert store.health().reasons or backend != "rocksdb"
    assert store.stats().entries == 1


def test_a_rocksdb_store_is_not_followed_and_takes_no_format(path: Path) -> None:
    with RocksDbSnapshot.open(path)[1]:
        pass
    with pytest.raises(InvalidFormatError, match="RocksDB"):
        foldlog.follow(path)
    with pytest.raises(ValueError, match="format"):
        foldlog.open(path, backend="rocksdb", format="foldlog")
    with pytest.raises(ValueError, match="backend"):
        foldlog.open(path, backend="lmdb")  # type: ignore[arg-type]
    with foldlog.open(path, backend="rocksdb") as store, pytest.raises(ValueError, match="log"):
        store.export_to(path.with_name("artifact"), format="slipstream-v2")


def test_a_rocksdb_store_heals_after_an_error_of_the_disk(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RocksDB refuses writes after any error: the database is reopened, the batch written."""
    from foldlog.storage.engines.rocksdb.engine import RocksDbEngine

    with foldlog.open(path, backend="rocksdb", sync="always") as store:
        store.apply(put(1), u64(1))
        flush, failures = RocksDbEngine._flush_wal, [Exception("IO error: While fsync: injected")]

        def failing(engine: RocksDbEngine) -> None:
            if failures:
                raise engine._failed(failures.pop())
            flush(engine)

        monkeypatch.setattr(RocksDbEngine, "_flush_wal", failing)
        assert store.apply(put(2), u64(2)) == 2
        assert [entry.key for entry in store.range()] == ["key 001", "key 002"]
        assert store.stats().synced_seq == 2
    with foldlog.open(path, backend="rocksdb") as again:
        assert (again.cursor(), len(again)) == (u64(2), 2)
