"""Options and timeouts: what is taken, by store, engine, follower, watch and command line alike."""

from __future__ import annotations

import asyncio
import inspect
import math
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pykka
import pytest

import foldlog
from foldlog import AppendLogSnapshot, Put, VersionToken, WatchCursor
from foldlog.protocol import options
from foldlog.protocol.options import FOREVER_S, UNSET, Count, Seconds, Words, check_timeout
from foldlog.upstreams import LogFile

NO_NUMBERS = [None, "5", b"5", True, [1], 1j, object()]
NO_TIMEOUTS = [math.nan, -1, -0.001, -math.inf, "5", True, [1], 1j]
FOREVER = [None, math.inf, 1e10, threading.TIMEOUT_MAX * 2, 10**400]
DECLARED = {
    option.name: option
    for option in vars(options).values()
    if isinstance(option, (Count, Seconds)) and option.name.isidentifier()
}


def mirror(path: Path, **options: Any) -> foldlog.Mirror:
    return foldlog.mirror(path, LogFile(path.with_name("absent.log")), **options)


FACES = {"poll_interval_s": foldlog.follow, "audit_interval_s": foldlog.mirror}
OPENERS: dict[str, Callable[..., Any]] = {**FACES, "audit_interval_s": mirror}
"""Who takes an option; `foldlog.open` takes the others."""


@pytest.mark.parametrize("value", FOREVER, ids=repr)
def test_waiting_without_end_is_a_number_that_every_lock_takes(value: object) -> None:
    assert check_timeout(value) == FOREVER_S
    assert threading.Lock().acquire(timeout=check_timeout(value))
    assert 3 * FOREVER_S < threading.TIMEOUT_MAX, "a deadline and a margin fit, too"


@pytest.mark.parametrize("value", [0, 0.0, 1, 2.5, 1e6])
def test_a_sound_timeout_stays_as_it_is(value: float) -> None:
    assert check_timeout(value) == value
    assert isinstance(check_timeout(value), float)


@pytest.mark.parametrize("value", NO_TIMEOUTS, ids=repr)
def test_what_is_no_timeout_is_refused_by_name(value: object) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    with pytest.raises(ValueError if is_number else TypeError, match="patience_s"):
        check_timeout(value, "patience_s")


CALLS: dict[str, Callable[[foldlog.Store, foldlog.Follower, foldlog.Watch, Any], object]] = {
    "apply": lambda store, _, __, t: store.apply([Put("x", b"")], WatchCursor.from_u64(2), t),
    "apply_async": lambda store, _, __, t: store.apply_async(
        [Put("x", b"")], WatchCursor.from_u64(2), t
    ).result(60),
    "put": lambda store, _, __, t: store.put("x", b"", t),
    "create": lambda store, _, __, t: store.create("x", b"", t),
    "update": lambda store, _, __, t: store.update(
        "a", b"", expected=VersionToken.from_u64(1), timeout_s=t
    ),
    "delete": lambda store, _, __, t: store.delete("a", timeout_s=t),
    "compact": lambda store, _, __, t: store.compact(t),
    "export_to": lambda store, _, __, t: store.export_to(store.path.parent / "artifact", t),
    "sync": lambda store, _, __, t: store.sync(t),
    "reopen": lambda store, _, __, t: store.reopen(t),
    "wait_for": lambda _, follower, __, t: follower.wait_for(follower.cursor(), t),
    "watch.next": lambda _, __, watch, t: watch.next(t),
    "watch.offer": lambda _, __, watch, t: watch.offer(t),
    "close": lambda store, _, __, t: store.close(t),
    "viewwatch.next": lambda store, _, __, t: view_watch_next(store, t),
    "delivery.wait_ended": lambda store, _, __, t: wait_ended(store, t),
    "derived.wait_for": lambda store, _, __, t: derived_wait_for(store, t),
}


def view_watch_next(store: foldlog.Store, timeout_s: Any) -> object:
    with foldlog.view(store, "raw").watch() as watch:
        return watch.next(timeout_s)


def wait_ended(store: foldlog.Store, timeout_s: Any) -> object:
    actor = pykka.ThreadingActor.start()
    try:
        delivery = store.subscribe(actor)
        delivery.cancel()
        return delivery.wait_ended(timeout_s)
    finally:
        actor.stop()


def derived_wait_for(store: foldlog.Store, timeout_s: Any) -> object:
    with foldlog.derive(store, len, lambda value, _: value) as derived:
        return derived.wait_for(seq=0, timeout_s=timeout_s)


def test_every_call_with_a_timeout_is_among_these() -> None:
    """Two classes were left out, and their timeouts unchecked: nan waited forever."""
    found = {
        name if kind in (foldlog.Store, foldlog.Follower) else f"{kind.__name__.lower()}.{name}"
        for kind in map(vars(foldlog).get, foldlog.__all__)
        if inspect.isclass(kind) and kind is not foldlog.Mirror
        for name, method in inspect.getmembers(kind, inspect.isfunction)
        if not name.startswith("_") and "timeout_s" in inspect.signature(method).parameters
    }
    assert found == set(CALLS)


@pytest.mark.parametrize("call", CALLS)
def test_a_timeout_is_checked_before_anything_is_sent(path: Path, call: str) -> None:
    """apply(timeout_s=nan) raised from a lock after the batch was in the mailbox.

    The batch was applied, but reported as failed.
    """
    with foldlog.open(path) as store, foldlog.follow(path) as follower, store.watch() as watch:
        store.put("a", b"1")
        while not isinstance(watch.next(60), foldlog.Synced):
            pass
        store.put("b", b"2")  # for `watch.next`
        before = store.snapshot().seq
        for value in NO_TIMEOUTS:
            with pytest.raises((TypeError, ValueError), match="timeout_s"):
                CALLS[call](store, follower, watch, value)
        assert store.snapshot().seq == before
        assert store.state is foldlog.State.RUNNING
        assert not (path.parent / "artifact").exists()


@pytest.mark.parametrize("timeout", FOREVER, ids=repr)
@pytest.mark.parametrize("call", CALLS)
def test_a_call_may_wait_without_end(path: Path, call: str, timeout: Any) -> None:
    """An infinite timeout killed the waiting thread with an OverflowError."""
    with foldlog.open(path) as store, foldlog.follow(path) as follower, store.watch() as watch:
        store.put("a", b"1")
        CALLS[call](store, follower, watch, timeout)


@pytest.mark.parametrize("name", DECLARED)
def test_an_option_out_of_bounds_is_refused_before_anything_is_opened(
    path: Path, name: str
) -> None:
    option = DECLARED[name]
    wrong: list[Any] = [*NO_NUMBERS, math.nan, -1, -math.inf]
    wrong += [2.5] if isinstance(option, Count) else [0, 0.0]
    if isinstance(option, Seconds) and not option.may_be_infinite:
        wrong.append(math.inf)
    opener = OPENERS.get(name, foldlog.open)
    for value in wrong:
        with pytest.raises((TypeError, ValueError), match=name):
            opener(path, **{name: value})
        if name == "compact_threshold":
            with pytest.raises((TypeError, ValueError), match=name):
                AppendLogSnapshot.open(path, value)
            with pytest.raises((TypeError, ValueError), match=name):
                AppendLogSnapshot.import_artifact(path, path, value)
    assert not list(path.parent.iterdir()), "nothing was created"


@pytest.mark.parametrize(
    "name", [name for name, option in DECLARED.items() if isinstance(option, Seconds)]
)
def test_an_interval_too_short_to_sleep_is_refused(path: Path, name: str) -> None:
    """An interval of 1e-9 s was accepted, and took a whole processor; a writer that may be busy for
    no longer than that was given up at once."""
    for value in (5e-324, 1e-9):
        with pytest.raises(ValueError, match=f"{name} is at least 0"):
            OPENERS.get(name, foldlog.open)(path, **{name: value})
    assert not list(path.parent.iterdir())
    OPENERS.get(name, foldlog.open)(path, **{name: DECLARED[name].least}).close()


@pytest.mark.parametrize(
    "name",
    [name for name, option in DECLARED.items() if isinstance(option, Count) and not option.most],
)
@pytest.mark.parametrize("backend", ["append-log", "rocksdb"])
def test_a_huge_count_is_no_bound(path: Path, name: str, backend: Any) -> None:
    """RocksDB's binding refused a cache of 2**64 bytes with an OverflowError."""
    for value in (2**63, 2**64, 10**400):
        with foldlog.open(path, backend=backend, **{name: value}) as store:
            store.put("a", b"1")
            store.compact()
            assert store.state is foldlog.State.RUNNING


@pytest.mark.parametrize("value", [None, 0, 1, "", "false", math.nan, ()], ids=repr)
def test_a_flag_is_true_or_false(path: Path, value: Any) -> None:
    """`forward_only=None` checked nothing, and `forward_only="no"` did."""
    with foldlog.open(path) as store, AppendLogSnapshot.open(path.with_name("engine"))[1] as snap:
        for call in (
            lambda: store.apply([], WatchCursor.from_u64(1), forward_only=value),
            lambda: store.apply_async([], WatchCursor.from_u64(1), forward_only=value),
            lambda: snap.apply([], WatchCursor.from_u64(1), forward_only=value),
        ):
            with pytest.raises(TypeError, match="forward_only is True or False"):
                call()
        for reads in (store, snap, store.snapshot()):
            with pytest.raises(TypeError, match="reverse is True or False"):
                reads.range(reverse=value)
            with pytest.raises(TypeError, match="reverse is True or False"):
                reads.iter_range(reverse=value)
        assert store.snapshot().seq == snap.snapshot().seq == 0


def test_a_limit_may_be_larger_than_any_range(path: Path) -> None:
    """It was passed on to `islice`, which takes no more than `sys.maxsize`."""
    with foldlog.open(path) as store:
        store.apply([Put("a", b"1"), Put("b", b"2")], WatchCursor.from_u64(1))
        for limit in (sys.maxsize, 2**63, 10**400):
            assert [entry.key for entry in store.range(limit=limit)] == ["a", "b"]
            page = store.reader.ask(foldlog.RangePage(limit=limit), timeout=60)
            assert ([entry.key for entry in page.entries], page.next) == (["a", "b"], None)


@pytest.mark.parametrize("backend", ["append-log", "rocksdb"])
def test_an_empty_path_is_not_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: Any
) -> None:
    """A RocksDB store was created in the current directory, when a variable was empty."""
    monkeypatch.chdir(tmp_path)
    engine = AppendLogSnapshot if backend == "append-log" else foldlog.RocksDbSnapshot
    for empty in ("", b""):
        for call in (
            lambda: foldlog.open(empty, backend=backend),  # type: ignore[arg-type]  # noqa: B023
            lambda: engine.open(empty),  # type: ignore[arg-type]  # noqa: B023
            lambda: engine.import_artifact(empty, "new"),  # type: ignore[arg-type]  # noqa: B023
            lambda: foldlog.follow(empty),  # type: ignore[arg-type]  # noqa: B023
        ):
            with pytest.raises(ValueError, match="path is empty"):
                call()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("backend", ["append-log", "rocksdb"])
def test_a_path_may_be_bytes_wherever_one_is_taken(tmp_path: Path, backend: Any) -> None:
    """`open` took it, and `export_to` failed over it."""
    log, artifact, copy = (os.fsencode(tmp_path / name) for name in ("log", "artifact", "copy"))
    engine: Any = AppendLogSnapshot if backend == "append-log" else foldlog.RocksDbSnapshot
    with foldlog.open(log, backend=backend) as store:  # type: ignore[arg-type]
        store.put("a", b"1")
        store.export_to(artifact)  # type: ignore[arg-type]
    with engine.import_artifact(artifact, copy)[1] as snap:
        assert snap.get("a").value == b"1"
        snap.export_to(os.fsencode(tmp_path / "again"))


@pytest.mark.parametrize("name", ["files", "step"])
def test_a_seam_of_the_tests_is_checked_too(path: Path, name: str) -> None:
    wrong: list[Any] = [0, "", "x", object()] + ([None] if name == "files" else [])
    for value in wrong:
        with pytest.raises(TypeError, match=name):
            foldlog.open(path, **{name: value})
        if name == "files":
            with pytest.raises(TypeError, match=name):
                AppendLogSnapshot.open(path, files=value)
            with pytest.raises(TypeError, match=name):
                foldlog.follow(path, files=value)
    assert not list(path.parent.iterdir())


def test_what_is_called_later_is_checked_at_once(path: Path) -> None:
    """The thread that called it found out, and only the log told."""
    wrong: Any
    with foldlog.open(path) as store:
        for wrong in (None, 3, "update"):
            with pytest.raises(TypeError, match="build is a function"):
                foldlog.derive(store, wrong, lambda value, _: value)
            with pytest.raises(TypeError, match="update is a function"):
                foldlog.derive(store, len, wrong)
            with pytest.raises(TypeError, match="actor_ref"):
                store.subscribe(wrong)
        assert not store.stats().subscriptions


@pytest.mark.parametrize("name", DECLARED)
def test_the_faces_take_their_defaults_from_the_declarations(name: str) -> None:
    opener = FACES.get(name, foldlog.open)
    assert inspect.signature(opener).parameters[name].default == DECLARED[name].default


@pytest.mark.parametrize(
    "name", [name for name, option in DECLARED.items() if isinstance(option, Seconds)]
)
def test_a_huge_span_stops_no_thread(path: Path, name: str) -> None:
    """An interval of 1e10 s killed the follower's thread and the syncer: OverflowError."""
    with foldlog.open(path) as store:
        store.put("a", b"1")
        if name == "poll_interval_s":
            with foldlog.follow(path, poll_interval_s=1e10) as follower:
                store.apply([Put("b", b"2")], WatchCursor.from_u64(7))
                follower.wait_for(WatchCursor.from_u64(7), 60)
            return
    with OPENERS.get(name, foldlog.open)(path, **{name: 1e10}) as store:
        if name != "audit_interval_s":
            store.put("b", b"2")
        store.compact()
        assert store.state is foldlog.State.RUNNING
        assert not store.stats().restarts


@pytest.mark.parametrize("option", [options.SYNC, options.ON_DAMAGE, options.FORMAT])
@pytest.mark.parametrize("value", ["", "Always", "cut ", 3, b"cut", ["cut"], True])
def test_a_word_that_there_is_none_of_is_refused(
    path: Path, option: Words[Any], value: Any
) -> None:
    for opener in (foldlog.open, AppendLogSnapshot.open):
        with pytest.raises((TypeError, ValueError), match=option.name):
            opener(path, **{option.name: value})
    assert not list(path.parent.iterdir())


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("parse", 5, TypeError),
        ("parse", "upper", TypeError),
        ("on_applied", b"", TypeError),
        ("on_applied", asyncio.sleep, TypeError),
        ("on_oversize", None, TypeError),
        ("on_oversize", "SKIP", ValueError),
        ("mass_delete", None, TypeError),
        ("mass_delete", True, TypeError),
        ("mass_delete", "0.5", TypeError),
        ("mass_delete", math.nan, ValueError),
        ("mass_delete", -0.1, ValueError),
        ("mass_delete", 10**400, ValueError),
        ("prefix", None, TypeError),
        ("prefix", 3, TypeError),
        ("prefix", b"eu/", TypeError),
        ("prefix", ["eu/", None], TypeError),
        ("prefix", ["eu/", "\ud800"], ValueError),
        ("prefix", "\udcff", ValueError),
    ],
)
def test_an_option_of_a_mirror_that_makes_no_sense_is_refused_before_anything_is_opened(
    path: Path, name: str, value: Any, error: type[Exception]
) -> None:
    """Some were found out only by the link, which was restarted five times and then failed; an
    audit interval of nan and a `mass_delete` of True were accepted."""
    with pytest.raises(error, match=name):
        mirror(path, **{name: value})
    assert not list(path.parent.iterdir())


def test_none_is_no_order(path: Path) -> None:
    """put(key, None) deleted, and update(expected=None) checked nothing.

    None is what a missing entry turns into. Then the same with UNSET, which took its place within.
    """
    with foldlog.open(path) as store:
        version = store.put("limit", b"100")
        before = store.snapshot()
        nothing: Any = None
        unset: Any = UNSET
        for call in (
            lambda: store.put("limit", unset),
            lambda: store.create("new", unset),
            lambda: store.update("limit", unset, expected=version),
            lambda: store.update("limit", b"mine", expected=unset),
            lambda: store.put("limit", nothing),
            lambda: store.create("new", nothing),
            lambda: store.update("limit", nothing, expected=version),
            lambda: store.update("limit", b"mine", expected=nothing),
            lambda: store.update("absent", b"mine", expected=nothing),
            lambda: store.delete("limit", expected=nothing),
            lambda: store.apply([Put("x", nothing)], WatchCursor.none()),
            lambda: store.apply([Put("x", b"")], nothing),
        ):
            with pytest.raises(TypeError):
                call()
        assert store.snapshot() is before
        store.delete("limit", expected=version)
        assert "limit" not in store
        assert repr(UNSET) == "UNSET"
