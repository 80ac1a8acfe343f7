"""`foldlog.testing`: doubles that fail on demand, count calls, and leave what a power loss may."""

from __future__ import annotations

import errno
import itertools
import re
from pathlib import Path

import pytest
from actor_kit import DEADLINE_S, in_thread, results
from faultkit import batch, fold_of, view

import foldlog
from foldlog import AppendLogSnapshot, Put, WatchCursor
from foldlog.storage.log.files import OS_FILES, Files
from foldlog.testing import (
    OPERATIONS,
    STEPS,
    Call,
    CrashFiles,
    Fault,
    FaultyFiles,
    UnsyncedFiles,
    crash_at,
    flips,
    sampled_flips,
    splices,
    truncations,
)

ROOT = Path(__file__).resolve().parents[2]
CANNOT_FAIL = {"exists"}


def test_the_steps_are_those_that_the_actors_pass() -> None:
    passed = set()
    for file in (ROOT / "actors").rglob("*.py"):
        passed |= set(re.findall(r'_?step\("([a-z_.]+)"\)', file.read_text(encoding="utf-8")))
    assert passed == set(STEPS)


def test_every_call_of_the_seam_can_fail_or_cannot_fail_at_all() -> None:
    public = {
        name
        for name, member in vars(Files).items()
        if callable(member) and not name.startswith("_")
    }
    assert public == {*OPERATIONS, *CANNOT_FAIL}


def test_a_fault_hits_the_nth_call_and_only_that_unless_it_lasts(path: Path) -> None:
    for lasting in (False, True):
        files = FaultyFiles(Fault("stat", nth=2, error=errno.EIO, lasting=lasting))
        files.stat(path.parent)
        with pytest.raises(OSError, match="Input/output"):
            files.stat(path.parent)
        if lasting:
            with pytest.raises(OSError, match="Input/output"):
                files.stat(path.parent)
        else:
            files.stat(path.parent)
        assert [call.nth for call in files.fired] == ([2, 3] if lasting else [2])
        assert (files.counts["stat"], files.total) == (3, 3)


def test_a_fault_without_an_operation_counts_all_calls(path: Path) -> None:
    files = FaultyFiles(Fault(nth=3))
    fd = files.create(path)
    files.write(fd, b"abc", 0)
    with pytest.raises(OSError, match="Input/output"):
        files.sync(fd)
    files.close(fd)
    assert files.fired[0].operation == "sync"


def test_a_finalizer_that_closes_a_file_within_a_call_does_not_wait_for_that_call(
    path: Path,
) -> None:
    """Garbage was collected while a call was counted; closing a file in it waited for ever."""
    files = FaultyFiles()
    fd, other = files.create(path), files.create(path.with_name("other"))

    class Collected:
        operation = None

        def hits(self, call: Call) -> bool:
            if call.operation == "write":
                files.close(other)
            return False

    files.faults = (Collected(),)  # type: ignore[assignment]
    writing = in_thread(files.write, fd, b"1", 0)
    assert writing.result(DEADLINE_S) == 1
    assert files.counts["close"] == 1
    files.close(fd)


def test_arming_starts_the_count_anew_and_disarming_ends_it(path: Path) -> None:
    files = FaultyFiles()
    files.stat(path.parent)
    files.arm(Fault("stat"))
    with pytest.raises(OSError, match="Input/output"):
        files.stat(path.parent)
    files.disarm()
    files.stat(path.parent)


def test_a_failing_write_takes_what_it_is_told_to_and_a_short_one_tells_no_error(
    path: Path,
) -> None:
    files = FaultyFiles(
        Fault("write", 1, errno.ENOSPC, takes=2), Fault("write", 2, error=0, takes=3)
    )
    fd = files.create(path)
    with pytest.raises(OSError, match="No space"):
        files.write(fd, b"abcdef", 0)
    assert path.read_bytes() == b"ab"
    assert files.write(fd, b"ABCDEF", 0) == 3
    assert path.read_bytes() == b"ABC"
    files.close(fd)


def test_a_failing_close_closes(path: Path) -> None:
    files = FaultyFiles(Fault("close"))
    fd = files.create(path)
    with pytest.raises(OSError, match="Input/output"):
        files.close(fd)
    with pytest.raises(OSError, match="Bad file"):
        OS_FILES.fstat(fd)


def test_a_hook_is_told_every_call_before_it_is_made(path: Path) -> None:
    told = []
    files = FaultyFiles(hook=lambda call: told.append((call.operation, call.nth, path.exists())))
    files.close(files.create(path))
    files.close(files.open_read(path))
    assert told == [
        ("create", 1, False),
        ("close", 1, True),
        ("open_read", 1, True),
        ("close", 2, True),
    ]


def test_a_double_that_is_told_nonsense_says_so() -> None:
    with pytest.raises(ValueError, match="OPERATIONS"):
        FaultyFiles(Fault("fsync"))
    with pytest.raises(ValueError, match="not a step"):
        crash_at("writer.lunch")
    with pytest.raises(ValueError, match="at least 1"):
        crash_at("writer.start", nth=0)


def test_the_loop_of_the_manual_ends_and_misses_no_call(tmp_path: Path) -> None:
    fired = []
    for nth in itertools.count(1):
        files = FaultyFiles(Fault(nth=nth), inner=UnsyncedFiles())
        try:
            with AppendLogSnapshot.open(tmp_path / f"{nth}.log", files=files)[1] as snap:
                snap.apply([Put("a", b"1")], WatchCursor.from_u64(1))
        except (OSError, foldlog.FoldlogError):
            pass
        if not files.fired:
            break
        fired.append(files.fired[0].total)
    assert fired == list(range(1, nth))
    assert nth > 20


def test_crash_at_kills_the_actor_where_it_is_told_to(path: Path) -> None:
    step = crash_at("writer.after_write", nth=2)
    with foldlog.open(path, sync="never", step=step) as store:
        for number in (1, 2, 3):
            assert store.apply(batch(number), WatchCursor.from_u64(number)) == number
        assert step.fired.is_set()
        assert step.seen == 3
        assert [restart.actor for restart in store.stats().restarts] == ["writer"]
        assert view(store) == fold_of([1, 2, 3])


def test_crash_at_can_go_on_crashing() -> None:
    step = crash_at("writer.start", nth=2, error=KeyError, lasting=True)
    step("writer.start")
    step("reader.start")
    for _ in range(2):
        with pytest.raises(KeyError):
            step("writer.start")
    assert step.seen == 3


# CrashFiles.


@pytest.fixture
def crash(tmp_path: Path) -> CrashFiles:
    root = tmp_path / "root"
    root.mkdir()
    root.joinpath("old").write_bytes(b"o" * 600)
    return CrashFiles(root, UnsyncedFiles())


def contents(crash: CrashFiles, name: str) -> set[bytes | None]:
    return {image.files.get(name) for image in crash.images(4096)}


def test_what_stood_there_and_what_was_synced_stays(crash: CrashFiles) -> None:
    assert [image.files for image in crash.images()] == [{"old": b"o" * 600}]
    fd = crash.open_write(crash.root / "old")
    crash.write(fd, b"N", 0)
    crash.sync(fd)
    crash.close(fd)
    assert contents(crash, "old") == {b"N" + b"o" * 599}


def test_each_sector_of_an_unsynced_write_may_be_lost_alone(crash: CrashFiles) -> None:
    fd = crash.open_write(crash.root / "old")
    crash.write(fd, b"x" * 1224, 600)
    found = contents(crash, "old")
    crash.close(fd)
    whole = b"o" * 600 + b"x" * 1224
    assert whole in found
    assert b"o" * 600 in found
    assert whole[:1024] in found
    assert whole[:1024] + bytes(512) + whole[1536:] in found
    assert b"o" * 600 + bytes(424) + whole[1024:] in found
    assert all(image is not None and image[:600] == b"o" * 600 for image in found)


def test_a_cut_that_was_not_synced_may_come_back_mixed_with_what_was_written_over_it(
    crash: CrashFiles,
) -> None:
    fd = crash.open_write(crash.root / "old")
    crash.write(fd, b"a" * 1000, 600)
    crash.truncate(fd, 600)
    crash.write(fd, b"b" * 1000, 600)
    mixed = b"o" * 600 + b"b" * 424 + b"a" * 512 + b"b" * 64
    assert mixed in contents(crash, "old")
    crash.sync(fd)
    assert contents(crash, "old") == {b"o" * 600 + b"b" * 1000}
    crash.close(fd)


def test_a_new_name_may_be_missing_until_the_folder_is_synced(crash: CrashFiles) -> None:
    fd = crash.create(crash.root / "new")
    crash.write(fd, b"n", 0)
    crash.sync(fd)
    crash.close(fd)
    assert contents(crash, "new") == {None, b"n"}
    crash.sync_dir(crash.root)
    assert contents(crash, "new") == {b"n"}


def test_a_rename_and_a_removal_may_be_undone_until_the_folder_is_synced(crash: CrashFiles) -> None:
    fd = crash.create(crash.root / "new")
    crash.write(fd, b"n", 0)
    crash.sync(fd)
    crash.close(fd)
    crash.sync_dir(crash.root)
    crash.replace(crash.root / "new", crash.root / "old")
    crash.unlink(crash.root / "old")
    assert [image.files for image in crash.images()] == [
        {"new": b"n", "old": b"o" * 600},
        {"old": b"n"},
        {},
    ]
    crash.sync_dir(crash.root)
    assert [image.files for image in crash.images()] == [{}]


def test_folders_and_links_are_kept_in_mind(crash: CrashFiles, tmp_path: Path) -> None:
    crash.make_dir(crash.root / "stage")
    fd = crash.create(crash.root / "stage" / "f")
    crash.close(fd)
    crash.sync_dir(crash.root / "stage")
    crash.rename_new(crash.root / "stage", crash.root / "done")
    crash.link_new(crash.root / "old", crash.root / "second")
    crash.sync_dir(crash.root)
    (image,) = crash.images()
    assert image.files == {"old": b"o" * 600, "second": b"o" * 600, "done/f": b""}
    assert image.folders == ("done",)
    target = tmp_path / "target"
    target.mkdir()
    image.write_to(target)
    assert (target / "done" / "f").read_bytes() == b""


def test_a_failed_sync_loses_what_a_later_one_does_not_save(crash: CrashFiles) -> None:
    fd = crash.open_write(crash.root / "old")
    crash.write(fd, b"L" * 100, 600)
    crash.sync_failed(fd)
    crash.write(fd, b"K" * 400, 1100)
    crash.sync(fd)
    assert any(b"L" not in (one or b"") for one in contents(crash, "old"))
    crash.write(fd, b"L" * 100, 600)
    crash.sync(fd)
    assert all(b"L" * 100 in (one or b"") for one in contents(crash, "old"))
    crash.close(fd)


def test_images_are_bounded_and_the_same_for_one_seed(crash: CrashFiles) -> None:
    fd = crash.open_write(crash.root / "old")
    for number in range(20):
        crash.write(fd, bytes([number]) * 3000, 512 * number)
    crash.close(fd)
    images = [image.files for image in crash.images(50, seed=3)]
    assert 10 < len(images) <= 60
    assert images == [image.files for image in crash.images(50, seed=3)]
    assert images != [image.files for image in crash.images(50, seed=4)]


# Damage.


def test_flips_flip_one_bit_each_and_samples_are_a_part_of_them() -> None:
    data = b"ab"
    every = list(flips(data))
    assert len({image for _, image in every}) == 16
    assert all(
        sum((x ^ y).bit_count() for x, y in zip(image, data, strict=True)) == 1
        for _, image in every
    )
    some = list(sampled_flips(data, 5, seed=1))
    assert len(some) == 5
    assert set(some) < set(every)
    assert some == list(sampled_flips(data, 5, seed=1))


def test_truncations_and_splices_are_made_of_the_given_bytes() -> None:
    assert list(truncations(b"abc")) == [(0, b""), (1, b"a"), (2, b"ab")]
    for left, right, image in splices(b"abcdef", b"uvwxyz", 20, seed=1):
        assert image == b"abcdef"[:left] + b"uvwxyz"[right:]


def test_the_doubles_may_be_called_from_any_thread(path: Path) -> None:
    files = FaultyFiles()
    results([in_thread(lambda: [files.stat(path.parent) for _ in range(200)]) for _ in range(4)])
    assert files.counts["stat"] == 800
