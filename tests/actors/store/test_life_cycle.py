"""From open to the end: closing in every way that a program may, and forgetting to."""

from __future__ import annotations

import gc
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor

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
)

import foldlog
from foldlog import (
    Apply,
    Compact,
    FoldlogError,
    Get,
    Put,
    RequestTimeout,
    State,
    StoreClosed,
    StoreLocked,
    WatchCursor,
)
from foldlog.protocol.options import CLOSE_TIMEOUT_S

ON_EACH_ENGINE = True


def test_a_with_statement_closes_also_when_its_body_fails(nothing_left, path):
    stores = []

    def use() -> None:
        with foldlog.open(path) as store:
            stores.append(store)
            store.apply(batch(1), cursor(1))
            raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        use()
    assert stores[0].state is State.CLOSED
    assert read_back(path).seq == 1


def test_closing_twice_or_from_many_threads_is_fine(open_store):
    store = open_store()
    store.apply(batch(1), cursor(1))
    results([in_thread(store.close, DEADLINE_S) for _ in range(5)])
    store.close()
    assert store.state is State.CLOSED


def test_everything_after_close_raises_store_closed(open_store, tmp_path):
    store = open_store()
    store.apply(batch(1), cursor(1))
    writer, reader = store.writer, store.reader
    store.close()
    for use in (
        lambda: store.apply(batch(2), cursor(2)),
        lambda: store.apply_async(batch(2), cursor(2)),
        lambda: store.put("k", b"v"),
        lambda: store.create("k", b"v"),
        lambda: store.delete("k"),
        store.compact,
        lambda: store.export_to(tmp_path / "artifact"),
        store.reopen,
        store.snapshot,
        store.stats,
        store.cursor,
        lambda: store.get("k"),
        lambda: store.range(""),
        lambda: len(store),
        lambda: "k" in store,
    ):
        with pytest.raises(StoreClosed):
            use()
    for ref in (writer, reader):
        with pytest.raises(foldlog.store.pykka.ActorDeadError):
            ref.ask(Get("k"), timeout=DEADLINE_S)
        with pytest.raises(foldlog.store.pykka.ActorDeadError):
            ref.tell(Compact())
        assert not ref.is_alive()
    assert repr(store).endswith("closed>")


def test_closing_during_applies_answers_each_of_them(open_store, path):
    store = open_store()
    begun = threading.Semaphore(0)

    def apply(worker):
        answered = []
        for number in range(1000):
            number = number * 8 + worker + 1
            try:
                store.apply(batch(number), cursor(number), DEADLINE_S)
            except StoreClosed:
                return answered
            answered.append(number)
            begun.release()
        return answered

    with ThreadPoolExecutor(8) as pool:
        applying = [pool.submit(apply, worker) for worker in range(8)]
        for _ in range(40):
            assert begun.acquire(timeout=DEADLINE_S)
        store.close(DEADLINE_S)
        answered = [number for numbers in results(applying) for number in numbers]
    truth = read_back(path)
    assert {f"batch/{number:06}" for number in answered} == {
        key for key in truth.entries if key.startswith("batch/")
    }
    assert truth.seq == len(answered)
    nothing_pending(store)


def test_what_waits_when_the_store_closes_is_still_written(open_store, steps, path):
    store = open_store()
    gate, futures = commit_group(store, steps, range(1, 11))
    closing = in_thread(store.close, DEADLINE_S)
    until(lambda: store.state is State.CLOSING, "closing has begun")
    with pytest.raises(StoreClosed):
        store.apply_async(batch(11), cursor(11))
    assert store.cursor() == WatchCursor.none(), "reads go on until the end"
    gate.open()
    closing.result(DEADLINE_S)
    assert results(futures) == list(range(1, 11))
    assert read_back(path).seq == 10


@pytest.mark.parametrize("thread", ["writer", "reader"])
def test_closing_from_a_thread_of_the_store_returns_at_once_and_closes(
    open_store, steps, path, monkeypatch, thread
):
    store = open_store(readers=1)
    store.apply(batch(1), cursor(1))
    took: list[float] = []

    def close(_future=None):
        began = time.monotonic()
        store.close()
        took.append(time.monotonic() - began)

    if thread == "writer":
        gate, future = steps.parked("writer.before_write", store.apply_async, batch(2), cursor(2))
        future.add_done_callback(close)
        gate.open()
        assert future.result(DEADLINE_S) == 2
    else:
        from foldlog.actors.store.readers import Reader

        monkeypatch.setattr(Reader, "_answer", lambda self, message: close())
        store.reader.ask(Get("k"), timeout=DEADLINE_S)
    assert store._core.ended.wait(DEADLINE_S)
    assert took[0] < CLOSE_TIMEOUT_S, "it did not wait for itself"
    assert store.state is State.CLOSED
    until(lambda: not store._supervisor.thread.is_alive(), "the supervisor has ended")
    assert read_back(path).cursor == cursor(2 if thread == "writer" else 1)


def test_writing_and_waiting_from_a_callback_on_the_writers_thread_is_refused_and_sending_is_not(
    open_store, steps
):
    """It waited for itself: the writer stood still until the deadline."""
    store = open_store()
    outcomes: list[object] = []

    def on_done(_future):
        try:
            outcomes.append(store.apply(batch(2), cursor(2), timeout_s=DEADLINE_S))
        except FoldlogError as error:
            outcomes.append(error)
        outcomes.append(store.apply_async(batch(3), cursor(3)))

    gate, future = steps.parked("writer.before_write", store.apply_async, batch(1), cursor(1))
    future.add_done_callback(on_done)
    gate.open()
    future.result(DEADLINE_S)
    until(lambda: len(outcomes) == 2, "the callback has run")
    assert isinstance(outcomes[0], FoldlogError)
    assert not isinstance(outcomes[0], RequestTimeout)
    assert "apply_async" in str(outcomes[0])
    assert outcomes[1].result(DEADLINE_S) == 2


def test_two_stores_in_one_process_do_not_touch_each_other(open_store, steps, tmp_path, path):
    one, two = open_store(), open_store(path=tmp_path / "two.log", step=None)
    steps.crash("writer.before_write", SystemExit)
    one.apply(batch(1), cursor(1))
    two.apply(batch(2), cursor(2))
    one.close()
    assert two.state is State.RUNNING
    two.apply(batch(3), cursor(3))
    assert two.stats().restarts == ()
    assert two.get("batch/000001") is None


def test_the_same_log_opens_once_by_any_name(open_store, path, tmp_path, monkeypatch):
    store = open_store()
    (tmp_path / "link.log").symlink_to(path)
    monkeypatch.chdir(path.parent)
    for name in (path, tmp_path / "link.log", path.name):
        with pytest.raises(StoreLocked):
            foldlog.open(name)
    store.apply(batch(1), cursor(1))
    store.close()
    with foldlog.open(path.name) as again:
        assert again.cursor() == cursor(1)


def test_a_relative_path_survives_a_change_of_folder(nothing_left, path, tmp_path, monkeypatch):
    monkeypatch.chdir(path.parent)
    with foldlog.open("state.log") as store:
        monkeypatch.chdir(tmp_path)
        store.apply(batch(1), cursor(1))
        store.compact()
    assert read_back(path).seq == 1


def test_a_store_is_not_pickled_and_its_entries_are(open_store):
    store = open_store()
    store.apply(batch(1), cursor(1))
    with pytest.raises(TypeError, match="follower"):
        pickle.dumps(store)
    assert pickle.loads(pickle.dumps(store.range(""))) == store.range("")


@pytest.mark.parametrize("as_error", [False, True], ids=["a warning", "warnings are errors"])
def test_a_store_that_is_dropped_warns_stops_its_threads_and_frees_the_lock(
    nothing_left, path, as_error, monkeypatch
):
    unraisable: list[object] = []
    monkeypatch.setattr("sys.unraisablehook", lambda args: unraisable.append(args.exc_type))
    store = foldlog.open(path)
    store.apply(batch(1), cursor(1))
    ended = store._core.ended
    if as_error:
        del store
        gc.collect()
        assert unraisable == [ResourceWarning]
    else:
        with pytest.warns(ResourceWarning, match="dropped without close"):  # noqa: PT031
            del store
            gc.collect()
    assert ended.wait(DEADLINE_S)
    assert read_back(path).seq == 1


@pytest.mark.parametrize(
    "value", [{"readers": 0}, {"readers": 65}, {"sync": "often"}, {"sync_interval_s": 0}]
)
def test_bad_options_are_refused_before_anything_starts(nothing_left, path, value):
    with pytest.raises(ValueError, match=next(iter(value))):
        foldlog.open(path, **value)
    assert not path.exists()


def test_messages_sent_to_a_store_that_closes_all_end(open_store, steps):
    store = open_store()
    store.apply([Put("k", b"v")], cursor(1))
    gate = steps.park("writer.before_write")
    asks = [
        store.writer.ask(Apply(batch(number), cursor(number)), block=False)
        for number in range(2, 12)
    ]
    reads = [store.reader.ask(Get("k"), block=False) for _ in range(50)]
    gate.wait_until_reached()
    closing = in_thread(store.close, DEADLINE_S)
    gate.open()
    closing.result(DEADLINE_S)
    assert [ask.get(timeout=DEADLINE_S) for ask in asks] == list(range(2, 12))
    assert {read.get(timeout=DEADLINE_S).value for read in reads} == {b"v"}


def test_a_dropped_store_is_waited_for_by_the_next_open_of_its_log(path, steps):
    """An interrupt right after `open` drops the store: opening again raised StoreLocked."""
    store = foldlog.open(path, step=steps)
    store.apply(batch(1), cursor(1))
    gate, ended = steps.park("writer.stop"), store._core.ended
    with pytest.warns(ResourceWarning, match="without close"):  # noqa: PT031
        del store
        gc.collect()
    gate.wait_until_reached()
    opening = in_thread(foldlog.open, path)
    until(lambda: ended._bell._spots or opening.done(), "it waits")
    gate.open()
    with opening.result(DEADLINE_S) as store:
        assert store.cursor() == cursor(1)
