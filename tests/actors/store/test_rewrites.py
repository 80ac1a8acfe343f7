"""Compaction and export during applies: no waiting, no loss; deaths and closes do no harm."""

from __future__ import annotations

import errno
from concurrent.futures import Future
from typing import Any

import pytest
from actor_kit import (
    DEADLINE_S,
    assert_whole,
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
from logfiles import companions

from foldlog import (
    AppendLogSnapshot,
    FoldlogError,
    LogChangedError,
    State,
    StoreClosed,
    StoreFailed,
    WriterCrashed,
)


def fill(store, first, last):
    for number in range(first, last + 1):
        store.apply(batch(number), cursor(number))


@pytest.mark.parametrize("step", ["compact.write", "compact.written"])
def test_batches_applied_while_a_compaction_runs_are_carried_over(open_store, steps, path, step):
    store = open_store()
    fill(store, 1, 5)
    held = store.snapshot()
    gate, compaction = steps.parked(step, in_thread, store.compact, DEADLINE_S)
    fill(store, 6, 20)
    assert store.get("shared/0").value == b"20"
    assert not compaction.done()
    during = store.snapshot()
    gate.open()
    compaction.result(DEADLINE_S)
    assert assert_whole(store.snapshot()) == 20
    assert store.range("") == during.range("")
    fill(store, 21, 25)
    assert assert_whole(held) == 5
    assert assert_whole(during) == 20
    assert store.stats().compactions == 1
    store.close()
    truth = read_back(path)
    assert (truth.seq, truth.cursor) == (25, cursor(25))
    assert len([key for key in truth.entries if key.startswith("batch/")]) == 25


def test_an_export_holds_all_batches_before_its_call_and_none_after(open_store, steps, tmp_path):
    store = open_store()
    fill(store, 1, 5)
    gate, export = steps.parked(
        "export.write", in_thread, store.export_to, tmp_path / "artifact", DEADLINE_S
    )
    fill(store, 6, 10)
    gate.open()
    manifest = export.result(DEADLINE_S)
    assert manifest.cursor == cursor(5)
    imported_at, imported = AppendLogSnapshot.import_artifact(
        tmp_path / "artifact", tmp_path / "imported.log"
    )
    with imported:
        assert imported_at == cursor(5)
        assert assert_whole(imported.snapshot()) == 5


def test_many_who_ask_for_a_compaction_share_one(open_store, steps):
    store = open_store()
    fill(store, 1, 3)
    gate, first = steps.parked("compact.write", in_thread, store.compact, DEADLINE_S)
    others = [in_thread(store.compact, DEADLINE_S) for _ in range(4)]
    until(lambda: len(store._supervisor.writer._compactor.wanted) == 5, "all have asked")
    gate.open()
    results([first, *others])
    assert store.stats().compactions == 1


def test_the_store_compacts_by_itself_behind_its_writers(open_store, path):
    store = open_store(compact_threshold=20_000)
    for number in range(1, 400):
        store.apply(batch(number % 10 + 1), cursor(number % 10 + 1))
    until(lambda: store.stats().compactions, "a compaction is done")
    assert assert_whole(store.snapshot()) == 399 % 10 + 1
    store.close()
    assert path.stat().st_size < 60_000


def test_a_full_mailbox_does_not_keep_maintenance_from_reporting(open_store, steps):
    """The report was refused as surplus; the writer waited for ever, and compactions stopped."""
    store = open_store(mailbox_batches=1)
    fill(store, 1, 3)
    gate, compaction = steps.parked("compact.written", in_thread, store.compact, DEADLINE_S)
    parked, answers = commit_group(store, steps, (4, 5))  # the second one fits
    gate.open()
    until(lambda: waiting(store) == 2, "maintenance has reported")
    parked.open()
    compaction.result(DEADLINE_S)
    assert results(answers) == [4, 5]
    assert store.stats().compactions == 1
    store.apply(batch(6), cursor(6))
    store.compact(DEADLINE_S)
    assert store.stats().compactions == 2


@pytest.mark.parametrize("step", ["compact.begin", "compact.finish", "compact.finished"])
def test_a_writer_that_dies_over_a_compaction_makes_it_again(open_store, steps, path, step):
    store = open_store()
    fill(store, 1, 5)
    steps.crash(step, SystemExit)
    store.compact(DEADLINE_S)
    assert store.stats().compactions >= 1
    assert store.stats().appended_bytes == 0
    fill(store, 6, 8)
    store.close()
    assert read_back(path).seq == 8


def test_a_writer_that_dies_while_maintenance_compacts_loses_neither(open_store, steps, path):
    store = open_store()
    fill(store, 1, 5)
    gate, compaction = steps.parked("compact.written", in_thread, store.compact, DEADLINE_S)
    steps.crash("writer.after_write", GeneratorExit)
    fill(store, 6, 10)
    gate.open()
    compaction.result(DEADLINE_S)
    assert assert_whole(store.snapshot()) == 10
    store.close()
    assert read_back(path).seq == 10
    assert [name.name for name in path.parent.iterdir() if "tmp" in name.name] == []


@pytest.mark.parametrize("step", ["compact.write", "compact.written"])
def test_closing_during_a_compaction_ends_it_and_the_log_holds_all(open_store, steps, path, step):
    store = open_store()
    fill(store, 1, 5)
    gate, compaction = steps.parked(step, in_thread, store.compact, DEADLINE_S)
    fill(store, 6, 8)
    closing = in_thread(store.close, DEADLINE_S)
    with pytest.raises(StoreClosed):
        compaction.result(DEADLINE_S)
    gate.open()
    closing.result(DEADLINE_S)
    assert store.state is State.CLOSED
    nothing_pending(store)
    assert [name.name for name in path.parent.iterdir() if "tmp" in name.name] == []
    assert read_back(path).seq == 8


def test_closing_during_an_export_finishes_the_export(open_store, steps, tmp_path, path):
    store = open_store()
    fill(store, 1, 5)
    gate, export = steps.parked(
        "export.write", in_thread, store.export_to, tmp_path / "artifact", DEADLINE_S
    )
    closing = in_thread(store.close, DEADLINE_S)
    until(lambda: store.state is State.CLOSING, "closing has begun")
    gate.open()
    closing.result(DEADLINE_S)
    assert export.result(DEADLINE_S).cursor == cursor(5)
    assert read_back(path).seq == 5


def test_exports_in_hand_and_in_line_are_answered_when_the_store_gives_up(
    open_store, steps, tmp_path
):
    """The last crash left the job with the dead actor.

    Jobs queued after it were in a mailbox that nobody read. Then all raised StoreFailed, though
    what a failed store holds can be exported.
    """
    store = open_store(max_restarts=0)
    fill(store, 1, 2)
    steps.crash("export.write", times=None)

    def export(name: str) -> Future[Any]:
        return in_thread(store.export_to, tmp_path / name, DEADLINE_S)

    gate, first = steps.parked("export.write", export, "one")
    exports = [first, export("two"), export("three")]
    until(lambda: len(store._supervisor.maintenance.inbox) == 2, "two wait in line")
    gate.open()
    for each in exports:
        assert each.result(DEADLINE_S).cursor == cursor(2)
    assert store.state is State.FAILED


def test_a_compaction_that_ends_while_the_store_has_failed_does_not_block_later_ones(
    open_store, steps
):
    """Its report was refused, and after reopening the writer still waited for it."""
    store = open_store(max_restarts=0, readers=1)
    fill(store, 1, 3)
    gate, compaction = steps.parked("compact.written", in_thread, store.compact, DEADLINE_S)
    steps.crash("reader.handle")
    with pytest.raises(FoldlogError):
        store.reader.ask("anything", timeout=DEADLINE_S)
    until(lambda: store.state is State.FAILED, "the store has failed")
    with pytest.raises(StoreFailed):
        compaction.result(DEADLINE_S)
    gate.open()
    until(lambda: store._supervisor.maintenance.busy_since is None, "maintenance is done")
    store.reopen(DEADLINE_S)
    fill(store, 4, 5)
    store.compact(DEADLINE_S)
    assert store.stats().compactions == 1
    assert assert_whole(store.snapshot()) == 5


def test_a_job_that_kills_maintenance_leaves_no_file_behind(open_store, steps, path, tmp_path):
    store = open_store()
    fill(store, 1, 3)
    steps.crash("compact.written", KeyboardInterrupt)
    with pytest.raises(WriterCrashed):
        store.compact(DEADLINE_S)
    steps.crash("export.write", KeyboardInterrupt)
    with pytest.raises(WriterCrashed):
        store.export_to(tmp_path / "artifact", DEADLINE_S)
    assert {file.name for file in path.parent.iterdir()} == {"state.log", *companions(path)}
    assert [name for name in tmp_path.iterdir() if name != path.parent] == []


def test_a_compaction_asked_for_during_another_covers_what_was_written_before_the_call(
    open_store, steps
):
    """The compaction under way, which had begun earlier, answered the call.

    The log was still full of overwritten data.
    """
    store = open_store()
    store.apply(batch(1), cursor(1))
    gate, first = steps.parked("compact.write", in_thread, store.compact, DEADLINE_S)
    fill(store, 2, 20)
    second_gate = steps.park("compact.write")
    second = in_thread(store.compact, DEADLINE_S)
    until(lambda: len(store._supervisor.writer._compactor.wanted) == 2, "both have asked")
    gate.open()
    first.result(DEADLINE_S)
    second_gate.wait_until_reached()
    assert not second.done()
    second_gate.open()
    second.result(DEADLINE_S)
    assert store.stats().appended_bytes == 0
    assert store.stats().compactions == 2


def test_a_compaction_that_fails_leaves_those_who_asked_during_it_to_the_next(
    open_store, steps, files
):
    store = open_store(files=files)
    fill(store, 1, 3)
    gate, first = steps.parked("compact.write", in_thread, store.compact, DEADLINE_S)
    fill(store, 4, 5)
    second = in_thread(store.compact, DEADLINE_S)
    until(lambda: len(store._supervisor.writer._compactor.wanted) == 2, "both have asked")
    files.fail("create", errno.ENOSPC, part="tmp")
    gate.open()
    with pytest.raises(OSError, match="No space left"):
        first.result(DEADLINE_S)
    second.result(DEADLINE_S)
    assert store.stats().appended_bytes == 0


def test_a_store_whose_log_was_replaced_exports_what_its_readers_see(open_store, path, tmp_path):
    """The remedy that the documentation names raised StoreFailed."""
    store = open_store()
    fill(store, 1, 5)
    (tmp_path / "other").write_bytes(b"somebody else's")
    (tmp_path / "other").replace(path)
    until(lambda: store.state is State.FAILED, "the store has failed")
    manifest = store.export_to(tmp_path / "artifact", DEADLINE_S)
    assert manifest.cursor == cursor(5)
    _, imported = AppendLogSnapshot.import_artifact(tmp_path / "artifact", tmp_path / "new.log")
    with imported:
        assert imported.range("") == store.range("")
    with pytest.raises(FileExistsError):
        store.export_to(tmp_path / "artifact", DEADLINE_S)


def test_an_export_that_waits_while_the_log_is_found_replaced_is_made(
    open_store, steps, path, tmp_path
):
    """`except LogChangedError: store.export_to(...)` raised StoreFailed, each time.

    The store had not failed yet, and the writer no longer served what it was asked.
    """
    store = open_store()
    fill(store, 1, 5)
    gate, write = steps.parked("writer.before_write", store.apply_async, batch(6), cursor(6))
    (tmp_path / "other").write_bytes(b"somebody else's")
    (tmp_path / "other").replace(path)
    export = in_thread(store.export_to, tmp_path / "artifact", DEADLINE_S)
    until(lambda: waiting(store), "it waits for the writer")
    gate.open()
    with pytest.raises(LogChangedError):
        write.result(DEADLINE_S)
    assert export.result(DEADLINE_S).cursor == cursor(5)
    assert store.state is State.FAILED
