"""Following another process's log: states, waits, lost and spurious events, forks, cleanup."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from actor_kit import DEADLINE_S, batch, cursor, in_thread, results, script, threads, until
from watchdog.events import FileModifiedEvent

import foldlog
from foldlog import (
    AppendLogSnapshot,
    Changed,
    CorruptLogError,
    FollowerState,
    InvalidFormatError,
    Put,
    RequestTimeout,
    Rewound,
    StoreClosed,
    Synced,
    WatchCursor,
)
from foldlog.actors.following import filewatch
from foldlog.actors.following import follower as follower_module
from foldlog.actors.following.filewatch import FileWatch

Open = Callable[..., foldlog.Store]
Follow = Callable[..., foldlog.Follower]


@pytest.fixture
def follow(nothing_left: None, path: Path) -> Iterator[Follow]:
    """foldlog.follow on the test's path, closed after the test.

    None of its threads or of watchdog's may remain.
    """
    before = set(threading.enumerate())
    followers: list[foldlog.Follower] = []

    def follow(of: Path = path, **options: Any) -> foldlog.Follower:
        followers.append(foldlog.follow(of, **options))
        return followers[-1]

    yield follow
    while followers:
        followers.pop().close()
    until(
        lambda: (
            not [
                thread
                for thread in set(threading.enumerate()) - before
                if "foldlog" not in thread.name
            ]
        ),
        "they ended",
    )


def state_of(follower: foldlog.Follower, state: FollowerState) -> foldlog.Follower:
    until(lambda: follower.state is state, f"the state is {state}")
    return follower


# Reading.


def test_what_stands_in_the_log_is_there_on_return_and_what_is_appended_follows(
    follow: Follow, open_store: Open
):
    store = open_store()
    for number in range(1, 4):
        store.apply(batch(number), cursor(number))
    follower = follow()
    assert follower.cursor() == cursor(3)
    assert follower.range() == store.range()
    store.apply(batch(4), cursor(4))
    follower.wait_for(cursor(4), DEADLINE_S)
    assert follower.range("shared/") == store.range("shared/")
    assert follower.get("batch/000004") == store.get("batch/000004")
    assert len(follower) == len(store)
    assert "batch/000004" in follower
    seen: list[Any] = []
    follower.for_each_in_range("shared/", seen.append)
    assert seen == store.range("shared/")
    assert follower.snapshot().seq == 4
    stats = follower.stats()
    assert (stats.state, stats.seq, stats.cursor) == ("following", 4, cursor(4))
    assert (stats.entries, stats.reloads) == (len(store), 0)
    assert str(store.path) in repr(follower)


def test_waiting_for_a_cursor_ends_with_it_with_the_time_or_with_the_follower(
    follow: Follow, open_store: Open
):
    store = open_store()
    follower = follow()
    follower.wait_for(WatchCursor.none(), 0.0)
    with pytest.raises(RequestTimeout):
        follower.wait_for(cursor(5), 0.01)
    with pytest.raises(TypeError):
        follower.wait_for("5", 1.0)  # type: ignore[arg-type]
    waiting = in_thread(follower.wait_for, cursor(5), DEADLINE_S)
    store.apply([], cursor(4))
    store.apply([], cursor(6))
    assert results([waiting]) == [None], "a later one will do: tokens of one length are ordered"
    waiting = in_thread(follower.wait_for, cursor(99), DEADLINE_S)
    follower.close()
    with pytest.raises(StoreClosed):
        results([waiting])


def test_who_waits_for_a_log_is_refused_at_once_when_a_directory_takes_its_name(
    follow: Follow, open_store: Open, path: Path
):
    """A RocksDB store appeared under the name: who waited for it got a timeout, much later."""
    follower = follow()

    async def wait_on_a_loop() -> None:
        await foldlog.aio.AsyncFollower(follower).wait_for(cursor(1), DEADLINE_S)

    waiting = [
        in_thread(follower.wait_for, cursor(1), DEADLINE_S),
        in_thread(asyncio.run, wait_on_a_loop()),
    ]
    path.mkdir()
    for waits in waiting:
        with pytest.raises(InvalidFormatError, match="only logs are followed"):
            results([waits])
    assert state_of(follower, FollowerState.FAILED).health().status == "degraded"
    follower.wait_for(seq=0, timeout_s=0.0)
    path.rmdir()
    state_of(follower, FollowerState.WAITING)
    store = open_store()
    store.put("k", b"1")
    follower.wait_for(seq=1, timeout_s=DEADLINE_S)


def test_a_compaction_is_followed_without_a_reload(follow: Follow, open_store: Open):
    store = open_store()
    follower = follow()
    watch = follower.watch()
    assert isinstance(watch.next(DEADLINE_S), Synced)
    for number in range(1, 30):
        store.apply([Put("k", b"%d" % number)], cursor(number))
        if number % 7 == 0:
            follower.wait_for(cursor(number), DEADLINE_S)  # else it may have to reload
            store.compact()
    events = [watch.next(DEADLINE_S) for _ in range(29)]
    assert [event.seq for event in events] == list(range(1, 30))
    follower.wait_for(cursor(29), DEADLINE_S)
    assert follower.stats().reloads == 0
    assert follower.range() == store.range()


def test_since_works_on_a_follower_as_on_a_store(follow: Follow, open_store: Open):
    store = open_store()
    store.apply([Put("a", b"1"), Put("b", b"1")], cursor(1))
    store.apply([Put("a", b"2")], cursor(2))
    follower = follow()
    watch = follower.watch(since=cursor(1))
    assert [watch.next(DEADLINE_S), watch.next(DEADLINE_S)] == [
        Changed(Put("a", b"2"), cursor(2), 2),
        Synced(cursor(2), 2),
    ]
    held = follower.snapshot()
    store.compact()
    store.apply([foldlog.Delete("b")], cursor(3))
    follower.wait_for(cursor(3), DEADLINE_S)
    with pytest.raises(foldlog.CursorExpired):
        follower.watch(since=cursor(1))
    assert follower.watch(since=held).next(DEADLINE_S) == Changed(foldlog.Delete("b"), cursor(3), 3)


@pytest.mark.parametrize("interval", [0, -1])
def test_a_poll_interval_that_is_none_is_refused(path: Path, interval):
    with pytest.raises(ValueError, match="poll_interval_s"):
        foldlog.follow(path, poll_interval_s=interval)


def test_a_log_that_does_not_read_is_refused_at_once_and_leaves_nothing_behind(
    follow: Follow, path: Path
):
    path.write_bytes(
        b"no log at all, and longer than a header needs to be, too, so that only the magic is wrong"
    )
    with pytest.raises(InvalidFormatError):
        follow()
    path.unlink()
    with AppendLogSnapshot.open(path)[1] as snap:
        snap.apply([Put("a", b"1" * 100)], cursor(1))
        size = path.stat().st_size
    data = bytearray(path.read_bytes())
    data[size - 40] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptLogError):
        follow()


def test_a_log_that_takes_too_long_to_read_is_given_up_and_leaves_nothing_behind(
    follow: Follow, path: Path
):
    """Beside a writer at full speed, opening took 5 to 9 s, and nothing could bound it."""
    with AppendLogSnapshot.open(path)[1] as snap:
        for number in range(200):
            snap.apply([Put(f"k{number}", b"")], cursor(number + 1))
    with pytest.raises(RequestTimeout, match="bytes were read in time"):
        follow(timeout_s=0.0)
    with pytest.raises(ValueError, match="timeout_s"):
        follow(timeout_s=-1.0)
    assert len(follow(timeout_s=DEADLINE_S)) == 200


# States.


def test_it_waits_for_a_log_follows_it_misses_it_and_follows_it_again(
    follow: Follow, open_store: Open, path: Path
):
    follower = follow()
    assert follower.state is FollowerState.WAITING
    assert len(follower) == 0
    store = open_store()
    state_of(follower, FollowerState.FOLLOWING)
    store.apply(batch(1), cursor(1))
    follower.wait_for(cursor(1), DEADLINE_S)
    store.close()
    path.rename(path.parent / "aside")
    state_of(follower, FollowerState.MISSING)
    assert follower.get("shared/0").value == b"1"
    (path.parent / "aside").rename(path)
    state_of(follower, FollowerState.FOLLOWING)
    assert follower.stats().reloads == 0


def test_a_log_that_its_writer_writes_anew_after_a_deletion_is_followed_on(
    follow: Follow, open_store: Open, path: Path
):
    store = open_store()
    store.apply(batch(1), cursor(1))
    follower = follow()
    path.unlink()
    store.apply(batch(2), cursor(2))
    follower.wait_for(cursor(2), DEADLINE_S)
    state_of(follower, FollowerState.FOLLOWING)
    assert follower.range() == store.range()
    assert follower.stats().reloads == 0


def test_a_step_that_could_not_be_told_is_told_with_the_next_poll(
    follow: Follow, open_store: Open, path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The log had been read, and there was no memory to tell of it: subscribers heard nothing, and
    after a rewind their state was wrong from then on, without a word."""
    store = open_store()
    store.apply([Put("a", b"1")], cursor(1))
    follower = follow(poll_interval_s=0.05)
    watch = follower.watch()
    assert [type(watch.next(DEADLINE_S)) for _ in range(2)] == [Changed, Synced]
    feeds = follower._thread.feeds
    for name, kinds, change in (
        ("publish", [Changed], lambda: store.apply([Put("a", b"2")], cursor(2))),
        ("jump", [Rewound, Changed, Synced], lambda: replace_by_another_log(path)),
    ):
        tell = getattr(feeds, name)
        failed = threading.Event()

        def fail_once(*arguments: Any, tell: Any = tell, failed: Any = failed) -> None:
            if not failed.is_set():
                failed.set()
                raise MemoryError
            tell(*arguments)

        monkeypatch.setattr(feeds, name, fail_once)
        change()
        assert [type(watch.next(DEADLINE_S)) for _ in kinds] in (kinds, [*kinds, Synced])
        assert failed.is_set()


def replace_by_another_log(path: Path) -> None:
    with AppendLogSnapshot.open(path.parent / "other.log")[1] as snap:
        snap.apply([Put("b", b"1"), Put("a", b"2")], cursor(1))
    os.replace(path.parent / "other.log", path)


def test_another_log_under_the_name_is_told_followed_and_reported(
    follow: Follow, path: Path, caplog
):
    caplog.set_level(logging.WARNING, "foldlog")
    with AppendLogSnapshot.open(path)[1] as snap:
        snap.apply([Put("a", b"1"), Put("both", b"1")], cursor(9))
    follower = follow()
    watch = follower.watch()
    assert [type(watch.next(DEADLINE_S)) for _ in range(3)] == [Changed, Changed, Synced]
    with AppendLogSnapshot.open(path.parent / "other.log")[1] as snap:
        snap.apply([Put("b", b"1"), Put("both", b"1")], cursor(1))
    os.replace(path.parent / "other.log", path)
    assert watch.next(DEADLINE_S) == Rewound("the log was replaced by another")
    assert [watch.next(DEADLINE_S).update for _ in range(2)] == [
        foldlog.Delete("a"),
        Put("b", b"1"),
    ]
    assert watch.next(DEADLINE_S) == Synced(cursor(1), 1)
    assert follower.cursor() == cursor(1)
    state_of(follower, FollowerState.REPLACED)
    assert "replaced" in follower.stats().reason
    assert [record.message for record in caplog.records if "replaced" in record.message]


def test_a_log_that_stops_to_read_is_reported_served_from_memory_and_taken_up_again(
    follow: Follow, path: Path
):
    with AppendLogSnapshot.open(path)[1] as snap:
        snap.apply([Put("a", b"1")], cursor(1))
    follower = follow()
    shutil.copy(path, path.parent / "good")
    (path.parent / "junk").write_bytes(b"junk")
    os.replace(path.parent / "junk", path)
    state_of(follower, FollowerState.FAILED)
    assert "not a foldlog log" in follower.stats().reason
    assert follower.cursor() == cursor(1)
    os.replace(path.parent / "good", path)
    state_of(follower, FollowerState.FOLLOWING)
    assert follower.stats().reason == ""


def test_a_bug_in_following_ends_neither_the_thread_nor_the_reads(
    follow: Follow, open_store: Open, monkeypatch
):
    store = open_store()
    store.apply(batch(1), cursor(1))
    follower = follow()
    failed = threading.Event()

    def broken() -> Any:
        failed.set()
        raise RuntimeError("injected")

    # Undone here: `monkeypatch` may outlive the look for open files, and would hold the tail.
    with monkeypatch.context() as patch:
        patch.setattr(follower._thread._tail, "poll", broken)
        follower._thread.woken.set()
        assert failed.wait(DEADLINE_S)  # so that no poll from before is under way any more
        store.apply(batch(2), cursor(2))
        state_of(follower, FollowerState.FAILED)
        assert follower.cursor() == cursor(1)
    follower.wait_for(cursor(2), DEADLINE_S)
    state_of(follower, FollowerState.FOLLOWING)


# Events, and none.


class SilentObserver:
    """Starts, runs, and never reports an event: a network file system, or a full queue."""

    made = 0

    def __init__(self) -> None:
        type(self).made += 1
        self.alive = False

    def schedule(self, *arguments: Any, **options: Any) -> None:
        pass

    def start(self) -> None:
        self.alive = True

    def stop(self) -> None:
        self.alive = False

    def is_alive(self) -> bool:
        return self.alive

    def join(self, timeout: float | None = None) -> None:
        pass


class NoObserver:
    def __init__(self) -> None:
        raise OSError(24, "inotify instance limit reached")


@pytest.mark.parametrize("observer", [SilentObserver, NoObserver])
def test_the_poll_finds_what_no_event_tells_of(
    follow: Follow, open_store: Open, monkeypatch, caplog, observer
):
    """Scenarios 61 and 89: missed events, and watches that cannot be set up, reported once."""
    caplog.set_level(logging.INFO, "foldlog")
    store = open_store()
    monkeypatch.setattr(
        follower_module, "FileWatch", lambda *given: FileWatch(*given, observer=observer)
    )
    follower = follow(poll_interval_s=0.01)
    watch = follower.watch("shared/0")
    assert isinstance(watch.next(DEADLINE_S), Synced)
    for number in range(1, 6):
        store.apply(batch(number), cursor(number))
        if number == 3:
            store.compact()
        assert watch.next(DEADLINE_S).cursor == cursor(number)
    said = [record for record in caplog.records if "polling only" in record.message]
    assert len(said) == (observer is NoObserver)
    assert follower._thread._watch.active == (observer is SilentObserver)


def test_a_handler_that_raises_does_not_silence_the_events(path: Path, nothing_left):
    """Scenario 89: watchdog's dispatcher ends for good on an exception."""
    woken = threading.Semaphore(0)

    def wake() -> None:
        woken.release()
        raise RuntimeError("injected")

    watch = FileWatch(path, [FileModifiedEvent], wake)
    try:
        path.write_bytes(b"")
        for _ in range(3):
            with path.open("ab") as file:
                file.write(b"x")
            assert woken.acquire(timeout=DEADLINE_S)
    finally:
        watch.stop()


def test_reading_a_log_does_not_wake_those_who_follow_it(path: Path, nothing_left):
    """Scenario 90: opening, reading and closing are events, too.

    A follower would wake itself for ever.
    """
    wakes: list[int] = []
    woken = threading.Event()
    path.write_bytes(b"start")
    with AppendLogSnapshot.open(path.parent / "neighbour.log")[1] as snap:
        watch = FileWatch(path, follower_module.EVENTS, lambda: (wakes.append(1), woken.set()))
        try:
            for _ in range(50):
                path.read_bytes()
                snap.apply([Put("a", b"")], cursor(1))
            path.write_bytes(b"end")
            assert woken.wait(DEADLINE_S)
            assert len(wakes) <= 3, "of the last write, which cuts and writes; events come in order"
        finally:
            watch.stop()


def test_a_folder_that_was_removed_and_made_again_has_events_again(
    follow: Follow, path: Path, tmp_path: Path
):
    """Scenario 89: the old directory's watch stays silent. The first poll with news renews it."""
    with AppendLogSnapshot.open(path)[1] as snap:
        snap.apply([Put("a", b"1")], cursor(1))
    follower = follow(poll_interval_s=0.01)
    old = follower._thread._watch._folder
    path.parent.rename(tmp_path / "aside")
    state_of(follower, FollowerState.MISSING)
    path.parent.mkdir()
    with AppendLogSnapshot.open(path)[1] as snap:
        snap.apply([Put("a", b"2")], cursor(2))
        follower.wait_for(cursor(2), DEADLINE_S)
        until(
            lambda: follower._thread._watch._folder not in (old, None), "the new folder is watched"
        )
        follower._thread._poll_interval_s = 1000.0
        snap.apply([Put("a", b"3")], cursor(3))
        until(lambda: follower.cursor() == cursor(3), "an event wakes it")


def test_a_watch_that_could_not_be_had_is_tried_again_later_and_not_all_the_time(
    path: Path, monkeypatch
):
    monkeypatch.setattr(SilentObserver, "made", 0)
    watch = FileWatch(path, [FileModifiedEvent], lambda: None, observer=NoObserver)
    watch._make_observer = SilentObserver
    for _ in range(5):
        watch.refresh()
    assert SilentObserver.made == 0
    monkeypatch.setattr(filewatch, "RETRY_S", 0.0)
    watch._retry_at = 0.0
    for _ in range(5):
        watch.refresh()
    assert SilentObserver.made == 1
    assert watch.active
    watch.stop()


def test_what_is_written_before_the_events_are_asked_for_is_found_at_once(
    follow: Follow, open_store: Open, monkeypatch
):
    """Between the first poll, on the caller's thread, and the watch, nothing listens."""
    store = open_store()

    def late_watch(*given: Any) -> FileWatch:
        store.apply(batch(1), cursor(1))
        return FileWatch(*given, observer=SilentObserver)

    monkeypatch.setattr(follower_module, "FileWatch", late_watch)
    follower = follow(poll_interval_s=1000.0)
    until(lambda: follower.cursor() == cursor(1), "it looks once more")


def test_waiting_for_a_cursor_looks_at_the_log_at_once(
    follow: Follow, open_store: Open, monkeypatch
):
    store = open_store()
    monkeypatch.setattr(
        follower_module, "FileWatch", lambda *given: FileWatch(*given, observer=SilentObserver)
    )
    follower = follow(poll_interval_s=1000.0)
    store.apply(batch(1), cursor(1))
    follower.wait_for(cursor(1), DEADLINE_S)


def test_a_busy_log_is_polled_and_a_quiet_one_has_events_again(
    follow: Follow, open_store: Open, monkeypatch
):
    monkeypatch.setattr(follower_module, "BUSY_BATCHES", 4)
    store = open_store(sync="never")
    follower = follow(poll_interval_s=1000.0)
    number = 0
    while not follower._thread.busy:
        number += 1
        assert number < 100_000
        store.apply([Put("k", b"%d" % number)], cursor(number))
    until(lambda: follower.cursor() == cursor(number), "polled")
    until(lambda: not follower._thread.busy, "it is quiet")
    until(lambda: follower._thread._watch.active, "and has events")
    store.apply([Put("k", b"")], cursor(number + 1))
    until(lambda: follower.cursor() == cursor(number + 1), "an event wakes it")


# Ending, and what is left.


def test_closing_ends_watches_threads_and_reads_and_is_done_twice_without_harm(
    follow: Follow, open_store: Open
):
    store = open_store()
    store.apply(batch(1), cursor(1))
    follower = follow()
    watch, held = follower.watch(), follower.snapshot()
    follower.close()
    follower.close()
    assert [type(event) for event in watch][-1] is Synced
    assert follower.state is FollowerState.CLOSED
    for read in ("cursor", "range", "snapshot", "watch", "stats"):
        with pytest.raises(StoreClosed):
            getattr(follower, read)()
    assert held.get("shared/0").value == b"1"
    with follow() as other:
        assert len(other) == len(store)
    assert other.state is FollowerState.CLOSED


def test_it_may_be_closed_out_of_its_own_watch(follow: Follow, open_store: Open):
    store = open_store()
    follower = follow()

    def run() -> int:
        told = 0
        for event in follower.watch():
            told += isinstance(event, Changed)
            if isinstance(event, Changed):
                follower.close()
        return told

    running = in_thread(run)
    store.apply([Put("a", b"")], cursor(1))
    assert results([running]) == [1]


def test_one_that_is_dropped_warns_and_leaves_no_thread(path: Path, nothing_left):
    before = set(threads())
    follower = foldlog.follow(path)
    assert follower.state is FollowerState.WAITING
    # The `del` drops the last reference.
    with pytest.warns(ResourceWarning, match="without close"):  # noqa: PT031
        del follower
        gc.collect()
    until(lambda: set(threads()) <= before, "its threads, and watchdog's, have ended")


def test_it_cannot_be_pickled(follow: Follow):
    with pytest.raises(TypeError, match="pickled"):
        pickle.dumps(follow())


def test_a_follower_goes_on_in_a_forked_child_and_the_parents_is_not_touched(path: Path):
    """A follower opened before a fork served old data for ever in the child, as "following"."""
    result = script(
        """
        import os, sys, threading, traceback, foldlog
        from foldlog import Put, Synced, WatchCursor
        at = WatchCursor.from_u64
        store = foldlog.open(sys.argv[1])
        store.apply([Put("a", b"1")], at(1))
        followers = [foldlog.follow(sys.argv[1]) for _ in range(7)]
        unused, closed = followers[5:]
        watch = followers[0].watch("nothing")
        watch.next(5)
        snapshot = followers[0].snapshot()
        to_child, to_parent = os.pipe(), os.pipe()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                assert list(watch) == [] and "forked" in watch.ended
                closed.close()
                os.write(to_parent[1], b"x")
                os.read(to_child[0], 1)
                # Whatever is used first is up to date, and goes on.
                assert followers[0].get("a").value == b"2"
                assert [entry.value for entry in followers[1].range()] == [b"2"]
                assert followers[2].snapshot().get("a").value == b"2"
                assert str(followers[3].state) == "following" and followers[3].get("a").value == b"2"
                followers[4].wait_for(at(2), 0.0)
                with followers[0].watch() as events:
                    while not isinstance(events.next(60), Synced):
                        pass
                    os.write(to_parent[1], b"x")
                    assert events.next(60).update.value == b"3"
                for follower in followers[:5]:
                    follower.wait_for(at(3), 60)
                    assert follower.get("a").value == b"3" and len(follower) == 1
                assert snapshot.get("a").value == b"1", "a snapshot stays what it was"
                assert str(closed.state) == "closed"
                for follower in followers[:5]:
                    follower.close()
                assert [thread.name for thread in threading.enumerate()] == ["MainThread"]
                code = 0
            except BaseException:
                print(traceback.format_exc(), flush=True)
            os._exit(code)
        os.read(to_parent[0], 1)
        store.apply([Put("a", b"2")], at(2))
        os.write(to_child[1], b"x")
        os.read(to_parent[0], 1)
        store.apply([Put("a", b"3")], at(3))
        status = os.waitpid(child, 0)[1]
        for follower in followers:
            follower.wait_for(at(3), 60)
            follower.close()
        store.close()
        print("status", status, [thread.name for thread in threading.enumerate()])
        """,
        path,
    )
    assert (result.stdout, result.stderr) == ("status 0 ['MainThread']\n", "")


def test_a_forked_follower_says_what_became_of_the_log_meanwhile(path: Path):
    result = script(
        """
        import os, sys, foldlog
        def child_says(follower):
            read, write = os.pipe()
            if os.fork() == 0:
                said = [str(follower.state), follower.get("a") and follower.get("a").value, follower.get("b") is not None]
                os.write(write, repr(said).encode())
                os._exit(0)
            os.wait()
            return os.read(read, 1000).decode()
        path = sys.argv[1]
        with foldlog.follow(path) as follower:
            print(child_says(follower))
            with foldlog.open(path) as store:
                for number in range(9):
                    store.put("a", b"1")
                follower.wait_for(store.cursor(), 60)
            while len(follower) == 0:
                follower.stats()
            os.rename(path, path + ".away")
            print(child_says(follower))
            with open(path, "wb") as file:
                file.write(b"no log at all")
            print(child_says(follower))
        """,
        path,
    )
    assert result.stdout.splitlines() == [
        "['waiting', None, False]",
        "['missing', b'1', False]",
        "['failed', b'1', False]",
    ]


@pytest.mark.parametrize("struck_by", ["KeyboardInterrupt", "TimeoutError"])
def test_a_forked_follower_whose_first_use_is_interrupted_goes_on(path: Path, struck_by: str):
    """From then on it served what it had read, without a thread that follows; and a time limit
    that is an Exception was swallowed, and the old state served."""
    result = script(
        f"""
        import itertools, os, sys, threading, traceback, foldlog
        from foldlog import Put

        class At:
            def __init__(self, number):
                self.left, self.is_on = number, True
            def __call__(self, *event):
                self.left -= self.is_on
                if self.is_on and self.left == 0:
                    self.is_on = False
                    raise {struck_by}

        def first_use(number):
            read, at = None, At(number)
            try:
                sys.setprofile(at)
                read = follower.get("a").value
            except {struck_by}:
                pass
            finally:
                at.is_on = False  # no call, which could be struck as well
            assert read in (None, b"2")
            assert follower.get("a").value == b"2"
            follower.stats()
            assert [t.name for t in threading.enumerate()].count("foldlog-follower") == 1
            follower.close()
            return at.left <= 0

        store = foldlog.open(sys.argv[1])
        store.put("a", b"1")
        follower = foldlog.follow(sys.argv[1])
        store.put("a", b"2")
        store.close()
        for number in itertools.count(1, 11):
            child = os.fork()
            if child == 0:
                try:
                    os._exit(10 + first_use(number))
                except BaseException:
                    print(number, traceback.format_exc(), flush=True)
                    os._exit(1)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            if code != 11:
                break
        print(code, number > 20)
        follower.close()
        """,
        path,
    )
    assert result.stdout == "10 True\n"


def test_a_script_that_forgets_to_close_ends_promptly(path: Path):
    result = script(
        """
        import sys, foldlog
        follower = foldlog.follow(sys.argv[1])
        for event in follower.watch():
            print(type(event).__name__)
            break
        """,
        path,
    )
    assert (result.stdout, result.returncode) == ("Synced\n", 0)
    assert "Traceback" not in result.stderr


# Another process writes, and is killed.

WRITER = """
    import sys, foldlog
    from foldlog import Put, WatchCursor
    store = foldlog.open(sys.argv[1], sync="never", compact_threshold=20_000)
    number = int((store.get("number") or Put("", b"0")).value)
    while True:
        number += 1
        store.apply([Put("number", b"%d" % number), Put(f"k{number % 50}", b"x" * 200), Put("twin", b"%d" % number)],
                    WatchCursor.from_u64(number))
        if number % 100 == 0:
            print(number, flush=True)
"""


def test_a_writer_in_another_process_that_is_killed_and_comes_back_is_followed_through(
    follow: Follow, path: Path
):
    """Compactions never stop. No batch is torn, repeated or skipped; no cursor goes back."""
    follower = follow()
    watch = follower.watch()
    done = threading.Event()
    checked: list[int] = []

    def read() -> None:
        last = 0
        while not done.is_set():
            snapshot = follower.snapshot()
            if number := snapshot.get("number"):
                assert number == foldlog.KvEntry("number", snapshot.get("twin").value)
                assert snapshot.cursor() == WatchCursor.from_u64(int(number.value))
                assert int(number.value) >= last
                last = int(number.value)
                checked.append(last)

    def listen() -> int:
        state: dict[str, bytes] = {}
        numbers: list[int] = []
        for event in watch:
            if isinstance(event, Changed):
                assert isinstance(event.update, Put)
                if event.update.key == "number":
                    number = int(event.update.value)
                    assert not numbers or number > numbers[-1]
                    numbers.append(number)
                state[event.update.key] = event.update.value
            assert not isinstance(event, Rewound)
            if numbers and numbers[-1] == ends_at and state["twin"] == b"%d" % ends_at:
                assert state == {entry.key: entry.value for entry in follower.range()}
                return len(numbers)
        raise AssertionError("the watch ended")

    ends_at = -1
    working = [in_thread(read), in_thread(listen)]
    for _ in range(3):
        with subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(WRITER), str(path)],
            stdout=subprocess.PIPE,
            text=True,
        ) as writer:
            assert writer.stdout is not None
            for _ in range(3):
                assert writer.stdout.readline(), "the writer works"
            os.kill(writer.pid, signal.SIGKILL)
    with AppendLogSnapshot.open(path)[1] as snap:
        ends_at = int(snap.get("number").value) + 1
        snap.apply(
            [Put("number", b"%d" % ends_at), Put("twin", b"%d" % ends_at)],
            WatchCursor.from_u64(ends_at),
        )
    follower.wait_for(WatchCursor.from_u64(ends_at), DEADLINE_S)
    told = results(working[1:])[0]
    done.set()
    results(working[:1])
    assert len(checked) > 10
    assert told > 10
    assert follower.state is FollowerState.FOLLOWING
