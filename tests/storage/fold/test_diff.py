"""The difference of two folds: exact between any two moments, and at the cost of what changed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from counting import CountedFiles
from crc32c import crc32c
from forged import with_the_checksum_of
from hypothesis import given
from hypothesis import strategies as st

from foldlog import (
    AppendLogSnapshot,
    CorruptLogError,
    Delete,
    FoldSnapshot,
    Purge,
    Put,
    VersionToken,
    WatchCursor,
    diff,
)
from foldlog.storage.fold import base, leaf

Entries = dict[str, tuple[bytes, bytes]]


def entries(fold: FoldSnapshot, prefix: str = "") -> Entries:
    return {entry.key: (entry.value, bytes(entry.version)) for entry in fold.range(prefix)}


def changed(old: Entries, updates: list[Put | Delete]) -> Entries:
    """`old` with a difference applied. Each update must be a change, and they come in key order."""
    new = dict(old)
    keys = [update.key for update in updates]
    assert keys == sorted(set(keys)), "ascending, and each key once"
    for update in updates:
        if isinstance(update, Delete):
            assert update.key in new, "a delete of what was not there"
            del new[update.key]
        else:
            assert new.get(update.key) != (update.value, bytes(update.version)), (
                "a put of what stood there already"
            )
            new[update.key] = update.value, bytes(update.version)
    return new


def assert_exact(old: FoldSnapshot, new: FoldSnapshot, prefix: str = "") -> None:
    assert changed(entries(old, prefix), list(diff(old, new, prefix))) == entries(new, prefix)
    assert changed(entries(new, prefix), list(diff(new, old, prefix))) == entries(old, prefix), (
        "and backwards"
    )


KEYS = st.sampled_from(
    [f"{part}{number:03}" for part in ("a", "a/", "b", "ü", "\U0010ffff") for number in range(12)]
)
UPDATES = st.one_of(
    st.builds(
        Put,
        KEYS,
        st.sampled_from([b"", b"1", b"22", b"x" * 300]),
        st.sampled_from([VersionToken.unknown(), VersionToken(b"v")]),
    ),
    st.builds(Delete, KEYS, st.just(VersionToken(b"d"))),
    st.builds(Purge, KEYS, st.just(VersionToken(b"p"))),
)
STEPS = st.lists(
    st.one_of(st.lists(UPDATES, max_size=12), st.sampled_from(["compact", "reopen", "keep"])),
    min_size=1,
    max_size=14,
)


@given(steps=STEPS, prefix=st.sampled_from(["", "a", "a/", "b00", "ü", "\U0010ffff", "nothing"]))
def test_a_difference_applied_to_the_old_state_gives_the_new_one(tmp_path_factory, steps, prefix):
    """Across batches, compactions in the process and reopened files; in both directions."""
    path = tmp_path_factory.mktemp("diff") / "state.log"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leaf, "MIN_ENTRIES", 2)  # so that a few keys make many leaves
        patch.setattr(leaf, "MAX_ENTRIES", 8)
        patch.setattr(leaf, "_BOUNDARY_MASK", 3)
        snap = AppendLogSnapshot.open(path)[1]
        kept = [snap.snapshot()]
        for number, step in enumerate(steps, 1):
            if step == "compact":
                snap.compact()
            elif step == "reopen":
                snap.close()
                snap = AppendLogSnapshot.open(path)[1]
            elif step == "keep":
                kept.append(snap.snapshot())
            else:
                snap.apply(step, WatchCursor.from_u64(number))
        kept.append(snap.snapshot())
        for old in kept:
            assert_exact(old, kept[-1], prefix)
        snap.close()


def compacted(
    snap: AppendLogSnapshot, updates: Iterable[Put | Delete], number: int
) -> FoldSnapshot:
    """The state after one more batch and a compaction."""
    snap.apply(updates, WatchCursor.from_u64(number))
    snap.compact()
    return snap.snapshot()


def test_equal_states_have_no_difference_whatever_file_they_stand_in(path: Path, tmp_path: Path):
    updates = [Put(f"k{number:05}", b"v" * 50) for number in range(3000)]
    first = AppendLogSnapshot.open(path)[1]
    second = AppendLogSnapshot.open(tmp_path / "other.log")[1]
    first.apply(updates, WatchCursor.from_u64(1))
    for start in range(0, 3000, 100):
        second.apply(updates[start : start + 100], WatchCursor.from_u64(1))
    for step in (lambda: None, first.compact, second.compact):
        step()
        assert list(diff(first.snapshot(), second.snapshot())) == []
    assert list(diff(first.snapshot(), first.snapshot())) == []
    first.close()
    second.close()


def test_a_delete_carries_the_version_of_the_removal_while_it_is_known(path: Path):
    with AppendLogSnapshot.open(path)[1] as snap:
        snap.apply([Put("a", b"1"), Put("b", b"1"), Put("c", b"1")], WatchCursor.from_u64(1))
        old = snap.snapshot()
        snap.apply(
            [Delete("a", VersionToken.from_u64(7)), Purge("b", VersionToken.from_u64(8))],
            WatchCursor.from_u64(2),
        )
        assert list(diff(old, snap.snapshot())) == [
            Delete("a", VersionToken.from_u64(7)),
            Delete("b", VersionToken.from_u64(8)),
        ]
        snap.compact()
        assert list(diff(old, snap.snapshot())) == [Delete("a"), Delete("b")], (
            "tombstones are gone by now"
        )


def test_a_new_version_of_the_same_value_is_a_change(path: Path):
    with AppendLogSnapshot.open(path)[1] as snap:
        snap.apply([Put("a", b"1")], WatchCursor.from_u64(1))
        old = snap.snapshot()
        snap.apply([Put("a", b"1", VersionToken(b"v"))], WatchCursor.from_u64(2))
        assert list(diff(old, snap.snapshot())) == [Put("a", b"1", VersionToken(b"v"))]
        snap.compact()
        assert list(diff(old, snap.snapshot())) == [Put("a", b"1", VersionToken(b"v"))]


class Looks:
    """Counts what a diff looks at: single keys by `get`, and leaves read whole."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gets = self.leaves = 0
        get, columns = FoldSnapshot.get, base.Base.columns

        def counted_get(fold: FoldSnapshot, key: str) -> Any:
            self.gets += 1
            return get(fold, key)

        def counted_columns(
            of: base.Base, number: int, low: str | None = None, high: str | None = None
        ) -> Any:
            self.leaves += 1
            return columns(of, number, low, high)

        monkeypatch.setattr(FoldSnapshot, "get", counted_get)
        monkeypatch.setattr(base.Base, "columns", counted_columns)


@pytest.mark.parametrize("how", ["batch", "compacted", "reopened"])
def test_what_did_not_change_is_not_looked_at(path: Path, monkeypatch, how):
    """20,000 entries, of which 10 change, wherever the log was in between.

    Only their neighbours in a leaf are read.
    """
    with AppendLogSnapshot.open(path)[1] as snap:
        old = compacted(snap, [Put(f"k{number:05}", b"v" * 20) for number in range(20_000)], 1)
        snap.apply(
            [Put(f"k{number:05}", b"new") for number in range(0, 20_000, 2_000)],
            WatchCursor.from_u64(2),
        )
        if how != "batch":
            snap.compact()
        new = snap.snapshot()
    if how == "reopened":
        snap = AppendLogSnapshot.open(path)[1]
        new = snap.snapshot()
        snap.close()
    looks = Looks(monkeypatch)
    assert len(list(diff(old, new))) == 10
    assert looks.gets == 20, "each key that changed, in the old and in the new"
    assert looks.leaves <= (0 if how == "batch" else 20), (
        "each leaf that changed, in the old and in the new"
    )


def test_a_prefix_reads_only_the_leaves_under_it(path: Path, monkeypatch):
    with AppendLogSnapshot.open(path)[1] as snap:
        keys = [f"{part}/{number:05}" for part in "abcd" for number in range(2_000)]
        old = compacted(snap, [Put(key, b"v") for key in keys], 1)
        new = compacted(snap, [Put(key, b"w") for key in keys], 2)
        looks = Looks(monkeypatch)
        assert len(list(diff(old, new, "c/"))) == 2_000
        under = sum(
            first < "d" and following > "c/"
            for fold in (old, new)
            for first, following in zip(fold.base.firsts, [*fold.base.firsts[1:], "z"], strict=True)
        )
        assert looks.leaves <= 2 + 2 * under, (
            "once to compare, and once ahead when many of its entries were looked up"
        )


def test_a_snapshot_whose_file_was_overwritten_is_refused_and_not_guessed_at(
    path: Path, tmp_path: Path
):
    """A follower's old snapshot may use an overwritten file: its difference would be a lie."""
    with AppendLogSnapshot.open(path)[1] as snap:
        old = compacted(snap, [Put(f"k{number}", b"old") for number in range(1000)], 1)
    with AppendLogSnapshot.open(tmp_path / "other.log")[1] as other:
        other.apply([Put(f"k{number}", b"new") for number in range(1000)], WatchCursor.from_u64(1))
        path.write_bytes(b"\xff" * path.stat().st_size)
        with pytest.raises(CorruptLogError):
            list(diff(old, other.snapshot()))


def test_merging_never_tells_a_key_twice(path: Path):
    """A key that changed in the leaves and again behind them is a suspect for two reasons."""
    with AppendLogSnapshot.open(path)[1] as snap:
        old = compacted(snap, [Put("a", b"1"), Put("b", b"1")], 1)
        compacted(snap, [Put("a", b"2"), Delete("b")], 2)
        snap.apply([Put("a", b"3"), Put("b", b"1")], WatchCursor.from_u64(3))
        assert list(diff(old, snap.snapshot())) == [Put("a", b"3")]


# Leaves whose checksums agree.


@pytest.mark.parametrize("reopened", [False, True])
def test_values_with_one_checksum_are_told_apart(path: Path, reopened: bool):
    """Both checksums of a leaf agreed, and a watcher that resumed across the compaction kept the
    old value for ever."""
    old, new = b"role=viewer;    sig=0000", b"role=admin ;    sig=????"
    new = with_the_checksum_of(new, old)
    assert crc32c(new) == crc32c(old)
    snap = AppendLogSnapshot.open(path)[1]
    snap.apply([Put(f"u{n:03}", b"x" * 10) for n in range(300)], WatchCursor.from_u64(1))
    before = compacted(snap, [Put("user/7", old)], 2)
    compacted(snap, [Put("user/7", new)], 3)
    if reopened:
        snap.close()
        snap = AppendLogSnapshot.open(path)[1]
    assert list(diff(before, snap.snapshot())) == [Put("user/7", new)]
    snap.close()


def test_leaves_that_a_compaction_copied_are_not_read(path: Path):
    files = CountedFiles()
    snap = AppendLogSnapshot.open(path, files=files)[1]
    before = compacted(snap, [Put(f"k{n:05}", b"v" * 50) for n in range(20_000)], 1)
    for number in range(2, 5):
        compacted(snap, [Put("k00500", b"%d" % number)], number)
    files.forget()
    assert list(diff(before, snap.snapshot())) == [Put("k00500", b"4")]
    assert files.bytes_read < 8 * 512 * 100, "the leaf that changed, in both files"
    snap.close()


def test_leaves_of_two_files_are_compared_once_and_only_under_the_prefix(path: Path):
    files = CountedFiles()
    snap = AppendLogSnapshot.open(path, files=files)[1]
    before = compacted(snap, [Put(f"k{n:05}", b"v" * 50) for n in range(20_000)], 1)
    snap.close()
    snap = AppendLogSnapshot.open(path, files=files)[1]
    files.forget()
    assert list(diff(before, snap.snapshot(), "k00")) == []
    assert files.bytes_read < 20_000 * 60 / 2
    assert list(diff(before, snap.snapshot())) == []
    files.forget()
    assert list(diff(before, snap.snapshot())) == []
    assert files.bytes_read == 0
    snap.close()
