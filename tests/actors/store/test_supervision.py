"""The table in the supervisor's docstring, row by row; failed fsyncs are in `test_faults.py`."""

from __future__ import annotations

import contextlib
import decimal
import errno
import threading
from pathlib import Path

import pykka
import pytest
from actor_kit import DEADLINE_S, FATAL, batch, cursor, in_thread, read_back, results, until
from logfiles import some_batches, write_log

import foldlog
from foldlog import (
    Apply,
    CorruptLogError,
    FoldlogError,
    Get,
    InvalidFormatError,
    KeyExists,
    LogChangedError,
    Put,
    Range,
    RangePage,
    State,
    StoreClosed,
    StoreFailed,
    StoreLocked,
    WriterCrashed,
)
from foldlog.actors.store import supervisor as supervisor_module
from foldlog.actors.store.supervisor import Supervisor
from foldlog.actors.store.writer import Writer

ON_EACH_ENGINE = True


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


class Odd:
    """Says of itself whatever harms who asks."""

    def __getattribute__(self, name):
        raise RuntimeError(name)

    def __hash__(self):
        raise RuntimeError("hash")


@pytest.mark.parametrize(
    "message",
    [
        Get(Odd()),
        Get(["k"]),
        Range(Odd()),
        Range(b"k"),
        RangePage(Odd()),
        RangePage(limit=True),
        RangePage(limit=0),
        RangePage(limit="9"),
        RangePage(limit=decimal.Decimal("nan")),
        RangePage(limit=Odd()),
        RangePage(after=7),
        RangePage(snapshot=7),
        RangePage(snapshot={}),
        RangePage(snapshot=Odd()),
    ],
    ids=lambda message: f"{type(message).__name__}-{[type(field).__name__ for field in message]}",
)
def test_a_message_that_no_reader_can_serve_is_refused_on_its_senders_thread(
    open_store, steps, message
):
    """Three pages of a snapshot that was none failed the whole store."""
    store = open_store()
    store.put("k", b"v")
    starts = steps.seen["reader.start"]
    for _ in range(10):
        with pytest.raises((TypeError, ValueError, RuntimeError)):
            store.reader.ask(message, timeout=DEADLINE_S)
        store.reader.tell(message)
    assert store.reader.ask(Get("k"), timeout=DEADLINE_S).value == b"v"
    assert steps.seen["reader.start"] == starts
    assert store.stats().restarts == ()


@pytest.mark.append_log("its file fails")
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_write_that_was_undone_is_the_callers_error_and_the_writer_goes_on(
    open_store, path, files, code
):
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


@pytest.mark.parametrize("error", FATAL, ids=lambda error: error.__name__)
def test_an_error_in_a_handler_is_healed_by_replay_and_the_caller_gets_the_answer(
    open_store, steps, error
):
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
def test_stopping_that_fails_for_good_is_let_go_and_the_lock_is_free(
    open_store, path, steps, actor
):
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


@pytest.mark.append_log("the file is damaged")
@pytest.mark.parametrize("damage", ["flipped bit", "another log", "an older copy"])
def test_a_log_that_cannot_be_replayed_fails_the_store_at_once_and_reads_go_on(
    open_store, path, steps, tmp_path, damage
):
    """Row: the log: corrupt, replaced, cut, regressed."""
    store = open_store(sync="never")
    store.apply(batch(1), cursor(1))
    older = path.read_bytes()
    store.apply(batch(2), cursor(2))
    steps.crash("writer.before_write")
    gate, answer = steps.parked("writer.before_write", store.apply_async, batch(3), cursor(3))
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


@pytest.mark.append_log("the file is damaged")
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


@pytest.mark.append_log("RocksDB's is not in memory")
@pytest.mark.parametrize("is_down", [False, True], ids=["at work", "down"])
def test_a_log_that_was_deleted_is_written_anew_from_memory(open_store, path, steps, is_down):
    """Row: the log: deleted, while the writer is at work or down."""
    store = open_store()
    store.apply(batch(1), cursor(1))
    if is_down:
        steps.crash("writer.before_write")
        gate, answer = steps.parked("writer.start", store.apply_async, batch(2), cursor(2))
        path.unlink()
        gate.open()
        assert answer.result(DEADLINE_S) == 2
    else:
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
        [
            ("compact.write", store.compact),
            ("export.write", lambda: store.export_to(tmp_path / "artifact")),
        ],
        1,
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


@pytest.mark.parametrize(
    "step", ["writer.before_write", "reader.handle", "export.write", "syncer.sync"]
)
def test_an_actor_that_dies_too_often_fails_the_store_until_it_is_reopened(
    open_store, path, steps, tmp_path, step
):
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


@pytest.mark.append_log("the file is damaged")
def test_reopening_fails_again_while_the_cause_stands(open_store, path):
    store = open_store(sync="never")
    store.apply(batch(1), cursor(1))
    good = path.read_bytes()
    path.write_bytes(good[:-1])
    with pytest.raises(
        (LogChangedError, StoreFailed)
    ):  # the file's events may have told the store before
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


def test_stopping_all_actors_of_the_process_leaves_the_store_to_its_owner(open_store, path):
    """Row: the host stops all actors. It closed every open store, also for reads."""
    store = open_store()
    store.apply(batch(1), cursor(1))
    assert pykka.ActorRegistry.get_all() == []
    results([in_thread(pykka.ActorRegistry.stop_all)])
    assert store.state is State.RUNNING
    assert store.apply(batch(2), cursor(2)) == 2
    assert store.writer.ask(Apply(batch(3), cursor(3)), timeout=DEADLINE_S) == 3
    assert store.reader.ask(Get("shared/0"), timeout=DEADLINE_S) == store.get("shared/0")
    store.close()
    assert read_back(path).cursor == cursor(3)


class Exits(pykka.ThreadingActor):
    """A host's actor that ends the process, as it believes."""

    use_daemon_thread = True

    def on_receive(self, message: object) -> None:
        raise SystemExit


def test_a_foreign_actor_that_dies_of_system_exit_leaves_the_store_to_its_owner(open_store):
    """pykka then stops all actors that are registered: every open store was closed with them."""
    store = open_store()
    exits = Exits.start()
    exits.tell("now")
    until(lambda: not exits.is_alive(), "it has died")
    assert exits.actor_stopped.wait(DEADLINE_S)
    assert store.apply(batch(1), cursor(1)) == 1
    assert store.state is State.RUNNING


@pytest.mark.append_log("RocksDB's reads end")
def test_a_supervisor_that_dies_fails_the_store_for_good_and_reads_go_on(
    open_store, path, monkeypatch
):
    """Row: the supervisor itself."""
    monkeypatch.setattr(supervisor_module, "HEALTH_CHECK_S", 0.02)
    store = open_store()
    store.apply(batch(1), cursor(1))

    def die(self: Supervisor, actor: object) -> None:
        raise SystemError("injected")

    monkeypatch.setattr(Supervisor, "_check_health", die)
    until(lambda: store.state is State.FAILED, "the store has failed")
    assert store._core.ended.wait(DEADLINE_S)
    with pytest.raises(StoreFailed, match="the supervisor died"):
        store.apply(batch(2), cursor(2))
    assert store.get("shared/0").value == b"1"
    store.close()
    assert read_back(path).cursor == cursor(1)


def test_an_error_while_the_log_is_let_go_is_told_and_the_store_is_closed(
    open_store, path, monkeypatch, nothing_left
):
    """The supervisor died of it; `close` waited for ever, and descriptors stayed open."""
    store = open_store()
    store.apply(batch(1), cursor(1))
    let_go = Writer.let_go

    def fail(self: Writer) -> None:
        let_go(self)
        raise OSError(errno.EIO, "injected")

    monkeypatch.setattr(Writer, "let_go", fail)
    with pytest.raises(OSError, match="injected"):
        store.close(DEADLINE_S)
    monkeypatch.undo()
    assert store.state is State.CLOSED
    assert read_back(path).cursor == cursor(1)


@pytest.mark.parametrize("waits", ["close", "reopen"])
def test_a_supervisor_that_dies_answers_all_who_wait_for_it(open_store, monkeypatch, waits):
    store = open_store()

    def die(self: Supervisor, *_: object) -> None:
        raise SystemError("injected")

    monkeypatch.setattr(Supervisor, "_begin_close" if waits == "close" else "_begin_reopen", die)
    with pytest.raises((SystemError, StoreFailed, StoreClosed)):
        getattr(store, waits)(DEADLINE_S)
    assert store._core.ended.wait(DEADLINE_S)
    monkeypatch.undo()
    store.close(DEADLINE_S)


@pytest.mark.append_log("RocksDB's reads end")
def test_a_supervisor_that_dies_lets_each_reader_take_its_stop_message(open_store, monkeypatch):
    """Readers share a mailbox. It was ended with the first of them: the stop message of one that
    was busy was gone, its thread lived on, and the supervisor waited for it in vain."""
    busy, go_on = threading.Semaphore(0), {name: threading.Event() for name in ("first", "last")}

    def hold(step: str) -> None:
        if step == "reader.handle":
            first = threading.current_thread() is readers[0].thread
            busy.release()
            assert go_on["first" if first else "last"].wait(DEADLINE_S)

    store = open_store(readers=2, step=hold)
    readers = store._supervisor.readers
    answers = [store.reader.ask(Range(""), block=False) for _ in readers]
    assert all(busy.acquire(timeout=DEADLINE_S) for _ in readers)
    join = readers[-1].thread.join

    def join_the_last(timeout_s: float) -> None:
        go_on["last"].set()
        join(timeout_s)

    monkeypatch.setattr(readers[-1].thread, "join", join_the_last)

    def die(self: Supervisor) -> None:
        go_on["first"].set()
        raise SystemError("injected")

    monkeypatch.setattr(Supervisor, "_begin_reopen", die)
    with pytest.raises(StoreFailed):
        store.reopen(DEADLINE_S)
    assert [answer.get(timeout=DEADLINE_S) for answer in answers] == [[], []]
    assert store._core.ended.wait(DEADLINE_S)
    assert not any(reader.thread.is_alive() for reader in readers)
