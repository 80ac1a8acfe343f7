"""Options and timeouts: what is taken, by store, engine, follower, watch and command line alike."""

from __future__ import annotations

import asyncio
import inspect
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
    "close": lambda store, _, __, t: store.close(t),
}


def test_every_call_with_a_timeout_is_among_these() -> None:
    found = {
        name
        for kind in (foldlog.Store, foldlog.Follower)
        for name, method in inspect.getmembers(kind, inspect.isfunction)
        if not name.startswith("_") and "timeout_s" in inspect.signature(method).parameters
    }
    assert found == set(CALLS) - {"watch.next"}


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

    None is what a missing entry turns into.
    """
    with foldlog.open(path) as store:
        version = store.put("limit", b"100")
        before = store.snapshot()
        nothing: Any = None
        for call in (
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
