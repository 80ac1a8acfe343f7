"""From open to the end: closing in every way that a program may, and forgetting to."""

from __future__ import annotations

import gc
import pickle
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from actor_kit import DEADLINE_S, batch, cursor, in_thread, nothing_pending, read_back, results, script, until

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
    assert {f"batch/{number:06}" for number in answered} == {key for key in truth.entries if key.startswith("batch/")}
    assert truth.seq == len(answered)
    nothing_pending(store)


def test_what_waits_when_the_store_closes_is_still_written(open_store, steps, path):
    store = open_store()
    gate = steps.park("writer.before_write")
    futures = [store.apply_async(batch(number), cursor(number)) for number in range(1, 11)]
    gate.wait_until_reached()
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
def test_closing_from_a_thread_of_the_store_returns_at_once_and_closes(open_store, steps, path, monkeypatch, thread):
    store = open_store(readers=1)
    store.apply(batch(1), cursor(1))
    took: list[float] = []

    def close(_future=None):
        began = time.monotonic()
        store.close()
        took.append(time.monotonic() - began)

    if thread == "writer":
        gate = steps.park("writer.before_write")
        future = store.apply_async(batch(2), cursor(2))
        gate.wait_until_reached()
        future.add_done_callback(close)
        gate.open()
        assert future.result(DEADLINE_S) == 2
    else:
        from foldlog.actors.readers import Reader

        monkeypatch.setattr(Reader, "_answer", lambda self, message: close())
        store.reader.ask(Get("k"), timeout=DEADLINE_S)
    assert store._core.ended.wait(DEADLINE_S)
    assert took[0] < 5.0
    assert store.state is State.CLOSED
    until(lambda: not store._supervisor.thread.is_alive(), "the supervisor has ended")
    assert read_back(path).cursor == cursor(2 if thread == "writer" else 1)


def test_writing_and_waiting_from_a_callback_on_the_writers_thread_is_refused_and_sending_is_not(open_store, steps):
    """It waited for itself: the writer stood still until the deadline."""
    store = open_store()
    outcomes: list[object] = []

    def on_done(_future):
        try:
            outcomes.append(store.apply(batch(2), cursor(2), timeout_s=DEADLINE_S))
        except FoldlogError as error:
            outcomes.append(error)
        outcomes.append(store.apply_async(batch(3), cursor(3)))

    gate = steps.park("writer.before_write")
    future = store.apply_async(batch(1), cursor(1))
    gate.wait_until_reached()
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
def test_a_store_that_is_dropped_warns_stops_its_threads_and_frees_the_lock(nothing_left, path, as_error, monkeypatch):
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


@pytest.mark.parametrize("value", [{"readers": 0}, {"readers": 65}, {"sync": "often"}, {"sync_interval_s": 0}])
def test_bad_options_are_refused_before_anything_starts(nothing_left, path, value):
    with pytest.raises(ValueError, match=next(iter(value))):
        foldlog.open(path, **value)
    assert not path.exists()


# Processes.


def test_a_script_that_forgets_to_close_ends_promptly_with_all_that_was_answered_on_disk(path):
    began = time.monotonic()
    run = script(
        """
        import sys, foldlog
        store = foldlog.open(sys.argv[1])
        for number in range(1, 101):
            store.apply([foldlog.Put(f"k{number}", b"v")], foldlog.WatchCursor.from_u64(number))
        for number in range(101, 201):
            store.apply_async([foldlog.Put(f"k{number}", b"v")], foldlog.WatchCursor.from_u64(number))
        print(store.cursor().as_u64() >= 100)
        """,
        path,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "True\n", "")
    assert time.monotonic() - began < 10
    truth = read_back(path)
    assert truth.seq == 200, "what waits at the end is served, too"
    with foldlog.open(path) as store:
        assert store.report.cut_bytes == 0


@pytest.mark.parametrize(
    "end",
    ["raise SystemExit(3)", "raise LookupError('mine')", "os.kill(os.getpid(), signal.SIGTERM)", "os._exit(5)", "os.abort()"],
)
def test_however_a_process_ends_what_was_answered_is_there(path, end):
    run = script(
        f"""
        import os, resource, signal, sys, foldlog
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        store = foldlog.open(sys.argv[1])
        for number in range(1, 51):
            store.apply([foldlog.Put(f"k{{number}}", b"v")], foldlog.WatchCursor.from_u64(number))
        {end}
        """,
        path,
    )
    assert run.returncode != 0
    truth = read_back(path)
    assert (truth.seq, truth.cursor) == (50, cursor(50))


def test_another_atexit_handler_finds_the_store_closed_and_does_not_hang(path):
    run = script(
        """
        import atexit, sys
        import foldlog
        def late():
            try:
                store.apply([], foldlog.WatchCursor.from_u64(2))
            except foldlog.StoreClosed:
                print("closed")
        def early():
            print(store.apply([], foldlog.WatchCursor.from_u64(1)))
        store = foldlog.open(sys.argv[1])
        atexit.register(early)  # runs before foldlog's, which was registered at import
        import foldlog.store
        atexit.unregister(foldlog.store._close_at_exit); atexit.register(late); atexit.register(foldlog.store._close_at_exit)
        atexit.unregister(early); atexit.register(early)
        """,
        path,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "1\nclosed\n", "")


INTERRUPTED = """
    import os, signal, sys, threading, foldlog
    gate, reached, heard = threading.Event(), threading.Event(), threading.Event()
    def step(name):
        if name == sys.argv[2] and not reached.is_set():
            reached.set()
            gate.wait(20)
    def once(*_):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        heard.set()
        raise KeyboardInterrupt
    signal.signal(signal.SIGINT, once)
    def interrupt():
        reached.wait(20)
        while True:  # a signal that comes just before the main thread waits for a lock is not heard until it is released
            os.kill(os.getpid(), signal.SIGINT)
            if heard.wait(0.2):
                return
    threading.Thread(target=interrupt, daemon=True).start()
"""


def test_an_interrupt_frees_a_blocked_apply_and_the_store_goes_on(path):
    run = script(
        INTERRUPTED
        + """
    store = foldlog.open(sys.argv[1], step=step)
    try:
        store.apply([foldlog.Put("a", b"1")], foldlog.WatchCursor.from_u64(1))
    except KeyboardInterrupt:
        print("interrupted")
    gate.set()
    print(store.apply([foldlog.Put("b", b"2")], foldlog.WatchCursor.from_u64(2)), store.get("a").value, store.state)
    store.close()
    """,
        path,
        "writer.before_write",
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "interrupted\n2 b'1' running\n", "")


@pytest.mark.parametrize("step", ["writer.start", "writer.stop"])
def test_an_interrupt_of_open_or_close_ends_the_process_in_order(path, step):
    run = script(
        INTERRUPTED
        + """
    try:
        with foldlog.open(sys.argv[1], step=step) as store:
            store.apply([foldlog.Put("a", b"1")], foldlog.WatchCursor.from_u64(1))
    except KeyboardInterrupt:
        print("interrupted")
    gate.set()
    for thread in threading.enumerate():
        if thread.name.startswith("foldlog"):
            thread.join(20)
    with foldlog.open(sys.argv[1]) as store:
        print(store.cursor())
    """,
        path,
        step,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[0] == "interrupted"
    assert run.stderr == ""


def test_a_forked_child_reads_and_is_refused_to_write_and_its_end_does_not_touch_the_parent(path):
    run = script(
        """
        import os, sys, foldlog, pykka
        from foldlog import Put, WatchCursor, Get
        store = foldlog.open(sys.argv[1])
        store.apply([Put("a", b"1")], WatchCursor.from_u64(1))
        store.compact()
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            out = [store.get("a").value, str(store.state)]
            for use in (
                lambda: store.apply([], WatchCursor.from_u64(9)),
                lambda: store.apply_async([], WatchCursor.from_u64(9)),
                lambda: store.put("k", b"v"),
                store.compact,
                store.reopen,
                lambda: store.reader.ask(Get("a"), timeout=5),
                lambda: store.writer.tell(foldlog.Compact()),
            ):
                try:
                    use()
                    out.append("no error")
                except foldlog.ForkedStore:
                    out.append("forked")
            store.close()
            print(*out)
            sys.exit(0)  # runs atexit handlers
        assert os.waitpid(pid, 0)[1] == 0
        store.apply([Put("b", b"2")], WatchCursor.from_u64(2))
        print(store.get("b").value, store.state)
        try:
            foldlog.open(sys.argv[1])
        except foldlog.StoreLocked:
            print("locked")
        store.close()
        """,
        path,
    )
    assert run.stderr == ""
    assert run.stdout.splitlines() == ["b'1' forked" + " forked" * 7, "b'2' running", "locked"]
    assert read_back(path).seq == 2


def test_the_lock_is_free_when_the_parent_dies_though_a_forked_child_lives(path, tmp_path):
    run = script(
        """
        import os, sys, foldlog
        store = foldlog.open(sys.argv[1])
        store.apply([foldlog.Put("a", b"1")], foldlog.WatchCursor.from_u64(1))
        read, write = os.pipe()
        if os.fork() == 0:
            os.close(1); os.close(2)
            os.mkfifo(sys.argv[2] + ".fifo")
            os.rename(sys.argv[2] + ".fifo", sys.argv[2])
            os.write(write, b"x")
            open(sys.argv[2]).read()  # until the test opens it
            os._exit(0)
        os.read(read, 1)
        os._exit(0)
        """,
        path,
        tmp_path / "fifo",
    )
    assert run.returncode == 0, run.stderr
    try:
        with foldlog.open(path) as store:
            assert store.cursor() == cursor(1)
            store.apply(batch(2), cursor(2))
    finally:
        (tmp_path / "fifo").open("w").close()


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no kill here")
def test_a_process_that_is_killed_under_load_has_all_that_it_reported(path):
    run = script(
        """
        import os, signal, sys, threading, foldlog
        store = foldlog.open(sys.argv[1])
        lock = threading.Lock()
        def work(worker):
            for number in range(1000):
                key = f"{worker}/{number}"
                seq = store.apply([foldlog.Put(key, b"v")], foldlog.WatchCursor.from_u64(number))
                with lock:
                    os.write(1, f"{key} {seq}\\n".encode())
                    if seq >= 400:
                        os.kill(os.getpid(), signal.SIGKILL)
        for worker in range(4):
            threading.Thread(target=work, args=(worker,)).start()
        """,
        path,
    )
    assert run.returncode == -signal.SIGKILL
    reported = [line.split()[0] for line in run.stdout.splitlines()]
    assert len(reported) > 300
    truth = read_back(path)
    assert set(reported) <= set(truth.entries)
    assert truth.seq == len(truth.entries)


def test_messages_sent_to_a_store_that_closes_all_end(open_store, steps):
    store = open_store()
    store.apply([Put("k", b"v")], cursor(1))
    gate = steps.park("writer.before_write")
    asks = [store.writer.ask(Apply(batch(number), cursor(number)), block=False) for number in range(2, 12)]
    reads = [store.reader.ask(Get("k"), block=False) for _ in range(50)]
    gate.wait_until_reached()
    closing = in_thread(store.close, DEADLINE_S)
    gate.open()
    closing.result(DEADLINE_S)
    assert [ask.get(timeout=DEADLINE_S) for ask in asks] == list(range(2, 12))
    assert {read.get(timeout=DEADLINE_S).value for read in reads} == {b"v"}
