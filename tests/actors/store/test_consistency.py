"""Eight threads read and write while actors die: no torn batch, stale read or lost own write."""

from __future__ import annotations

import contextlib
import errno
import random
import threading
from pathlib import Path

import pytest
from actor_kit import (
    DEADLINE_S,
    FATAL,
    Ledger,
    assert_whole,
    batch,
    commit_group,
    cursor,
    in_thread,
    read_back,
    results,
    until,
    waiting,
)

from foldlog import (
    CursorRegressed,
    Get,
    KeyExists,
    Put,
    Range,
    State,
    VersionMismatch,
    VersionToken,
    WatchCursor,
    WriterCrashed,
)
from foldlog.actors.store.core import Config, Core
from foldlog.storage.fold.base import EMPTY_BASE
from foldlog.storage.fold.delta import EMPTY_DELTA
from foldlog.storage.fold.snapshot import FoldSnapshot

ON_EACH_ENGINE = True

HARM = [
    "writer.before_write",
    "writer.after_write",
    "writer.after_publish",
    "compact.begin",
    "compact.write",
    "compact.written",
    "compact.finish",
    "compact.finished",
    "reader.handle",
    "syncer.sync",
]


def campaign(store, steps, ledger, seed, rounds):
    """Four threads that write, three that read, one that does harm. Returns when all have ended."""
    rng = random.Random(seed)
    over = threading.Event()
    turn = threading.Lock()
    plan = [(rng.choice(HARM), rng.choice(FATAL)) for _ in range(rounds // 3)]

    def ask(message):
        while True:
            try:
                return store.reader.ask(message, timeout=DEADLINE_S)
            except WriterCrashed:  # the same, for a reader
                assert not over.is_set()

    def write():
        for _ in range(rounds):
            with turn:  # so that the cursors rise with the sequences, as an upstream's do
                number = ledger.number()
                future = store.apply_async(batch(number), cursor(number), DEADLINE_S)
            if not ledger.settle(number, lambda future=future: future.result(DEADLINE_S)):
                assert isinstance(
                    ledger.errors[number], WriterCrashed
                )  # two crashes met it, one after the other
                assert store.get(f"batch/{number:06}") is None
                continue
            assert store.get(f"batch/{number:06}").value == b"%d" % number
            assert ask(Get(f"batch/{number:06}")).value == b"%d" % number
            assert int.from_bytes(bytes(store.cursor()), "big") >= number

    def read_snapshots():
        seen, seq, held = 0, 0, []
        while not over.is_set():
            snapshot = store.snapshot()
            number = assert_whole(snapshot)
            assert number >= seen, "the cursor moved back"
            assert snapshot.seq >= seq
            if number != seen:
                held.append((snapshot, number))
            seen, seq = number, snapshot.seq
        for snapshot, number in held:
            assert assert_whole(snapshot) == number, "a snapshot that was held has changed"
        return len(held)

    def read_by_message():
        seen = 0
        while not over.is_set():
            values = {entry.value for entry in ask(Range("shared/"))}
            assert len(values) <= 1
            number = int(values.pop()) if values else 0
            assert number >= seen, "time ran backwards between two messages"
            seen = number

    def harm():
        for step, error in plan:
            crash = steps.crash(step, error)
            if step.startswith("compact"):
                with contextlib.suppress(WriterCrashed):
                    store.put("local/for the compaction", b"")
                    store.compact(DEADLINE_S)
            elif step != "syncer.sync":
                until(lambda crash=crash: crash.fired or over.is_set(), f"{step} is reached")

    writers = [in_thread(write) for _ in range(4)]
    others = [in_thread(read_snapshots), in_thread(read_snapshots), in_thread(read_by_message)]
    harming = in_thread(harm)
    try:
        results(writers)
    finally:
        over.set()
        steps.mend()
    results([*others, harming])


@pytest.mark.parametrize(
    ("seed", "rounds"),
    [
        *((seed, 20) for seed in (1, 2, 3)),
        *(pytest.param(seed, 60, marks=pytest.mark.slow) for seed in range(20)),
    ],
)
def test_eight_threads_and_crashes_never_show_half_a_batch_or_lose_one(
    open_store, steps, path, seed, rounds
):
    store = open_store(
        max_restarts=10_000,
        sync_interval_s=0.02,
        readers=2,
        sync=["interval", "always", "never"][seed % 3],
    )
    # Restarts follow each other at once: what is tested is what they show, not how long they wait.
    object.__setattr__(store._core.config, "restart_delay_s", 0.0005)
    ledger = Ledger()
    campaign(store, steps, ledger, seed, rounds=rounds)
    until(lambda: store.state is State.RUNNING, "the store runs")
    extra = store.snapshot().seq - len(ledger.answered)
    store.close(DEADLINE_S)
    check(ledger, path, extra)


def check(ledger, path, extra):
    """The ledger's check, including the local writes that gave compactions work to do."""
    truth = read_back(path)
    assert sorted(ledger.answered.values()) == sorted(set(ledger.answered.values()))
    assert {f"batch/{number:06}" for number in ledger.answered} == {
        key for key in truth.entries if key.startswith("batch/")
    }
    assert truth.cursor == cursor(max(ledger.answered, key=ledger.answered.__getitem__))
    assert truth.seq == len(ledger.answered) + extra


def test_counters_that_eight_threads_compare_and_set_lose_no_increment(open_store, steps):
    store = open_store(max_restarts=1000)
    object.__setattr__(store._core.config, "restart_delay_s", 0.0005)
    store.apply([], cursor(77))
    version = store.create("counter", b"0")
    versions: list[bytes] = [bytes(version)]
    for number in range(4):
        steps.crash(
            ["writer.before_write", "writer.after_write", "writer.after_publish"][number % 3],
            FATAL[number],
        )

    def increment() -> int:
        lost = 0
        for _ in range(12):
            while True:
                entry = store.get("counter")
                try:
                    token = store.update(
                        "counter", b"%d" % (int(entry.value) + 1), expected=entry.version
                    )
                except VersionMismatch as conflict:
                    lost += conflict.expected == entry.version != conflict.actual
                except WriterCrashed:
                    continue  # it was not applied
                else:
                    versions.append(bytes(token))
                    break
        return lost

    assert sum(results([in_thread(increment) for _ in range(8)])) >= 0
    assert store.get("counter").value == b"96"
    assert len(set(versions)) == len(versions) == 97
    assert bytes(store.get("counter").version) == max(versions)
    assert store.cursor() == cursor(77), "the cursor is upstream's"


def test_batches_of_one_thread_are_written_in_the_order_of_its_calls_through_crashes(
    open_store, steps
):
    store = open_store(max_restarts=1000)
    object.__setattr__(store._core.config, "restart_delay_s", 0.0005)
    for step in ("before_write", "after_write", "after_publish", "start"):
        steps.crash(f"writer.{step}")
    gate, futures = commit_group(store, steps, range(1, 41))
    gate.open()
    assert results(futures) == list(range(1, 41))
    assert assert_whole(store.snapshot()) == 40


@pytest.mark.append_log("RocksDB's snapshots end")
def test_a_snapshot_outlives_crash_restart_compaction_and_close(open_store, steps):
    store = open_store()
    store.apply(
        [Put(f"k{number:04}", b"old" * 50, VersionToken.from_u64(1)) for number in range(2000)],
        cursor(1),
    )
    store.compact()
    held = store.snapshot()
    before = held.range("")
    steps.crash("writer.after_write")
    store.apply([Put(f"k{number:04}", b"new") for number in range(0, 2000, 2)], cursor(2))
    store.compact()
    store.close()
    assert held.cursor() == cursor(1)
    assert held.range("") == before
    assert held.get("k0000").value == b"old" * 50


@pytest.mark.append_log("its file fails")
@pytest.mark.parametrize("fails", [False, True])
def test_a_refusal_rests_on_what_is_written_and_not_on_what_is_about_to_be(
    open_store, steps, files, fails
):
    """`create` was refused for an entry of its own commit group, whose write then failed.

    The entry had never existed. And if the write succeeded, a read after the refusal could still
    be older than the entry that caused it.
    """
    store = open_store(files=files)
    store.put("x", b"0")
    gate, (first,) = commit_group(store, steps, [1])  # on the writer's thread
    creations = []
    for number, name in enumerate((b"A", b"B", b"C"), 1):
        creations.append(in_thread(store.create, "lock", name))
        until(lambda number=number: waiting(store) == number, "it waits behind the first")
    group = steps.park("writer.before_write")
    gate.open()
    first.result(DEADLINE_S)
    group.wait_until_reached()
    assert not any(creation.done() for creation in creations), "refused before anything is written"
    if fails:
        files.fail("write", errno.ENOSPC, times=1, part="state.log")
    group.open()
    outcomes = [creation.exception(DEADLINE_S) for creation in creations]
    winner = 1 if fails else 0
    assert outcomes[winner] is None
    if fails:
        assert isinstance(outcomes[0], OSError)
    for outcome in outcomes[winner + 1 :]:
        assert isinstance(outcome, KeyExists)
        assert outcome.version == bytes(creations[winner].result().as_u64().to_bytes(8, "big"))
    assert store.get("lock").value == (b"B" if fails else b"A")


@pytest.mark.append_log("its file fails")
@pytest.mark.parametrize("fails", [False, True])
def test_a_cursor_is_refused_because_of_what_is_written_and_not_about_to_be(
    open_store, steps, files, fails
):
    """A `forward_only` batch was refused because of a cursor of its own group, whose write failed.

    The store had never been at that cursor.
    """
    store = open_store(files=files)
    gate, (first,) = commit_group(store, steps, [1])  # on the writer's thread
    ahead = store.apply_async([], cursor(9))
    between = store.apply_async([], cursor(5), forward_only=True)
    group = steps.park("writer.before_write")
    gate.open()
    first.result(DEADLINE_S)
    group.wait_until_reached()
    assert not between.done(), "refused before anything is written"
    if fails:
        files.fail("write", errno.ENOSPC, times=1, part="state.log")
    group.open()
    assert isinstance(between.exception(DEADLINE_S), type(None) if fails else CursorRegressed)
    assert isinstance(ahead.exception(DEADLINE_S), OSError if fails else type(None))
    assert store.cursor() == cursor(5 if fails else 9)


def test_what_is_known_to_be_synced_never_steps_back_between_two_threads():
    """The writer and the syncer each compared, then wrote, two fields: one could undo the other."""
    core = Core(Config(Path("none.log")))
    folds = [FoldSnapshot(EMPTY_BASE, EMPTY_DELTA, (), seq, cursor(seq)) for seq in range(1, 2001)]
    seen = []
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            seen.append(core.synced)

    watcher = in_thread(watch)
    notes = [
        in_thread(lambda: [core.note_synced(fold) for fold in folds]),
        in_thread(lambda: [core.note_synced(fold, by_syncer=True) for fold in folds[::3]]),
    ]
    results(notes)
    core.note_synced(folds[0])
    core.note_synced(folds[0], by_syncer=True)
    done.set()
    watcher.result(DEADLINE_S)
    assert core.synced == (2000, cursor(2000))
    assert [seq for seq, _ in seen] == sorted(seq for seq, _ in seen)
    assert all(at == (cursor(seq) if seq else WatchCursor.none()) for seq, at in seen)
