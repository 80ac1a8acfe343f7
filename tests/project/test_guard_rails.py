"""Guard rails for speed: what an operation reads, decodes, copies, writes, syncs and sends.

These are counted, never timed. Most tests run over two stores, one ten times as large as the
other: the cost of an operation must not reveal which one it ran on.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeAlias

import msgpack
import pytest
from actor_kit import DEADLINE_S, Steps, cursor, in_thread, results
from counting import (
    CountedFiles,
    CountedRun,
    LeafCounter,
    SentMail,
    Work,
    calls_of,
    functions_of,
    usual,
    work_of,
)

import foldlog
from foldlog import AppendLogSnapshot, Changed, Delete, Put, Synced, Update, VersionToken
from foldlog.actors.base.adapter import Mail
from foldlog.actors.feeds import ring
from foldlog.actors.following.follower import FollowerThread, busy_pause_s
from foldlog.actors.store.requests import WriteRequest
from foldlog.actors.store.syncer import Syncer
from foldlog.protocol.frames import FRAME_OVERHEAD
from foldlog.protocol.options import CACHE_BYTES
from foldlog.protocol.updates import SLICE, batches_body, encode_batch
from foldlog.storage.engines.append_log.engine import LogEngine as Engine
from foldlog.storage.fold import base, delta, leaf
from foldlog.storage.fold.base import EMPTY_BASE
from foldlog.storage.fold.delta import EMPTY_DELTA
from foldlog.storage.fold.leaf import MAX_ENTRIES, MIN_ENTRIES
from foldlog.storage.fold.snapshot import FoldSnapshot
from foldlog.storage.formats import registry
from foldlog.storage.formats.foldlog import replay
from foldlog.storage.formats.foldlog.replay import read_header
from foldlog.storage.formats.format import BUFFER_BYTES
from foldlog.storage.log import backlog
from foldlog.storage.log.files import OS_FILES, Files, ReadHandle
from foldlog.storage.log.scan import Chain, read_frames
from foldlog.storage.log.sidecars.note import LOCK_BYTES, SLOT_BYTES
from foldlog.storage.log.tail import WINDOW_BYTES, Advance, Jump, Tail
from foldlog.testing import UnsyncedFiles

FEW, MANY = 2_000, 20_000
"""Entries of the two stores."""
VALUE_BYTES = 100
LEAF_BYTES = MAX_ENTRIES * (VALUE_BYTES + 26)
"""No leaf takes more: a key of 7 bytes, a version of 8, and 11 to tell where they are."""
INDEX_BYTES = MAX_ENTRIES * 26
"""No index of a leaf takes more."""
NOTE_BYTES = SLOT_BYTES
"""What is written beside the log: who has the lock, and what is synced."""

both = pytest.mark.parametrize("entries", [FEW, MANY])
CopyOf: TypeAlias = Callable[..., Path]
OpenLog: TypeAlias = Callable[..., AppendLogSnapshot]
OpenStore: TypeAlias = Callable[..., foldlog.Store]


def key(number: int) -> str:
    return f"k{number:06}"


def puts(numbers: Iterable[int], size: int = VALUE_BYTES) -> list[Update]:
    return [
        Put(key(number), bytes((number % 251,)) * size, VersionToken.from_u64(number))
        for number in numbers
    ]


def with_batch(fold: FoldSnapshot, updates: list[Update]) -> FoldSnapshot:
    return fold.with_batch(encode_batch(updates, cursor(1)).changes, fold.seq + 1, cursor(1))


def uncompacted(changes: int) -> FoldSnapshot:
    """A fold of so many changes, settled, over an empty base."""
    collected = delta.Collected()
    for start in range(0, changes, SLICE):
        collected.add(
            {
                key(number): (key(number), b"", b"")
                for number in range(start, min(start + SLICE, changes))
            }
        )
    return FoldSnapshot(EMPTY_BASE, *collected.settled(), 1, cursor(1))


def calls_for(writes: int, sync: str) -> dict[str, int]:
    """Of so many commit groups: the frames and, if each is synced, the notes that say so."""
    if sync == "always":
        return {"stat": writes, "write": 2 * writes, "sync": writes}
    return {"stat": writes, "write": writes}


def assert_alike(work_over: Callable[[int], Work]) -> Work:
    """It takes the same work over either store, which is returned."""
    few, many = map(work_over, (FEW, MANY))
    assert few.is_like(many), (few, many)
    return few


BATCHES: list[list[Update]] = [
    puts([5]),
    puts(range(0, FEW, 9)),
    [Delete(key(9))],
    [Put("new", b"")],
    [],
]


@pytest.fixture
def files() -> CountedFiles:
    return CountedFiles()


@pytest.fixture
def leaves(monkeypatch: pytest.MonkeyPatch) -> LeafCounter:
    return LeafCounter(monkeypatch)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> SentMail:
    return SentMail(monkeypatch)


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Sealed logs with all entries in the base: FEW.log and MANY.log, and finely cut copies.

    In a finely cut log MANY entries make 4,000 leaves, as many as 1,000,000 make otherwise.
    """
    folder = tmp_path_factory.mktemp("logs")
    for name, entries in itertools.product(("log", "fine"), (FEW, MANY)):
        with pytest.MonkeyPatch.context() as patch:
            if name == "fine":
                patch.setattr(leaf, "MIN_ENTRIES", 2)
                patch.setattr(leaf, "MAX_ENTRIES", 8)
                patch.setattr(leaf, "_BOUNDARY_MASK", 3)
            with AppendLogSnapshot.open(folder / f"{entries}.{name}", files=UnsyncedFiles())[
                1
            ] as snap:
                snap.apply(puts(range(entries)), cursor(1))
                snap.compact()
    return {file.name: file for file in folder.iterdir()}


@pytest.fixture
def copy_of(logs: dict[str, Path], path: Path) -> CopyOf:
    """Such a log, to be changed."""
    return lambda entries, fine=False: Path(
        shutil.copy(logs[f"{entries}.{'fine' if fine else 'log'}"], path.parent)
    )


@pytest.fixture
def open_log(copy_of: CopyOf, files: CountedFiles) -> Iterator[OpenLog]:
    """Opens such a log, and counts from there on."""
    opened: list[AppendLogSnapshot] = []

    def open_log(entries: int, fine: bool = False) -> AppendLogSnapshot:
        opened.append(AppendLogSnapshot.open(copy_of(entries, fine), files=files)[1])
        files.forget()
        return opened[-1]

    yield open_log
    for snap in opened:
        snap.close()


@pytest.fixture
def opened(
    open_store: Callable[..., foldlog.Store],
    copy_of: CopyOf,
    files: CountedFiles,
    monkeypatch: pytest.MonkeyPatch,
) -> OpenStore:
    """Open a store, begin its session, count from there. Its syncer does nothing meanwhile."""
    monkeypatch.setattr(Syncer, "_look", lambda syncer: None)

    def opened(sync: str, entries: int = MANY, fine: bool = False) -> foldlog.Store:
        store = open_store(
            path=copy_of(entries, fine), sync=sync, sync_interval_s=3600.0, files=files
        )
        store.apply([], cursor(2))
        files.forget()
        return store

    return opened


# Opening.


@both
def test_opening_reads_the_file_once_and_decodes_no_leaf(
    copy_of: CopyOf, files: CountedFiles, leaves: LeafCounter, entries: int
) -> None:
    path = copy_of(entries)
    with AppendLogSnapshot.open(path, files=files)[1] as snap:
        assert len(snap.snapshot().base) >= entries // MAX_ENTRIES
        assert files.bytes_read <= path.stat().st_size + 2 * NOTE_BYTES + 1, (
            "the frames once; the header, and the lock's note"
        )
        assert files.reads <= 5
        assert (files.bytes_written, files.counts["sync"]) == (LOCK_BYTES + NOTE_BYTES, 0), (
            "nothing but who has the lock"
        )
        assert not leaves
        assert not any(snap.snapshot().base.cache.parts()), (
            "neither indexes nor entries are kept before someone asks for them"
        )


def test_a_log_of_many_windows_is_read_once(copy_of: CopyOf, files: CountedFiles) -> None:
    handle = ReadHandle(files, copy_of(MANY))
    header = read_header(handle)
    size = handle.path.stat().st_size
    window = 128 * 1024
    files.forget()
    largest = max(
        frame.size
        for frame, _ in read_frames(handle, header, Chain.start(header), size, window_bytes=window)
    )
    windows = size // (window - largest) + 1
    assert files.reads <= windows
    assert files.bytes_read <= size + windows * largest, "a frame that a window cuts is read again"


def test_what_opening_keeps_in_memory_goes_by_leaves(copy_of: CopyOf) -> None:
    kept, leaves = {}, {}
    for entries in (FEW, MANY):
        path = copy_of(entries)
        tracemalloc.start()
        with AppendLogSnapshot.open(path, files=UnsyncedFiles())[1] as snap:
            kept[entries], _ = tracemalloc.get_traced_memory()
            leaves[entries] = len(snap.snapshot().base)
        tracemalloc.stop()
    assert kept[MANY] - kept[FEW] <= 500 * (leaves[MANY] - leaves[FEW])


@pytest.mark.parametrize("batches", [40, 400])
def test_a_replayed_batch_is_decoded_once_and_its_changes_are_copied_a_few_times(
    path: Path, files: CountedFiles, monkeypatch: pytest.MonkeyPatch, batches: int
) -> None:
    engine = Engine(path, files=files)
    for seq in range(batches):
        engine.commit([encode_batch(puts(range(100 * seq, 100 * seq + 100)), cursor(seq))])
    engine.close()
    decodings = calls_of(monkeypatch, replay, "decode_batches")
    monkeypatch.setattr(delta, "Run", CountedRun)
    CountedRun.copied = 0
    files.forget()
    assert registry.load(ReadHandle(files, path)).fold.seq == batches
    assert len(decodings) == batches
    assert CountedRun.copied <= 4 * 100 * batches
    assert files.bytes_read <= path.stat().st_size + 2 * LEAF_BYTES, (
        "a frame that the window cuts is read again"
    )


# Reading.


@both
def test_a_key_that_was_read_before_is_read_from_memory(
    open_log: OpenLog, files: CountedFiles, entries: int
) -> None:
    snap = open_log(entries)
    hot = [key(number) for number in range(0, entries, entries // 50)]
    assert all(map(snap.get, hot))
    files.forget()
    assert all(map(snap.get, 3 * hot))
    assert files.total == 0


@both
def test_the_first_read_of_a_key_reads_the_index_of_its_leaf_and_the_value(
    open_log: OpenLog, files: CountedFiles, leaves: LeafCounter, entries: int
) -> None:
    snap = open_log(entries)
    assert snap.get(key(7))
    assert files.reads == files.total <= 2
    assert files.bytes_read < VALUE_BYTES * MIN_ENTRIES, "not the values of the others"
    assert (leaves.keys, leaves.entries) == (1, 0)
    files.forget()
    assert snap.get(key(8))
    assert (files.reads, files.bytes_read) == (1, VALUE_BYTES), "the index is kept"


def test_all_keys_one_by_one_take_a_read_each_and_two_a_leaf_at_most(
    open_log: OpenLog, files: CountedFiles, leaves: LeafCounter
) -> None:
    snap = open_log(FEW)
    count = len(snap.snapshot().base)
    order = list(map(key, random.Random(1).sample(range(FEW), FEW)))
    assert all(map(snap.get, order))
    assert files.reads <= FEW + 2 * count, (
        "the index; and the leaf as a whole, once, where that saves reads"
    )
    assert files.bytes_read <= 2 * snap.report.size
    assert leaves.keys <= 2 * count
    files.forget()
    assert all(map(snap.get, order))
    assert files.total == 0


@both
def test_an_absent_key_costs_the_index_of_a_leaf_once(
    open_log: OpenLog, files: CountedFiles, leaves: LeafCounter, entries: int
) -> None:
    snap = open_log(entries)
    assert snap.get("before all others") is None
    assert files.total == 0
    for times in (1, 0, 0):
        assert snap.get(key(5) + " absent") is None
        assert snap.get(key(6) + " absent") is None
        assert (files.reads, leaves.keys) == (times, times)
        files.forget()
        leaves.forget()
    assert not any(snap.get(key(number) + " absent") for number in range(0, entries, 10))
    assert files.reads == leaves.keys < len(snap.snapshot().base)
    assert leaves.entries == 0
    lines = work_of(snap.get, key(7) + " absent").lines
    assert lines <= 22, "one call below `get`: the search"


def test_an_absent_key_of_a_leaf_in_memory_is_looked_up_and_not_searched(
    open_log: OpenLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search compares eight keys, each somewhere else in memory."""
    snap = open_log(FEW)
    assert all(snap.get(key(number)) for number in range(FEW))
    searches = calls_of(monkeypatch, base, "bisect_left")
    assert not any(snap.get(key(number) + " absent") for number in range(FEW))
    assert not searches


@both
def test_what_changed_since_the_compaction_is_not_looked_for_on_disk(
    open_log: OpenLog, files: CountedFiles, entries: int
) -> None:
    snap = open_log(entries)
    changes = [
        *puts(range(50)),
        *(Delete(key(number)) for number in range(50, 100)),
        Put("new", b""),
    ]
    for number, batch in enumerate([changes, puts(range(100, 100 + delta.SETTLE_ENTRIES), 0)], 2):
        snap.apply(batch, cursor(number))
        files.forget()
        assert all(snap.get(key(number)) for number in range(50))
        assert not any(snap.get(key(number)) for number in range(50, 100))
        assert snap.get("new")
        assert files.total == 0
    assert len(snap.snapshot().delta), "they have settled by now"


@both
def test_a_hot_key_below_settled_changes_is_found_without_a_search(
    monkeypatch: pytest.MonkeyPatch, open_log: OpenLog, files: CountedFiles, entries: int
) -> None:
    """Each get searched the pieces of the delta and then the cache of the base: 2.5 times the
    time of a get with nothing above the base."""
    snap = open_log(entries)
    changes = puts(range(100, 99 + delta.SETTLE_ENTRIES // 4), 0)
    snap.apply([*changes, Delete(key(3))], cursor(2))
    changed, below = key(150), key(5)
    first = [snap.get(changed), snap.get(below)]
    assert all(first)
    searches = calls_of(monkeypatch, delta.Delta, "get")
    files.forget()
    assert [snap.get(changed), snap.get(below)] == first
    assert work_of(snap.get, below).lines <= 8
    assert not searches
    assert files.total == 0
    assert snap.get(key(3)) is None
    snap.apply([Put(below, b"newer")], cursor(3))
    assert [snap.get(changed), snap.get(below).value] == [first[0], b"newer"]


def test_what_a_delta_keeps_at_hand_is_bounded(
    monkeypatch: pytest.MonkeyPatch, open_log: OpenLog
) -> None:
    monkeypatch.setattr(delta, "HOT_ENTRIES", 10)
    snap = open_log(FEW)
    large = [
        Put("large", bytes(delta.HOT_ENTRY_BYTES)),
        Put("k" * delta.HOT_ENTRY_BYTES, b"v"),  # 4,096 keys of 60,000 characters took 240 MB
        Put("é" * (delta.HOT_ENTRY_BYTES // 4), b"v"),
    ]
    snap.apply([*large, *puts(range(100, 100 + delta.SETTLE_ENTRIES), 0)], cursor(2))
    hot = snap.snapshot().delta
    for number in range(50):
        assert snap.get(key(number))
        assert all(snap.get(put.key) for put in large)
        assert 0 < len(hot.hot) <= 10
        assert not any(put.key in hot.hot for put in large)


@both
def test_counting_the_entries_reads_the_indexes_of_touched_leaves_once(
    open_log: OpenLog, files: CountedFiles, entries: int
) -> None:
    snap = open_log(entries)
    assert len(snap) == entries
    assert files.total == 0
    snap.apply([Put(key(0) + " new", b""), Delete(key(1)), Put(key(entries // 2), b"")], cursor(2))
    files.forget()
    assert len(snap) == entries
    assert files.reads == 2
    assert files.bytes_read < 2 * VALUE_BYTES * MIN_ENTRIES
    snap.apply([Put(key(1), b"")], cursor(3))
    files.forget()
    assert len(snap) == entries + 1
    assert files.total == 0


@both
@pytest.mark.parametrize(
    ("prefix", "found"),
    [("k001234", 1), ("k00123", 10), ("k0012", 100), ("k001", 1000), ("absent", 0)],
)
def test_a_range_decodes_the_leaves_that_it_lies_in_and_keeps_nothing(
    open_log: OpenLog,
    files: CountedFiles,
    leaves: LeafCounter,
    prefix: str,
    found: int,
    entries: int,
) -> None:
    snap = open_log(entries)
    for batch in ([], puts(range(0, FEW, 3))):
        snap.apply(batch, cursor(2))
        for _ in range(2):
            files.forget()
            leaves.forget()
            assert len(snap.range(prefix)) == found
            assert leaves.entries <= found // MIN_ENTRIES + 2
            assert files.reads <= found // MIN_ENTRIES + 4, "two of a leaf at an end"
            if not batch:
                assert files.bytes_read <= (found + 2) * LEAF_BYTES // MIN_ENTRIES + 2 * INDEX_BYTES
            assert not any(snap.snapshot().base.cache.parts())


@both
def test_a_first_short_range_checks_the_values_that_it_returns_and_no_others(
    monkeypatch: pytest.MonkeyPatch, open_log: OpenLog, entries: int
) -> None:
    """It checked every value of the leaves that it lies in, 256 for a range of 10: half of its
    time."""
    snap = open_log(entries)
    checksums = calls_of(monkeypatch, leaf, "crc32c")
    for _ in range(2):
        checksums.clear()
        assert len(snap.range(key(50)[:-1])) == 10
        assert len(checksums) <= 10 + 2 * 2, "and those of two indexes"
    checksums.clear()
    assert len(snap.range()) == entries
    assert entries <= len(checksums) <= entries + 2 * len(snap.snapshot().base)
    checksums.clear()
    assert len(snap.range()) == entries
    assert not checksums, "all of it was checked"


@both
def test_a_range_that_is_left_early_decodes_what_was_asked_for(
    open_log: OpenLog, leaves: LeafCounter, entries: int
) -> None:
    fold = open_log(entries).snapshot()
    assert len(next(fold.blocks())) >= MIN_ENTRIES
    assert leaves.entries == 1
    after = key(500)
    for _ in range(3):
        leaves.forget()
        page = list(itertools.islice(fold.entries_after("", after), 100))
        assert leaves.entries <= 100 // MIN_ENTRIES + 2
        after = page[-1].key


@pytest.mark.parametrize("changes", [FEW, MANY])
def test_ranges_between_batches_sort_what_is_new_and_not_all_again(
    monkeypatch: pytest.MonkeyPatch, changes: int
) -> None:
    fold = uncompacted(changes)
    orders: dict[int, list[str]] = {}
    order = delta.Run.order

    def noted_order(run: delta.Run) -> list[str]:
        keys = order(run)
        orders[id(keys)] = keys  # held, so that no other list gets its id
        return keys

    monkeypatch.setattr(delta.Run, "order", noted_order)
    rng = random.Random(7)
    for number in range(500):
        fold = with_batch(fold, puts([rng.randrange(changes)]))
        assert len(fold.range(key(number))) == 1
    assert sum(map(len, orders.values())) <= 40 * 500


@pytest.mark.parametrize(
    ("read", "asked"),
    [
        pytest.param("get", [key(number) for number in range(5, FEW, 199)], id="first"),
        pytest.param("get", [key(7)] * 9, id="again"),
        pytest.param(
            "get", [f"{key(number)} absent" for number in range(5, FEW, 199)], id="absent"
        ),
        pytest.param("range", [f"k00{number}" for number in range(100, 200, 9)], id="range"),
    ],
)
def test_a_read_takes_the_same_work_over_any_store(
    opened: OpenStore, read: str, asked: list[str]
) -> None:
    def work_over(entries: int) -> Work:
        call = getattr(opened("never", entries, fine=True), read)
        return usual([work_of(call, what) for what in asked])

    few = assert_alike(work_over)
    assert few.lines <= 10 or asked[0] != asked[-1], "of a key that was read before"


# Applying.


@both
def test_an_apply_is_one_stat_and_one_write_of_its_frame(
    open_log: OpenLog, files: CountedFiles, entries: int
) -> None:
    snap = open_log(entries)
    snap.apply([], cursor(2))  # a session begins with a frame of its own
    for number, batch in enumerate(BATCHES, 3):
        files.forget()
        snap.apply(batch, cursor(number))
        assert files.counts == {"stat": 1, "write": 1}
        assert (
            files.bytes_written
            == len(batches_body([encode_batch(batch, cursor(number)).item])) + FRAME_OVERHEAD
        )
    assert not any(snap.snapshot().base.cache.parts()), "the base was not looked at"


@pytest.mark.parametrize("sync_each", [False, True])
@pytest.mark.parametrize("batches", [1, 300])
def test_a_commit_group_costs_the_calls_of_one_batch(
    path: Path, files: CountedFiles, sync_each: bool, batches: int
) -> None:
    engine = Engine(path, files=files, sync_each=sync_each)
    engine.commit([encode_batch([], cursor(1))])
    group = [
        encode_batch(puts(range(number, number + 3)), cursor(number)) for number in range(batches)
    ]
    files.forget()
    engine.commit(group)
    frame_bytes = len(batches_body([batch.item for batch in group])) + FRAME_OVERHEAD
    assert files.counts == calls_for(1, "always" if sync_each else "never")
    assert files.bytes_written == frame_bytes + (NOTE_BYTES if sync_each else 0)
    assert len(engine.fold.runs) == 1
    engine.close()


def test_a_batch_takes_the_same_work_over_any_store(open_log: OpenLog) -> None:
    def work_over(entries: int) -> Work:
        snap, rng = open_log(entries, fine=True), random.Random(3)
        batches = [puts(rng.sample(range(FEW), 100)) for _ in range(40)]
        return usual([work_of(snap.apply, batch, cursor(2)) for batch in batches])

    assert_alike(work_over)


@pytest.mark.parametrize("changes", [FEW, MANY, 10 * MANY])
def test_a_batch_copies_about_as_much_however_many_changes_there_are(
    monkeypatch: pytest.MonkeyPatch, changes: int
) -> None:
    """Over changes not yet compacted. Settling sometimes copies many: count over many batches."""
    fold = uncompacted(changes)
    monkeypatch.setattr(delta, "Run", CountedRun)
    CountedRun.copied = 0
    rng = random.Random(3)
    for _ in range(300):
        fold = with_batch(fold, puts(rng.choices(range(changes), k=100), 0))
    assert CountedRun.copied <= 25 * 300 * 100
    assert len(fold.runs) <= 9


def test_a_small_batch_shares_base_and_delta_with_the_fold_before_it() -> None:
    fold = uncompacted(MANY)
    for number in range(100):
        newer = with_batch(fold, puts([number]))
        assert (newer.base, newer.delta) == (fold.base, fold.delta)
        fold = newer


# Compacting.


@both
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda at: puts(range(at, at + 20)), id="same lengths"),
        pytest.param(lambda at: puts(range(at, at + 100)), id="many of the same lengths"),
        pytest.param(lambda at: puts(range(at, at + 20), VALUE_BYTES + 1), id="other lengths"),
        pytest.param(
            lambda at: [Delete(key(number)) for number in range(at, at + 20)], id="deleted"
        ),
        pytest.param(
            lambda at: [Put(f"{key(at)} {number}", b"") for number in range(20)], id="new"
        ),
    ],
)
def test_a_compaction_decodes_the_leaves_that_were_touched_and_copies_the_others(
    open_log: OpenLog,
    files: CountedFiles,
    leaves: LeafCounter,
    entries: int,
    change: Callable[[int], list[Update]],
) -> None:
    snap = open_log(entries)
    count = len(snap.snapshot().base)
    snap.apply(change(entries // 2), cursor(2))
    files.forget()
    snap.compact()
    assert max(leaves.entries, leaves.encoded) <= 4, (
        "two at most that it falls into, and those that end elsewhere by it"
    )
    assert leaves.keys <= 8
    assert files.reads <= count + 4, "each leaf once, but for those that cannot be patched"
    size = snap.report.path.stat().st_size
    assert files.bytes_read <= size + 5 * LEAF_BYTES
    assert files.bytes_written <= size + NOTE_BYTES
    assert files.counts["write"] <= size // BUFFER_BYTES + 2
    assert (files.counts["sync"], files.counts["sync_dir"]) == (1, 1)


@both
@pytest.mark.parametrize("size", [VALUE_BYTES, VALUE_BYTES + 1])
@pytest.mark.parametrize("step", [1, 2, 20])
def test_a_compaction_that_touches_every_leaf_decodes_and_encodes_each_once(
    monkeypatch: pytest.MonkeyPatch,
    open_log: OpenLog,
    files: CountedFiles,
    leaves: LeafCounter,
    step: int,
    size: int,
    entries: int,
) -> None:
    monkeypatch.setattr(EMPTY_DELTA, "settle_entries", 8192)  # of the larger store, they settle
    snap = open_log(entries)
    count = len(snap.snapshot().base)
    snap.apply(puts(range(0, entries, step), size), cursor(2))
    pieces = len(snap.snapshot().delta)
    files.forget()
    snap.compact()
    stretches = count + pieces  # a leaf in which a piece begins is read for both
    in_vain = (
        count if step == 20 and size != VALUE_BYTES else 0
    )  # few changes are tried as a patch, which takes the same lengths
    assert leaves.entries <= (pieces if step == 1 else stretches), (
        "what is overwritten as a whole is not decoded"
    )
    assert leaves.encoded <= len(snap.snapshot().base)
    assert files.reads <= stretches + in_vain
    assert leaves.keys <= 2 * stretches, "to see what is to be done, and to do it"
    if step == 1:
        index_bytes = LEAF_BYTES - MAX_ENTRIES * VALUE_BYTES
        assert files.bytes_read <= count * index_bytes + pieces * LEAF_BYTES, (
            "values that are overwritten are not read, but where a piece begins"
        )


@both
def test_a_log_that_is_compact_is_not_compacted_again(
    open_log: OpenLog, files: CountedFiles, entries: int
) -> None:
    open_log(entries).compact()
    assert files.total == 0


# Artifacts.


@both
def test_an_export_copies_leaves_and_an_import_decodes_the_keys_of_each_once(
    open_log: OpenLog, tmp_path: Path, files: CountedFiles, leaves: LeafCounter, entries: int
) -> None:
    snap = open_log(entries)
    snap.export_to(tmp_path / "artifact")
    size = (tmp_path / "artifact" / "data" / "fold.log").stat().st_size
    assert not leaves
    assert files.bytes_read <= 2 * size, "the leaves; and what was written, for the digest"
    assert files.bytes_written <= size + 1024, "and the manifest"
    assert (files.counts["sync"], files.counts["sync_dir"]) == (2, 3)

    files.forget()
    AppendLogSnapshot.import_artifact(tmp_path / "artifact", tmp_path / "copy.log", files=files)[
        1
    ].close()
    assert (leaves.keys, leaves.entries, leaves.encoded) == (len(snap.snapshot().base), 0, 0)
    assert files.bytes_read <= 4 * (size + 1024), (
        "to copy it, to check frames, to check leaves, to open it"
    )
    assert files.bytes_written <= size + 4 * NOTE_BYTES
    assert (files.counts["sync"], files.counts["sync_dir"]) == (1, 1)


# Following.


@both
def test_a_follower_reads_what_is_new_and_decodes_no_leaf(
    open_log: OpenLog, leaves: LeafCounter, monkeypatch: pytest.MonkeyPatch, entries: int
) -> None:
    snap = open_log(entries)
    tail = Tail(files := CountedFiles(), snap.report.path)
    assert isinstance(tail.poll(), Jump)
    assert files.bytes_read <= snap.report.size + 2 * NOTE_BYTES, "the note has two slots"
    snap.apply([], cursor(2))
    assert isinstance(tail.poll(), Advance)
    files.forget()
    assert tail.poll() is None
    assert files.counts == {"fstat": 1, "stat": 1}, "the price of a poll that finds nothing"
    base = tail.fold.base
    decodings = calls_of(monkeypatch, backlog, "decode_batches")
    for number, batch in enumerate(BATCHES, 3):
        before = snap.report.path.stat().st_size
        snap.apply(batch, cursor(number))
        files.forget()
        assert isinstance(tail.poll(), Advance)
        assert files.counts == {"fstat": 1, "read_into": 1}
        assert files.bytes_read == snap.report.path.stat().st_size - before
        assert len(decodings) == number - 2
        assert tail.fold.base is base
    assert not leaves


@both
def test_a_follower_reads_a_log_that_was_compacted_once(
    open_log: OpenLog, leaves: LeafCounter, entries: int
) -> None:
    snap = open_log(entries)
    tail = Tail(files := CountedFiles(), snap.report.path)
    tail.poll()
    snap.apply(puts(range(5)), cursor(2))
    snap.compact()
    files.forget()
    leaves.forget()
    while tail.poll():
        pass
    assert tail.fold.cursor() == cursor(2)
    assert files.bytes_read <= snap.report.path.stat().st_size + 2048, (
        "and the batch in the file that was"
    )
    assert not leaves


def test_a_follower_takes_a_batch_at_the_same_price_over_any_store(open_log: OpenLog) -> None:
    def work_over(entries: int) -> Work:
        snap = open_log(entries, fine=True)
        tail = Tail(CountedFiles(), snap.report.path)
        tail.poll()
        works = []
        for number in range(2, 22):
            snap.apply(puts(range(number, FEW, 40)), cursor(number))
            works.append(work_of(tail.poll))
            assert tail.fold.cursor() == cursor(number)
        return usual(works)

    assert_alike(work_over)


@both
def test_going_on_behind_a_cursor_reads_the_log_twice_at_most_and_decodes_no_leaf(
    open_log: OpenLog, files: CountedFiles, leaves: LeafCounter, entries: int
) -> None:
    snap = open_log(entries)
    for number in range(2, 12):
        snap.apply(puts(range(number)), cursor(number))
    files.forget()
    batches = backlog.batches_since(snap.snapshot(), cursor(7))
    assert batches is not None
    assert [seq for seq, _ in batches] == [8, 9, 10, 11]
    assert files.bytes_read <= 2 * snap.report.path.stat().st_size
    assert not leaves


# The store: messages, groups and fsyncs.


@pytest.mark.parametrize("sync", ["always", "interval", "never"])
def test_an_apply_is_no_message_one_write_and_no_more_fsyncs_than_were_asked_for(
    opened: OpenStore, files: CountedFiles, sent: SentMail, sync: str
) -> None:
    store = opened(sync)
    sent.mails.clear()
    for number in range(3, 13):
        store.apply(puts(range(number)), cursor(number))
    assert len(sent.to_writer(store)) <= 2, "its turn is taken, but for its own looks"
    assert files.counts == calls_for(10, sync)
    files.forget()
    store.close()
    assert 1 <= files.counts["sync"] <= 3


def test_batches_of_a_thousand_share_a_packer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each made a packer of its own, whose buffer took as long as packing."""
    packers = calls_of(monkeypatch, msgpack, "Packer")
    for number in range(1, 5):
        batch = encode_batch(puts(range(1000 * number, 1000 * number + 1000)), cursor(number))
        assert batch.length == len(batch.changes[0]) == 1000
        versions = {type(change[2]) for change in batch.changes[0].values()}
        assert versions == {bytes}, "plain ones, which the garbage collector does not track"
    assert len(packers) <= 1


def fewest_functions_of(apply: Callable[..., int]) -> list[str]:
    for number in range(3, 13):
        apply(puts([number]), cursor(number))
    called = [functions_of(apply, puts([number]), cursor(number)) for number in range(13, 18)]
    return min(called, key=len)


def test_an_apply_of_one_update_calls_few_functions(open_log: OpenLog) -> None:
    """Each takes more than 1 % of the time. Nine are those of the counted files."""
    called = fewest_functions_of(open_log(FEW).apply)
    assert len(called) <= 28, called


def test_an_apply_of_one_update_to_a_store_calls_few_functions(opened: OpenStore) -> None:
    """Nineteen are those of the counted files and of the test's steps."""
    called = fewest_functions_of(opened("never").apply)
    assert len(called) <= 58, called


@pytest.mark.parametrize("sync", ["always", "never"])
def test_callers_who_wait_together_share_a_write_and_an_fsync(
    opened: OpenStore, steps: Steps, files: CountedFiles, sent: SentMail, sync: str
) -> None:
    store = opened(sync)
    sent.mails.clear()
    gate = steps.park("writer.before_write")
    futures = [store.apply_async(puts([0]), cursor(3))]
    gate.wait_until_reached()
    futures += [store.apply_async(puts([number]), cursor(number + 3)) for number in range(1, 200)]
    gate.open()
    assert results(futures) == list(range(3, 203))
    assert files.counts == calls_for(2, sync), "two groups"
    assert sent.to_writer(store) == ["WriteRequest"] * 200


@pytest.mark.parametrize("sync", ["always", "never"])
def test_applies_beside_a_compaction_make_no_more_calls(
    opened: OpenStore, steps: Steps, files: CountedFiles, sent: SentMail, sync: str
) -> None:
    store = opened(sync)
    gate = steps.park("compact.write")
    compaction = in_thread(store.compact)
    gate.wait_until_reached()
    files.forget()
    sent.mails.clear()
    for number in range(3, 13):
        store.apply(puts(range(number)), cursor(number))
    assert len(sent.to_writer(store)) <= 2, "its turn is taken, but for its own looks"
    assert files.counts == calls_for(10, sync)
    gate.open()
    compaction.result(DEADLINE_S)


def test_a_commit_group_takes_the_same_work_of_the_writer_over_any_store(opened: OpenStore) -> None:
    """By the writer's own method, on this thread: the writer's waits for mail meanwhile."""

    def work_over(entries: int) -> Work:
        writer, works = opened("never", entries, fine=True)._supervisor.writer, []
        for number in range(3, 23):
            requests = [
                WriteRequest(encode_batch(puts([request]), cursor(number))) for request in range(20)
            ]
            works.append(work_of(writer.handle, list(map(Mail, requests))))
            assert all(request.future.done() for request in requests)
        return usual(works)

    assert_alike(work_over)


def test_reading_a_store_sends_no_message_and_waits_for_nobody(
    opened: OpenStore, steps: Steps, sent: SentMail
) -> None:
    store = opened("never")
    gate = steps.park("writer.before_write")
    future = store.apply_async(puts([1], 0), cursor(3))
    gate.wait_until_reached()
    sent.mails.clear()
    entry = store.get(key(1))
    assert entry is not None
    assert entry.value == bytes((1,)) * VALUE_BYTES
    assert (len(store.range("k0012")), len(store), key(2) in store) == (100, MANY, True)
    store.for_each_in_range("k0012", lambda entry: None)
    assert (store.cursor(), store.snapshot().cursor()) == (cursor(2), cursor(2))
    assert sent.mails == []
    gate.open()
    assert future.result(DEADLINE_S) == 3


def test_subscribers_cost_the_writer_no_decoding_and_a_batch_is_decoded_once_for_all_of_them(
    opened: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    decodings = calls_of(monkeypatch, ring, "decode_batches")
    store = opened("never", FEW)
    watches = [store.watch("some/") for _ in range(8)]
    assert all(isinstance(watch.next(DEADLINE_S), Synced) for watch in watches)
    for number in range(3, 13):
        store.apply(puts(range(number)), cursor(number))
    assert decodings == []
    store.apply([Put("some/key", b"")], cursor(13))
    for watch in watches:
        event = watch.next(DEADLINE_S)
        assert isinstance(event, Changed)
        assert event.cursor == cursor(13)
        watch.close()
    assert len(decodings) == 1, "what touches no prefix is not decoded"


def following(snap: AppendLogSnapshot, files: Files = OS_FILES) -> FollowerThread:
    """A follower that has read the log; it is polled by the test, and not started."""
    thread = FollowerThread(snap.report.path, files, 0.5, cache_bytes=CACHE_BYTES.default)
    while thread._poll():
        pass
    return thread


def test_a_follower_of_a_busy_log_makes_two_system_calls_for_each_poll_that_finds_something(
    open_log: OpenLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    snap = open_log(FEW)
    thread = following(snap, files := CountedFiles())
    stats = calls_of(monkeypatch, os, "stat")
    files.forget()
    for number in range(2, 12):
        for _ in range(5):
            snap.apply(puts(range(5)), cursor(number))
        stats.clear()
        assert thread._poll()
        assert stats == []
        assert thread.snapshot.cursor() == cursor(number)
    assert files.counts == {"fstat": 10, "read_into": 10}
    assert [busy_pause_s(worked_s) for worked_s in (0.0, 0.002, 1.0)] == [0.008, 0.03, 0.05]


def test_a_follower_to_which_nobody_subscribes_keeps_nothing_of_frames_that_are_overwritten(
    open_log: OpenLog,
) -> None:
    """It kept the batches of all that it read until it had folded them. Fresh memory and the
    collector of garbage took more time than the decoding."""
    snap = open_log(FEW)

    def peak_bytes(frames: int) -> int:
        thread = following(snap)
        for number in range(frames):
            snap.apply(puts(range(10)), cursor(number))
        work = work_of(thread._poll)
        assert thread.snapshot.seq == snap.snapshot().seq
        return work.peak_bytes

    few, many = peak_bytes(300), peak_bytes(1500)
    assert few > WINDOW_BYTES, "both fill the window"
    assert many < few + 16 * 1024


def test_a_follower_publishes_once_for_all_that_a_poll_finds(
    open_log: OpenLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    snap = open_log(FEW)
    thread = following(snap)
    published = calls_of(monkeypatch, thread.feeds, "publish")
    folds = calls_of(monkeypatch, FoldSnapshot, "with_batch")
    for number in range(2, 302):
        snap.apply(puts([number]), cursor(number))
    folds.clear()
    assert thread._poll()
    assert (len(published), len(folds)) == (1, 1)


def test_a_frame_is_parsed_decoded_and_folded_in_a_few_calls(open_log: OpenLog) -> None:
    """Eight followers of a busy log take as much of the processors as these calls do."""
    snap = open_log(FEW)
    tail = Tail(OS_FILES, snap.report.path)
    tail.keeps_batches = False
    tail.poll()
    for number in range(2, 102):
        snap.apply(puts(range(10)), cursor(number))
    calls = Counter(functions_of(tail.poll))
    often = {name for name, count in calls.items() if count > 10}
    assert often - {"decode_batches.<locals>.<listcomp>"} == {  # part of its function from 3.12 on
        "read_frames",
        "parse_frame_header",
        "_Gathered.add",
        "decoded",
        "decode_batches",
        "_usual_item",
        "DecodedPuts.change_into",
    }
    assert max(calls.values()) <= 103, "each once a frame"
