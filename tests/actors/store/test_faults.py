"""Batches in doubt, poison requests, failing disks, touched logs: every caller gets the truth."""

from __future__ import annotations

import contextlib
import errno
import os

import pytest
from actor_kit import (
    DEADLINE_S,
    FATAL,
    Ledger,
    batch,
    commit_group,
    cursor,
    in_thread,
    read_back,
    results,
    until,
)

from foldlog import (
    Apply,
    FoldlogError,
    Get,
    LogChangedError,
    Put,
    State,
    StoreFailed,
    WriterCrashed,
)
from foldlog.storage.engines.append_log.engine import LogEngine
from foldlog.testing import Fault, FaultyFiles

# In doubt.


@pytest.mark.parametrize("error", FATAL, ids=lambda error: error.__name__)
@pytest.mark.parametrize("step", ["writer.after_write", "writer.after_publish"])
def test_a_batch_that_was_written_and_not_answered_is_answered_from_the_log_and_not_written_twice(
    open_store, steps, path, step, error
):
    store = open_store()
    store.apply(batch(1), cursor(1))
    steps.crash(step, error)
    gate, answer = steps.parked(step, store.apply_async, batch(2), cursor(2))
    assert not answer.done()
    size = path.stat().st_size
    gate.open()
    assert answer.result(DEADLINE_S) == 2
    assert path.stat().st_size == size
    assert store.cursor() == cursor(2)
    store.close()
    assert read_back(path).seq == 2


def test_a_local_write_in_doubt_is_not_decided_again(open_store, steps):
    store = open_store()
    steps.crash("writer.after_write")
    version = store.create("k", b"v")
    assert store.get("k").version == version
    steps.crash("writer.after_write")
    version = store.update("k", b"w", expected=version)
    steps.crash("writer.before_write")
    assert store.update("k", b"x", expected=version) != version


def test_what_was_not_published_yet_is_not_visible_and_what_is_visible_is_in_the_log(
    open_store, steps, path
):
    store = open_store()
    before, written, published = (
        steps.park(f"writer.{step}") for step in ("before_write", "after_write", "after_publish")
    )
    size = path.stat().st_size
    answer = store.apply_async(batch(1), cursor(1))
    before.wait_until_reached()
    assert path.stat().st_size == size
    before.open()
    written.wait_until_reached()
    assert path.stat().st_size > size
    assert store.get("shared/0") is None
    assert store.cursor().is_none
    written.open()
    published.wait_until_reached()
    assert store.get("shared/0").value == b"1"
    assert not answer.done(), "nothing is answered before it is visible to all"
    published.open()
    assert answer.result(DEADLINE_S) == 1


# Poison.


@pytest.mark.parametrize("error", FATAL, ids=lambda error: error.__name__)
def test_a_request_that_always_kills_the_writer_is_quarantined_and_its_neighbours_are_applied(
    open_store, steps, path, monkeypatch, error
):
    store = open_store()
    poison = 5

    def commit(self, batches, staged=None):
        if cursor(poison) in [batch.cursor for batch in batches]:
            raise error("poison")
        return original(self, batches, staged)

    original = LogEngine.commit
    gate, futures = commit_group(store, steps, range(1, 11))
    monkeypatch.setattr(LogEngine, "commit", commit)
    gate.open()
    for number, future in enumerate(futures, 1):
        if number == poison:
            with pytest.raises(WriterCrashed):
                future.result(DEADLINE_S)
        else:
            future.result(DEADLINE_S)
    until(lambda: store.state is State.RUNNING, "the store runs")
    assert sum(restart.actor == "writer" for restart in store.stats().restarts) == 2
    store.close()
    truth = read_back(path)
    assert truth.seq == 9
    assert f"batch/{poison:06}" not in truth.entries


def test_a_told_batch_whose_updates_raise_is_never_applied_as_an_empty_one(open_store, path):
    """An iterator that had failed was read again after the restart: by then it was exhausted.

    The batch was applied as an empty one, and only the cursor moved.
    """
    store = open_store()
    store.apply(batch(1), cursor(1))

    def updates(error):
        yield batch(2)[0]
        raise error("the source broke off")

    with pytest.raises(LookupError, match="broke off"):
        store.writer.ask(Apply(updates(LookupError), cursor(2)), timeout=DEADLINE_S)
    assert store.stats().restarts == ()
    with pytest.raises(SystemExit):  # on the sender's own thread
        store.writer.ask(Apply(updates(SystemExit), cursor(3)), timeout=DEADLINE_S)
    assert store.cursor() == cursor(1)
    store.close()
    assert read_back(path).seq == 1


# The disk.


@pytest.mark.parametrize("callers", [1, 10])
def test_a_failed_fsync_is_healed_and_each_caller_gets_his_own_truth(
    open_store, steps, path, files, callers
):
    store = open_store(files=files, sync="always")
    store.apply(batch(1), cursor(1))
    inode = path.stat().st_ino
    gate, futures = commit_group(store, steps, range(2, 2 + callers))
    files.fail("sync")
    gate.open()
    assert results(futures) == list(range(2, 2 + callers))
    assert files.failed["sync"] == 1
    assert store.synced_cursor == store.cursor() == cursor(1 + callers)
    until(lambda: store.state is State.RUNNING, "the store runs")
    assert steps.seen["writer.heal"] == 1
    assert path.stat().st_ino != inode, "a new file"
    assert store.stats().restarts[-1].actor == "writer"
    store.close()
    assert read_back(path).seq == 1 + callers


def test_healing_that_fails_is_tried_again(open_store, steps, path, files):
    store = open_store(files=files, sync="always")
    store.apply(batch(1), cursor(1))
    steps.crash("writer.heal", SystemExit)
    files.fail("sync", times=2)
    assert store.apply(batch(2), cursor(2)) == 2
    assert steps.seen["writer.heal"] >= 2
    store.close()
    assert read_back(path).seq == 2


def test_a_disk_that_never_syncs_fails_the_store_and_a_better_one_reopens_it(
    open_store, path, files
):
    store = open_store(files=files, sync="always", max_restarts=2)
    store.apply(batch(1), cursor(1))
    files.fail("sync", times=None)
    with pytest.raises((StoreFailed, WriterCrashed)):
        store.apply(batch(2), cursor(2))
    until(lambda: store.state is State.FAILED, "the store has failed")
    assert store.get("shared/0").value == b"1"
    files.mend()
    store.reopen(DEADLINE_S)
    assert store.cursor() == cursor(1), "what was never acknowledged is not there"
    store.apply(batch(3), cursor(3))
    store.close()
    assert read_back(path).cursor == cursor(3)


def test_a_background_fsync_that_fails_is_healed_without_losing_what_was_answered(
    open_store, steps, path, files
):
    store = open_store(files=files, sync_interval_s=0.01)
    files.fail("sync")
    store.apply(batch(1), cursor(1))
    assert files.happened.wait(DEADLINE_S)
    until(lambda: steps.seen["writer.heal"], "the store is written anew")
    until(lambda: store.synced_cursor == cursor(1), "all is synced")
    store.apply(batch(2), cursor(2))
    until(lambda: store.state is State.RUNNING, "the store runs")
    store.close()
    assert read_back(path).seq == 2


def test_a_seal_whose_fsync_fails_is_healed_while_the_lock_is_held(open_store, steps, path, files):
    """The lock went with the failed close, and the store was then written anew without it."""
    store = open_store(files=files, sync="never")
    store.apply(batch(1), cursor(1))
    files.fail("sync")
    store.close(DEADLINE_S)
    assert steps.seen["writer.heal"] == 1
    assert read_back(path).seq == 1


def test_a_seal_that_cannot_be_written_is_told_by_close_and_harms_nothing(open_store, path, files):
    store = open_store(files=files, sync="never")
    store.apply(batch(1), cursor(1))
    files.fail("write", errno.ENOSPC)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        store.close(DEADLINE_S)
    assert store.state is State.CLOSED
    assert read_back(path).seq == 1


def test_a_write_that_cannot_be_undone_is_healed(open_store, steps, path, files):
    store = open_store(files=files)
    store.apply(batch(1), cursor(1))
    files.fail("write", errno.ENOSPC)
    files.fail("truncate")
    assert store.apply(batch(2), cursor(2)) == 2
    assert steps.seen["writer.heal"] == 1
    until(lambda: store.state is State.RUNNING, "the store runs")
    store.close()
    assert read_back(path).seq == 2


def test_a_full_disk_fails_each_batch_of_the_group_and_the_writer_goes_on(
    open_store, steps, path, files
):
    store = open_store(files=files)
    gate, futures = commit_group(store, steps, range(1, 6))
    files.fail("write", errno.ENOSPC, times=2)
    gate.open()
    errors = [future.exception(DEADLINE_S) for future in futures]
    assert [error.errno for error in errors] == [errno.ENOSPC] * 5
    assert len({id(error) for error in errors}) == 5, "one object each: tracebacks must not mix"
    assert store.apply(batch(6), cursor(6)) == 1
    assert store.stats().restarts == ()
    store.close()
    assert read_back(path).seq == 1


@pytest.mark.parametrize("operation", ["create", "write", "sync", "replace"])
def test_a_compaction_that_fails_is_told_and_the_log_goes_on(open_store, path, files, operation):
    store = open_store(files=files)
    store.apply(batch(1), cursor(1))
    files.fail(operation, errno.ENOSPC, part="tmp-" if operation != "replace" else "state.log")
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        store.compact(DEADLINE_S)
    assert [name.name for name in path.parent.iterdir() if "tmp" in name.name] == []
    store.apply(batch(2), cursor(2))
    store.compact(DEADLINE_S)
    store.close()
    assert read_back(path).seq == 2


# Others touch the log.


@pytest.mark.parametrize("harm", ["cut", "grown", "replaced", "folder renamed"])
def test_a_log_that_others_changed_is_left_alone_and_reads_go_on(open_store, path, tmp_path, harm):
    store = open_store(sync="never")
    store.apply(batch(1), cursor(1))
    raw = path.read_bytes()
    if harm == "cut":
        os.truncate(path, len(raw) - 3)
    elif harm == "grown":
        path.write_bytes(raw + b"x")
    elif harm == "replaced":
        (tmp_path / "copy").write_bytes(raw)
        os.replace(tmp_path / "copy", path)
    else:
        path.parent.rename(path.parent.with_name("moved"))
    left = path.read_bytes() if path.exists() else None
    ledger = Ledger()
    for number in range(2, 5):
        ledger.settle(
            number, lambda number=number: store.apply(batch(number), cursor(number), DEADLINE_S)
        )
    assert isinstance(ledger.errors[2], (LogChangedError, StoreFailed))
    until(lambda: store.state is State.FAILED, "the store has failed")
    assert set(ledger.errors) == {2, 3, 4}
    assert store.get("shared/0").value == b"1"
    assert store.reader.ask(Get("shared/0"), timeout=DEADLINE_S).value == b"1"
    assert (path.read_bytes() if path.exists() else None) == left
    results([in_thread(lambda: close(store))])


def close(store):
    with contextlib.suppress(FoldlogError, OSError):
        store.close(DEADLINE_S)


def test_an_entry_that_cannot_be_read_fails_the_write_that_looks_at_it_and_no_other(open_store):
    files = FaultyFiles()
    store = open_store(files=files)
    store.apply(
        [Put("bad", b"x" * 777), *(Put(f"k{number}", b"v") for number in range(50))], cursor(1)
    )
    store.compact()
    files.arm(Fault(operation="read", error=errno.EIO, lasting=True))
    for _ in range(4):
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            store.create("bad", b"n", timeout_s=DEADLINE_S)
    store.put("other", b"1", timeout_s=DEADLINE_S)
    files.disarm()
    assert store.state is State.RUNNING
    assert store.stats().restarts == ()
    assert store.get("bad").value == b"x" * 777
