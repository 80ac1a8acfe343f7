"""When the supervisor restarts or gives up, calls between restarts, stuck writers, no threads."""

from __future__ import annotations

import threading

import pykka
import pytest
from actor_kit import (
    DEADLINE_S,
    assert_whole,
    batch,
    cursor,
    impatient,
    in_thread,
    read_back,
    results,
    until,
)

import foldlog
from foldlog import Get, State, StoreFailed, StoreLocked
from foldlog.actors.store import supervisor as supervisor_module
from foldlog.actors.store.policy import MAX_DELAY_S, PERMANENT, next_restart_delay_s

ON_EACH_ENGINE = True

# The rule.


def delay(restarts_s, now_s=100.0, error=None, max_restarts=5):
    return next_restart_delay_s(
        error or OSError("x"),
        restarts_s,
        now_s,
        max_restarts=max_restarts,
        window_s=60.0,
        delay_s=0.05,
    )


def test_the_first_restart_is_at_once_and_then_the_delay_doubles():
    assert [delay([99.0] * before) for before in range(5)] == [0.0, 0.05, 0.1, 0.2, 0.4]


def test_restarts_that_left_the_window_do_not_count():
    assert delay([0.0, 1.0, 39.9, 40.0]) == 0.0
    assert delay([0.0, 1.0, 39.9, 40.1]) == 0.05
    assert delay([41.0] * 5) is None
    assert delay([40.0] * 5) == 0.0


def test_the_delay_has_an_upper_bound():
    assert delay([99.0] * 50, max_restarts=100) == MAX_DELAY_S


def test_as_many_restarts_as_allowed_are_made_and_not_one_more():
    assert delay([99.0] * 4) is not None
    assert delay([99.0] * 5) is None
    assert delay([], max_restarts=0) is None


@pytest.mark.parametrize("kind", PERMANENT, ids=lambda kind: kind.__name__)
def test_what_a_restart_cannot_mend_is_not_restarted(kind):
    error = kind.__new__(kind)
    assert delay([], error=error) is None


# Waiting between restarts, and being stuck.


def test_a_close_is_heard_during_the_back_off(open_store, path, steps, monkeypatch):
    monkeypatch.setattr(
        "foldlog.actors.store.supervisor.next_restart_delay_s", lambda *_, **__: 10 * DEADLINE_S
    )
    store = open_store()
    store.apply(batch(1), cursor(1))
    steps.crash("writer.before_write")
    answer = store.apply_async(batch(2), cursor(2))
    until(lambda: store.stats().restarts, "the writer has died")
    assert store.state is State.RESTARTING
    store.close(DEADLINE_S)
    assert answer.result(0) == 2, "what waits is still served"
    assert read_back(path).cursor == cursor(2)


def test_writes_wait_for_a_writer_that_restarts_and_reads_do_not(open_store, steps):
    store = open_store()
    store.apply(batch(1), cursor(1))
    held = store.snapshot()
    steps.crash("writer.before_write")
    gate, first = steps.parked("writer.start", store.apply_async, batch(2), cursor(2))
    second = store.apply_async(batch(3), cursor(3))
    assert store.state is State.RESTARTING
    assert store.get("shared/0").value == b"1"
    assert store.reader.ask(Get("shared/0"), timeout=DEADLINE_S).value == b"1"
    assert assert_whole(held) == 1
    assert not first.done()
    assert not second.done()
    gate.open()
    assert results([first, second]) == [2, 3]
    assert assert_whole(held) == 1
    until(lambda: store.state is State.RUNNING, "the store runs")


def test_a_writer_that_is_stuck_fails_the_store_and_keeps_the_lock(
    open_store, path, steps, monkeypatch
):
    monkeypatch.setattr(supervisor_module, "HEALTH_CHECK_S", 0.02)
    store = open_store()
    store.apply(batch(1), cursor(1))
    gate, stuck = steps.parked("writer.before_write", store.apply_async, batch(2), cursor(2))
    with impatient(store), pytest.raises(StoreFailed, match="stuck"):
        stuck.result(DEADLINE_S)
    assert store.state is State.FAILED
    assert store.get("shared/0").value == b"1"
    with pytest.raises(StoreLocked):
        foldlog.open(path)
    reopened = in_thread(store.reopen, DEADLINE_S)
    until(lambda: store.state is State.RESTARTING, "reopening has begun")
    gate.open()
    reopened.result(DEADLINE_S)
    until(lambda: store.state is State.RUNNING, "the store runs")
    assert steps.seen["writer.start"] == 1, "nobody was started beside it"
    store.apply(batch(3), cursor(3))


def test_a_stuck_writer_makes_close_time_out_and_close_can_be_repeated(open_store, path, steps):
    store = open_store()
    gate, stuck = steps.parked("writer.before_write", store.apply_async, batch(1), cursor(1))
    with pytest.raises(foldlog.RequestTimeout):
        store.close(timeout_s=0.05)
    with pytest.raises(StoreLocked):
        foldlog.open(path)
    gate.open()
    store.close(DEADLINE_S)
    assert stuck.result(0) == 1
    assert read_back(path).cursor == cursor(1)


# Threads that cannot be had.


@pytest.fixture
def no_thread(monkeypatch):
    """Threads whose name starts as told do not start, so many times."""
    start = threading.Thread.start
    refused: dict[str, int] = {}

    def refuse(thread):
        for name, times in refused.items():
            if thread.name.startswith(name) and times:
                refused[name] = times - 1
                raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    return refused


@pytest.mark.parametrize(
    "name",
    [
        "foldlog-supervisor",
        "foldlog-writer",
        "foldlog-maintenance",
        "foldlog-reader-1",
        "foldlog-syncer",
    ],
)
def test_a_thread_that_cannot_start_fails_the_opening_and_leaves_nothing(
    nothing_left, path, no_thread, name
):
    no_thread[name] = 1
    with pytest.raises(RuntimeError, match="can't start new thread"):
        foldlog.open(path)
    assert pykka.ActorRegistry.get_all() == []
    with foldlog.open(path) as store:
        store.apply(batch(1), cursor(1))


@pytest.mark.parametrize(
    ("name", "step"),
    [("foldlog-writer", "writer.before_write"), ("foldlog-reader", "reader.handle")],
)
def test_a_thread_that_cannot_start_after_a_crash_is_tried_for_again(
    open_store, steps, no_thread, name, step
):
    store = open_store(readers=1)
    no_thread[name] = 2
    steps.crash(step)
    assert store.apply(batch(1), cursor(1)) == 1
    assert store.reader.ask(Get("shared/0"), timeout=DEADLINE_S).value == b"1"
    assert no_thread[name] == 0
    until(lambda: store.state is State.RUNNING, "the store runs")
