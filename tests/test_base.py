"""The base reads ahead: of a leaf that is read often, the rest comes at once, where the cache can hold the whole base."""

from __future__ import annotations

from pathlib import Path

import pytest

from foldlog import AppendLogSnapshot, CorruptLogError, KvEntry, Put, VersionToken, WatchCursor
from foldlog.storage import base, leaf
from foldlog.testing import FaultyFiles

ENTRIES = leaf.MIN_ENTRIES - 1  # one leaf


def key(number: int) -> str:
    return f"key-{number:03d}"


def made(path: Path, value: bytes = b"v" * 20) -> Path:
    """A compacted log with one leaf."""
    with AppendLogSnapshot.open(path)[1] as snap:
        snap.apply([Put(key(n), value + b"%03d" % n, VersionToken.from_u64(n)) for n in range(ENTRIES)], WatchCursor.from_u64(1))
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


def test_a_fifth_of_a_leaf_brings_the_rest(tmp_path: Path) -> None:
    fifth = ENTRIES // 5
    assert reads_of_each(made(tmp_path / "log")) == [2] + [1] * (fifth - 1) + [2] + [0] * (ENTRIES - fifth - 1)


def test_a_base_that_the_cache_cannot_hold_is_read_entry_by_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = made(tmp_path / "log")
    monkeypatch.setattr(base, "CACHE_BYTES", path.stat().st_size)  # less than the objects would take
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
        assert sum(map(len, held.cache)) == ENTRIES
        cached = [change for shard in held.cache for change in shard.values()]
        assert sum(held._cached_bytes) == sum(len(change[1] or b"") + base._ENTRY_OVERHEAD for change in cached)
