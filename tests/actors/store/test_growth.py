"""The log stays bounded, whatever is written how fast, and catches up by itself."""

from __future__ import annotations

import errno
import itertools
import os
import threading
import time
from pathlib import Path

import pytest
from actor_kit import DEADLINE_S, Gate, cursor, in_thread, read_back, until

import foldlog
from foldlog import Backpressure, Put
from foldlog.actors.store import compactor as compactor_module
from foldlog.actors.store.supervisor import Supervisor
from foldlog.actors.store.writer import Writer
from foldlog.storage.engines.append_log.engine import log_limit
from foldlog.storage.log.files import Files
from foldlog.testing import Fault, FaultyFiles

MIB = 1024 * 1024


def overwrite(store, size: int, stop: threading.Event, keys: int = 7) -> tuple[int, float]:
    """Overwrite a few keys as fast as one thread can.

    Returns the batches, and the longest apply in seconds.
    """
    longest = 0.0
    for number in itertools.count(1):
        if stop.is_set():
            return number - 1, longest
        began = time.monotonic()
        store.apply([Put(f"k{number % keys}", os.urandom(16) * (size // 16))], cursor(number))
        longest = max(longest, time.monotonic() - began)
    raise AssertionError


def largest_log(store, size: int, enough: int, keys: int = 7) -> tuple[int, int, float]:
    """Overwrite until so many bytes are written.

    Returns the largest log seen, the batches, and the longest apply in seconds.
    """
    stop = threading.Event()
    load = in_thread(overwrite, store, size, stop, keys)
    largest = 0
    try:
        while not load.done() and store.stats().seq * size < enough:
            largest = max(largest, store.stats().log_bytes)
            time.sleep(0)
    finally:
        stop.set()
    batches, longest = load.result(DEADLINE_S)
    return max(largest, store.stats().log_bytes), batches, longest


@pytest.mark.parametrize("size", [100_000, 1_000_000])
def test_a_log_that_is_overwritten_at_full_speed_stays_below_its_bound(open_store, path, size):
    """Data appended during a compaction was copied as it was, too slowly: none ever ended.

    Seven keys of 1 MB grew to 8.4 GB of log in 20 s.
    """
    store = open_store(compact_threshold=4 * MIB)
    largest, batches, _ = largest_log(store, size, 120 * MIB)
    assert largest <= log_limit(7 * size, 4 * MIB) + size
    assert store.stats().compactions
    store.close()
    truth = read_back(path)
    assert (truth.seq, truth.cursor) == (batches, cursor(batches))
    assert len(truth.entries) == 7


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("sync", ["always", "interval", "never"])
@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("size", [112, 10_000, 100_000, 1_000_000, 16 * MIB])
def test_a_campaign_of_rates_and_sizes_stays_below_the_bound(open_store, size, threads, sync):
    """Prints the largest log over what is live, and the longest apply."""
    store = open_store(sync=sync)
    stop = threading.Event()
    keys = 7 if size >= 10_000 else 10_000
    loads = [in_thread(overwrite, store, size, stop, keys) for _ in range(threads)]
    largest, end = 0, time.monotonic() + 6.0
    try:
        while time.monotonic() < end and not any(load.done() for load in loads):
            largest = max(largest, store.stats().log_bytes)
            time.sleep(0.001)
    finally:
        stop.set()
    longest = max(load.result(DEADLINE_S)[1] for load in loads)
    stats = store.stats()
    live, bound = keys * size, log_limit(keys * size, 10 * MIB) + threads * size
    print(
        f"\n{sync:8} {threads} x {size:>8} B: {stats.seq * size >> 20:>6} MiB written, largest log"
        f" {largest / MIB:.1f} MiB = {largest / live:.2f} x live, {largest / bound:.2f} of the"
        f" bound, {stats.compactions} compactions, longest apply {longest * 1e3:.0f} ms,"
        f" throttled {stats.throttled_s:.2f} s"
    )
    assert largest <= bound
    assert stats.compactions or stats.log_bytes < log_limit(live, 10 * MIB)


def parked_compaction(store, steps, monkeypatch) -> Gate:
    """Begin a compaction that waits at the gate: writes wait for it for as long as it does."""
    monkeypatch.setattr(compactor_module, "PATIENCE_S", DEADLINE_S)
    due = [Put("k", b"v" * (2 * MIB))]
    return steps.parked("compact.write", store.apply, due, cursor(1))[0]


class SmallDisk(Files):
    """A disk that says how much room it has, or None; or fails to."""

    def __init__(self, free: int | str | None) -> None:
        self.free = free

    def free_bytes(self, path: Path) -> int | None:
        if isinstance(self.free, str):
            raise OSError(errno.ENOSYS, self.free)
        return self.free


@pytest.mark.parametrize(
    ("free", "is_small"),
    [
        (MIB, True),
        (8 * MIB, False),
        (0, False),  # the compaction fails in any case
        (None, False),
        ("cannot tell", False),
    ],
)
def test_writes_leave_a_compaction_the_room_that_it_needs_on_the_disk(
    open_store, steps, monkeypatch, free, is_small
):
    """The log filled a small disk while it was compacted, and could never be compacted again.

    1 MB of live data on a disk of 32 MB was overwritten for a second; then each write failed.
    """
    store = open_store(compact_threshold=MIB, files=SmallDisk(8 * MIB))
    store.apply([Put("live", b"v" * (MIB // 2))], cursor(1))
    store.compact()
    store._core.config.files.free = free
    gate = parked_compaction(store, steps, monkeypatch)
    compactor = store._supervisor.writer._compactor
    assert not compactor.holds_back(MIB // 8)
    assert compactor.holds_back(MIB // 2) == is_small
    gate.open()


@pytest.mark.parametrize("restarted", [False, True])
def test_writes_wait_for_a_compaction_that_is_behind_and_the_statistics_tell(
    open_store, steps, monkeypatch, restarted
):
    """They did not while the writer had restarted, and the supervisor had not heard of it yet."""
    store = open_store(compact_threshold=MIB)
    if restarted:
        monkeypatch.setattr(Supervisor, "_on_started", lambda self, actor: None)
        steps.crash("writer.before_write")
    gate = parked_compaction(store, steps, monkeypatch)
    answers = [store.apply_async([Put("k", b"w" * MIB)], cursor(number)) for number in range(2, 12)]
    until(lambda: answers[0].done(), "what fits is written")
    writer = store._supervisor.writer
    until(lambda: writer.busy_since is not None, "the writer waits")
    assert not answers[-1].done()
    assert store.stats().log_bytes <= log_limit(0, MIB)
    gate.open()
    assert [answer.result(DEADLINE_S) for answer in answers] == list(range(2, 12))
    assert store.stats().throttled_s > 0
    assert store.stats().compactions


def test_a_caller_keeps_its_deadline_while_writes_wait_for_a_compaction(
    open_store, steps, monkeypatch
):
    """It had taken the writer's turn, and slept there past any deadline."""
    store = open_store(compact_threshold=MIB)
    gate = parked_compaction(store, steps, monkeypatch)
    writer = store._supervisor.writer
    turns = []
    monkeypatch.setattr(
        type(writer._compactor),
        "hold_back",
        lambda self, size: turns.append(threading.current_thread()),
    )
    for number in range(2, 12):
        store.apply([Put("k", b"w" * MIB)], cursor(number))
    assert turns[-1] is writer.thread
    monkeypatch.undo()
    gate.open()


def test_closing_does_not_wait_for_a_compaction_that_is_behind(open_store, steps, monkeypatch):
    store = open_store(compact_threshold=MIB)
    gate = parked_compaction(store, steps, monkeypatch)
    answers = [store.apply_async([Put("k", b"w" * MIB)], cursor(number)) for number in range(2, 12)]
    closing = in_thread(store.close, DEADLINE_S)
    assert [answer.result(DEADLINE_S) for answer in answers] == list(range(2, 12))
    gate.open()
    closing.result(DEADLINE_S)


def test_a_compaction_that_failed_is_tried_again_while_nothing_is_written(open_store, monkeypatch):
    """Only an apply tried again: a store that had gone idle kept its log for ever."""
    monkeypatch.setattr(compactor_module, "RETRY_S", 0.01)
    monkeypatch.setattr(Writer, "tick_s", 0.01)
    files = FaultyFiles()
    store = open_store(files=files, compact_threshold=MIB)
    files.arm(
        Fault("create", nth=1, error=errno.ENOSPC), Fault("create", nth=2, error=errno.ENOSPC)
    )
    store.apply([Put("k", b"v" * (2 * MIB))], cursor(1))
    store.apply([Put("k", b"small")], cursor(2))
    until(lambda: store.stats().compactions, "it is compacted, with nothing more written")
    assert len(files.fired) == 2
    assert store.stats().compaction_error == ""
    assert store.stats().log_bytes < MIB


def test_a_log_that_cannot_be_compacted_grows_to_its_bound_and_no_further(open_store, monkeypatch):
    """A full disk: each compaction failed, and the log grew for as long as there was any room."""
    monkeypatch.setattr(compactor_module, "RETRY_S", 0.01)
    monkeypatch.setattr(compactor_module, "MAX_RETRY_S", 0.01)
    monkeypatch.setattr(compactor_module, "DEFAULT_COMPACT_THRESHOLD", MIB)
    monkeypatch.setattr(Writer, "tick_s", 0.01)
    files = FaultyFiles()
    store = open_store(files=files, compact_threshold=MIB)
    files.arm(Fault("create", nth=1, error=errno.ENOSPC, lasting=True))
    written = 0

    def fill() -> None:
        nonlocal written
        for written in range(200):
            store.apply([Put("k", b"v" * 200_000)], cursor(written + 1))

    with pytest.raises(Backpressure, match=r"cannot be compacted.*No space left"):
        fill()
    assert 5 < written < 60
    assert store.stats().log_bytes <= log_limit(200_000, MIB)
    assert "No space left" in store.stats().compaction_error
    assert store.cursor() == cursor(written)
    files.disarm()  # there is room again
    until(lambda: store.stats().compactions, "it is compacted by itself")
    store.apply([Put("k", b"v")], cursor(999))


def test_once_a_full_disk_has_room_again_the_log_is_compacted_before_it_takes_it(
    open_store, monkeypatch
):
    """The compaction was tried again up to a minute later. By then, the log had filled the room."""
    monkeypatch.setattr(compactor_module, "RETRY_S", 10 * DEADLINE_S)
    monkeypatch.setattr(compactor_module, "MAX_RETRY_S", 10 * DEADLINE_S)
    disk = SmallDisk(0)
    files = FaultyFiles(inner=disk)
    store = open_store(files=files, compact_threshold=MIB)
    files.arm(Fault("create", nth=1, error=errno.ENOSPC))
    store.apply([Put("k", b"v" * (2 * MIB))], cursor(1))
    until(lambda: store.stats().compaction_error, "it could not be compacted")
    store.apply([Put("k", b"still full")], cursor(2))
    assert store._supervisor.writer._compactor.running is None
    disk.free = 8 * MIB
    store.apply([Put("k", b"room")], cursor(3))
    until(lambda: store.stats().compactions, "it is compacted")


def test_new_entries_are_no_growth_that_a_failing_compaction_bounds(open_store, monkeypatch):
    """All of it is live: there is nothing that a compaction could free."""
    monkeypatch.setattr(compactor_module, "DEFAULT_COMPACT_THRESHOLD", MIB)
    files = FaultyFiles()
    store = open_store(files=files, compact_threshold=MIB)
    files.arm(Fault("create", nth=1, error=errno.EACCES, lasting=True))
    for number in range(1, 60):
        store.apply([Put(f"k{number}", b"v" * 200_000)], cursor(number))
        if number % 10 == 0:
            with pytest.raises(PermissionError):
                store.compact(DEADLINE_S)
    assert len(store.snapshot()) == 59


def test_a_store_that_crashes_again_and_again_still_compacts(open_store, path, steps, monkeypatch):
    """Each crash threw the compaction away, and the log was longer at the next one."""
    monkeypatch.setattr(compactor_module, "PATIENCE_S", DEADLINE_S)
    store = open_store(compact_threshold=4 * MIB, max_restarts=1000)
    for number in range(1, 120):
        if number % 30 == 0:
            steps.crash("writer.before_write")
        store.apply([Put(f"k{number % 3}", b"v" * 500_000)], cursor(number), DEADLINE_S)
        assert store.stats().log_bytes <= log_limit(1_500_000, 4 * MIB)
    assert store.stats().compactions
    store.close()
    assert read_back(path).seq == 119


def test_overwrites_during_a_compaction_are_carried_as_what_they_came_to(open_store, steps, path):
    """And a follower that had read them one by one is not told that the log is another."""
    store = open_store()
    store.apply([Put("gone", b"1"), Put("k", b"0")], cursor(1))
    follower = foldlog.follow(path)
    gate, compaction = steps.parked("compact.written", in_thread, store.compact, DEADLINE_S)
    for number in range(2, 60):
        store.apply([Put("k", b"%d" % number * 60_000)], cursor(number))
    until(lambda: follower.snapshot().seq == 59, "the follower has read them")
    store.delete("gone")
    gate.open()
    compaction.result(DEADLINE_S)
    appended = store.stats().appended_bytes
    assert appended < MIB, "the fold was written, and not the frames carried over"
    expected = {entry.key: entry.value for entry in store.range("")}
    assert expected == {"k": b"59" * 60_000}
    until(lambda: follower.snapshot().seq == 60, "the follower has read all")
    assert {entry.key: entry.value for entry in follower.range("")} == expected
    assert follower.state == "following"
    follower.close()
    assert store.verify().ok
    store.close()
    truth = read_back(path)
    assert (truth.seq, truth.cursor) == (60, cursor(59))
    assert {key: entry.value for key, entry in truth.entries.items()} == expected
