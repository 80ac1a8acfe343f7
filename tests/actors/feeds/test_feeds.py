"""Watching: the state or changes since, one Synced, then each change once, in bounded memory."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from actor_kit import DEADLINE_S, FATAL, Steps, batch, cursor, in_thread, results, script, until
from feeds_kit import drained
from interrupts import At, Struck, strike

import foldlog
from foldlog import (
    AppendLogSnapshot,
    Changed,
    CursorExpired,
    Delete,
    FoldSnapshot,
    ForkedStore,
    Lagged,
    Purge,
    Put,
    Rewound,
    StoreClosed,
    Synced,
    Update,
    Watch,
    WatchCursor,
)
from foldlog.actors.base.mailbox import Mail
from foldlog.actors.feeds import ring as ring_module
from foldlog.actors.feeds import subscription
from foldlog.actors.feeds.bookmark import Bookmark
from foldlog.actors.feeds.feeds import Feeds
from foldlog.actors.feeds.ring import Group
from foldlog.actors.feeds.subscription import Subscription
from foldlog.actors.store.requests import WriteRequest
from foldlog.protocol.updates import encode_batch

ON_EACH_ENGINE = True

Open = Callable[..., foldlog.Store]


def following(watch: Watch, number: int) -> list[Any]:
    """Events up to and with the change of batch `number` that stands last in it."""
    events: list[Any] = []
    while not events or not (
        isinstance(events[-1], Changed) and events[-1].update.key == f"end/{number}"
    ):
        event = watch.next(DEADLINE_S)
        assert event is not None, (
            f"batch {number} was not told; {len(events)} events were, the last {events[-1:]}"
        )
        events.append(event)
    return events


def numbered(number: int) -> list[Update]:
    return [Put(f"k/{number % 7}", b"%d" % number), Put(f"end/{number}", b"")]


def applied(events: list[Any], state: dict[str, bytes] | None = None) -> dict[str, bytes]:
    """A subscriber's own copy, made of what it was told."""
    state = {} if state is None else state
    for event in events:
        if isinstance(event, Changed):
            if isinstance(event.update, Put):
                state[event.update.key] = event.update.value
            else:
                state.pop(event.update.key, None)
    return state


def waiting(bookmark: Bookmark) -> list[Group]:
    """The groups that `bookmark` keeps in memory."""
    groups, cell = [], bookmark.cell
    while isinstance(cell.content, Group):
        groups.append(cell.content)
        cell = cell.content.next
    return groups


def contents(store: Any, prefix: str = "") -> dict[str, bytes]:
    return {entry.key: entry.value for entry in store.range(prefix)}


# The start.


def test_the_state_comes_first_then_one_synced_then_changes_with_the_cursor_of_their_batch(
    open_store: Open,
):
    store = open_store()
    store.apply([Put("a", b"1"), Put("b", b"1")], cursor(1))
    watch = store.watch()
    store.apply([Put("a", b"2"), Delete("b"), Purge("c")], cursor(2))
    events = [watch.next(DEADLINE_S) for _ in range(6)]
    assert events == [
        Changed(Put("a", b"1"), cursor(1), 1),
        Changed(Put("b", b"1"), cursor(1), 1),
        Synced(cursor(1), 1),
        Changed(Put("a", b"2"), cursor(2), 2),
        Changed(Delete("b"), cursor(2), 2),
        Changed(Purge("c"), cursor(2), 2),
    ]
    assert watch.next(0.0) is None
    assert watch.ended is None


def test_synced_comes_also_when_nothing_matches_and_when_the_store_is_empty(open_store: Open):
    store = open_store()
    assert store.watch().next(DEADLINE_S) == Synced(WatchCursor.none(), 0)
    store.apply([Put("a", b"")], cursor(1))
    watch = store.watch("nothing/")
    assert watch.next(DEADLINE_S) == Synced(cursor(1), 1)
    store.apply([Put("a", b""), Put("nothing", b"")], cursor(2))
    assert watch.next(0.0) is None
    store.apply([Put("nothing/is", b"")], cursor(3))
    assert watch.next(DEADLINE_S) == Changed(Put("nothing/is", b""), cursor(3), 3)


def test_a_timeout_is_kept_while_other_keys_change_all_the_time(open_store: Open):
    """Found in review: each group that did not match began the time anew."""
    store = open_store()
    watch = store.watch("mine/")
    assert watch.next(DEADLINE_S) == Synced(WatchCursor.none(), 0)
    stop = threading.Event()

    def write() -> int:
        number = 0
        while not stop.is_set():
            number += 1
            store.apply([Put("other", b"")], cursor(number))
        return number

    writing = in_thread(write)
    try:
        assert results([in_thread(watch.next, 0.05)]) == [None]
    finally:
        stop.set()
    assert results([writing])[0] > 0


def test_since_a_cursor_tells_the_batches_behind_it_one_by_one(open_store: Open):
    store = open_store()
    for number in range(1, 6):
        store.apply([Put("k", b"%d" % number), Put("other", b"")], cursor(number))
    watch = store.watch("k", since=cursor(3))
    assert [watch.next(DEADLINE_S) for _ in range(3)] == [
        Changed(Put("k", b"4"), cursor(4), 4),
        Changed(Put("k", b"5"), cursor(5), 5),
        Synced(cursor(5), 5),
    ]
    assert store.watch(since=cursor(5)).next(DEADLINE_S) == Synced(cursor(5), 5)
    none = store.watch("k", since=WatchCursor.none())
    assert none.next(DEADLINE_S) == Changed(Put("k", b"5"), cursor(5), 5), (
        "the none-cursor asks for the state"
    )


@pytest.mark.append_log("RocksDB's past is in memory")
def test_since_a_cursor_from_before_the_last_compaction_is_expired_and_the_compaction_s_own_is_not(
    open_store: Open,
):
    store = open_store()
    for number in (1, 2, 3):
        store.apply(batch(number), cursor(number))
    store.compact()
    store.apply([Put("new", b"")], cursor(4))
    for gone in (1, 2, 99):
        with pytest.raises(CursorExpired):
            store.watch(since=cursor(gone))
    events = store.watch(since=cursor(3))
    assert [events.next(DEADLINE_S), events.next(DEADLINE_S)] == [
        Changed(Put("new", b""), cursor(4), 4),
        Synced(cursor(4), 4),
    ]
    assert not store._core.feeds.bookmarks[1:], "a watch that was refused is not fed"


def test_since_a_cursor_that_local_writes_left_in_place_tells_all_of_them(open_store: Open):
    store = open_store()
    store.apply([Put("a", b"")], cursor(1))
    store.put("local/1", b"1")
    store.put("local/2", b"2")
    watch = store.watch(since=cursor(1))
    assert [watch.next(DEADLINE_S).update.key for _ in range(2)] == ["local/1", "local/2"]
    assert watch.next(DEADLINE_S) == Synced(cursor(1), 3)


def test_since_a_snapshot_tells_the_exact_difference_deletes_and_compactions_included(
    open_store: Open,
):
    store = open_store()
    store.apply([Put("a", b"1"), Put("b", b"1"), Put("same", b"1")], cursor(1))
    held = store.snapshot()
    store.apply([Delete("a"), Put("b", b"2"), Put("passing", b"")], cursor(2))
    store.compact()
    store.apply([Delete("passing")], cursor(3))
    watch = store.watch(since=held)
    assert [watch.next(DEADLINE_S) for _ in range(3)] == [
        Changed(Delete("a"), cursor(3), 3),
        Changed(Put("b", b"2"), cursor(3), 3),
        Synced(cursor(3), 3),
    ]
    store.apply([Put("d", b"")], cursor(4))
    assert watch.next(DEADLINE_S) == Changed(Put("d", b""), cursor(4), 4)


@pytest.mark.parametrize("prefix", [None, 3, b"a"])
def test_a_prefix_that_is_no_text_is_refused(open_store: Open, prefix):
    with pytest.raises(TypeError):
        open_store().watch(prefix)


def test_a_since_that_is_neither_cursor_nor_snapshot_is_refused(open_store: Open):
    with pytest.raises(TypeError):
        open_store().watch(since="7")  # type: ignore[arg-type]


# Nothing lost, nothing twice.


def test_watches_that_begin_while_eight_threads_apply_see_every_change_once_and_in_order(
    open_store: Open,
):
    """Registering races with publishing: a watch's state plus its events equal the log."""
    store = open_store(sync="never")
    per_thread = 60
    started = threading.Barrier(8 + 4)

    def write(thread: int) -> None:
        started.wait(DEADLINE_S)
        for number in range(per_thread):
            store.apply(
                [Put(f"t{thread}/{number}", b""), Put("last", b"%d" % thread)],
                WatchCursor.from_u64(1),
            )

    def read() -> int:
        started.wait(DEADLINE_S)
        seen = 0
        while seen < 12 and len(store) < 8 * per_thread + 1:
            watch = store.watch()
            seen += 1
            watches.append(watch)
        return seen

    watches: list[Watch] = []
    results([in_thread(write, thread) for thread in range(8)] + [in_thread(read) for _ in range(4)])
    store.apply([Put("end", b"")], cursor(2))
    assert watches
    for watch in watches:
        state: dict[str, bytes] = {}
        seq = synced = 0
        keys: list[str] = []
        while True:
            event = watch.next(DEADLINE_S)
            assert not isinstance(event, Lagged)
            if isinstance(event, Synced):
                assert not synced, "once"
                seq = synced = event.seq
                assert len(keys) == len(set(keys)), "the state has each key once"
                keys = []
                continue
            assert isinstance(event, Changed)
            if synced:
                assert event.seq - seq in (0, 1), "in order, no batch missing, none twice"
                seq = event.seq
            keys.append(event.update.key)
            applied([event], state)
            if event.update.key == "end":
                break
        counted = [key for key in keys if key.startswith("t")]
        assert len(counted) == len(set(counted)) == 8 * per_thread - synced, (
            "each batch behind the state, once"
        )
        assert state == contents(store)


@pytest.mark.append_log("of the log's files")
def test_a_compaction_under_a_watch_is_not_heard_and_lets_go_of_the_old_file(open_store: Open):
    store = open_store()
    store.apply(numbered(1), cursor(1))
    store.compact()
    watch = store.watch()
    assert isinstance([watch.next(DEADLINE_S) for _ in range(3)][-1], Synced)
    store.apply(numbered(2), cursor(2))
    following(watch, 2)
    old_file = weakref.ref(store.snapshot().base.handle)
    store.compact()
    assert watch.next(0.0) is None
    gc.collect()
    until(lambda: old_file() is None, "the watch holds no descriptor of a file that is gone", 5.0)
    store.apply(numbered(3), cursor(3))
    assert [event.seq for event in following(watch, 3)] == [3, 3]


@pytest.mark.parametrize("error", FATAL)
@pytest.mark.parametrize(
    "step", ["writer.before_write", "writer.after_write", "writer.after_publish"]
)
def test_a_writer_that_dies_at_any_point_of_a_commit_costs_no_subscriber_a_change(
    open_store: Open, steps: Steps, step, error
):
    """Scenario: written but not yet told. The difference is told once the log has been replayed."""
    store = open_store()
    watch = store.watch()
    assert isinstance(watch.next(DEADLINE_S), Synced)
    store.apply(numbered(1), cursor(1))
    crash = steps.crash(step, error)
    store.apply(numbered(2), cursor(2))
    assert crash.happened.is_set()
    store.apply(numbered(3), cursor(3))
    events = following(watch, 3)
    assert [event.update.key for event in events if event.update.key.startswith("end/")] == [
        "end/1",
        "end/2",
        "end/3",
    ]
    assert applied(events) == contents(store)
    assert [event.seq for event in events] == [1, 1, 2, 2, 3, 3]


def test_what_was_written_and_never_told_is_told_at_the_restart_and_not_at_the_next_batch(
    open_store: Open, steps: Steps
):
    store = open_store()
    watch = store.watch()
    assert isinstance(watch.next(DEADLINE_S), Synced)
    steps.crash("writer.after_write")
    store.apply(numbered(1), cursor(1))
    assert applied([watch.next(DEADLINE_S), watch.next(DEADLINE_S)]) == contents(store)


@pytest.mark.parametrize("error", FATAL)
@pytest.mark.parametrize(
    "step", ["writer.before_write", "writer.after_write", "writer.after_publish"]
)
def test_a_writer_that_dies_at_any_point_of_a_rewind_says_once_that_the_state_went_back(
    open_store: Open, steps: Steps, step, error
):
    """Found in review: a writer that died between writing a mirror's reset and telling of it told
    the difference after its restart, but no Rewound."""
    store = open_store()
    watch = store.watch()
    assert isinstance(watch.next(DEADLINE_S), Synced)
    store.apply([Put("old", b"1")], cursor(5))
    crash = steps.crash(step, error)
    reset = WriteRequest(encode_batch([Delete("old"), Put("new", b"2")], cursor(1)), "as told")
    store._offer(Mail(reset), DEADLINE_S)
    assert reset.future.result(DEADLINE_S) == 2
    assert crash.happened.is_set()
    store.apply(numbered(3), cursor(3))
    events = following(watch, 3)
    assert [event.reason for event in events if isinstance(event, Rewound)] == ["as told"]
    assert applied(events) == contents(store)


# Slow subscribers.


def test_one_that_falls_behind_is_told_so_and_then_the_exact_difference(
    open_store: Open, monkeypatch
):
    """Scenario 76."""
    monkeypatch.setattr(ring_module, "RING_GROUPS", 10)
    store = open_store()
    store.apply([Put("stays", b""), Put("goes", b"")], cursor(1))
    watch = store.watch()
    begun = [watch.next(DEADLINE_S) for _ in range(3)]
    for number in range(2, 40):
        store.apply(
            [
                Put("k", b"%d" % number),
                Put(f"passing/{number}", b""),
                Delete(f"passing/{number - 1}"),
            ],
            cursor(number),
        )
    store.apply([Delete("goes"), *numbered(40)], cursor(40))
    events = [watch.next(DEADLINE_S)]
    assert isinstance(events[0], Lagged)
    assert events[0].cursor == cursor(1)
    assert events[0].batches == 39, "all that was published since"
    while not isinstance(events[-1], Synced):
        events.append(watch.next(DEADLINE_S))
    assert len([event for event in events if isinstance(event, Lagged)]) == 1
    assert len([event for event in events if isinstance(event, Synced)]) == 1
    assert applied(events, applied(begun)) == contents(store)
    assert Changed(Put("stays", b""), cursor(1), 1) not in events, "what did not change is not told"
    store.apply(numbered(41), cursor(41))
    assert [event.seq for event in following(watch, 41)] == [41, 41], "then changes as they come"


@pytest.mark.parametrize(
    ("bound", "most"), [("RING_GROUPS", 8), ("RING_UPDATES", 16), ("RING_BYTES", 200)]
)
def test_what_waits_for_a_subscriber_is_bounded_in_groups_updates_and_bytes(
    open_store: Open, monkeypatch, bound, most
):
    monkeypatch.setattr(ring_module, bound, most)
    store = open_store()
    watch = store.watch()
    bookmark = watch._subscription.bookmark
    held = 0
    for number in range(1, 60):
        store.apply(numbered(number), cursor(number))
        held = max(held, len(bookmark))
        assert len(bookmark) <= most
        groups = waiting(bookmark)
        assert len(groups) <= most
        assert sum(group.updates for group in groups) <= ring_module.RING_UPDATES
        assert sum(group.size for group in groups) <= ring_module.RING_BYTES
    assert held > 1, "it did hold something"
    events = drained(watch._subscription)
    assert any(isinstance(event, Lagged) for event in events)
    assert applied(events) == contents(store)


def test_one_batch_over_the_bounds_is_told_as_it_is_to_who_keeps_up(open_store: Open, monkeypatch):
    monkeypatch.setattr(ring_module, "RING_UPDATES", 4)
    store = open_store()
    watch = store.watch()
    assert isinstance(watch.next(DEADLINE_S), Synced)
    store.apply([*(Put(f"k{number}", b"") for number in range(50)), *numbered(1)], cursor(1))
    events = following(watch, 1)
    assert all(isinstance(event, Changed) for event in events)
    assert len(events) == 52


@pytest.mark.append_log("RocksDB's snapshots end")
def test_a_lag_that_ends_with_the_store_is_still_told(open_store: Open, monkeypatch):
    """Found in review: the difference was asked of the store, which was closed by then."""
    monkeypatch.setattr(ring_module, "RING_GROUPS", 4)
    store = open_store()
    watch = store.watch()
    for number in range(1, 20):
        store.apply(numbered(number), cursor(number))
    want = contents(store)
    store.close()
    events = list(watch)
    assert any(isinstance(event, Lagged) for event in events)
    assert applied(events) == want
    assert watch.ended is not None
    assert "closed" in watch.ended


def test_applying_is_not_held_up_by_a_subscriber_that_never_reads(open_store: Open):
    store = open_store(sync="never")
    watches = [store.watch() for _ in range(20)]
    for number in range(1, 300):
        store.apply(numbered(number), cursor(number), timeout_s=DEADLINE_S)
    assert [len(watch._subscription.bookmark) for watch in watches] == [299] * 20


# Ending.


@pytest.mark.append_log("RocksDB's snapshots end")
def test_a_watch_ends_with_its_store_after_all_that_was_told(open_store: Open):
    store = open_store()
    watch = store.watch()
    store.apply(numbered(1), cursor(1))
    store.close()
    assert [type(event) for event in watch] == [Synced, Changed, Changed]
    assert list(watch) == []
    assert watch.next(DEADLINE_S) is None
    assert watch.ended == f"{store.path} was closed"
    with pytest.raises(StoreClosed):
        store.watch()


def test_a_watch_that_waits_is_let_go_by_closing_it_or_its_store(open_store: Open):
    store = open_store()
    first, second = store.watch(), store.watch()
    waiting = [in_thread(list, watch) for watch in (first, second)]
    store.apply([Put("a", b"")], cursor(1))
    first.close()
    assert len(results(waiting[:1])[0]) <= 2
    store.close()
    assert [type(event) for event in results(waiting[1:])[0]] == [Synced, Changed]
    assert first.ended == "closed by its subscriber"


def test_a_closed_watch_tells_nothing_more_and_is_not_fed(open_store: Open):
    store = open_store()
    with store.watch() as watch:
        store.apply([Put("a", b"")], cursor(1))
        assert store._core.feeds.wanted
    assert not store._core.feeds.wanted
    store.apply([Put("a", b"")], cursor(2))
    assert list(watch) == []
    assert len(watch._subscription.bookmark) == 0
    watch.close()


def test_a_watch_that_is_dropped_is_not_fed_any_more_at_once(open_store: Open):
    store = open_store()
    gc.disable()  # no cycle may keep it
    try:
        watch = store.watch()
        assert isinstance(watch.next(DEADLINE_S), Synced)
        assert store._core.feeds.wanted
        del watch
        assert not store._core.feeds.wanted
    finally:
        gc.enable()


def test_a_loop_over_a_watch_may_apply_and_close_the_store(open_store: Open):
    """Scenario 77."""
    store = open_store()

    def run() -> list[str]:
        keys = []
        for event in store.watch("k/"):
            if isinstance(event, Changed):
                keys.append(event.update.key)
                if len(keys) == 5:
                    store.close()
                    continue
            if len(keys) < 5:
                store.apply([Put(f"k/{len(keys)}", b"")], cursor(len(keys) + 1))
        return keys

    assert results([in_thread(run)]) == [[f"k/{number}" for number in range(5)]]


def test_a_watch_keeps_its_store_open_and_a_dropped_store_ends_it(path: Path, nothing_left):
    watch = foldlog.open(path).watch()
    gc.collect()
    assert isinstance(watch.next(DEADLINE_S), Synced)
    store = watch._owner
    assert isinstance(store, foldlog.Store)
    store.apply([Put("a", b"")], cursor(1))
    assert isinstance(watch.next(DEADLINE_S), Changed)
    with pytest.warns(ResourceWarning):  # noqa: PT031 - the last reference goes with the `del`
        del watch, store
        gc.collect()


def test_a_watch_over_a_file_that_was_overwritten_ends_with_the_error(
    path: Path, nothing_left, tmp_path: Path
):
    """A follower's subscriber whose old state is unreadable is told so once, and never a guess."""
    with AppendLogSnapshot.open(path)[1] as snap:
        snap.apply([Put(f"k{number}", b"old") for number in range(600)], cursor(1))
        snap.compact()
    with AppendLogSnapshot.open(tmp_path / "other.log")[1] as snap:
        snap.apply([Put(f"k{number}", b"new") for number in range(700)], cursor(1))
        snap.compact()
    with foldlog.follow(path, poll_interval_s=0.01) as follower:
        watch = follower.watch("k5")
        while not isinstance(watch.next(DEADLINE_S), Synced):
            pass
        path.write_bytes((tmp_path / "other.log").read_bytes())
        until(lambda: follower.stats().reloads, "it was read anew")
        assert isinstance(watch.next(DEADLINE_S), foldlog.Rewound)
        with pytest.raises(foldlog.CorruptLogError):
            watch.next(DEADLINE_S)
        assert list(watch) == []
        assert watch.ended is not None
        assert "cannot be told" in watch.ended
        assert follower.get("k5").value == b"new"


@pytest.mark.append_log("RocksDB is not read in a fork")
def test_a_forked_child_reads_and_is_refused_a_watch_and_one_from_before_ends_there(path: Path):
    result = script(
        """
        import os, sys, foldlog
        from foldlog import ForkedStore, Put, Synced, WatchCursor
        store = foldlog.open(sys.argv[1])
        store.apply([Put("a", b"1")], WatchCursor.from_u64(1))
        watch = store.watch("nothing")
        assert isinstance(watch.next(5), Synced)
        child = os.fork()
        if child == 0:
            try:
                assert store.get("a").value == b"1"
                assert list(watch) == [] and "forked" in watch.ended, watch.ended
                for refused in (store.watch, lambda: store.subscribe(None)):
                    try:
                        refused()
                    except ForkedStore:
                        continue
                    os._exit(3)
                with foldlog.follow(sys.argv[1]) as follower:
                    assert follower.get("a").value == b"1"
            except BaseException as error:
                print(repr(error), flush=True)
                os._exit(2)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        store.apply([Put("nothing/b", b"2")], WatchCursor.from_u64(2))
        assert watch.next(5).update.key == "nothing/b"
        store.close()
        print("status", status)
        """,
        path,
    )
    assert (result.stdout, result.stderr) == ("status 0\n", "")
    assert issubclass(ForkedStore, foldlog.FoldlogError)


# Groups in an order that only a race makes: by hand.


class Commits:
    """Eight states; their batches are published when, and in the order that, the test says."""

    def __init__(self) -> None:
        self.feeds = Feeds()
        self.folds, self.batches = [FoldSnapshot.empty()], [encode_batch([], cursor(0))]
        for number in range(1, 8):
            updates = [Put("a", b"%d" % number), Put(f"n/{number}", b"")]
            self.batches.append(encode_batch(updates, cursor(number)))
            self.folds.append(self.folds[-1].with_group(self.batches[-1:]))

    def publish(self, first: int, last: int | None = None) -> None:
        last = first if last is None else last
        self.feeds.publish(self.folds[last], first, self.batches[first : last + 1], 10)

    def subscribe(self, current: Callable[[], FoldSnapshot], prefix: str = "") -> Subscription:
        return Subscription(self.feeds, current, prefix, None)


@pytest.fixture
def publisher() -> Commits:
    return Commits()


def test_what_was_published_before_the_state_that_a_watch_begins_with_is_not_told_again(
    publisher: Commits,
):
    def current() -> FoldSnapshot:
        publisher.publish(5)
        publisher.feeds.jump(publisher.folds[4])  # a writer's restart, say, told late
        return publisher.folds[6]

    subscription = publisher.subscribe(current)
    assert [event.seq for event in drained(subscription)] == [6] * 8, "seven entries and Synced"
    publisher.publish(6)
    publisher.publish(7)
    assert [event.seq for event in drained(subscription)] == [7, 7]


def test_what_came_before_a_rewind_is_not_told_to_a_watch_that_begins_behind_it(
    publisher: Commits,
):
    """Published, rewound, then read: the state is the older one; newer events are obsolete."""

    def current() -> FoldSnapshot:
        publisher.publish(5)
        publisher.feeds.jump(publisher.folds[2], "rewound")
        return publisher.folds[2]

    subscription = publisher.subscribe(current)
    assert [event.seq for event in drained(subscription)] == [2] * 4, "three entries and Synced"
    publisher.publish(3)
    assert [event.seq for event in drained(subscription)] == [3, 3]


def test_a_group_that_went_missing_is_made_up_for_by_the_difference(publisher: Commits):
    subscription = publisher.subscribe(lambda: publisher.folds[2])
    drained(subscription)
    publisher.publish(5)
    events = drained(subscription)
    assert [event.update.key for event in events] == ["a", "n/3", "n/4", "n/5"]
    publisher.publish(4, 6)
    assert [event.update.key for event in drained(subscription)] == ["a", "n/6"], (
        "of a group, what is new"
    )


def test_all_that_waits_is_told_to_a_call_that_does_not_wait(publisher: Commits):
    """Found in review: a group with no match used up a call with no timeout.

    A later group matched.
    """
    subscription = publisher.subscribe(lambda: publisher.folds[0], "n/6")
    drained(subscription)
    for number in range(1, 8):
        publisher.publish(number)
    event = subscription.next(0.0)
    assert isinstance(event, Changed)
    assert event.update.key == "n/6"


def test_a_call_that_does_not_wait_ends_though_the_publisher_is_faster_than_it(
    publisher: Commits, monkeypatch
):
    subscription = publisher.subscribe(lambda: publisher.folds[0], "nothing")
    drained(subscription)
    publisher.publish(1)
    first, taken = subscription.bookmark.first, []

    def taking() -> Any:
        taken.append(first())
        if len(taken) < 6:
            publisher.publish(1 + len(taken))
        return taken[-1]

    monkeypatch.setattr(subscription.bookmark, "first", taking)
    assert subscription.next(0.0) is None
    assert len(taken) == 1


def test_a_read_that_comes_as_another_ends_has_its_turn(open_store: Open, monkeypatch):
    """It saw that the read before it was over, removed the first in the line, and that was itself:
    an IndexError."""
    store = open_store()
    watch = store.watch()
    really_over = subscription.is_over

    def is_over(frame: object) -> bool:
        monkeypatch.setattr(subscription, "is_over", really_over)
        store.put("k", b"1")
        assert first.result(DEADLINE_S).update.key == "k"
        return really_over(frame)

    while watch.next(0.0) is not None:
        pass
    first = in_thread(lambda: watch.next(DEADLINE_S))
    until(lambda: watch._subscription._line, "the first read")
    monkeypatch.setattr(subscription, "is_over", is_over)
    assert watch.next(0.0) is None
    assert watch.ended is None


def test_in_a_forked_child_a_watch_that_another_thread_was_reading_has_ended(open_store: Open):
    """The frame of a thread that is not there seemed to read still: ReentrantCall."""
    watch = open_store().watch()
    assert isinstance(watch.next(DEADLINE_S), Synced)
    reader = in_thread(watch.next, DEADLINE_S)
    until(lambda: watch._subscription.bookmark._spot is not None, "it is being read")
    child = os.fork()
    if not child:
        try:
            ended = watch.next(DEADLINE_S) is None and "forked" in (watch.ended or "")
        finally:
            os._exit(0 if ended else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    watch.close()
    assert results([reader]) == [None]


def test_a_watch_that_is_closed_while_a_part_of_it_is_made_keeps_no_state(publisher: Commits):
    """The reader noted where it was after the closing thread had let go of that."""
    subscription = publisher.subscribe(lambda: publisher.folds[0])
    assert isinstance(subscription.next(0.0), Synced)
    publisher.publish(1)
    bookmark = subscription.bookmark
    first = bookmark.first

    def close_meanwhile() -> Any:
        source = first()
        subscription.close()
        return source

    bookmark.first = close_meanwhile  # type: ignore[method-assign]
    subscription.next(0.0)
    assert subscription.next(0.0) is None
    assert subscription._part is None
    assert subscription._at is None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_watch_whose_beginning_is_interrupted_anywhere_is_not_fed(open_store: Open):
    """Between the subscription and its watch, nobody was there to end it: the store kept groups for
    it until it was closed."""
    store = open_store()
    store.apply([Put("a", b"1")], cursor(1))
    number = 0
    while True:
        number += 1
        at = At(number, strike)
        with contextlib.suppress(Struck):
            at.run(store.watch)
        if store._core.feeds.bookmarks:
            gc.collect()  # the error's frames
        assert not store._core.feeds.bookmarks, f"after point {number}"
        if not at.fired:
            break
    assert number > 30
