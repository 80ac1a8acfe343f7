"""How a process may end or fork with a store open: scripts run in processes of their own."""

from __future__ import annotations

import signal
import time

import pytest
from actor_kit import batch, cursor, read_back, script

import foldlog

ON_EACH_ENGINE = True


def test_a_script_that_forgets_to_close_ends_promptly_with_all_that_was_answered_on_disk(path):
    run = script(
        """
        import sys, time, foldlog
        store = foldlog.open(sys.argv[1])
        for number in range(1, 101):
            store.apply([foldlog.Put(f"k{number}", b"v")], foldlog.WatchCursor.from_u64(number))
        for number in range(101, 201):
            store.apply_async([foldlog.Put(f"k{number}", b"v")], foldlog.WatchCursor.from_u64(number))
        print(store.cursor().as_u64() >= 100, time.monotonic())
        """,
        path,
        timeout_s=60.0,
    )
    ended = time.monotonic()  # one clock for all processes
    told, last_line = run.stdout.split()
    assert (run.returncode, told, run.stderr) == (0, "True", "")
    assert ended - float(last_line) < 10
    truth = read_back(path)
    assert truth.seq == 200, "what waits at the end is served, too"
    with foldlog.open(path) as store:
        assert store.report.cut_bytes == 0


@pytest.mark.parametrize(
    "end",
    [
        "raise SystemExit(3)",
        "raise LookupError('mine')",
        "os.kill(os.getpid(), signal.SIGTERM)",
        "os._exit(5)",
        "os.abort()",
    ],
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
        import foldlog.life_cycle
        atexit.unregister(foldlog.life_cycle._close_at_exit); atexit.register(late); atexit.register(foldlog.life_cycle._close_at_exit)
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
            gate.wait(60)
    def once(*_):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        heard.set()
        raise KeyboardInterrupt
    signal.signal(signal.SIGINT, once)
    def interrupt():
        reached.wait(60)
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
    seq = store.apply([foldlog.Put("b", b"2")], foldlog.WatchCursor.from_u64(2))
    store.reopen()  # waits for the end of the restart, which may have answered before
    print(seq, store.get("a").value, store.state)
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
    foldlog.store.UNOPENED_TIMEOUT_S = 0.1  # how long the interrupted call waits for the step
    try:
        with foldlog.open(sys.argv[1], step=step) as store:
            store.apply([foldlog.Put("a", b"1")], foldlog.WatchCursor.from_u64(1))
    except KeyboardInterrupt:
        print("interrupted")
    gate.set()
    for thread in threading.enumerate():
        if thread.name.startswith("foldlog"):
            thread.join(60)
    with foldlog.open(sys.argv[1]) as store:
        print(store.cursor())
    """,
        path,
        step,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[0] == "interrupted"
    assert run.stderr == ""


@pytest.mark.append_log("RocksDB is not read in a fork")
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
