"""The mailbox is bounded in batches and bytes; deadlines withdraw waiting calls; stops get in."""

from __future__ import annotations

import threading
import time

import pytest
from actor_kit import (
    DEADLINE_S,
    batch,
    commit_group,
    cursor,
    in_thread,
    nothing_pending,
    read_back,
    results,
    until,
    waiting,
)

from foldlog import Apply, Backpressure, Put, RequestTimeout, State
from foldlog.actors.base import mailbox
from foldlog.actors.base.adapter import Inbox, Mail, Place
from foldlog.actors.base.answers import Answer
from foldlog.actors.store import writer as writer_module

ON_EACH_ENGINE = True


class Weighty:
    """A message of so many bytes."""

    def __init__(self, weight: int) -> None:
        self.weight = weight


@pytest.fixture
def full(open_store, steps):
    """A store with a parked writer (one batch) and a full mailbox (two): (store, gate, futures)."""
    store = open_store(mailbox_batches=2)
    gate, futures = commit_group(store, steps, (1, 2, 3))
    return store, gate, futures


def test_a_full_mailbox_refuses_at_once(full):
    store, gate, futures = full
    began = time.monotonic()
    with pytest.raises(Backpressure, match="2 requests"):
        store.apply_async(batch(4), cursor(4))
    with pytest.raises(Backpressure):
        store.writer.tell(Apply(batch(4), cursor(4)))
    with pytest.raises(Backpressure):
        store.writer.ask(Apply(batch(4), cursor(4)), timeout=5 * DEADLINE_S)
    with pytest.raises(Backpressure):
        store.put("k", b"v", timeout_s=0)
    assert time.monotonic() - began < DEADLINE_S, "nothing waited for room"
    gate.open()
    assert results(futures) == [1, 2, 3]
    assert store.snapshot().seq == 3, "what was refused was not taken"
    store.apply(batch(4), cursor(4))


def test_waiting_for_room_ends_with_back_pressure_or_with_room(full):
    store, gate, futures = full
    with pytest.raises(Backpressure):
        store.apply(batch(4), cursor(4), timeout_s=0.02)
    waiting = [
        in_thread(store.apply, batch(number), cursor(number), DEADLINE_S) for number in (5, 6, 7)
    ]
    gate.open()
    results(futures)
    assert sorted(results(waiting)) == [4, 5, 6]


def test_those_who_wait_for_room_are_told_when_the_store_closes(full):
    store, gate, futures = full
    waiting = in_thread(store.apply, batch(4), cursor(4), DEADLINE_S)
    until(lambda: store._supervisor.writer.inbox._line, "it waits for room")
    closing = in_thread(store.close, DEADLINE_S)
    error = waiting.exception(DEADLINE_S)
    assert type(error).__name__ == "StoreClosed"
    gate.open()
    closing.result(DEADLINE_S)
    assert results(futures) == [1, 2, 3], "what was taken is served"
    nothing_pending(store)


def test_stopping_gets_through_a_full_mailbox(full, path):
    store, gate, futures = full
    stopping = in_thread(store.close)
    until(lambda: waiting(store) >= 3, "the stop is in the mailbox")
    gate.open()
    stopping.result(DEADLINE_S)
    assert results(futures) == [1, 2, 3]
    until(lambda: store.state is State.CLOSED, "the store is closed")
    store.close()
    assert read_back(path).seq == 3


def test_a_batch_whose_deadline_passes_in_the_mailbox_is_withdrawn_and_never_applied(
    open_store, steps, path
):
    store = open_store()
    gate, first = steps.parked("writer.before_write", store.apply_async, batch(1), cursor(1))
    with pytest.raises(RequestTimeout, match="withdrawn"):
        store.apply(batch(2), cursor(2), timeout_s=0.02)
    with pytest.raises(RequestTimeout, match="withdrawn"):
        store.put("k", b"v", timeout_s=0.02)
    gate.open()
    assert first.result(DEADLINE_S) == 1
    assert store.apply(batch(3), cursor(3)) == 2
    assert store.get("k") is None
    store.close()
    assert "batch/000002" not in read_back(path).entries


def test_a_batch_whose_deadline_passes_in_the_writers_hands_has_an_unknown_outcome(
    open_store, steps, monkeypatch
):
    store = open_store()
    gate = steps.park("writer.before_write")
    result = Answer.result

    def result_in_hand(answer, timeout=None):
        gate.wait_until_reached()  # the deadline passes no earlier
        return result(answer, timeout)

    monkeypatch.setattr(Answer, "result", result_in_hand)
    applying = in_thread(lambda: store.apply(batch(1), cursor(1), timeout_s=0.05))
    gate.wait_until_reached()
    with pytest.raises(RequestTimeout, match="unknown"):
        applying.result(DEADLINE_S)
    gate.open()
    assert store.apply(batch(1), cursor(1)) == 2, (
        "trying again with the same cursor gives the same state"
    )
    assert store.cursor() == cursor(1)


def test_a_future_that_its_owner_cancels_is_not_applied(open_store, steps):
    store = open_store()
    gate, futures = commit_group(store, steps, (1, 2, 3))
    assert futures[1].cancel()
    assert not futures[0].cancel(), "it is in hand"
    gate.open()
    assert results([futures[0], futures[2]]) == [1, 2]
    assert store.get("batch/000002") is None


def test_the_mailbox_is_bounded_in_bytes_and_one_batch_always_fits(open_store, steps):
    store = open_store(mailbox_bytes=10_000)
    gate, futures = commit_group(store, steps, [1])
    futures.append(store.apply_async([Put("large", bytes(50_000))], cursor(2)))
    with pytest.raises(Backpressure, match="bytes"):
        store.apply_async(batch(3), cursor(3))
    gate.open()
    assert results(futures) == [1, 2]
    gate, futures = commit_group(store, steps, [3])
    futures += [
        store.apply_async([Put(f"k{number}", bytes(3_000))], cursor(number)) for number in (4, 5, 6)
    ]
    with pytest.raises(Backpressure):
        store.apply_async([Put("k7", bytes(3_000))], cursor(7))
    gate.open()
    assert results(futures) == [3, 4, 5, 6]
    assert store._supervisor.writer.inbox.waiting_bytes == 0, (
        "what was taken is not counted any more"
    )


def test_the_count_of_bytes_survives_crashes_and_withdrawals(open_store, steps):
    store = open_store()
    steps.crash("writer.before_write")
    gate, futures = commit_group(store, steps, range(1, 12))
    store.writer.tell(Apply(batch(12), cursor(12)))
    futures.pop().cancel()
    gate.open()
    results(futures)
    store.apply(batch(13), cursor(13))
    assert store._supervisor.writer.inbox.waiting_bytes == 0
    assert store.stats().mailbox_depth == 0


def test_waiting_batches_make_one_commit_group(open_store, steps):
    store = open_store(sync="always")
    gate, futures = commit_group(store, steps, range(1, 52))
    gate.open()
    assert results(futures) == list(range(1, 52))
    assert (store.stats().groups, store.stats().largest_group, store.stats().batches) == (2, 50, 51)


def test_callers_who_come_back_from_an_fsync_share_the_next(open_store, steps, monkeypatch):
    """The first to come back was synced alone while the others waited: with four callers, groups
    of one and of three took turns, and with sixteen each fsync served eight."""
    store = open_store(sync="always")
    gate, alone = steps.parked(
        "writer.before_write", in_thread, store.apply, batch(1), cursor(1), DEADLINE_S
    )
    futures = [store.apply_async(batch(number), cursor(number)) for number in (2, 3)]
    later = iter((4, 5))

    def others_run() -> None:
        futures.extend(store.apply_async(batch(number), cursor(number)) for number in later)

    monkeypatch.setattr(writer_module, "let_others_run", others_run)
    gate.open()
    assert alone.result(DEADLINE_S) == 1
    assert results(futures[:2]) == [2, 3]
    assert results(futures[2:]) == [4, 5]
    assert (store.stats().groups, store.stats().largest_group) == (2, 4)


def test_a_caller_that_is_alone_again_writes_on_its_own_thread(open_store, steps):
    threads: list[threading.Thread] = []

    def step(name: str) -> None:
        steps(name)
        if name == "writer.before_write":
            threads.append(threading.current_thread())

    store = open_store(sync="always", step=step)
    gate, first = steps.parked("writer.before_write", store.apply_async, batch(1), cursor(1))
    futures = [store.apply_async(batch(number), cursor(number)) for number in (2, 3)]
    gate.open()
    assert results([first, *futures]) == [1, 2, 3]

    def is_written_here() -> bool:
        store.apply(batch(4), cursor(4), DEADLINE_S)
        return threads[-1] is threading.current_thread()

    assert not is_written_here(), "others may want to share the fsync"
    until(is_written_here, "no other caller is left to share an fsync with")


def test_told_batches_are_weighed_before_the_mailbox_and_make_no_larger_groups(open_store, steps):
    """Batches counted as 0 bytes: 65 of 16 MiB became one frame of 1.09 GB.

    They were answered, and the log would not open again.
    """
    store = open_store(mailbox_bytes=10_000)
    gate, first = steps.parked("writer.before_write", store.apply_async, batch(1), cursor(1))
    told = [
        store.writer.ask(Apply([Put(f"k{number}", bytes(4_000))], cursor(number)), block=False)
        for number in (2, 3)
    ]
    with pytest.raises(Backpressure):
        store.writer.ask(Apply([Put("k4", bytes(4_000))], cursor(4)), timeout=DEADLINE_S)
    gate.open()
    assert [first.result(DEADLINE_S), *(future.get(timeout=DEADLINE_S) for future in told)] == [
        1,
        2,
        3,
    ]


def test_a_large_request_gets_in_before_small_ones_that_came_later(open_store, steps):
    """Small ones took each room that came up, and the large one waited until its deadline."""
    store = open_store(mailbox_bytes=10_000)
    inbox = store._supervisor.writer.inbox
    gate, futures = commit_group(store, steps, [1])
    futures.append(store.apply_async([Put("a", bytes(6_000))], cursor(2)))
    large = in_thread(store.apply, [Put("large", bytes(50_000))], cursor(3), DEADLINE_S / 2)
    until(lambda: len(inbox._line) == 1, "it waits for room")
    small = in_thread(store.apply, [Put("small", b"")], cursor(4), DEADLINE_S / 2)
    until(lambda: len(inbox._line) == 2, "it stands behind, though there is room for it")
    gate.open()
    assert results(futures) == [1, 2]
    assert (large.result(DEADLINE_S), small.result(DEADLINE_S)) == (3, 4)


def test_a_place_in_line_lets_nobody_pass_and_is_not_kept_for_one_that_never_comes_back(
    monkeypatch,
):
    """Tasks of an event loop had none: other threads took each room that came up."""
    monkeypatch.setattr(mailbox, "PLACE_S", 60.0)
    inbox, place, small = Inbox(max_bytes=10), Place(), Mail(Weighty(0))
    large = Mail(Weighty(8))
    inbox.offer(Mail(Weighty(5)))
    for _ in range(2):
        with pytest.raises(Backpressure):
            inbox.offer(large, place=place)
        with pytest.raises(Backpressure):
            inbox.offer(small)
    inbox.move([])
    with pytest.raises(Backpressure):
        inbox.offer(small)
    inbox.offer(large, place=place)
    inbox.leave(place)
    assert list(inbox.mails) == [large]
    monkeypatch.setattr(mailbox, "PLACE_S", -1.0)
    with pytest.raises(Backpressure):
        inbox.offer(large, place=place)  # its loop never runs again
    inbox.offer(small)
    assert list(inbox.mails) == [large, small]
