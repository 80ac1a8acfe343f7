"""The tail of a log, polled by hand: what it makes of every state of the file. No threads."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from forged import with_the_checksum_of
from interrupts import At, Struck, points, strike
from logfiles import damage

import foldlog
from foldlog import (
    AppendLogSnapshot,
    CorruptLogError,
    Delete,
    InvalidFormatError,
    LogChangedError,
    Put,
    WatchCursor,
)
from foldlog.protocol.frames import KIND_BASE_END, KIND_BATCHES, KIND_LEAF, KIND_OPEN
from foldlog.protocol.updates import batches_body, encode_batch
from foldlog.storage.engines.append_log.engine import LogEngine as Engine
from foldlog.storage.fold.snapshot import FoldSnapshot
from foldlog.storage.formats.foldlog.codec import open_body
from foldlog.storage.log import tail as tail_module
from foldlog.storage.log.files import OS_FILES, Files
from foldlog.storage.log.sidecars.lock import note_path
from foldlog.storage.log.tail import STALLED_POLLS, Advance, Jump, Tail
from foldlog.testing import Fault, FaultyFiles


def cursor(number: int) -> WatchCursor:
    return WatchCursor.from_u64(number)


def batch(number: int) -> list[Put]:
    return [Put(f"batch/{number}", b"%d" % number), Put("last", b"%d" % number)]


class Followed:
    """A tail, and what it has told. It checks each step as a subscriber would rely on it."""

    def __init__(self, path: Path, files: Files = OS_FILES) -> None:
        self.tail = Tail(files, path)
        self.steps: list[Advance | Jump] = []

    @property
    def fold(self) -> FoldSnapshot:
        return self.tail.fold

    def poll(self) -> list[Advance | Jump]:
        """Poll until nothing more happens. Returns the steps."""
        steps = []
        before = self.tail.fold
        while step := self.tail.poll():
            if isinstance(step, Advance):
                assert step.first_seq == before.seq + 1, "none twice, and none missing"
                assert step.fold.seq == before.seq + len(step.batches)
            else:
                assert step.rewound or step.fold.seq > before.seq or before.seq == 0
            before = step.fold
            assert self.tail.fold is step.fold
            steps.append(step)
            assert len(steps) < 1000, "it comes to an end"
        self.steps += steps
        return steps

    def polls(self, times: int) -> list[Advance | Jump]:
        return [step for _ in range(times) for step in self.poll()]

    def catch_up_with(self, snap: AppendLogSnapshot) -> None:
        self.poll()
        assert_same(self.fold, snap)

    @property
    def told(self) -> list[int]:
        """The cursors of all batches that were told, one by one."""
        return [
            b.cursor.as_u64() or 0
            for step in self.steps
            if isinstance(step, Advance)
            for b in step.batches
        ]

    @property
    def rewinds(self) -> list[str]:
        return [step.rewound for step in self.steps if isinstance(step, Jump) and step.rewound]


def following(path: Path, files: Files = OS_FILES) -> Followed:
    """A tail that has read the log to its end."""
    followed = Followed(path, files)
    followed.poll()
    return followed


@pytest.fixture
def snap(path: Path) -> Iterator[AppendLogSnapshot]:
    snap = AppendLogSnapshot.open(path)[1]
    yield snap
    snap.close()


def apply(snap: AppendLogSnapshot, *numbers: int) -> None:
    for number in numbers:
        snap.apply(batch(number), cursor(number))


def assert_same(fold: FoldSnapshot, snap: AppendLogSnapshot) -> None:
    assert fold.range() == snap.range("")
    assert (fold.cursor(), fold.seq) == (snap.cursor(), snap.snapshot().seq)


class ReadAfterEachWrite(Files):
    """A follower reads what was written before its writer gets to know that it was."""

    followed: Followed | None = None

    def write(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        done = super().write(fd, data, offset)
        if self.followed is not None:
            profile = sys.getprofile()
            sys.setprofile(None)  # what strikes the writer does not strike its follower
            self.followed.poll()
            sys.setprofile(profile)
        return done


# What strikes within a finalizer is reported by CPython, and swallowed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_batch_that_was_read_is_not_taken_back_when_an_exception_strikes_its_writer(path: Path):
    """A Ctrl-C between the write and the next bytecode cut a complete frame off. In one of seven
    storms of signals a follower had read it, told of it, and called the log rewound."""
    files = ReadAfterEachWrite()
    _, snap = AppendLogSnapshot.open(path, files=files)
    files.followed = followed = Followed(path)
    followed.poll()
    for number in points():
        at = At(number, strike)
        with contextlib.suppress(Struck):
            at.run(lambda number=number: snap.apply(batch(2 * number), cursor(2 * number)))
        apply(snap, 2 * number + 1)
        followed.poll()
        assert followed.rewinds == [], f"struck at point {number}"
        assert_same(followed.fold, snap)
        if not at.fired:
            break
    assert number > 30
    snap.close()


class StruckTwice(ReadAfterEachWrite):
    """Once armed: an exception after the write, and another one while that is handled."""

    armed = False
    struck = 0

    def write(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        done = super().write(fd, data, offset)
        if self.armed:
            self.struck += 1
            raise Struck
        return done

    def fstat(self, fd: int) -> os.stat_result:
        if self.armed and self.struck:
            self.armed = False
            self.struck += 1
            raise Struck
        return super().fstat(fd)


@pytest.mark.parametrize("then", ["apply", "compact", "close"])
def test_a_batch_that_was_read_is_not_taken_back_though_a_second_exception_strikes(
    path: Path, then: str
):
    """After two strikes within one write, the next call cut a complete frame off unseen."""
    files = StruckTwice()
    _, snap = AppendLogSnapshot.open(path, files=files)
    apply(snap, 1)
    files.followed = followed = Followed(path)
    followed.poll()
    files.armed = True
    with pytest.raises(Struck):
        apply(snap, 2)
    assert files.struck == 2
    assert followed.fold.seq == 2
    if then == "compact":
        snap.compact()
    elif then == "close":
        snap.close()
        _, snap = AppendLogSnapshot.open(path, files=files)
    apply(snap, 3)
    followed.poll()
    assert followed.rewinds == []
    assert snap.snapshot().seq == 3
    assert_same(followed.fold, snap)
    snap.close()


# Growing: half frames.


def test_a_log_that_grows_byte_by_byte_is_told_batch_by_batch_and_never_torn(path, tmp_path):
    """Scenario 82: half a frame is waited for; nothing is repaired, nothing is told early."""
    source = tmp_path / "source.log"
    with AppendLogSnapshot.open(source)[1] as snap:
        ends = {}
        start = source.stat().st_size
        for number in (1, 2, 3):
            apply(snap, number)
            ends[source.stat().st_size] = number
    data = source.read_bytes()
    path.write_bytes(data[:start])
    followed = Followed(path)
    assert [type(step) for step in followed.poll()] == [Jump]
    last = 0
    with path.open("ab", buffering=0) as file:
        for at in range(start, len(data)):
            file.write(data[at : at + 1])
            followed.poll()
            last = ends.get(at + 1, last)
            assert followed.fold.seq == last
            assert not followed.rewinds
    assert followed.told == [1, 2, 3]
    assert path.read_bytes() == data


def test_half_a_frame_that_stays_is_waited_for_without_end_and_without_reading_the_file_over_and_over(
    path, tmp_path
):
    """A killed writer leaves half a frame, perhaps for days: until the next writer cuts it."""
    with AppendLogSnapshot.open(path)[1] as snap:
        apply(snap, 1, 2)
        whole = path.stat().st_size
        apply(snap, 3)
        torn = path.read_bytes()[: whole + 60]
    path.write_bytes(torn)
    note_path(path).unlink()  # which remembers batch 3
    followed = following(path, files := FaultyFiles())
    assert followed.fold.cursor() == cursor(2)
    assert followed.polls(500) == []
    assert files.counts["open_read"] <= 1 + 8, (
        "each look that finds nothing new doubles the time to the next"
    )
    with AppendLogSnapshot.open(path)[1] as snap:
        apply(snap, 4)
        assert [type(step) for step in followed.poll()] == [Advance]
        assert_same(followed.fold, snap)
    assert followed.told == [4]


def test_a_whole_frame_that_is_wrong_is_retried_and_becomes_an_error_when_it_stays(path, snap):
    """Scenario 83, and what follows it: the state before the damage is kept, and served."""
    apply(snap, 1)
    followed = following(path)
    end = path.stat().st_size
    apply(snap, 2)
    damage(path, end + 80)
    assert followed.polls(STALLED_POLLS - 1) == []
    with pytest.raises(CorruptLogError, match=str(end)):
        followed.polls(1)
    with pytest.raises(CorruptLogError):
        followed.polls(50)
    assert followed.fold.cursor() == cursor(1)
    damage(
        path, end + 80
    )  # and back: as a disk that is replaced, or a page cache that is read again
    assert [type(step) for step in followed.poll()] == [Advance]
    assert_same(followed.fold, snap)
    assert followed.told == [2]


def test_batches_before_a_damaged_frame_are_told_though_it_stands_in_the_way_of_the_next(
    path, snap
):
    """Found in review: an error of the same poll threw away what had been read before it."""
    apply(snap, 1)
    followed = following(path)
    apply(snap, 2, 3)
    end = path.stat().st_size
    apply(snap, 4)
    damage(path, end + 80)
    followed.poll()
    assert followed.told == [2, 3]
    assert followed.fold.cursor() == cursor(3)


def test_a_frame_whose_body_does_not_decode_is_refused_at_once(path, snap):
    """Its checksums are right, so that no writer is halfway through it."""
    apply(snap, 1)
    followed = following(path)
    place = followed.tail._place
    assert place is not None
    frame, _ = place.chain.next_frame(place.header.seed, KIND_BATCHES, b"junk", 0, 0, batches=1)
    with path.open("ab") as file:
        file.write(frame)
    with pytest.raises(CorruptLogError):
        followed.poll()
    assert followed.fold.cursor() == cursor(1)
    os.truncate(path, place.chain.offset)


def test_much_to_catch_up_with_is_taken_in_steps_of_bounded_size(path, snap, monkeypatch):
    monkeypatch.setattr(tail_module, "STEP_BYTES", 10_000)
    followed = following(path)
    for number in range(1, 201):
        snap.apply([Put("k", b"x" * 500)], cursor(number))
    assert isinstance(followed.tail.poll(), Advance)
    assert followed.tail.behind
    assert followed.fold.seq < 30
    followed.poll()
    assert followed.fold.seq == 200
    assert not followed.tail.behind
    assert all(step.size < 12_000 for step in followed.steps if isinstance(step, Advance))


def test_batches_that_are_not_kept_lead_to_the_same_state_and_can_be_read_again(path, snap):
    followed, kept = Followed(path), Followed(path)
    followed.tail.poll()
    kept.poll()
    followed.tail.keeps_batches = False
    apply(snap, 1, 2)
    snap.apply([Delete("last"), Put("big", b"x" * 5000)], cursor(3))
    snap.apply([Put(f"many/{number}", b"") for number in range(9000)], cursor(4))
    apply(snap, 5)
    step = followed.tail.poll()
    assert isinstance(step, Advance)
    assert (step.first_seq, step.length, step.batches) == (1, 5, None)
    assert_same(step.fold, snap)
    (again,) = kept.poll()
    assert followed.tail.batches_again() == again.batches
    assert followed.tail.poll() is None
    assert followed.tail.batches_again() == [], "only until the next poll"


def test_batches_that_cannot_be_read_again_are_an_error(path, snap):
    followed = following(path)
    start = path.stat().st_size
    followed.tail.keeps_batches = False
    apply(snap, 1, 2)
    followed.tail.poll()
    damage(path, start + 200)
    with pytest.raises(LogChangedError):
        followed.tail.batches_again()
    damage(path, start + 200)
    os.truncate(path, start)
    with pytest.raises(LogChangedError):
        followed.tail.batches_again()


# Compaction.


def test_a_compaction_between_two_polls_loses_and_repeats_nothing(path, snap):
    """Scenario 84."""
    followed = following(path)
    apply(snap, 1, 2)
    followed.poll()
    snap.compact()
    steps = followed.poll()
    assert [(type(step), step.batches) for step in steps] == [(Advance, [])], (
        "the same state, from the new file"
    )
    apply(snap, 3)
    followed.catch_up_with(snap)
    assert followed.told == [1, 2, 3]
    assert not followed.rewinds


def test_batches_written_to_the_old_file_just_before_the_rename_are_read_there(path, snap):
    """The old file is read to its end, though it has no name any more; only then is the new one."""
    apply(snap, 1)
    followed = following(path)
    apply(snap, 2, 3)
    snap.compact()
    apply(snap, 4)
    followed.catch_up_with(snap)
    assert followed.told == [2, 3, 4]
    assert not followed.rewinds


def test_what_is_appended_between_reading_and_the_rename_is_read_in_the_old_file(path, snap):
    """Found in review: read to the end, then seen renamed; the new base held batches in between."""
    apply(snap, 1)

    class Late(Files):
        def stat(self, name: str | Path) -> os.stat_result:
            if not done:
                done.append(True)
                apply(snap, 2, 3)
                snap.compact()
            return super().stat(name)

    done = [True]
    followed = following(path, Late())
    done.clear()
    followed.poll()
    assert followed.told == [2, 3]
    assert_same(followed.fold, snap)


def test_frames_carried_over_by_a_compaction_beside_the_writer_join_on(path):
    """The new file has a base that is older than what was read, and the batches behind it again."""
    engine = Engine(path)
    followed = following(path)

    def commit(number: int) -> None:
        engine.commit([encode_batch(batch(number), cursor(number))])

    commit(1)
    followed.poll()
    rewrite = engine.begin_compaction()
    rewrite.write()
    commit(2)
    followed.poll()
    commit(3)
    engine.finish_compaction(rewrite)
    commit(4)
    followed.poll()
    assert followed.told == [1, 2, 3, 4]
    assert not followed.rewinds
    assert followed.fold.range() == engine.fold.range()
    engine.close()


def test_a_follower_behind_several_compactions_takes_the_state_as_it_stands_deletes_too(path, snap):
    """Scenario 85."""
    apply(snap, 1)
    followed = following(path)
    snap.compact()
    snap.apply([Delete("batch/1")], cursor(2))
    snap.compact()
    apply(snap, 3)
    snap.compact()
    apply(snap, 4)
    steps = followed.poll()
    assert [type(step) for step in steps] == [Jump]
    assert not followed.rewinds
    assert followed.fold.get("batch/1") is None
    assert_same(followed.fold, snap)


def test_a_new_file_with_too_many_batches_to_tell_is_a_jump(path, snap, monkeypatch):
    monkeypatch.setattr(tail_module, "NEWS_BYTES", 500)
    apply(snap, 1)
    followed = following(path)
    snap.compact()
    apply(snap, *range(2, 30))
    assert [type(step) for step in followed.poll()] == [Jump]
    assert not followed.rewinds
    assert_same(followed.fold, snap)


def test_a_writer_that_restarts_is_followed_on(path):
    followed = Followed(path)
    assert followed.poll() == []
    for number in range(1, 6):
        with AppendLogSnapshot.open(path)[1] as snap:
            followed.poll()
            apply(snap, number)
    followed.poll()
    assert followed.told == [1, 2, 3, 4, 5]
    assert not followed.rewinds


# No log, another log, an older log.


def test_a_log_that_does_not_exist_yet_is_waited_for_and_not_made(path):
    """Scenario 91."""
    followed = Followed(path)
    assert followed.polls(3) == []
    assert followed.tail.missing
    assert not followed.tail.started
    assert list(path.parent.iterdir()) == []
    with AppendLogSnapshot.open(path)[1] as snap:
        apply(snap, 1)
        followed.catch_up_with(snap)
    assert not followed.tail.missing
    elsewhere = Followed(path.parent / "no" / "such" / "folder.log")
    assert elsewhere.polls(3) == []


def test_a_log_is_followed_without_the_right_to_write_and_nothing_is_made_beside_it(path, snap):
    """Scenario 91, by the calls: no more than reading crosses the seam."""

    class ReadOnly(Files):
        def __getattribute__(self, name: str) -> object:
            assert name in {
                "open_read",
                "_regular",
                "read",
                "read_into",
                "stat",
                "fstat",
                "close",
            }, name
            return super().__getattribute__(name)

    apply(snap, 1)
    followed = following(path, ReadOnly())
    apply(snap, 2)
    snap.compact()
    followed.catch_up_with(snap)


def test_a_deleted_log_is_missing_and_what_was_read_stays(path, snap):
    apply(snap, 1)
    followed = following(path)
    path.unlink()
    assert followed.polls(3) == []
    assert followed.tail.missing
    assert followed.fold.range("last") == [foldlog.KvEntry("last", b"1")]


def test_a_log_that_was_deleted_and_written_anew_from_memory_goes_on(path):
    """What the writer does about a deleted log: same log id, same state, a new file."""
    with foldlog.open(path) as store:
        store.apply(batch(1), cursor(1))
        followed = following(path)
        path.unlink()
        store.apply(batch(2), cursor(2))
        followed.poll()
        assert followed.fold.range() == store.range()
    assert followed.told == [2]
    assert not followed.rewinds


def test_a_log_that_was_deleted_and_made_anew_is_told_apart_by_its_id_and_not_by_its_inode(path):
    """Scenario 88: the file system may reuse the inode at once if the old file is not held."""
    with AppendLogSnapshot.open(path)[1] as snap:
        apply(snap, 1, 2, 3)
    followed = following(path)
    path.unlink()
    with AppendLogSnapshot.open(path)[1] as snap:
        apply(snap, 1)
        followed.poll()
        assert followed.rewinds == ["the log was replaced by another"]
        assert_same(followed.fold, snap)
        apply(snap, 2)
        followed.catch_up_with(snap)


def test_another_log_written_over_the_file_itself_is_found(path, tmp_path):
    """`cp other.log state.log` keeps the inode, and the size may be the same or larger."""
    with AppendLogSnapshot.open(path)[1] as snap:
        apply(snap, 1, 2)
    followed = following(path)
    with AppendLogSnapshot.open(tmp_path / "other.log")[1] as other:
        apply(other, *range(100, 140))
        data = (tmp_path / "other.log").read_bytes()
        path.write_bytes(data)
        followed.polls(STALLED_POLLS + 1)
        assert followed.rewinds == ["the log was replaced by another"]
        assert_same(followed.fold, other)


def test_a_log_that_was_cut_is_a_rewind(path, snap):
    """Scenario 87, and 55: what is read by `pread` cannot kill the reader."""
    apply(snap, 1, 2)
    size = path.stat().st_size
    apply(snap, 3)
    followed = following(path)
    os.truncate(path, size)
    followed.poll()
    assert len(followed.rewinds) == 1
    assert "cut" in followed.rewinds[0]
    assert followed.fold.cursor() == cursor(2)


def test_a_log_that_was_cut_and_grew_past_its_old_end_between_two_polls_is_found(path, tmp_path):
    """Found in review: the old end was inside a new frame, which looked like half a frame for ever.

    Scenario 86: frames that a power loss took, and others in their place.
    """
    with AppendLogSnapshot.open(path)[1] as snap:
        apply(snap, 1, 2)
        before = path.read_bytes()
        apply(snap, 3)
        followed = following(path)
        assert followed.fold.cursor() == cursor(3)
    path.write_bytes(before)
    note_path(path).unlink()
    with AppendLogSnapshot.open(path)[1] as snap:
        snap.apply([Put("long", b"x" * 5000)], cursor(30))
        apply(snap, 31)
        followed.polls(STALLED_POLLS + 1)
        assert len(followed.rewinds) == 1
        assert_same(followed.fold, snap)
        apply(snap, 32)
        followed.catch_up_with(snap)


def test_other_frames_of_the_same_size_in_place_of_those_read_are_found_by_the_chain(path):
    """Scenario 86: a frame at the right offset and sequence that does not follow what was read."""
    with AppendLogSnapshot.open(path)[1] as snap:
        apply(snap, 1)
        before = path.read_bytes()
        apply(snap, 2)
        followed = following(path)
    path.write_bytes(before)
    note_path(path).unlink()  # which remembers batch 2
    place = following(path).tail._place
    assert place is not None
    item = encode_batch([Put("batch/9", b"9"), Put("last", b"9")], cursor(9)).item
    frames, chain = b"", place.chain
    for kind, body, batches in (
        (KIND_BATCHES, batches_body([item]), 1),
        (KIND_OPEN, open_body(), 0),
    ):
        frame, chain = chain.next_frame(place.header.seed, kind, body, 0, 0, batches)
        frames += frame
    path.write_bytes(before + frames)
    followed.polls(STALLED_POLLS + 1)
    assert len(followed.rewinds) == 1
    assert followed.fold.cursor() == cursor(9)


@pytest.mark.parametrize(
    ("kind", "body"), [(KIND_LEAF, b""), (KIND_BASE_END, b"\x80"), (KIND_OPEN, b"\x90")]
)
def test_a_frame_that_opening_refuses_is_refused_when_it_is_appended_too(path, kind, body):
    """The follower read over it, until it was started again."""
    with AppendLogSnapshot.open(path)[1] as snap:
        apply(snap, 1)
        followed = following(path)
        place = followed.tail._place
        assert place is not None
        forged, _ = place.chain.next_frame(place.header.seed, kind, body, 0, 0)
        snap._engine.log.abandon()
    with open(path, "ab") as file:
        file.write(forged)
    with pytest.raises(CorruptLogError):
        followed.polls(STALLED_POLLS)
    with pytest.raises(CorruptLogError):
        following(path)


def in_place_of(path: Path, raw: bytes) -> None:
    """Put another file with these bytes under the log's name."""
    copy = path.with_name("copy")
    copy.write_bytes(raw)
    os.replace(copy, path)


def test_a_copy_with_another_value_of_the_same_checksum_is_a_rewind(path):
    """Its chain of checksums was that of the file before it: no subscriber was told, and each kept
    the old value for ever."""
    old = b"role=viewer;    sig=0000"
    new = with_the_checksum_of(b"role=admin ;    sig=????", old)
    with AppendLogSnapshot.open(path)[1] as snap:
        snap.apply([Put("user/7", old)], cursor(1))
        apply(snap, 2)
        followed = following(path)
        raw = path.read_bytes()
        in_place_of(path, raw)
        followed.poll()
        assert not followed.rewinds, "the same bytes"
        in_place_of(path, raw.replace(old, new))
        followed.poll()
        assert len(followed.rewinds) == 1
        assert followed.fold.get("user/7").value == new


def test_another_state_without_a_cursor_at_the_same_sequence_is_a_rewind(path):
    """Both states had the none-cursor, which says nothing: they were taken for one state."""
    nowhere = WatchCursor.none()
    snap = AppendLogSnapshot.open(path)[1]
    snap.apply([Put("a", b"1")], nowhere)
    before = path.read_bytes()
    snap.apply([Put("a", b"2")], nowhere)
    followed = following(path)
    snap._engine.log.abandon()
    path.with_name("other").mkdir()
    other = path.with_name("other") / "log"
    for value in (b"2", b"3"):
        other.write_bytes(before)
        note_path(other).unlink(missing_ok=True)
        with AppendLogSnapshot.open(other)[1] as snap:
            snap.apply([Put("a", value)], nowhere)
            snap.compact()
        in_place_of(path, other.read_bytes())
        followed.poll()
        assert len(followed.rewinds) == (value != b"2")
        assert followed.fold.get("a").value == value


def test_a_batch_that_was_seen_and_then_denied_by_a_heal_is_a_rewind(path):
    """A failed fsync: the frame was followed in the old file; the new one reuses its sequence."""
    engine = Engine(path)
    engine.commit([encode_batch(batch(1), cursor(1))])
    followed = following(path)
    acknowledged = engine.fold
    engine.commit([encode_batch([Put("denied", b"")], cursor(2))])
    followed.poll()
    assert followed.fold.get("denied") is not None
    engine.fold = engine._next = acknowledged
    engine.log.poison_with("fsync failed")
    engine.compact()
    engine.commit([encode_batch([Put("other", b"")], cursor(3))])
    followed.poll()
    assert len(followed.rewinds) == 1
    assert followed.fold.range() == engine.fold.range()
    engine.close()


def test_a_log_cut_inside_its_base_is_refused_even_between_two_leaves(path):
    """Found in review: a base cut exactly behind a leaf read as a smaller state."""
    with AppendLogSnapshot.open(path)[1] as snap:
        snap.apply([Put(f"k{number:05}", b"v" * 20) for number in range(5000)], cursor(1))
        snap.compact()
        base = snap.snapshot().base
        ends = [base._offsets[number] + base._lengths[number] + 4 for number in range(len(base))]
    data = path.read_bytes()
    assert len(ends) > 3
    for end in (ends[0], ends[2], ends[-1], ends[2] + 30):
        path.write_bytes(data[:end])
        followed = Followed(path)
        with pytest.raises(CorruptLogError):
            followed.poll()
        assert len(followed.fold) == 0
        path.write_bytes(data)
        followed.poll()
        assert len(followed.fold) == 5000


def test_junk_that_took_the_name_is_refused_and_read_once(path, snap):
    apply(snap, 1)
    followed = following(path, files := FaultyFiles())
    shutil.copy(path, path.parent / "aside")
    (path.parent / "junk").write_bytes(b"no log")
    os.replace(path.parent / "junk", path)
    for _ in range(3):
        with pytest.raises(InvalidFormatError):
            followed.poll()
    assert followed.fold.cursor() == cursor(1)
    opens = files.counts["open_read"]
    os.replace(path.parent / "aside", path)
    followed.poll()
    assert followed.fold.cursor() == cursor(1)
    assert not followed.rewinds
    assert files.counts["open_read"] == opens + 1


def test_a_damaged_log_is_not_read_over_and_over(path):
    with AppendLogSnapshot.open(path)[1] as snap:
        apply(snap, 1, 2)
    damage(path, path.stat().st_size - 150)
    followed = Followed(path, files := FaultyFiles())
    with pytest.raises(CorruptLogError):
        followed.poll()
    reads = files.counts["read_into"]
    for _ in range(20):
        with pytest.raises(CorruptLogError):
            followed.poll()
    assert files.counts["read_into"] == reads


def test_an_error_of_the_disk_loses_nothing(path, snap):
    """Found in review: a step that was taken before the error of the same poll was never told."""
    files = FaultyFiles()
    apply(snap, 1)
    followed = following(path, files)
    files.arm(Fault("open_read", lasting=True))
    apply(snap, 2)
    snap.compact()
    apply(snap, 3)
    with pytest.raises(OSError, match="Input/output"):
        followed.poll()
    assert followed.fold.cursor() == cursor(2), "the old file was open already, and read to its end"
    files.disarm()
    followed.catch_up_with(snap)
    assert not followed.rewinds
