"""Derived state: in step with the fold, an immutable pair, rebuilt when the changes are unknown."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from actor_kit import DEADLINE_S, until
from interrupts import At, Struck, strike

import foldlog
from foldlog import Delete, FoldSnapshot, Put, RequestTimeout, StoreClosed, Update
from foldlog.actors.base.answers import Answer
from foldlog.testing import crash_at

ON_EACH_ENGINE = True

Pairs = dict[str, bytes]


def build(fold: FoldSnapshot) -> Pairs:
    return dict(fold.items())


def update(value: Pairs, updates: Sequence[Update]) -> Pairs:
    changed = dict(value)
    for each in updates:
        if isinstance(each, Put):
            changed[each.key] = each.value
        else:
            changed.pop(each.key, None)
    return changed


def until_its_thread_ended() -> None:
    def is_there() -> bool:
        return any(thread.name == "foldlog-derive" for thread in threading.enumerate())

    until(lambda: not is_there(), "its thread ended")


def test_derived_state_follows_batch_by_batch(path: Path):
    batches: list[list[str]] = []

    def noted(value: Pairs, updates: Sequence[Update]) -> Pairs:
        batches.append([each.key for each in updates])
        return update(value, updates)

    with foldlog.open(path) as store:
        store.put("n/a", b"1")
        with foldlog.derive(store, build, noted, prefix="n/") as derived:
            assert derived.value == {"n/a": b"1"}
            store.apply([Put("n/b", b"2"), Put("x", b""), Delete("n/a")], 5)
            store.apply([Put("x", b"1")], 6)
            derived.wait_for(6, DEADLINE_S)
            assert derived.value == {"n/b": b"2"}
            assert (derived.snapshot.seq, derived.rebuilds, derived.error) == (3, 0, None)
            assert batches == [["n/b", "n/a"]]


def test_the_value_always_belongs_to_the_snapshot_beside_it(path: Path):
    """Readers load the pair during applies, compactions and crashes of the writer."""
    crashes = [10, 25]

    def step(name: str) -> None:
        if name == "writer.before_write" and crashes and store_box[0].snapshot().seq >= crashes[0]:
            crashes.pop(0)
            raise RuntimeError("injected")

    store_box: list[Any] = []
    wrong: list[object] = []
    done = threading.Event()
    with foldlog.open(path, sync="never", step=lambda name: store_box and step(name)) as store:
        store_box.append(store)
        with foldlog.derive(store, build, update) as derived:

            def read() -> None:
                while not done.is_set():
                    value, fold = derived.state
                    if value != dict(fold.items()):
                        wrong.append((value, fold))

            readers = [threading.Thread(target=read) for _ in range(2)]
            for reader in readers:
                reader.start()
            try:
                for number in range(1, 41):
                    store.apply([Put(f"k{number % 7}", b"%d" % number)], number)
                    if number % 15 == 0:
                        store.compact()
                derived.wait_for(40, DEADLINE_S)
            finally:
                done.set()
                for reader in readers:
                    reader.join()
            assert (wrong, crashes) == ([], [])
            assert derived.value == dict(store.items())


def test_it_is_built_anew_after_a_lag(path: Path, monkeypatch: Any):
    monkeypatch.setattr("foldlog.actors.feeds.ring.RING_GROUPS", 3)
    began, go_on = threading.Event(), threading.Event()

    def slow(value: Pairs, updates: Sequence[Update]) -> Pairs:
        began.set()
        go_on.wait(DEADLINE_S)
        return update(value, updates)

    with foldlog.open(path, sync="never") as store, foldlog.derive(store, build, slow) as derived:
        store.put("01", b"")
        assert began.wait(DEADLINE_S)
        for number in range(2, 21):
            store.put(f"{number:02}", b"")
        go_on.set()
        derived.wait_for(seq=20, timeout_s=DEADLINE_S)
        assert derived.rebuilds == 1
        assert list(derived.value) == [f"{number:02}" for number in range(1, 21)]


@pytest.mark.append_log("it is followed")
def test_it_is_built_anew_after_a_rewind(path: Path, tmp_path: Path):
    with foldlog.open(tmp_path / "other.log") as store:
        store.put("theirs", b"")
    with foldlog.open(path) as store:
        for number in range(5):
            store.put(f"ours/{number}", b"")
    with foldlog.follow(path) as follower, foldlog.derive(follower, build, update) as derived:
        os.replace(tmp_path / "other.log", path)
        until(lambda: list(derived.value) == ["theirs"], "the other log is followed")
        assert derived.rebuilds == 1


def test_an_update_that_raises_is_made_up_for_by_building_anew(path: Path, caplog: Any):
    def broken(value: Pairs, updates: Sequence[Update]) -> Pairs:
        raise LookupError("a bug of the user's")

    with foldlog.open(path) as store, foldlog.derive(store, build, broken) as derived:
        version = store.put("a", b"1")
        derived.wait_for(seq=version, timeout_s=DEADLINE_S)
        assert (derived.value, derived.rebuilds, derived.error) == ({"a": b"1"}, 1, None)
    assert "a bug of the user's" in caplog.text


def test_where_it_cannot_be_built_the_last_good_pair_is_served_and_the_next_change_tries_again(
    path: Path,
):
    def picky(fold: FoldSnapshot) -> Pairs:
        if "poison" in fold:
            raise LookupError("poison")
        return build(fold)

    def refuse(value: Pairs, updates: Sequence[Update]) -> Pairs:
        raise LookupError("always")

    with foldlog.open(path) as store, foldlog.derive(store, picky, refuse) as derived:
        store.put("poison", b"")
        until(lambda: derived.error is not None, "the build failed")
        assert derived.state == ({}, derived.snapshot)
        assert derived.snapshot.seq == 0
        with pytest.raises(RequestTimeout):
            derived.wait_for(seq=1, timeout_s=0.01)
        version = store.delete("poison")
        derived.wait_for(seq=version, timeout_s=DEADLINE_S)
        assert (derived.error, derived.value) == (None, {})


def test_what_the_first_build_raises_is_raised_and_nothing_is_left(path: Path):
    def never(fold: FoldSnapshot) -> Pairs:
        raise LookupError("no")

    with foldlog.open(path) as store:
        with pytest.raises(LookupError):
            foldlog.derive(store, never, update)
        assert not store._core.feeds.wanted
        with pytest.raises(TypeError):
            foldlog.derive(store.snapshot(), build, update)  # type: ignore[arg-type]


def test_the_value_outlives_the_store_and_waiting_ends_with_it(path: Path):
    store = foldlog.open(path)
    derived = foldlog.derive(store, build, update)
    version = store.put("a", b"1")
    derived.wait_for(seq=version, timeout_s=DEADLINE_S)
    store.close()
    with pytest.raises(StoreClosed):
        derived.wait_for(seq=9, timeout_s=DEADLINE_S)
    assert derived.value == {"a": b"1"}
    assert derived.ended
    derived.close()
    derived.close()
    with pytest.raises(StoreClosed):
        foldlog.derive(store, build, update)


def test_one_that_is_dropped_costs_the_store_nothing_more(path: Path):
    with foldlog.open(path) as store:
        derived = foldlog.derive(store, build, update)
        assert store._core.feeds.wanted
        del derived
        gc.collect()
        assert not store._core.feeds.wanted
    until_its_thread_ended()


def test_a_writer_that_crashes_leaves_it_in_step(path: Path):
    with (
        foldlog.open(path, step=crash_at("writer.after_write")) as store,
        foldlog.derive(store, build, update) as derived,
    ):
        version = store.put("a", b"1")
        derived.wait_for(seq=version, timeout_s=DEADLINE_S)
        assert derived.value == {"a": b"1"}


def test_a_start_that_is_interrupted_leaves_no_thread(path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its thread looked for changes five times a second, also once the store was closed."""

    def interrupted(answer: Any, timeout: float | None = None) -> None:
        until(answer.done, "the thread has begun")
        raise KeyboardInterrupt

    with foldlog.open(path) as store:
        with monkeypatch.context() as patch:
            patch.setattr(Answer, "result", interrupted)
            with pytest.raises(KeyboardInterrupt):
                foldlog.derive(store, build, update)
        until_its_thread_ended()
        assert not store._core.feeds.wanted


@pytest.mark.parametrize("fatal", [SystemExit, KeyboardInterrupt, GeneratorExit])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_function_that_raises_what_no_exception_is_ends_the_derived_state_and_not_the_store(
    path: Path, fatal: type[BaseException]
):
    def update_or_exit(value: Pairs, updates: Sequence[Update]) -> Pairs:
        raise fatal

    with foldlog.open(path) as store, foldlog.derive(store, build, update_or_exit) as derived:
        store.put("a", b"1")
        with pytest.raises(StoreClosed, match="thread ended"):
            derived.wait_for(seq=1, timeout_s=DEADLINE_S)
        assert (derived.value, derived.ended) == ({}, "its thread ended")
        assert not store._core.feeds.wanted
        store.put("a", b"2")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_start_that_is_interrupted_anywhere_leaves_nothing_behind(path: Path):
    with foldlog.open(path) as store:
        number = 0
        while True:
            number += 1
            at = At(number, strike)
            with contextlib.suppress(Struck):
                at.run(lambda: foldlog.derive(store, build, update)).close()
            assert not store._core.feeds.wanted, f"after point {number}"
            if not at.fired:
                break
        assert number > 50
        until_its_thread_ended()
