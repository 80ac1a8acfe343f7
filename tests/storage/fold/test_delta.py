"""Runs and the delta against a dict: right, immutable, few, with copies counted and bounded."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foldlog import Put, VersionToken, WatchCursor
from foldlog.protocol.updates import encode_batch
from foldlog.storage.fold import delta
from foldlog.storage.fold.base import EMPTY_BASE
from foldlog.storage.fold.delta import EMPTY_DELTA, MERGE_RATIO, Delta, Run, pushed
from foldlog.storage.fold.snapshot import FoldSnapshot

keys = st.text("abc", max_size=3)


def change(key: str, number: int):
    return (key, None if number % 4 == 0 else b"%d" % number, b"")


changes = st.dictionaries(keys, st.integers(1, 99)).map(
    lambda made: {key: change(key, number) for key, number in made.items()}
)


def flat(runs):
    result: dict = {}
    for run in reversed(runs):
        result.update(run)
    return result


def between(state: dict, low: str, high: str | None) -> dict:
    return {k: v for k, v in state.items() if low <= k and (high is None or k < high)}


@given(st.lists(changes, max_size=12))
def test_pushed_runs_hold_the_newest_change_of_each_key(batches):
    runs: tuple[Run, ...] = ()
    expected: dict = {}
    for batch in batches:
        before = [dict(run) for run in runs]
        newer = pushed(runs, batch)
        expected.update(batch)
        assert flat(newer) == expected
        assert [dict(run) for run in runs] == before, "a run that a fold held has changed"
        assert all(type(run) is Run and run for run in newer)
        assert all(len(older) >= MERGE_RATIO * len(run) for run, older in itertools.pairwise(newer))
        runs = newer


def test_a_pushed_batch_is_not_the_callers_dict():
    batch = {"a": change("a", 1)}
    runs = pushed((), batch)
    batch["b"] = change("b", 2)
    assert list(runs[0]) == ["a"]


@given(st.lists(st.lists(changes, min_size=1, max_size=3), max_size=8), keys, keys | st.none())
def test_a_delta_holds_the_newest_change_of_each_key(groups, low, high):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delta, "PIECE_ENTRIES", 4)
        held: list[tuple[Delta, dict]] = []
        current = EMPTY_DELTA
        expected: dict = {}
        for group in groups:
            held.append((current, dict(expected)))
            for batch in group:
                expected.update(batch)
            current = current.with_runs(tuple(Run(batch) for batch in reversed(group)))
            check_delta(current, expected, low, high)
        for old, state in held:
            check_delta(old, state, low, high)


def check_delta(current: Delta, expected: dict, low: str, high: str | None) -> None:
    assert {key: value for piece in current for key, value in piece.items()} == expected
    assert sum(map(len, current)) == len(expected)
    if len(current):
        assert current.firsts[0] == ""
        assert current.firsts == sorted(set(current.firsts))
        assert len(current.firsts) == len(current)
        assert max(map(len, current)) <= delta.PIECE_ENTRIES
        for key in ["", "a", "b", "cc", "zz", *expected]:
            assert current.get(key) == expected.get(key)
    found: dict = {}
    assert current.copy_into(found, low, high) <= (list(found) == sorted(found))
    if high is None or low < high:
        assert found == between(expected, low, high)


@given(changes, keys, keys | st.none())
def test_a_part_of_a_run_is_what_lies_between_its_bounds(made, low, high):
    run = Run(made)
    found: dict = {}
    run.copy_into(found, low, high)
    assert found == between(made, low, high)
    assert list(found) == sorted(found)
    assert run.order() is run.order()


def test_a_delta_copies_only_the_pieces_that_a_change_falls_into():
    big = EMPTY_DELTA.with_runs((Run({f"{n:06}": change(f"{n:06}", n) for n in range(50_000)}),))
    after = big.with_runs((Run({"025000": change("025000", 1), "025001": change("025001", 1)}),))
    kept = {id(piece) for piece in big}
    assert sum(id(piece) not in kept for piece in after) <= 2
    assert len(after) - len(big) <= 1


def test_folding_a_batch_leaves_it_as_it_is():
    """8,192 updates of ten keys make a small first slice, which must not take in the second."""
    batch = encode_batch(
        [Put(f"a{n % 10}", b"1") for n in range(8192)] + [Put("b", b"2")], WatchCursor.none()
    )
    before = [dict(changes) for changes in batch.changes]
    assert len(before) == 2
    FoldSnapshot.empty().with_group([batch])
    FoldSnapshot.empty().with_group([batch, batch])
    assert [*batch.changes] == before


class Counted(Run):
    """Counts what is copied out of runs and into new ones."""

    __slots__ = ()
    copied = 0

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        Counted.copied += len(self)

    def update(self, *arguments, **more) -> None:
        before = len(self)
        super().update(*arguments, **more)
        Counted.copied += (
            len(arguments[0]) if isinstance(arguments[0], dict) else len(self) - before
        )


@pytest.mark.parametrize(
    ("size", "total"),
    [
        *((size, 40_000) for size in (1, 10, 100)),
        *(pytest.param(size, 100_000, marks=pytest.mark.exhaustive) for size in (1, 10, 100)),
    ],
)
def test_a_change_is_copied_a_bounded_number_of_times(monkeypatch, size, total):
    monkeypatch.setattr(delta, "Run", Counted)
    Counted.copied = 0
    rng = random.Random(5)
    fold = FoldSnapshot.empty()
    most_runs = 0
    expected = {}
    for seq in range(1, total // size + 1):
        updates = [Put(f"{rng.randrange(10**9):09}", b"%d" % seq) for _ in range(size)]
        expected.update((update.key, update.value) for update in updates)
        fold = fold.with_batch(
            encode_batch(updates, WatchCursor.none()).changes, seq, WatchCursor.none()
        )
        most_runs = max(most_runs, len(fold.runs))
    assert dict(fold.items()) == expected
    assert len(fold) == len(expected)
    assert most_runs <= 9, "a get would probe too many dicts"
    # A change moves up through at most log4(32,768) runs, is rewritten up to four times in each,
    # then settles.
    assert Counted.copied / total < 40


def test_no_run_or_piece_outgrows_what_one_call_may_touch():
    fold = FoldSnapshot.empty()
    updates = [Put(f"{n:06}", b"v", VersionToken.unknown()) for n in range(90_000)]
    fold = fold.with_batch(encode_batch(updates, WatchCursor.none()).changes, 1, WatchCursor.none())
    *pieces, settling = fold.delta
    assert len(pieces) == len(fold.delta) > 50
    assert all(len(piece) <= delta.PIECE_ENTRIES for piece in pieces)
    assert len(settling) <= 2 * delta.SETTLE_ENTRIES
    assert sum(map(len, fold.runs)) < 2 * delta.SETTLE_ENTRIES
    assert len(fold) == 90_000


@given(st.lists(changes, max_size=30), keys, keys | st.none())
def test_what_settles_bit_by_bit_reads_the_same_at_every_step(batches, low, high):
    with pytest.MonkeyPatch.context() as patch:
        for name, entries in (("PIECE_ENTRIES", 4), ("SETTLE_ENTRIES", 8), ("STEP_ENTRIES", 2)):
            patch.setattr(delta, name, entries)
        current, runs, expected = EMPTY_DELTA, (), {}
        held = []
        for batch in filter(None, batches):
            expected.update(batch)
            current, runs = current.with_due(pushed(runs, batch), len(batch))
            held.append((current, runs, dict(expected)))
        for settled, newer, state in held:
            for key in state:
                in_runs = next((run[key] for run in newer if key in run), None)
                assert (in_runs or settled.get(key)) == state[key]
            found: dict = {}
            assert settled.copy_into(found, low, high) <= (list(found) == sorted(found))
            for run in reversed(newer):
                run.copy_into(found, low, high)
            if high is None or low < high:
                assert found == between(state, low, high)
            assert flat((*newer, *reversed([*settled]))) == state


@pytest.mark.parametrize("size", [1, 100, 1000])
def test_no_batch_waits_until_a_whole_delta_is_copied(monkeypatch, size):
    """Count the pieces that one batch copies.

    40,000 settled changes take in 8,192 more, which fall into every one of their pieces.
    """
    monkeypatch.setattr(delta, "SETTLE_ENTRIES", 8192)
    settled = EMPTY_DELTA.with_runs(
        (Run({f"{n:06}": change(f"{n:06}", 1) for n in range(40_000)}),)
    )
    assert len(settled) > 75
    monkeypatch.setattr(delta, "Run", Counted)
    rng = random.Random(7)
    runs: tuple[Run, ...] = ()
    pieces: list[int] = []
    settlings = late = 0
    current = settled
    for _ in range(20_000 // size):
        batch = {
            key: change(key, 2) for key in (f"{rng.randrange(40_000):06}" for _ in range(size))
        }
        before, was_settling = set(map(id, current)), bool(current.settling)
        current, runs = current.with_due(pushed(runs, batch), len(batch))
        late += was_settling and not runs
        pieces.append(len(set(map(id, current)) - before))
        settlings += was_settling and not current.settling
    assert settlings >= 1
    assert not late, "one was due while another was still settling"
    assert (
        max(pieces) <= 2 + len(settled) * 2 * max(size, delta.STEP_ENTRIES) // delta.SETTLE_ENTRIES
    )


@pytest.mark.parametrize("limit", [1, 7, 64, 10_000])
def test_what_replay_collects_settles_to_what_a_dict_would_hold(monkeypatch, limit):
    monkeypatch.setattr(delta, "COLLECTED_ENTRIES", limit)
    monkeypatch.setattr(delta, "SETTLE_ENTRIES", 50)
    monkeypatch.setattr(delta, "PIECE_ENTRIES", 16)
    rng = random.Random(limit)
    collected, model = delta.Collected(), {}
    for _ in range(200):
        changes = {
            key: (key, rng.choice([None, b"%d" % rng.randrange(9)]), b"")
            for key in map(str, rng.sample(range(900), 7))
        }
        collected.add(changes)
        model.update(changes)
        settled, runs = collected.settled()
        found = {}
        settled.copy_into(found, "", None)
        assert found | flat(runs) == model
        assert not settled.firsts or all(
            settled.get(key) == change for key, change in model.items()
        )
    assert settled.firsts == sorted(set(settled.firsts))
    assert settled.firsts[0] == ""
    if limit >= 64:
        assert max(map(len, settled)) <= 4 * 16


@pytest.mark.parametrize("newest", [["b"], ["b", "c"], ["a", "c"]])
@pytest.mark.parametrize("settling", [[], ["d"], ["e"]])
def test_a_range_is_in_key_order_wherever_its_changes_are_kept(newest, settling):
    def run(keys):
        return Run({key: (key, key.encode(), b"") for key in keys})

    settled = Delta(["", "b"], [run("a"), run("cefg")], run(settling))
    fold = FoldSnapshot(EMPTY_BASE, settled, (run(newest),), 1, WatchCursor.none())
    expected = sorted({*"acefg", *newest, *settling})
    assert [entry.key for entry in fold.range()] == expected
    assert [entry.key for entry in fold.iter_range(reverse=True)] == expected[::-1]
