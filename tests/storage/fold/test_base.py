"""What the base keeps in memory: what was read, the rest of hot leaves, across a compaction."""

from __future__ import annotations

from pathlib import Path

import pytest

from foldlog import (
    AppendLogSnapshot,
    CorruptLogError,
    Delete,
    FoldSnapshot,
    KvEntry,
    Put,
    VersionToken,
    WatchCursor,
)
from foldlog.storage.fold import leaf
from foldlog.storage.fold.base import Base
from foldlog.storage.fold.cache import cached_size
from foldlog.testing import FaultyFiles

ENTRIES = leaf.MIN_ENTRIES - 1  # one leaf


def key(number: int) -> str:
    return f"key-{number:03d}"


def made(path: Path, value: bytes = b"v" * 20) -> Path:
    """A compacted log with one leaf."""
    with AppendLogSnapshot.open(path)[1] as snap:
        snap.apply(
            [Put(key(n), value + b"%03d" % n, VersionToken.from_u64(n)) for n in range(ENTRIES)],
            WatchCursor.from_u64(1),
        )
        snap.compact()
    return path


def expected(number: int, value: bytes = b"v" * 20) -> KvEntry:
    return KvEntry(key(number), value + b"%03d" % number, VersionToken.from_u64(number))


def reads_of_each(path: Path) -> list[int]:
    """How many reads of the file each `get` of every entry took, in order."""
    files = FaultyFiles()
    with AppendLogSnapshot.open(path, files=files)[1] as snap:
        counts = []
        for number in range(ENTRIES):
            files.arm()
            assert snap.get(key(number)) == expected(number)
            counts.append(files.counts["read"])
        return counts


def test_an_eighth_of_a_leaf_brings_the_rest(tmp_path: Path) -> None:
    eighth = ENTRIES // 8
    assert reads_of_each(made(tmp_path / "log")) == [2] + [1] * (eighth - 1) + [2] + [0] * (
        ENTRIES - eighth - 1
    )


def test_a_base_that_the_cache_cannot_hold_is_read_entry_by_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = made(tmp_path / "log")
    monkeypatch.setattr(
        FoldSnapshot,
        "limit_cache",
        lambda fold, _: fold.base.cache.set_limit(fold.base._weight - 1),
    )
    assert reads_of_each(path) == [2] + [1] * (ENTRIES - 1)


def test_a_leaf_of_large_values_is_read_entry_by_entry(tmp_path: Path) -> None:
    files = FaultyFiles()
    value = b"v" * (leaf.MAX_LEAF_BYTES // 8)
    path = made(tmp_path / "log", value)
    with AppendLogSnapshot.open(path, files=files)[1] as snap:
        for number in range(8):
            files.arm()
            assert snap.get(key(number)) == expected(number, value)
            assert files.counts["read"] == (2 if number == 0 else 1)


def test_damage_next_to_an_entry_does_not_hide_it(tmp_path: Path) -> None:
    path = made(tmp_path / "log")
    with AppendLogSnapshot.open(path)[1] as snap:
        data = bytearray(path.read_bytes())
        data[data.index(b"v" * 20 + b"100")] ^= 1
        with path.open("r+b") as file:  # the same file: the store has it open
            file.write(data)
        for _ in range(2):
            for number in range(ENTRIES):
                if number != 100:
                    assert snap.get(key(number)) == expected(number)
        with pytest.raises(CorruptLogError, match="key-100"):
            snap.get(key(100))


def test_reading_ahead_counts_each_entry_once(tmp_path: Path) -> None:
    with AppendLogSnapshot.open(made(tmp_path / "log"))[1] as snap:
        for number in range(ENTRIES):
            snap.get(key(number))
        held = snap.snapshot().base
        assert sum(map(len, held.recent)) == ENTRIES
        cached = [change for shard in held.recent for change in shard.values()]
        assert held.cache._entry_bytes == sum(map(cached_size, cached))


def test_a_compaction_leaves_what_was_read_in_memory_and_up_to_date(tmp_path: Path) -> None:
    files = FaultyFiles()
    with AppendLogSnapshot.open(tmp_path / "log", files=files)[1] as snap:
        snap.apply([Put(f"key-{n:05d}", b"%d" % n) for n in range(5000)], WatchCursor.from_u64(1))
        snap.compact()
        read = [f"key-{n:05d}" for n in range(0, 5000, 250)]
        before = {k: snap.get(k) for k in read}
        changes: list[Put | Delete] = [
            Put(read[3], b"first"),
            Delete(read[4]),
            Put(read[5], b"grown" * 1000),
        ]
        snap.apply(
            [*changes, Put("key-00001", b"never read"), Put("key-99999", b"new")],
            WatchCursor.from_u64(2),
        )
        snap.apply([Put(read[3], b"second"), Delete(read[6])], WatchCursor.from_u64(3))
        snap.compact()
        assert not any(span.changes for span in snap.snapshot().spans("", None))
        files.arm()
        expected = {k: (None if entry is None else entry.value) for k, entry in before.items()}
        expected |= {read[3]: b"second", read[4]: None, read[5]: b"grown" * 1000, read[6]: None}
        live = [k for k in read if expected[k] is not None]
        assert {k: entry and entry.value for k in live if (entry := snap.get(k))} == {
            k: expected[k] for k in live
        }
        assert files.counts["read"] == 0, "what was read before the compaction is in memory still"
        assert [snap.get(k) for k in (read[4], read[6])] == [None, None]
        files.arm()
        assert snap.get("key-04751") == KvEntry("key-04751", b"4751", VersionToken.unknown())
        assert files.counts["read"] == 1, (
            "nor is the index of a leaf that stayed as it was read again"
        )
        assert [e.value for e in snap.range("key-0000")] == [
            b"0",
            b"never read",
            *(b"%d" % n for n in range(2, 10)),
        ]
        held = snap.snapshot().base
        cached = [change for shard in held.recent for change in shard.values()]
        assert len(cached) == len(live) + 1
        assert held.cache._entry_bytes == sum(map(cached_size, cached))


def test_a_compaction_of_what_was_never_read_remembers_nothing(tmp_path: Path) -> None:
    with AppendLogSnapshot.open(made(tmp_path / "log"))[1] as snap:
        snap.apply([Put(key(1), b"new")], WatchCursor.from_u64(2))
        snap.compact()
        assert not any(snap.snapshot().base.recent)


@pytest.mark.parametrize("change", [Delete(key(5)), Put(key(5), b"new")])
def test_an_entry_that_two_threads_read_at_once_is_not_stale_after_a_compaction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Put | Delete
) -> None:
    """Two threads read an entry. One cached it, the cache moved it to the older ones to make room,
    and then the other cached it again. The compaction updated one of the two; a deleted key was
    back.
    """
    with AppendLogSnapshot.open(made(tmp_path / "log"))[1] as snap:
        snap.get(key(1))  # the index is read
        base = snap.snapshot().base
        read_from_disk = Base._pread

        def read_meanwhile(held: Base, size: int, offset: int) -> bytes:
            monkeypatch.setattr(Base, "_pread", read_from_disk)
            assert held.read(key(5)) is not None
            cache = held.cache
            cache.older[:], cache.recent[:] = cache.recent[:], [{} for _ in cache.recent]
            return read_from_disk(held, size, offset)

        monkeypatch.setattr(Base, "_pread", read_meanwhile)
        assert snap.get(key(5)) == expected(5)
        assert sum(key(5) in shard for shard in (*base.recent, *base.cache.older)) == 2
        snap.apply([change], WatchCursor.from_u64(2))
        snap.compact()
        base = snap.snapshot().base
        assert not any(span.changes for span in snap.snapshot().spans("", None))
        for _ in range(2):
            entry = snap.get(key(5))
            assert (entry and entry.value) == (b"new" if isinstance(change, Put) else None)
            base.cache.recent[:] = [{} for _ in base.recent]  # dropped: only older ones are left
