"""The table in the supervisor's docstring, row by row; and the rule by which it restarts or gives up."""

from __future__ import annotations

import contextlib
import errno
import threading
from pathlib import Path

import pykka
import pytest
from actor_kit import DEADLINE_S, FATAL, batch, cursor, in_thread, read_back, results, until
from logfiles import some_batches, write_log

import foldlog
from foldlog import (
    CorruptLogError,
    FoldlogError,
    Get,
    InvalidFormatError,
    KeyExists,
    LogChangedError,
    Put,
    State,
    StoreClosed,
    StoreFailed,
    StoreLocked,
    WriterCrashed,
)
from foldlog.actors.supervisor import MAX_DELAY_S, PERMANENT, Supervisor, next_restart_delay_s

# The rule.


def delay(restarts_s, now_s=100.0, error=None, max_restarts=5):
    return next_restart_delay_s(error or OSError("x"), restarts_s, now_s, max_restarts=max_restarts, window_s=60.0, delay_s=0.05)


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


# The rows.


def test_bad_arguments_are_answered_and_the_actor_lives_on(open_store, steps):
    """Row: a check of the arguments."""
    store = open_store()
    starts = steps.seen["writer.start"]
    with pytest.raises(TypeError):
        store.apply([Put("k", "text")], cursor(1))
    with pytest.raises(ValueError, match=r"surrogate|encode|UTF-8|utf-8"):
        store.writer.ask(foldlog.Apply([Put("\ud800", b"v")], cursor(1)), timeout=DEADLINE_S)
    with pytest.raises(TypeError):
        store.reader.ask(Get(7), timeout=DEADLINE_S)
    store.put("k", b"v")
    with pytest.raises(KeyExists):
        store.create("k", b"w")
    assert steps.seen["writer.start"] == starts
    assert store.stats().restarts == ()


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_write_that_was_undone_is_the_callers_error_and_the_writer_goes_on(open_store, path, files, code):
    """Row: a write (EIO, ENOSPC) that was undone."""
    store = open_store(files=files)
    store.apply(batch(1), cursor(1))
    files.fail("write", code)
    with pytest.raises(OSError, match=r".*") as caught:
        store.apply(batch(2), cursor(2))
    assert caught.value.errno == code
    assert store.cursor() == cursor(1)
    store.apply(batch(3), cursor(3))
    assert store.stats().restarts == ()
    store.close()
    truth = read_back(path)
    assert truth.seq == 2
    assert "batch/000002" not in truth.entries


def test_an_fsync_that_failed_is_healed_by_a_new_file_and_the_caller_gets_the_answer(open_store, path, files):
    """Row: an fsync, or undoing a write."""
    store = open_store(files=files, sync="always")
    store.apply(batch(1), cursor(1))
    inode = path.stat().st_ino
    files.fail("sync")
    assert store.apply(batch(2), cursor(2)) == 2
    assert path.stat().st_ino != inode
    until(lambda: store.state is State.RUNNING, "the store runs")
    assert store.synced_cursor == cursor(2)
    assert store.stats().restarts[-1].actor == "writer"


@pytest.mark.parametrize("error", FATAL, ids=lambda error: error.__name__)
def test_an_error_in_a_handler_is_healed_by_replay_and_the_caller_gets_the_answer(open_store, steps, error):
    """Rows: a bug, an Exception in a handler; SystemExit, BaseException."""
    store = open_store()
    other = pykka.ThreadingActor.start()  # of the same process, and none of ours
    try:
        steps.crash("writer.before_write", error)
        assert store.apply(batch(1), cursor(1)) == 1
        assert other.is_alive()
    finally:
        other.stop()
    assert [restart.actor for restart in store.stats().restarts] == ["writer"]
    assert error.__name__ in store.stats().restarts[0].reason


def test_a_request_that_kills_the_writer_twice_is_told_so(open_store, steps):
    """Row: a bug: one that does it again."""
    store = open_store()
    steps.crash("writer.before_write", times=2)
    with pytest.raises(WriterCrashed):
        store.apply(batch(1), cursor(1))
    assert store.apply(batch(2), cursor(2)) == 1


@pytest.mark.parametrize("error", FATAL, ids=lambda error: error.__name__)
def test_opening_raises_what_the_first_start_met(nothing_left, path, steps, error):
    """Row: on_start, at open."""
    steps.crash("writer.start", error)
    with pytest.raises(error, match=r"injected at writer\.start"):
        foldlog.open(path, step=steps)
    foldlog.open(path).close()


def test_a_start_that_fails_later_counts_as_a_restart(open_store, steps):
    """Row: on_start, later: delayed."""
    store = open_store()
    steps.crash("writer.before_write")
    steps.crash("writer.start", times=2)
    assert store.apply(batch(1), cursor(1)) == 1
    assert len(store.stats().restarts) == 3
    assert store.stats().restarts[0].delay_s == 0.0
    assert store.stats().restarts[1].delay_s > 0


def test_a_start_that_fails_too_often_fails_the_store(open_store, steps):
    """Row: on_start: too many: FAILED."""
    store = open_store(max_restarts=2)
    steps.crash("writer.before_write")
    steps.crash("writer.start", times=None)
    with pytest.raises(StoreFailed, match=r"injected at writer\.start"):
        store.apply(batch(1), cursor(1))
    assert store.state is State.FAILED


@pytest.mark.parametrize("actor", ["writer", "maintenance", "reader", "syncer"])
def test_stopping_that_fails_is_tried_again(open_store, path, steps, actor):
    """Row: on_stop: tried again."""
    store = open_store()
    store.apply(batch(1), cursor(1))
    crash = steps.crash(f"{actor}.stop", SystemExit)
    store.close(DEADLINE_S)
    assert crash.fired == 1
    assert store.state is State.CLOSED
    assert read_back(path).cursor == cursor(1)


@pytest.mark.parametrize("actor", ["writer", "maintenance", "reader", "syncer"])
def test_stopping_that_fails_for_good_is_let_go_and_the_lock_is_free(open_store, path, steps, actor):
    """Row: on_stop: then let go; closed, the lock released."""
    store = open_store(max_restarts=1)
    store.apply(batch(1), cursor(1))
    steps.crash(f"{actor}.stop", times=None)
    with pytest.raises(RuntimeError, match="injected"):
        store.close(DEADLINE_S)
    assert store.state is State.CLOSED
    assert read_back(path).cursor == cursor(1)


def corrupt(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("damage", ["flipped bit", "another log", "an older copy"])
def test_a_log_that_cannot_be_replayed_fails_the_store_at_once_and_reads_go_on(open_store, path, steps, tmp_path, damage):
    """Row: the log: corrupt, replaced, cut, regressed."""
    store = open_store(sync="never")
    store.apply(batch(1), cursor(1))
    older = path.read_bytes()
    store.apply(batch(2), cursor(2))
    gate = steps.park("writer.before_write")
    steps.crash("writer.before_write")
    answer = store.apply_async(batch(3), cursor(3))
    gate.wait_until_reached()
    if damage == "flipped bit":
        corrupt(path)
    elif damage == "an older copy":
        path.write_bytes(older)
    else:
        write_log(tmp_path / "other.log", some_batches(5))
        (tmp_path / "other.log").replace(path)
    kept = path.read_bytes()
    gate.open()
    with pytest.raises(StoreFailed):
        answer.result(DEADLINE_S)
    assert store.state is State.FAILED
    assert steps.seen["writer.start"] == 2, "trying again cannot help"
    assert store.get("shared/0").value == b"2"
    assert store.reader.ask(Get("shared/0"), timeout=DEADLINE_S).value == b"2"
    with pytest.raises(StoreFailed):
        store.apply(batch(4), cursor(4))
    store.close()
    assert path.read_bytes() == kept


def test_a_log_that_is_locked_or_none_is_refused_at_open(open_store, path, nothing_left, tmp_path):
    """Row: the log: locked; and what open raises for a file that is none."""
    open_store()
    with pytest.raises(StoreLocked):
        foldlog.open(path)
    (tmp_path / "x.log").write_bytes(b"no log at all" * 10)
    with pytest.raises(InvalidFormatError):
        foldlog.open(tmp_path / "x.log")
    write_log(tmp_path / "y.log", some_batches(3))
    corrupt(tmp_path / "y.log")
    with pytest.raises(CorruptLogError):
        foldlog.open(tmp_path / "y.log")


def test_a_log_that_was_deleted_is_written_anew_from_memory(open_store, path):
    """Row: the log: deleted."""
    store = open_store()
    store.apply(batch(1), cursor(1))
    path.unlink()
    assert store.apply(batch(2), cursor(2)) == 2
    store.close()
    truth = read_back(path)
    assert truth.seq == 2
    assert "batch/000001" in truth.entries


def test_a_reader_that_dies_is_restarted_and_the_message_is_tried_again(open_store, steps):
    """Row: a reader."""
    store = open_store(readers=1)
    store.put("k", b"v")
    steps.crash("reader.handle", SystemExit)
    assert store.reader.ask(Get("k"), timeout=DEADLINE_S).value == b"v"
    steps.crash("reader.handle", times=2)
    with pytest.raises(WriterCrashed):
        store.reader.ask(Get("k"), timeout=DEADLINE_S)
    assert store.reader.ask(Get("k"), timeout=DEADLINE_S).value == b"v"
    assert {restart.actor for restart in store.stats().restarts} == {"reader-0"}


def test_maintenance_that_dies_fails_the_job_in_hand_and_does_the_next(open_store, steps, tmp_path):
    """Row: maintenance: a job in hand fails."""
    store = open_store()
    for number, (step, run) in enumerate(
        [("compact.write", store.compact), ("export.write", lambda: store.export_to(tmp_path / "artifact"))], 1
    ):
        store.apply(batch(number), cursor(number))
        steps.crash(step, KeyboardInterrupt)
        with pytest.raises(WriterCrashed):
            run()
        run()
    assert store.stats().compactions == 1
    assert (tmp_path / "artifact").is_dir()


def test_a_syncer_that_dies_is_restarted_and_syncs(open_store, steps):
    """Row: syncer."""
    store = open_store(sync_interval_s=0.01)
    steps.crash("syncer.sync", GeneratorExit)
    store.apply(batch(1), cursor(1))
    until(lambda: store.synced_cursor == cursor(1), "the batch is synced")
    assert [restart.actor for restart in store.stats().restarts] == ["syncer"]


@pytest.mark.parametrize("step", ["writer.before_write", "reader.handle", "export.write", "syncer.sync"])
def test_an_actor_that_dies_too_often_fails_the_store_until_it_is_reopened(open_store, path, steps, tmp_path, step):
    """Row: more than max_restarts in restart_window_s."""
    store = open_store(max_restarts=2, sync_interval_s=0.01, readers=1)
    store.apply(batch(1), cursor(1))
    steps.crash(step, times=None)

    def provoke() -> None:
        for number in range(2, 9):
            for call in (
                lambda number=number: store.apply(batch(number), cursor(number)),
                lambda: store.reader.ask(Get("shared/0"), timeout=DEADLINE_S),
                lambda number=number: store.export_to(tmp_path / f"artifact-{number}", DEADLINE_S),
            ):
                with contextlib.suppress(FoldlogError, pykka.ActorDeadError):
                    call()

    results([in_thread(provoke)])
    until(lambda: store.state is State.FAILED, "the store has failed")
    assert "injected" in store.stats().reason
    before = store.cursor()
    with pytest.raises(StoreFailed, match="injected"):
        store.apply(batch(100), cursor(100))
    with pytest.raises(StoreFailed):
        store.writer.ask(foldlog.Compact(), timeout=DEADLINE_S)
    assert store.cursor() == before
    assert store.get("shared/0") is not None
    if step != "reader.handle":
        assert store.reader.ask(Get("shared/0"), timeout=DEADLINE_S) == store.get("shared/0")
    steps.mend()
    store.reopen(DEADLINE_S)
    until(lambda: store.state is State.RUNNING, "the store runs")
    assert store.stats().reason == ""
    store.apply(batch(101), cursor(101))
    assert store.reader.ask(Get("shared/0"), timeout=DEADLINE_S).value == b"101"
    store.compact(DEADLINE_S)
    store.export_to(tmp_path / "at last", DEADLINE_S)
    store.close(DEADLINE_S)
    assert read_back(path).cursor == cursor(101)


def test_reopening_fails_again_while_the_cause_stands(open_store, path):
    store = open_store(sync="never")
    store.apply(batch(1), cursor(1))
    good = path.read_bytes()
    path.write_bytes(good[:-1])
    with pytest.raises((LogChangedError, StoreFailed)):  # the file's events may have told the store before
        store.apply(batch(2), cursor(2))
    until(lambda: store.state is State.FAILED, "the store has failed")
    path.write_bytes(good[:50])
    with pytest.raises(StoreFailed):
        store.reopen(DEADLINE_S)
    assert store.state is State.FAILED
    path.write_bytes(good)
    store.reopen(DEADLINE_S)
    store.apply(batch(3), cursor(3))
    store.close()
    assert read_back(path).cursor == cursor(3)


def test_reopening_a_store_that_runs_does_nothing_and_one_that_is_closed_raises(open_store, steps):
    store = open_store()
    store.reopen(DEADLINE_S)
    assert steps.seen["writer.start"] == 1
    store.close()
    with pytest.raises(StoreClosed):
        store.reopen(DEADLINE_S)


def test_stopping_all_actors_of_the_process_closes_the_store_in_order(open_store, path):
    """Row: the host stops all actors."""
    store = open_store()
    store.apply(batch(1), cursor(1))
    results([in_thread(pykka.ActorRegistry.stop_all)])
    until(lambda: store.state is State.CLOSED, "the store is closed")
    with pytest.raises(StoreClosed):
        store.apply(batch(2), cursor(2))
    with pytest.raises(StoreClosed):
        store.get("shared/0")
    store.close()
    assert read_back(path).cursor == cursor(1)


def test_a_supervisor_that_dies_fails_the_store_for_good_and_reads_go_on(open_store, path, monkeypatch):
    """Row: the supervisor itself."""
    store = open_store()
    store.apply(batch(1), cursor(1))

    def die(self: Supervisor, actor: object) -> None:
        raise MemoryError("injected")

    monkeypatch.setattr(Supervisor, "_check_health", die)
    until(lambda: store.state is State.FAILED, "the store has failed")
    assert store._core.ended.wait(DEADLINE_S)
    with pytest.raises(StoreFailed, match="the supervisor died"):
        store.apply(batch(2), cursor(2))
    assert store.get("shared/0").value == b"1"
    store.close()
    assert read_back(path).cursor == cursor(1)


# Waiting between restarts, and being stuck.


def test_a_close_is_heard_during_the_back_off(open_store, path, steps, monkeypatch):
    monkeypatch.setattr("foldlog.actors.supervisor.next_restart_delay_s", lambda *_, **__: 10 * DEADLINE_S)
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
    steps.crash("writer.before_write")
    first = store.apply_async(batch(2), cursor(2))
    gate = steps.park("writer.start")
    gate.wait_until_reached()
    second = store.apply_async(batch(3), cursor(3))
    assert store.state is State.RESTARTING
    assert store.get("shared/0").value == b"1"
    assert store.reader.ask(Get("shared/0"), timeout=DEADLINE_S).value == b"1"
    assert not first.done()
    assert not second.done()
    gate.open()
    assert results([first, second]) == [2, 3]
    until(lambda: store.state is State.RUNNING, "the store runs")


def test_a_writer_that_is_stuck_fails_the_store_and_keeps_the_lock(open_store, path, steps):
    store = open_store(stuck_after_s=0.05)
    store.apply(batch(1), cursor(1))
    gate = steps.park("writer.before_write")
    stuck = store.apply_async(batch(2), cursor(2))
    gate.wait_until_reached()
    with pytest.raises(StoreFailed, match="stuck"):
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
    gate = steps.park("writer.before_write")
    stuck = store.apply_async(batch(1), cursor(1))
    gate.wait_until_reached()
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
    "name", ["foldlog-supervisor", "foldlog-writer", "foldlog-maintenance", "foldlog-reader-1", "foldlog-syncer"]
)
def test_a_thread_that_cannot_start_fails_the_opening_and_leaves_nothing(nothing_left, path, no_thread, name):
    no_thread[name] = 1
    with pytest.raises(RuntimeError, match="can't start new thread"):
        foldlog.open(path)
    assert pykka.ActorRegistry.get_all() == []
    with foldlog.open(path) as store:
        store.apply(batch(1), cursor(1))


@pytest.mark.parametrize(("name", "step"), [("foldlog-writer", "writer.before_write"), ("foldlog-reader", "reader.handle")])
def test_a_thread_that_cannot_start_after_a_crash_is_tried_for_again(open_store, steps, no_thread, name, step):
    store = open_store(readers=1)
    no_thread[name] = 2
    steps.crash(step)
    assert store.apply(batch(1), cursor(1)) == 1
    assert store.reader.ask(Get("shared/0"), timeout=DEADLINE_S).value == b"1"
    assert no_thread[name] == 0
    until(lambda: store.state is State.RUNNING, "the store runs")
