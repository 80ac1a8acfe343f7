"""The ring: one copy of the last groups, whatever the number of those who read it."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
from counting import Work, usual, work_of
from feeds_kit import Publisher, batch_of, drained

from foldlog import Changed, FoldSnapshot, Lagged, Synced
from foldlog.actors.feeds import ring as ring_module
from foldlog.actors.feeds.bookmark import Bookmark
from foldlog.actors.feeds.ring import Cell, Group, Lost
from foldlog.actors.feeds.subscription import Subscription


def test_a_group_that_all_have_read_is_freed_at_once():
    publisher = Publisher(fast := Bookmark(), slow := Bookmark())
    gone = weakref.ref(publisher.publish("a"))
    kept = weakref.ref(publisher.publish("b"))
    publisher.publish("c")
    for bookmark in (fast, fast, fast, slow):
        bookmark.begin(0.0)
        group = bookmark.first()
        assert isinstance(group, Group)
        bookmark.drop(group)
        del group
    gc.collect()
    assert gone() is None
    assert kept() is not None, "the slow one has yet to read it"


def test_who_loses_groups_is_told_how_many_batches_and_goes_on_at_the_newest(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(ring_module, "RING_GROUPS", 4)
    publisher = Publisher(bookmark := Bookmark())
    for number in range(7):
        publisher.publish(f"{number}")
    publisher.feeds.jump(publisher.fold, "rewound by hand")
    newest = publisher.publish("last")
    bookmark.begin(0.0)
    lost = bookmark.first()
    assert isinstance(lost, Lost)
    assert (lost.fold, lost.batches, lost.rewound) == (newest, 8, "rewound by hand")
    bookmark.drop(lost)
    assert bookmark.first() is None
    publisher.publish("one more")
    assert isinstance(bookmark.first(), Group)


def test_one_that_never_reads_keeps_no_more_than_the_bound(monkeypatch: pytest.MonkeyPatch):
    """Its cell is emptied, so that nothing hangs on it."""
    monkeypatch.setattr(ring_module, "RING_GROUPS", 4)
    publisher = Publisher(bookmark := Bookmark())
    states = [weakref.ref(publisher.publish(f"{number}")) for number in range(50)]
    gc.collect()
    assert sum(state() is not None for state in states) <= 5
    assert len(bookmark) <= 4


def interrupted_at(line: int, call: Callable[..., object], *arguments: object) -> bool:
    """Call it with a KeyboardInterrupt before the given line of it. True if it has so many."""
    left = line

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal left
        if event == "line" and "/actors/" in frame.f_code.co_filename:
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
        return trace

    traced = sys.gettrace()
    sys.settrace(trace)
    try:
        call(*arguments)
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(traced)
    return False


def test_a_publisher_that_was_interrupted_at_any_line_costs_no_subscriber_a_change():
    """A caller's thread may publish in the writer's turn, and be struck by a signal. The writer
    then restarts, and tells of its state."""
    line, was_interrupted = 0, True
    while was_interrupted:
        line += 1
        publisher = Publisher(Bookmark())  # so that there is a place before the first group
        start = publisher.publish("first")
        unread, *asleep = (
            Subscription(publisher.feeds, lambda start=start: start, prefix, start)
            for prefix in ("a", "a", "", "b", "a")
        )
        for subscription in asleep:
            assert isinstance(subscription.next(0.0), Synced)
            subscription.bookmark.join()
        was_interrupted = interrupted_at(line, publisher.feeds.publish, *publisher.prepare("a1"))
        early = told(asleep[-1])  # it reads before the writer has restarted
        if was_interrupted:
            publisher.feeds.jump(publisher.fold)
        publisher.publish("a2", "b")
        assert [told(each) for each in (unread, *asleep[:-1])] == [
            ["a1", "a2"],
            ["a1", "a2"],
            ["a1", "a2", "b"],
            ["b"],
        ], line
        assert early + told(asleep[-1]) == ["a1", "a2"], line
    assert line > 30, "it was interrupted in many places"


def told(subscription: Subscription) -> list[str]:
    """The keys of all changes that wait. None was lost."""
    events = drained(subscription)
    assert not any(isinstance(event, Lagged) for event in events)
    return [event.update.key for event in events if isinstance(event, Changed)]


def test_nothing_of_a_store_is_kept_once_nobody_is_subscribed():
    publisher = Publisher(bookmark := Bookmark())
    state = weakref.ref(publisher.publish("a"))
    publisher.feeds.remove(bookmark)
    del bookmark
    publisher.publish("b")
    gc.collect()
    assert state() is None


@pytest.mark.parametrize("is_sleeping", [False, True])
def test_publishing_takes_the_same_work_for_any_number_of_idle_subscribers(is_sleeping: bool):
    """Found in use: 2,000 idle watches cost the writer 95 % of its rate."""

    def work(subscribers: int) -> Work:
        bookmarks = [Bookmark(f"{number:04}/") for number in range(subscribers)]
        publisher = Publisher(*bookmarks)
        for bookmark in bookmarks if is_sleeping else ():
            bookmark.join()
        publisher.publish("other")
        return usual(
            [
                work_of(publisher.feeds.publish, *publisher.prepare("other", "keys"))
                for _ in range(20)
            ]
        )

    few, many = work(2), work(1000)
    assert few.is_like(many), (few, many)


def test_publishing_to_one_that_never_reads_takes_eight_calls(
    monkeypatch: pytest.MonkeyPatch,
):
    """Found in use: the first idle watch took a fifth of the writer's rate. The ring is full, so a
    group is taken out of it each time."""
    monkeypatch.setattr(ring_module, "RING_GROUPS", 8)
    publisher = Publisher(Bookmark())
    for number in range(16):
        publisher.publish(f"{number}")
    last = publisher.prepare("last")
    calls: list[str] = []

    def note(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and "/actors/" in frame.f_code.co_filename:
            calls.append(frame.f_code.co_qualname)

    profiled = sys.getprofile()
    sys.setprofile(note)
    try:
        publisher.feeds.publish(*last)
    finally:
        sys.setprofile(profiled)
    assert len(calls) <= 8, calls


def test_cells_count_what_is_before_them():
    cell = Cell()
    group = Group(FoldSnapshot.empty(), 1, [batch_of("a", "b"), batch_of("c")])
    after = cell.after(group)
    assert (after.number, after.batches, after.updates) == (1, 2, 3)
    assert after.size == group.size > 0


def test_one_look_tells_whether_a_group_touches_a_prefix():
    group = Group(FoldSnapshot.empty(), 1, [batch_of("b/1", "d"), batch_of("a/9")])
    assert [
        prefix
        for prefix in ("", "a", "b/", "b/1", "b/2", "c", "d", "d/", "e")
        if group.touches(prefix)
    ] == ["", "a", "b/", "b/1", "d"]


def test_what_was_being_read_while_its_reader_was_closed_brings_nothing_back():
    publisher = Publisher(bookmark := Bookmark())
    publisher.publish("a")
    publisher.publish("b")
    bookmark.begin(0.0)
    group = bookmark.first()
    assert isinstance(group, Group)
    bookmark.end("closed", drop=True)
    bookmark.drop(group)
    assert not bookmark.has_more
    assert bookmark.first() is None


class Replaced(Bookmark):
    """A bookmark whose spot is taken away by its reader while another thread counts."""

    looks = 0

    @property
    def _spot(self) -> Any:
        self.looks += 1
        return self.kept if self.looks == 1 else None

    @_spot.setter
    def _spot(self, spot: Any) -> None:
        self.kept = spot


def test_counting_what_waits_does_not_mind_a_reader_that_wakes_up_meanwhile():
    """`store.stats()` raised AttributeError."""
    publisher = Publisher(bookmark := Replaced("a"))
    bookmark.kept = publisher.feeds._index.join("a", bookmark.wake)
    publisher.publish("b")
    publisher.publish("b")
    bookmark.looks = 0
    assert len(bookmark) == 2
    assert bookmark.kept is not None, "only its reader takes it away"


def test_counting_what_waits_leaves_a_spot_that_was_just_released_to_its_reader(
    monkeypatch: pytest.MonkeyPatch,
):
    """It took away the spot that the reader had taken in the meantime."""
    Publisher(bookmark := Bookmark("a"))
    bookmark.join()
    spot = bookmark._spot

    class Index:
        @property
        def told(self) -> None:
            spot.release(None)  # by the publisher, just then

    monkeypatch.setattr(bookmark, "_index", Index())
    len(bookmark)
    assert bookmark._spot is spot


def test_the_last_group_is_told_though_the_end_comes_with_it(monkeypatch: pytest.MonkeyPatch):
    """Who had just looked found nothing, then found that it was over: derived state and whoever
    else asks for no more after that lacked the last batch."""
    publisher = Publisher(bookmark := Bookmark())
    waiting = Bookmark._waiting
    looks = []

    def then_the_store_ends(of: Bookmark) -> Any:
        found = waiting(of)
        looks.append(found)
        if len(looks) == 1:
            publisher.publish("last")
            publisher.feeds.end("over")
        return found

    monkeypatch.setattr(Bookmark, "_waiting", then_the_store_ends)
    assert isinstance(bookmark.first(), Group)


def test_what_a_closing_thread_dropped_stays_dropped_though_a_read_ends_just_then():
    publisher = Publisher(bookmark := Bookmark())
    publisher.publish("a")
    publisher.publish("b")

    group = bookmark.first()
    assert isinstance(group, Group)

    class Told:
        looks = 0

        @property
        def next(self) -> Cell:
            self.looks += 1
            if self.looks == 2:  # compared, and not yet assigned
                bookmark.end("closed by another thread", drop=True)
            return group.next

    bookmark.drop(Told())  # type: ignore[arg-type]
    assert not bookmark.has_more
