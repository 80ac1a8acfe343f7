"""`salvage` keeps what is valid, lists what it lost; a replay from its cursor restores the rest."""

from __future__ import annotations

import contextlib
import errno
from pathlib import Path

import pytest
from faultkit import View, batch, descriptors, fold_of, view
from logfiles import Frame, commit_all, frames_of, write_log

from foldlog import AppendLogSnapshot, InvalidFormatError, Put, WatchCursor
from foldlog.protocol.frames import FILE_HEADER, FRAME_HEADER, KIND_BASE_END, KIND_LEAF
from foldlog.storage.engines.append_log.engine import LogEngine as Engine
from foldlog.storage.repair.salvage import SalvageReport, salvage_log
from foldlog.storage.repair.verify import verify_log
from foldlog.testing import Fault, FaultyFiles, sampled_flips, splices

pytestmark = pytest.mark.exhaustive

COUNT = 12
WHOLE = fold_of(list(range(1, COUNT + 1)))


@pytest.fixture
def raw(path: Path) -> bytes:
    """A log of batches 1 to COUNT, of which 1 to 4 are in the base."""
    return write_log(
        path, [batch(n) for n in range(5, COUNT + 1)], base=[batch(n) for n in range(1, 5)]
    )


def batches_in(raw: bytes) -> list[Frame]:
    """The frames of batches 5 to COUNT."""
    return [frame for frame in frames_of(raw) if frame.header.batches]


def state_of(path: Path) -> tuple[View, WatchCursor]:
    cursor, snap = AppendLogSnapshot.open(path)
    with snap:
        return view(snap), cursor


def salvaged(path: Path, raw: bytes) -> tuple[SalvageReport, View]:
    """Salvage a log of these bytes, left unchanged, into a valid log that matches the report."""
    output = path.with_name("saved.log")
    output.unlink(missing_ok=True)
    path.write_bytes(raw)
    before = sorted(file.name for file in path.parent.iterdir())
    report = salvage_log(path, output)
    assert path.read_bytes() == raw
    assert sorted(file.name for file in path.parent.iterdir() if file != output) == before
    verdict = verify_log(output)
    assert verdict.ok
    assert (verdict.seq, verdict.cursor, verdict.entries) == (
        report.seq,
        report.cursor,
        report.entries,
    )
    found, cursor = state_of(output)
    assert cursor == report.cursor
    return report, found


def replayed_from(path: Path) -> View:
    """The salvaged log, after upstream replayed what is behind its cursor."""
    cursor, snap = AppendLogSnapshot.open(path)
    with snap:
        for number in range((cursor.as_u64() or 0) + 1, COUNT + 1):
            snap.apply(batch(number), WatchCursor.from_u64(number))
        return view(snap)


def test_a_sound_log_is_salvaged_whole(path, raw):
    report, found = salvaged(path, raw)
    assert found == WHOLE
    assert (report.losses, report.seq, report.batches, report.cursor.as_u64()) == (
        (),
        COUNT,
        COUNT - 4,
        COUNT,
    )


@pytest.mark.parametrize("lost", range(5, COUNT + 1))
def test_a_batch_that_is_damaged_is_lost_alone_and_named(path, raw, lost):
    frame = batches_in(raw)[lost - 5]
    for at in (frame.start + 20, frame.start + 70):
        report, found = salvaged(path, raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        assert found == fold_of([number for number in range(1, COUNT + 1) if number != lost])
        (loss,) = report.losses
        assert (loss.offset, loss.size) == (frame.start, frame.end - frame.start)
        assert loss.first_seq == lost
        assert loss.last_seq in ((lost, None) if lost == COUNT else (lost,))
        assert loss.after_cursor == WatchCursor.from_u64(lost - 1)
        assert loss.before_cursor == (None if lost == COUNT else WatchCursor.from_u64(lost + 1))
        assert report.cursor == WatchCursor.from_u64(lost - 1)
        assert report.last_cursor == WatchCursor.from_u64(COUNT if lost < COUNT else COUNT - 1)
        assert replayed_from(report.output) == WHOLE


def test_wherever_a_sector_is_lost_a_replay_from_the_cursor_makes_it_whole(path, raw):
    told = 0
    for at in range(0, len(raw), 211):
        hole = b"\xee" * min(300, len(raw) - at)
        report, _ = salvaged(path, raw[:at] + hole + raw[at + 300 :])
        assert report.losses
        told += len(report.losses)
        kept = set(range(5, COUNT + 1)) - {
            n
            for loss in report.losses
            if loss.first_seq
            for n in range(loss.first_seq, (loss.last_seq or COUNT) + 1)
        }
        assert report.batches == len(kept)
        assert replayed_from(report.output) == WHOLE, f"hole at byte {at}"
    assert told >= len(raw) // 211


def test_one_bit_loses_one_frame_at_most(path, raw):
    for bit, damaged in sampled_flips(raw, 150, seed=11):
        report, _ = salvaged(path, damaged)
        assert len(report.losses) == 1, bit
        assert report.losses[0].offset <= bit // 8 < report.losses[0].offset + report.losses[0].size
        assert report.batches >= COUNT - 4 - 1


def test_a_file_header_that_is_gone_loses_nothing(path, raw):
    for header in (
        bytes(FILE_HEADER.size),
        b"\xff" * FILE_HEADER.size,
        raw[:30] + b"\x00\x01" + raw[32 : FILE_HEADER.size],
    ):
        report, found = salvaged(path, header + raw[FILE_HEADER.size :])
        assert found == WHOLE
        assert (report.cursor.as_u64(), report.seq) == (COUNT, COUNT)
        assert "no data lost" in report.losses[0].reason


def compacted(path: Path, puts: list[Put]) -> bytes:
    engine = Engine(path)
    commit_all(engine, [puts])
    engine.compact()
    engine.close()
    return path.read_bytes()


def test_of_a_damaged_leaf_only_the_damaged_value_is_lost(path):
    raw = compacted(path, [Put(f"k{n:03}", b"value %03d" % n) for n in range(400)])
    at = raw.index(b"value 217")
    report, found = salvaged(path, raw[:at] + b"X" + raw[at + 1 :])
    assert set(found) == {f"k{n:03}" for n in range(400)} - {"k217"}
    (loss,) = report.losses
    assert (loss.entries, loss.keys) == (1, ("k217",))
    assert report.cursor.is_none  # nothing in the log tells what it was
    assert report.last_cursor.as_u64() == 1


def test_a_leaf_whose_index_is_damaged_is_counted(path):
    raw = compacted(path, [Put(f"k{n:04}", b"v" * 20) for n in range(2000)])
    leaves = [frame for frame in frames_of(raw) if frame.header.kind == KIND_LEAF]
    at = leaves[2].start + FRAME_HEADER.size + 30
    report, found = salvaged(path, raw[:at] + b"\x00" + raw[at + 1 :])
    (loss,) = report.losses
    assert loss.entries == 2000 - len(found) > 100
    assert report.leaves == len(leaves) - 1


def test_frames_that_change_places_are_put_in_order(path, raw):
    frames = batches_in(raw)
    first, second = frames[2], frames[3]
    swapped = raw[: first.start] + second.raw + first.raw + raw[second.end :]
    report, found = salvaged(path, swapped)
    assert found == WHOLE
    assert (report.batches, report.cursor.as_u64()) == (COUNT - 4, COUNT)


def test_a_frame_that_is_there_twice_is_folded_once(path, raw):
    frame = batches_in(raw)[2]
    report, found = salvaged(path, raw + frame.raw)
    assert found == WHOLE
    assert report.batches == COUNT - 4


def test_a_frame_that_is_missing_is_told(path, raw):
    frame = batches_in(raw)[2]
    report, found = salvaged(path, raw[: frame.start] + raw[frame.end :])
    assert found == fold_of(
        [number for number in range(1, COUNT + 1) if number != frame.header.seq]
    )
    (loss,) = report.losses
    assert (loss.offset, loss.size, loss.first_seq, loss.last_seq) == (
        frame.start,
        0,
        frame.header.seq,
        frame.header.seq,
    )


def test_without_the_end_of_the_base_its_entries_are_kept_and_the_cursor_is_not_trusted(path, raw):
    end = next(frame for frame in frames_of(raw) if frame.header.kind == KIND_BASE_END)
    report, found = salvaged(path, raw[: end.start] + bytes(end.end - end.start) + raw[end.end :])
    assert found == WHOLE
    assert report.cursor.is_none
    assert replayed_from(report.output) == found


def test_the_cursor_of_the_last_batch_can_be_asked_for(path, raw):
    frame = batches_in(raw)[2]
    path.write_bytes(raw[: frame.start + 60] + b"\0\0\0" + raw[frame.start + 63 :])
    report = salvage_log(path, path.with_name("saved.log"), cursor="last")
    assert report.cursor == report.last_cursor == WatchCursor.from_u64(COUNT)
    with pytest.raises(ValueError, match="cursor"):
        salvage_log(path, path.with_name("other.log"), cursor="best")  # type: ignore[arg-type]


def test_a_splice_of_two_logs_gives_only_what_the_first_one_held(path, tmp_path, raw):
    other = tmp_path / "other"
    other.mkdir()
    foreign = write_log(other / "b.log", [[Put(f"foreign{n}", b"x" * 50)] for n in range(20)])
    for left, right, image in splices(raw, foreign, 40, seed=2):
        if left < FILE_HEADER.size:
            continue
        report, found = salvaged(path, image)
        assert not any(key.startswith("foreign") for key in found), (left, right)
        assert report.seq <= COUNT


def test_the_output_is_never_overwritten_and_the_input_never_the_output(path, raw):
    with pytest.raises(FileExistsError):
        salvage_log(path, path)
    assert path.read_bytes() == raw
    path.write_bytes(b"no log at all" * 100)
    with pytest.raises(InvalidFormatError):
        salvage_log(path, path.with_name("saved.log"))
    assert not path.with_name("saved.log").exists()


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
def test_a_salvage_that_fails_at_any_call_leaves_nothing_half_done(path, raw, error):
    output = path.with_name("saved.log")
    path.write_bytes(raw[:900] + b"\0" * 40 + raw[940:])
    before = descriptors()
    for nth in range(1, 200):
        files = FaultyFiles(Fault(nth=nth, error=error))
        with contextlib.suppress(OSError):
            salvage_log(path, output, files=files)
        assert descriptors() == before
        if output.exists():
            assert verify_log(output).ok
            output.unlink()
        leftover = [file for file in path.parent.iterdir() if ".tmp" in file.name]
        assert not leftover or "unlink" in {call.operation for call in files.fired}
        for file in leftover:
            file.unlink()
        if not files.fired:
            break
    assert not files.fired
    assert nth > 10
