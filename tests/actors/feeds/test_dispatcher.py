"""One thread serves all subscribed actors, and none of them can hold up the others."""

from __future__ import annotations

import copy
import gc
import os
import queue
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pykka
import pytest
from actor_kit import DEADLINE_S, cursor, until
from counting import usual, work_of
from feeds_kit import Listener, Publisher
from interrupts import RunsOut, points

import foldlog
from foldlog import Changed, Ended, Put, Synced
from foldlog.actors.base.threads import OwnThread
from foldlog.actors.feeds import dispatcher as dispatcher_module
from foldlog.actors.feeds.bookmark import Bookmark
from foldlog.actors.feeds.delivery import _Sending
from foldlog.actors.feeds.dispatcher import Dispatcher
from foldlog.actors.feeds.feeds import Feeds
from foldlog.actors.feeds.ring import Group

Open = Callable[..., foldlog.Store]


class Crowd:
    """Actors that share one queue."""

    def __init__(self) -> None:
        self.heard: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.refs: list[pykka.ActorRef[Any]] = []

    def start(self, gate: threading.Event | None = None) -> pykka.ActorRef[Any]:
        """An actor that passes on what it hears, under its number, once `gate` is open."""
        number = len(self.refs)
        self.refs.append(
            Listener.start(
                lambda message: gate is None or gate.wait(DEADLINE_S),
                lambda message: self.heard.put((number, message)),
            )
        )
        return self.refs[-1]

    def next(self, kind: type) -> tuple[int, Any]:
        """The next message of a kind, and who heard it."""
        while True:
            number, message = self.heard.get(timeout=DEADLINE_S)
            if isinstance(message, kind):
                return number, message


@pytest.fixture
def crowd(nothing_left: None) -> Iterator[Crowd]:
    crowd = Crowd()
    yield crowd
    for ref in crowd.refs:
        ref.stop(block=True, timeout=DEADLINE_S)


def dispatchers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if "dispatcher" in thread.name]


def test_a_hundred_subscriptions_take_one_thread_and_none_once_they_have_ended(
    crowd: Crowd, open_store: Open
):
    store = open_store()
    ref = crowd.start()
    deliveries = [store.subscribe(ref, f"{number:03}/") for number in range(100)]
    for _ in deliveries:
        crowd.next(Synced)
    assert dispatchers() == ["foldlog-dispatcher"], "one thread serves all"
    store.apply([Put(f"{number:03}/k", b"") for number in range(0, 100, 7)], cursor(1))
    told = {crowd.next(Changed)[1].update.key for _ in range(15)}
    assert told == {f"{number:03}/k" for number in range(0, 100, 7)}
    for delivery in deliveries:
        delivery.cancel()
    assert all(delivery.wait_ended(DEADLINE_S) for delivery in deliveries)
    until(lambda: not dispatchers(), "its thread has ended")
    assert store._core.feeds.dispatcher.index.told is None, "it keeps no state"
    store.subscribe(ref)
    crowd.next(Synced)
    assert dispatchers(), "another one begins when it is needed again"


def test_actors_that_are_stuck_do_not_hold_up_the_others(crowd: Crowd, open_store: Open):
    store = open_store(sync="never")
    gate = threading.Event()
    for _ in range(5):
        store.subscribe(crowd.start(gate))
    store.subscribe(crowd.start())
    for number in range(1, 200):
        store.apply([Put("k", b"%d" % number)], cursor(number), timeout_s=DEADLINE_S)
        if number % 20 == 0:
            seen = crowd.next(Changed)
            while seen[1].seq < number:
                seen = crowd.next(Changed)
            assert seen[0] == 5
    gate.set()


class Broken:
    """A mailbox that takes nothing."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def put(self, envelope: Any) -> None:
        raise self.error


@pytest.mark.parametrize("error", [OverflowError("it is full"), SystemExit("it is full")])
def test_an_actor_whose_mailbox_raises_is_unsubscribed_and_the_others_are_served(
    crowd: Crowd, open_store: Open, monkeypatch: pytest.MonkeyPatch, error: BaseException
):
    """What is no Exception ended the thread that serves all actors, and nobody was told more."""
    store = open_store()
    odd, well, early = crowd.start(), crowd.start(), crowd.start()
    store.subscribe(early)
    with monkeypatch.context() as patch:
        patch.setattr(odd, "actor_inbox", Broken(error))
        delivery = store.subscribe(odd)
        store.subscribe(well)
        assert delivery.wait_ended(DEADLINE_S)
    assert "it is full" in (delivery.ended or "")
    store.apply([Put("k", b"")], cursor(1))
    assert {crowd.next(Changed)[0], crowd.next(Changed)[0]} == {1, 2}


def test_an_actor_whose_prefix_is_untouched_for_longer_than_the_ring_holds_misses_nothing(
    crowd: Crowd, open_store: Open, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("foldlog.actors.feeds.ring.RING_GROUPS", 8)
    store = open_store(sync="never")
    asleep = crowd.start()
    delivery = store.subscribe(asleep, "rare/")
    crowd.next(Synced)
    bookmarks = (store._core.feeds.dispatcher._bookmark, delivery._subscription.bookmark)
    for number in range(1, 100):
        store.apply([Put("often", b"")], cursor(number))
        if number % 5 == 0:
            until(lambda: not any(map(len, bookmarks)), "the dispatcher has seen it")
    store.apply([Put("rare/k", b"")], cursor(100))
    number, message = crowd.heard.get(timeout=DEADLINE_S)
    assert (number, message.update.key, message.seq) == (0, "rare/k", 100)


def test_a_group_takes_the_same_work_of_the_dispatcher_for_any_number_that_it_does_not_concern():
    def work(subscribed: int) -> Any:
        publisher = Publisher()
        feeds, index = publisher.feeds, publisher.feeds.dispatcher.index
        bookmarks = [Bookmark(f"{n:04}/") for n in range(subscribed)]
        for bookmark in bookmarks:
            feeds.add(bookmark, index)
            bookmark.join()
        works = []
        for _ in range(10):
            group = Group(*publisher.prepare("other"))
            after = feeds._ring.append(group)
            works.append(work_of(index.tell, group, after))
        return usual(works)

    few, many = work(2), work(1000)
    assert few.is_like(many), (few, many)


NO_THREAD = "can't start new thread"


def test_where_no_thread_can_be_started_the_subscription_ends_and_says_why(
    crowd: Crowd, open_store: Open, monkeypatch: pytest.MonkeyPatch
):
    store = open_store()
    ref = crowd.start()

    def refuse(*arguments: Any) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(dispatcher_module, "call_aside", refuse)
        with pytest.raises(RuntimeError):
            store.subscribe(ref)
    assert not store._core.feeds.wanted
    with monkeypatch.context() as patch:
        patch.setattr(
            dispatcher_module,
            "call_aside",
            lambda call, failed: failed(RuntimeError("can't start new thread")),
        )
        delivery = store.subscribe(ref)
    assert delivery.wait_ended(DEADLINE_S)
    assert "can't start new thread" in (delivery.ended or "")
    crowd.next(Ended)
    store.subscribe(ref)
    crowd.next(Synced)


class Aside:
    """In the place of `call_aside`: keeps each call, for the test to make. Also that of the class
    of threads: keeps what is to run in the one that would be started."""

    has_begun = True

    def __init__(self) -> None:
        self.calls: list[Callable[[], object]] = []
        self.started: list[Callable[[], object]] = []
        self.error: BaseException | None = None
        """What the start of a thread, or a call aside, fails with."""

    def call(self, call: Callable[[], object], failed: Callable[[BaseException], object]) -> None:
        if self.error is not None:
            failed(self.error)
        else:
            self.calls.append(call)

    def thread(self, name: str, work: Callable[[], object], at_end: Callable[[], object]) -> Aside:
        """One that shares what this keeps."""
        other = copy.copy(self)
        other.start = lambda: self.keep(work)  # type: ignore[method-assign]
        return other

    def start(self) -> None:
        raise NotImplementedError

    def keep(self, work: Callable[[], object]) -> None:
        if self.error is not None:
            raise self.error
        self.started.append(work)


class Once:
    """Is over after one turn."""

    def __init__(self) -> None:
        self.is_over = False
        self.reason = ""

    def serve(self, limit: int) -> bool:
        self.is_over = True
        return False

    def check(self) -> None:
        pass

    def give_up(self, reason: str) -> None:
        self.reason, self.is_over = reason, True


@pytest.fixture
def aside(monkeypatch: pytest.MonkeyPatch) -> Aside:
    aside = Aside()
    monkeypatch.setattr(dispatcher_module, "call_aside", aside.call)
    monkeypatch.setattr(dispatcher_module, "OwnThread", aside.thread)
    return aside


def test_a_burst_of_subscriptions_starts_one_thread(aside: Aside):
    """Each that came before the first thread had begun started one of its own."""
    dispatcher = Feeds().dispatcher
    burst = Once(), Once(), Once()
    for served in burst:
        dispatcher.add(served)
    for call in aside.calls:
        call()
    (run,) = aside.started
    run()
    assert [served.reason for served in burst] == [""] * 3
    assert all(served.is_over for served in burst)
    late = Once()
    dispatcher.add(late)
    aside.calls[-1]()
    assert len(aside.started) == 2, "another one begins when it is needed again"


def test_one_that_is_added_while_the_thread_lets_go_is_served_by_it(
    aside: Aside, monkeypatch: pytest.MonkeyPatch
):
    dispatcher = Feeds().dispatcher
    early, late = Once(), Once()
    dispatcher.add(early)
    aside.calls[0]()
    let_go = dispatcher._let_go

    def let_go_late() -> None:
        if not late.is_over:
            dispatcher.add(late)  # sees a thread that runs
        let_go()

    monkeypatch.setattr(dispatcher, "_let_go", let_go_late)
    aside.started[0]()
    assert (late.is_over, late.reason, len(aside.calls)) == (True, "", 1)


def test_a_thread_that_cannot_be_started_ends_only_the_subscription_that_asked_for_it(
    aside: Aside,
):
    """Another one's thread was about to begin. Its subscription was ended, too, for want of a
    thread."""
    dispatcher = Feeds().dispatcher
    well, refused = Once(), Once()
    dispatcher.add(well)
    aside.error = RuntimeError(NO_THREAD)
    dispatcher.add(refused)
    aside.error = None
    assert (well.reason, refused.reason) == ("", f"no thread could be started: {NO_THREAD}")
    aside.calls[0]()
    aside.started[0]()
    assert well.is_over
    assert well.reason == ""


def test_those_who_counted_on_a_thread_that_cannot_be_started_are_given_up(aside: Aside):
    dispatcher = Feeds().dispatcher
    both = Once(), Once()
    for served in both:
        dispatcher.add(served)
    aside.error = RuntimeError(NO_THREAD)
    aside.calls[0]()
    assert [served.reason for served in both] == [f"no thread could be started: {NO_THREAD}"] * 2
    aside.error = None
    aside.calls[1]()
    aside.started[0]()  # finds nobody
    late = Once()
    dispatcher.add(late)
    aside.calls[2]()
    aside.started[1]()
    assert (late.is_over, late.reason) == (True, "")


def test_a_group_that_concerns_nobody_has_nobody_served(
    crowd: Crowd, open_store: Open, monkeypatch: pytest.MonkeyPatch
):
    store = open_store(sync="never")
    ref = crowd.start()
    deliveries = [store.subscribe(ref, f"{number}/") for number in range(5)]
    for _ in deliveries:
        crowd.next(Synced)
    bookmarks = [store._core.feeds.dispatcher._bookmark]
    bookmarks += [delivery._subscription.bookmark for delivery in deliveries]
    store.apply([Put("first", b"")], cursor(1))

    def asleep() -> bool:
        return not any(map(len, bookmarks)) and all(
            mark._spot is not None and not mark._spot.released for mark in bookmarks
        )

    until(asleep, "all have seen it, and sleep")
    served: list[object] = []
    monkeypatch.setattr(_Sending, "serve", lambda sending, limit: served.append(sending))
    for number in range(2, 12):
        store.apply([Put("other", b"")], cursor(number))
    until(lambda: not len(bookmarks[0]), "the dispatcher has seen them")
    assert served == []
    monkeypatch.undo()


class Endless:
    """Has more to send than anyone can."""

    is_over = False

    def __init__(self, turns: list[tuple[object, int]]) -> None:
        self.turns = turns

    def serve(self, limit: int) -> bool:
        self.turns.append((self, limit))
        return True


def test_those_that_have_much_to_send_take_turns_of_a_few_events():
    dispatcher = Feeds().dispatcher
    turns: list[tuple[object, int]] = []
    both = Endless(turns), Endless(turns)
    for served in both:
        dispatcher._served[served] = None  # type: ignore[index]
        dispatcher._ready.append(served)  # type: ignore[arg-type]
    assert dispatcher._serve_ready()
    assert {limit for _, limit in turns} == {dispatcher_module.EVENTS_A_TURN}
    assert dispatcher_module.EVENTS_A_TURN <= 64
    assert [served for served, _ in turns[:4]] == [*both, *both]


def test_actors_are_served_though_groups_never_cease(
    crowd: Crowd, open_store: Open, monkeypatch: pytest.MonkeyPatch
):
    """A feeder at full speed: each time the dispatcher looked there were new groups, and while
    there were, it sent nothing. The actors lagged for as long as the feeder ran."""
    follow = dispatcher_module.Dispatcher._follow
    heard = threading.Event()

    def follow_a_new_group(dispatcher: Any) -> bool:
        if heard.is_set():
            return follow(dispatcher)
        follow(dispatcher)
        return True

    monkeypatch.setattr(dispatcher_module.Dispatcher, "_follow", follow_a_new_group)
    store = open_store()
    store.subscribe(crowd.start())
    try:
        crowd.next(Synced)
    finally:
        heard.set()


def test_a_dispatcher_that_has_ended_keeps_no_group_no_state_and_no_actor(
    crowd: Crowd, open_store: Open
):
    """It kept its place in the ring: a later watch's groups hung on it for ever."""
    store = open_store()
    delivery = store.subscribe(crowd.start())
    crowd.next(Synced)
    store.apply([Put("k", b"")], cursor(1))
    crowd.next(Changed)
    sending = weakref.ref(delivery._sending)
    delivery.cancel()
    assert delivery.wait_ended(DEADLINE_S)
    crowd.next(Ended)  # until then the actor has the envelope of the event before in hand
    until(lambda: not dispatchers(), "its thread has ended")
    delivery.cancel()  # wakes nobody
    del delivery
    with store.watch() as watch:
        assert isinstance(watch.next(DEADLINE_S), Changed)
        for number in range(2, 6):
            store.apply([Put("k", b"%d" % number)], cursor(number))
        state = weakref.ref(store.snapshot())
        store.apply([Put("k", b"6")], cursor(6))
        while not isinstance(event := watch.next(DEADLINE_S), Changed) or event.seq < 6:
            pass
        del event
        assert watch.next(0.0) is None
        gc.collect()
        assert state() is None, "the watch has read it, and nobody else waits for it"
        assert sending() is None


def test_in_a_forked_child_a_subscription_has_ended(crowd: Crowd, open_store: Open):
    """Nobody serves it there: whoever waited for its end waited for ever."""
    store = open_store()
    delivery = store.subscribe(crowd.start())
    crowd.next(Synced)
    child = os.fork()
    if not child:
        try:
            ended = delivery.wait_ended(DEADLINE_S) and "forked" in (delivery.ended or "")
        finally:
            os._exit(0 if ended else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    store.apply([Put("k", b"")], cursor(1))
    crowd.next(Changed)


class Slept(list[float]):
    """Notes how long it was to sleep, and does not."""

    wait = list.append

    def set(self) -> None:
        pass


def test_a_dispatcher_whose_place_is_gone_and_who_has_none_to_go_to_sleeps(
    monkeypatch: pytest.MonkeyPatch,
):
    """All unsubscribed while it was behind, and the next one came before the next group. It looked
    again and again, without a pause."""
    monkeypatch.setattr("foldlog.actors.feeds.ring.RING_GROUPS", 2)
    publisher, bookmark = Publisher(other := Bookmark()), Bookmark()
    feeds = publisher.feeds
    bookmark.place(feeds._ring, feeds._index)
    for _ in range(5):
        publisher.publish("k")
    feeds.remove(other)
    publisher.publish("k")
    slept = Slept()
    monkeypatch.setattr(bookmark, "_wakeup", slept)
    bookmark.sleep(1.0)
    assert slept == [1.0]


def test_those_who_wait_for_a_thread_that_died_before_its_first_line_are_served(
    monkeypatch: pytest.MonkeyPatch,
):
    """The claim stayed held, and no subscription was served any more."""
    feeds, waiting = Feeds(), Once()
    with monkeypatch.context() as patch:
        patch.setattr(OwnThread, "run", lambda self: None)
        feeds.dispatcher.add(waiting)
        until(lambda: feeds.dispatcher._runner, "a thread was started")
    for _ in range(3):
        feeds.look_after()
    until(lambda: waiting.is_over, "it is served")
    with monkeypatch.context() as patch:
        patch.setattr(dispatcher_module, "call_aside", lambda call, failed: None)
        until(lambda: not feeds.dispatcher._runner, "the thread has let go")
        feeds.dispatcher.add(late := Once())
    feeds.look_after()
    until(lambda: late.is_over, "it is served")


def test_a_memory_error_at_any_point_of_the_dispatcher_leaves_nobody_waiting(
    monkeypatch: pytest.MonkeyPatch,
):
    run = Dispatcher._run
    for number in points(5):
        strike = RunsOut(number)

        def struck(self: Dispatcher, me: OwnThread, strike: RunsOut = strike) -> None:
            if not strike.fired:
                sys.setprofile(strike)
            run(self, me)
            sys.setprofile(None)

        feeds, waiting = Feeds(), Once()
        with monkeypatch.context() as patch:
            patch.setattr(Dispatcher, "_run", struck)
            feeds.dispatcher.add(waiting)
            until(lambda: waiting.is_over, f"it was served, or given up, after {number}")  # noqa: B023
            until(lambda: not feeds.dispatcher._runner, "the thread has let go")  # noqa: B023
        feeds.dispatcher.add(late := Once())
        until(lambda: late.is_over, "the next one is served")
        if not strike.fired:
            break
    assert number > 5
