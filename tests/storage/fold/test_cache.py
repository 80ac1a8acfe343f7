"""What was read from a base is kept within `cache_bytes`: entries and indexes, the least used going
first."""

from __future__ import annotations

import contextlib
import random
import shutil
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from interrupts import At, Struck, strike

import foldlog
from foldlog import AppendLogSnapshot, Put, WatchCursor
from foldlog.protocol.options import CACHE_BYTES
from foldlog.protocol.updates import Change
from foldlog.storage.fold.base import Base
from foldlog.storage.fold.cache import SHARDS, Cache, cached_size
from foldlog.storage.fold.leaf import Columns, Index, encode_leaf
from foldlog.testing import FaultyFiles

ENTRIES = 10_000
LIMIT = 1024 * 1024


def key(number: int) -> str:
    return f"tenants/{number:06d}/é" if number % 3 == 0 else f"tenants/{number:06d}"


def value(number: int) -> bytes:
    return b"%06d" % number + b"v" * 194


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compacted log; in memory, its entries take five times the limit. Only read."""
    path = tmp_path_factory.mktemp("cache") / "log"
    with AppendLogSnapshot.open(path)[1] as snap:
        snap.apply([Put(key(n), value(n)) for n in range(ENTRIES)], WatchCursor.from_u64(1))
        snap.compact()
    return path


def real_bytes(held: object, seen: set[int] | None = None) -> int:
    """What the objects of a cache take, each counted once, with the header for its collection."""
    seen = set() if seen is None else seen
    if id(held) in seen or held is None or isinstance(held, int):
        return 0
    seen.add(id(held))
    parts: Iterator[object]
    if isinstance(held, dict):
        parts = iter(held.values())
    elif isinstance(held, tuple | list):
        parts = iter(held)
    elif isinstance(held, Index):
        parts = iter((held.keys, held._places, held.numbers))
    else:
        parts = iter(())
    collected = 16 if isinstance(held, tuple | list | dict) else 0
    return sys.getsizeof(held) + collected + sum(real_bytes(part, seen) for part in parts)


def held_by(base: Base) -> int:
    cache = base.cache
    return real_bytes([cache.recent, cache.older, [i for i in cache.indexes if i is not None]])


def entries_of(cache: Cache) -> list[Change]:
    return [change for shard in (*cache.recent, *cache.older) for change in shard.values()]


@contextlib.contextmanager
def opened(
    path: Path, files: FaultyFiles | None = None, limit: int = LIMIT
) -> Iterator[AppendLogSnapshot]:
    """The log, with a cache smaller than a user may ask for."""
    with AppendLogSnapshot.open(path, files=files or FaultyFiles())[1] as snap:
        snap.snapshot().limit_cache(limit)
        yield snap


def test_reading_everything_at_random_stays_within_the_bound(log: Path) -> None:
    with opened(log) as snap:
        base = snap.snapshot().base
        order = list(range(ENTRIES))
        random.Random(1).shuffle(order)
        most = 0
        for number in order:
            entry = snap.get(key(number))
            assert entry is not None
            assert entry.value == value(number)
            most = max(most, base.cache.held_bytes)
        assert LIMIT * 9 // 10 < most <= LIMIT
        empty = 2 * SHARDS * sys.getsizeof({1: 1})  # small dicts are less full than large ones
        assert held_by(base) <= base.cache.held_bytes + empty, "no less than is counted"
        assert 0 < sum(index is not None for index in base.cache.indexes) < len(base)


def test_what_is_used_stays_while_all_else_passes_through(log: Path) -> None:
    files = FaultyFiles()
    with opened(log, files, 4 * LIMIT) as snap:
        hot = [key(n) for n in range(0, ENTRIES, ENTRIES // 100)]
        for k in hot:
            snap.get(k)
        read = 0
        for number in range(ENTRIES):
            snap.get(key(number))
            if number % 100 == 0:
                files.arm()
                for k in hot:
                    snap.get(k)
                read += files.counts["read"]
        assert read < len(hot) // 2, "of 10,000 reads, while thousands of entries were dropped"


def test_the_index_of_a_leaf_that_is_used_stays(log: Path) -> None:
    with opened(log) as snap:
        base = snap.snapshot().base
        used = base.index(0)
        for number in range(len(base)):
            base.index(number)
            assert base.index(0) is used
        dropped = [n for n, index in enumerate(base.cache.indexes) if index is None]
        assert dropped == list(range(1, len(dropped) + 1)), "those that were used first"


def test_making_room_drops_a_small_part(log: Path) -> None:
    with opened(log, limit=3 * LIMIT) as snap:
        base = snap.snapshot().base
        for number in range(len(base)):
            base.index(number)
        before = 0
        for number in random.Random(2).sample(range(ENTRIES), 5000):
            snap.get(key(number))
            assert base.cache.held_bytes > before - 2 * LIMIT // SHARDS, "two thirds of a shard"
            before = base.cache.held_bytes


def test_a_base_within_the_bound_loses_nothing(tmp_path: Path) -> None:
    files = FaultyFiles()
    count = 1500
    with opened(tmp_path / "log", files) as snap:
        snap.apply([Put(key(n), b"v" * 100) for n in range(count)], WatchCursor.from_u64(1))
        snap.compact()
        for number in range(count):
            snap.get(key(number))
        files.arm()
        for number in random.Random(3).sample(range(count), count):
            assert snap.get(key(number)) is not None
        assert files.counts["read"] == 0
        assert LIMIT * 3 // 4 < snap.snapshot().cached_bytes <= LIMIT


def test_the_bound_holds_across_compactions(log: Path, tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(log.read_bytes())
    with opened(path) as snap:
        for number in range(0, ENTRIES // 4, 2):
            snap.get(key(number))
        held = snap.snapshot()
        snap.apply([Put(key(7), b"new")], WatchCursor.from_u64(2))
        snap.compact()
        base = snap.snapshot().base
        assert base is not held.base
        assert LIMIT // 2 < base.cache.held_bytes <= LIMIT, "what was read is in memory still"
        before = held.cached_bytes
        for number in range(ENTRIES):
            if number == 7:
                continue
            assert held.get(key(number)) == snap.get(key(number))
        assert held.cached_bytes <= before, "a base that was replaced takes nothing more"
        assert base.cache.held_bytes <= LIMIT


def test_an_entry_over_a_64th_of_the_bound_is_not_kept() -> None:
    cache = Cache(LIMIT)
    cache.add(("large", b"v" * (LIMIT // 64), b""))
    assert not any(cache.recent)
    cache.add(("small", b"v" * (LIMIT // 64 - 1000), b""))
    assert any(cache.recent)


def test_stores_and_followers_take_the_bound_and_tell_what_is_held(
    log: Path, tmp_path: Path
) -> None:
    least = CACHE_BYTES.least
    log = shutil.copy(log, tmp_path)
    with foldlog.follow(log, cache_bytes=least) as follower:
        assert follower.stats().cached_bytes == 0
        assert follower.get(key(1)) is not None
        held = follower.snapshot()
        assert held.base.cache.limit_bytes == least
        assert follower.stats().cached_bytes == held.cached_bytes > 0
    with foldlog.open(log, cache_bytes=least, sync="never") as store:
        assert store.get(key(1)) is not None
        store.put(key(1), b"new")
        store.compact()
        now = store.snapshot()
        assert now.base.cache.limit_bytes == least, "of a compacted base, too"
        assert store.stats().cached_bytes == now.cached_bytes > 0


@pytest.mark.parametrize(
    ("wrong", "error"), [(CACHE_BYTES.least - 1, ValueError), (True, TypeError), ("8", TypeError)]
)
def test_a_wrong_bound_is_refused_before_anything_is_opened(
    tmp_path: Path, wrong: object, error: type[Exception]
) -> None:
    path = tmp_path / "log"
    for opened in (foldlog.open, foldlog.follow, AppendLogSnapshot.open):
        with pytest.raises(error, match="cache_bytes"):
            opened(path, cache_bytes=wrong)  # type: ignore[operator]
    assert not any(tmp_path.iterdir())


def change(number: int) -> Change:
    return (key(number), value(number), b"")


def test_a_cache_counts_what_it_holds_through_every_operation() -> None:
    cache = Cache(300_000)
    indexes = [
        Index(body[: int.from_bytes(body[4:8], "little")], len(body))
        for n in range(20)
        if (body := encode_leaf([key(3 * n), key(3 * n + 1)], [b"a", b"b"], [b"", b""]))
    ]
    for _ in indexes:
        cache.add_leaf()
    chance = random.Random(4)
    for step in range(2000):
        pick = chance.randrange(4)
        if pick == 0:
            read = change(chance.randrange(2000))
            if cache.take_older(read[0]) is None:
                cache.add(read)
        elif pick == 1:
            cache.add_leaf_entries(Columns(*map(list, zip(*map(change, range(step, step + 5))))))
        elif pick == 2:
            cache.take_older(key(chance.randrange(2000)))
        else:
            number = chance.randrange(len(indexes))
            if cache.use_index(number) is None:
                cache.keep_index(number, indexes[number])
        kept = [index.kept_bytes for index in cache.indexes if index is not None]
        assert cache.held_bytes == sum(map(cached_size, entries_of(cache))) + sum(kept) <= 300_000


def test_values_that_grew_before_a_compaction_stay_within_the_bound() -> None:
    """The cache of the new base took over what was read, counted from zero, and made room only
    once the new values alone were over the bound."""
    old = Cache(LIMIT)
    small = [(key(n), b"v" * 10, b"") for n in range(3000)]
    old.add_leaf_entries(Columns(*map(list, zip(*small))))
    assert LIMIT * 3 // 4 < old.held_bytes <= LIMIT
    new = Cache()
    new.inherit(old, {}, [{k: (k, b"v" * 600, b"") for k, _, _ in small[:900]}])
    assert new.held_bytes == sum(map(cached_size, entries_of(new))) <= LIMIT


def test_two_threads_may_drop_the_last_index_at_once() -> None:
    """The other thread took the last one after the test for it: an IndexError, out of a `get`."""

    class EmptiedMeanwhile(deque[Any]):
        def __bool__(self) -> bool:
            return True

    cache = Cache(LIMIT)
    cache._kept = EmptiedMeanwhile()
    cache._drop_index()
    assert cache.held_bytes == 0


def test_an_exception_at_any_point_of_a_get_does_not_break_the_bound_for_long(log: Path) -> None:
    """An index whose dropping was interrupted was never dropped: with a time limit that struck
    again and again, the indexes took five times the bound."""
    limit = 60_000
    with AppendLogSnapshot.open(log)[1] as snap:  # FaultyFiles has a lock
        snap.snapshot().limit_cache(limit)
        base = snap.snapshot().base
        cache = base.cache
        chance = random.Random(6)
        for number in range(1, 400):
            at = At(number % 130 + 1, strike)
            with contextlib.suppress(Struck):
                at.run(lambda: snap.get(key(chance.randrange(ENTRIES))))
            k = chance.randrange(ENTRIES)
            assert snap.get(key(k)).value == value(k)  # type: ignore[union-attr]
        for number in [*range(len(base)), *range(3)]:  # one round, undisturbed
            base.index(number)
        for number in range(0, ENTRIES, 10):
            snap.get(key(number))
        kept = sum(index.kept_bytes for index in cache.indexes if index is not None)
        assert 0 < kept <= limit * 3 // 4
        assert kept + sum(map(cached_size, entries_of(cache))) <= limit
