"""What fingers expect of a store, alike on engine, store, follower and snapshot."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from actor_kit import in_thread, results
from engine_kit import ENGINES

import foldlog
from foldlog import (
    AppendLogSnapshot,
    Apply,
    CursorRegressed,
    Delete,
    KvEntry,
    Put,
    RequestTimeout,
    StoreClosed,
    Synced,
    VersionToken,
    WatchCursor,
)
from foldlog.protocol.store import Backend
from foldlog.storage.fold.base import Base
from foldlog.testing import Fault, FaultyFiles

FACES = ("engine", "store", "follower", "snapshot")
ROCKSDB_FACES = tuple(f"rocksdb {name}" for name in FACES if name != "follower")
Face = Callable[[list[list[Any]]], Any]


@pytest.fixture(params=(*FACES, *ROCKSDB_FACES))
def face(request: pytest.FixtureRequest, path: Path) -> Iterator[Face]:
    """Something to read from, with these batches applied; "compact" compacts in between."""
    backend: Backend = "append-log"
    if request.param in ROCKSDB_FACES:
        pytest.importorskip("rocksdict")
        backend = "rocksdb"
    face = request.param.removeprefix("rocksdb ")
    with ExitStack() as stack:

        def make(batches: list[Any]) -> Any:
            if face == "engine":
                store: Any = stack.enter_context(ENGINES[backend].open(path)[1])
            else:
                store = stack.enter_context(foldlog.open(path, backend=backend))
            for number, batch in enumerate(batches, 1):
                if batch == "compact":
                    store.compact()
                else:
                    store.apply(batch, number)
            if face == "follower":
                return stack.enter_context(foldlog.follow(path))
            return store.snapshot() if face == "snapshot" else store

        yield make


def puts(*keys: str) -> list[Put]:
    return [Put(key, key.encode()) for key in keys]


def keys_of(entries: Any) -> list[str]:
    return [entry.key for entry in entries]


def test_get_takes_a_default_for_what_is_absent_or_deleted(face: Face):
    store = face([puts("a", "b"), [Delete("b")]])
    nothing = object()
    assert store.get("a", nothing) == KvEntry("a", b"a", VersionToken.unknown())
    assert store.get("b", nothing) is nothing
    assert store.get("c", nothing) is nothing
    assert store.get("c") is None


def test_get_finds_the_default_also_behind_a_compaction(face: Face):
    store = face([puts("a", "b"), "compact", [Delete("b")]])
    assert (store.get("b", 7), store.get("", 7), store.get("zz", 7)) == (7, 7, 7)
    assert store.get("a", 7).value == b"a"


def test_get_many_gives_what_is_there_in_the_order_of_the_keys(face: Face):
    store = face([puts("a", "b", "c"), [Delete("b")]])
    assert list(store.get_many(["c", "b", "a", "x"]).items()) == [
        ("c", store.get("c")),
        ("a", store.get("a")),
    ]
    assert store.get_many(iter(())) == {}
    with pytest.raises(TypeError):
        store.get_many("abc")
    with pytest.raises(TypeError):
        store.get_many([1])


def test_a_store_iterates_over_its_keys_in_order(face: Face):
    store = face([puts("b", "a"), "compact", puts("d", "c"), [Delete("b")]])
    assert list(store) == list(store.keys()) == ["a", "c", "d"]
    assert list(store.keys("c")) == ["c"]
    assert dict(store.items()) == {"a": b"a", "c": b"c", "d": b"d"}
    assert list(store.items("d")) == [("d", b"d")]
    assert ("a" in store, "b" in store, len(store)) == (True, False, 3)


def test_an_iterator_reads_the_state_of_the_call(path: Path):
    with foldlog.open(path) as store:
        store.apply(puts("a", "b"), 1)
        made = [iter(store), store.keys(), store.items(), store.iter_range()]
        store.apply([Delete("a"), *puts("c")], 2)
        assert [len(list(each)) for each in made] == [2, 2, 2, 2]
        assert list(store) == ["b", "c"]


def test_range_takes_bounds_a_limit_and_a_direction(face: Face):
    store = face([puts("a", "b/1", "b/2", "b/3", "b/4", "c")])
    assert keys_of(store.range("b/", limit=2)) == ["b/1", "b/2"]
    assert keys_of(store.range("b/", limit=2, reverse=True)) == ["b/4", "b/3"]
    assert keys_of(store.range("b/", start="b/2", stop="b/4")) == ["b/2", "b/3"]
    assert keys_of(store.range(start="b/4")) == ["b/4", "c"]
    assert keys_of(store.range(stop="b/2", reverse=True)) == ["b/1", "a"]
    assert keys_of(store.range("b/", start="a", stop="z")) == ["b/1", "b/2", "b/3", "b/4"]
    assert store.range("b/", start="c") == store.range(start="b", stop="a") == []
    assert store.range(limit=0) == store.range(start="x", stop="x") == []
    assert list(store.iter_range("b/", limit=1)) == store.range("b/", limit=1)


@pytest.mark.parametrize("seed", range(6))
def test_any_range_is_what_a_sorted_dict_says(face: Face, seed: int):
    """Layouts of base, delta and runs, with bounds that cut leaves, pieces and runs anywhere."""
    rng = random.Random(seed)
    model: dict[str, bytes] = {}
    batches: list[Any] = []
    for _ in range(rng.choice((1, 3, 8))):
        batch: list[Any] = []
        for _ in range(rng.choice((10, 1500))):
            key = f"{rng.randrange(3)}/{rng.randrange(3000):04}"
            if rng.random() < 0.2:
                batch.append(Delete(key))
                model.pop(key, None)
            else:
                batch.append(Put(key, key.encode()))
                model[key] = key.encode()
        batches.append(batch)
        if rng.random() < 0.3:
            batches.append("compact")
    store = face(batches)
    for _ in range(40):
        prefix = rng.choice(("", "1", "1/", "1/2", "2/29", "3"))
        start, stop = (
            rng.choice((None, f"{rng.randrange(3)}/{rng.randrange(3000):04}")) for _ in range(2)
        )
        limit, reverse = rng.choice((None, 1, 7, 500)), rng.random() < 0.5
        expected = sorted(
            (
                key
                for key in model
                if key.startswith(prefix)
                and (start is None or key >= start)
                and (stop is None or key < stop)
            ),
            reverse=reverse,
        )[:limit]
        found = store.range(prefix, start=start, stop=stop, limit=limit, reverse=reverse)
        assert keys_of(found) == expected, (prefix, start, stop, limit, reverse)


def test_a_range_that_is_left_early_reads_no_more_than_a_leaf(path: Path, monkeypatch: Any):
    with foldlog.open(path) as store:
        store.apply([Put(f"{n:06}", b"x" * 100) for n in range(20_000)], 1)
        store.compact()
        reads: list[object] = []
        pread = Base._pread

        def counting(base: Base, size: int, offset: int) -> bytes:
            reads.append(offset)
            return pread(base, size, offset)

        monkeypatch.setattr(Base, "_pread", counting)
        for reverse in (False, True):
            reads.clear()
            assert next(store.iter_range(reverse=reverse)).key in ("000000", "019999")
            assert len(reads) == 1


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"start": 1}, TypeError),
        ({"start": 0}, TypeError),
        ({"stop": b"a"}, TypeError),
        ({"limit": True}, TypeError),
        ({"limit": 1.0}, TypeError),
        ({"limit": -1}, ValueError),
        ({"prefix": None}, TypeError),
    ],
)
def test_bounds_that_are_none_are_refused_at_the_call(face: Face, arguments: Any, error: type):
    store = face([puts("a")])
    with pytest.raises(error):
        store.range(**arguments)
    with pytest.raises(error):
        store.iter_range(**arguments)


def test_a_closed_store_refuses_at_the_call_and_not_at_the_first_entry(path: Path):
    store = foldlog.open(path)
    store.close()
    for use in (store.keys, store.items, store.iter_range, lambda: iter(store)):
        with pytest.raises(StoreClosed):
            use()
    with pytest.raises(StoreClosed):
        store.get_many([])


# Cursors that are plain numbers.


def test_an_int_goes_wherever_a_cursor_goes(path: Path):
    with foldlog.open(path) as store, foldlog.follow(path) as follower:
        store.apply(puts("a"), 7)
        store.apply_async(puts("b"), 8).result(60)
        assert store.writer.ask(Apply(puts("c"), 9)) == 3
        store.wait_for(9, 60)
        follower.wait_for(9, 60)
        with store.watch(since=8) as watch:
            told = [watch.next(60), watch.next(60)]
        assert (told[0].update.key, told[1]) == ("c", Synced(WatchCursor.from_u64(9), 3))
        assert int(store.cursor()) == 9
    with AppendLogSnapshot.open(path)[1] as engine:
        engine.apply([], 10)
        assert engine.cursor() == WatchCursor.from_u64(10)


def test_int_of_a_token_is_its_number_and_of_the_none_cursor_0():
    assert int(WatchCursor.from_u64(2**64 - 1)) == 2**64 - 1
    assert int(WatchCursor.none()) == 0
    assert int(VersionToken.from_u64(7)) == 7
    for token in (WatchCursor(b"12"), VersionToken(b"12345"), VersionToken.unknown()):
        with pytest.raises(ValueError, match="not a number"):
            int(token)


@pytest.mark.parametrize("bad", [True, 1.0, "1", b"1", VersionToken.from_u64(1)])
def test_nothing_else_stands_for_a_cursor(path: Path, bad: Any):
    with foldlog.open(path) as store, foldlog.follow(path) as follower:
        for use in (
            lambda: store.apply([], bad),
            lambda: store.wait_for(bad, 0.0),
            lambda: follower.wait_for(bad, 0.0),
            lambda: store.watch(since=bad),
        ):
            with pytest.raises(TypeError):
                use()
    for number in (-1, 2**64):
        with pytest.raises(ValueError, match="2\\*\\*64"):
            foldlog.protocol.tokens.as_cursor(number)


# Waiting.


def test_a_put_here_can_be_awaited_there(path: Path):
    with foldlog.open(path) as store, foldlog.follow(path) as follower:
        version = store.put("a", b"1")
        follower.wait_for(seq=version)
        assert follower.get("a").value == b"1"
        version = store.delete("a")
        follower.wait_for(seq=int(version), timeout_s=60)
        assert "a" not in follower
        store.wait_for(seq=version, timeout_s=0.0)


def test_waiting_takes_one_position_and_ends_with_its_time(path: Path):
    with foldlog.open(path) as store, foldlog.follow(path) as follower:
        for waiter in (store, follower):
            with pytest.raises(TypeError, match="either a cursor or seq="):
                waiter.wait_for()
            with pytest.raises(TypeError, match="either a cursor or seq="):
                waiter.wait_for(1, seq=1)
            for seq, error in ((True, TypeError), ("1", TypeError), (-1, ValueError)):
                with pytest.raises(error):
                    waiter.wait_for(seq=seq)  # type: ignore[arg-type]
            with pytest.raises(
                RequestTimeout, match=r"batch 3 was not seen within 0\.01 s; at batch 0"
            ):
                waiter.wait_for(seq=3, timeout_s=0.01)


def test_waiting_on_a_store_that_is_closed_meanwhile_ends(path: Path):
    store = foldlog.open(path)
    waiting = in_thread(lambda: store.wait_for(seq=5, timeout_s=60))
    store.put("a", b"")
    store.close()
    with pytest.raises(StoreClosed):
        results([waiting])


# Syncing.


def test_sync_makes_what_was_answered_durable_whatever_the_policy(path: Path):
    with foldlog.open(path, sync="never") as store:
        store.apply(puts("a"), 5)
        assert store.synced_cursor != WatchCursor.from_u64(5)
        store.sync()
        assert store.synced_cursor == WatchCursor.from_u64(5)
        before = store.stats().synced_seq
        store.sync()
        assert store.stats().synced_seq == before == 1


def test_sync_on_a_disk_that_refuses_once_heals_and_then_holds(path: Path):
    """The fsync of a `sync()` fails, which poisons the log.

    The writer heals into a new file, and the call still succeeds.
    """
    fault = Fault("sync", nth=4)
    with foldlog.open(path, sync="never", files=FaultyFiles(fault)) as store:
        for number in range(1, 9):
            store.apply(puts("a"), number)
            store.sync()
            assert int(store.synced_cursor) == number
        assert store.stats().restarts
        assert store.verify().ok


# Cursors that go back.


@pytest.mark.parametrize("kind", ["engine", "store"])
def test_any_cursor_is_taken_unless_it_must_go_forward(path: Path, kind: str):
    opened: Any = foldlog.open(path) if kind == "store" else AppendLogSnapshot.open(path)[1]
    with opened as store:
        store.apply(puts("a"), 9)
        assert store.apply(puts("b"), 3) == 2, "an upstream that was restored counts from below"
        store.apply([], 9)
        with pytest.raises(CursorRegressed) as caught:
            store.apply(puts("c"), 8, forward_only=True)
        assert (int(caught.value.cursor), int(caught.value.last)) == (8, 9)
        with pytest.raises(CursorRegressed):
            store.apply(puts("c"), WatchCursor(b"x"), forward_only=True)
        assert ("c" in store, int(store.cursor()), store.snapshot().seq) == (False, 9, 3)
        store.apply(puts("c"), 9, forward_only=True)
        store.apply(puts("d"), 10, forward_only=True)
        assert int(store.cursor()) == 10


def test_whether_a_cursor_goes_back_is_decided_with_all_before_it_in_its_group(path: Path):
    with foldlog.open(path) as store:
        futures = [
            store.apply_async([], number, forward_only=True) for number in (1, 5, 3, 6, 6, 2)
        ]
        refused = [isinstance(future.exception(10), CursorRegressed) for future in futures]
        assert refused == [False, False, True, False, False, True]
        assert int(store.cursor()) == 6
