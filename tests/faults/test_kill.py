"""kill -9 before every I/O call and at random: all answered data is there, nothing is half there.

The killed processes are real ones (`killed.py`), on real files. What they passed to the kernel
survives them.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from faultkit import UNSYNCED, batch, fault_of, fold_of, view

import foldlog
from foldlog import AppendLogSnapshot, RocksDbSnapshot, WatchCursor
from foldlog.storage.repair.verify import verify_log

pytestmark = pytest.mark.exhaustive

TESTS = Path(__file__).resolve().parents[1] / "kits"
STORY_BATCHES, TOGETHER = 12, 4  # as in killed.py
TIMEOUT_S = 120
CAMPAIGN = [pytest.mark.slow, pytest.mark.timeout(900)]


def deaths(
    story: str, when: str, folder: Path, *, first: int = 1, stride: int = 1, count: int = 10_000
) -> Iterator[dict[str, Any]]:
    """Run killed.py, and hear of each death."""
    command = [
        sys.executable,
        str(TESTS / "killed.py"),
        story,
        when,
        str(folder),
        str(first),
        str(stride),
        str(count),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                death = json.loads(line)
                assert death["error"] is None, death
                yield death
            assert process.wait(TIMEOUT_S) == 0
        finally:
            process.kill()


def check(path: Path, acked: list[int], allowed: range) -> None:
    """Check that answered batches are there, whole, and artifacts are whole or absent.

    The log must verify and take more batches.
    """
    assert acked == list(range(1, len(acked) + 1))
    for artifact in path.parent.glob("artifact-*"):
        if ".partial-" in artifact.name:
            continue  # a stage, under a name of its own, of which nobody was told
        copy = path.with_name("copy.log")
        with AppendLogSnapshot.import_artifact(artifact, copy, files=UNSYNCED)[1] as snap:
            assert view(snap) == fold_of(list(range(1, (snap.cursor().as_u64() or 0) + 1)))
        for file in path.parent.glob("copy.log*"):
            file.unlink()
    if path.exists():
        assert verify_log(path).problems == ()
    wrong = fault_of(path, [fold_of(list(range(1, last + 1))) for last in allowed])
    assert not wrong, f"after {len(acked)} answers: {wrong}"


def may_hold(story: str, path: Path, answered: int) -> range:
    """The batches that the log may end with."""
    if story == "importing":
        return range(STORY_BATCHES, STORY_BATCHES + 1) if path.exists() else range(1)
    return range(answered, answered + TOGETHER + 1)


def die_before_calls(story: str, folder: Path, stride: int) -> int:
    for count, death in enumerate(
        deaths(story, "call", folder, first=1 + len(story) % stride, stride=stride)
    ):
        path = folder / str(death["n"]) / "state.log"
        check(path, death["acked"], may_hold(story, path, len(death["acked"])))
        shutil.rmtree(path.parent)
        if death["done"]:
            assert len(death["acked"]) == STORY_BATCHES
            return count
    raise AssertionError("the story never completes")


@pytest.mark.parametrize(("stride", "least"), [(5, 10), pytest.param(1, 60, marks=CAMPAIGN)])
@pytest.mark.parametrize("story", ["engine", "store", "importing"])
def test_a_process_that_dies_before_a_call_loses_nothing_that_it_answered(
    folder, story, stride, least
):
    count = die_before_calls(story, folder, stride=stride)
    assert count >= least
    print(f"{count} deaths before a call, {story}, 0 losses")


@pytest.mark.parametrize("count", [12, pytest.param(300, marks=CAMPAIGN)])
@pytest.mark.parametrize("story", ["engine", "store"])
def test_a_process_that_is_killed_at_any_moment_loses_nothing_that_it_answered(
    folder, story, count
):
    answers = 0
    for death in deaths(story, "moment", folder, count=count):
        path = folder / str(death["n"]) / "state.log"
        check(path, death["acked"], may_hold(story, path, len(death["acked"])))
        shutil.rmtree(path.parent)
        answers += len(death["acked"])
        count -= 1
    assert count == 0
    print(f"{answers} answers before deaths at moments by chance, {story}, 0 losses")


@pytest.mark.parametrize("count", [6, pytest.param(100, marks=CAMPAIGN)])
@pytest.mark.parametrize("story", ["engine", "store"])
def test_processes_that_die_one_after_the_other_lose_nothing_and_leave_a_follower_right(
    folder, story, count
):
    """Process after process dies on one log, which a follower in this one reads all the while."""
    path = folder / "state.log"
    follower = foldlog.follow(path, poll_interval_s=0.05)
    try:
        answered = 0
        for death in deaths(story, "same-log", folder, count=count):
            acked = death["acked"]
            assert acked == list(range(acked[0], acked[-1] + 1)) if acked else True
            if acked:
                assert answered < acked[0] <= answered + TOGETHER + 1
                answered = acked[-1]
            snapshot = follower.snapshot()
            assert view(snapshot) == fold_of(list(range(1, (snapshot.cursor().as_u64() or 0) + 1)))
            count -= 1
        assert count == 0
        assert verify_log(path).problems == ()
        with foldlog.open(path, sync="never") as store:
            last = store.cursor().as_u64() or 0
            assert answered <= last <= answered + TOGETHER
            assert view(store) == fold_of(list(range(1, last + 1)))
            store.apply(batch(last + 1), WatchCursor.from_u64(last + 1))
            follower.wait_for(WatchCursor.from_u64(last + 1), timeout_s=60)
            assert view(follower) == view(store)
    finally:
        follower.close()
    print(f"{answered} answers by processes that died one after the other, {story}, 0 losses")


def check_rocksdb(path: Path, acked: list[int], allowed: range) -> None:
    """As `check`, for the engine on RocksDB."""
    assert acked == list(range(acked[0], acked[0] + len(acked))) if acked else True
    for artifact in path.parent.glob("artifact-*"):
        if ".partial-" not in artifact.name:
            copy = path.with_name("copy.db")
            with RocksDbSnapshot.import_artifact(artifact, copy)[1] as snap:
                assert view(snap) == fold_of(list(range(1, (snap.cursor().as_u64() or 0) + 1)))
            shutil.rmtree(copy)
        shutil.rmtree(artifact)
    cursor, snap = RocksDbSnapshot.open(path)
    with snap:
        last = cursor.as_u64() or 0
        assert last in allowed
        assert snap.snapshot().seq == last
        assert view(snap) == fold_of(list(range(1, last + 1)))
        assert snap.verify().problems == ()


@pytest.mark.parametrize("count", [3, pytest.param(300, marks=CAMPAIGN)])
@pytest.mark.parametrize("story", ["rocksdb", "rocksdb_store"])
def test_a_rocksdb_store_that_is_killed_at_any_moment_loses_nothing_that_it_answered(
    folder, story, count
):
    answers = 0
    for death in deaths(story, "moment", folder, count=count):
        path = folder / str(death["n"]) / "state.log"
        answered = len(death["acked"])
        check_rocksdb(path, death["acked"], range(answered, answered + 2))
        shutil.rmtree(path.parent)
        answers += answered
        count -= 1
    assert count == 0
    print(f"{answers} answers before deaths at moments by chance, RocksDB, 0 losses")


@pytest.mark.parametrize("count", [3, pytest.param(100, marks=CAMPAIGN)])
def test_processes_that_die_one_after_the_other_on_a_rocksdb_store_lose_nothing(folder, count):
    path = folder / "state.log"
    answered = 0
    for death in deaths("rocksdb", "same-log", folder, count=count):
        acked = death["acked"]
        if acked:
            assert answered < acked[0] <= answered + 2
            answered = acked[-1]
        count -= 1
    assert count == 0
    check_rocksdb(path, [], range(answered, answered + 2))
    print(f"{answered} answers by processes that died one after the other, RocksDB, 0 losses")


FILE_LIMIT = """
import resource, sys
from pathlib import Path
from faultkit import batch, fold_of, view
from foldlog import AppendLogSnapshot, RocksDbSnapshot, WatchCursor

path = Path(sys.argv[1])
_, snap = AppendLogSnapshot.open(path)
snap.apply(batch(1), WatchCursor.from_u64(1))
size, (_, hard) = path.stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
for room in (1, 100, 511, 1500):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + room, hard))
    try:
        snap.apply(batch(3), WatchCursor.from_u64(3))
    except OSError as error:
        print(error.errno, path.stat().st_size == size, view(snap) == fold_of([1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
snap.apply(batch(3), WatchCursor.from_u64(3))
print(snap.verify().problems, view(snap) == fold_of([1, 3]))
snap.close()
"""


def test_a_write_that_the_kernel_cuts_short_is_taken_back(path):
    # Only RLIMIT_FSIZE gives a real short write without a full disk: so many bytes, then EFBIG.
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(TESTS), os.environ.get("PYTHONPATH", ""))),
    }
    done = subprocess.run(
        [sys.executable, "-c", FILE_LIMIT, str(path)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env=environment,
        check=False,
    )
    assert (done.stderr, done.returncode) == ("", 0)
    assert done.stdout.splitlines() == [f"{errno.EFBIG} True True"] * 4 + ["() True"]
    assert verify_log(path).ok
