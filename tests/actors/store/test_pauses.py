"""A process that was paused, a writer that was stuck and comes back, a clock that jumps."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from actor_kit import DEADLINE_S, batch, cursor, impatient, in_thread, read_back, until

from foldlog import State, StoreFailed, WatchCursor
from foldlog.actors.base.answers import Answer
from foldlog.actors.store import supervisor as supervisor_module
from foldlog.actors.store.policy import LATE_S, StuckClock, lateness_s, next_restart_delay_s

ON_EACH_ENGINE = True


def test_time_for_which_the_process_stood_still_does_not_count():
    clock = StuckClock()
    assert clock.look(None, 10.0) == 0.0
    assert clock.look(10.5, 11.0) == 0.5
    clock.note_wait(1.0, 101.0)
    assert clock.look(10.5, 112.0) == 1.5
    assert clock.look(10.5, 113.0) == 2.5
    assert clock.look(112.5, 113.5) == 1.0, "it is at another thing by now"


def test_a_wait_is_late_only_beyond_what_a_busy_machine_takes():
    assert lateness_s(1.0, 1.0 + LATE_S / 2) == 0.0
    assert lateness_s(1.0, 4.0) == 3.0


def test_a_shortage_of_descriptors_is_waited_out_and_other_errors_are_not():
    window = {"max_restarts": 2, "window_s": 60.0, "delay_s": 0.05}
    short, broken = OSError(24, "Too many open files"), OSError(5, "Input/output error")
    assert next_restart_delay_s(broken, [1.0, 2.0], 3.0, **window) is None
    assert next_restart_delay_s(short, [1.0, 2.0], 3.0, **window) == 0.1
    assert next_restart_delay_s(short, [1.0] * 50, 3.0, **window) == 5.0
    assert next_restart_delay_s(short, [1.0, 2.0], 3.0, **window, patient=False) is None


PAUSED = """
    import sys, threading
    import foldlog
    from foldlog.actors.store import supervisor
    from foldlog.storage.log.files import Files
    looked = threading.Semaphore(0)
    class Clock(supervisor.StuckClock):
        def look(self, *given):
            stuck_s = super().look(*given)
            looked.release()
            return stuck_s
    class InMemory(Files):
        def sync(self, fd):
            pass  # a disk may take longer than stuck_after_s
    def step(name):
        if name == "writer.before_write":
            print("busy", flush=True)
            sys.stdin.readline()  # the pause
            while looked.acquire(blocking=False):
                pass
            for _ in range(2):
                looked.acquire()
    supervisor.HEALTH_CHECK_S, supervisor.StuckClock = 0.05, Clock
    store = foldlog.open(
        sys.argv[1], stuck_after_s=2.0, sync="always", files=InMemory(), step=step
    )
    store.apply([foldlog.Put("k", b"v")], foldlog.WatchCursor.from_u64(1))
    print(store.state, store.stats().reason, flush=True)
    store.close()
"""


def test_a_process_that_was_paused_goes_on_as_if_nothing_had_been(path):
    """SIGSTOP, a debugger, a VM snapshot: the supervisor took the pause for a stuck writer."""
    code = textwrap.dedent(PAUSED)
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", code, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            assert process.stdout.readline() == "busy\n"
            os.kill(process.pid, signal.SIGSTOP)
            time.sleep(2.5)  # the pause itself, longer than stuck_after_s
            os.kill(process.pid, signal.SIGCONT)
            out, _ = process.communicate("\n", timeout=DEADLINE_S)
        finally:
            process.kill()
    assert out == "running \n"


def test_a_writer_that_comes_back_ends_the_failure_by_itself(open_store, path, steps, monkeypatch):
    monkeypatch.setattr(supervisor_module, "HEALTH_CHECK_S", 0.02)
    store = open_store()
    store.apply(batch(1), cursor(1))
    gate, stuck = steps.parked("writer.before_write", store.apply_async, batch(2), cursor(2))
    with impatient(store), pytest.raises(StoreFailed, match="stuck") as caught:
        stuck.result(DEADLINE_S)
    assert caught.value.applied is None
    with pytest.raises(StoreFailed) as refused:
        store.apply(batch(3), cursor(3))
    assert refused.value.applied is False
    gate.open()
    until(lambda: store.state is State.RUNNING, "the store runs again")
    assert store.stats().reason == ""
    store.apply(batch(4), cursor(4))
    assert steps.seen["writer.start"] == 1
    store.close()
    assert read_back(path).cursor == cursor(4)


def test_a_writer_that_comes_back_only_to_die_is_restarted(open_store, path, steps, monkeypatch):
    monkeypatch.setattr(supervisor_module, "HEALTH_CHECK_S", 0.02)
    store = open_store()
    store.apply(batch(1), cursor(1))
    steps.crash("writer.after_write", SystemExit)
    gate, stuck = steps.parked("writer.after_write", store.apply_async, batch(2), cursor(2))
    with impatient(store), pytest.raises(StoreFailed, match="stuck"):
        stuck.result(DEADLINE_S)
    gate.open()
    until(lambda: store.state is State.RUNNING, "the store runs again")
    assert store.apply(batch(3), cursor(3)) == 3
    store.close()
    assert read_back(path).cursor == cursor(3)


def test_who_dies_while_the_writer_is_stuck_is_restarted_though_the_writer_dies_as_well(
    open_store, steps, tmp_path, monkeypatch
):
    """Maintenance stayed dead: each later compaction waited out its timeout."""
    monkeypatch.setattr(supervisor_module, "HEALTH_CHECK_S", 0.02)
    store = open_store()
    steps.crash("export.write")
    at_work, export = steps.parked(
        "export.write", in_thread, store.export_to, tmp_path / "artifact", DEADLINE_S
    )
    steps.crash("writer.before_write")
    gate, stuck = steps.parked("writer.before_write", store.apply_async, batch(1), cursor(1))
    with impatient(store), pytest.raises(StoreFailed, match="stuck"):
        stuck.result(DEADLINE_S)
    at_work.open()
    assert export.result(DEADLINE_S).cursor == WatchCursor.none()  # by its caller, who sees that
    gate.open()
    until(lambda: store.state is State.RUNNING, "the store runs again")
    store.apply(batch(2), cursor(2))
    store.compact(DEADLINE_S)
    assert store.stats().compactions == 1


def test_a_second_reopen_waits_for_the_first(open_store, steps):
    """Both callers were told it succeeded while the log was being replayed; the replay failed."""
    store = open_store(max_restarts=0)
    steps.crash("writer.before_write")
    with pytest.raises(StoreFailed):
        store.apply(batch(1), cursor(1))
    until(lambda: store.state is State.FAILED, "the store has failed")
    steps.crash("writer.start")
    gate, first = steps.parked("writer.start", in_thread, store.reopen, DEADLINE_S)
    reopens = [first, *(in_thread(store.reopen, DEADLINE_S) for _ in range(3))]
    until(lambda: len(store._supervisor._reopening) == 4, "all have asked")
    assert not any(reopen.done() for reopen in reopens)
    gate.open()
    for reopen in reopens:
        with pytest.raises(StoreFailed):
            reopen.result(DEADLINE_S)
    store.reopen(DEADLINE_S)
    assert store.state is State.RUNNING


def test_what_reaches_a_supervisor_that_has_ended_is_answered(open_store):
    """`reopen` and `close` that came as the store's last thread ended waited out their timeouts."""
    store = open_store()
    supervisor = store._supervisor
    store.close(DEADLINE_S)
    closing = supervisor_module.CloseNow(Answer())
    reopening = supervisor_module.Reopen(Answer())
    supervisor.post(closing)
    supervisor.post(reopening)
    assert closing.future.result(0) is None
    assert "is closed" in str(reopening.future.exception(0))
