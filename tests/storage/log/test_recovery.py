"""Opening a log that was cut, zeroed or flipped: the state, its longest whole prefix, or a refusal.

No loss is silent and no value is wrong: a tail is cut only where a stopped writer explains it, and
the bytes that are cut are kept.
"""

from __future__ import annotations

import os
import random
import tracemalloc
from pathlib import Path

import pytest
from logfiles import (
    UNSYNCED,
    Frame,
    State,
    commit_all,
    forget_the_watermark,
    frames_of,
    opened,
    prefix_states,
    read_state,
    refused,
    some_batches,
    write_log,
)
from sampling import every, sample

from foldlog import (
    AppendLogSnapshot,
    CorruptLogError,
    FoldlogError,
    InvalidFormatError,
    LogRegressedError,
    Put,
    WatchCursor,
)
from foldlog.protocol.frames import FILE_HEADER
from foldlog.storage.engines.append_log.engine import LogEngine as Engine
from foldlog.storage.log.files import Files
from foldlog.storage.log.sidecars.lock import note_path
from foldlog.storage.log.sidecars.note import NOTE_MAGIC
from foldlog.storage.repair.verify import verify_log
from foldlog.testing import flips

pytestmark = pytest.mark.exhaustive

SHAPES = [
    pytest.param({"sealed": False, "sync_each": False}, id="never synced"),
    pytest.param({"sealed": True, "sync_each": False}, id="sealed"),
    pytest.param({"sealed": False, "sync_each": True}, id="each synced"),
    pytest.param({"sealed": True, "sync_each": True}, id="each synced, sealed"),
]


def listing(folder: Path) -> dict[str, bytes]:
    return {
        file.name: file.read_bytes() for file in folder.iterdir() if ".foldlog-" not in file.name
    }


def base_end(raw: bytes) -> int:
    return next(frame.end for frame in frames_of(raw) if frame.header.kind == 4)


def last_batches(raw: bytes) -> Frame:
    return [frame for frame in frames_of(raw) if frame.header.batches][-1]


# Cut off.


@pytest.mark.parametrize("shape", SHAPES)
@every(11)
def test_a_log_cut_at_any_byte_opens_with_its_whole_frames_and_keeps_the_rest(
    path, shape, rebooted, every
):
    raw = write_log(path, some_batches(3), base=some_batches(2), **shape)
    states = prefix_states(raw, path)
    for file in path.parent.iterdir():
        file.unlink()
    for size in sample(range(base_end(raw), len(raw)), every, also=states):
        path.write_bytes(raw[:size])
        good_end = max(end for end in states if end <= size)
        engine = Engine(path, files=UNSYNCED)
        report = engine.report
        engine.log.abandon()
        assert (report.seq, report.size, report.cut_bytes) == (
            states[good_end].seq,
            good_end,
            size - good_end,
        )
        after = listing(path.parent)
        assert after.pop(path.name) == raw[:good_end]
        assert (report.kept_at is None) == (size == good_end)
        kept = {}
        if report.kept_at is not None:
            assert report.kept_at == path.with_name(f"{path.name}.torn-{states[good_end].seq}-1")
            assert report.cut_reason
            kept = {report.kept_at.name: raw[good_end:size]}
            report.kept_at.unlink()
        assert after == kept
        assert read_state(path, files=UNSYNCED) == states[good_end]
        assert listing(path.parent) == {path.name: raw[:good_end]}, (
            "a second opening changed something"
        )


def test_appending_after_a_cut_lands_clean(path):
    raw = write_log(path, some_batches(3), base=some_batches(2))
    states = prefix_states(raw, path)
    for size in range(base_end(raw), len(raw), 7):
        path.write_bytes(raw[:size])
        forget_the_watermark(path)
        good = states[max(end for end in states if end <= size)]
        engine = Engine(path)
        commit_all(engine, [[Put("after", b"the cut")]])
        engine.close()
        engine = Engine(path)
        assert engine.report.cut_bytes == 0
        assert engine.report.sealed
        assert engine.fold.seq == good.seq + 1
        assert engine.fold.get("after").value == b"the cut"
        engine.log.abandon()


def test_a_log_cut_within_its_header_or_base_is_refused(path):
    raw = write_log(path, some_batches(3), base=some_batches(2))
    for size in range(base_end(raw)):
        kind = InvalidFormatError if size < FILE_HEADER.size else CorruptLogError
        error = refused(path, raw[:size], kind)
        assert error.path == path
        assert error.offset <= size
        assert error.last_good_seq is None
        refused(path, raw[:size], FoldlogError, on_damage="cut")


def test_every_cut_keeps_what_earlier_cuts_kept(path):
    raw = write_log(path, some_batches(1))
    kept = []
    for cut in (1, 2, 3):
        path.write_bytes(raw[:-cut])
        engine = Engine(path)
        kept.append(engine.report.kept_at)
        engine.log.abandon()
    assert [file.name for file in kept] == [f"{path.name}.torn-0-{n}" for n in (1, 2, 3)]
    start = last_batches(raw).start
    assert [file.read_bytes() for file in kept] == [raw[start:-cut] for cut in (1, 2, 3)]


def test_the_contracts_open_repairs_and_compacts_in_one(path):
    raw = write_log(path, some_batches(3), base=some_batches(2))
    states = prefix_states(raw, path)
    path.write_bytes(raw[:-1])
    forget_the_watermark(path)
    good = states[last_batches(raw).start]
    cursor, snap = AppendLogSnapshot.open(path)
    with snap:
        assert cursor == WatchCursor.from_u64(good.seq)
        assert {
            entry.key: (entry.value, bytes(entry.version)) for entry in snap.range("")
        } == good.entries
        assert snap.report.cut_bytes == len(raw) - 1 - last_batches(raw).start
        assert snap.report.compacted
    assert read_state(path) == good


# Flipped.


def flip_all(path: Path, raw: bytes, bits: list[int]) -> None:
    whole = opened(path, raw)
    for bit, damaged in flips(raw, bits):
        error = refused(path, damaged, (CorruptLogError, InvalidFormatError))
        assert error.path == path
        assert 0 <= error.offset <= bit // 8, f"bit {bit}: damage reported at byte {error.offset}"
        assert error.reason
        assert error.last_good_seq is None or error.last_good_seq <= whole.seq
    assert opened(path, raw) == whole


@pytest.mark.parametrize("shape", SHAPES)
def test_no_flipped_bit_goes_unnoticed(path, shape, rebooted):
    raw = write_log(path, some_batches(2), base=some_batches(2), **shape)
    flip_all(path, raw, random.Random(1).sample(range(len(raw) * 8), 100))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("size", [20, 1500])
@pytest.mark.parametrize("shape", SHAPES)
def test_no_flipped_bit_of_all_goes_unnoticed(path, shape, rebooted, size):
    raw = write_log(path, some_batches(3, size), base=some_batches(2, size), **shape)
    flip_all(path, raw, list(range(0, len(raw) * 8, 1 if size == 20 else 7)))


@pytest.mark.parametrize("sync_each", [False, True])
@every(7)
def test_a_flip_in_the_last_frame_is_refused_and_not_dropped(path, rebooted, sync_each, every):
    # "Torn if no valid frame follows" dropped the last acknowledged batch here.
    raw = write_log(path, some_batches(2), sync_each=sync_each)
    last = last_batches(raw)
    assert last.end == len(raw), "the log is not sealed"
    for _, damaged in flips(raw, sample(range(last.start * 8, last.end * 8), every)):
        error = refused(path, damaged)
        assert error.offset == last.start
        assert (error.last_good_seq, error.last_good_cursor) == (1, bytes(WatchCursor.from_u64(1)))


def test_a_flip_is_refused_by_the_contracts_open_and_leaves_no_trace(path):
    raw = bytearray(write_log(path, some_batches(2), base=some_batches(2)))
    raw[-20] ^= 4
    path.write_bytes(raw)
    with pytest.raises(CorruptLogError) as caught:
        AppendLogSnapshot.open(path)
    assert listing(path.parent) == {path.name: bytes(raw)}
    assert str(caught.value).startswith(f"{path}: byte {caught.value.offset}: ")
    raw[-20] ^= 4
    path.write_bytes(raw)
    AppendLogSnapshot.open(path)[1].close()


# Zeros.


@pytest.mark.parametrize("sync_each", [False, True])
@pytest.mark.parametrize("size", [20, 1500])
@every(7)
def test_a_last_frame_zeroed_from_any_byte_is_torn_after_a_reboot_and_corrupt_before(
    path, size, rebooted, sync_each, every
):
    raw = write_log(path, some_batches(2, size), sync_each=sync_each)
    states = prefix_states(raw, path)
    last = last_batches(raw)
    step = every if size == 20 else 5 * every
    ends = range(last.end - 6, last.end)  # the last four bytes decide
    for start in sample(range(last.start, last.end), step, also=ends):
        zeroed = raw[:start] + bytes(len(raw) - start)
        if start == last.start or (rebooted and start <= last.end - 4):
            assert opened(path, zeroed) == states[last.start], start
        else:
            refused(path, zeroed)


@pytest.mark.parametrize("zeros", [1, 5, 47, 48, 49, 51, 52, 511, 512, 4096, 70_000])
@pytest.mark.parametrize("shape", SHAPES)
def test_zeros_behind_a_clean_end_are_cut(path, zeros, rebooted, shape):
    raw = write_log(path, some_batches(2), **shape)
    whole = opened(path, raw)
    assert opened(path, raw + bytes(zeros)) == whole
    assert path.read_bytes() == raw
    assert not list(path.parent.glob("*.torn-*")), "zeros are told, and not kept"


# Policies and what the lock file remembers.


def test_cutting_keeps_all_before_the_damage_and_sets_the_rest_aside(path):
    raw = write_log(path, some_batches(4), base=some_batches(2), sealed=True)
    states = prefix_states(raw, path)
    frames = frames_of(raw)
    for frame in frames:
        damaged = bytearray(raw)
        damaged[frame.start + 50 if frame.end - frame.start > 52 else frame.start + 9] ^= 1
        for file in path.parent.iterdir():
            file.unlink()
        if frame.start < base_end(raw):
            refused(path, bytes(damaged), on_damage="cut")
            continue
        found = opened(path, bytes(damaged), on_damage="cut")
        assert found == states[frame.start]
        kept = path.with_name(f"{path.name}.torn-{found.seq}-1")
        assert listing(path.parent) == {
            path.name: raw[: frame.start],
            kept.name: bytes(damaged[frame.start :]),
        }
        assert read_state(path) == found


@pytest.mark.parametrize("policy", [None, "", "keep", True])
def test_an_unknown_policy_is_refused_and_makes_no_file(path, policy):
    error = ValueError if isinstance(policy, str) else TypeError
    with pytest.raises(error, match="on_damage"):
        AppendLogSnapshot.open(path, on_damage=policy)
    assert not path.exists()


def synced_log(path: Path) -> bytes:
    engine = Engine(path)
    commit_all(engine, some_batches(3))
    engine.log.sync()
    engine.log.abandon()
    return path.read_bytes()


def test_a_log_cut_at_a_frames_boundary_after_a_sync_is_refused(path):
    raw = synced_log(path)
    note = note_path(path).read_bytes()
    for frame in frames_of(raw):
        if frame.end < base_end(raw) or frame.end == len(raw):
            continue
        path.write_bytes(raw[: frame.end])
        note_path(path).write_bytes(note)
        for _ in range(2):
            with pytest.raises(LogRegressedError) as caught:
                Engine(path)
            assert caught.value.path == path
            assert path.read_bytes() == raw[: frame.end]
        assert read_state(path, on_damage="cut").seq == frame.header.seq
        assert path.read_bytes() == raw[: frame.end]


def test_a_synced_log_torn_within_a_frame_is_refused_and_stays(path):
    raw = synced_log(path)
    path.write_bytes(raw[:-1])
    with pytest.raises(LogRegressedError):
        Engine(path)
    assert listing(path.parent) == {path.name: raw[:-1]}
    assert read_state(path, on_damage="cut").seq == 2


def test_what_was_appended_after_the_watermark_may_be_lost(path):
    engine = Engine(path)
    commit_all(engine, some_batches(2))
    engine.log.sync()
    commit_all(engine, some_batches(1))
    engine.log.abandon()
    path.write_bytes(path.read_bytes()[:-1])
    assert read_state(path).seq == 2


def test_the_watermark_survives_compaction_and_openings(path):
    engine = Engine(path)
    commit_all(engine, some_batches(3))
    old = path.read_bytes()
    engine.compact()
    engine.log.abandon()
    new = path.read_bytes()
    assert read_state(path).seq == 3
    path.write_bytes(old[: frames_of(old)[2].end])
    with pytest.raises(LogRegressedError):
        Engine(path)
    path.write_bytes(new)
    assert read_state(path).seq == 3


def test_another_logs_watermark_says_nothing(path):
    synced_log(path)
    path.write_bytes(write_log(path.with_name("other.log"), some_batches(1)))
    assert read_state(path).seq == 1


@pytest.mark.parametrize("note", [b"", b"\0" * 1024, NOTE_MAGIC, NOTE_MAGIC + b"\xff" * 496])
def test_a_note_that_a_crash_left_unfinished_is_ignored(path, note):
    raw = synced_log(path)
    note_path(path).write_bytes(note)
    assert read_state(path).seq == 3
    assert path.read_bytes() == raw


# The header alone.


def test_an_empty_log_is_its_header_and_the_end_of_its_base(path):
    raw = write_log(path, [])
    assert [frame.header.kind for frame in frames_of(raw)] == [4]
    assert opened(path, raw) == State(0, b"", {})
    assert path.read_bytes() == raw


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x89",
        b"\x89FLG\r\n\x1a\n",
        b"PGSS\x01\x00",
        b"hello, world\n" * 9,
        bytes(52),
        bytes(4096),
        b"\xff" * 99,
    ],
)
def test_a_file_that_is_no_log_is_refused_and_stays(path, content):
    for policy in ("refuse", "cut"):
        error = refused(path, content, InvalidFormatError, on_damage=policy)
        assert (error.path, error.offset) == (path, 0)


def test_a_session_that_died_before_its_first_batch_is_synced_before_the_next(path, monkeypatch):
    """A killed writer left its OPEN frame in the page cache.

    A power loss then removed it from under the frames of the next writer.
    """
    with AppendLogSnapshot.open(path)[1] as snap:
        snap._engine.log._begin_session()
        snap._engine.log.abandon()
    synced = []
    monkeypatch.setattr(Files, "sync", lambda self, fd: synced.append(fd))
    _, snap = AppendLogSnapshot.open(path)
    snap._engine.log.abandon()
    assert len(synced) == 1


# Long tails.


def test_a_tail_as_long_as_a_disk_is_judged_in_little_memory_and_its_holes_are_kept(path):
    """`truncate -s 3G LOG` cost 6.2 GiB of memory, and 3 GiB of zeros beside the log."""
    raw = write_log(path, some_batches(2))
    length = 64 * 1024**3
    for junk in (b"", b"\1junk"):
        path.write_bytes(raw)
        os.truncate(path, length)
        with open(path, "r+b") as file:
            file.seek(length - 4096)
            file.write(junk)
        tracemalloc.start()
        try:
            assert verify_log(path).ok is not bool(junk)
            engine = Engine(path, on_damage="cut")
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        report = engine.report
        engine.log.abandon()
        assert peak < 24 * 1024 * 1024
        assert report.cut_bytes == length - len(raw)
        assert path.read_bytes() == raw
        if not junk:
            assert report.kept_at is None
            assert "nothing but zeros" in report.cut_reason
            continue
        kept = report.kept_at.stat()
        assert kept.st_size == length - len(raw)
        assert kept.st_blocks * 512 < 1024 * 1024
        report.kept_at.unlink()


def test_little_of_a_tail_with_bytes_all_over_it_is_read_and_its_copy_is_as_sparse(path):
    """Around each of the bytes a MiB of the hole was read, again and again, and copied as zeros."""
    raw = write_log(path, some_batches(2))
    length, count = 4 * 1024**3, 16
    with open(path, "r+b") as file:
        for number in range(1, count + 1):
            file.seek(len(raw) + number * length // count)
            file.write(b"\1")

    class Counted(Files):
        taken = 0

        def read(self, fd: int, size: int, offset: int) -> bytes:
            Counted.taken += size
            return super().read(fd, size, offset)

    engine = Engine(path, on_damage="cut", files=Counted())
    report = engine.report
    engine.log.abandon()
    assert path.read_bytes() == raw
    assert report.kept_at.stat().st_size == report.cut_bytes == length + 1
    assert report.kept_at.stat().st_blocks * 512 <= count * 64 * 1024
    with open(report.kept_at, "rb") as kept:
        for number in range(1, count + 1):
            kept.seek(number * length // count - 1)
            assert kept.read(2).strip(b"\0") == b"\1"
    assert Counted.taken < count * 512 * 1024


def test_a_long_tail_that_is_no_hole_is_judged_in_little_memory(path):
    raw = write_log(path, some_batches(2))
    path.write_bytes(raw + bytes(40_000_000) + b"\1" * 1_000_000)
    tracemalloc.start()
    try:
        assert not verify_log(path).ok
        with pytest.raises(CorruptLogError):
            Engine(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 24 * 1024 * 1024
