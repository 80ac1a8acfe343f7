"""Actors told of changes: in order, no faster than they handle them, and never after they end."""

from __future__ import annotations

import gc
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from actor_kit import DEADLINE_S, cursor, in_thread, results, until
from feeds_kit import Listener

import foldlog
from foldlog import Changed, CursorExpired, Delete, Ended, Lagged, Put, Synced
from foldlog.actors.feeds import delivery as delivery_module
from foldlog.actors.feeds import dispatcher as dispatcher_module
from foldlog.actors.feeds import ring as ring_module

ON_EACH_ENGINE = True

Open = Callable[..., foldlog.Store]


class Told:
    """An actor, and what it has heard."""

    def __init__(self, act: Callable[[Any], object] = lambda message: None) -> None:
        self.heard: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.ref = Listener.start(act, self.heard.put)

    def next(self) -> Any:
        return self.heard.get(timeout=DEADLINE_S)

    def until_end(self) -> list[Any]:
        events = []
        while not isinstance(event := self.next(), Ended):
            events.append(event)
        return [*events, event]


@pytest.fixture
def listen(nothing_left: None) -> Iterator[Callable[..., Told]]:
    told: list[Told] = []

    def listen(*act: Callable[[Any], object]) -> Told:
        told.append(Told(*act))
        return told[-1]

    yield listen
    for one in told:
        one.ref.stop(block=True, timeout=DEADLINE_S)


def test_an_actor_is_told_what_a_watch_tells_and_last_of_the_end(listen, open_store: Open):
    store = open_store()
    store.apply([Put("a", b"1"), Put("b", b"1")], cursor(1))
    told = listen()
    delivery = store.subscribe(told.ref, "a")
    store.apply([Delete("a"), Put("b", b"2")], cursor(2))
    assert told.next() == Changed(Put("a", b"1"), cursor(1), 1)
    assert told.next() == Synced(cursor(1), 1)
    assert told.next() == Changed(Delete("a"), cursor(2), 2)
    assert delivery.ended is None
    store.close()
    assert told.next() == Ended(f"{store.path} was closed")
    assert delivery.wait_ended(DEADLINE_S)
    assert delivery.ended == f"{store.path} was closed"


def test_since_works_for_actors_as_for_watches(listen, open_store: Open):
    store = open_store()
    store.apply([Put("a", b"1")], cursor(1))
    held = store.snapshot()
    store.apply([Put("a", b"2")], cursor(2))
    told, other = listen(), listen()
    store.subscribe(told.ref, since=cursor(1))
    assert told.next() == Changed(Put("a", b"2"), cursor(2), 2)
    store.subscribe(other.ref, since=held)
    assert other.next() == Changed(Put("a", b"2"), cursor(2), 2)
    with pytest.raises(CursorExpired):
        store.subscribe(other.ref, since=cursor(77))


def test_cancelling_ends_it_though_nothing_happens(listen, open_store: Open):
    store = open_store()
    told = listen()
    delivery = store.subscribe(told.ref)
    assert isinstance(told.next(), Synced)
    delivery.cancel()
    assert told.next() == Ended("closed by its subscriber")
    assert delivery.wait_ended(DEADLINE_S)
    assert not store._core.feeds.wanted
    delivery.cancel()


def test_a_slow_actor_has_few_events_in_its_mailbox_lags_and_ends_up_exact(
    listen, open_store: Open, monkeypatch
):
    """Scenario 76. It holds up nobody: all batches are answered while it stands still."""
    monkeypatch.setattr(ring_module, "RING_GROUPS", 8)
    monkeypatch.setattr(delivery_module, "IN_FLIGHT", 5)
    store = open_store()
    go_on = threading.Event()
    told = listen(lambda message: go_on.wait(DEADLINE_S))
    delivery = store.subscribe(told.ref)
    for number in range(1, 60):
        store.apply(
            [Put("k", b"%d" % number), Put(f"n/{number}", b"")],
            cursor(number),
            timeout_s=DEADLINE_S,
        )
    assert delivery._sending._in_flight <= 5
    assert len(delivery._subscription.bookmark) <= 8
    go_on.set()
    want = {entry.key: entry.value for entry in store.range()}
    state: dict[str, bytes] = {}
    lagged = 0
    while state != want:
        event = told.next()
        lagged += isinstance(event, Lagged)
        if isinstance(event, Changed):
            state[event.update.key] = event.update.value
    assert lagged


def test_an_actor_that_fails_now_and_then_is_told_on_and_one_that_fails_three_times_running_is_not(
    listen, open_store: Open
):
    """Scenario 77."""
    store = open_store()

    def sometimes(message: Any) -> None:
        if isinstance(message, Changed) and message.seq % 3:
            raise ValueError("injected")

    def always(message: Any) -> None:
        if isinstance(message, Changed):
            raise ValueError("injected")

    hardy, frail = listen(sometimes), listen(always)
    store.subscribe(hardy.ref)
    delivery = store.subscribe(frail.ref)
    for number in range(1, 12):
        store.apply([Put("k", b"")], cursor(number))
        hardy_event = hardy.next()
        while isinstance(hardy_event, Synced):
            hardy_event = hardy.next()
        assert hardy_event.seq == number
    events = frail.until_end()
    changes = [event for event in events if isinstance(event, Changed)]
    assert 3 <= len(changes) <= 11
    assert "failed on 3 events" in events[-1].reason
    assert frail.ref.is_alive()
    assert delivery.wait_ended(DEADLINE_S)
    assert len(store._core.feeds.bookmarks) == 1, "the hardy one's"


def test_an_actor_that_is_dead_is_unsubscribed_though_nothing_happens(
    listen, open_store: Open, monkeypatch
):
    monkeypatch.setattr(dispatcher_module, "CHECK_S", 0.01)
    store = open_store()
    told = listen()
    delivery = store.subscribe(told.ref)
    assert isinstance(told.next(), Synced)
    told.ref.stop()
    assert delivery.wait_ended(DEADLINE_S)
    assert delivery.ended == "the actor is dead"
    assert not store._core.feeds.wanted


def test_an_actor_that_dies_with_events_in_its_mailbox_is_unsubscribed(
    listen, open_store: Open, monkeypatch
):
    monkeypatch.setattr(dispatcher_module, "CHECK_S", 0.01)
    store = open_store()
    entered, go_on = threading.Event(), threading.Event()

    def stuck(message: Any) -> None:
        entered.set()
        go_on.wait(DEADLINE_S)

    told = listen(stuck)
    delivery = store.subscribe(told.ref)
    for number in range(1, 20):
        store.apply([Put("k", b"")], cursor(number))
    assert entered.wait(DEADLINE_S)
    told.ref.stop(block=False)
    go_on.set()
    assert delivery.wait_ended(DEADLINE_S)


def test_an_actor_that_never_answers_does_not_keep_the_store_or_the_thread(
    listen, open_store: Open, monkeypatch
):
    monkeypatch.setattr(dispatcher_module, "CHECK_S", 0.01)
    monkeypatch.setattr(delivery_module, "IN_FLIGHT", 1)
    store = open_store()
    go_on = threading.Event()
    told = listen(lambda message: go_on.wait(DEADLINE_S))
    delivery = store.subscribe(told.ref)
    store.apply([Put("k", b"")], cursor(1))
    store.close()
    assert delivery.wait_ended(DEADLINE_S)
    go_on.set()


def test_an_actor_may_apply_to_the_store_that_tells_it(listen, open_store: Open):
    """Scenario 77."""
    store = open_store()

    def copy(message: Any) -> None:
        if isinstance(message, Changed):
            store.apply(
                [Put("copy/" + message.update.key, message.update.value)],
                cursor(message.seq + 100),
                timeout_s=DEADLINE_S,
            )

    told = listen(copy)
    store.subscribe(told.ref, "from/")
    for number in range(1, 6):
        store.apply([Put(f"from/{number}", b"%d" % number)], cursor(number))
    until(lambda: len(store.range("copy/")) == 5, "all are copied")


def test_an_actor_may_close_the_store_that_tells_it(listen, open_store: Open):
    store = open_store()
    told = listen(lambda message: isinstance(message, Changed) and store.close(DEADLINE_S))
    store.subscribe(told.ref)
    store.apply([Put("a", b"")], cursor(1))
    assert [type(event) for event in told.until_end()] == [Synced, Changed, Ended]
    assert store.state is foldlog.State.CLOSED


def test_a_subscription_does_not_keep_a_store_that_is_dropped(listen, path: Path):
    told = listen()
    store = foldlog.open(path)
    store.subscribe(told.ref)
    assert isinstance(told.next(), Synced)
    # The `del` drops the last reference.
    with pytest.warns(ResourceWarning, match="without close"):  # noqa: PT031
        del store
        gc.collect()
    assert isinstance(told.next(), Ended)


@pytest.mark.append_log("it is followed")
def test_a_follower_tells_actors_too(listen, open_store: Open, path: Path):
    store = open_store()
    with foldlog.follow(path) as follower:
        told = listen()
        follower.subscribe(told.ref, "a")
        store.apply([Put("a", b"1")], cursor(1))
        assert isinstance(told.next(), Synced)
        assert told.next() == Changed(Put("a", b"1"), cursor(1), 1)
    assert "closed" in told.next().reason


def test_many_actors_are_told_the_same_in_the_same_order(listen, open_store: Open):
    store = open_store(sync="never")
    told = [listen() for _ in range(6)]
    for one in told:
        store.subscribe(one.ref)

    def write(thread: int) -> None:
        for number in range(40):
            store.apply([Put(f"{thread}/{number}", b"")], cursor(1))

    results([in_thread(write, thread) for thread in range(4)])
    store.close()
    orders = [
        [event.update.key for event in one.until_end() if isinstance(event, Changed)]
        for one in told
    ]
    assert len(orders[0]) == 160
    assert all(order == orders[0] for order in orders)
